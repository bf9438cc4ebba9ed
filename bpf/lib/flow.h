/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which flow does a packet belong to? The addresses are in the key already; this fills in protocol and ports
 * from the transport header, from the first fragment, or from what an ICMP error quotes.
 */
#pragma once

#include "packet.h"

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

#define IPPROTO_UDPLITE_ 136
#define IPPROTO_SCTP_ 132

#define IP_MF 0x2000

/* Queries of ICMP and their answers, which carry an identifier. */
#define ICMP_ECHO_REPLY_V4 0
#define ICMP_ECHO_V4 8
#define ICMP_TIMESTAMP_V4 13
#define ICMP_TIMESTAMP_REPLY_V4 14
#define ICMP_ECHO_V6 128
#define ICMP_ECHO_REPLY_V6 129

/* Errors, which quote the packet that they are about. */
#define ICMP_UNREACHABLE_V4 3
#define ICMP_TIME_EXCEEDED_V4 11
#define ICMP_PARAMETER_V4 12
#define ICMP_UNREACHABLE_V6 1
#define ICMP_PACKET_TOO_BIG_V6 2
#define ICMP_TIME_EXCEEDED_V6 3
#define ICMP_PARAMETER_V6 4

struct tcp_start {
	__be16 sport;
	__be16 dport;
	__be32 seq;
	__be32 ack;
	__u8 offset; /* of the payload, in its upper half, in words */
	__u8 flags;
};

struct icmp_start {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be16 id;
	__be16 seq;
};

/* Where the transport header is, and what part of a packet this one is. */
struct place {
	__u32 offset; /* of the transport header */
	__u32 end;    /* of the IP packet; more than a GSO packet's own header says */
	__be32 id;    /* of the fragmented packet */
	__u8 protocol;
};

/*
 * The other message of a query; 0xff: the type is neither a query nor an answer. A function of its own, so that what the
 * verifier has to follow of a caller does not branch with the types.
 */
__noinline int other_type(__u32 protocol, __u32 type)
{
	if (protocol == IPPROTO_ICMPV6)
		return type == ICMP_ECHO_V6 || type == ICMP_ECHO_REPLY_V6 ? type ^ 1 : 0xff;
	if (type == ICMP_ECHO_V4 || type == ICMP_ECHO_REPLY_V4)
		return type ^ ICMP_ECHO_V4;
	if (type == ICMP_TIMESTAMP_V4 || type == ICMP_TIMESTAMP_REPLY_V4)
		return type ^ ICMP_TIMESTAMP_V4 ^ ICMP_TIMESTAMP_REPLY_V4;
	return 0xff;
}

static __always_inline bool is_error(__u8 protocol, __u8 type)
{
	if (protocol == IPPROTO_ICMPV6)
		return type >= ICMP_UNREACHABLE_V6 && type <= ICMP_PARAMETER_V6;
	return type == ICMP_UNREACHABLE_V4 || type == ICMP_TIME_EXCEEDED_V4 || type == ICMP_PARAMETER_V4;
}

static __always_inline bool is_icmp(const struct flow_key *key)
{
	return key->protocol == IPPROTO_ICMP || key->protocol == IPPROTO_ICMPV6;
}

/* An answer opens no flow. */
static __always_inline bool is_answer(const struct flow_key *key)
{
	__u16 type = bpf_ntohs(key->dport);

	if (key->protocol == IPPROTO_ICMPV6)
		return type == ICMP_ECHO_REPLY_V6;
	return key->protocol == IPPROTO_ICMP && (type == ICMP_ECHO_REPLY_V4 || type == ICMP_TIMESTAMP_REPLY_V4);
}

