/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Uplink: the entry at an interface of the underlay. Takes what is sent to this node's locator, and
 * nothing else. It is never passed on to the stack: the SID is ours, or the packet is dropped with a reason. What belongs to a
 * known flow goes to its container at once. Next: route.
 *
 * An uplink may have no Ethernet header (WireGuard): then l2 is 0 and one is made before delivery.
 */
#pragma once

#include "classify.h"

/* What else of the outer packet counts, read before anything is moved. */
struct outer {
	__u8 nexthdr; /* of the payload */
	__u8 ecn;
	bool srh;
};

static __always_inline enum reason parse_srh(struct __sk_buff *skb, struct outer *outer, __u32 l2)
{
	struct srh *srh = packet_start(skb) + l2 + OUTER_LEN;

	if ((void *)(srh + 1) > packet_end(skb))
		return REASON_MALFORMED;
	if (srh->type != SRH_TYPE || srh->len != 2)
		return REASON_ROUTING_HEADER;
	if (srh->segments_left)
		return REASON_SEGMENTS_LEFT;
	outer->nexthdr = srh->nexthdr;
	outer->srh = true;
	return REASON_NONE;
}

/* The network that the sender is in: the outer source says, or the topology says it of a router. */
static __always_inline __u32 network_of(const struct context *ctx, const struct config *cfg)
{
	struct sid src = parse_sid(&ctx->source, cfg->locator_bits);
	struct peer *peer;

	if (src.function == FUNCTION_SOURCE)
		return src.network;
	peer = find_peer(ctx, &ctx->source, cfg);
	return peer ? peer->network : 0;
}

/* Is the payload an Ethernet frame? */
static __always_inline bool is_frame(__u8 nexthdr)
{
	return nexthdr == IPPROTO_ETHERNET_ || nexthdr == IPPROTO_GRE;
}

/* Is it one that the function of the SID takes? */
static __always_inline enum reason check_payload(__u16 function, __u8 nexthdr)
{
	switch (function) {
	case FUNCTION_END_DT46:
		return nexthdr == IPPROTO_IPIP || nexthdr == IPPROTO_IPV6 ? REASON_NONE : REASON_WRONG_PAYLOAD;
	case FUNCTION_END_DT2U:
	case FUNCTION_END_DT2M:
		return is_frame(nexthdr) ? REASON_NONE : REASON_WRONG_PAYLOAD;
	}
	return REASON_UNKNOWN_FUNCTION;
}

/* Where answers go: what the topology says of a router, or what follows from the node's locator. */
static __always_inline void find_way_back(struct context *ctx, const struct config *cfg, const struct peer *peer,
					  bool frame)
{
	ctx->back = frame ? peer->sid_l2 : ctx->v4 ? peer->sid4 : peer->sid6;
	if (is_unspecified(&ctx->back))
		compose_sid(&ctx->back, first_half(&ctx->source) & cfg->locator_mask, cfg->locator_bits,
			    frame ? FUNCTION_END_DT2U : FUNCTION_END_DT46, ctx->key.network);
}

static __always_inline enum reason check_ends(struct context *ctx, const struct config *cfg, __u8 nexthdr)
{
	struct sid sid = parse_sid(&ctx->sid, cfg->locator_bits);
	struct peer *peer = find_peer(ctx, &ctx->source, cfg);
	enum reason reason;

	if (!peer) {
		ctx->key.network = 0; /* whoever it is does not say what is counted where */
		return REASON_UNKNOWN_SOURCE;
	}
	ctx->peer = peer->index;
	reason = check_payload(sid.function, nexthdr);
	if (reason == REASON_UNKNOWN_FUNCTION)
		return reason;
	if (sid.tail)
		return REASON_SID_TAIL;
	if (reason)
		return reason;
	ctx->network = sid.network;
	if (!ctx->key.network && parse_sid(&ctx->source, cfg->locator_bits).function != FUNCTION_SOURCE)
		return REASON_UNKNOWN_SOURCE;
	if (peer->network && peer->network != ctx->key.network)
		return REASON_NO_PEERING;
	if (ctx->key.network == NETWORK_OUTSIDE) /* who has it come in says which network it is in */
		return REASON_NO_EXTERNAL;
	if (is_frame(nexthdr) && ctx->network != ctx->key.network) /* frames stay in their network */
		return REASON_NO_PEERING;
	find_way_back(ctx, cfg, peer, is_frame(nexthdr));
	return REASON_NONE;
}

/*
 * Who sent it, and do SID, source and payload fit together? The context learns of the peer and the way back. 0, or the reason why not. A function
 * of its own, which the verifier looks at once.
 */
