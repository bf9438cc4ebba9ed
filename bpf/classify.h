/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Classify: which container sends, and may it? The context is filled, and what belongs to a known flow sent on. Here is the entry
 * at a container's veth in an L3 network; that of L2 networks is in bridge.h. Next: gateway (for the gateway itself), route, error.
 */
#pragma once

#include "lib/conntrack.h"
#include "lib/neighbour.h"
#include "deliver.h"

#define ICMPV6_ROUTER_ADVERTISEMENT 134

#define DHCP_SERVER_PORT 67
#define DHCP_CLIENT_PORT 68
#define DHCPV6_SERVER_PORT 547
#define DHCPV6_CLIENT_PORT 546

#define IP_HEADER_MAX 60 /* IPv4 with options */

#define GO_ON (-2) /* no verdict yet */

/* Does a container act as a DHCP server? ports: source and destination, as on the wire. */
static __always_inline bool is_dhcp_server(__u32 ports)
{
	return ports == bpf_htonl(DHCP_SERVER_PORT << 16 | DHCP_CLIENT_PORT) ||
	       ports == bpf_htonl(DHCPV6_SERVER_PORT << 16 | DHCPV6_CLIENT_PORT);
}

/* Why a frame may not go further by its destination MAC; NONE for the gateway's. */
static __always_inline enum reason check_destination_mac(struct __sk_buff *skb, const struct config *cfg)
{
	const struct ethhdr *eth = packet_start(skb);

	if ((void *)(eth + 1) > packet_end(skb))
		return REASON_MALFORMED;
	if (eth->h_dest[0] & 1)
		return REASON_MULTICAST;
	if (!same_mac(eth->h_dest, cfg->gateway.u8))
		return REASON_NOT_FOR_GATEWAY;
	return REASON_NONE;
}

/* Bytes of a GSO packet, whose own length field may be 0; more than the field holds is cut off. */
static __always_inline __u32 gso_len(struct __sk_buff *skb)
{
	__u32 len = skb->len - ETH_HLEN;

	return len < 0xffff ? len : 0xffff;
}

/* May the container send from there? Who asks for an address by DHCP has none yet. */
static __always_inline bool is_own_v4(const struct port *port, __be32 src, __be32 dst)
{
	if (!src)
		return port->flags & PORT_DHCP && dst == ~0u;
	return port->flags & PORT_HAS_V4 && src == port->v4;
}

static __always_inline bool starts_dhcp_server(struct __sk_buff *skb, const struct iphdr *ip)
{
	const __u32 *ports = (const void *)ip + ip->ihl * 4;

	if (ip->protocol != IPPROTO_UDP || ip->frag_off & bpf_htons(IP_OFFSET))
		return false;
	return (const void *)(ports + 1) <= packet_end(skb) && is_dhcp_server(*ports);
}

/* Is it an honest packet of the container's? Then the context learns of it. */
static __always_inline enum reason inspect_v4(struct __sk_buff *skb, struct context *ctx, const struct port *port)
{
	struct iphdr *ip = packet_start(skb) + ETH_HLEN;
	__u32 total;

	if ((void *)(ip + 1) > packet_end(skb) || ip->version != 4 || ip->ihl < 5)
		return REASON_MALFORMED;
	total = skb->gso_size ? gso_len(skb) : bpf_ntohs(ip->tot_len);
	if (total < ip->ihl * 4u || total > skb->len - ETH_HLEN)
		return REASON_MALFORMED;
	if (!is_own_v4(port, ip->saddr, ip->daddr))
		return REASON_SPOOFED_ADDRESS;
	if (!(port->flags & PORT_DHCP) && starts_dhcp_server(skb, ip))
		return REASON_DHCP_SERVER;
	ctx->v4 = 1;
	ctx->tos = ip->tos;
	ctx->l3_len = total;
	return REASON_NONE;
}

/* A packet to the gateway's MAC: it is for the gateway itself, or routed. */
static __always_inline int route_v4(struct __sk_buff *skb, struct context *ctx, const struct port *port)
{
	struct iphdr *ip = packet_start(skb) + ETH_HLEN;

	if ((void *)(ip + 1) > packet_end(skb))
		return drop(skb, REASON_MALFORMED);
	if (ip->daddr == port->gateway4)
		return go_to(skb, STAGE_GATEWAY);
	if (ip->ttl <= 1)
		return refuse(skb, ctx, REASON_HOP_LIMIT, ICMP_TIME_EXCEEDED_V4, 0, 0);
	map_v4(&ctx->key.src, ip->saddr);
	map_v4(&ctx->key.dst, ip->daddr);
	return GO_ON;
}

static __always_inline int classify_v4(struct __sk_buff *skb, struct context *ctx, const struct port *port,
				       const struct config *cfg)
{
	enum reason reason = inspect_v4(skb, ctx, port);

	if (!reason)
		reason = check_destination_mac(skb, cfg);
	if (reason)
		return drop(skb, reason);
	return route_v4(skb, ctx, port);
}