/* The key of the other direction; network: the one that this direction goes to. */
static __always_inline void turn(struct flow_key *to, const struct flow_key *key, __u32 network)
{
	__builtin_memset(to, 0, sizeof(*to));
	to->network = network;
	to->src = key->dst;
	to->dst = key->src;
	to->protocol = key->protocol;
	if (is_icmp(key)) {
		to->sport = key->sport;
		to->dport = bpf_htons(other_type(key->protocol, bpf_ntohs(key->dport)));
		return;
	}
	to->sport = key->dport;
	to->dport = key->sport;
}

/* Read the start of the transport header. What a frame has behind the IP packet is not part of that. */
static __always_inline bool load_transport(struct __sk_buff *skb, const struct place *at, void *to, __u32 len)
{
	return at->offset + len <= at->end && load(skb, at->offset, to, len);
}

static __always_inline enum reason parse_tcp(struct __sk_buff *skb, struct context *ctx, const struct place *at)
{
	struct tcp_start tcp;
	__u32 header;

	if (!load_transport(skb, at, &tcp, sizeof(tcp)))
		return REASON_MALFORMED;
	header = (tcp.offset >> 4) * 4;
	if (header < 20 || at->offset + header > at->end)
		return REASON_MALFORMED;
	ctx->key.sport = tcp.sport;
	ctx->key.dport = tcp.dport;
	ctx->tcp = tcp.flags;
	ctx->ack = bpf_ntohl(tcp.ack);
	ctx->seq = bpf_ntohl(tcp.seq);
	if (!(tcp.flags & TCP_RST))
		ctx->seq += at->end - at->offset - header + !!(tcp.flags & TCP_SYN) + !!(tcp.flags & TCP_FIN);
	return REASON_NONE;
}

/* What an error quotes, found: turned round it is the direction that the error itself travels. */
struct quoted {
	union addr src;
	union addr dst;
	__u32 offset; /* of its transport header */
	__u8 protocol;
};

static __always_inline bool find_quoted_v4(struct __sk_buff *skb, __u32 offset, struct quoted *q)
{
	struct iphdr ip;

	if (!load(skb, offset, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5 || ip.frag_off & bpf_htons(IP_OFFSET))
		return false;
	map_v4(&q->src, ip.saddr);
	map_v4(&q->dst, ip.daddr);
	q->protocol = ip.protocol;
	q->offset = offset + ip.ihl * 4;
	return true;
}

static __always_inline bool find_quoted_v6(struct __sk_buff *skb, __u32 offset, struct quoted *q)
{
	struct context *ctx = context();
	struct ipv6hdr ip;

	if (!ctx || !load(skb, offset, &ip, sizeof(ip)) || ip.version != 6)
		return false;
	if (!find_upper(skb, offset + sizeof(ip), ip.nexthdr) || ctx->upper.later)
		return false;
	__builtin_memcpy(&q->src, &ip.saddr, sizeof(q->src));
	__builtin_memcpy(&q->dst, &ip.daddr, sizeof(q->dst));
	q->protocol = ctx->upper.protocol;
	q->offset = ctx->upper.offset;
	return true;
}

static __always_inline bool has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP_ ||
	       protocol == IPPROTO_UDPLITE_;
}

/*
 * An error belongs to the flow that it quotes, and travels like an answer there. Somebody who was not sent the
 * packet cannot complain of it: from a container, it has to be the quoted destination itself.
 */
