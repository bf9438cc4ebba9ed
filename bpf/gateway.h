/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Gateway: what a container sends to its gateway itself: ARP, neighbour discovery, echo. Where
 * the gateway's address is on a bridge in a VRF the stack answers, and gets these and nothing else; where the kernel
 * has no VRF the bridge has no address, so that nothing leads into the host's tables, and the answer is made here.
 */
#pragma once

#include "lib/packet.h"
#include "classify.h"

#define ARP_REQUEST 1
#define ARP_REPLY 2

struct arp {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 operation;
	__u8 sender_mac[6];
	__be32 sender;
	__u8 target_mac[6];
	__be32 target;
} __attribute__((packed));

struct arp_frame {
	struct ethhdr eth;
	struct arp arp;
} __attribute__((packed));

/* Neighbour solicitation or advertisement, with room for one link-layer address option. */
struct nd_frame {
	struct ethhdr eth;
	struct ipv6hdr ip;
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u8 flags;
	__u8 reserved[3];
	__u8 target[16];
	__u8 option_type;
	__u8 option_len;
	__u8 option_mac[6];
} __attribute__((packed));

#define ND_MIN_LEN (sizeof(struct nd_frame) - 8)
#define ND_FLAG_ROUTER 0x80
#define ND_FLAG_SOLICITED 0x40
#define ND_FLAG_OVERRIDE 0x20
#define ND_OPTION_TARGET_MAC 2
#define ND_HOP_LIMIT 255

struct pseudo_header {
	union addr src;
	union addr dst;
	__be32 len;
	__be32 nexthdr;
} __attribute__((packed));

_Static_assert(sizeof(struct arp_frame) == 42, "arp_frame");
_Static_assert(sizeof(struct nd_frame) == 86, "nd_frame");

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
	if (f.arp.hardware != bpf_htons(1) || f.arp.protocol != bpf_htons(ETH_P_IP) || f.arp.hardware_len != ETH_ALEN ||
	    f.arp.protocol_len != 4)
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
	__builtin_memcpy(f.arp.target_mac, f.arp.sender_mac, ETH_ALEN);
	__builtin_memcpy(f.eth.h_dest, f.eth.h_source, ETH_ALEN);
	__builtin_memcpy(f.arp.sender_mac, &cfg->gateway, ETH_ALEN);
	__builtin_memcpy(f.eth.h_source, &cfg->gateway, ETH_ALEN);
	f.arp.target = f.arp.sender;
	f.arp.sender = port->gateway4;
	f.arp.operation = bpf_htons(ARP_REPLY);
	if (bpf_skb_store_bytes(skb, 0, &f, sizeof(f), 0))
		return drop(skb, REASON_MALFORMED);
	return send_back(skb, port);
}

/* Turn the solicitation in f into the gateway's advertisement. dad: the asker has no address yet. */
static __always_inline void advertise(struct nd_frame *f, const struct config *cfg, bool dad)
{
	static const union addr all_nodes = { .u8 = { 0xff, 2, [15] = 1 } };
	struct {
		struct pseudo_header pseudo;
		__u8 icmp[32];
	} sum = {};

	if (dad) {
		static const __u8 all_nodes_mac[ETH_ALEN] = { 0x33, 0x33, 0, 0, 0, 1 };

		__builtin_memcpy(f->eth.h_dest, all_nodes_mac, ETH_ALEN);
		__builtin_memcpy(&f->ip.daddr, &all_nodes, sizeof(all_nodes));
	} else {
		__builtin_memcpy(f->eth.h_dest, f->eth.h_source, ETH_ALEN);
		__builtin_memcpy(&f->ip.daddr, &f->ip.saddr, sizeof(all_nodes));
	}
	__builtin_memcpy(f->eth.h_source, &cfg->gateway, ETH_ALEN);
	__builtin_memcpy(&f->ip.saddr, f->target, sizeof(f->target));
	f->ip.payload_len = bpf_htons(sizeof(sum.icmp));
	f->ip.hop_limit = ND_HOP_LIMIT;
	f->type = ICMPV6_NEIGHBOUR_ADVERTISEMENT;
	f->checksum = 0;
	f->flags = ND_FLAG_ROUTER | ND_FLAG_OVERRIDE | (dad ? 0 : ND_FLAG_SOLICITED);
	f->option_type = ND_OPTION_TARGET_MAC;
	f->option_len = 1;
	__builtin_memcpy(f->option_mac, &cfg->gateway, ETH_ALEN);

	__builtin_memcpy(&sum.pseudo.src, &f->ip.saddr, 32);
	sum.pseudo.len = bpf_htonl(sizeof(sum.icmp));
	sum.pseudo.nexthdr = bpf_htonl(IPPROTO_ICMPV6);
	__builtin_memcpy(sum.icmp, &f->type, sizeof(sum.icmp));
	f->checksum = fold(bpf_csum_diff(NULL, 0, (void *)&sum, sizeof(sum), 0));
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
	advertise(&f, cfg, dad);
	/* A probe is shorter, a nonce makes it longer. */
	if (skb->len != sizeof(f) && bpf_skb_change_tail(skb, sizeof(f), 0))
		return drop(skb, REASON_ICMP_FAILED);
	if (bpf_skb_store_bytes(skb, 0, &f, sizeof(f), 0))
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
	int offset = find_icmp(skb, ctx->v4);
	__be16 type_code = request;

	if (offset < 0 || (offset && bpf_skb_load_bytes(skb, offset, &type_code, sizeof(type_code))))
		return drop(skb, REASON_GATEWAY_CLOSED);
	if (type_code != request && !(cfg->vrf && type_code == reply))
		return drop(skb, REASON_GATEWAY_CLOSED);
	return cfg->vrf ? hand_up(skb, port) : echo(skb, port, ctx->v4, offset, request);
}

SEC("tc")
int stage_gateway(struct __sk_buff *skb)
{
	struct context *ctx = context();
	struct config *cfg;
	struct port *port;
	struct ethhdr eth;

	if (!ctx)
		return TC_ACT_SHOT;
	step(skb, ctx, STAGE_GATEWAY);
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
