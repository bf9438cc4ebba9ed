// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"

	"github.com/lace-net/lace/bpf"
)

// Reason says why a packet went where it went: bpf/lib/reason.h, and the index of its counter.
type Reason = bpf.LaceReason

// reasons gives each reason its word and one sentence. A test holds it against the C enum.
var reasons = []struct{ name, help string }{
	bpf.LaceReasonREASON_NONE:                 {"none", "no reason was given"},
	bpf.LaceReasonREASON_ENCAPSULATED:         {"encapsulated", "sent to another node"},
	bpf.LaceReasonREASON_DECAPSULATED:         {"decapsulated", "came from another node and went to a container"},
	bpf.LaceReasonREASON_LOCAL:                {"local", "went from container to container on this node"},
	bpf.LaceReasonREASON_GATEWAY_ANSWERED:     {"gateway_answered", "ARP, ND or echo for the gateway, answered by the program"},
	bpf.LaceReasonREASON_GATEWAY_PASSED:       {"gateway_passed", "ARP, ND or ICMP for the gateway, handed to its VRF"},
	bpf.LaceReasonREASON_NEIGHBOUR_ANSWERED:   {"neighbour_answered", "ARP or ND about a container, answered by the program"},
	bpf.LaceReasonREASON_REPLICATED:           {"replicated", "a frame for many, copied to all who are in the L2 network"},
	bpf.LaceReasonREASON_EGRESS:               {"egress", "left the overlay by the host's own routing"},
	bpf.LaceReasonREASON_INGRESS:              {"ingress", "came from outside of the overlay and went to a container"},
	bpf.LaceReasonREASON_TO_HOST:              {"to_host", "went from a container to this host itself"},
	bpf.LaceReasonREASON_FROM_HOST:            {"from_host", "came from this host itself and went to a container"},
	bpf.LaceReasonREASON_HOP_LIMIT:            {"hop_limit", "the hop limit ran out; the sender was told"},
	bpf.LaceReasonREASON_TOO_BIG:              {"too_big", "larger than the path takes; the sender was told"},
	bpf.LaceReasonREASON_NO_ROUTE:             {"no_route", "no block of the network, or of one that it may open flows to, holds the destination; the sender was told"},
	bpf.LaceReasonREASON_NO_ENDPOINT:          {"no_endpoint", "the block is this node's, but no container has the address"},
	bpf.LaceReasonREASON_NO_PORT:              {"no_port", "came from an interface that is not in the port table, as that of a container whose network left the topology"},
	bpf.LaceReasonREASON_MALFORMED:            {"malformed", "a header is cut short or contradicts itself"},
	bpf.LaceReasonREASON_NOT_IP:               {"not_ip", "neither IPv4, IPv6 nor ARP, or VLAN-tagged, in an L3 network"},
	bpf.LaceReasonREASON_SPOOFED_MAC:          {"spoofed_mac", "the source MAC is not the container's, or not one that the node may send from"},
	bpf.LaceReasonREASON_SPOOFED_ADDRESS:      {"spoofed_address", "the source address is not the container's, or not one that the node may send from"},
	bpf.LaceReasonREASON_NOT_FOR_GATEWAY:      {"not_for_gateway", "the frame is for another MAC than the gateway's"},
	bpf.LaceReasonREASON_MULTICAST:            {"multicast", "broadcast or multicast in an L3 network"},
	bpf.LaceReasonREASON_SRV6FROM_CONTAINER:   {"srv6_from_container", "a container sent a routing header, or to the locator block"},
	bpf.LaceReasonREASON_ROUTER_ADVERTISEMENT: {"router_advertisement", "a container advertised itself as a router"},
	bpf.LaceReasonREASON_DHCP_SERVER:          {"dhcp_server", "a container answered as a DHCP server"},
	bpf.LaceReasonREASON_GATEWAY_CLOSED:       {"gateway_closed", "the gateway takes ARP, ND and echo only"},
	bpf.LaceReasonREASON_NEIGHBOUR_UNKNOWN:    {"neighbour_unknown", "ARP or ND for an address that nobody is known to have"},
	bpf.LaceReasonREASON_UNKNOWN_SOURCE:       {"unknown_source", "SRv6 whose outer source is no node of the topology"},
	bpf.LaceReasonREASON_UNKNOWN_FUNCTION:     {"unknown_function", "SID with a function that this node does not have"},
	bpf.LaceReasonREASON_UNKNOWN_NETWORK:      {"unknown_network", "SID with a network that this node does not have"},
	bpf.LaceReasonREASON_SID_TAIL:             {"sid_tail", "SID with bits set behind its network"},
	bpf.LaceReasonREASON_NO_PEERING:           {"no_peering", "outer source and SID name two networks that no peering joins"},
	bpf.LaceReasonREASON_WRONG_PAYLOAD:        {"wrong_payload", "the next header does not fit the SID's function"},
	bpf.LaceReasonREASON_SEGMENTS_LEFT:        {"segments_left", "segment routing header that is not at its last segment"},
	bpf.LaceReasonREASON_ROUTING_HEADER:       {"routing_header", "routing header of another type or length than one segment"},
	bpf.LaceReasonREASON_UNDERLAY_ICMP:        {"underlay_icmp", "ICMPv6 of the underlay to an address of the locator"},
	bpf.LaceReasonREASON_ECN_CONGESTION:       {"ecn_congestion", "congestion marked on the outer header of a packet without ECN (RFC 6040)"},
	bpf.LaceReasonREASON_ENCAP_FAILED:         {"encap_failed", "the kernel made no room for the outer header"},
	bpf.LaceReasonREASON_ENCAP_NESTED:         {"encap_nested", "a large packet that already came out of the overlay cannot go in again"},
	bpf.LaceReasonREASON_DECAP_FAILED:         {"decap_failed", "the kernel did not take the outer header off"},
	bpf.LaceReasonREASON_NO_NEXTHOP:           {"no_nexthop", "no uplink or no route leads to the peer"},
	bpf.LaceReasonREASON_ICMP_FAILED:          {"icmp_failed", "an answer to the sender could not be built"},
	bpf.LaceReasonREASON_ICMP_LIMITED:         {"icmp_limited", "the container has had too many error answers lately"},
	bpf.LaceReasonREASON_STAGE_MISSING:        {"stage_missing", "a tail call found no program"},
	bpf.LaceReasonREASON_CONNTRACK_FULL:       {"conntrack_full", "the table of flows takes no new one; those that are in it go on"},
	bpf.LaceReasonREASON_NO_FLOW:              {"no_flow", "an ICMP error or answer that belongs to no flow, or a packet of a connection that was ended"},
	bpf.LaceReasonREASON_FRAGMENT_UNKNOWN:     {"fragment_unknown", "a later fragment of a packet whose first was not seen"},
	bpf.LaceReasonREASON_FRAGMENT_TINY:        {"fragment_tiny", "a fragment that cuts the transport header (RFC 1858)"},
	bpf.LaceReasonREASON_NO_NETWORK:           {"no_network", "the tables know a container but not its network"},
	bpf.LaceReasonREASON_UNKNOWN_MAC:          {"unknown_mac", "nobody in the L2 network is known to have the destination MAC"},
	bpf.LaceReasonREASON_FLOOD_OFF:            {"flood_off", "a frame for many in an L2 network that does not replicate"},
	bpf.LaceReasonREASON_FLOOD_LIMITED:        {"flood_limited", "too many frames for many from this container or router"},
	bpf.LaceReasonREASON_GSO_FRAME:            {"gso_frame", "a frame to be segmented that no next hop takes whole, and nothing cuts it"},
	bpf.LaceReasonREASON_HOST_CLOSED:          {"host_closed", "for an address of this host, from a network that does not have host = true"},
	bpf.LaceReasonREASON_NO_EXTERNAL:          {"no_external", "an address outside of the overlay that is in no external network"},
	bpf.LaceReasonREASON_NO_EGRESS:            {"no_egress", "the host has no route there, or only one by an interface that Lace sees no answers at"},
	bpf.LaceReasonREASON_NO_HOST_ADDRESS:      {"no_host_address", "the host has no address of the family to masquerade with"},
	bpf.LaceReasonREASON_PORTS_EXHAUSTED:      {"ports_exhausted", "all ports to masquerade with are in use for that destination"},
	bpf.LaceReasonREASON_NOT_TRANSLATABLE:     {"not_translatable", "only TCP, UDP and queries of ICMP can be masqueraded and published"},
	bpf.LaceReasonREASON_FLOW_CLASH:           {"flow_clash", "its answers could not be told from those of another flow"},
	bpf.LaceReasonREASON_TRANSLATION_FAILED:   {"translation_failed", "addresses or ports could not be rewritten"},
}

// ReasonName is the word for a reason: "no_route".
func ReasonName(r Reason) string {
	if int(r) < len(reasons) {
		return reasons[r].name
	}
	return fmt.Sprintf("reason_%d", r) // of a newer agent's programs
}

// ReasonHelp is one sentence about a reason.
func ReasonHelp(r Reason) string {
	if int(r) < len(reasons) {
		return reasons[r].help
	}
	return "a reason that this version does not know"
}

// IsRefusal tells reasons that end a packet from those that send it on.
func IsRefusal(r Reason) bool { return r > bpf.LaceReasonREASON_FROM_HOST }

// KnownReason says whether there is a reason of that word.
func KnownReason(name string) bool {
	for _, r := range reasons {
		if r.name == name {
			return true
		}
	}
	return false
}
