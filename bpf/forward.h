/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Forward: packets that are routed go to a container here, encapsulated to another node, out of the overlay, or to the host. Next: error. */
#pragma once

#include "lib/conntrack.h"
#include "lib/fib.h"
#include "lib/translate.h"

#define ICMP_FRAGMENTATION_NEEDED_V4 4

/* The agent vouches every few seconds; after this long without, its MAC addresses may be stale. */
#define HEARTBEAT_LIMIT_NS (120ULL * 1000000000)

/* Where the TCP or UDP header of a GSO packet is. False: it is not there. */
static __always_inline bool find_transport(struct __sk_buff *skb, struct context *ctx)
{
	struct ethhdr *eth = packet_start(skb);
	struct iphdr *ip = (void *)(eth + 1);

	if ((void *)(ip + 1) > packet_end(skb))
		return false;
	if (!ctx->v4) /* the next header is where IPv4 has the end of its identification */
		return find_upper(skb, ETH_HLEN + sizeof(struct ipv6hdr),
				  ((__u8 *)ip)[offsetof(struct ipv6hdr, nexthdr)]);
	ctx->upper.offset = ETH_HLEN + ip->ihl * 4;
	ctx->upper.protocol = ip->protocol;
	return true;
}

/* Bytes of the largest IP packet on the wire: for a GSO packet, of one of its segments. */
static __always_inline __u32 packet_size(struct __sk_buff *skb, struct context *ctx)
{
	const struct upper *upper = &ctx->upper;
	__u8 offset;

	if (!skb->gso_size)
		return ctx->l3_len;
	if (!find_transport(skb, ctx))
		return ctx->l3_len;
	if (upper->protocol == IPPROTO_UDP)
		return upper->offset - ETH_HLEN + 8 + skb->gso_size;
	if (bpf_skb_load_bytes(skb, upper->offset + 12, &offset, 1))
		return ctx->l3_len;
	return upper->offset - ETH_HLEN + (offset >> 4) * 4 + skb->gso_size;
}

static __always_inline int too_big(struct __sk_buff *skb, struct context *ctx, __u32 mtu)
{
	if (ctx->v4)
		return refuse(skb, ctx, REASON_TOO_BIG, ICMP_UNREACHABLE_V4, ICMP_FRAGMENTATION_NEEDED_V4, mtu);
	return refuse(skb, ctx, REASON_TOO_BIG, ICMP_PACKET_TOO_BIG_V6, 0, mtu);
}

/* One hop less, whichever way the packet goes on. False: the header is not there. */
static __always_inline bool take_hop(struct __sk_buff *skb, const struct context *ctx)
{
	struct ethhdr *eth = packet_start(skb);

	if (ctx->v4) {
		struct iphdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > packet_end(skb))
			return false;
		decrement_ttl(ip);
		return true;
	}

	struct ipv6hdr *ip6 = (void *)(eth + 1);

	if ((void *)(ip6 + 1) > packet_end(skb))
		return false;
	ip6->hop_limit--;
	if (ctx->outside.side) /* the interface may have summed all of it: COMPLETE */
		bpf_csum_update(skb, bpf_htons(0xfffe));
	return true;
}

/* Straight to the container's own end of its veth; a device of the host has no other end that is known. */
static __always_inline int send_in(const struct context *ctx)
{
	return ctx->direct ? bpf_redirect(ctx->ifindex, 0) : bpf_redirect_peer(ctx->ifindex, 0);
}

/* The Ethernet header of a packet that goes on as it is. False: there is none. */
static __always_inline bool address_frame(struct __sk_buff *skb, const struct context *ctx, const struct mac *to,
					  const struct mac *from)
{
	struct ethhdr *eth = packet_start(skb);

	if ((void *)(eth + 1) > packet_end(skb))
		return false;
	__builtin_memcpy(eth->h_dest, to, ETH_ALEN);
	__builtin_memcpy(eth->h_source, from, ETH_ALEN);
	eth->h_proto = ctx->v4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	return true;
}

/* To the container. The frame gets the addresses of a hop over the gateway. */
static __always_inline int hand_over(struct __sk_buff *skb, const struct context *ctx, __u32 counter)
{
	struct config *cfg = node(ctx->generation);

	if (!cfg || !address_frame(skb, ctx, &ctx->mac, &cfg->gateway))
		return drop(skb, REASON_MALFORMED);
	count(skb, counter);
	/* The gateway's MAC is the bridge's, not the port's; before 6.16 the container's stack would refuse. */
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return send_in(ctx);
}

/* Are the MAC addresses of the nexthop known, and vouched for lately? */
static __always_inline bool is_fresh(const struct nexthop *nexthop)
{
	__u32 zero = 0;
	__u64 *stamp = bpf_map_lookup_elem(&heartbeat, &zero);

	return nexthop->flags & NEXTHOP_MAC && stamp &&
	       (__s64)(bpf_ktime_get_coarse_ns() - *stamp) < (__s64)HEARTBEAT_LIMIT_NS;
}

