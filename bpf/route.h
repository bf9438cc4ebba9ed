/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Route: whose is the destination, and may the sender open a flow there? Its own network is open to it, others as far as
 * a peering says. Next: deliver, error.
 */
#pragma once

#include "lib/conntrack.h"

#define ICMP_HOST_UNREACHABLE_V4 1
#define ICMP_PROHIBITED_V4 13 /* the one code that UDP sockets see at once */
#define ICMP_ADDRESS_UNREACHABLE_V6 3
#define ICMP_PROHIBITED_V6 1

/* The peering by which a network may open flows to an address outside of it. */
static __always_inline struct peering *find_peering(const struct context *ctx, __u32 from, const union addr *to)
{
	struct peering_key key = { .prefixlen = 160, .scope = SCOPE(from, ctx->generation), .addr = *to };

	return bpf_map_lookup_elem(&peerings, &key);
}

/* May a network open flows to that address of another, or the same? The context gets the line that says so. */
static __always_inline bool is_open(struct context *ctx, __u32 from, __u32 to, const union addr *addr)
{
	struct network *network;
	struct peering *peering;

	if (from == to) {
		network = find_network(ctx, from);
		ctx->line = network ? network->line : 0;
		return network;
	}
	peering = find_peering(ctx, from, addr);
	if (!peering || peering->network != to)
		return false;
	ctx->line = peering->line;
	return true;
}

static __always_inline int refuse_route(struct __sk_buff *skb, struct context *ctx, enum reason reason)
{
	bool absent = reason == REASON_NO_ENDPOINT;

	if (ctx->v4)
		return refuse(skb, ctx, reason, ICMP_UNREACHABLE_V4,
			      absent ? ICMP_HOST_UNREACHABLE_V4 : ICMP_PROHIBITED_V4, 0);
	return refuse(skb, ctx, reason, ICMP_UNREACHABLE_V6, absent ? ICMP_ADDRESS_UNREACHABLE_V6 : ICMP_PROHIBITED_V6,
		      0);
}

/* The container here that the packet is for. One that has taken a gone one's address has not opened its flows. */
static __always_inline enum reason find_endpoint(struct context *ctx)
{
	struct endpoint *endpoint = find_container(ctx, ctx->network, &ctx->key.dst);

	if (!endpoint || !endpoint->ifindex)
		return REASON_NO_ENDPOINT;
	if (ctx->known && ctx->ifindex != endpoint->ifindex) {
		if (ctx->reply)
			return REASON_NO_FLOW;
		ctx->known = 0;
	}
	ctx->ifindex = endpoint->ifindex;
	ctx->mac = endpoint->mac;
	ctx->mtu = endpoint->mtu;
	ctx->direct = !!(endpoint->flags & ENDPOINT_DIRECT);
	return REASON_NONE;
}

/* An answer goes back where its flow came from: to the container here, or to the node that sent it, if that is still one. */
static __always_inline enum reason route_answer(struct context *ctx, const struct config *cfg)
{
	struct peer *peer;

	if (!is_open(ctx, ctx->network, ctx->key.network, &ctx->key.src))
		return REASON_NO_PEERING;
	if (ctx->ifindex)
		return find_endpoint(ctx);
	peer = find_peer(ctx, &ctx->sid, cfg);
	if (!peer)
		return REASON_NO_ROUTE;
	ctx->peer = peer->index;
	return REASON_NONE;
}

static __always_inline enum reason route_new(struct context *ctx, const struct network *own)
{
	struct block *block = find_block(ctx, ctx->key.network, own, &ctx->key.dst, ctx->v4);
	__u32 before = ctx->ifindex, went = ctx->network;

	ctx->network = ctx->key.network;
	ctx->line = own->line;
	if (!block) {
		struct peering *peering = find_peering(ctx, ctx->key.network, &ctx->key.dst);
		struct network *other;

		if (!peering) {
			ctx->network = went; /* no line of the topology says anything of it */
			ctx->line = 0;
			return REASON_NO_ROUTE;
		}
		ctx->network = peering->network;
		ctx->line = peering->line;
		other = find_network(ctx, peering->network);
		block = other ? find_block(ctx, peering->network, other, &ctx->key.dst, ctx->v4) : NULL;
		if (!block)
			return REASON_NO_ROUTE;
	}
	if (block->flags & BLOCK_LOCAL)
		return find_endpoint(ctx);
	if (block->flags & BLOCK_FRAMES)
		return REASON_NO_ROUTE;
	if (before) /* it was a container's here */
		ctx->known = 0;
	ctx->ifindex = 0;
	ctx->peer = block->peer;
	ctx->sid = block->sid;
	return REASON_NONE;
}

/* Is the known flow that of this container, and not of a gone one that had its address? The way back leads to it. */
static __always_inline bool is_own(const struct context *ctx, __u32 ifindex)
{
	struct flow_key key;
	struct flow *back;

	turn(&key, &ctx->key, ctx->network);
	back = find_flow(&key);
	return back && back->ifindex == ifindex;
}

static __always_inline enum reason route_from_container(struct context *ctx, const struct config *cfg, __u32 ifindex)
{
	struct network *own = find_network(ctx, ctx->key.network);

	if (!own)
		return REASON_NO_NETWORK;
	if (ctx->known && !is_own(ctx, ifindex)) {
		if (ctx->reply)
			return REASON_NO_FLOW;
		ctx->known = 0;
	}
	return ctx->known && ctx->reply ? route_answer(ctx, cfg) : route_new(ctx, own);
}

/* Nobody out there may speak for a container that is here. */
static __always_inline bool is_from_here(const struct context *ctx)
{
	struct network *network = find_network(ctx, ctx->key.network);
	struct block *block = network ? find_block(ctx, ctx->key.network, network, &ctx->key.src, ctx->v4) : NULL;

	return block && block->flags & BLOCK_LOCAL;
}

static __always_inline enum reason route_from_underlay(struct context *ctx)
{
	struct network *here = find_network(ctx, ctx->network);
	bool open;

	if (!here || !(here->flags & NETWORK_LOCAL))
		return REASON_UNKNOWN_NETWORK;
	ctx->traffic = here->traffic;
	if (is_from_here(ctx))
		return REASON_SPOOFED_ADDRESS;
	open = ctx->known && ctx->reply ? is_open(ctx, ctx->network, ctx->key.network, &ctx->key.src)
					: is_open(ctx, ctx->key.network, ctx->network, &ctx->key.dst);
	return open ? find_endpoint(ctx) : REASON_NO_PEERING;
}

SEC("tc")
int stage_route(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_ROUTE);
	struct config *cfg;
	enum reason reason;
	__u32 before;

	if (!ctx)
		return TC_ACT_SHOT;
	cfg = node(ctx->generation);
	if (!cfg)
		return drop(skb, REASON_NO_NETWORK);
	before = ctx->network; /* where the flow went, if it is known */
	reason = ctx->underlay ? route_from_underlay(ctx) : route_from_container(ctx, cfg, skb->ifindex);
	if (!reason)
		return go_to(skb, STAGE_DELIVER);
	end_flow(ctx, before, reason == REASON_NO_PEERING || reason == REASON_NO_ROUTE);
	if (ctx->underlay || reason == REASON_NO_NETWORK || reason == REASON_NO_FLOW)
		return drop(skb, reason);
	return refuse_route(skb, ctx, reason);
}
