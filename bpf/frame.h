/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Frame: an Ethernet frame that came in from another node, still behind its outer header. What belongs to a known flow goes to its container
 * at once. Next: bridge, neighbour, flood.
 */
#pragma once

#include "uplink.h"
#include "bridge.h"

#define FRAME_OFFSET_MAX (ETH_HLEN + OUTER_LEN + SRH_LEN + GRE_LEN + ETH_HLEN) /* of the payload */

/* Where the frame begins. */
static __always_inline __u32 frame_offset(const struct context *ctx)
{
	return (ctx->raw ? 0 : ETH_HLEN) + OUTER_LEN + (ctx->srh ? SRH_LEN : 0) + (ctx->shim ? GRE_LEN : 0);
}

/* Read the frame's own header, which is at offset. */
static __always_inline enum reason read_inner(struct __sk_buff *skb, struct context *ctx, __u32 offset)
{
	struct ethhdr eth;
	__be32 gre;

	if (ctx->shim && (!load(skb, offset - GRE_LEN, &gre, sizeof(gre)) || gre != GRE_ETHERNET))
		return REASON_WRONG_PAYLOAD;
	if (!load(skb, offset, &eth, sizeof(eth)))
		return REASON_MALFORMED;
	__builtin_memcpy(&ctx->to, eth.h_dest, ETH_ALEN);
	__builtin_memcpy(&ctx->from, eth.h_source, ETH_ALEN);
	ctx->type = eth.h_proto;
	return REASON_NONE;
}

/* A receiver takes what has only a priority for an untagged frame, which nobody has looked at as one. */
static __always_inline bool is_priority_tagged(struct __sk_buff *skb, const struct context *ctx, __u32 payload)
{
	__be16 tci;

	if (ctx->type != bpf_htons(ETH_P_8021Q) && ctx->type != bpf_htons(ETH_P_8021AD))
		return false;
	return !load(skb, payload, &tci, sizeof(tci)) || !(tci & bpf_htons(VLAN_ID));
}

static __always_inline bool is_neighbourly(struct __sk_buff *skb, struct context *ctx, __u32 payload)
{
	__u8 nexthdr, type;

	if (ctx->type == bpf_htons(ETH_P_ARP))
		return true;
	if (ctx->type != bpf_htons(ETH_P_IPV6) || !load(skb, payload + offsetof(struct ipv6hdr, nexthdr), &nexthdr, 1))
		return false;
	return nexthdr == IPPROTO_ICMPV6 && load(skb, payload + sizeof(struct ipv6hdr), &type, 1) && is_nd_type(type);
}

/* It belongs to no flow. */
static __always_inline int take_opaque(struct __sk_buff *skb, struct context *ctx, __u8 nexthdr, bool neighbourly)
{
	enum reason reason = check_outer(nexthdr);

	if (reason)
		return drop(skb, reason);
	ctx->opaque = 1;
	if (neighbourly)
		return go_to(skb, STAGE_NEIGHBOUR);
	return pass_frame(skb, ctx);
}

static __always_inline int take_frame(struct __sk_buff *skb, struct context *ctx, __u8 nexthdr)
{
	__u64 payload = frame_offset(ctx) + ETH_HLEN;
	enum reason reason;
	bool neighbourly;

	/* One number from here on, instead of one for each sum. */
	asm volatile("" : "+r"(payload));
	if (payload > FRAME_OFFSET_MAX)
		return drop(skb, REASON_MALFORMED);
	reason = read_inner(skb, ctx, payload - ETH_HLEN);
	if (!reason && is_priority_tagged(skb, ctx, payload))
		reason = REASON_MALFORMED;
	if (reason) /* what is wrong with the outer header comes first */
		return drop(skb, check_outer(nexthdr) ?: reason);
	neighbourly = is_neighbourly(skb, ctx, payload);
	if (neighbourly || is_for_many(ctx) || !is_ip(ctx->type))
		return take_opaque(skb, ctx, nexthdr, neighbourly);
	ctx->v4 = ctx->type == bpf_htons(ETH_P_IP);
	reason = parse_inner(skb, ctx, payload, ctx->ecn);
	if (reason)
		return drop(skb, check_outer(nexthdr) ?: reason);
	return take_flow(skb, ctx, nexthdr, true);
}

SEC("tc")
int stage_frame(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_FRAME);

	if (!ctx)
		return TC_ACT_SHOT;
	ctx->bridged = 1;
	pull(skb, FRAME_OFFSET_MAX + IP_HEADER_MAX + 20);
	return take_frame(skb, ctx, ctx->shim ? IPPROTO_GRE : IPPROTO_ETHERNET_);
}