/* Out of the uplink to the next hop: the packet has its outer header, and a place for the Ethernet header. */
static __always_inline int transmit(struct __sk_buff *skb, const struct nexthop *nexthop)
{
	struct ethhdr *eth;

	if (nexthop->flags & NEXTHOP_RAW)
		return bpf_redirect(nexthop->ifindex, 0);
	if (!is_fresh(nexthop))
		return bpf_redirect_neigh(nexthop->ifindex, NULL, 0, 0);
	eth = packet_start(skb);
	if ((void *)(eth + 1) > packet_end(skb))
		return drop(skb, REASON_ENCAP_FAILED);
	__builtin_memcpy(eth->h_dest, &nexthop->dst, ETH_ALEN);
	__builtin_memcpy(eth->h_source, &nexthop->src, ETH_ALEN);
	return bpf_redirect(nexthop->ifindex, 0);
}

/* Errors and later fragments are part of what others opened, and a reset of nothing known opens nothing. */
static __always_inline bool opens_nothing(const struct context *ctx)
{
	return ctx->opaque || ctx->kind == PACKET_ICMP_ERROR || ctx->kind == PACKET_LATER_FRAGMENT ||
	       (!ctx->known && ctx->key.protocol == IPPROTO_TCP && ctx->tcp & TCP_RST);
}

/* Write the decision down, where the stages have just made it: fresh. */
static __always_inline enum reason settle(struct __sk_buff *skb, const struct context *ctx, bool fresh)
{
	if (!fresh)
		return REASON_NONE;
	if (!opens_nothing(ctx))
		return commit(skb);
	if (explaining && ctx->opaque)
		tell(skb, way_on(ctx), VERDICT_PASSED);
	return REASON_NONE;
}

/* Does this node forward the packet for the first time? What the host itself sends, or another node has forwarded, loses no hop. */
static __always_inline bool loses_hop(const struct context *ctx)
{
	return !ctx->underlay && ctx->outside.side <= OUTER_OUTSIDE;
}

/* What is still to be done to a packet that is routed. */
static __always_inline enum reason leave(struct __sk_buff *skb, const struct context *ctx, bool fresh)
{
	enum reason reason = settle(skb, ctx, fresh);

	if (reason)
		return reason;
	if (ctx->outside.translated && ctx->kind != PACKET_ICMP_ERROR && translate(skb))
		return REASON_TRANSLATION_FAILED;
	return !loses_hop(ctx) || take_hop(skb, ctx) ? REASON_NONE : REASON_MALFORMED;
}

static __always_inline int deliver_remote(struct __sk_buff *skb, struct context *ctx, __u32 counter, bool fresh)
{
	struct config *cfg = node(ctx->generation);
	struct nexthop *nexthop = find_nexthop(ctx);
	enum reason reason;

	if (!cfg || !nexthop || !nexthop->ifindex)
		return drop(skb, REASON_NO_NEXTHOP);
	ctx->mtu = nexthop->mtu - OUTER_LEN - (cfg->srh ? SRH_LEN : 0);
	if (packet_size(skb, ctx) > ctx->mtu)
		return too_big(skb, ctx, ctx->mtu);
	reason = leave(skb, ctx, fresh);
	if (reason)
		return drop(skb, reason);
	reason = cfg->srh ? encapsulate(skb, ctx, true) : encapsulate(skb, ctx, false);
	if (reason)
		return drop(skb, reason);
	count(skb, counter);
	return transmit(skb, nexthop);
}

/*
 * Does the container take so large a packet? Its own end of a veth takes any. Who is outside may send what his wire carries, and the host to itself
 * what lo does: they have to be told of the encapsulation only where there is one, and many would not listen to that about datagrams that
 * may be fragmented.
 */
static __always_inline bool fits_local(struct __sk_buff *skb, struct context *ctx)
{
	return (ctx->outside.side && !ctx->direct) || packet_size(skb, ctx) <= ctx->mtu;
}

static __always_inline int deliver_local(struct __sk_buff *skb, struct context *ctx, __u32 counter, bool fresh)
{
	enum reason reason;

	if (!fits_local(skb, ctx))
		return too_big(skb, ctx, ctx->mtu);
	reason = leave(skb, ctx, fresh);
	if (reason)
		return drop(skb, reason);
	return hand_over(skb, ctx, counter);
}

/* To a next hop whose MAC address the kernel has to find first, or to look after. */
static __always_inline int redirect_to_gateway(const struct context *ctx)
{
	struct bpf_redir_neigh to = { .nh_family = AF_INET6_ };

	if (is_mapped_v4(&ctx->gateway)) {
		to.nh_family = AF_INET_;
		to.ipv4_nh = ctx->gateway.be32[3];
	} else {
		__builtin_memcpy(to.ipv6_nh, &ctx->gateway, sizeof(ctx->gateway));
	}
	return bpf_redirect_neigh(ctx->out, &to, sizeof(to), 0);
}

