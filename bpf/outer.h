/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Outer: the entries at what is not of the overlay: an interface of the host (outer), lc-host-peer, where the host's stack sends to containers (host),
 * and lo, where it sends to itself (loopback). What belongs to a known flow is sent on; a flow that may be a container's is looked at by the stages;
 * all else is the host's, and left alone. Next: enter, egress, related, error.
 */
#pragma once

#include "enter.h"

/* The packet's flow. False: it has none that could be known here. */
static __always_inline bool read_flow(struct __sk_buff *skb, struct context *ctx, __u32 l2)
{
	bool whole = false;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		whole = read_v4(skb, ctx, l2);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		whole = read_v6(skb, ctx, l2);
	return whole && !parse_flow(skb, l2, true);
}

static __always_inline struct context *start_outer(struct __sk_buff *skb, __u32 network, enum outer_side side)
{
	struct context *ctx = start(skb);

	if (!ctx)
		return NULL;
	ctx->underlay = 0;
	ctx->key.network = network;
	ctx->outside.side = side;
	return ctx;
}

/* What follows works on a packet with an Ethernet header. */
static __always_inline int make_frame(struct __sk_buff *skb, struct context *ctx)
{
	long err = ctx->raw ? bpf_skb_change_head(skb, ETH_HLEN, 0) : 0;

	ctx->raw = 0;
	pull(skb, ETH_HLEN + IP_HEADER_MAX + 20);
	return err;
}

/* The packet is Lace's: its flow is known, or the stages decide. */
static __always_inline int take_outer(struct __sk_buff *skb, struct context *ctx, struct flow *flow)
{
	if (make_frame(skb, ctx))
		return drop(skb, REASON_DECAP_FAILED);
	if (!flow)
		return go_to(skb, STAGE_ENTER);
	if (has_ended(flow))
		return drop(skb, REASON_NO_FLOW);
	if (flow->generation != ctx->generation) {
		recall(ctx, flow);
		return go_to(skb, STAGE_ENTER);
	}
	if (is_last_hop(skb, ctx))
		return expire(skb, ctx);
	track(flow, ctx);
	return send_flow(skb, ctx, flow);
}

/* A flow of such packets that was opened from here, or may come back here. */
static __always_inline struct flow *find_outer_flow(const struct context *ctx)
{
	struct flow *flow = find_flow(&ctx->key);

	return flow && !(flow->flags & FLOW_UNDERLAY) && !reopens(flow, ctx) ? flow : NULL;
}

/* Can a packet that no flow is known of be for a container? Else it is the host's. */
static __always_inline bool is_for_container(const struct context *ctx)
{
	if (check_opener(ctx))
		return false;
	if (is_own_address(&ctx->key.dst))
		return find_published(ctx, &ctx->key.dst, ctx->key.dport);
	return find_peering(ctx, NETWORK_OUTSIDE, &ctx->key.dst);
}

static __always_inline int from_outside(struct __sk_buff *skb, __u32 l2)
{
	struct config *cfg = node(active_generation());
	struct context *ctx;
	struct flow *flow;

	/* A tagged frame belongs to a VLAN interface above this one, and others are only overheard. */
	if (!cfg || !cfg->outside || skb->vlan_present || skb->pkt_type != PACKET_HOST)
		return PASS;
	pull(skb, l2 + IP_HEADER_MAX + 20);
	ctx = start_outer(skb, NETWORK_OUTSIDE, OUTER_OUTSIDE);
	if (!ctx || !read_flow(skb, ctx, l2))
		return PASS;
	ctx->raw = !l2;
	flow = find_outer_flow(ctx);
	return flow || is_for_container(ctx) ? take_outer(skb, ctx, flow) : PASS;
}

SEC("tc")
int outer(struct __sk_buff *skb)
{
	return from_outside(skb, ETH_HLEN);
}

SEC("tc")
int outer_raw(struct __sk_buff *skb)
{
	return from_outside(skb, 0);
}

/* Only what is routed to containers comes here. What the host forwards for others has their address. */
SEC("tc")
int host(struct __sk_buff *skb)
{
	struct context *ctx = start_outer(skb, NETWORK_OF_HOSTS, OUTER_HOST);
	enum reason reason;

	if (!ctx)
		return TC_ACT_SHOT;
	pull(skb, ETH_HLEN + IP_HEADER_MAX + 20);
	if (skb->protocol == bpf_htons(ETH_P_IP) ? !read_v4(skb, ctx, ETH_HLEN) : !read_v6(skb, ctx, ETH_HLEN))
		return drop(skb, REASON_NOT_IP);
	if (is_multicast(&ctx->key.dst)) /* every interface of a host is told about by it */
		return drop(skb, REASON_MULTICAST);
	if (!is_own_address(&ctx->key.src))
		ctx->key.network = NETWORK_OUTSIDE;
	reason = parse_flow(skb, ETH_HLEN, true);
	if (reason)
		return drop(skb, reason);

	struct flow *flow = find_outer_flow(ctx);

	reason = flow ? REASON_NONE : check_opener(ctx);
	return reason ? drop(skb, reason) : take_outer(skb, ctx, flow);
}

/* Does the host send to a port that is a container's, as itself? */
static __always_inline bool is_for_own_port(const struct context *ctx)
{
	return !check_opener(ctx) && (is_own_address(&ctx->key.src) || is_loopback(&ctx->key.src)) &&
	       find_publication(ctx, &ctx->key.dst, ctx->key.dport);
}

/* What the host sends to itself, at a port that is a container's. */
SEC("tc")
int loopback(struct __sk_buff *skb)
{
	struct context *ctx = start_outer(skb, NETWORK_OF_HOSTS, OUTER_LOOPBACK);
	struct flow *flow;

	if (!ctx)
		return PASS;
	pull(skb, ETH_HLEN + IP_HEADER_MAX + 20);
	if (!read_flow(skb, ctx, ETH_HLEN))
		return PASS;
	flow = find_outer_flow(ctx);
	if (!flow && !is_for_own_port(ctx))
		return PASS;
	return take_outer(skb, ctx, flow);
}
