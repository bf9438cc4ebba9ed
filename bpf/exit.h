/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Exit: a container's flow goes to an address outside of the overlay, or to one of this node: there it is for the host itself, or for the
 * container that has the port. What leaves goes by the host's own routing here, or to the node that the topology names for it.
 * Next: masquerade, deliver, error.
 */
#pragma once

#include "enter.h"

/* May a packet to that address leave the overlay at all? Not to many, and not to addresses that mean something on one link or host only. */
static __always_inline bool may_leave(const union addr *addr)
{
	__u32 v4 = bpf_ntohl(addr->be32[3]);

	if (is_mapped_v4(addr))
		return v4 >> 24 && v4 >> 24 != 127 && v4 >> 28 != 15 && !is_multicast(addr);
	return !is_multicast(addr) && !is_link_local(addr) && !is_loopback(addr) && !is_unspecified(addr);
}

/* To this node's own address, at a port that is a container's. */
static __always_inline enum reason exit_published(struct __sk_buff *skb, struct context *ctx,
						  const struct publication *publication)
{
	struct rewrite before = ctx->rewrite;
	enum reason reason;
	bool masquerade, was = ctx->known && ctx->outside.translated;
	__u32 external = ctx->external;

	if (!is_open_published(ctx, ctx->key.network, &ctx->key.dst, publication->network, &publication->addr,
			       &masquerade)) {
		ctx->external = external;
		return external ? REASON_NO_PEERING : REASON_NO_ROUTE;
	}
	publish(ctx, publication);
	ctx->network = publication->network;
	ctx->outside.way = WAY_CONTAINER;
	/* Its answers have to come by here, also where asker and asked are one. */
	if (same_addr(&ctx->key.src, &publication->addr))
		masquerade = true;
	ctx->outside.masquerade = masquerade;
	if (masquerade)
		ctx->rewrite.src = ctx->key.dst;
	if (was)
		keep_port(ctx, &before);
	reason = find_endpoint(ctx, &ctx->rewrite.dst);
	/* No port is taken for what does not go on. */
	return !reason && !fits_local(skb, ctx) ? REASON_TOO_BIG : reason;
}

/* What is for this node goes to no other, whichever is named for the rest of the outside. */
static __always_inline void forget_egress(struct context *ctx)
{
	if (ctx->underlay) /* then they are the sender's, and the one that it sent to */
		return;
	ctx->peer = 0;
	__builtin_memset(&ctx->sid, 0, sizeof(ctx->sid));
}

/* To this node itself. */
static __always_inline enum reason exit_to_host(struct context *ctx)
{
	struct network *own = find_network(ctx, ctx->key.network);

	if (!ctx->external)
		return REASON_NO_ROUTE;
	if (!own || !(own->flags & NETWORK_HOST))
		return REASON_HOST_CLOSED;
	ctx->outside.way = WAY_HOST;
	ctx->outside.translated = 0;
	ctx->outside.masquerade = 0;
	ctx->network = NETWORK_OF_HOSTS;
	return REASON_NONE;
}

/* The host's address at the interface that the packet leaves by. */
static __always_inline enum reason find_masquerade(struct context *ctx)
{
	struct egress *egress = bpf_map_lookup_elem(&egresses, &ctx->out);

	if (!is_translatable(&ctx->key))
		return REASON_NOT_TRANSLATABLE;
	if (!egress || !(egress->flags & (ctx->v4 ? EGRESS_HAS_V4 : EGRESS_HAS_V6)))
		return REASON_NO_HOST_ADDRESS;
	ctx->rewrite.dst = ctx->key.dst;
	ctx->rewrite.sport = ctx->key.sport;
	ctx->rewrite.dport = ctx->key.dport;
	if (ctx->v4)
		map_v4(&ctx->rewrite.src, egress->v4);
	else
		ctx->rewrite.src = egress->v6;
	ctx->outside.translated = 1;
	return REASON_NONE;
}

/* By the host's routing. A known flow keeps the address and the port that it has. */
static __always_inline enum reason exit_here(struct __sk_buff *skb, struct context *ctx)
{
	bool known = ctx->known && (ctx->reply || (ctx->outside.translated && ctx->outside.masquerade));
	enum reason reason;

	if (!may_leave(&ctx->key.dst))
		return REASON_NO_ROUTE;
	if (!known)
		ctx->outside.translated = 0;
	reason = find_way_out(skb, packet_size(skb, ctx));
	if (reason || known || !ctx->outside.masquerade) {
		ctx->outside.masquerade = 0;
		return reason;
	}
	return find_masquerade(ctx);
}

static __always_inline enum reason exit_overlay(struct __sk_buff *skb, struct context *ctx)
{
	struct publication *publication;

	if (ctx->known && ctx->reply)
		return exit_here(skb, ctx);
	if (is_own_address(&ctx->key.dst)) {
		forget_egress(ctx);
		publication = find_published(ctx, &ctx->key.dst, ctx->key.dport);
		return publication ? exit_published(skb, ctx, publication) : exit_to_host(ctx);
	}
	if (ctx->underlay || !ctx->peer)
		return exit_here(skb, ctx);
	ctx->outside.way = WAY_NODE;
	ctx->outside.translated = 0;
	ctx->outside.masquerade = 0;
	ctx->network = ctx->external;
	return REASON_NONE;
}

static __always_inline int refuse_exit(struct __sk_buff *skb, struct context *ctx, enum reason reason)
{
	if (reason == REASON_TOO_BIG)
		return too_big(skb, ctx, ctx->mtu);
	end_flow(ctx, reason == REASON_NO_PEERING || reason == REASON_NO_ROUTE || reason == REASON_HOST_CLOSED);
	return reason == REASON_NO_FLOW ? drop(skb, reason) : refuse_route(skb, ctx, reason);
}

SEC("tc")
int stage_exit(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_EXIT);
	enum reason reason = REASON_NONE;

	if (!ctx)
		return TC_ACT_SHOT;
	if (ctx->underlay)
		reason = unwrap(skb, ctx);
	if (reason)
		return drop(skb, reason);
	pull(skb, ETH_HLEN + sizeof(struct ipv6hdr));
	reason = exit_overlay(skb, ctx);
	if (reason)
		return refuse_exit(skb, ctx, reason);
	return go_to(skb, ctx->outside.masquerade ? STAGE_MASQUERADE : STAGE_DELIVER);
}
