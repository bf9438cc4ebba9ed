/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Ethernet frames in SRv6: H.Encaps.L2.Red, RFC 8986 5.4. A frame is next header 143. The kernel cannot segment behind that, so
 * one with gso_size goes behind a GRE header (RFC 2784) of 4 bytes, next header 47, to the same SID.
 *
 *   Ethernet 14 | IPv6 40 [| SRH 24] [| GRE 4] | Ethernet 14 [| VLAN tag 4] | payload
 */
#pragma once

#include "srv6.h"

#define GRE_LEN 4
#define GRE_ETHERNET bpf_htonl(0x6558) /* no flags, transparent Ethernet bridging */
#define VLAN_LEN 4
#define VLAN_ID 0xfff

/* What a frame costs on an uplink beside the outer header, whichever way it goes. */
#define FRAME_LEN (ETH_HLEN + GRE_LEN)

struct tag {
	__be16 tci;
	__be16 type;
};

static __always_inline bool is_ip(__be16 type)
{
	return type == bpf_htons(ETH_P_IP) || type == bpf_htons(ETH_P_IPV6);
}

/* Make room for all that comes in front of an IP packet, an Ethernet header too, which the kernel keeps apart from the outer one. */
static __always_inline long make_frame_room(struct __sk_buff *skb, __u32 inner, bool shim, bool srh)
{
	__u64 flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 | BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L2_ETH |
		      BPF_F_ADJ_ROOM_ENCAP_L2((__u64)inner);
	__u32 len = OUTER_LEN + inner;

	if (srh)
		len += SRH_LEN;
	if (shim) {
		len += GRE_LEN;
		flags |= BPF_F_ADJ_ROOM_ENCAP_L4_GRE;
	}
	return bpf_skb_adjust_room(skb, len, BPF_ADJ_ROOM_MAC, flags);
}

/* The inner Ethernet header, and the tag that the kernel had taken off. offset: a literal, or small. */
static __always_inline bool write_inner(struct __sk_buff *skb, const struct context *ctx, __u32 offset)
{
	struct ethhdr *eth = packet_start(skb) + offset;

	if ((void *)(eth + 1) > packet_end(skb))
		return false;
	__builtin_memcpy(eth->h_dest, &ctx->to, ETH_ALEN);
	__builtin_memcpy(eth->h_source, &ctx->from, ETH_ALEN);
	eth->h_proto = ctx->vlan ?: ctx->type;
	if (!ctx->vlan)
		return true;

	struct tag *tag = (void *)(eth + 1);

	if ((void *)(tag + 1) > packet_end(skb))
		return false;
	tag->tci = bpf_htons(ctx->vlan_tci);
	tag->type = ctx->type;
	return true;
}

static __always_inline bool write_shim(struct __sk_buff *skb, __u32 offset)
{
	__be32 *gre = packet_start(skb) + offset;

	if ((void *)(gre + 1) > packet_end(skb))
		return false;
	*gre = GRE_ETHERNET;
	return true;
}

/* Encapsulate an IP packet with its Ethernet header and, at most, one tag. srh: a literal. */
static __always_inline enum reason wrap_ip(struct __sk_buff *skb, const struct context *ctx, __u32 label, bool srh)
{
	const __u32 at = ETH_HLEN + OUTER_LEN + (srh ? SRH_LEN : 0);
	bool shim = skb->gso_size;
	enum reason reason;
	__u32 payload;

	if (ctx->vlan && bpf_skb_vlan_pop(skb))
		return REASON_ENCAP_FAILED;
	if (ctx->vlan ? make_frame_room(skb, ETH_HLEN + VLAN_LEN, shim, srh)
		      : make_frame_room(skb, ETH_HLEN, shim, srh))
		return REASON_ENCAP_FAILED;
	payload = skb->len - at;
	reason = write_outer(skb, ctx, shim ? IPPROTO_GRE : IPPROTO_ETHERNET_, payload < 0xffff ? payload : 0xffff,
			     label, srh);
	if (reason)
		return reason;
	if (!shim)
		return write_inner(skb, ctx, at) ? REASON_NONE : REASON_ENCAP_FAILED;
	return write_shim(skb, at) && write_inner(skb, ctx, at + GRE_LEN) ? REASON_NONE : REASON_ENCAP_FAILED;
}

/*
 * A tag that the kernel has taken off is put back by pushing another one. That one goes again, and with it a third, which stands in front
 * of the outer header, as the kernel looks there for one more.
 */
