/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Gateway: what a container sends to its gateway itself: ARP, neighbour discovery, echo. Where
 * the gateway's address is on a bridge in a VRF the stack answers, and gets these and nothing else; where the kernel
 * has no VRF the bridge has no address, so that nothing leads into the host's tables, and the answer is made here.
 */
#pragma once

#include "lib/neighbour.h"
#include "classify.h"

static __always_inline int send_back(struct __sk_buff *skb, const struct port *port)
{
	count(skb, traffic_index(port->traffic, REASON_GATEWAY_ANSWERED));
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline int hand_up(struct __sk_buff *skb, const struct port *port)
{
	count(skb, traffic_index(port->traffic, REASON_GATEWAY_PASSED));
	return TC_ACT_OK;
}

static __always_inline int gateway_arp(struct __sk_buff *skb, const struct port *port, const struct config *cfg)
{
	struct arp_frame f;

	if (bpf_skb_load_bytes(skb, 0, &f, sizeof(f)))
		return drop(skb, REASON_MALFORMED);
	if (!is_plain_arp(&f.arp))
		return drop(skb, REASON_MALFORMED);
	if (__builtin_memcmp(f.arp.sender_mac, port->mac.u8, ETH_ALEN))
		return drop(skb, REASON_SPOOFED_MAC);
	/* 0 asks whether somebody has the address already. */
	if (f.arp.sender && f.arp.sender != port->v4)
		return drop(skb, REASON_SPOOFED_ADDRESS);
	if (!(port->flags & PORT_HAS_V4) || f.arp.target != port->gateway4)
		return drop(skb, REASON_NEIGHBOUR_UNKNOWN);
	if (cfg->vrf)
		return hand_up(skb, port);
	if (f.arp.operation != bpf_htons(ARP_REQUEST))
		return drop(skb, REASON_NEIGHBOUR_UNKNOWN);
	answer_arp(&f, &cfg->gateway);
	if (bpf_skb_store_bytes(skb, 0, &f, sizeof(f), 0))
		return drop(skb, REASON_MALFORMED);
	return send_back(skb, port);
}

static __always_inline int gateway_nd(struct __sk_buff *skb, const struct port *port, const struct config *cfg)
{
	struct nd_frame f = {};
	union addr src, target;
	bool dad;

	if (bpf_skb_load_bytes(skb, 0, &f, ND_MIN_LEN) || f.ip.hop_limit != ND_HOP_LIMIT || f.code)
		return drop(skb, REASON_MALFORMED);
	__builtin_memcpy(&src, &f.ip.saddr, sizeof(src));
	__builtin_memcpy(&target, f.target, sizeof(target));
	dad = is_unspecified(&src);
	if (!dad && !is_link_local(&src) && !(port->flags & PORT_HAS_V6 && same_addr(&src, &port->v6)))
		return drop(skb, REASON_SPOOFED_ADDRESS);
	if (f.type == ICMPV6_NEIGHBOUR_ADVERTISEMENT) {
		/* Only the stack asks; it may learn of the container's own addresses. */
		if (!is_link_local(&target) && !same_addr(&target, &port->v6))
			return drop(skb, REASON_SPOOFED_ADDRESS);
		return cfg->vrf ? hand_up(skb, port) : drop(skb, REASON_NEIGHBOUR_UNKNOWN);
	}
	if (!(port->flags & PORT_HAS_V6) || !same_addr(&target, &port->gateway6))
		return drop(skb, REASON_NEIGHBOUR_UNKNOWN);
	if (cfg->vrf)
		return hand_up(skb, port);
	advertise(&f, &cfg->gateway, ND_FLAG_ROUTER);
	if (!put_advertisement(skb, &f))
		return drop(skb, REASON_ICMP_FAILED);
	return send_back(skb, port);
}

/*
 * Where the ICMP header of a packet to the gateway is; 0 in a later fragment, which has none. Negative: no
 * ICMP.
 */
static __always_inline int find_icmp(struct __sk_buff *skb, bool v4)
{
	union {
		struct iphdr v4;
		struct ipv6hdr v6;
	} ip = {};
	struct context *ctx = context();

	if (v4) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip.v4, sizeof(ip.v4)) || ip.v4.protocol != IPPROTO_ICMP)
			return -1;
		return ip.v4.frag_off & bpf_htons(IP_OFFSET) ? 0 : ETH_HLEN + ip.v4.ihl * 4;
	}
	if (!ctx || bpf_skb_load_bytes(skb, ETH_HLEN, &ip.v6, sizeof(ip.v6)) ||
	    !find_upper(skb, ETH_HLEN + sizeof(ip.v6), ip.v6.nexthdr))
		return -1;
	if (ctx->upper.protocol != IPPROTO_ICMPV6)
		return -1;
	return ctx->upper.later ? 0 : (int)ctx->upper.offset;
}

