/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Gateway: what a container sends to its gateway itself: ARP, neighbour discovery, echo. Where
 * the gateway's address is on a bridge in a VRF the stack answers, and gets these and nothing else; where the kernel
 * has no VRF the bridge has no address, so that nothing leads into the host's tables, and the answer is made here.
 */
#pragma once

#include "lib/packet.h"
#include "classify.h"

#define ICMP_ECHO_REPLY_V4 0
#define ICMP_ECHO_V4 8
#define ICMP_ECHO_V6 128
#define ICMP_ECHO_REPLY_V6 129

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

static __always_inline int send_back(struct __sk_buff *skb)
{
	count(skb, REASON_GATEWAY_ANSWERED);
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline int hand_up(struct __sk_buff *skb)
{
	count(skb, REASON_GATEWAY_PASSED);
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
		return hand_up(skb);
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
	return send_back(skb);
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
		return cfg->vrf ? hand_up(skb) : drop(skb, REASON_NEIGHBOUR_UNKNOWN);
	}
	if (!(port->flags & PORT_HAS_V6) || !same_addr(&target, &port->gateway6))
		return drop(skb, REASON_NEIGHBOUR_UNKNOWN);
	if (cfg->vrf)
		return hand_up(skb);
	advertise(&f, cfg, dad);
	/* A probe is shorter, a nonce makes it longer. */
	if (skb->len != sizeof(f) && bpf_skb_change_tail(skb, sizeof(f), 0))
		return drop(skb, REASON_ICMP_FAILED);
	if (bpf_skb_store_bytes(skb, 0, &f, sizeof(f), 0))
		return drop(skb, REASON_ICMP_FAILED);
	return send_back(skb);
}

/* Swap the MAC addresses and turn the ICMP type at offset, keeping its checksum right. */
static __always_inline int echo_reply(struct __sk_buff *skb, struct ethhdr *eth, __u32 offset, __u8 request, __u8 reply)
{
	__u8 mac[ETH_ALEN];

	if (offset) {
		__be16 old, new = bpf_htons((__u16)reply << 8);

		if (bpf_skb_load_bytes(skb, offset, &old, sizeof(old)))
			return -1;
		if (old != bpf_htons((__u16)request << 8))
			return -1;
		if (bpf_l4_csum_replace(skb, offset + 2, old, new, sizeof(new)) ||
		    bpf_skb_store_bytes(skb, offset, &new, sizeof(new), 0))
			return -1;
	}
	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	return 0;
}

/* Fragments need no state: only the first has the ICMP header, all are turned round. */
static __always_inline int gateway_echo_v4(struct __sk_buff *skb)
{
	struct {
		struct ethhdr eth;
		struct iphdr ip;
	} __attribute__((packed)) f;
	__u32 offset;
	__be32 addr;

	if (bpf_skb_load_bytes(skb, 0, &f, sizeof(f)))
		return drop(skb, REASON_MALFORMED);
	if (f.ip.protocol != IPPROTO_ICMP)
		return drop(skb, REASON_GATEWAY_CLOSED);
	offset = f.ip.frag_off & bpf_htons(IP_OFFSET) ? 0 : ETH_HLEN + f.ip.ihl * 4;
	if (echo_reply(skb, &f.eth, offset, ICMP_ECHO_V4, ICMP_ECHO_REPLY_V4))
		return drop(skb, REASON_GATEWAY_CLOSED);
	addr = f.ip.saddr;
	f.ip.saddr = f.ip.daddr;
	f.ip.daddr = addr;
	if (bpf_skb_store_bytes(skb, 0, &f, sizeof(f), 0))
		return drop(skb, REASON_MALFORMED);
	return send_back(skb);
}

static __always_inline int gateway_echo_v6(struct __sk_buff *skb)
{
	struct {
		struct ethhdr eth;
		struct ipv6hdr ip;
	} __attribute__((packed)) f;
	__u32 offset = sizeof(f);
	struct in6_addr addr;
	__u8 nexthdr;

	if (bpf_skb_load_bytes(skb, 0, &f, sizeof(f)))
		return drop(skb, REASON_MALFORMED);
	nexthdr = f.ip.nexthdr;
	if (nexthdr == NEXTHDR_FRAGMENT) {
		__u8 fragment[8];

		if (bpf_skb_load_bytes(skb, offset, fragment, sizeof(fragment)))
			return drop(skb, REASON_MALFORMED);
		nexthdr = fragment[0];
		offset = fragment[2] || fragment[3] & 0xf8 ? 0 : offset + sizeof(fragment);
	}
	if (nexthdr != IPPROTO_ICMPV6)
		return drop(skb, REASON_GATEWAY_CLOSED);
	if (echo_reply(skb, &f.eth, offset, ICMP_ECHO_V6, ICMP_ECHO_REPLY_V6))
		return drop(skb, REASON_GATEWAY_CLOSED);
	addr = f.ip.saddr;
	f.ip.saddr = f.ip.daddr;
	f.ip.daddr = addr;
	if (bpf_skb_store_bytes(skb, 0, &f, sizeof(f), 0))
		return drop(skb, REASON_MALFORMED);
	return send_back(skb);
}

/* With a VRF the stack answers; ICMP to the gateway is all it gets. */
static __always_inline int gateway_ip(struct __sk_buff *skb, struct context *ctx, const struct config *cfg)
{
	__u8 nexthdr;

	if (!cfg->vrf)
		return ctx->v4 ? gateway_echo_v4(skb) : gateway_echo_v6(skb);
	if (bpf_skb_load_bytes(skb, ETH_HLEN + (ctx->v4 ? 9 : 6), &nexthdr, 1))
		return drop(skb, REASON_MALFORMED);
	if (!ctx->v4 && nexthdr == NEXTHDR_FRAGMENT &&
	    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(struct ipv6hdr), &nexthdr, 1))
		return drop(skb, REASON_MALFORMED);
	if (nexthdr != (ctx->v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return drop(skb, REASON_GATEWAY_CLOSED);
	return hand_up(skb);
}

SEC("tc")
int stage_gateway(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct port *port = bpf_map_lookup_elem(&ports, &ifindex);
	struct context *ctx = context();
	struct config *cfg = node();
	struct ethhdr eth;

	if (!port || !ctx || !cfg)
		return drop(skb, REASON_NO_PORT);
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return drop(skb, REASON_MALFORMED);
	if (eth.h_proto == bpf_htons(ETH_P_ARP))
		return gateway_arp(skb, port, cfg);
	if (!ctx->v4) {
		struct {
			struct ipv6hdr ip;
			__u8 type;
		} __attribute__((packed)) h;

		if (!bpf_skb_load_bytes(skb, ETH_HLEN, &h, sizeof(h)) && h.ip.nexthdr == IPPROTO_ICMPV6 &&
		    (h.type == ICMPV6_NEIGHBOUR_SOLICITATION || h.type == ICMPV6_NEIGHBOUR_ADVERTISEMENT))
			return gateway_nd(skb, port, cfg);
	}
	return gateway_ip(skb, ctx, cfg);
}
