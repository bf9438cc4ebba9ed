/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Error: turn the refused packet, in place, into the ICMP error that tells its sender why: from the
 * gateway, about the addresses that the sender knows. RFC 792, RFC 1812 4.3.2.7, RFC 4443 2.4. About a frame that was to be bridged,
 * where there is no gateway between, and to the host's own stack, which takes no packet from its own address, it comes from whom that was for. What
 * another node sent goes back there. Ends the pipeline.
 */
#pragma once

#include "lib/budget.h"
#include "forward.h"
#include "gateway.h"
#include "uplink.h"

#define QUOTE_V4 548 /* 576 bytes in all, RFC 1812 4.3.2.3 */
#define QUOTE_V6 QUOTE_MAX
#define QUOTE_MIN 20   /* a bare IP header */
#define ERROR_TOS 0xc0 /* RFC 1812 4.3.2.5 */

#define ICMPV6_REDIRECT 137

#define BUDGET_BURST 50
#define BUDGET_NS 1000000 /* one more answer every millisecond */

struct icmp4_answer {
	struct ethhdr eth;
	struct iphdr ip;
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be16 unused;
	__be16 mtu;
} __attribute__((packed));

struct icmp6_answer {
	struct ethhdr eth;
	struct ipv6hdr ip;
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be32 mtu;
} __attribute__((packed));

#define GROW_V4 (sizeof(struct icmp4_answer) - ETH_HLEN) /* 28 */
#define GROW_V6 (sizeof(struct icmp6_answer) - ETH_HLEN) /* 48 */

_Static_assert(GROW_V4 == 28 && GROW_V6 == 48, "answers");

/*
 * Internet checksum, not folded, of len bytes (QUOTE_MIN to QUOTE_MAX) of the packet from the IP header on.
 * bpf_csum_diff takes 512 bytes at once. Negative on failure.
 */
static __noinline __s64 quote_checksum(struct __sk_buff *skb, __u64 len, __u32 sum)
{
	__u32 zero = 0;
	struct quote *quote = bpf_map_lookup_elem(&quotes, &zero);
	__s64 total = sum;
	__u32 left;

	/*
	 * len is 64 bits wide, and opaque before each check: what is checked is the register that is
	 * used, and the checks stay two. Older verifiers learn nothing from one for 0.
	 */
	asm volatile("" : "+r"(len));
	if (!quote || len > QUOTE_MAX)
		return -1;
	asm volatile("" : "+r"(len));
	if (len < QUOTE_MIN)
		return -1;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, quote->bytes, len))
		return -1;
	quote->bytes[len] = 0;
	quote->bytes[len + 1] = 0;
	quote->bytes[len + 2] = 0;
	left = (len + 3) & ~3u;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u32 chunk = left > 512 ? 512 : left;

		if (!chunk)
			break;
		total = bpf_csum_diff(NULL, 0, (void *)(quote->bytes + i * 512), chunk & 0x3fc, (__u32)total);
		if (total < 0)
			return -1;
		left -= chunk;
	}
	return (__u32)total;
}

/*
 * Remove what lies behind the first len bytes (QUOTE_MIN to QUOTE_MAX) from the IP header on. The kernel does not cut packets at their end that
 * were encapsulated before: bytes go at the front, and what is to stay is written over those that are left.
 */
static __noinline bool cut_encapsulated(struct __sk_buff *skb, __u64 len)
{
	__u32 zero = 0;
	struct quote *quote = bpf_map_lookup_elem(&quotes, &zero);
	__s32 surplus = skb->len - ETH_HLEN - (__u32)len;

	asm volatile("" : "+r"(len));
	if (!quote || len > QUOTE_MAX)
		return false;
	asm volatile("" : "+r"(len));
	if (len < QUOTE_MIN)
		return false;
	return !bpf_skb_load_bytes(skb, ETH_HLEN, quote->bytes, len) &&
	       !bpf_skb_adjust_room(skb, -surplus, BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_store_bytes(skb, ETH_HLEN, quote->bytes, len, BPF_F_RECOMPUTE_CSUM);
}

/* Cut the packet to what is quoted. Of one that is still to be segmented nothing can be cut where it was encapsulated before. */
static __always_inline bool trim(struct __sk_buff *skb, __u32 quoted)
{
	if (!skb->gso_size && skb->len <= ETH_HLEN + quoted)
		return true;
	if (!bpf_skb_change_tail(skb, ETH_HLEN + quoted, 0))
		return true;
	return !skb->gso_size && cut_encapsulated(skb, quoted);
}

/* RFC 1122 3.2.2: never about an error, a later fragment, or what no single host sent. */
static __always_inline bool may_quote_v4(struct __sk_buff *skb, const struct iphdr *ip)
{
	__u8 type;

	if (ip->frag_off & bpf_htons(IP_OFFSET))
		return false;
	if (bpf_ntohl(ip->daddr) >> 28 >= 14)
		return false;
	if (ip->protocol != IPPROTO_ICMP)
		return true;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + ip->ihl * 4, &type, 1))
		return false;
	return type == ICMP_ECHO_V4 || type == ICMP_ECHO_REPLY_V4 || type == ICMP_TIMESTAMP_V4 ||
	       type == ICMP_TIMESTAMP_REPLY_V4;
}

