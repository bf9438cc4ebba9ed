/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Carry: frames of an L2 network go as they are to a port here, or encapsulated to another node. Next: error.
 *
 * Two kinds of frames take a turn through the segmenter, a veth pair of the host: one that has to be segmented and that the far end does
 * not take whole, and one that is no IP and does not go out by Ethernet, which the kernel has to look at again. The mark tells the
 * program at its end (bridge.h) which.
 */
#pragma once

#include "forward.h"
#include "lib/ethernet.h"

#define MARK_NEXTHOP 0x80000000 /* the rest is an index into the nexthops, else the port that the frame came in by */

/* Bytes of the largest payload on the wire. */
static __always_inline __u32 frame_size(struct __sk_buff *skb, struct context *ctx)
{
	if (!skb->gso_size || !is_ip(ctx->type))
		return skb->len - ETH_HLEN;
	return packet_size(skb, ctx);
}

static __always_inline int frame_too_big(struct __sk_buff *skb, struct context *ctx, __u32 mtu)
{
	return is_ip(ctx->type) ? too_big(skb, ctx, mtu) : drop(skb, REASON_TOO_BIG);
}

static __always_inline int through_segmenter(struct __sk_buff *skb, const struct config *cfg, __u32 mark,
					     enum reason without)
{
	if (!cfg->segmenter)
		return drop(skb, without);
	skb->mark = mark;
	return bpf_redirect(cfg->segmenter, 0);
}

/* Does the far end, or the operator, want the frame in pieces? */
static __always_inline bool needs_segments(struct __sk_buff *skb, const struct context *ctx, const struct config *cfg)
{
	return skb->gso_size && (cfg->l2_gso == L2_GSO_SEGMENT || ctx->router);
}

/* Can the encapsulated frame not go out as it is? The kernel does not know yet that what was no IP is IPv6 now. */
static __always_inline bool needs_another_look(const struct context *ctx, const struct nexthop *nexthop)
{
	return !is_ip(ctx->type) && (nexthop->flags & NEXTHOP_RAW || !is_fresh(nexthop));
}

static __always_inline int carry_remote(struct __sk_buff *skb, struct context *ctx, __u32 counter, bool fresh)
{
	struct config *cfg = node(ctx->generation);
	struct nexthop *nexthop = find_nexthop(ctx);
	enum reason reason;

	if (!cfg || !nexthop || !nexthop->ifindex)
		return drop(skb, REASON_NO_NEXTHOP);
	ctx->mtu = nexthop->mtu - OUTER_LEN - FRAME_LEN - (cfg->srh ? SRH_LEN : 0);
	if (frame_size(skb, ctx) + (ctx->vlan && skb->gso_size ? VLAN_LEN : 0) > ctx->mtu)
		return frame_too_big(skb, ctx, ctx->mtu - (ctx->vlan ? VLAN_LEN : 0));
	reason = settle(skb, ctx, fresh);
	if (reason)
		return drop(skb, reason);
	if (needs_segments(skb, ctx, cfg))
		return through_segmenter(skb, cfg, ctx->origin, REASON_GSO_FRAME);
	reason = cfg->srh ? encapsulate_frame(skb, ctx, true) : encapsulate_frame(skb, ctx, false);
	if (reason)
		return drop(skb, reason);
	count(skb, counter);
	if (needs_another_look(ctx, nexthop))
		return through_segmenter(skb, cfg, MARK_NEXTHOP | nexthop_index(ctx), REASON_NO_NEXTHOP);
	return transmit(skb, nexthop);
}

static __always_inline int carry_local(struct __sk_buff *skb, struct context *ctx, __u32 counter, bool fresh)
{
	enum reason reason;

	if (frame_size(skb, ctx) > ctx->mtu)
		return frame_too_big(skb, ctx, ctx->mtu);
	reason = settle(skb, ctx, fresh);
	if (reason)
		return drop(skb, reason);
	count(skb, counter);
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return send_in(ctx);
}

/* A container's frame of a known flow. */
static __always_inline int send_frame(struct __sk_buff *skb, struct context *ctx, const struct flow *flow)
{
	ctx->network = flow->network;
	ctx->line = flow->line;
	ctx->ifindex = flow->ifindex;
	ctx->mtu = flow->mtu;
	if (flow->ifindex) {
		ctx->direct = !!(flow->flags & FLOW_DIRECT);
		return carry_local(skb, ctx, flow->counter, false);
	}
	ctx->peer = flow->peer;
	ctx->sid = flow->sid;
	ctx->router = !!(flow->flags & FLOW_ROUTER);
	return carry_remote(skb, ctx, flow->counter, false);
}

/* A frame off the underlay. Only what is known as IP may be handed to a container's own end: at all else the kernel has to look again. */
static __always_inline int deliver_frame(struct __sk_buff *skb, struct context *ctx, __u32 counter)
{
	enum reason reason = decapsulate_frame(skb, ctx);

	if (reason)
		return drop(skb, reason);
	count(skb, counter);
	return is_ip(ctx->type) ? send_in(ctx) : bpf_redirect(ctx->ifindex, 0);
}
