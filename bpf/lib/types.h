/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Keys and values of the maps. Every byte has a name, padding included, so that the Go types
 * made from BTF have the same layout. Addresses and ports are in network order.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

/* An IPv6 address, or an IPv4 address as ::ffff:a.b.c.d. */
union addr {
	__u8 u8[16];
	__be32 be32[4];
};

struct mac {
	__u8 u8[6];
};

/*
 * Tables of the configuration have two slots. A generation is written to the slot that is not in use, and becomes the
 * active one with one write of `generation`, whose lowest bit is the slot. The other bits count: with them a flow that was
 * decided before, under whatever slot, is known as old and decided again.
 */
#define SLOT(generation) ((generation) & 1)
#define SCOPE(network, generation) ((network) | (__u32)SLOT(generation) << 31)

/* In tries of prefixes, scope or slot also has the family: ::/0 is not to match IPv4. */
#define IN_FAMILY(scope, v4) ((scope) | (__u32) !!(v4) << 30)

/*
 * Two numbers of networks that no topology gives: the host itself, this one or another node's, and whatever is at an interface
 * that is not of the overlay. Which external network an address out there is in follows from the address.
 */
#define NETWORK_OF_HOSTS 0xffffff
#define NETWORK_OUTSIDE 0xfffffe

struct port_key {
	__u32 ifindex; /* of the veth's host end */
	__u32 slot;
};

enum port_flags {
	PORT_HAS_V4 = 1,
	PORT_HAS_V6 = 2,
	PORT_DHCP = 4,	 /* its network lets containers ask for addresses, and give them */
	PORT_DIRECT = 8, /* no container's veth, but a device of the host: see ENDPOINT_DIRECT */
};

/* What a container is and may send. In an L2 network without a gateway the gateways are 0. */
struct port {
	__u32 network;
	__u32 flags;
	union addr v6;
	union addr gateway6;
	union addr source; /* outer source of its packets */
	__be32 v4;
	__be32 gateway4;
	__u32 traffic; /* of its network: see the map */
	__u16 mtu;
	struct mac mac;
};

struct endpoint_key {
	__u32 scope;
	union addr addr;
};

enum endpoint_flags {
	ENDPOINT_DIRECT = 1, /* a device of the host (a tap, a veth of others): what is for it is sent out of it */
};

/* A container on this node, by network and address; or what is at a router, for which only questions are answered here. */
struct endpoint {
	__u32 ifindex; /* host end; 0: at a router */
	struct mac mac;
	__u16 mtu;
	__u32 flags;
};

/* A MAC address of an L2 network. */
struct fdb_key {
	__u32 scope;
	struct mac mac;
	__u8 pad[2];
};

/* Where it is: at a port of this node, or at another node. Those that follow from addresses of pools are not in the table. */
struct station {
	__u32 ifindex; /* host end; 0: at another node */
	__u32 flags;   /* enum endpoint_flags */
	__u32 peer;    /* index into the nexthops */
	__u16 mtu;     /* of the port */
	__u16 pad;
	union addr sid; /* End.DT2U of that node */
};

/* A MAC address that the topology does not know, seen as the source of another node's frame. It outlives generations. */
struct sighting_key {
	__u32 network;
	struct mac mac;
	__u8 pad[2];
};

struct sighting {
	__be64 locator; /* of the node, its first 64 bits */
	__u32 seen;	/* tick */
	__u32 pad;
};

/* Who gets a copy of a frame for many, by network; key: scope. */
struct group {
	__u32 locals;  /* places of ports, 0 and up; some may be empty */
	__u32 remotes; /* places of nodes */
};

#define MEMBER_REMOTE 0x80000000

struct member_key {
	__u32 scope;
	__u32 place; /* for nodes | MEMBER_REMOTE */
};

struct member {
	__u32 ifindex;	/* of the port; 0: a node */
	__u32 peer;	/* of the node: index into the nexthops */
	union addr sid; /* End.DT2M of the node, or what takes frames at a router */
};

#define BLOCK_LENGTHS 4 /* distinct block lengths that one network may have in a family */