/* Out of the overlay, the way that has been found. renew: the kernel is to look after its neighbour. */
static __always_inline int send_out(struct __sk_buff *skb, struct context *ctx, __u32 counter, bool fresh, bool renew)
{
	enum reason reason = leave(skb, ctx, fresh);

	if (reason)
		return drop(skb, reason);
	if (!address_frame(skb, ctx, &ctx->out_dst, &ctx->out_src))
		return drop(skb, REASON_MALFORMED);
	count(skb, counter);
	if (ctx->out_flags & EGRESS_RAW)
		return bpf_redirect(ctx->out, 0);
	return renew || !ctx->outside.neighbour ? redirect_to_gateway(ctx) : bpf_redirect(ctx->out, 0);
}

/* To the host's stack: in at lc-host, or, as an answer to what the host sent to itself, at lo. */
static __always_inline int deliver_host(struct __sk_buff *skb, struct context *ctx, __u32 counter, bool fresh)
{
	struct config *cfg = node(ctx->generation);
	struct host *host = this_node();
	enum reason reason = leave(skb, ctx, fresh);
	struct mac nobody = {};

	if (reason)
		return drop(skb, reason);
	if (!cfg || !host || !host->peer)
		return drop(skb, REASON_NO_EGRESS);
	if (ctx->outside.way == WAY_LOOPBACK) {
		if (!address_frame(skb, ctx, &nobody, &nobody))
			return drop(skb, REASON_MALFORMED);
		count(skb, counter);
		return bpf_redirect(host->loopback, BPF_F_INGRESS);
	}
	if (!address_frame(skb, ctx, &host->mac, &cfg->gateway))
		return drop(skb, REASON_MALFORMED);
	count(skb, counter);
	return bpf_redirect(host->peer, 0);
}

/* A packet of a known flow that leaves the overlay. Once a tick the host's routes are asked again. */
static __always_inline int send_flow_out(struct __sk_buff *skb, struct context *ctx, const struct flow *flow)
{
	if (flow->looked != tick())
		return go_to(skb, STAGE_EGRESS);
	if (packet_size(skb, ctx) > flow->mtu)
		return too_big(skb, ctx, flow->mtu);
	ctx->out = flow->ifindex;
	ctx->out_dst = flow->mac;
	ctx->out_src = flow->from;
	ctx->out_flags = flow->flags & FLOW_RAW ? EGRESS_RAW : 0;
	ctx->outside.neighbour = 1;
	return send_out(skb, ctx, flow->counter, false, false);
}

/* A packet of a known flow, which has an Ethernet header and no outer one, goes the flow's way. */
static __always_inline int send_way(struct __sk_buff *skb, struct context *ctx, const struct flow *flow)
{
	switch (flow->way) {
	case WAY_NODE:
		ctx->peer = flow->peer;
		ctx->sid = flow->sid;
		if (!is_unspecified(&flow->source))
			ctx->source = flow->source;
		return deliver_remote(skb, ctx, flow->counter, false);
	case WAY_CONTAINER:
		ctx->mac = flow->mac;
		ctx->direct = !!(flow->flags & FLOW_DIRECT);
		return deliver_local(skb, ctx, flow->counter, false);
	case WAY_OUT:
		return send_flow_out(skb, ctx, flow);
	}
	return deliver_host(skb, ctx, flow->counter, false);
}

/* What the flow says of its packets. */
static __always_inline void take_over(struct context *ctx, const struct flow *flow)
{
	ctx->network = flow->network;
	ctx->line = flow->line;
	ctx->ifindex = flow->ifindex;
	ctx->mtu = flow->mtu;
	ctx->outside.way = flow->way;
	if (!(flow->flags & FLOW_TRANSLATED))
		return;
	ctx->outside.translated = 1;
	ctx->rewrite = flow->to;
}

/* An ICMP error about a flow that is translated, in which what it quotes is to be rewritten too. */
static __always_inline bool is_to_be_related(const struct context *ctx)
{
	return ctx->outside.translated && ctx->kind == PACKET_ICMP_ERROR && !ctx->outside.related;
}

/* A packet of a known flow that did not come from the underlay. */
static __always_inline int send_flow(struct __sk_buff *skb, struct context *ctx, const struct flow *flow)
{
	take_over(ctx, flow);
	if (is_to_be_related(ctx))
		return go_to(skb, STAGE_RELATED);
	return send_way(skb, ctx, flow);
}

/*
 * What came off the underlay was routed, and lost its hop, where it came in. The outer header comes off here, so that whatever
 * is refused before is shown as it came.
 */
static __always_inline enum reason unwrap(struct __sk_buff *skb, struct context *ctx)
{
	long err = ctx->srh ? decapsulate(skb, ctx->v4, true) : decapsulate(skb, ctx->v4, false);

	if (!err && ctx->raw)
		err = bpf_skb_change_head(skb, ETH_HLEN, 0);
	ctx->outside.bare = 1;
	return err ? REASON_DECAP_FAILED : REASON_NONE;
}

static __always_inline int deliver_decapsulated(struct __sk_buff *skb, struct context *ctx, __u32 counter)
{
	enum reason reason = unwrap(skb, ctx);

	return reason ? drop(skb, reason) : hand_over(skb, ctx, counter);
}
