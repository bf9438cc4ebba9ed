/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Neighbour: ARP and neighbour discovery in L2 networks. The node that has an address answers for it, at the port of who asks or over the
 * underlay; no container is asked. What a container says of its own address is passed on. Next: deliver, flood, bridge.
 */
#pragma once

#include "flood.h"
#include "lib/neighbour.h"

enum answer {
	ANSWER_NOBODY, /* has the address, as far as is known */
	ANSWER_HERE,   /* its MAC is known */
	ANSWER_THERE,  /* another node has it, which the context names */
};

/* A router answers no question, so each node does, for its own containers. */
static __always_inline bool answers_for_routers(const struct context *ctx)
{
	return !ctx->underlay;
}

static __always_inline enum answer find_owner(struct context *ctx, const struct config *cfg,
					      const struct network *network, const union addr *target, struct mac *mac)
{
	struct endpoint *endpoint = find_container(ctx, ctx->key.network, target);
	bool v4 = is_mapped_v4(target);
	struct block *block;

	if (endpoint) {
		*mac = endpoint->mac;
		return endpoint->ifindex || answers_for_routers(ctx) ? ANSWER_HERE : ANSWER_NOBODY;
	}
	if (!v4 && eui64_mac(target, mac)) {
		if (find_station(ctx, cfg, network, mac))
			return ANSWER_NOBODY;
		return ctx->ifindex || (ctx->router && answers_for_routers(ctx)) ? ANSWER_HERE : ANSWER_THERE;
	}
	block = find_block(ctx, ctx->key.network, network, target, v4);
	if (!block || block->flags & BLOCK_LOCAL || find_node(ctx, cfg, &block->sid, FUNCTION_END_DT2M))
		return ANSWER_NOBODY;
	return ANSWER_THERE;
}

/* Who has the address? enum answer. A function of its own, which the verifier looks at once. */
__noinline int resolve(const union addr *target, struct mac *mac)
{
	struct context *ctx = context();
	struct config *cfg = ctx ? node(ctx->generation) : NULL;
	struct network *network = ctx ? find_network(ctx, ctx->key.network) : NULL;

	if (!target || !mac || !cfg || !network)
		return ANSWER_NOBODY;
	return find_owner(ctx, cfg, network, target, mac);
}

/* The gateway is everywhere. */
static __always_inline bool is_gateway(const struct port *port, const union addr *target)
{
	if (is_mapped_v4(target))
		return port->gateway4 && target->be32[3] == port->gateway4;
	return !is_unspecified(&port->gateway6) && same_addr(target, &port->gateway6);
}

/* A question of a container: answered here, or asked of the node that has the address. 1: the caller answers with mac. */
static __always_inline int ask(struct __sk_buff *skb, struct context *ctx, const struct config *cfg,
			       const struct port *port, const union addr *target, struct mac *mac)
{
	struct network *network = find_network(ctx, ctx->key.network);

	if (!network)
		return drop(skb, REASON_NO_NETWORK);
	ctx->network = ctx->key.network;
	ctx->line = network->line;
	if (is_gateway(port, target)) {
		*mac = cfg->gateway;
		return GO_ON;
	}
	switch (resolve(target, mac)) {
	case ANSWER_HERE:
		return GO_ON;
	case ANSWER_NOBODY:
		return drop(skb, REASON_NEIGHBOUR_UNKNOWN);
	case ANSWER_THERE:
		break;
	}
	if (!may_flood(BUDGET_FLOOD, ctx->origin, network))
		return drop(skb, REASON_FLOOD_LIMITED);
	ctx->opaque = 1;
	return go_to(skb, STAGE_DELIVER);
}

