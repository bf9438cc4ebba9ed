/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Bridge: L2 networks. The entry at a container's port says which container sends, and whether it may: what is for the gateway's MAC is routed,
 * ARP and neighbour discovery are answered, what is for many is replicated, and every other frame goes where its
 * destination MAC is. Next: gateway, route, neighbour, flood, deliver, error.
 */
#pragma once

#include "classify.h"
#include "lib/fdb.h"

/* The network of a container's frame, or of one from the underlay that may come in. */
static __always_inline enum reason enter(struct context *ctx, const struct network *network)
{
	if (ctx->underlay)
		return admit(ctx->key.network);
	if (!network)
		return REASON_NO_NETWORK;
	ctx->network = ctx->key.network;
	ctx->line = network->line;
	return REASON_NONE;
}

/* Where the frame goes. An end that is another one than the known flow's has not opened it. */
static __always_inline enum reason find_way(struct context *ctx, const struct config *cfg)
{
	struct network *network = find_network(ctx, ctx->key.network);
	enum reason reason = enter(ctx, network);
	__u32 before = ctx->ifindex;

	if (!reason && network)
		reason = find_station(ctx, cfg, network, &ctx->to);
	if (!reason && ctx->underlay && !ctx->ifindex) /* nothing goes from node to node by a third */
		reason = REASON_UNKNOWN_MAC;
	if (reason)
		return reason;
	if (ctx->known && before != ctx->ifindex) {
		if (ctx->reply && before)
			return REASON_NO_FLOW;
		ctx->known = 0;
	}
	return REASON_NONE;
}

SEC("tc")
int stage_bridge(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_BRIDGE);
	struct config *cfg;
	enum reason reason;

	if (!ctx)
		return TC_ACT_SHOT;
	cfg = node(ctx->generation);
	if (!cfg)
		return drop(skb, REASON_NO_NETWORK);
	reason = find_way(ctx, cfg);
	ctx->outside.translated = 0;
	if (!reason)
		return go_to(skb, STAGE_DELIVER);
	end_flow(ctx, false);
	return drop(skb, reason);
}

static __always_inline bool is_for_many(const struct context *ctx)
{
	return ctx->to.u8[0] & 1;
}

/* A frame without a flow goes to one, or to many. */
static __always_inline int pass_frame(struct __sk_buff *skb, const struct context *ctx)
{
	return is_for_many(ctx) ? go_to(skb, STAGE_FLOOD) : go_to(skb, STAGE_BRIDGE);
}

/* So does a container's, whatever is in it. */
static __always_inline int bridge_opaque(struct __sk_buff *skb, struct context *ctx)
{
	ctx->bridged = 1;
	ctx->opaque = 1;
	return pass_frame(skb, ctx);
}

/*
 * A tagged frame is carried as it is: its addresses are the containers' own affair. Tag 0 only has a priority, and the receiver would take
 * the frame for an untagged one: it goes.
 */
static __always_inline bool take_tag(struct __sk_buff *skb, struct context *ctx)
{
	ctx->vlan = 0;
	if (skb->vlan_present && !(skb->vlan_tci & VLAN_ID) && bpf_skb_vlan_pop(skb))
		return false;
	if (!skb->vlan_present)
		return true;
	ctx->vlan = skb->vlan_proto;
	ctx->vlan_tci = skb->vlan_tci;
	return ctx->vlan_tci & VLAN_ID;
}