__noinline int check_outer(__u32 nexthdr)
{
	struct context *ctx = context();
	struct config *cfg = ctx ? node(ctx->generation) : NULL;

	return cfg ? check_ends(ctx, cfg, nexthdr) : REASON_UNKNOWN_SOURCE;
}

/*
 * The inner class with what the outer header says about congestion, RFC 6040 4.2. Only ECT(1) and CE
 * change it. Negative: to be dropped, as the flow could not tell that it was congested.
 */
static __always_inline int combine_ecn(__u8 class, __u8 outer)
{
	if (!(class & ECN_MASK))
		return outer == ECN_CE ? -1 : class;
	if (outer == ECN_CE)
		return class | ECN_CE;
	if ((class & ECN_MASK) == ECN_ECT0)
		return (class & ~ECN_MASK) | ECN_ECT1;
	return class;
}

static __always_inline bool carry_congestion_v4(struct iphdr *ip, __u8 outer)
{
	int class = combine_ecn(ip->tos, outer);

	if (class < 0)
		return false;
	set_tos(ip, class);
	return true;
}

static __always_inline bool carry_congestion_v6(struct ipv6hdr *ip, __u8 outer)
{
	int class = combine_ecn(traffic_class(ip), outer);

	if (class < 0)
		return false;
	set_traffic_class(ip, class);
	return true;
}

/* Carry congestion over to the inner header, at offset. */
static __always_inline bool carry_congestion(struct __sk_buff *skb, bool v4, __u32 offset, __u8 outer)
{
	struct iphdr *ip = packet_start(skb) + offset;
	struct ipv6hdr *ip6 = (void *)ip;

	if (v4)
		return (void *)(ip + 1) <= packet_end(skb) && carry_congestion_v4(ip, outer);
	return (void *)(ip6 + 1) <= packet_end(skb) && carry_congestion_v6(ip6, outer);
}

/* Read the inner packet of the context's family where it lies, at offset; the context gets its flow. ecn: that of the outer header. */
static __always_inline enum reason parse_inner(struct __sk_buff *skb, struct context *ctx, __u32 offset, __u8 ecn)
{
	bool v4 = ctx->v4;

	if (v4 ? !read_v4(skb, ctx, offset) : !read_v6(skb, ctx, offset))
		return REASON_MALFORMED;
	if (ecn & 1 && !carry_congestion(skb, v4, offset, ecn)) /* ECT(1) or CE */
		return REASON_ECN_CONGESTION;
	return parse_flow(skb, offset, true);
}

static __always_inline enum reason parse_payload(struct __sk_buff *skb, struct context *ctx, const struct outer *outer,
						 __u32 offset)
{
	ctx->v4 = outer->nexthdr == IPPROTO_IPIP;
	if (!ctx->v4 && outer->nexthdr != IPPROTO_IPV6)
		return REASON_WRONG_PAYLOAD;
	return parse_inner(skb, ctx, offset, outer->ecn);
}

/*
 * A flow says which outer header its packets have. Its first answer may come with a source that was not seen
 * yet: then it is looked at as that of a new flow would be, and remembered.
 */
static __always_inline bool fits(const struct context *ctx, struct flow *flow, __u8 nexthdr)
{
	if (!same_addr(&ctx->sid, &flow->sid))
		return false;
	if (same_addr(&ctx->source, &flow->source))
		return true;
	if (check_outer(nexthdr))
		return false;
	flow->source = ctx->source;
	return true;
}

static __always_inline int take_new(struct __sk_buff *skb, struct context *ctx, const struct flow *flow, __u8 nexthdr,
				    bool l2)
{
	enum reason reason = check_outer(nexthdr);

	if (reason)
		return drop(skb, reason);
	if (flow) {
		union addr sid = ctx->sid;
		__u32 network = ctx->network;

		recall(ctx, flow);
		ctx->sid = sid;
		/* What another node has leave here goes to no network of that number in the end. */
		if (network != flow->network && flow->way == WAY_CONTAINER && !ctx->outside.translated)
			ctx->known = 0;
		ctx->network = network;
		return decide(skb, ctx, l2);
	}
	reason = check_opener(ctx);
	return reason ? drop(skb, reason) : decide(skb, ctx, l2);
}

