/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Enter: a flow comes from outside of the overlay, or from the host, to a container: by its own address, or by a port of this node that is
 * published for it. Who sends, what is meant, and may it? Next: masquerade, deliver, error.
 */
#pragma once

#include "route.h"
#include "lib/publication.h"

/* The address that a host's packet is judged by: what it sends to itself from a loopback address is from the host all the same. */
static __always_inline bool find_far(const struct context *ctx, union addr *far)
{
	struct host *host = this_node();

	if (!is_loopback(&ctx->key.src)) {
		*far = ctx->key.src;
		return true;
	}
	return host && own_address(far, host, ctx->v4);
}

/* What is outside has an identity, and neither the host's address nor a container's. */
static __always_inline enum reason classify_outside(struct context *ctx)
{
	struct external *external = find_external(ctx, &ctx->key.src);

	if (is_own_address(&ctx->key.src) || find_peering(ctx, NETWORK_OUTSIDE, &ctx->key.src))
		return REASON_SPOOFED_ADDRESS;
	if (!external)
		return REASON_NO_EXTERNAL;
	ctx->external = external->network;
	return REASON_NONE;
}

/* The container's address and port, from what is published here; else from the packet, whose network the tables say. */
static __always_inline enum reason find_meant(struct context *ctx)
{
	struct publication *publication = find_publication(ctx, &ctx->key.dst, ctx->key.dport);
	struct peering *peering;

	ctx->outside.translated = 0;
	if (publication) {
		publish(ctx, publication);
		ctx->network = publication->network;
		return REASON_NONE;
	}
	ctx->rewrite.dst = ctx->key.dst;
	peering = find_peering(ctx, ctx->key.network, &ctx->key.dst);
	if (!peering)
		return REASON_NO_ROUTE;
	ctx->network = peering->network;
	return REASON_NONE;
}

/* The node, or the port on this one, of the address that is meant. */
static __always_inline enum reason find_place(struct context *ctx)
{
	struct network *network = find_network(ctx, ctx->network);
	struct block *block;

	if (!network)
		return REASON_NO_NETWORK;
	ctx->traffic = network->traffic;
	block = find_block(ctx, ctx->network, network, &ctx->rewrite.dst, ctx->v4);
	if (!block || block->flags & BLOCK_FRAMES)
		return REASON_NO_ROUTE;
	ctx->outside.way = WAY_CONTAINER;
	if (block->flags & BLOCK_LOCAL)
		return find_endpoint(ctx, &ctx->rewrite.dst);
	route_to_node(ctx, block, ctx->ifindex);
	return REASON_NONE;
}

/* What goes on to another node says which network it comes from. */
static __always_inline void name_source(struct context *ctx)
{
	struct config *cfg = node(ctx->generation);

	if (cfg)
		compose_sid(&ctx->source, cfg->locator, cfg->locator_bits, FUNCTION_SOURCE,
			    ctx->external ?: ctx->key.network);
}

static __always_inline enum reason enter_new(struct context *ctx, const union addr *far)
{
	struct rewrite before = ctx->rewrite;
	bool was = ctx->known && ctx->outside.translated;
	enum reason reason = find_meant(ctx);

	if (reason)
		return reason;
	if (!is_open_from(ctx, ctx->key.network, far, ctx->network, &ctx->rewrite.dst))
		return REASON_NO_PEERING;
	if (ctx->outside.translated && is_loopback(&ctx->key.src)) {
		ctx->rewrite.src = *far;
		ctx->outside.masquerade = 1;
	}
	if (was)
		keep_port(ctx, &before);
	return find_place(ctx);
}

/* An answer from outside, or of the host, to what a container opened. */
static __always_inline enum reason enter_answer(struct context *ctx, const union addr *far)
{
	struct network *network = find_network(ctx, ctx->network);
	struct config *cfg = node(ctx->generation);

	if (!network || !cfg)
		return REASON_NO_NETWORK;
	ctx->traffic = network->traffic;
	if (!is_open_outwards(ctx, ctx->network, far))
		return REASON_NO_PEERING;
	if (!ctx->outside.translated)
		ctx->rewrite.dst = ctx->key.dst;
	if (ctx->outside.way == WAY_CONTAINER)
		return find_endpoint(ctx, &ctx->rewrite.dst);
	return find_peer_of_sid(ctx, cfg);
}

static __always_inline enum reason enter_overlay(struct context *ctx)
{
	enum reason reason = REASON_NONE;
	union addr far;

	if (!find_far(ctx, &far))
		return REASON_NO_HOST_ADDRESS;
	if (ctx->key.network == NETWORK_OUTSIDE)
		reason = classify_outside(ctx);
	if (reason)
		return reason;
	reason = ctx->known && ctx->reply ? enter_answer(ctx, &far) : enter_new(ctx, &far);
	if (!reason && ctx->outside.way == WAY_NODE)
		name_source(ctx);
	return reason;
}

/* Was this the last hop of a packet from outside? What the host sends has lost its own. */
static __always_inline bool is_last_hop(struct __sk_buff *skb, const struct context *ctx)
{
	struct iphdr *ip = packet_start(skb) + ETH_HLEN;
	__u8 left;

	if (ctx->outside.side != OUTER_OUTSIDE || (void *)(ip + 1) > packet_end(skb))
		return false;
	left = ctx->v4 ? ip->ttl : ((struct ipv6hdr *)ip)->hop_limit;
	return left <= 1;
}

static __always_inline int expire(struct __sk_buff *skb, struct context *ctx)
{
	return refuse(skb, ctx, REASON_HOP_LIMIT, ctx->v4 ? ICMP_TIME_EXCEEDED_V4 : ICMP_TIME_EXCEEDED_V6, 0, 0);
}

SEC("tc")
int stage_enter(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_ENTER);
	enum reason reason;

	if (!ctx)
		return TC_ACT_SHOT;
	reason = enter_overlay(ctx);
	if (!reason && is_last_hop(skb, ctx)) /* not before it is clear that he may come here */
		return expire(skb, ctx);
	if (!reason)
		return go_to(skb, ctx->outside.masquerade ? STAGE_MASQUERADE : STAGE_DELIVER);
	end_flow(ctx, reason == REASON_NO_PEERING || reason == REASON_NO_ROUTE);
	/* Who is outside is told nothing of what he may not reach; the host's own processes are. */
	if (ctx->outside.side == OUTER_OUTSIDE || reason == REASON_NO_FLOW || reason == REASON_SPOOFED_ADDRESS)
		return drop(skb, reason);
	return refuse_route(skb, ctx, reason);
}
