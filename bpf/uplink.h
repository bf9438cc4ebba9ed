/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Uplink: the entry at an interface of the underlay. Takes what is sent to this node's locator, and
 * nothing else. It is never passed on to the stack: the SID is ours, or the packet is dropped with a reason. Next: deliver.
 *
 * An uplink may have no Ethernet header (WireGuard): then l2 is 0 and one is made before delivery.
 */
#pragma once

#include "lib/packet.h"
#include "lib/srv6.h"

/* The outer packet, read before anything is moved. */
struct outer {
	union addr src;
	union addr dst;
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

/* Who sent it, and do SID, source and payload fit together? */
static __always_inline enum reason check_outer(const struct outer *outer, const struct config *cfg, __u32 *network)
{
	__be64 locator = first_half(&outer->src) & cfg->locator_mask;
	struct sid sid = parse_sid(&outer->dst, cfg->locator_bits);
	struct sid src = parse_sid(&outer->src, cfg->locator_bits);
	struct peer *peer = bpf_map_lookup_elem(&peers, &locator);

	if (!peer)
		return REASON_UNKNOWN_SOURCE;
	if (sid.function != FUNCTION_END_DT46)
		return REASON_UNKNOWN_FUNCTION;
	if (sid.tail)
		return REASON_SID_TAIL;
	if (outer->nexthdr != IPPROTO_IPIP && outer->nexthdr != IPPROTO_IPV6)
		return REASON_WRONG_PAYLOAD;
	*network = sid.network;
	if (peer->network)
		return peer->network == sid.network ? REASON_NONE : REASON_NETWORK_MISMATCH;
	if (src.function != FUNCTION_SOURCE)
		return REASON_UNKNOWN_SOURCE;
	return src.network == sid.network ? REASON_NONE : REASON_NETWORK_MISMATCH;
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

/* Read the inner packet where it lies, at offset; the context gets its destination. */
static __always_inline enum reason parse_inner_v4(struct __sk_buff *skb, struct context *ctx, __u32 offset, __u8 ecn)
{
	struct iphdr *ip = packet_start(skb) + offset;
	__u32 total;

	if ((void *)(ip + 1) > packet_end(skb) || ip->version != 4 || ip->ihl < 5)
		return REASON_MALFORMED;
	total = bpf_ntohs(ip->tot_len);
	if (!skb->gso_size && (total < ip->ihl * 4u || total > skb->len - offset))
		return REASON_MALFORMED;
	map_v4(&ctx->dst, ip->daddr);
	if (ecn & 1 && !carry_congestion_v4(ip, ecn)) /* ECT(1) or CE */
		return REASON_ECN_CONGESTION;
	return REASON_NONE;
}

static __always_inline enum reason parse_inner_v6(struct __sk_buff *skb, struct context *ctx, __u32 offset, __u8 ecn)
{
	struct ipv6hdr *ip = packet_start(skb) + offset;

	if ((void *)(ip + 1) > packet_end(skb) || ip->version != 6)
		return REASON_MALFORMED;
	if (!skb->gso_size && bpf_ntohs(ip->payload_len) + sizeof(*ip) > skb->len - offset)
		return REASON_MALFORMED;
	__builtin_memcpy(&ctx->dst, &ip->daddr, sizeof(ctx->dst));
	if (is_mapped_v4(&ctx->dst))
		return REASON_MALFORMED;
	if (ecn & 1 && !carry_congestion_v6(ip, ecn))
		return REASON_ECN_CONGESTION;
	return REASON_NONE;
}

static __always_inline enum reason parse_inner(struct __sk_buff *skb, struct context *ctx, const struct outer *outer,
					       __u32 offset)
{
	ctx->v4 = outer->nexthdr == IPPROTO_IPIP;
	if (ctx->v4)
		return parse_inner_v4(skb, ctx, offset, outer->ecn);
	return parse_inner_v6(skb, ctx, offset, outer->ecn);
}

/* Which container is it for? */
static __always_inline enum reason find_endpoint(struct context *ctx)
{
	struct endpoint_key key = { .network = ctx->network, .addr = ctx->dst };
	struct endpoint *endpoint = bpf_map_lookup_elem(&endpoints, &key);

	if (!endpoint)
		return bpf_map_lookup_elem(&networks, &key.network) ? REASON_NO_ENDPOINT : REASON_UNKNOWN_NETWORK;
	ctx->ifindex = endpoint->ifindex;
	ctx->mac = endpoint->mac;
	return REASON_NONE;
}

static __always_inline int take(struct __sk_buff *skb, const struct config *cfg, struct outer *outer, __u32 l2)
{
	struct context *ctx = context();
	enum reason reason = REASON_NONE;
	long err;

	if (!ctx)
		return TC_ACT_SHOT;
	ctx->raw = !l2;
	if (outer->nexthdr == IPPROTO_ICMPV6)
		return drop(skb, REASON_UNDERLAY_ICMP);
	if (outer->nexthdr == NEXTHDR_ROUTING)
		reason = parse_srh(skb, outer, l2);
	if (!reason)
		reason = check_outer(outer, cfg, &ctx->network);
	if (!reason)
		reason = outer->srh ? parse_inner(skb, ctx, outer, l2 + OUTER_LEN + SRH_LEN)
				    : parse_inner(skb, ctx, outer, l2 + OUTER_LEN);
	if (!reason)
		reason = find_endpoint(ctx);
	if (reason)
		return drop(skb, reason);
	err = outer->srh ? decapsulate(skb, ctx->v4, true) : decapsulate(skb, ctx->v4, false);
	if (!err && !l2)
		err = bpf_skb_change_head(skb, ETH_HLEN, 0);
	if (err)
		return drop(skb, REASON_DECAP_FAILED);
	return go_to(skb, STAGE_DELIVER_DECAPSULATED);
}

static __always_inline int from_underlay(struct __sk_buff *skb, __u32 l2)
{
	struct config *cfg = node();
	struct outer outer = {};
	struct ipv6hdr *ip;

	/* A tagged frame belongs to a VLAN interface above this one, and others are only overheard. */
	if (!cfg || skb->vlan_present || skb->pkt_type != PACKET_HOST || skb->protocol != bpf_htons(ETH_P_IPV6))
		return PASS;
	pull(skb, l2 + OUTER_LEN + SRH_LEN + sizeof(struct ipv6hdr));
	ip = packet_start(skb) + l2;
	if ((void *)(ip + 1) > packet_end(skb))
		return PASS;
	__builtin_memcpy(&outer.dst, &ip->daddr, sizeof(outer.dst));
	if ((first_half(&outer.dst) & cfg->locator_mask) != cfg->locator || !cfg->locator_mask)
		return PASS;
	__builtin_memcpy(&outer.src, &ip->saddr, sizeof(outer.src));
	outer.nexthdr = ip->nexthdr;
	outer.ecn = traffic_class(ip) & ECN_MASK;
	return take(skb, cfg, &outer, l2);
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
