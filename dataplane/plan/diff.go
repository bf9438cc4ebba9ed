// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/lace-net/lace/topology"
)

// Change is one difference between two plans.
type Change struct {
	Op     string `json:"op"`     // "+" for what comes, "-" for what goes, "~" for what stays but differs
	Object string `json:"object"` // "network backend", "peering web > db 10.50.0.0/24"
	Text   string `json:"text"`   // what it is; for "~" what differs: "id 100, was 101"
}

// String is the change on one line: "+ network backend: id 100, …".
func (c Change) String() string { return fmt.Sprintf("%s %s: %s", c.Op, c.Object, c.Text) }

// Diff says what becomes of one plan when another takes its place. Objects come in the order of a
// Plan's fields, of each kind first what goes and then what is new or differs. The numbers that a plan gives to peers, the
// lines of the file and its hash are no differences of their own: the traffic does not depend on them.
func Diff(old, next *Plan) []Change {
	var changes []Change
	before, after := old.objects(), next.objects()
	for i := range after {
		changes = append(changes, compare(before[i], after[i])...)
	}
	return changes
}

// object is a part of a plan by the name that it keeps from plan to plan.
type object struct {
	name  string
	facts []fact
}

// fact is one thing about an object. Objects of one kind have the same facts in the same order.
type fact struct{ name, value string }

func (o object) String() string {
	words := make([]string, 0, len(o.facts))
	for _, f := range o.facts {
		if f.value != "" {
			words = append(words, f.String())
		}
	}
	return strings.Join(words, ", ")
}

func (f fact) String() string { return strings.TrimSpace(f.name + " " + f.value) }

// compare takes the objects of one kind.
func compare(old, next []object) []Change {
	before, after := byName(old), byName(next)
	var changes []Change
	for _, o := range old {
		if _, stays := after[o.name]; !stays {
			changes = append(changes, Change{"-", o.name, o.String()})
		}
	}
	for _, o := range next {
		was, there := before[o.name]
		if !there {
			changes = append(changes, Change{"+", o.name, o.String()})
		} else if text := differences(was, o); text != "" {
			changes = append(changes, Change{"~", o.name, text})
		}
	}
	return changes
}

func byName(objects []object) map[string]object {
	names := make(map[string]object, len(objects))
	for _, o := range objects {
		names[o.name] = o
	}
	return names
}

func differences(old, next object) string {
	var words []string
	for i, f := range next.facts {
		if was := old.facts[i].value; was != f.value {
			words = append(words, fact{f.name, orNone(f.value)}.String()+", was "+orNone(was))
		}
	}
	return strings.Join(words, "; ")
}

func orNone(value string) string {
	if value == "" {
		return "none"
	}
	return value
}

// objects are all parts of the plan, by kind.
func (p *Plan) objects() [][]object {
	names := p.names()
	return [][]object{
		{p.nodeObject()}, each(names, p.Networks, networkObject), each(names, p.Peers, peerObject),
		each(names, p.Foreign, foreignObject), each(names, p.Externals, externalObject), each(names, p.HostRoutes, hostRouteObject),
		each(names, p.Blocks, blockObject), each(names, p.Peerings, peeringObject),
		each(names, p.Stations, stationObject), each(names, p.Members, memberObject),
		{{"masquerade", []fact{{"ports", p.Masquerade.String()}}}}, {conntrackObject(p.Conntrack)}, each(names, p.Ports, portObject),
	}
}

func each[T any](names names, list []T, describe func(T, names) object) []object {
	objects := make([]object, len(list))
	for i, v := range list {
		objects[i] = describe(v, names)
	}
	return objects
}

func (p *Plan) nodeObject() object {
	return object{"node", []fact{
		{"name", p.Node}, {"underlay", address(p.Underlay)}, {"locator", p.Locator.String()}, {"locator-block", p.LocatorBlock.String()},
		{"encapsulation", p.Encapsulation.String()}, {"l2-gso", p.L2GSO.String()}, {"uplinks", strings.Join(p.Uplinks, " ")}, {"via", address(p.Via)},
	}}
}