/* Addresses, EtherType and tag of a container's frame. */
static __always_inline enum reason read_frame(struct __sk_buff *skb, struct context *ctx)
{
	struct ethhdr *eth;

	if (!take_tag(skb, ctx))
		return REASON_MALFORMED;
	pull(skb, ETH_HLEN + IP_HEADER_MAX + 20);
	eth = packet_start(skb);
	if ((void *)(eth + 1) > packet_end(skb))
		return REASON_MALFORMED;
	__builtin_memcpy(&ctx->to, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(&ctx->from, eth->h_source, ETH_ALEN);
	ctx->type = eth->h_proto;
	return REASON_NONE;
}

/* What is known of an IP packet that belongs to no flow. */
static __always_inline void glance(struct __sk_buff *skb, struct context *ctx)
{
	const __u8 *ip = packet_start(skb) + ETH_HLEN;

	ctx->v4 = ctx->type == bpf_htons(ETH_P_IP);
	ctx->tos = 0;
	ctx->l3_len = gso_len(skb);
	if (is_ip(ctx->type) && (void *)(ip + 2) <= packet_end(skb))
		ctx->tos = ctx->v4 ? ip[1] : traffic_class((const struct ipv6hdr *)ip);
}

static __always_inline int frame_v4(struct __sk_buff *skb, struct context *ctx, const struct port *port,
				    const struct config *cfg)
{
	struct iphdr *ip = packet_start(skb) + ETH_HLEN;
	enum reason reason = inspect_v4(skb, ctx, port);

	if (reason)
		return drop(skb, reason);
	if (is_for_many(ctx))
		return bridge_opaque(skb, ctx);
	if (port->gateway4 && same_mac(ctx->to.u8, cfg->gateway.u8))
		return route_v4(skb, ctx, port);
	if ((void *)(ip + 1) > packet_end(skb))
		return drop(skb, REASON_MALFORMED);
	map_v4(&ctx->key.src, ip->saddr);
	map_v4(&ctx->key.dst, ip->daddr);
	ctx->bridged = 1;
	return GO_ON;
}

/* A link-local address is made of the MAC address (EUI-64, RFC 4291 appendix A): no other can be told from a stolen one. */
static __always_inline bool is_own_v6(const struct port *port, const union addr *src)
{
	struct mac mac;

	if (port->flags & PORT_HAS_V6 && same_addr(src, &port->v6))
		return true;
	return eui64_mac(src, &mac) && same_mac(mac.u8, port->mac.u8);
}

static __always_inline int frame_v6(struct __sk_buff *skb, struct context *ctx, const struct port *port,
				    const struct config *cfg)
{
	enum reason reason = inspect_v6(skb, ctx, port, cfg);
	bool many = is_for_many(ctx);

	if (reason)
		return drop(skb, reason);
	if (!is_own_v6(port, &ctx->key.src) && !(many && is_unspecified(&ctx->key.src)) &&
	    !(ctx->nd && is_unspecified(&ctx->key.src)))
		return drop(skb, REASON_SPOOFED_ADDRESS);
	if (ctx->nd) {
		ctx->bridged = 1;
		return go_to(skb, STAGE_NEIGHBOUR);
	}
	if (many)
		return bridge_opaque(skb, ctx);
	if (!is_unspecified(&port->gateway6) && same_mac(ctx->to.u8, cfg->gateway.u8))
		return is_link_local(&ctx->key.src) ? drop(skb, REASON_SPOOFED_ADDRESS) : route_v6(skb, ctx, port);
	ctx->bridged = 1;
	return GO_ON;
}

static __always_inline int classify_frame(struct __sk_buff *skb, struct context *ctx, const struct port *port,
					  const struct config *cfg)
{
	if (!same_mac(ctx->from.u8, port->mac.u8))
		return drop(skb, REASON_SPOOFED_MAC);
	if (!ctx->vlan) {
		switch (ctx->type) {
		case bpf_htons(ETH_P_IP):
			return frame_v4(skb, ctx, port, cfg);
		case bpf_htons(ETH_P_IPV6):
			return frame_v6(skb, ctx, port, cfg);
		case bpf_htons(ETH_P_ARP):
			ctx->bridged = 1;
			return go_to(skb, STAGE_NEIGHBOUR);
		}
	}
	glance(skb, ctx);
	return bridge_opaque(skb, ctx);
}

/* The port that a frame came in by, which the context learns of. NULL: there is none. */
static __always_inline struct port *find_origin(struct context *ctx, __u32 ifindex)
{
	ctx->origin = ifindex;
	ctx->l2 = 1;
	return find_sender(ctx, ifindex);
}

SEC("tc")
int pod_l2(struct __sk_buff *skb)
{
	struct context *ctx = start(skb);
	enum reason reason;
	struct config *cfg;
	struct port *port;
	int verdict;

	if (!ctx)
		return TC_ACT_SHOT;
	cfg = node(ctx->generation);
	port = find_origin(ctx, skb->ifindex);
	if (!port || !cfg)
		return drop(skb, REASON_NO_PORT);
	reason = read_frame(skb, ctx);
	if (reason)
		return drop(skb, reason);
	verdict = classify_frame(skb, ctx, port, cfg);
	return verdict == GO_ON ? follow_flow(skb, ctx, true) : verdict;
}

/* Out of the far end of the segmenter: what was sent through it (carry.h) goes on. */
static __always_inline int pass_on(struct __sk_buff *skb, __u32 index)
{
	struct nexthop *nexthop = bpf_map_lookup_elem(&nexthops, &index);

	return nexthop && nexthop->ifindex ? transmit(skb, nexthop) : drop(skb, REASON_NO_NEXTHOP);
}

SEC("tc")
int segmented(struct __sk_buff *skb)
{
	struct context *ctx = start(skb);
	__u32 mark = skb->mark;
	enum reason reason;

	if (!ctx)
		return TC_ACT_SHOT;
	skb->mark = 0;
	if (mark & MARK_NEXTHOP)
		return pass_on(skb, mark & ~MARK_NEXTHOP);
	if (!find_origin(ctx, mark))
		return drop(skb, REASON_NO_PORT);
	reason = read_frame(skb, ctx);
	if (reason)
		return drop(skb, reason);
	glance(skb, ctx);
	return bridge_opaque(skb, ctx);
}
