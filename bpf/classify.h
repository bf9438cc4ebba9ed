/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Classify: the entry at a container's veth (L3 networks). Says which container sends, whether it may,
 * fills the context, and sends on what belongs to a known flow. Next: gateway (for the gateway itself), route, error.
 */
#pragma once

#include "lib/conntrack.h"
#include "deliver.h"

#define ICMPV6_ROUTER_ADVERTISEMENT 134
#define ICMPV6_NEIGHBOUR_SOLICITATION 135
#define ICMPV6_NEIGHBOUR_ADVERTISEMENT 136

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
static __always_inline enum reason check_destination_mac(const struct ethhdr *eth, const struct config *cfg)
{
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

static __always_inline int classify_v4(struct __sk_buff *skb, struct context *ctx, const struct port *port,
				       const struct config *cfg)
{
	struct ethhdr *eth = packet_start(skb);
	struct iphdr *ip = (void *)(eth + 1);
	enum reason reason;
	__u32 total;

	if ((void *)(ip + 1) > packet_end(skb) || ip->version != 4 || ip->ihl < 5)
		return drop(skb, REASON_MALFORMED);
	total = skb->gso_size ? gso_len(skb) : bpf_ntohs(ip->tot_len);
	if (total < ip->ihl * 4u || total > skb->len - ETH_HLEN)
		return drop(skb, REASON_MALFORMED);
	if (!(port->flags & PORT_HAS_V4) || ip->saddr != port->v4)
		return drop(skb, REASON_SPOOFED_ADDRESS);
	if (ip->protocol == IPPROTO_UDP && !(ip->frag_off & bpf_htons(IP_OFFSET))) {
		__u32 *ports = (void *)ip + ip->ihl * 4;

		if ((void *)(ports + 1) <= packet_end(skb) && is_dhcp_server(*ports))
			return drop(skb, REASON_DHCP_SERVER);
	}
	reason = check_destination_mac(eth, cfg);
	if (reason)
		return drop(skb, reason);
	ctx->v4 = 1;
	ctx->tos = ip->tos;
	ctx->l3_len = total;
	if (ip->daddr == port->gateway4)
		return go_to(skb, STAGE_GATEWAY);
	if (ip->ttl <= 1)
		return refuse(skb, ctx, REASON_HOP_LIMIT, ICMP_TIME_EXCEEDED_V4, 0, 0);
	map_v4(&ctx->key.src, ip->saddr);
	map_v4(&ctx->key.dst, ip->daddr);
	return GO_ON;
}

/* What a container may not send, whatever the destination. word: the first 32 bits of the payload. */
static __always_inline enum reason check_v6_upper(__u8 protocol, __u32 word)
{
	if (protocol == IPPROTO_ICMPV6 && *(__u8 *)&word == ICMPV6_ROUTER_ADVERTISEMENT)
		return REASON_ROUTER_ADVERTISEMENT;
	if (protocol == IPPROTO_UDP && is_dhcp_server(word))
		return REASON_DHCP_SERVER;
	return REASON_NONE;
}

static __always_inline enum reason check_v6_payload(struct __sk_buff *skb, const struct ipv6hdr *ip)
{
	const __u32 *payload = (const void *)(ip + 1);
	struct context *ctx = context();
	__u32 word;

	if (!is_extension(ip->nexthdr)) {
		if ((void *)(payload + 1) > packet_end(skb))
			return REASON_NONE;
		return check_v6_upper(ip->nexthdr, *payload);
	}
	if (!ctx || !find_upper(skb, ETH_HLEN + sizeof(*ip), ip->nexthdr))
		return REASON_MALFORMED;
	if (ctx->upper.protocol == NEXTHDR_ROUTING && !ctx->upper.later)
		return REASON_SRV6_FROM_CONTAINER;
	if (ctx->upper.later || bpf_skb_load_bytes(skb, ctx->upper.offset, &word, sizeof(word)))
		return REASON_NONE;
	return check_v6_upper(ctx->upper.protocol, word);
}

static __always_inline bool is_neighbour_discovery(struct __sk_buff *skb, const struct ipv6hdr *ip)
{
	const __u8 *type = (const void *)(ip + 1);

	return ip->nexthdr == IPPROTO_ICMPV6 && type + 1 <= (const __u8 *)packet_end(skb) &&
	       (*type == ICMPV6_NEIGHBOUR_SOLICITATION || *type == ICMPV6_NEIGHBOUR_ADVERTISEMENT);
}

static __always_inline int classify_v6(struct __sk_buff *skb, struct context *ctx, const struct port *port,
				       const struct config *cfg)
{
	struct ethhdr *eth = packet_start(skb);
	struct ipv6hdr *ip = (void *)(eth + 1);
	union addr src, dst;
	enum reason reason;
	__u32 total;

	if ((void *)(ip + 1) > packet_end(skb) || ip->version != 6)
		return drop(skb, REASON_MALFORMED);
	total = skb->gso_size ? gso_len(skb) : bpf_ntohs(ip->payload_len) + sizeof(*ip);
	if (total > skb->len - ETH_HLEN)
		return drop(skb, REASON_MALFORMED);
	__builtin_memcpy(&src, &ip->saddr, sizeof(src));
	__builtin_memcpy(&dst, &ip->daddr, sizeof(dst));
	reason = check_v6_payload(skb, ip);
	if (reason)
		return drop(skb, reason);
	if ((first_half(&dst) & cfg->locator_block_mask) == cfg->locator_block)
		return drop(skb, REASON_SRV6_FROM_CONTAINER);
	if (is_mapped_v4(&dst))
		return drop(skb, REASON_MALFORMED);
	ctx->v4 = 0;
	ctx->tos = traffic_class(ip);
	ctx->l3_len = total;
	/* Neighbour discovery also comes from the link-local and the unspecified address. */
	ctx->nd = is_neighbour_discovery(skb, ip);
	if (ctx->nd)
		return go_to(skb, STAGE_GATEWAY);
	if (!(port->flags & PORT_HAS_V6) || !same_addr(&src, &port->v6)) {
		/* Every host speaks MLD and asks for routers from its link-local address. */
		if (dst.u8[0] == 0xff && (is_link_local(&src) || is_unspecified(&src)))
			return drop(skb, REASON_MULTICAST);
		return drop(skb, REASON_SPOOFED_ADDRESS);
	}
	reason = check_destination_mac(eth, cfg);
	if (reason)
		return drop(skb, reason);
	if (same_addr(&dst, &port->gateway6))
		return go_to(skb, STAGE_GATEWAY);
	if (ip->hop_limit <= 1)
		return refuse(skb, ctx, REASON_HOP_LIMIT, ICMP_TIME_EXCEEDED_V6, 0, 0);
	ctx->key.src = src;
	ctx->key.dst = dst;
	return GO_ON;
}

/* Of a flow that was decided: what the stages have to know to decide it again. */
static __always_inline void recall(struct context *ctx, const struct flow *flow)
{
	ctx->known = 1;
	ctx->reply = !!(flow->flags & FLOW_REPLY);
	ctx->network = flow->network;
	ctx->ifindex = flow->ifindex;
	ctx->sid = flow->sid;
}

/* A packet of a known flow goes where those before it went; any other one is decided by the stages. */
static __always_inline int follow_flow(struct __sk_buff *skb, struct context *ctx)
{
	enum reason reason = parse_flow(skb, ETH_HLEN, false);
	struct flow *flow;

	if (reason)
		return drop(skb, reason);
	flow = find_flow(&ctx->key);
	if (flow && !(flow->flags & FLOW_UNDERLAY) && !reopens(flow, ctx)) {
		if (has_ended(flow))
			return drop(skb, REASON_NO_FLOW);
		if (flow->generation == ctx->generation) {
			track(flow, ctx);
			return send_flow(skb, ctx, flow);
		}
		recall(ctx, flow);
		return go_to(skb, STAGE_ROUTE);
	}
	if (ctx->kind == PACKET_ICMP_ERROR || is_answer(&ctx->key))
		return drop(skb, REASON_NO_FLOW);
	if (ctx->kind == PACKET_LATER_FRAGMENT)
		return drop(skb, REASON_FRAGMENT_UNKNOWN);
	return go_to(skb, STAGE_ROUTE);
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
	port = find_port(skb->ifindex, ctx->generation);
	if (!port || !cfg)
		return drop(skb, REASON_NO_PORT);
	ctx->key.network = port->network;
	ctx->source = port->source;
	ctx->traffic = port->traffic;
	ctx->underlay = 0;
	pull(skb, ETH_HLEN + IP_HEADER_MAX + 20);
	verdict = classify(skb, ctx, port, cfg);
	return verdict == GO_ON ? follow_flow(skb, ctx) : verdict;
}
