/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Masquerade: choose the port, or the identifier of an ICMP query, that stands for a container outside. It is taken by the entry of the way
 * back, so that no two flows can have the same; what a process of the host listens at or has connected, or what is published, is
 * left alone. Next: deliver, error.
 */
#pragma once

#include "exit.h"

#define MASQUERADE_TRIES 128
#define MASQUERADE_PATIENT 8 /* of which so many leave alone what closed less than a minute ago */

struct search {
	struct __sk_buff *skb;
	struct flow_key back;
	struct flow flow;
	__u32 first; /* port */
	__u32 range;
	__u32 at; /* place in the range */
	int reason;
};

/* Has the host a socket that would get the answers? */
static __noinline int has_socket(struct __sk_buff *skb, const struct flow_key *back, __u32 v4)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__u32 len = v4 ? sizeof(tuple.ipv4) : sizeof(tuple.ipv6);

	if (!back)
		return false;
	if (v4) {
		tuple.ipv4.saddr = back->src.be32[3];
		tuple.ipv4.daddr = back->dst.be32[3];
		tuple.ipv4.sport = back->sport;
		tuple.ipv4.dport = back->dport;
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &back->src, sizeof(back->src));
		__builtin_memcpy(tuple.ipv6.daddr, &back->dst, sizeof(back->dst));
		tuple.ipv6.sport = back->sport;
		tuple.ipv6.dport = back->dport;
	}
	if (back->protocol == IPPROTO_TCP)
		sk = bpf_skc_lookup_tcp(skb, &tuple, len, BPF_F_CURRENT_NETNS, 0);
	else
		sk = bpf_sk_lookup_udp(skb, &tuple, len, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

static __always_inline bool is_the_hosts(struct __sk_buff *skb, const struct context *ctx, const struct flow_key *back)
{
	if (is_icmp(back))
		return false;
	return find_published(ctx, &ctx->rewrite.src, ctx->rewrite.sport) || has_socket(skb, back, ctx->v4);
}

/* Try one; the next one is at random: a walk in steps would miss what is free where others have ports in a pattern. 1: the search is over. */
static long try_port(__u32 i, struct search *s)
{
	struct context *ctx = context();
	__be16 port = bpf_htons(s->first + s->at);

	if (!ctx) {
		s->reason = REASON_CONNTRACK_FULL;
		return 1;
	}
	s->at = bpf_get_prandom_u32() % s->range;
	ctx->rewrite.sport = port;
	if (is_icmp(&s->back))
		s->back.sport = port;
	else
		s->back.dport = port;
	if (is_the_hosts(s->skb, ctx, &s->back))
		return 0;
	s->reason = claim(&s->back, &s->flow, i < MASQUERADE_PATIENT ? PLACE_KEPT : PLACE_KEPT_PRESSED);
	if (s->reason == REASON_FLOW_CLASH) {
		s->reason = REASON_PORTS_EXHAUSTED;
		return 0;
	}
	return 1;
}

/*
 * The port to try first. What opens again over a closed flow has its port, whose way back is to go with that. Else one follows from the container's
 * own, so that a container which uses a port again meets a server that remembers it as it would without us.
 */
static __noinline int first_try(void)
{
	struct context *ctx = context();
	struct flow *old = ctx ? find_flow(&ctx->key) : NULL;
	void *table = flow_table();
	struct flow_key back;
	struct flow *there;
	__be16 port;

	if (!old || !table || !(old->flags & FLOW_TRANSLATED) || ctx->key.protocol != IPPROTO_TCP)
		return ctx ? bpf_ntohs(ctx->key.sport) : 0;
	port = old->to.sport;
	opposite(&back, &ctx->key, old);
	there = bpf_map_lookup_elem(table, &back);
	if (there && leads_back(there, &ctx->key))
		bpf_map_delete_elem(table, &back);
	return bpf_ntohs(port);
}

static __always_inline enum reason choose_port(struct __sk_buff *skb, struct context *ctx, const struct config *cfg)
{
	struct search s = { .skb = skb, .reason = REASON_PORTS_EXHAUSTED, .first = cfg->first_port };

	s.range = cfg->last_port - cfg->first_port + 1;
	if (!s.range || cfg->last_port < cfg->first_port)
		return REASON_PORTS_EXHAUSTED;
	s.at = (first_try() + 0x10000 * s.range - s.first) % s.range;
	far_key(&s.back, ctx);
	if (!begin_back(skb, &s.flow, ctx))
		return REASON_NO_PORT;
	bpf_loop(MASQUERADE_TRIES, try_port, &s, 0);
	return s.reason;
}

SEC("tc")
int stage_masquerade(struct __sk_buff *skb)
{
	struct context *ctx = come_to(skb, STAGE_MASQUERADE);
	struct config *cfg;
	enum reason reason;

	if (!ctx)
		return TC_ACT_SHOT;
	cfg = node(ctx->generation);
	if (!cfg)
		return drop(skb, REASON_NO_NETWORK);
	if (opens_nothing(ctx)) /* what is left of a flow that went elsewhere */
		return drop(skb, REASON_NO_FLOW);
	if (ctx->known)
		reason = check_translation(ctx);
	else
		reason = REASON_NONE;
	if (!reason)
		reason = choose_port(skb, ctx, cfg);
	if (reason)
		return refuse_exit(skb, ctx, reason);
	ctx->outside.reserved = 1;
	return go_to(skb, STAGE_DELIVER);
}
