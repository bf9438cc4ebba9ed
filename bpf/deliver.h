/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Deliver: to the container on this node that the context names (ifindex), encapsulated to the node that owns the destination, out of the
 * overlay, or to the host. What the stages decided is written down first; a known flow is sent on by the
 * entry programs without that. Next: related (for errors about translated flows), error.
 */
#pragma once

#include "carry.h"

/* What came from the underlay and does not go straight to a container. */
static __always_inline bool goes_further(const struct context *ctx)
{
	return ctx->outside.way != WAY_CONTAINER || ctx->outside.translated;
}

static __always_inline int deliver_routed(struct __sk_buff *skb, struct context *ctx, __u32 counter)
{
	switch (ctx->outside.way) {
	case WAY_CONTAINER:
		return deliver_local(skb, ctx, counter, true);
	case WAY_NODE:
		return deliver_remote(skb, ctx, counter, true);
	case WAY_OUT:
		return send_out(skb, ctx, counter, true, false);
	}
	return deliver_host(skb, ctx, counter, true);
}

SEC("tc")
int stage_deliver(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_DELIVER);
	enum reason reason;
	__u32 counter;

	if (!ctx)
		return TC_ACT_SHOT;
	if (is_to_be_related(ctx))
		return go_to(skb, STAGE_RELATED);
	pull(skb, ETH_HLEN + sizeof(struct ipv6hdr));
	counter = traffic_index(ctx->traffic, way_on(ctx));
	if (ctx->underlay && !ctx->bridged && goes_further(ctx)) {
		reason = ctx->outside.bare ? REASON_NONE : unwrap(skb, ctx);
		return reason ? drop(skb, reason) : deliver_routed(skb, ctx, counter);
	}
	if (ctx->underlay) {
		reason = settle(skb, ctx, true);
		if (reason)
			return drop(skb, reason);
		return ctx->bridged ? deliver_frame(skb, ctx, counter) : deliver_decapsulated(skb, ctx, counter);
	}
	if (!ctx->bridged)
		return deliver_routed(skb, ctx, counter);
	return ctx->ifindex ? carry_local(skb, ctx, counter, true) : carry_remote(skb, ctx, counter, true);
}