/* The packet has a key: it goes where its flow goes, or is decided by the stages. l2: a literal, it is in a frame. */
static __always_inline int take_flow(struct __sk_buff *skb, struct context *ctx, __u8 nexthdr, bool l2)
{
	struct flow *flow = find_flow(&ctx->key);

	if (flow && (!(flow->flags & FLOW_UNDERLAY) || reopens(flow, ctx)))
		flow = NULL;
	if (flow && has_ended(flow))
		return drop(skb, check_outer(nexthdr) ?: REASON_NO_FLOW);
	if (!flow || flow->generation != ctx->generation || !carries(flow, ctx, l2) || !fits(ctx, flow, nexthdr))
		return take_new(skb, ctx, flow, nexthdr, l2);
	track(flow, ctx);
	ctx->ifindex = flow->ifindex;
	ctx->direct = !!(flow->flags & FLOW_DIRECT);
	if (l2)
		return deliver_frame(skb, ctx, flow->counter);
	if (flow->way != WAY_CONTAINER || flow->flags & FLOW_TRANSLATED)
		return go_to(skb, STAGE_EGRESS);
	ctx->mac = flow->mac;
	return deliver_decapsulated(skb, ctx, flow->counter);
}

static __always_inline int take(struct __sk_buff *skb, struct context *ctx, const struct config *cfg,
				struct outer *outer, __u32 l2)
{
	enum reason inner, reason = REASON_NONE;

	if (outer->nexthdr == IPPROTO_ICMPV6)
		return drop(skb, REASON_UNDERLAY_ICMP);
	if (outer->nexthdr == NEXTHDR_ROUTING)
		reason = parse_srh(skb, outer, l2);
	if (reason)
		return drop(skb, reason);
	ctx->srh = outer->srh;
	ctx->key.network = network_of(ctx, cfg);
	if (is_frame(outer->nexthdr)) {
		ctx->shim = outer->nexthdr == IPPROTO_GRE;
		ctx->ecn = outer->ecn;
		return go_to(skb, STAGE_FRAME);
	}
	inner = outer->srh ? parse_payload(skb, ctx, outer, l2 + OUTER_LEN + SRH_LEN)
			   : parse_payload(skb, ctx, outer, l2 + OUTER_LEN);
	if (inner) {
		/* What is wrong with the outer header comes first. */
		reason = check_outer(outer->nexthdr);
		return drop(skb, reason ?: inner);
	}
	return take_flow(skb, ctx, outer->nexthdr, false);
}

/* What is not for the overlay may come from the outside to a container, or be nobody's business here. l2: a literal. */
static __always_inline int pass_by(struct __sk_buff *skb, const struct config *cfg, __u32 l2)
{
	if (cfg->outside)
		bpf_tail_call(skb, &stages, l2 ? STAGE_OUTER : STAGE_OUTER_RAW);
	return PASS;
}

static __always_inline bool is_ours(const union addr *addr, const struct config *cfg)
{
	return (first_half(addr) & cfg->locator_mask) == cfg->locator;
}

/* The outer destination. False: the packet is not IPv6. */
static __always_inline bool read_destination(struct __sk_buff *skb, union addr *dst, __u32 l2)
{
	struct ipv6hdr *ip;

	if (skb->protocol != bpf_htons(ETH_P_IPV6))
		return false;
	pull(skb, l2 + OUTER_LEN + SRH_LEN + IP_HEADER_MAX + 20);
	ip = packet_start(skb) + l2;
	if ((void *)(ip + 1) > packet_end(skb))
		return false;
	__builtin_memcpy(dst, &ip->daddr, sizeof(*dst));
	return true;
}

static __always_inline int from_underlay(struct __sk_buff *skb, __u32 l2)
{
	struct outer outer = {};
	struct context *ctx;
	struct config *cfg;
	struct ipv6hdr *ip;
	union addr dst;

	/* A tagged frame belongs to a VLAN interface above this one, and others are only overheard. */
	if (skb->vlan_present || skb->pkt_type != PACKET_HOST)
		return PASS;
	cfg = node(active_generation());
	if (!cfg || !cfg->locator_mask)
		return PASS;
	if (!read_destination(skb, &dst, l2) || !is_ours(&dst, cfg))
		return pass_by(skb, cfg, l2);
	ip = packet_start(skb) + l2;
	if ((void *)(ip + 1) > packet_end(skb))
		return PASS;
	outer.nexthdr = ip->nexthdr;
	outer.ecn = traffic_class(ip) & ECN_MASK;
	ctx = start(skb);
	cfg = ctx ? node(ctx->generation) : NULL;
	if (!cfg)
		return TC_ACT_SHOT;
	ctx->raw = !l2;
	ctx->underlay = 1;
	ctx->sid = dst;
	__builtin_memcpy(&ctx->source, &ip->saddr, sizeof(ctx->source));
	return take(skb, ctx, cfg, &outer, l2);
}

SEC("tc")
int uplink(struct __sk_buff *skb)
{
	return from_underlay(skb, ETH_HLEN);
}

SEC("tc")
int uplink_raw(struct __sk_buff *skb)
{
	return from_underlay(skb, 0);
}