/* What a container may not send, whatever the destination. word: the first 32 bits of the payload. */
static __always_inline enum reason check_v6_upper(__u8 protocol, __u32 word, bool dhcp)
{
	if (protocol == IPPROTO_ICMPV6 && *(__u8 *)&word == ICMPV6_ROUTER_ADVERTISEMENT)
		return REASON_ROUTER_ADVERTISEMENT;
	if (!dhcp && protocol == IPPROTO_UDP && is_dhcp_server(word))
		return REASON_DHCP_SERVER;
	return REASON_NONE;
}

static __always_inline enum reason check_v6_payload(struct __sk_buff *skb, const struct ipv6hdr *ip, bool dhcp)
{
	const __u32 *payload = (const void *)(ip + 1);
	struct context *ctx = context();
	__u32 word;

	if (!is_extension(ip->nexthdr)) {
		if ((void *)(payload + 1) > packet_end(skb))
			return REASON_NONE;
		return check_v6_upper(ip->nexthdr, *payload, dhcp);
	}
	if (!ctx || !find_upper(skb, ETH_HLEN + sizeof(*ip), ip->nexthdr))
		return REASON_MALFORMED;
	if (ctx->upper.protocol == NEXTHDR_ROUTING && !ctx->upper.later)
		return REASON_SRV6_FROM_CONTAINER;
	if (ctx->upper.later || bpf_skb_load_bytes(skb, ctx->upper.offset, &word, sizeof(word)))
		return REASON_NONE;
	/* Nobody looks for neighbours behind extension headers; who does wants not to be seen (RFC 7113, RFC 6980). */
	if (ctx->upper.protocol == IPPROTO_ICMPV6 && is_nd_type(*(__u8 *)&word))
		return REASON_MALFORMED;
	return check_v6_upper(ctx->upper.protocol, word, dhcp);
}

static __always_inline bool is_neighbour_discovery(struct __sk_buff *skb, const struct ipv6hdr *ip)
{
	const __u8 *type = (const void *)(ip + 1);

	return ip->nexthdr == IPPROTO_ICMPV6 && type + 1 <= (const __u8 *)packet_end(skb) && is_nd_type(*type);
}

/* Is it honest but for its addresses? Then the context learns of it, of source and destination too. */
static __always_inline enum reason inspect_v6(struct __sk_buff *skb, struct context *ctx, const struct port *port,
					      const struct config *cfg)
{
	struct ipv6hdr *ip = packet_start(skb) + ETH_HLEN;
	enum reason reason;
	__u32 total;

	if ((void *)(ip + 1) > packet_end(skb) || ip->version != 6)
		return REASON_MALFORMED;
	total = skb->gso_size ? gso_len(skb) : bpf_ntohs(ip->payload_len) + sizeof(*ip);
	if (total > skb->len - ETH_HLEN)
		return REASON_MALFORMED;
	__builtin_memcpy(&ctx->key.src, &ip->saddr, sizeof(ctx->key.src));
	__builtin_memcpy(&ctx->key.dst, &ip->daddr, sizeof(ctx->key.dst));
	ctx->v4 = 0;
	ctx->tos = traffic_class(ip);
	ctx->l3_len = total;
	ctx->nd = is_neighbour_discovery(skb, ip);
	reason = check_v6_payload(skb, ip, port->flags & PORT_DHCP);
	if (reason)
		return reason;
	if ((first_half(&ctx->key.dst) & cfg->locator_block_mask) == cfg->locator_block)
		return REASON_SRV6_FROM_CONTAINER;
	return is_mapped_v4(&ctx->key.dst) ? REASON_MALFORMED : REASON_NONE;
}

/* A packet to the gateway's MAC, from the container's own address. */
static __always_inline int route_v6(struct __sk_buff *skb, struct context *ctx, const struct port *port)
{
	struct ipv6hdr *ip = packet_start(skb) + ETH_HLEN;

	if ((void *)(ip + 1) > packet_end(skb))
		return drop(skb, REASON_MALFORMED);
	if (same_addr(&ctx->key.dst, &port->gateway6))
		return go_to(skb, STAGE_GATEWAY);
	if (ip->hop_limit <= 1)
		return refuse(skb, ctx, REASON_HOP_LIMIT, ICMP_TIME_EXCEEDED_V6, 0, 0);
	return GO_ON;
}

static __always_inline int classify_v6(struct __sk_buff *skb, struct context *ctx, const struct port *port,
				       const struct config *cfg)
{
	enum reason reason = inspect_v6(skb, ctx, port, cfg);

	if (reason)
		return drop(skb, reason);
	/* Neighbour discovery also comes from the link-local and the unspecified address. */
	if (ctx->nd)
		return go_to(skb, STAGE_GATEWAY);
	if (!(port->flags & PORT_HAS_V6) || !same_addr(&ctx->key.src, &port->v6)) {
		/* Every host speaks MLD and asks for routers from its link-local address. */
		if (ctx->key.dst.u8[0] == 0xff && (is_link_local(&ctx->key.src) || is_unspecified(&ctx->key.src)))
			return drop(skb, REASON_MULTICAST);
		return drop(skb, REASON_SPOOFED_ADDRESS);
	}
	reason = check_destination_mac(skb, cfg);
	if (reason)
		return drop(skb, reason);
	return route_v6(skb, ctx, port);
}

