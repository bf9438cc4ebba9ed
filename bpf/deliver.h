/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Deliver: to the container on this node that the context names (ifindex), or encapsulated to the
 * node that owns the destination. What the stages decided is written down first; a known flow is sent on by the
 * entry programs without that. Next: error.
 */
#pragma once

#include "carry.h"

SEC("tc")
int stage_deliver(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_DELIVER);
	enum reason reason;
	__u32 counter;

	if (!ctx)
		return TC_ACT_SHOT;
	pull(skb, ETH_HLEN + sizeof(struct ipv6hdr));
	counter = traffic_index(ctx->traffic, way_on(ctx));
	if (ctx->underlay) {
		reason = settle(skb, ctx, true);
		if (reason)
			return drop(skb, reason);
		return ctx->bridged ? deliver_frame(skb, ctx, counter) : deliver_decapsulated(skb, ctx, counter);
	}
	if (ctx->ifindex)
		return ctx->bridged ? carry_local(skb, ctx, counter, true) : deliver_local(skb, ctx, counter, true);
	return ctx->bridged ? carry_remote(skb, ctx, counter, true) : deliver_remote(skb, ctx, counter, true);
}