enum network_flags {
	NETWORK_LOCAL = 1,     /* this node has a block of it */
	NETWORK_L2 = 2,	       /* an Ethernet segment */
	NETWORK_FLOOD = 4,     /* L2: frames for many are replicated */
	NETWORK_HOST = 8,      /* hosts may open flows to it, and it to its own host where a peering says so */
	NETWORK_EXTERNAL = 16, /* prefixes outside of the overlay */
};

/* A network that this node has, or that one of those is peered with; key: scope. */
struct network {
	__u32 flags;
	__u32 line;	  /* of the topology */
	__u32 traffic;	  /* number of its counters, 1 and up; see the map */
	__u32 flood_rate; /* L2: frames for many, of one container, a second */
	union addr
		base6; /* L2 without IPv4: the first 96 bits of all addresses in pools; 0: MACs hold IPv4 addresses */
	__u8 bits4[BLOCK_LENGTHS]; /* lengths of its blocks, longest first, 0 ends; IPv6 bits */
	__u8 bits6[BLOCK_LENGTHS];
};

/* A block of addresses; the length is part of the key because the look-up is exact. */
struct block_key {
	__u32 scope;
	__u32 bits; /* prefix length, in IPv6 bits (96 + n for IPv4) */
	union addr prefix;
};

enum block_flags {
	BLOCK_LOCAL = 1,  /* this node's own */
	BLOCK_FRAMES = 2, /* a router's that takes frames only; so is the sid */
};

struct block {
	__u32 peer; /* index into the nexthops */
	__u32 flags;
	union addr sid;
};

/* What a network may open flows to beside itself, a longest-prefix trie; scope: the network that opens. */
struct peering_key {
	__u32 prefixlen; /* 32 + bits of the address, in IPv6 bits */
	__u32 scope;	 /* in its family */
	union addr addr;
};

enum peering_flags {
	PEERING_EXTERNAL = 1,	/* the address is outside of the overlay */
	PEERING_MASQUERADE = 2, /* … and sees the host's address for the container's */
};

struct peering {
	__u32 network; /* that the address is in */
	__u32 line;    /* of the topology */
	__u32 flags;
	__u32 peer;	/* EXTERNAL: node that packets leave by, index into the nexthops; 0: this one */
	union addr sid; /* … and where it takes them */
};

/* An address outside of the overlay, a longest-prefix trie. */
struct external_key {
	__u32 prefixlen; /* 32 + bits of the address, in IPv6 bits */
	__u32 slot;	 /* in its family */
	union addr addr;
};

struct external {
	__u32 network; /* that the address is in */
	__u32 line;    /* of the topology */
};

/* A port of this node's addresses that is a container's. */
struct publication_key {
	__u32 slot;
	union addr addr; /* of this node; 0: any of them */
	__be16 port;
	__u8 protocol;
	__u8 v4; /* family of what is sent there */
};

struct publication {
	__u32 network;
	union addr addr; /* of the container */
	__be16 port;	 /* … and the one that it listens at */
	__u8 pad[2];
};

enum egress_flags {
	EGRESS_HAS_V4 = 1,
	EGRESS_HAS_V6 = 2,
	EGRESS_RAW = 4, /* no Ethernet header */
};

/* An interface of the host that packets may leave by, as answers are seen that come in there; key: its index. */
struct egress {
	__u32 flags;
	__be32 v4; /* what containers are masqueraded as */
	union addr v6;
};

/* What the host itself is to the overlay. Its addresses are in a map of their own. */
struct host {
	__u32 stack;	/* lc-host: packets for the outside are routed as if they came in there */
	__u32 peer;	/* lc-host-peer: what is sent out of it comes in at lc-host */
	__u32 loopback; /* lo */
	__be32 v4;	/* what it calls itself to containers and to the outside; 0: nothing */
	union addr v6;
	struct mac mac; /* of lc-host */
	__u8 pad[2];
};

struct peer_key {
	__be64 locator; /* its first 64 bits */
	__u32 slot;
	__u32 pad;
};

/* Another node. */
struct peer {
	__u32 index;	 /* into the nexthops */
	__u32 network;	 /* a router's one network; 0: the outer source tells */
	union addr sid4; /* a router's SIDs; 0: composed of locator and network */
	union addr sid6;
	union addr sid_l2;
};