/* Of a flow that was decided: what the stages have to know to decide it again. */
static __always_inline void recall(struct context *ctx, const struct flow *flow)
{
	ctx->known = 1;
	ctx->reply = !!(flow->flags & FLOW_REPLY);
	ctx->network = flow->network;
	ctx->ifindex = flow->way == WAY_CONTAINER ? flow->ifindex : 0;
	ctx->sid = flow->sid;
	ctx->outside.way = flow->way;
	ctx->outside.translated = !!(flow->flags & FLOW_TRANSLATED);
	ctx->rewrite = flow->to;
}

/* What a flow's first packet cannot be. */
static __always_inline enum reason check_opener(const struct context *ctx)
{
	if (ctx->kind == PACKET_ICMP_ERROR || is_answer(&ctx->key))
		return REASON_NO_FLOW;
	return ctx->kind == PACKET_LATER_FRAGMENT ? REASON_FRAGMENT_UNKNOWN : REASON_NONE;
}

/*
 * Does the flow carry the packet the way that it asks for, routed, or bridged to that MAC address? If not, it is decided again.
 * l2: what is not in a frame is always routed.
 */
static __always_inline bool carries(const struct flow *flow, const struct context *ctx, bool l2)
{
	if (!l2 || !ctx->bridged)
		return !(flow->flags & FLOW_BRIDGED);
	return flow->flags & FLOW_BRIDGED && same_mac(flow->mac.u8, ctx->to.u8);
}

static __always_inline int decide(struct __sk_buff *skb, const struct context *ctx, bool l2)
{
	return l2 && ctx->bridged ? go_to(skb, STAGE_BRIDGE) : go_to(skb, STAGE_ROUTE);
}

/* A packet of a known flow goes where those before it went; any other one is decided by the stages. l2: a literal. */
static __always_inline int follow_flow(struct __sk_buff *skb, struct context *ctx, bool l2)
{
	enum reason reason = parse_flow(skb, ETH_HLEN, false);
	struct flow *flow;

	if (reason)
		return drop(skb, reason);
	flow = find_flow(&ctx->key);
	if (flow && !(flow->flags & FLOW_UNDERLAY) && !reopens(flow, ctx)) {
		if (has_ended(flow))
			return drop(skb, REASON_NO_FLOW);
		if (flow->generation == ctx->generation && carries(flow, ctx, l2)) {
			track(flow, ctx);
			return l2 && ctx->bridged ? send_frame(skb, ctx, flow) : send_flow(skb, ctx, flow);
		}
		recall(ctx, flow);
		return decide(skb, ctx, l2);
	}
	reason = check_opener(ctx);
	return reason ? drop(skb, reason) : decide(skb, ctx, l2);
}

static __always_inline int classify(struct __sk_buff *skb, struct context *ctx, const struct port *port,
				    const struct config *cfg)
{
	struct ethhdr *eth = packet_start(skb);

	if ((void *)(eth + 1) > packet_end(skb))
		return drop(skb, REASON_MALFORMED);
	if (!same_mac(eth->h_source, port->mac.u8))
		return drop(skb, REASON_SPOOFED_MAC);
	if (skb->vlan_present)
		return drop(skb, REASON_NOT_IP);
	switch (eth->h_proto) {
	case bpf_htons(ETH_P_IP):
		return classify_v4(skb, ctx, port, cfg);
	case bpf_htons(ETH_P_IPV6):
		return classify_v6(skb, ctx, port, cfg);
	case bpf_htons(ETH_P_ARP):
		return go_to(skb, STAGE_GATEWAY);
	}
	return drop(skb, REASON_NOT_IP);
}

/* The port of the container that sends, which the context learns of. NULL: there is none. */
static __always_inline struct port *find_sender(struct context *ctx, __u32 ifindex)
{
	struct port *port = find_port(ifindex, ctx->generation);

	if (!port)
		return NULL;
	ctx->key.network = port->network;
	ctx->source = port->source;
	ctx->traffic = port->traffic;
	ctx->underlay = 0;
	return port;
}

SEC("tc")
int pod_l3(struct __sk_buff *skb)
{
	struct context *ctx = start(skb);
	struct config *cfg;
	struct port *port;
	int verdict;

	if (!ctx)
		return TC_ACT_SHOT;
	cfg = node(ctx->generation);
	port = find_sender(ctx, skb->ifindex);
	if (!port || !cfg)
		return drop(skb, REASON_NO_PORT);
	pull(skb, ETH_HLEN + IP_HEADER_MAX + 20);
	verdict = classify(skb, ctx, port, cfg);
	return verdict == GO_ON ? follow_flow(skb, ctx, false) : verdict;
}