static __always_inline enum reason wrap_tagged(struct __sk_buff *skb, const struct context *ctx, __u32 len)
{
	struct {
		__be16 vlan;
		struct tag tag;
	} front = { .vlan = bpf_htons(ETH_P_8021Q), .tag.type = bpf_htons(ETH_P_IPV6) };

	if (bpf_skb_vlan_push(skb, ctx->vlan, 0) || bpf_skb_change_head(skb, len + VLAN_LEN, 0) ||
	    bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &front, sizeof(front), 0) ||
	    bpf_skb_vlan_pop(skb) || bpf_skb_vlan_pop(skb))
		return REASON_ENCAP_FAILED;
	return REASON_NONE;
}

/* Encapsulate any frame, which stays as it is behind what is put in front of it. It must not have to be segmented. */
static __always_inline enum reason wrap_any(struct __sk_buff *skb, const struct context *ctx, __u32 label, bool srh)
{
	const __u32 len = ETH_HLEN + OUTER_LEN + (srh ? SRH_LEN : 0);
	enum reason reason = REASON_NONE;
	__u32 payload = skb->len;

	if (skb->gso_size)
		return REASON_GSO_FRAME;
	if (ctx->vlan) {
		payload += VLAN_LEN;
		reason = wrap_tagged(skb, ctx, len);
	} else if (bpf_skb_change_head(skb, len, 0)) {
		reason = REASON_ENCAP_FAILED;
	}
	return reason ?: write_outer(skb, ctx, IPPROTO_ETHERNET_, payload, label, srh);
}

/*
 * Put a frame behind an outer header. 0, or the reason of the failure. What is no IP stays known to the kernel as what it is: such
 * a packet can be sent by Ethernet only.
 */
static __always_inline enum reason encapsulate_frame(struct __sk_buff *skb, const struct context *ctx, bool srh)
{
	__u32 label = bpf_get_hash_recalc(skb) & 0xfffff; /* RFC 6438 */

	return is_ip(ctx->type) ? wrap_ip(skb, ctx, label, srh) : wrap_any(skb, ctx, label, srh);
}

#define SHED_LEAST_V4 20
#define SHED_LEAST 40

/*
 * Have the kernel take the packet for IPv4, of which it leaves less than of IPv6. It looks at the frame again where that is not true. cut is what
 * then still has to go.
 */
static __always_inline bool shed_as_v4(struct __sk_buff *skb, __s32 *cut, __u64 *flags)
{
	if (decap_by_flags) {
		*flags |= BPF_F_ADJ_ROOM_DECAP_L3_IPV4;
		return true;
	}
	*cut -= OUTER_LEN - SHED_LEAST_V4; /* what change_proto takes, before 6.3 */
	return !bpf_skb_change_proto(skb, bpf_htons(ETH_P_IP), 0);
}

/*
 * Take all off that is in front of the payload of a frame, and put the frame's own header there. The kernel leaves at least a bare IP
 * header. What is shorter is lengthened for the moment; that it refuses to do with what is still marked as encapsulated, which is an IP packet, tagged perhaps.
 */
static __always_inline enum reason decapsulate_frame(struct __sk_buff *skb, const struct context *ctx)
{
	__s32 cut = OUTER_LEN + ETH_HLEN + (ctx->srh ? SRH_LEN : 0) + (ctx->shim ? GRE_LEN : 0);
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	struct ethhdr *eth;
	bool small, tiny;
	__s32 payload;

	/* One number instead of one for each sum, for the verifier's sake. */
	asm volatile("" : "+r"(cut));
	payload = skb->len - (ctx->raw ? 0 : ETH_HLEN) - cut;
	small = payload < SHED_LEAST && !skb->gso_size;
	tiny = small && payload < SHED_LEAST_V4;
	if (tiny && bpf_skb_change_tail(skb, skb->len + SHED_LEAST, 0))
		return REASON_DECAP_FAILED;
	if (((small && !tiny) || ctx->type == bpf_htons(ETH_P_IP)) && !shed_as_v4(skb, &cut, &flags))
		return REASON_DECAP_FAILED;
	if (bpf_skb_adjust_room(skb, -cut, BPF_ADJ_ROOM_MAC, flags))
		return REASON_DECAP_FAILED;
	if (tiny && bpf_skb_change_tail(skb, skb->len - SHED_LEAST, 0))
		return REASON_DECAP_FAILED;
	if (ctx->raw && bpf_skb_change_head(skb, ETH_HLEN, 0))
		return REASON_DECAP_FAILED;
	eth = packet_start(skb);
	if ((void *)(eth + 1) > packet_end(skb))
		return REASON_DECAP_FAILED;
	__builtin_memcpy(eth->h_dest, &ctx->to, ETH_ALEN);
	__builtin_memcpy(eth->h_source, &ctx->from, ETH_ALEN);
	eth->h_proto = ctx->type;
	return REASON_NONE;
}
