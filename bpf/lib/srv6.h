/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * SRv6 with one segment (RFC 8754, RFC 8986): H.Encaps.Red is a bare IPv6 header of 40 bytes,
 * H.Encaps adds a segment routing header of 24.
 *
 *   SID          locator : function (16) : network (24) : 0
 *   outer source locator : 0x5ce    (16) : network (24) : segment
 */
#pragma once

#include <asm-generic/errno.h>
#include "packet.h"

#define OUTER_LEN 40
#define SRH_LEN 24
#define SRH_TYPE 4
#define OUTER_HOP_LIMIT 64
#define IPPROTO_ETHERNET_ 143 /* an Ethernet frame, RFC 8986 */

#define FUNCTION_END_DT46 20
#define FUNCTION_END_DT2U 23
#define FUNCTION_END_DT2M 24
#define FUNCTION_SOURCE 0x5ce

/* Linux 6.3 and later. */
#ifndef BPF_F_ADJ_ROOM_DECAP_L3_IPV4
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV4 (1ULL << 7)
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV6 (1ULL << 8)
#endif

/* The kernel has the DECAP_L3 flags. They load on 6.1 too and fail there at run time: probed by running. */
volatile const __u8 decap_by_flags = 1;

struct srh {
	__u8 nexthdr;
	__u8 len; /* in units of 8 bytes, without the first */
	__u8 type;
	__u8 segments_left;
	__u8 last_entry;
	__u8 flags;
	__be16 tag;
	union addr segment;
};

_Static_assert(sizeof(struct srh) == SRH_LEN, "srh");

struct sid {
	__u32 network;
	__u16 function;
	bool tail; /* bits are set behind the network */
};

/* Take apart what follows the locator, which has 1 to 64 bits. */
static __always_inline struct sid parse_sid(const union addr *addr, __u8 locator_bits)
{
	__u64 hi = (__u64)bpf_ntohl(addr->be32[0]) << 32 | bpf_ntohl(addr->be32[1]);
	__u64 lo = (__u64)bpf_ntohl(addr->be32[2]) << 32 | bpf_ntohl(addr->be32[3]);
	struct sid sid = {};

	if (locator_bits < 64) {
		__u8 bits = locator_bits & 63;

		hi = bits ? hi << bits | lo >> (64 - bits) : hi;
		lo = lo << bits;
	} else {
		hi = lo;
		lo = 0;
	}
	sid.function = hi >> 48;
	sid.network = (hi >> 24) & 0xffffff;
	sid.tail = (hi & 0xffffff) || lo;
	return sid;
}

/* The other way round. locator: its first 64 bits, zero behind its length. */
static __always_inline void compose_sid(union addr *sid, __be64 locator, __u8 locator_bits, __u16 function,
					__u32 network)
{
	__u64 rest = (__u64)function << 48 | (__u64)network << 24;
	__be64 halves[2] = { locator, 0 };

	if (locator_bits < 64) {
		__u8 bits = locator_bits & 63;

		halves[0] |= bpf_cpu_to_be64(rest >> bits);
		halves[1] = bits ? bpf_cpu_to_be64(rest << (64 - bits)) : 0;
	} else {
		halves[1] = bpf_cpu_to_be64(rest);
	}
	__builtin_memcpy(sid, halves, sizeof(*sid));
}

/*
 * A packet that came out of the overlay and goes back into it is still marked as encapsulated, and
 * the kernel refuses to do that twice. One that needs no segmentation can do without; only
 * change_proto then makes an IPv4 packet an IPv6 one, and it adds 20 bytes.
 */
static __always_inline long make_room_again(struct __sk_buff *skb, bool v4, bool srh)
{
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;

	if (v4) {
		long err = bpf_skb_change_proto(skb, bpf_htons(ETH_P_IPV6), 0);

		if (err)
			return err;
		return srh ? bpf_skb_adjust_room(skb, OUTER_LEN + SRH_LEN - 20, BPF_ADJ_ROOM_MAC, flags)
			   : bpf_skb_adjust_room(skb, OUTER_LEN - 20, BPF_ADJ_ROOM_MAC, flags);
	}
	return srh ? bpf_skb_adjust_room(skb, OUTER_LEN + SRH_LEN, BPF_ADJ_ROOM_MAC, flags)
		   : bpf_skb_adjust_room(skb, OUTER_LEN, BPF_ADJ_ROOM_MAC, flags);
}