__noinline int parse_error(struct __sk_buff *skb, __u32 offset, __u32 from_underlay)
{
	struct context *ctx = context();
	struct flow_key quoted = {};
	struct quoted q = {};
	__be16 ports[2];

	if (!ctx)
		return REASON_MALFORMED;
	if (ctx->v4 ? !find_quoted_v4(skb, offset, &q) : !find_quoted_v6(skb, offset, &q))
		return REASON_NO_FLOW;
	if (!same_addr(&q.src, &ctx->key.dst) || (!from_underlay && !same_addr(&q.dst, &ctx->key.src)))
		return REASON_NO_FLOW;
	quoted.src = q.src;
	quoted.dst = q.dst;
	quoted.protocol = q.protocol;
	if (has_ports(q.protocol)) {
		if (!load(skb, q.offset, ports, sizeof(ports)))
			return REASON_NO_FLOW;
		quoted.sport = ports[0];
		quoted.dport = ports[1];
	} else if (is_icmp(&quoted)) {
		struct icmp_start icmp;

		if (!load(skb, q.offset, &icmp, sizeof(icmp)) || other_type(q.protocol, icmp.type) == 0xff)
			return REASON_NO_FLOW;
		quoted.sport = icmp.id;
		quoted.dport = bpf_htons(icmp.type);
	}
	turn(&ctx->key, &quoted, ctx->key.network);
	ctx->kind = PACKET_ICMP_ERROR;
	ctx->quote = ctx->l4 + sizeof(struct icmp_start);
	ctx->quote_l4 = ctx->quote + (q.offset - offset);
	ctx->quoted = q.protocol;
	return REASON_NONE;
}

static __always_inline enum reason parse_icmp(struct __sk_buff *skb, struct context *ctx, const struct place *at,
					      bool from_underlay)
{
	struct icmp_start icmp;

	if (!load_transport(skb, at, &icmp, sizeof(icmp)))
		return REASON_MALFORMED;
	if (is_error(at->protocol, icmp.type))
		return parse_error(skb, at->offset + sizeof(icmp), from_underlay);
	if (other_type(at->protocol, icmp.type) == 0xff)
		return REASON_NO_FLOW;
	ctx->key.sport = icmp.id;
	ctx->key.dport = bpf_htons(icmp.type);
	return REASON_NONE;
}

static __always_inline enum reason parse_transport(struct __sk_buff *skb, struct context *ctx, const struct place *at,
						   bool from_underlay)
{
	__be16 ports[2];

	switch (at->protocol) {
	case IPPROTO_TCP:
		return parse_tcp(skb, ctx, at);
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE_:
	case IPPROTO_SCTP_:
		if (!load_transport(skb, at, ports, sizeof(ports)))
			return REASON_MALFORMED;
		ctx->key.sport = ports[0];
		ctx->key.dport = ports[1];
		return REASON_NONE;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return parse_icmp(skb, ctx, at, from_underlay);
	}
	ctx->key.sport = 0;
	ctx->key.dport = 0;
	return REASON_NONE;
}

static __always_inline void fragment_key(struct fragment_key *to, const struct context *ctx, __be32 id)
{
	to->network = ctx->key.network;
	to->id = id;
	to->src = ctx->key.src;
	to->dst = ctx->key.dst;
	to->protocol = ctx->v4 ? ctx->key.protocol : 0;
}

#define FRAGMENT_TICKS 30 /* a packet is put together within 30 s, or not at all: RFC 791, RFC 8200 4.5 */

static __always_inline __u32 tick(void)
{
	return bpf_ktime_get_coarse_ns() >> 30;
}

/* A first fragment tells the later ones; they are judged by its ports, never by their own bytes. */
__noinline int remember_fragment(__be32 id)
{
	struct context *ctx = context();
	struct fragment_key key;
	struct fragment value = {};

	if (!ctx)
		return 0;
	fragment_key(&key, ctx, id);
	value.protocol = ctx->key.protocol;
	value.sport = ctx->key.sport;
	value.dport = ctx->key.dport;
	value.seen = tick();
	return bpf_map_update_elem(&fragments, &key, &value, BPF_ANY);
}

__noinline int follow_fragment(__be32 id)
{
	struct context *ctx = context();
	struct fragment_key key;
	struct fragment *first;

	if (!ctx)
		return REASON_MALFORMED;
	fragment_key(&key, ctx, id);
	first = bpf_map_lookup_elem(&fragments, &key);
	if (!first || tick() - first->seen > FRAGMENT_TICKS)
		return REASON_FRAGMENT_UNKNOWN;
	ctx->key.protocol = first->protocol;
	ctx->key.sport = first->sport;
	ctx->key.dport = first->dport;
	return REASON_NONE;
}

