/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Route: whose is the destination, and may the sender open a flow there? Its own network is open to it, others as far as
 * a peering says. Next: deliver, exit (for what leaves the overlay), error.
 */
#pragma once

#include "forward.h"

#define ICMP_HOST_UNREACHABLE_V4 1
#define ICMP_PROHIBITED_V4 13 /* the one code that UDP sockets see at once */
#define ICMP_ADDRESS_UNREACHABLE_V6 3
#define ICMP_PROHIBITED_V6 1

/* The peering by which a network may open flows to an address outside of it. */
static __always_inline struct peering *find_peering(const struct context *ctx, __u32 from, const union addr *to)
{
	struct peering_key key = { .prefixlen = 160,
				   .scope = IN_FAMILY(SCOPE(from, ctx->generation), ctx->v4),
				   .addr = *to };

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

/* May an address outside of the overlay, or a host, open flows to that one of a network? The context learns of the external network. */
static __always_inline bool is_open_from(struct context *ctx, __u32 from, const union addr *far, __u32 to,
					 const union addr *addr)
{
	struct external *external;

	if (from != NETWORK_OUTSIDE && from != NETWORK_OF_HOSTS)
		return is_open(ctx, from, to, addr);
	if (from == NETWORK_OF_HOSTS && is_open(ctx, from, to, addr))
		return true;
	external = find_external(ctx, far);
	if (!external)
		return false;
	ctx->external = external->network;
	return is_open(ctx, external->network, to, addr);
}

/* Does the peering that has the longest match lead to the external network that has the longest match? */
static __always_inline bool leads_to(const struct context *ctx, const struct peering *peering, const union addr *far)
{
	struct config *cfg = node(ctx->generation);
	struct external *external;

	if (cfg && cfg->outside == 1) /* there is no other one */
		return true;
	external = find_external(ctx, far);
	return external && external->network == peering->network;
}

/* May a network open flows to that address outside of the overlay? */
static __always_inline bool is_open_outwards(struct context *ctx, __u32 from, const union addr *far)
{
	struct peering *peering = find_peering(ctx, from, far);

	if (!peering || !(peering->flags & PEERING_EXTERNAL) || !leads_to(ctx, peering, far))
		return false;
	ctx->external = peering->network;
	ctx->line = peering->line;
	return true;
}

/*
 * May a network open flows to a port that this node publishes for a container of another? As it may to the container itself, or as
 * it may to the node's address, and that to the container. at: the node's address. masquerade: only the latter.
 */
static __always_inline bool is_open_published(struct context *ctx, __u32 from, const union addr *at, __u32 to,
					      const union addr *addr, bool *masquerade)
{
	*masquerade = false;
	if (is_open(ctx, from, to, addr))
		return true;
	*masquerade = true;
	return is_open_outwards(ctx, from, at) && is_open(ctx, ctx->external, to, addr);
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
static __always_inline enum reason find_endpoint(struct context *ctx, const union addr *addr)
{
	struct endpoint *endpoint = find_container(ctx, ctx->network, addr);

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

/* Was the flow that a container answers to opened by one that still may? */
static __always_inline bool answer_is_open(struct context *ctx)
{
	bool masquerade;

	if (ctx->outside.translated && ctx->network != NETWORK_OUTSIDE && ctx->network != NETWORK_OF_HOSTS)
		return is_open_published(ctx, ctx->network, &ctx->rewrite.src, ctx->key.network, &ctx->key.src,
					 &masquerade);
	return is_open_from(ctx, ctx->network, &ctx->rewrite.dst, ctx->key.network, &ctx->key.src);
}

/* A container of another node asked for a port of this one: it hears from the external network that the node's address is in. */
static __always_inline enum reason answer_as_node(struct context *ctx, const struct config *cfg)
{
	struct external *external = find_external(ctx, &ctx->rewrite.src);

	if (!external)
		return REASON_NO_EXTERNAL;
	compose_sid(&ctx->source, cfg->locator, cfg->locator_bits, FUNCTION_SOURCE, external->network);
	return REASON_NONE;
}

/*
 * An answer goes back where its flow came from: to the container here, to the node that sent it, if that is still one, to the host, or out
 * of the overlay.
 */
static __always_inline enum reason route_answer(struct context *ctx, const struct config *cfg)
{
	enum reason reason;

	if (!ctx->outside.translated)
		ctx->rewrite.dst = ctx->key.dst;
	if (!answer_is_open(ctx))
		return REASON_NO_PEERING;
	if (ctx->outside.way == WAY_CONTAINER)
		return find_endpoint(ctx, &ctx->rewrite.dst);
	if (ctx->outside.way != WAY_NODE)
		return REASON_NONE;
	reason = find_peer_of_sid(ctx, cfg);
	return !reason && ctx->outside.translated ? answer_as_node(ctx, cfg) : reason;
}

/* What leaves the overlay does so as that peering says. */
static __always_inline void come_under(struct context *ctx, const struct peering *peering)
{
	ctx->external = peering->network;
	ctx->line = peering->line;
	ctx->outside.masquerade = !!(peering->flags & PEERING_MASQUERADE);
}

/* Neither in this network nor in a peered one of the overlay: is it outside, or an address of this node? What it comes to is decided there. */
static __always_inline enum reason route_outside(struct context *ctx, const struct peering *peering)
{
	ctx->outside.way = WAY_OUT;
	ctx->network = NETWORK_OUTSIDE;
	if (!peering)
		return REASON_NONE;
	if (!leads_to(ctx, peering, &ctx->key.dst)) {
		ctx->line = 0;
		return REASON_NO_ROUTE;
	}
	come_under(ctx, peering);
	ctx->peer = peering->peer;
	ctx->sid = peering->sid;
	return REASON_NONE;
}

/* The block of a peered network. NULL: none, and the reason why. */
static __always_inline struct block *find_peered(struct context *ctx, const struct peering *peering)
{
	struct network *other = find_network(ctx, peering->network);

	ctx->network = peering->network;
	ctx->line = peering->line;
	return other ? find_block(ctx, peering->network, other, &ctx->key.dst, ctx->v4) : NULL;
}

/* To the node that has the block. before: the flow went to a container here, at that interface. */
static __always_inline void route_to_node(struct context *ctx, const struct block *block, __u32 before)
{
	if (before)
		ctx->known = 0;
	ctx->outside.way = WAY_NODE;
	ctx->ifindex = 0;
	ctx->peer = block->peer;
	ctx->sid = block->sid;
}

static __always_inline enum reason route_new(struct context *ctx, const struct network *own)
{
	struct block *block = find_block(ctx, ctx->key.network, own, &ctx->key.dst, ctx->v4);
	__u32 before = ctx->ifindex, went = ctx->network;

	ctx->network = ctx->key.network;
	ctx->line = own->line;
	if (!block) {
		struct peering *peering = find_peering(ctx, ctx->key.network, &ctx->key.dst);

		if (peering ? peering->flags & PEERING_EXTERNAL : is_own_address(&ctx->key.dst))
			return route_outside(ctx, peering);
		if (!peering) {
			ctx->network = went; /* no line of the topology says anything of it */
			ctx->line = 0;
			return REASON_NO_ROUTE;
		}
		block = find_peered(ctx, peering);
		if (!block)
			return REASON_NO_ROUTE;
	}
	ctx->outside.translated = 0;
	ctx->outside.way = WAY_CONTAINER;
	if (block->flags & BLOCK_LOCAL)
		return find_endpoint(ctx, &ctx->key.dst);
	if (block->flags & BLOCK_FRAMES)
		return REASON_NO_ROUTE;
	route_to_node(ctx, block, before);
	return REASON_NONE;
}

/* Is the known flow that of this container, and not of a gone one that had its address? The way back leads to it. */
static __always_inline bool is_own(const struct context *ctx, __u32 ifindex)
{
	struct flow *there = find_flow(&ctx->key), *back;
	struct flow_key key;

	if (!there)
		return false;
	opposite(&key, &ctx->key, there);
	back = find_flow(&key);
	return back && back->way == WAY_CONTAINER && back->ifindex == ifindex;
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

/* Another node has the packet leave the overlay here, as the peering of its network says. */
static __always_inline enum reason route_carried(struct context *ctx, const struct network *external)
{
	struct network *network = find_network(ctx, ctx->key.network);
	struct peering *peering;
	bool answer = ctx->known && ctx->reply;

	ctx->traffic = network ? network->traffic : external->traffic;
	if (answer) {
		ctx->external = ctx->network;
		ctx->network = NETWORK_OUTSIDE;
		return is_open_from(ctx, NETWORK_OUTSIDE, &ctx->key.dst, ctx->key.network, &ctx->key.src)
			       ? REASON_NONE
			       : REASON_NO_PEERING;
	}
	peering = find_peering(ctx, ctx->key.network, &ctx->key.dst);
	if (!peering || peering->peer || peering->network != ctx->network || !leads_to(ctx, peering, &ctx->key.dst))
		return REASON_NO_PEERING;
	come_under(ctx, peering);
	ctx->outside.way = WAY_OUT;
	ctx->network = NETWORK_OUTSIDE;
	return REASON_NONE;
}

/* A container of another node answers this host, or an answer comes to what the host asked. */
static __always_inline enum reason route_to_host(struct context *ctx)
{
	struct network *network = find_network(ctx, ctx->key.network);

	ctx->traffic = network ? network->traffic : 0;
	if (!ctx->known || !ctx->reply)
		return REASON_NO_PEERING;
	return is_open(ctx, NETWORK_OF_HOSTS, ctx->key.network, &ctx->key.src) ? REASON_NONE : REASON_NO_PEERING;
}

/* Does an address that another node says is outside of the overlay belong to the network that it says? */
static __always_inline bool is_classified(const struct context *ctx)
{
	struct network *network = find_network(ctx, ctx->key.network);
	struct external *external;

	if (!network || !(network->flags & NETWORK_EXTERNAL))
		return true;
	external = find_external(ctx, &ctx->key.src);
	return external && external->network == ctx->key.network;
}

static __always_inline enum reason route_from_underlay(struct context *ctx)
{
	struct network *here = find_network(ctx, ctx->network);
	bool open;

	if (ctx->network == NETWORK_OF_HOSTS)
		return route_to_host(ctx);
	if (is_from_here(ctx))
		return REASON_SPOOFED_ADDRESS;
	if (here && here->flags & NETWORK_EXTERNAL)
		return route_carried(ctx, here);
	if (!here || !(here->flags & NETWORK_LOCAL))
		return REASON_UNKNOWN_NETWORK;
	ctx->traffic = here->traffic;
	if (!is_classified(ctx))
		return REASON_NO_EXTERNAL;
	if (ctx->outside.way != WAY_CONTAINER || ctx->outside.translated)
		ctx->known = 0; /* it went elsewhere */
	open = ctx->known && ctx->reply ? is_open(ctx, ctx->network, ctx->key.network, &ctx->key.src)
					: is_open(ctx, ctx->key.network, ctx->network, &ctx->key.dst);
	ctx->outside.way = WAY_CONTAINER;
	ctx->outside.translated = 0;
	return open ? find_endpoint(ctx, &ctx->key.dst) : REASON_NO_PEERING;
}

SEC("tc")
int stage_route(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_ROUTE);
	struct config *cfg;
	enum reason reason;

	if (!ctx)
		return TC_ACT_SHOT;
	cfg = node(ctx->generation);
	if (!cfg)
		return drop(skb, REASON_NO_NETWORK);
	reason = ctx->underlay ? route_from_underlay(ctx) : route_from_container(ctx, cfg, skb->ifindex);
	if (!reason)
		return go_to(skb, ctx->outside.way == WAY_OUT ? STAGE_EXIT : STAGE_DELIVER);
	end_flow(ctx, reason == REASON_NO_PEERING || reason == REASON_NO_ROUTE);
	if (ctx->underlay || reason == REASON_NO_NETWORK || reason == REASON_NO_FLOW)
		return drop(skb, reason);
	return refuse_route(skb, ctx, reason);
}