/* Who is told, and by whom. */
struct told {
	struct mac to;
	struct mac from;
	union addr by; /* 0: whom the packet was for */
};

static __always_inline void tell_container(struct told *told, const struct context *ctx, const struct port *port,
					   const struct config *cfg)
{
	told->to = port->mac;
	told->from = ctx->bridged ? ctx->to : cfg->gateway;
	if (ctx->bridged)
		return;
	if (ctx->v4)
		map_v4(&told->by, port->gateway4);
	else
		told->by = port->gateway6;
}

/* Outside, the node speaks for itself, by the address that was asked if it is one of its own; back the way that the packet came. */
static __always_inline bool tell_outside(struct __sk_buff *skb, struct told *told, const struct context *ctx)
{
	struct ethhdr *eth = packet_start(skb);
	struct host *host = this_node();

	if (!host || (void *)(eth + 1) > packet_end(skb))
		return false;
	__builtin_memcpy(&told->to, eth->h_source, ETH_ALEN);
	__builtin_memcpy(&told->from, eth->h_dest, ETH_ALEN);
	told->by = ctx->key.dst;
	return is_own_address(&ctx->key.dst) || own_address(&told->by, host, ctx->v4);
}

static __always_inline void tell_host(struct told *told, const struct context *ctx, const struct config *cfg)
{
	struct host *host = this_node();

	if (ctx->outside.side != OUTER_HOST || !host)
		return; /* on lo there are no MAC addresses */
	told->to = host->mac;
	told->from = cfg->gateway;
}

/* Who is told? False: nobody can be. */
static __always_inline bool find_told(struct __sk_buff *skb, struct told *told, const struct context *ctx,
				      const struct config *cfg)
{
	struct host *host = this_node();
	struct port *port;

	switch (ctx->outside.side) {
	case OUTER_OUTSIDE:
		return tell_outside(skb, told, ctx);
	case OUTER_HOST:
	case OUTER_LOOPBACK:
		tell_host(told, ctx, cfg);
		return true;
	}
	if (ctx->underlay) /* of a known flow nobody has asked yet who sent it */
		return ctx->outside.bare && !check_outer(ctx->v4 ? IPPROTO_IPIP : IPPROTO_IPV6) && host &&
		       own_address(&told->by, host, ctx->v4);
	port = find_port(skb->ifindex, ctx->generation);
	if (port)
		tell_container(told, ctx, port, cfg);
	return port;
}

/* The answer is complete, behind its Ethernet header, and goes back. */
static __always_inline int return_answer(struct __sk_buff *skb, struct context *ctx, const struct config *cfg,
					 __u16 len)
{
	struct nexthop *nexthop;
	enum reason reason;

	if (!ctx->underlay)
		return bpf_redirect(skb->ifindex, ctx->outside.side == OUTER_LOOPBACK ? BPF_F_INGRESS : 0);
	nexthop = find_nexthop(ctx);
	if (!nexthop || !nexthop->ifindex)
		return drop(skb, REASON_NO_NEXTHOP);
	ctx->sid = ctx->back;
	compose_sid(&ctx->source, cfg->locator, cfg->locator_bits, FUNCTION_SOURCE, named(ctx, ctx->network));
	ctx->l3_len = len;
	ctx->tos = ctx->v4 ? ERROR_TOS : 0;
	reason = cfg->srh ? encapsulate(skb, ctx, true) : encapsulate(skb, ctx, false);
	return reason ? drop(skb, reason) : transmit(skb, nexthop);
}

static __always_inline int error_v4(struct __sk_buff *skb, struct context *ctx, const struct told *told,
				    const struct config *cfg)
{
	struct icmp4_answer a = {};
	__u32 quoted = ctx->l3_len;
	struct iphdr ip;
	__u32 head[2];
	__s64 sum;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || !may_quote_v4(skb, &ip))
		return TC_ACT_SHOT;
	if (quoted > QUOTE_V4)
		quoted = QUOTE_V4;
	if (!trim(skb, quoted))
		return drop(skb, REASON_ICMP_FAILED);

	__builtin_memcpy(a.eth.h_dest, &told->to, ETH_ALEN);
	__builtin_memcpy(a.eth.h_source, &told->from, ETH_ALEN);
	a.eth.h_proto = bpf_htons(ETH_P_IP);
	a.ip.version = 4;
	a.ip.ihl = 5;
	a.ip.tos = ERROR_TOS;
	a.ip.tot_len = bpf_htons(GROW_V4 + quoted);
	a.ip.frag_off = bpf_htons(IP_DF);
	a.ip.ttl = OUTER_HOP_LIMIT;
	a.ip.protocol = IPPROTO_ICMP;
	a.ip.saddr = is_unspecified(&told->by) ? ip.daddr : told->by.be32[3];
	a.ip.daddr = ip.saddr;
	a.ip.check = fold(bpf_csum_diff(NULL, 0, (void *)&a.ip, sizeof(a.ip), 0));
	a.type = ctx->icmp_type;
	a.code = ctx->icmp_code;
	a.mtu = bpf_htons(ctx->icmp_mtu);
	__builtin_memcpy(head, &a.type, sizeof(head));
	sum = bpf_csum_diff(NULL, 0, head, sizeof(head), 0);
	sum = quote_checksum(skb, quoted, sum);
	if (sum < 0)
		return drop(skb, REASON_ICMP_FAILED);
	a.checksum = fold(sum);

	if (bpf_skb_adjust_room(skb, GROW_V4, BPF_ADJ_ROOM_MAC, 0) ||
	    bpf_skb_store_bytes(skb, 0, &a, sizeof(a), BPF_F_RECOMPUTE_CSUM))
		return drop(skb, REASON_ICMP_FAILED);
	return return_answer(skb, ctx, cfg, GROW_V4 + quoted);
}

