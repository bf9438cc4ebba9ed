/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ARP (RFC 826) and neighbour discovery (RFC 4861): their frames, and answers made of questions in place. */
#pragma once

#include "packet.h"

#define ICMPV6_NEIGHBOUR_SOLICITATION 135
#define ICMPV6_NEIGHBOUR_ADVERTISEMENT 136

#define ARP_REQUEST 1
#define ARP_REPLY 2

struct arp {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 operation;
	__u8 sender_mac[6];
	__be32 sender;
	__u8 target_mac[6];
	__be32 target;
} __attribute__((packed));

struct arp_frame {
	struct ethhdr eth;
	struct arp arp;
} __attribute__((packed));

/* Neighbour solicitation or advertisement, with room for one link-layer address option. */
struct nd_frame {
	struct ethhdr eth;
	struct ipv6hdr ip;
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u8 flags;
	__u8 reserved[3];
	__u8 target[16];
	__u8 option_type;
	__u8 option_len;
	__u8 option_mac[6];
} __attribute__((packed));

#define ND_MIN_LEN (sizeof(struct nd_frame) - 8)
#define ND_FLAG_ROUTER 0x80
#define ND_FLAG_SOLICITED 0x40
#define ND_FLAG_OVERRIDE 0x20
#define ND_OPTION_TARGET_MAC 2
#define ND_HOP_LIMIT 255

struct pseudo_header {
	union addr src;
	union addr dst;
	__be32 len;
	__be32 nexthdr;
} __attribute__((packed));

_Static_assert(sizeof(struct arp_frame) == 42, "arp_frame");
_Static_assert(sizeof(struct nd_frame) == 86, "nd_frame");

static __always_inline bool is_nd_type(__u8 type)
{
	return type == ICMPV6_NEIGHBOUR_SOLICITATION || type == ICMPV6_NEIGHBOUR_ADVERTISEMENT;
}

/* Is it one that these are about, between Ethernet and IPv4? */
static __always_inline bool is_plain_arp(const struct arp *arp)
{
	return arp->hardware == bpf_htons(1) && arp->protocol == bpf_htons(ETH_P_IP) && arp->hardware_len == ETH_ALEN &&
	       arp->protocol_len == 4;
}

/* Turn the request in f into the answer: mac has the address that it asks for. */
static __always_inline void answer_arp(struct arp_frame *f, const struct mac *mac)
{
	__be32 target = f->arp.target;

	__builtin_memcpy(f->arp.target_mac, f->arp.sender_mac, ETH_ALEN);
	__builtin_memcpy(f->eth.h_dest, f->eth.h_source, ETH_ALEN);
	__builtin_memcpy(f->arp.sender_mac, mac, ETH_ALEN);
	__builtin_memcpy(f->eth.h_source, mac, ETH_ALEN);
	f->arp.target = f->arp.sender;
	f->arp.sender = target;
	f->arp.operation = bpf_htons(ARP_REPLY);
}

/*
 * Turn the solicitation in f into the advertisement of mac. flags: ND_FLAG_ROUTER or 0. An asker without an address (duplicate
 * address detection) is answered at the address of all nodes.
 */
static __always_inline void advertise(struct nd_frame *f, const struct mac *mac, __u8 flags)
{
	static const union addr all_nodes = { .u8 = { 0xff, 2, [15] = 1 } };
	struct {
		struct pseudo_header pseudo;
		__u8 icmp[32];
	} sum = {};
	union addr src;

	__builtin_memcpy(&src, &f->ip.saddr, sizeof(src));
	flags |= ND_FLAG_OVERRIDE;
	__builtin_memcpy(f->eth.h_dest, f->eth.h_source, ETH_ALEN);
	if (is_unspecified(&src)) {
		static const __u8 all_nodes_mac[ETH_ALEN] = { 0x33, 0x33, 0, 0, 0, 1 };

		__builtin_memcpy(f->eth.h_dest, all_nodes_mac, ETH_ALEN);
		__builtin_memcpy(&f->ip.daddr, &all_nodes, sizeof(all_nodes));
	} else {
		flags |= ND_FLAG_SOLICITED;
		__builtin_memcpy(&f->ip.daddr, &f->ip.saddr, sizeof(all_nodes));
	}
	__builtin_memcpy(f->eth.h_source, mac, ETH_ALEN);
	__builtin_memcpy(&f->ip.saddr, f->target, sizeof(f->target));
	f->ip.payload_len = bpf_htons(sizeof(sum.icmp));
	f->ip.hop_limit = ND_HOP_LIMIT;
	f->type = ICMPV6_NEIGHBOUR_ADVERTISEMENT;
	f->checksum = 0;
	f->flags = flags;
	f->option_type = ND_OPTION_TARGET_MAC;
	f->option_len = 1;
	__builtin_memcpy(f->option_mac, mac, ETH_ALEN);

	__builtin_memcpy(&sum.pseudo.src, &f->ip.saddr, 32);
	sum.pseudo.len = bpf_htonl(sizeof(sum.icmp));
	sum.pseudo.nexthdr = bpf_htonl(IPPROTO_ICMPV6);
	__builtin_memcpy(sum.icmp, &f->type, sizeof(sum.icmp));
	f->checksum = fold(bpf_csum_diff(NULL, 0, (void *)&sum, sizeof(sum), 0));
}

/* Put an advertisement in the place of its solicitation: a probe is shorter, a nonce makes it longer. */
static __always_inline bool put_advertisement(struct __sk_buff *skb, const struct nd_frame *f)
{
	if (skb->len != sizeof(*f) && bpf_skb_change_tail(skb, sizeof(*f), 0))
		return false;
	return !bpf_skb_store_bytes(skb, 0, f, sizeof(*f), 0);
}
