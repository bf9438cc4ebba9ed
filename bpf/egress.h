/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Egress: a packet of a known flow leaves the overlay, and the host's routes are to be asked again; or it came from the underlay, and
 * goes anywhere but straight to a container. Related: an ICMP error about a flow that is translated. Next: error.
 */
#pragma once

#include "route.h"

/* The flow of a packet that an entry program knew, as far as the outer header is off. NULL: it has gone, or the header stays. */
static __always_inline struct flow *resume(struct __sk_buff *skb, struct context *ctx, enum reason *reason)
{
	struct flow *flow = find_flow(&ctx->key);

	*reason = REASON_NO_FLOW;
	if (!flow)
		return NULL;
	*reason = ctx->underlay && !ctx->outside.bare ? unwrap(skb, ctx) : REASON_NONE;
	if (*reason)
		return NULL;
	pull(skb, ETH_HLEN + sizeof(struct ipv6hdr));
	take_over(ctx, flow);
	ctx->reply = !!(flow->flags & FLOW_REPLY);
	return flow;
}

static __always_inline int send_out_anew(struct __sk_buff *skb, struct context *ctx, struct flow *flow)
{
	enum reason reason = find_way_out(skb, packet_size(skb, ctx));
	__u32 counter = flow->counter;

	if (reason == REASON_TOO_BIG)
		return too_big(skb, ctx, ctx->mtu);
	if (reason)
		return refuse_route(skb, ctx, reason);
	leave_by(flow, ctx);
	return send_out(skb, ctx, counter, false, true);
}

/* On the flow's way, whose route may have to be asked for again. */
static __always_inline int send_resumed(struct __sk_buff *skb, struct context *ctx, struct flow *flow)
{
	return flow->way == WAY_OUT && flow->looked != tick() ? send_out_anew(skb, ctx, flow)
							      : send_way(skb, ctx, flow);
}

SEC("tc")
int stage_egress(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_EGRESS);
	enum reason reason;
	struct flow *flow;

	if (!ctx)
		return TC_ACT_SHOT;
	flow = resume(skb, ctx, &reason);
	if (!flow)
		return drop(skb, reason);
	if (is_to_be_related(ctx))
		return go_to(skb, STAGE_RELATED);
	return send_resumed(skb, ctx, flow);
}

/* What the error quotes went the other way, so there everything is the other way round. */
static __always_inline bool rewrite_quoted_transport(struct __sk_buff *skb, const struct context *ctx, __u32 check)
{
	struct ports ports = { .src = ctx->rewrite.dport, .dst = ctx->rewrite.sport };
	__u32 offset = ETH_HLEN + ctx->quote_l4;

	if (ctx->quoted == IPPROTO_ICMP || ctx->quoted == IPPROTO_ICMPV6)
		return rewrite_id(skb, offset, check, ctx->rewrite.sport);
	return rewrite_ports(skb, offset, check, ports, 0);
}

/*
 * The quoted packet, and the checksum of the error. That one covers the quoted addresses; those of IPv4 change nothing, as their own header's checksum
 * follows them.
 */
static __always_inline bool rewrite_quote(struct __sk_buff *skb, const struct context *ctx)
{
	__u32 check = ETH_HLEN + ctx->l4 + ICMP_CHECKSUM;
	__s64 sum = 0;

	if (!rewrite_addresses(skb, ctx->v4, ETH_HLEN + ctx->quote, &ctx->rewrite.dst, &ctx->rewrite.src, &sum))
		return false;
	if (!ctx->v4 && sum && bpf_l4_csum_replace(skb, check, 0, sum, 0))
		return false;
	return rewrite_quoted_transport(skb, ctx, check);
}

/* The error's own addresses. A router on the way keeps its own; who the flow goes to has the address that it has there. */
static __always_inline bool rewrite_error(struct __sk_buff *skb, const struct context *ctx)
{
	__u32 check = ETH_HLEN + ctx->l4 + ICMP_CHECKSUM;
	union addr src;
	__s64 sum = 0;

	if (ctx->v4) {
		__be32 from;

		if (!load(skb, ETH_HLEN + offsetof(struct iphdr, saddr), &from, sizeof(from)))
			return false;
		map_v4(&src, from);
	} else if (!load(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), &src, sizeof(src))) {
		return false;
	}
	if (same_addr(&src, &ctx->key.src))
		src = ctx->rewrite.src;
	if (!rewrite_addresses(skb, ctx->v4, ETH_HLEN, &src, &ctx->rewrite.dst, &sum))
		return false;
	return ctx->v4 || !sum || !bpf_l4_csum_replace(skb, check, 0, sum, pseudo_flag(skb, false));
}

SEC("tc")
int stage_related(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_RELATED);
	enum reason reason;
	struct flow *flow;

	if (!ctx)
		return TC_ACT_SHOT;
	flow = resume(skb, ctx, &reason);
	if (!flow)
		return drop(skb, reason);
	if (!rewrite_quote(skb, ctx) || !rewrite_error(skb, ctx))
		return drop(skb, REASON_TRANSLATION_FAILED);
	ctx->outside.related = 1;
	return send_resumed(skb, ctx, flow);
}