static __always_inline int answer_port(struct __sk_buff *skb, const struct context *ctx, const union addr *target,
				       const struct port *port)
{
	count(skb, traffic_index(ctx->traffic,
				 is_gateway(port, target) ? REASON_GATEWAY_ANSWERED : REASON_NEIGHBOUR_ANSWERED));
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline int port_arp(struct __sk_buff *skb, struct context *ctx, const struct port *port,
				    const struct config *cfg)
{
	struct arp_frame f;
	union addr target;
	struct mac mac = {};
	int verdict;

	if (bpf_skb_load_bytes(skb, 0, &f, sizeof(f)) || !is_plain_arp(&f.arp))
		return drop(skb, REASON_MALFORMED);
	if (__builtin_memcmp(f.arp.sender_mac, port->mac.u8, ETH_ALEN))
		return drop(skb, REASON_SPOOFED_MAC);
	/* 0 asks whether somebody has the address already. */
	if (f.arp.sender && !(port->flags & PORT_HAS_V4 && f.arp.sender == port->v4))
		return drop(skb, REASON_SPOOFED_ADDRESS);
	ctx->tos = 0;
	if (f.arp.operation != bpf_htons(ARP_REQUEST) || (port->flags & PORT_HAS_V4 && f.arp.target == port->v4))
		return bridge_opaque(skb, ctx); /* an answer, or an announcement */
	map_v4(&target, f.arp.target);
	verdict = ask(skb, ctx, cfg, port, &target, &mac);
	if (verdict != GO_ON)
		return verdict;
	answer_arp(&f, &mac);
	if (bpf_skb_store_bytes(skb, 0, &f, sizeof(f), 0))
		return drop(skb, REASON_ICMP_FAILED);
	return answer_port(skb, ctx, &target, port);
}

static __always_inline bool is_honest_nd(const struct nd_frame *f)
{
	return f->ip.hop_limit == ND_HOP_LIMIT && !f->code;
}

/* Source and checksum have been looked at, or are the asker's own affair. */
static __always_inline int port_nd(struct __sk_buff *skb, struct context *ctx, const struct port *port,
				   const struct config *cfg)
{
	struct nd_frame f = {};
	union addr target;
	struct mac mac = {};
	int verdict;

	if (bpf_skb_load_bytes(skb, 0, &f, ND_MIN_LEN) || !is_honest_nd(&f))
		return drop(skb, REASON_MALFORMED);
	__builtin_memcpy(&target, f.target, sizeof(target));
	if (is_own_v6(port, &target))
		return bridge_opaque(skb, ctx); /* duplicate address detection, an answer, or an announcement */
	if (f.type != ICMPV6_NEIGHBOUR_SOLICITATION)
		return drop(skb, REASON_SPOOFED_ADDRESS);
	verdict = ask(skb, ctx, cfg, port, &target, &mac);
	if (verdict != GO_ON)
		return verdict;
	advertise(&f, &mac, is_gateway(port, &target) ? ND_FLAG_ROUTER : 0);
	if (!put_advertisement(skb, &f))
		return drop(skb, REASON_ICMP_FAILED);
	return answer_port(skb, ctx, &target, port);
}

/* Send what came in from a node back to it: the inner frame is an answer already, whose payload has grown by so much. */
static __always_inline int answer_node(struct __sk_buff *skb, struct context *ctx, const struct config *cfg,
				       __s32 grown)
{
	__u32 ip = ctx->raw ? 0 : ETH_HLEN;
	struct nexthop *nexthop = find_nexthop(ctx);
	struct {
		__be16 payload;
		__u8 nexthdr;
		__u8 hop_limit;
		union addr src;
		union addr dst;
	} outer;

	if (!nexthop || !nexthop->ifindex)
		return drop(skb, REASON_NO_NEXTHOP);
	if (bpf_skb_load_bytes(skb, ip + offsetof(struct ipv6hdr, payload_len), &outer, sizeof(outer)))
		return drop(skb, REASON_MALFORMED);
	outer.payload = bpf_htons(bpf_ntohs(outer.payload) + grown);
	outer.hop_limit = OUTER_HOP_LIMIT;
	compose_sid(&outer.src, cfg->locator, cfg->locator_bits, FUNCTION_SOURCE, ctx->key.network);
	outer.dst = ctx->back;
	if (bpf_skb_store_bytes(skb, ip + offsetof(struct ipv6hdr, payload_len), &outer, sizeof(outer), 0) ||
	    (ctx->srh && bpf_skb_store_bytes(skb, ip + OUTER_LEN + offsetof(struct srh, segment), &ctx->back,
					     sizeof(ctx->back), 0)))
		return drop(skb, REASON_ICMP_FAILED);
	count(skb, traffic_index(ctx->traffic, REASON_NEIGHBOUR_ANSWERED));
	if (ctx->raw && !(nexthop->flags & NEXTHOP_RAW)) {
		__be16 type = bpf_htons(ETH_P_IPV6);

		if (bpf_skb_change_head(skb, ETH_HLEN, 0) ||
		    bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type, sizeof(type), 0))
			return drop(skb, REASON_ICMP_FAILED);
	}
	return transmit(skb, nexthop);
}

/* Is it an address of the node that sent this, or of the frame's own sender? Then it is announced. */
static __always_inline bool has(const struct context *ctx, const struct network *network, const union addr *addr)
{
	bool v4 = is_mapped_v4(addr);
	struct block *block;
	struct mac mac = {};

	if (!v4 && eui64_mac(addr, &mac))
		return same_mac(mac.u8, ctx->from.u8);
	block = find_block(ctx, ctx->key.network, network, addr, v4);
	return block && !(block->flags & BLOCK_LOCAL) && block->peer == ctx->peer;
}