#define NEXTHOPS 4097 /* of one slot; index 0 is never used */

enum nexthop_flags {
	NEXTHOP_MAC = 1, /* the MAC addresses below are known */
	NEXTHOP_RAW = 2, /* the uplink has no Ethernet header */
};

/* The way to a peer; index: slot * NEXTHOPS + peer. */
struct nexthop {
	__u32 ifindex; /* 0: no way */
	__u16 mtu;     /* largest IPv6 packet, outer header included */
	__u16 flags;
	struct mac dst;
	struct mac src;
};

/*
 * How long a flow may be idle, in ticks of 2^30 ns (1.07 s). RFC 5382 REQ-5, RFC 4787 REQ-5, RFC 5508 REQ-1.
 */
struct timeouts {
	__u32 tcp_opening; /* not established yet */
	__u32 tcp_established;
	__u32 tcp_closing; /* one side has closed */
	__u32 tcp_closed;  /* both have, or one has reset it */
	__u32 udp_new;	   /* not answered yet */
	__u32 udp;
	__u32 icmp;
	__u32 other; /* every other protocol */
};

/* How a frame that is still to be segmented (GSO) goes to another node of Lace. To a router it is always cut. */
enum l2_gso {
	L2_GSO_SHIM,	/* whole, behind a GRE header of 4 bytes */
	L2_GSO_SEGMENT, /* cut first: next header 143 for everything */
};