func networkObject(n Network, _ names) object {
	return object{"network " + n.Name, []fact{
		{"id", fmt.Sprint(n.ID)}, {"", n.Type.String()}, {"gateways", join(n.Gateways)}, {"SID", address(n.SID.Addr)},
		{"SID of frames", address(n.SID2U.Addr)}, {"SID of frames for many", address(n.SID2M.Addr)}, {"flood", n.flood()}, {"base", prefix(n.Base6)},
		{"host", yes(n.Host)},
	}}
}

func peerObject(peer Peer, names names) object {
	network := ""
	if peer.Network != 0 {
		network = names.network(peer.Network)
	}
	return object{"peer " + peer.Name, []fact{
		{"", peer.Kind.String()}, {"underlay", address(peer.Underlay)}, {"locator", peer.Locator.String()}, {"network", network},
		{"SID of frames", address(peer.SIDL2.Addr)},
	}}
}

func foreignObject(n Foreign, _ names) object {
	return object{"foreign network " + n.Name, []fact{{"id", fmt.Sprint(n.ID)}}}
}

func externalObject(e External, _ names) object {
	return object{"external network " + e.Name, []fact{{"id", fmt.Sprint(e.ID)}, {"prefixes", join(e.Prefixes)}}}
}

func hostRouteObject(route netip.Prefix, _ names) object {
	return object{"host route " + route.String(), []fact{{"by", HostSide}}}
}

func blockObject(b Block, names names) object {
	where := "here"
	if !b.Local {
		where = "on " + names.peers[b.Peer]
	}
	return object{fmt.Sprintf("block %s %s", names.network(b.Network), b.Prefix), []fact{{"", where}, {"SID", address(b.SID.Addr)}, {"frames only", yes(b.Frames)}}}
}

func peeringObject(p Peering, names names) object {
	return object{fmt.Sprintf("peering %s > %s %s", names.network(p.From), names.network(p.To), p.Prefix), []fact{
		{"ids", fmt.Sprintf("%d > %d", p.From, p.To)}, {"external", yes(p.External)}, {"masquerade", yes(p.Masquerade)},
		{"by", names.egress(p)}, {"SID", address(p.SID.Addr)},
	}}
}

func stationObject(s Station, names names) object {
	return object{fmt.Sprintf("station %s %s", names.network(s.Network), s.Name), []fact{
		{"mac", s.MAC.String()}, {"on", names.peers[s.Peer]}, {"SID", address(s.SID.Addr)}, {"answers", join(s.Answers)},
	}}
}

func memberObject(m Member, names names) object {
	return object{fmt.Sprintf("member %s %s", names.network(m.Network), names.peers[m.Peer]), []fact{{"SID", address(m.SID.Addr)}}}
}

func conntrackObject(c topology.Conntrack) object {
	return object{"conntrack", []fact{
		{"max", fmt.Sprint(c.Max)},
		{"tcp-opening", c.TCPOpening.String()}, {"tcp-established", c.TCPEstablished.String()},
		{"tcp-closing", c.TCPClosing.String()}, {"tcp-closed", c.TCPClosed.String()},
		{"udp-new", c.UDPNew.String()}, {"udp", c.UDP.String()}, {"icmp", c.ICMP.String()}, {"other", c.Other.String()},
	}}
}

func portObject(p Port, _ names) object {
	return object{"port " + p.HostIf, []fact{
		{"container", p.Container}, {"name", p.Name}, {"network", p.Network}, {"id", fmt.Sprint(p.NetworkID)}, {"", p.Type.String()},
		{"interface", p.IfName}, {"device", p.Device}, {"addresses", join(p.Prefixes)}, {"mac", p.MAC.String()}, {"sticky", yes(p.Sticky)},
		{"gateways", join(valid(p.Gateway4, p.Gateway6))}, {"default route", yes(p.Gateway)}, {"routes", join(p.Routes)}, {"dhcp", yes(p.DHCP)},
		{"source", address(p.Source)}, {"publishes", join(p.Publish)},
	}}
}

func yes(is bool) string {
	if is {
		return "yes"
	}
	return ""
}

// flood is "" where nothing is replicated.
func (n Network) flood() string {
	if !n.Flood {
		return ""
	}
	return fmt.Sprintf("%d/s", n.FloodRate)
}

// prefix is "" for one that is not there.
func prefix(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

// address is "" for one that is not there.
func address(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