static __always_inline int node_arp(struct __sk_buff *skb, struct context *ctx, const struct config *cfg,
				    const struct network *network)
{
	__u32 offset = frame_offset(ctx);
	union addr sender, target;
	struct arp_frame f;
	struct mac mac = {};

	if (bpf_skb_load_bytes(skb, offset, &f, sizeof(f)) || !is_plain_arp(&f.arp))
		return drop(skb, REASON_MALFORMED);
	if (__builtin_memcmp(f.arp.sender_mac, ctx->from.u8, ETH_ALEN))
		return drop(skb, REASON_SPOOFED_MAC);
	map_v4(&sender, f.arp.sender);
	map_v4(&target, f.arp.target);
	if (!speaks_for(ctx, network, &sender, true))
		return drop(skb, REASON_SPOOFED_ADDRESS);
	if (f.arp.operation != bpf_htons(ARP_REQUEST) || has(ctx, network, &target))
		return pass_frame(skb, ctx);
	if (resolve(&target, &mac) != ANSWER_HERE)
		return drop(skb, REASON_NEIGHBOUR_UNKNOWN);
	answer_arp(&f, &mac);
	if (bpf_skb_store_bytes(skb, offset, &f, sizeof(f), 0))
		return drop(skb, REASON_ICMP_FAILED);
	return answer_node(skb, ctx, cfg, 0);
}

/*
 * Make the packet so much longer, or shorter where that is negative, behind its outer header. The kernel does so in front, but not at the end, of what
 * is still marked as encapsulated.
 */
static __always_inline bool resize(struct __sk_buff *skb, const struct context *ctx, __s32 by)
{
	__u32 ip = ctx->raw ? 0 : ETH_HLEN;
	__u8 head[OUTER_LEN + SRH_LEN + GRE_LEN];

	return !bpf_skb_load_bytes(skb, ip, head, sizeof(head)) && !bpf_skb_adjust_room(skb, by, BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_store_bytes(skb, ip, head, sizeof(head), 0);
}

static __always_inline int node_nd(struct __sk_buff *skb, struct context *ctx, const struct config *cfg,
				   const struct network *network)
{
	__u32 offset = frame_offset(ctx);
	struct nd_frame f = {};
	union addr src, target;
	struct mac mac = {};
	__s32 grown;

	if (bpf_skb_load_bytes(skb, offset, &f, ND_MIN_LEN) || !is_honest_nd(&f))
		return drop(skb, REASON_MALFORMED);
	__builtin_memcpy(&src, &f.ip.saddr, sizeof(src));
	__builtin_memcpy(&target, f.target, sizeof(target));
	if (!speaks_for(ctx, network, &src, false))
		return drop(skb, REASON_SPOOFED_ADDRESS);
	if (f.type != ICMPV6_NEIGHBOUR_SOLICITATION)
		return speaks_for(ctx, network, &target, false) ? pass_frame(skb, ctx)
								: drop(skb, REASON_SPOOFED_ADDRESS);
	if (has(ctx, network, &target))
		return pass_frame(skb, ctx);
	if (resolve(&target, &mac) != ANSWER_HERE)
		return drop(skb, REASON_NEIGHBOUR_UNKNOWN);
	advertise(&f, &mac, 0);
	__builtin_memcpy(f.eth.h_dest, &ctx->from, ETH_ALEN); /* it alone asks, duplicate address detection too */
	grown = offset + sizeof(f) - skb->len;
	if (grown && !resize(skb, ctx, grown))
		return drop(skb, REASON_ICMP_FAILED);
	if (bpf_skb_store_bytes(skb, offset, &f, sizeof(f), 0))
		return drop(skb, REASON_ICMP_FAILED);
	return answer_node(skb, ctx, cfg, grown);
}

static __always_inline int take_question(struct __sk_buff *skb, struct context *ctx, const struct config *cfg)
{
	struct network *network = find_network(ctx, ctx->key.network);
	enum reason reason = admit(ctx->key.network);

	if (reason || !network)
		return drop(skb, reason);
	return ctx->type == bpf_htons(ETH_P_ARP) ? node_arp(skb, ctx, cfg, network) : node_nd(skb, ctx, cfg, network);
}

SEC("tc")
int stage_neighbour(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_NEIGHBOUR);
	struct config *cfg;
	struct port *port;

	if (!ctx)
		return TC_ACT_SHOT;
	cfg = node(ctx->generation);
	if (!cfg)
		return drop(skb, REASON_NO_NETWORK);
	if (ctx->underlay)
		return take_question(skb, ctx, cfg);
	port = find_port(ctx->origin, ctx->generation);
	if (!port)
		return drop(skb, REASON_NO_PORT);
	return ctx->type == bpf_htons(ETH_P_ARP) ? port_arp(skb, ctx, port, cfg) : port_nd(skb, ctx, port, cfg);
}
