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

enum port_flags {
	PORT_HAS_V4 = 1,
	PORT_HAS_V6 = 2,
};

#define BLOCK_LENGTHS 4 /* distinct block lengths that one network may have in a family */

/* What a container is and may send; key: interface index of the veth's host end. */
struct port {
	__u32 network;
	__u32 flags;
	union addr v6;
	union addr gateway6;
	union addr source; /* outer source of its packets */
	__be32 v4;
	__be32 gateway4;
	__u8 bits4[BLOCK_LENGTHS]; /* lengths of the network's blocks, longest first, 0 ends */
	__u8 bits6[BLOCK_LENGTHS];
	struct mac mac;
	__u16 mtu;
};

struct endpoint_key {
	__u32 network;
	union addr addr;
};

/* A container on this node, by network and address. */
struct endpoint {
	__u32 ifindex; /* host end */
	struct mac mac;
	__u16 mtu;
};

/* A block of addresses; the length is part of the key because the look-up is exact. */
struct block_key {
	__u32 network_bits; /* network << 8 | prefix length, in IPv6 bits (96 + n for IPv4) */
	union addr prefix;
};

enum block_flags {
	BLOCK_LOCAL = 1, /* this node's own */
};

struct block {
	__u32 peer; /* index into the nexthops */
	__u32 flags;
	union addr sid;
};

/* Another node; key: the first 64 bits of its locator. */
struct peer {
	__u32 index;
	__u32 network; /* a router's one network; 0: the outer source tells */
};

enum nexthop_flags {
	NEXTHOP_MAC = 1, /* the MAC addresses below are known */
	NEXTHOP_RAW = 2, /* the uplink has no Ethernet header */
};

/* The way to a peer, by peer index. */
struct nexthop {
	__u32 ifindex; /* 0: no way */
	__u16 mtu;     /* largest IPv6 packet, outer header included */
	__u16 flags;
	struct mac dst;
	struct mac src;
};

/* What holds for the whole node; 64-bit values in network order are compared as they stand. */
struct config {
	__be64 locator;
	__be64 locator_mask;
	__be64 locator_block;
	__be64 locator_block_mask;
	__u8 locator_bits;
	__u8 srh; /* encapsulate with a segment routing header */
	__u8 vrf; /* the gateway's address is on the bridge: hand up what is for it */
	__u8 pad;
	struct mac gateway;
	__u8 pad2[6];
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

/* Error answers that a container may still be sent; key: interface index. */
struct budget {
	__s64 tokens; /* below 0 where two processors took the last one at once */
	__u64 stamp;  /* ns, coarse monotonic clock */
};

/* What the stages hand on, one per CPU. Valid from an entry program to the end of its tail calls. */
struct context {
	__u32 network;
	__u32 ifindex; /* deliver: host end of the local container */
	__u32 peer;    /* deliver: nexthop of a remote one */
	union addr dst;
	union addr source; /* outer source */
	union addr sid;
	__u8 bits[BLOCK_LENGTHS]; /* block lengths of the packet's family */
	struct mac mac;		  /* deliver: of the local container */
	__u16 mtu;		  /* deliver: largest packet that the local container takes */
	__u16 l3_len;		  /* bytes from the IP header on */
	__u8 v4;
	__u8 tos; /* type of service or traffic class */
	__u8 icmp_type;
	__u8 icmp_code;
	__u16 icmp_mtu;
	__u8 nd;  /* gateway: neighbour discovery */
	__u8 raw; /* the packet came in without an Ethernet header */
	__u8 pad[4];
};

#define QUOTE_MAX 1232 /* largest part of a packet that an ICMPv6 error quotes, RFC 4443 2.4 (c) */

#define EVENT_HEAD 128 /* bytes of a refused packet that an event shows */

/* What is told of a refused packet. */
struct event {
	__u64 time; /* ns, monotonic clock */
	__u32 reason;
	__u32 ifindex; /* where it came in */
	__u32 len;     /* of the packet, from its first header on */
	__u32 missed;  /* events before this one, on this CPU, that were too many */
	__u16 head_len;
	__u8 ethernet; /* the head begins with an Ethernet header, not with IPv6 */
	__u8 pad;
	__u8 head[EVENT_HEAD];
	__u8 pad2[4];
};

/* Events that a CPU may still tell. */
struct event_budget {
	__u64 stamp; /* ns, coarse monotonic clock */
	__u32 tokens;
	__u32 missed;
};

_Static_assert(sizeof(struct event) == 160, "event");

struct quote {
	__u8 bytes[3 * 512]; /* bpf_csum_diff takes 512 at once */
};

_Static_assert(sizeof(union addr) == 16, "addr");
_Static_assert(sizeof(struct port) == 80, "port");
_Static_assert(sizeof(struct endpoint_key) == 20, "endpoint_key");
_Static_assert(sizeof(struct block_key) == 20, "block_key");
_Static_assert(sizeof(struct block) == 24, "block");
_Static_assert(sizeof(struct endpoint) == 12, "endpoint");
_Static_assert(sizeof(struct nexthop) == 20, "nexthop");
_Static_assert(sizeof(struct config) == 48, "config");