/* Swap the addresses of both headers; no checksum changes by that. */
static __always_inline bool turn_round(struct __sk_buff *skb, bool v4)
{
	struct mac macs[2], macs_back[2];
	__be32 v4s[2], v4s_back[2];
	union addr v6s[2], v6s_back[2];

	if (bpf_skb_load_bytes(skb, 0, macs, sizeof(macs)))
		return false;
	macs_back[0] = macs[1];
	macs_back[1] = macs[0];
	if (bpf_skb_store_bytes(skb, 0, macs_back, sizeof(macs_back), 0))
		return false;
	if (v4) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), v4s, sizeof(v4s)))
			return false;
		v4s_back[0] = v4s[1];
		v4s_back[1] = v4s[0];
		return !bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), v4s_back, sizeof(v4s_back),
					    0);
	}
	if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), v6s, sizeof(v6s)))
		return false;
	v6s_back[0] = v6s[1];
	v6s_back[1] = v6s[0];
	return !bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), v6s_back, sizeof(v6s_back), 0);
}

/* Answer an echo request. Fragments need no state: only the first has the ICMP header, all are turned round. */
static __always_inline int echo(struct __sk_buff *skb, const struct port *port, bool v4, __u32 offset, __be16 request)
{
	__be16 reply = bpf_htons((v4 ? ICMP_ECHO_REPLY_V4 : ICMP_ECHO_REPLY_V6) << 8);

	if (offset && (bpf_l4_csum_replace(skb, offset + 2, request, reply, sizeof(reply)) ||
		       bpf_skb_store_bytes(skb, offset, &reply, sizeof(reply), 0)))
		return drop(skb, REASON_MALFORMED);
	if (!turn_round(skb, v4))
		return drop(skb, REASON_MALFORMED);
	return send_back(skb, port);
}

/* Echo is all that the gateway takes; with a VRF the stack answers, and may have asked itself. */
static __always_inline int gateway_ip(struct __sk_buff *skb, const struct context *ctx, const struct port *port,
				      const struct config *cfg)
{
	__be16 request = bpf_htons((ctx->v4 ? ICMP_ECHO_V4 : ICMP_ECHO_V6) << 8);
	__be16 reply = bpf_htons((ctx->v4 ? ICMP_ECHO_REPLY_V4 : ICMP_ECHO_REPLY_V6) << 8);
	bool stack = cfg->vrf && !ctx->l2; /* in an L2 network it is no address of the stack's */
	int offset = find_icmp(skb, ctx->v4);
	__be16 type_code = request;

	if (offset < 0 || (offset && bpf_skb_load_bytes(skb, offset, &type_code, sizeof(type_code))))
		return drop(skb, REASON_GATEWAY_CLOSED);
	if (type_code != request && !(stack && type_code == reply))
		return drop(skb, REASON_GATEWAY_CLOSED);
	return stack ? hand_up(skb, port) : echo(skb, port, ctx->v4, offset, request);
}

SEC("tc")
int stage_gateway(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_GATEWAY);
	struct config *cfg;
	struct port *port;
	struct ethhdr eth;

	if (!ctx)
		return TC_ACT_SHOT;
	port = find_port(skb->ifindex, ctx->generation);
	cfg = node(ctx->generation);
	if (!port || !cfg)
		return drop(skb, REASON_NO_PORT);
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return drop(skb, REASON_MALFORMED);
	if (eth.h_proto == bpf_htons(ETH_P_ARP))
		return gateway_arp(skb, port, cfg);
	if (!ctx->v4 && ctx->nd)
		return gateway_nd(skb, port, cfg);
	return gateway_ip(skb, ctx, port, cfg);
}