static __always_inline enum reason make_room(struct __sk_buff *skb, bool v4, bool srh)
{
	__u64 flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 | BPF_F_ADJ_ROOM_FIXED_GSO;
	long err = srh ? bpf_skb_adjust_room(skb, OUTER_LEN + SRH_LEN, BPF_ADJ_ROOM_MAC, flags)
		       : bpf_skb_adjust_room(skb, OUTER_LEN, BPF_ADJ_ROOM_MAC, flags);

	if (err == -EALREADY) {
		if (skb->gso_size)
			return REASON_ENCAP_NESTED;
		err = make_room_again(skb, v4, srh);
	}
	return err ? REASON_ENCAP_FAILED : REASON_NONE;
}

/*
 * Write the outer header into the room behind the Ethernet header. inner: its payload's protocol; payload: bytes of that. 0, or the
 * reason of the failure.
 */
static __always_inline enum reason write_outer(struct __sk_buff *skb, const struct context *ctx, __u8 inner,
					       __u16 payload, __u32 label, bool srh)
{
	struct ethhdr *eth = packet_start(skb);
	struct ipv6hdr *outer = (void *)(eth + 1);

	if ((void *)(outer + 1) > packet_end(skb))
		return REASON_ENCAP_FAILED;
	eth->h_proto = bpf_htons(ETH_P_IPV6);
	/* Label 0 would mean that there is none. */
	*(__be32 *)outer = bpf_htonl(6 << 28 | (__u32)ctx->tos << 20 | (label ?: 1));
	outer->hop_limit = OUTER_HOP_LIMIT;
	__builtin_memcpy(&outer->saddr, &ctx->source, sizeof(outer->saddr));
	__builtin_memcpy(&outer->daddr, &ctx->sid, sizeof(outer->daddr));
	if (!srh) {
		outer->nexthdr = inner;
		outer->payload_len = bpf_htons(payload);
		return REASON_NONE;
	}

	struct srh *header = (void *)(outer + 1);

	if ((void *)(header + 1) > packet_end(skb))
		return REASON_ENCAP_FAILED;
	outer->nexthdr = NEXTHDR_ROUTING;
	outer->payload_len = bpf_htons(payload + SRH_LEN);
	header->nexthdr = inner;
	header->len = 2;
	header->type = SRH_TYPE;
	header->segments_left = 0;
	header->last_entry = 0;
	header->flags = 0;
	header->tag = 0;
	header->segment = ctx->sid;
	return REASON_NONE;
}

/*
 * Put the outer header in front of the IP packet behind the Ethernet header. The kernel keeps
 * segmentation and checksums right (FIXED_GSO). 0, or the reason of the failure.
 */
static __always_inline enum reason encapsulate(struct __sk_buff *skb, const struct context *ctx, bool srh)
{
	__u32 label = bpf_get_hash_recalc(skb) & 0xfffff; /* RFC 6438 */
	enum reason reason = make_room(skb, ctx->v4, srh);

	if (reason)
		return reason;
	return write_outer(skb, ctx, ctx->v4 ? IPPROTO_IPIP : IPPROTO_IPV6, ctx->l3_len, label, srh);
}

/* Take the outer header off; outer_len is 40 or 64 and must reach the helper as a literal. */
static __always_inline long decapsulate(struct __sk_buff *skb, bool v4, bool srh)
{
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;

	if (decap_by_flags) {
		flags |= v4 ? BPF_F_ADJ_ROOM_DECAP_L3_IPV4 : BPF_F_ADJ_ROOM_DECAP_L3_IPV6;
	} else if (v4) {
		/* Before 6.3 only change_proto turns an IPv6 packet into an IPv4 one; it takes 20 bytes. */
		long err = bpf_skb_change_proto(skb, bpf_htons(ETH_P_IP), 0);

		if (err)
			return err;
		return srh ? bpf_skb_adjust_room(skb, 20 - OUTER_LEN - SRH_LEN, BPF_ADJ_ROOM_MAC, flags)
			   : bpf_skb_adjust_room(skb, 20 - OUTER_LEN, BPF_ADJ_ROOM_MAC, flags);
	}
	return srh ? bpf_skb_adjust_room(skb, -(OUTER_LEN + SRH_LEN), BPF_ADJ_ROOM_MAC, flags)
		   : bpf_skb_adjust_room(skb, -OUTER_LEN, BPF_ADJ_ROOM_MAC, flags);
}