/*
 * RFC 4443 2.4 (e): never about an error, a redirect, or what went to many. A later fragment is
 * left to the answer about the first.
 */
static __always_inline bool may_quote_v6(struct __sk_buff *skb, const struct ipv6hdr *ip)
{
	struct context *ctx = context();
	__u8 type;

	if (ip->daddr.in6_u.u6_addr8[0] == 0xff)
		return false;
	if (!ctx || !find_upper(skb, ETH_HLEN + sizeof(*ip), ip->nexthdr) || ctx->upper.later)
		return false;
	if (ctx->upper.protocol != IPPROTO_ICMPV6)
		return true;
	if (bpf_skb_load_bytes(skb, ctx->upper.offset, &type, 1))
		return false;
	return type >= ICMP_ECHO_V6 && type != ICMPV6_REDIRECT;
}

static __always_inline int error_v6(struct __sk_buff *skb, struct context *ctx, const struct told *told,
				    const struct config *cfg)
{
	struct {
		struct pseudo_header pseudo;
		__u8 icmp[8];
	} head = {};
	struct icmp6_answer a = {};
	__u32 quoted = ctx->l3_len;
	struct ipv6hdr ip;
	__s64 sum;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || !may_quote_v6(skb, &ip))
		return TC_ACT_SHOT;
	if (quoted > QUOTE_V6)
		quoted = QUOTE_V6;
	if (!trim(skb, quoted))
		return drop(skb, REASON_ICMP_FAILED);

	__builtin_memcpy(a.eth.h_dest, &told->to, ETH_ALEN);
	__builtin_memcpy(a.eth.h_source, &told->from, ETH_ALEN);
	a.eth.h_proto = bpf_htons(ETH_P_IPV6);
	a.ip.version = 6;
	a.ip.payload_len = bpf_htons(GROW_V6 - sizeof(a.ip) + quoted);
	a.ip.nexthdr = IPPROTO_ICMPV6;
	a.ip.hop_limit = OUTER_HOP_LIMIT;
	__builtin_memcpy(&a.ip.saddr, &told->by, sizeof(a.ip.saddr));
	if (is_unspecified(&told->by))
		__builtin_memcpy(&a.ip.saddr, &ip.daddr, sizeof(a.ip.saddr));
	__builtin_memcpy(&a.ip.daddr, &ip.saddr, sizeof(a.ip.daddr));
	a.type = ctx->icmp_type;
	a.code = ctx->icmp_code;
	a.mtu = bpf_htonl(ctx->icmp_mtu);
	__builtin_memcpy(&head.pseudo.src, &a.ip.saddr, 32);
	head.pseudo.len = bpf_htonl(GROW_V6 - sizeof(a.ip) + quoted);
	head.pseudo.nexthdr = bpf_htonl(IPPROTO_ICMPV6);
	__builtin_memcpy(head.icmp, &a.type, sizeof(head.icmp));
	sum = bpf_csum_diff(NULL, 0, (void *)&head, sizeof(head), 0);
	sum = quote_checksum(skb, quoted, sum);
	if (sum < 0)
		return drop(skb, REASON_ICMP_FAILED);
	a.checksum = fold(sum);

	if (bpf_skb_adjust_room(skb, GROW_V6, BPF_ADJ_ROOM_MAC, 0) ||
	    bpf_skb_store_bytes(skb, 0, &a, sizeof(a), BPF_F_RECOMPUTE_CSUM))
		return drop(skb, REASON_ICMP_FAILED);
	return return_answer(skb, ctx, cfg, GROW_V6 + quoted);
}

SEC("tc")
int stage_error(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_ERROR);
	struct told told = {};
	struct config *cfg;

	if (!ctx)
		return TC_ACT_SHOT;
	cfg = node(ctx->generation);
	if (!cfg || !find_told(skb, &told, ctx, cfg))
		return drop(skb, REASON_NO_PORT);
	if (!spend(BUDGET_ERRORS, skb->ifindex, BUDGET_BURST, BUDGET_NS))
		return drop(skb, REASON_ICMP_LIMITED);
	return ctx->v4 ? error_v4(skb, ctx, &told, cfg) : error_v6(skb, ctx, &told, cfg);
}
