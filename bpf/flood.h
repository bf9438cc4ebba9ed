/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Flood: a frame for many is copied to all other ports of its L2 network here, and, where it comes from one of them, to every other
 * node that has the network, behind one outer header whose SID changes from copy to copy. What comes from a node goes to none. Ends the pipeline.
 */
#pragma once

#include "frame.h"
#include "lib/budget.h"

#define FLOOD_LOCALS 1024 /* copies of one frame at most, as many ports as a node may have in a network */
#define FLOOD_REMOTES 256 /* … and nodes */

/* A quarter of a second's frames may come at once, and a few where that is little. */
#define FLOOD_BURST(rate) ((rate) / 4 + 32)

struct replication {
	struct __sk_buff *skb;
	struct context *ctx;
	struct config *cfg;
};

static __always_inline bool may_flood(__u32 kind, __u32 of, const struct network *network)
{
	__u32 rate = network->flood_rate ?: 1;

	return spend(kind, of, FLOOD_BURST(rate), 1000000000ULL / rate);
}

static long copy_to_port(__u32 place, struct replication *r)
{
	struct member_key key = { .scope = SCOPE(r->ctx->key.network, r->ctx->generation), .place = place };
	struct member *member = bpf_map_lookup_elem(&members, &key);

	if (member && (r->ctx->underlay || member->ifindex != r->ctx->origin))
		bpf_clone_redirect(r->skb, member->ifindex, 0);
	return 0;
}

/* Write the copy's own addresses into the outer header. */
static __always_inline bool address_copy(struct __sk_buff *skb, const struct member *member,
					 const struct nexthop *nexthop, bool srh)
{
	struct mac macs[2] = { nexthop->dst, nexthop->src };
	const __u32 ip = ETH_HLEN;

	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0) ||
	    bpf_skb_store_bytes(skb, ip + offsetof(struct ipv6hdr, daddr), &member->sid, sizeof(member->sid), 0))
		return false;
	return !srh || !bpf_skb_store_bytes(skb, ip + OUTER_LEN + offsetof(struct srh, segment), &member->sid,
					    sizeof(member->sid), 0);
}

static long copy_to_node(__u32 place, struct replication *r)
{
	struct member_key key = { .scope = SCOPE(r->ctx->key.network, r->ctx->generation),
				  .place = place | MEMBER_REMOTE };
	struct member *member = bpf_map_lookup_elem(&members, &key);
	struct nexthop *nexthop;

	if (!member)
		return 0;
	r->ctx->peer = member->peer;
	nexthop = find_nexthop(r->ctx);
	if (!nexthop || !nexthop->ifindex || r->skb->len > nexthop->mtu + ETH_HLEN ||
	    !address_copy(r->skb, member, nexthop, r->cfg->srh)) {
		note(r->skb, nexthop && nexthop->ifindex ? REASON_TOO_BIG : REASON_NO_NEXTHOP);
		return 0;
	}
	if (is_fresh(nexthop) || (nexthop->flags & NEXTHOP_RAW && is_ip(r->ctx->type))) {
		bpf_clone_redirect(r->skb, nexthop->ifindex, 0);
		return 0;
	}
	if (!r->cfg->segmenter) {
		note(r->skb, REASON_NO_NEXTHOP);
		return 0;
	}
	r->skb->mark = MARK_NEXTHOP | nexthop_index(r->ctx);
	bpf_clone_redirect(r->skb, r->cfg->segmenter, 0);
	r->skb->mark = 0;
	return 0;
}

static __always_inline void copy_to_ports(struct replication *r, const struct group *group)
{
	__u32 places = group->locals;

	bpf_loop(places < FLOOD_LOCALS ? places : FLOOD_LOCALS, copy_to_port, r, 0);
}

static __always_inline void copy_to_nodes(struct replication *r, const struct group *group)
{
	__u32 places = group->remotes;

	bpf_loop(places < FLOOD_REMOTES ? places : FLOOD_REMOTES, copy_to_node, r, 0);
}

static __always_inline void count_copies(struct __sk_buff *skb, const struct context *ctx)
{
	count(skb, traffic_index(ctx->traffic, REASON_REPLICATED));
	if (explaining)
		tell(skb, REASON_REPLICATED, VERDICT_PASSED);
}

/* Each copy is a packet of its own: the one that they were made of ends here. A copy is really sent, even in a trial run. */
static __always_inline int flood_from_port(struct __sk_buff *skb, struct context *ctx, struct config *cfg,
					   const struct group *group)
{
	struct replication r = { .skb = skb, .ctx = ctx, .cfg = cfg };
	enum reason reason;

	if (skb->gso_size) /* every copy would be cut by itself, and some cannot be */
		return through_segmenter(skb, cfg, ctx->origin, REASON_GSO_FRAME);
	count_copies(skb, ctx);
	if (explaining)
		return TC_ACT_SHOT;
	copy_to_ports(&r, group);
	if (!group->remotes)
		return TC_ACT_SHOT;
	ctx->ifindex = 0;
	reason = cfg->srh ? encapsulate_frame(skb, ctx, true) : encapsulate_frame(skb, ctx, false);
	if (reason)
		return drop(skb, reason);
	copy_to_nodes(&r, group);
	return TC_ACT_SHOT;
}

static __always_inline int flood_from_underlay(struct __sk_buff *skb, struct context *ctx, struct config *cfg,
					       const struct group *group)
{
	struct replication r = { .skb = skb, .ctx = ctx, .cfg = cfg };
	enum reason reason = decapsulate_frame(skb, ctx);

	if (reason)
		return drop(skb, reason);
	count_copies(skb, ctx);
	if (!explaining)
		copy_to_ports(&r, group);
	return TC_ACT_SHOT;
}

/* Containers here are rationed by their port, routers where their frames come in; nodes of Lace have done so. */
static __always_inline bool is_rationed(const struct context *ctx, const struct config *cfg,
					const struct network *network)
{
	struct peer *peer;

	if (!ctx->underlay)
		return may_flood(BUDGET_FLOOD, ctx->origin, network);
	peer = find_peer(ctx, &ctx->source, cfg);
	return !peer || !peer->network || may_flood(BUDGET_FLOOD_IN, peer->index, network);
}

SEC("tc")
int stage_flood(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_FLOOD);
	struct network *network;
	struct config *cfg;
	struct group *group;
	enum reason reason;
	__u32 scope;

	if (!ctx)
		return TC_ACT_SHOT;
	cfg = node(ctx->generation);
	network = find_network(ctx, ctx->key.network);
	if (!cfg)
		return drop(skb, REASON_NO_NETWORK);
	reason = enter(ctx, network);
	if (reason || !network)
		return drop(skb, reason);
	scope = SCOPE(ctx->key.network, ctx->generation);
	group = bpf_map_lookup_elem(&groups, &scope);
	if (!(network->flags & NETWORK_FLOOD) || !group)
		return drop(skb, REASON_FLOOD_OFF);
	if (!is_rationed(ctx, cfg, network))
		return drop(skb, REASON_FLOOD_LIMITED);
	return ctx->underlay ? flood_from_underlay(skb, ctx, cfg, group) : flood_from_port(skb, ctx, cfg, group);
}