/* position: where it lies in the payload, in bytes; 0 for the first. */
static __always_inline enum reason parse_fragment(struct __sk_buff *skb, struct context *ctx, const struct place *at,
						  __u32 position, bool from_underlay)
{
	enum reason reason;

	if (position) {
		ctx->kind = PACKET_LATER_FRAGMENT;
		reason = follow_fragment(at->id);
		/* It would lie over the flags that the first one was judged by: RFC 1858 3.2.2. */
		if (ctx->key.protocol == IPPROTO_TCP && position < 20)
			return REASON_FRAGMENT_TINY;
		return reason;
	}
	reason = parse_transport(skb, ctx, at, from_underlay);
	if (reason == REASON_MALFORMED)
		return REASON_FRAGMENT_TINY;
	if (reason || ctx->kind == PACKET_ICMP_ERROR)
		return reason;
	ctx->kind = PACKET_FIRST_FRAGMENT;
	remember_fragment(at->id);
	return REASON_NONE;
}

static __always_inline enum reason parse_flow_v4(struct __sk_buff *skb, struct context *ctx, __u32 offset,
						 bool from_underlay)
{
	struct place at = { .end = offset + ctx->l3_len };
	struct iphdr ip;
	__u32 position;

	if (!load(skb, offset, &ip, sizeof(ip)))
		return REASON_MALFORMED;
	at.offset = offset + ip.ihl * 4;
	ctx->l4 = ip.ihl * 4;
	at.id = ip.id;
	at.protocol = ip.protocol;
	ctx->key.protocol = at.protocol;
	position = (bpf_ntohs(ip.frag_off) & IP_OFFSET) * 8;
	if (position || ip.frag_off & bpf_htons(IP_MF))
		return parse_fragment(skb, ctx, &at, position, from_underlay);
	return parse_transport(skb, ctx, &at, from_underlay);
}

static __always_inline enum reason parse_flow_v6(struct __sk_buff *skb, struct context *ctx, __u32 offset,
						 bool from_underlay)
{
	struct place at = { .offset = offset + sizeof(struct ipv6hdr), .end = offset + ctx->l3_len };
	struct upper *upper = &ctx->upper;

	if (!load(skb, offset + offsetof(struct ipv6hdr, nexthdr), &at.protocol, sizeof(at.protocol)))
		return REASON_MALFORMED;
	ctx->l4 = sizeof(struct ipv6hdr);
	if (!is_extension(at.protocol)) {
		ctx->key.protocol = at.protocol;
		return parse_transport(skb, ctx, &at, from_underlay);
	}
	if (!find_upper(skb, at.offset, at.protocol))
		return REASON_MALFORMED;
	at.offset = upper->offset;
	ctx->l4 = at.offset - offset;
	at.protocol = upper->protocol;
	at.id = upper->id;
	ctx->key.protocol = at.protocol;
	if (at.protocol == NEXTHDR_ROUTING && !upper->later)
		return REASON_ROUTING_HEADER;
	if (upper->first || upper->later)
		return parse_fragment(skb, ctx, &at, upper->later, from_underlay);
	return parse_transport(skb, ctx, &at, from_underlay);
}

/*
 * Fill in the key of the IP packet at offset, whose header has been found whole and whose addresses and length are in
 * the context. A function of its own, which the verifier looks at once. 0, or the reason why it has no flow.
 */
__noinline int parse_flow(struct __sk_buff *skb, __u32 offset, __u32 from_underlay)
{
	struct context *ctx = context();

	if (!ctx)
		return REASON_MALFORMED;
	ctx->kind = PACKET_WHOLE;
	return ctx->v4 ? parse_flow_v4(skb, ctx, offset, from_underlay)
		       : parse_flow_v6(skb, ctx, offset, from_underlay);
}