/* What holds for the whole node, of one generation; 64-bit values in network order are compared as they stand. */
struct config {
	__be64 locator;
	__be64 locator_mask;
	__be64 locator_block;
	__be64 locator_block_mask;
	__u8 locator_bits;
	__u8 srh;    /* encapsulate with a segment routing header */
	__u8 vrf;    /* the gateway's address is on the bridge: hand up what is for it */
	__u8 l2_gso; /* enum l2_gso */
	struct mac gateway;
	__u8 outside; /* how many external networks there are, at most 255 */
	__u8 pad;
	__u32 segmenter;  /* host interface that cuts GSO frames; 0: there is none */
	__u16 first_port; /* of those that containers are masqueraded with, in host order */
	__u16 last_port;
	__u32 pad2;
	struct timeouts timeouts;
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

/* Refused packets of a network; network 0: not known when it was refused. */
struct refusal_key {
	__u32 network;
	__u32 reason;
};

enum budget_kind {
	BUDGET_ERRORS,	 /* error answers that a container may still be sent; of: interface index */
	BUDGET_FLOOD,	 /* frames for many that a container may still send; of: interface index */
	BUDGET_FLOOD_IN, /* … that a router may still send; of: its number */
};

struct budget_key {
	__u32 kind;
	__u32 of;
};

struct budget {
	__s64 tokens; /* below 0 where two processors took the last one at once */
	__u64 stamp;  /* ns, coarse monotonic clock */
};

/*
 * A flow in one direction. Queries of ICMP (echo, timestamp) have the identifier as source port and the
 * type as destination port; what has no ports has 0. There is one entry for each direction.
 */
struct flow_key {
	__u32 network; /* the sender's */
	union addr src;
	union addr dst;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 pad[3];
};

enum flow_state {
	FLOW_NEW,	  /* one direction has been seen */
	FLOW_ANSWERED,	  /* TCP: SYN and SYN+ACK */
	FLOW_ESTABLISHED, /* both directions; TCP: the handshake is complete */
	FLOW_CLOSING,	  /* TCP: one FIN */
	FLOW_CLOSED,	  /* TCP: both FINs, or a valid RST */
	FLOW_STATES,
};

enum flow_flags {
	FLOW_REPLY = 1,	       /* against the direction in which the flow was opened */
	FLOW_UNDERLAY = 2,     /* comes in from another node */
	FLOW_PICKED = 4,       /* TCP: first seen in the middle */
	FLOW_FIN = 8,	       /* TCP: this direction has closed */
	FLOW_ENDED = 16,       /* TCP: it was let pass before, and is not any more: only a SYN gets through */
	FLOW_BRIDGED = 32,     /* its frames are carried as they are: nothing is routed */
	FLOW_DIRECT = 64,      /* the local end is a device of the host: ENDPOINT_DIRECT */
	FLOW_ROUTER = 128,     /* BRIDGED: the far end is a router, which knows no shim */
	FLOW_TRANSLATED = 256, /* its packets are rewritten */
	FLOW_RAW = 512,	       /* OUT: by an interface without Ethernet header */
};

/* Which way a packet goes on. */
enum way {
	WAY_CONTAINER, /* of this node */
	WAY_NODE,      /* encapsulated to another one */
	WAY_OUT,       /* as it is, by the host's own routing */
	WAY_HOST,      /* to the host's stack, by lc-host */
	WAY_LOOPBACK,  /* to the host's stack, by lo: an answer to what it sent to itself */
};

/* What addresses and ports become. As in a flow_key. */
struct rewrite {
	union addr src;
	union addr dst;
	__be16 sport;
	__be16 dport;
};

/* Where the packets of a flow go, and what is known of it. 152 bytes. */
struct flow {
	__u64 packets;
	__u64 bytes;
	__u32 seen; /* tick: last packet that counts; what the collector reads lies together */
	__u8 state;
	__u8 way;
	__u16 mtu;	  /* largest packet that the local container, or the way out, takes */
	__u32 generation; /* of the decision, whole value */
	__u32 network;	  /* the receiver's */
	__u32 since;	  /* tick: first packet */
	__u32 line;	  /* of the topology that lets it pass */
	__u32 counter;	  /* index into traffic */
	__u32 ifindex;	  /* host end of the local container; OUT: the interface, as last looked up */
	__u32 peer;	  /* NODE: its nexthop */
	__u32 seq;	  /* TCP: sequence number that is due next */
	__u32 ack;	  /* TCP: last acknowledgement */
	union addr sid;	  /* outer destination, sent or expected */
	union addr
		source; /* UNDERLAY: outer source that was last found good; else NODE: the one that is sent, 0: the port's */
	struct mac mac; /* of the local container; BRIDGED: the frames' destination; OUT: of the next hop */
	__u16 flags;
	struct rewrite to; /* TRANSLATED */
	struct mac from;   /* OUT: of the interface */
	__u8 pad[6];
	__u32 looked; /* OUT: tick of the last look-up; only during that the MAC addresses and the interface hold */
};

/* The first fragment of a packet tells the later ones protocol and ports. */
struct fragment_key {
	__u32 network;
	__u32 id;
	union addr src;
	union addr dst;
	__u32 protocol; /* IPv6: 0, as only the first fragment's counts, RFC 8200 4.5 */
};

struct fragment {
	__be16 sport;
	__be16 dport;
	__u32 seen; /* tick */
	__u8 protocol;
	__u8 pad[3];
};

/* What a run of the collector is told, and tells. It is the context of a syscall program. */
struct collection {
	__u32 now;		   /* in: tick; a syscall program cannot read the coarse clock itself */
	__u32 pressure;		   /* in: 1: closed flows and unanswered ones go early */
	__u32 all;		   /* in: 1: whatever the age, all that the filter takes */
	__u32 network;		   /* in: only flows from or to it; 0: any */
	union addr addr;	   /* in: only flows from or to it; 0: any */
	__u32 entries;		   /* out: entries that stay, both directions of a flow counted */
	__u32 collected;	   /* out: entries that were removed */
	__u32 states[FLOW_STATES]; /* out: entries that stay, by state */
	__u32 pad;
};

/* What lies behind the headers of an IPv6 packet. */
struct upper {
	__u32 offset;
	__be32 id;     /* of the fragmented packet */
	__u16 later;   /* a fragment, not the first: where it lies in the payload; the offset is inside of that */
	__u8 first;    /* a fragment, the first of several */
	__u8 protocol; /* ROUTING: a routing header, which no packet here may have */
};

/* Where a packet came in that no container and no node sent. */
enum outer_side {
	OUTER_NONE,
	OUTER_OUTSIDE,	/* an interface of the host */
	OUTER_HOST,	/* lc-host-peer: the host's stack */
	OUTER_LOOPBACK, /* lo: the host's stack, to itself */
};

/* What a packet is that comes from outside of the overlay or leaves it. 8 bytes, which are cleared at once. */
struct outside {
	__u8 way;	 /* deliver: enum way */
	__u8 side;	 /* enum outer_side */
	__u8 translated; /* deliver: it becomes `rewrite` */
	__u8 masquerade; /* … and its sender's address is the host's */
	__u8 reserved;	 /* the entry of the way back is written */
	__u8 bare;	 /* from the underlay: the outer header is off already */
	__u8 neighbour;	 /* OUT: the MAC addresses of the frame are known */
	__u8 related;	 /* ICMP error: it is rewritten already */
};

/* What the stages hand on, one per CPU. Valid from an entry program to the end of its tail calls. */
struct context {
	struct flow_key key; /* of the packet; an ICMP error has that of its flow */
	struct upper upper;  /* as find_upper left it */
	__u32 generation;
	__u32 network; /* the receiver's */
	__u32 line;
	__u32 traffic; /* number of the counters of the network that the container here is in */
	__u32 ifindex; /* deliver: host end of the local container */
	__u32 peer;    /* deliver: nexthop of a remote one; from the underlay: of the sender */
	__u32 origin;  /* L2: host end that the frame came in by */
	__u32 seq;     /* TCP: number that is due after this packet */
	__u32 ack;
	union addr source; /* outer source, sent or found */
	union addr sid;	   /* outer destination, sent or found */
	union addr back;   /* from the underlay: SID of the way back */
	struct mac mac;	   /* deliver: of the local container */
	struct mac to;	   /* L2: the frame's destination … */
	struct mac from;   /* … source … */
	__be16 type;	   /* … and EtherType, behind a VLAN tag that the kernel has taken off */
	__be16 vlan;	   /* L2, deliver: that tag's protocol; 0: none */
	__u16 vlan_tci;	   /* in host order */
	__u16 mtu;	   /* deliver: largest packet that the local container takes */
	__u16 l3_len;	   /* bytes from the IP header on */
	__u8 v4;
	__u8 tos;      /* type of service or traffic class */
	__u8 tcp;      /* flags */
	__u8 kind;     /* enum packet_kind */
	__u8 known;    /* the flow has entries, of an older generation */
	__u8 reply;    /* known: against the direction in which it was opened */
	__u8 underlay; /* came in from another node */
	__u8 srh;      /* and has a segment routing header */
	__u8 icmp_type;
	__u8 icmp_code;
	__u16 icmp_mtu;
	__u8 nd;    /* gateway: neighbour discovery */
	__u8 raw;   /* the packet came in without an Ethernet header */
	__u8 stage; /* where the packet is */
	__u8 ended; /* the flow was let pass before, and is not any more */
	__u8 ecn;   /* from the underlay: congestion bits of the outer header */
	__u8 l2;    /* the port is in an L2 network */
	/* What is said of a frame of an L2 network; all 0 for what is routed. */
	__u8 bridged;		/* it is carried as it is */
	__u8 opaque;		/* it belongs to no flow: not IP, tagged, or for many */
	__u8 direct;		/* deliver: the local end is a device of the host */
	__u8 shim;		/* from the underlay: behind a GRE header */
	__u8 router;		/* deliver: the far end is a router, which knows no shim */
	struct outside outside; /* which way it goes, and what becomes of it; all 0 for what stays in the overlay */
	__u32 external;		/* network of the far end outside */
	__u32 out;		/* OUT: the interface */
	__u16 out_flags;	/* … enum egress_flags */
	__u16 l4;		/* where the transport header is, from the IP header on */
	__u16 quote;		/* ICMP error: where the IP header is that it quotes, from its own on, … */
	__u16 quote_l4;		/* … and the transport header behind that */
	__u8 quoted;		/* … and that one's protocol */
	struct mac out_dst;	/* OUT: addresses of the frame, where the next hop's is known */
	struct mac out_src;
	union addr gateway; /* OUT: the next hop */
	struct rewrite rewrite;
};

enum packet_kind {
	PACKET_WHOLE,
	PACKET_FIRST_FRAGMENT,
	PACKET_LATER_FRAGMENT,
	PACKET_ICMP_ERROR,
};

#define QUOTE_MAX 1232 /* largest part of a packet that an ICMPv6 error quotes, RFC 4443 2.4 (c) */

#define EVENT_HEAD 128 /* bytes of a packet that an event shows */

enum verdict {
	VERDICT_STEP,	 /* explain only: the packet came to a stage */
	VERDICT_PASSED,	 /* a new flow */
	VERDICT_REFUSED, /* a packet */
	VERDICT_ENDED,	 /* a packet, and with it the flow that it belongs to */
};

/* What is told of a new flow or a refused packet. */
struct event {
	__u64 time; /* ns, monotonic clock */
	__u32 reason;
	__u32 ifindex;	  /* where it came in */
	__u32 len;	  /* of the packet, from its first header on */
	__u32 missed;	  /* events before this one, on this CPU, that were too many */
	__u32 network;	  /* the sender's; 0: not known */
	__u32 to;	  /* the receiver's; 0: not known */
	__u32 line;	  /* of the topology that decided; 0: none */
	__u32 peer;	  /* node that it goes to, or comes from; 0: neither */
	__u32 generation; /* whose slot has that peer */
	__u32 output;	  /* interface of the local container that it goes to; 0: none */
	union addr sid;	  /* outer destination, sent or found; 0: none */
	__u16 mtu;	  /* explain only: largest packet on the way */
	__u16 head_len;
	__u8 verdict;
	__u8 stage;
	__u8 ethernet; /* the head begins with an Ethernet header, not with IPv6 */
	__u8 way;      /* enum way */
	__u8 translated;
	__u8 outer; /* enum outer_side */
	__u8 pad[2];
	struct rewrite rewrite; /* translated: what it becomes */
	__u8 head[EVENT_HEAD];
};

/* Events that a CPU may still tell. */
struct event_budget {
	__u64 stamp; /* ns, coarse monotonic clock */
	__u32 tokens;
	__u32 missed;
};

struct quote {
	__u8 bytes[3 * 512]; /* bpf_csum_diff takes 512 at once */
};

_Static_assert(sizeof(union addr) == 16, "addr");
_Static_assert(sizeof(struct port) == 76, "port");
_Static_assert(sizeof(struct endpoint_key) == 20, "endpoint_key");
_Static_assert(sizeof(struct network) == 40, "network");
_Static_assert(sizeof(struct block_key) == 24, "block_key");
_Static_assert(sizeof(struct block) == 24, "block");
_Static_assert(sizeof(struct peering_key) == 24, "peering_key");
_Static_assert(sizeof(struct peer_key) == 16, "peer_key");
_Static_assert(sizeof(struct peer) == 56, "peer");
_Static_assert(sizeof(struct endpoint) == 16, "endpoint");
_Static_assert(sizeof(struct nexthop) == 20, "nexthop");
_Static_assert(sizeof(struct config) == 88, "config");
_Static_assert(sizeof(struct external_key) == 24, "external_key");
_Static_assert(sizeof(struct publication_key) == 24, "publication_key");
_Static_assert(sizeof(struct publication) == 24, "publication");
_Static_assert(sizeof(struct egress) == 24, "egress");
_Static_assert(sizeof(struct host) == 40, "host");
_Static_assert(sizeof(struct peering) == 32, "peering");
_Static_assert(sizeof(struct fdb_key) == 12, "fdb_key");
_Static_assert(sizeof(struct station) == 32, "station");
_Static_assert(sizeof(struct sighting_key) == 12, "sighting_key");
_Static_assert(sizeof(struct sighting) == 16, "sighting");
_Static_assert(sizeof(struct group) == 8, "group");
_Static_assert(sizeof(struct member_key) == 8, "member_key");
_Static_assert(sizeof(struct member) == 24, "member");
_Static_assert(sizeof(struct flow_key) == 44, "flow_key");
_Static_assert(sizeof(struct flow) == 152, "flow");
_Static_assert(sizeof(struct fragment_key) == 44, "fragment_key");
_Static_assert(sizeof(struct fragment) == 12, "fragment");
_Static_assert(sizeof(struct event) == 240, "event");
