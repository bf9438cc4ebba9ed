/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Why a packet went where it went: at once the index of its counter, and the word that people
 * read. The numbers belong to a layout of the pinned maps: within one, only ever append.
 */
#pragma once

enum reason {
	REASON_NONE = 0,

	/* Packets that went on. */
	REASON_ENCAPSULATED,	   /* container to another node */
	REASON_DECAPSULATED,	   /* another node to a container */
	REASON_LOCAL,		   /* container to container on this node */
	REASON_GATEWAY_ANSWERED,   /* ARP, ND or echo to the gateway answered by the program */
	REASON_GATEWAY_PASSED,	   /* handed to the gateway in the network's VRF */
	REASON_NEIGHBOUR_ANSWERED, /* ARP or ND about a container answered by the program */
	REASON_REPLICATED,	   /* copied to all who are in the L2 network */
	REASON_EGRESS,		   /* out of the overlay, by the host's own routing */
	REASON_INGRESS,		   /* from outside of the overlay to a container */
	REASON_TO_HOST,		   /* to this host itself */
	REASON_FROM_HOST,	   /* from this host itself to a container */

	/* Refused, and the sender was told by ICMP. */
	REASON_HOP_LIMIT,   /* hop limit ran out */
	REASON_TOO_BIG,	    /* larger than the path takes */
	REASON_NO_ROUTE,    /* no block of this network holds the destination */
	REASON_NO_ENDPOINT, /* the block is ours, but no container has the address */

	/* Refused at the container's port. */
	REASON_NO_PORT,		     /* the interface is not in the port table */
	REASON_MALFORMED,	     /* header cut short or inconsistent */
	REASON_NOT_IP,		     /* neither IPv4, IPv6 nor ARP, or VLAN-tagged */
	REASON_SPOOFED_MAC,	     /* source MAC is not the container's */
	REASON_SPOOFED_ADDRESS,	     /* source address is not the container's */
	REASON_NOT_FOR_GATEWAY,	     /* frame for another MAC than the gateway's */
	REASON_MULTICAST,	     /* broadcast and multicast stay in the container */
	REASON_SRV6_FROM_CONTAINER,  /* routing header, or destination in the locator block */
	REASON_ROUTER_ADVERTISEMENT, /* a container is no router */
	REASON_DHCP_SERVER,	     /* a container is no DHCP server */
	REASON_GATEWAY_CLOSED,	     /* the gateway takes ARP, ND and echo only */
	REASON_NEIGHBOUR_UNKNOWN,    /* ARP or ND for another address than the gateway */

	/* Refused at the uplink. */
	REASON_UNKNOWN_SOURCE,	 /* outer source is no node of the topology */
	REASON_UNKNOWN_FUNCTION, /* SID with a function that is not ours */
	REASON_UNKNOWN_NETWORK,	 /* SID with a network that this node does not have */
	REASON_SID_TAIL,	 /* SID with bits behind the network */
	REASON_NO_PEERING,	 /* outer source and SID name networks that no peering joins */
	REASON_WRONG_PAYLOAD,	 /* next header does not fit the SID's function */
	REASON_SEGMENTS_LEFT,	 /* routing header that is not at its end */
	REASON_ROUTING_HEADER,	 /* routing header of another type or length */
	REASON_UNDERLAY_ICMP,	 /* ICMPv6 to an address of the locator */
	REASON_ECN_CONGESTION,	 /* outer CE on an inner packet without ECN (RFC 6040) */

	/* Failed on the way out. */
	REASON_ENCAP_FAILED,  /* no room for the outer header */
	REASON_ENCAP_NESTED,  /* already encapsulated, cannot be segmented again */
	REASON_DECAP_FAILED,  /* the outer header could not be taken off */
	REASON_NO_NEXTHOP,    /* no way to the peer: no uplink, no route */
	REASON_ICMP_FAILED,   /* an error answer could not be built */
	REASON_ICMP_LIMITED,  /* too many error answers for this container */
	REASON_STAGE_MISSING, /* a tail call found no program */

	/* Refused for what is known of flows. */
	REASON_CONNTRACK_FULL,	 /* the table takes no more flows */
	REASON_NO_FLOW,		 /* an ICMP error or answer that belongs to no flow */
	REASON_FRAGMENT_UNKNOWN, /* a later fragment whose first was not seen */
	REASON_FRAGMENT_TINY,	 /* a fragment that cuts the transport header (RFC 1858) */
	REASON_NO_NETWORK,	 /* the container's network is not in the topology any more */

	/* Refused in an L2 network. */
	REASON_UNKNOWN_MAC,   /* nobody is known to have the destination MAC */
	REASON_FLOOD_OFF,     /* for many, and the network does not replicate */
	REASON_FLOOD_LIMITED, /* too many frames for many from this container or router */
	REASON_GSO_FRAME,     /* a frame to be segmented that no next hop takes whole, and nothing cuts it */

	/* Refused between the overlay, the host and the outside. */
	REASON_HOST_CLOSED,	   /* for an address of this host, from a network without host = true */
	REASON_NO_EXTERNAL,	   /* the address is in no external network */
	REASON_NO_EGRESS,	   /* the host has no route, or only one by an interface that nothing comes back from */
	REASON_NO_HOST_ADDRESS,	   /* the host has no address of the family to masquerade with */
	REASON_PORTS_EXHAUSTED,	   /* all ports to masquerade with are in use for that destination */
	REASON_NOT_TRANSLATABLE,   /* only TCP, UDP and ICMP queries can be masqueraded and published */
	REASON_FLOW_CLASH,	   /* its answers would be those of another flow */
	REASON_TRANSLATION_FAILED, /* addresses or ports could not be rewritten */

	REASON_MAX,
};

#define REASON_SLOTS 128 /* size of the pinned counter map: room to append */

_Static_assert(REASON_MAX <= REASON_SLOTS, "reasons");
_Static_assert(REASON_FROM_HOST < 16, "room in the map traffic");
