/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which way does the host itself send a packet that leaves the overlay? Its tables and rules are asked as if the packet had
 * come in at lc-host and were to be forwarded; only that interface has to allow forwarding.
 */
#pragma once

#include "lookup.h"

#define AF_INET_ 2
#define AF_INET6_ 10

static __always_inline struct host *this_node(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&this_host, &zero);
}

static __always_inline bool is_own_address(const union addr *addr)
{
	return bpf_map_lookup_elem(&addresses, addr);
}

/* The address that the host has as its own. False: none of that family. */
static __always_inline bool own_address(union addr *addr, const struct host *host, bool v4)
{
	if (!v4) {
		*addr = host->v6;
		return !is_unspecified(addr);
	}
	map_v4(addr, host->v4);
	return host->v4;
}

static __always_inline struct external *find_external(const struct context *ctx, const union addr *addr)
{
	struct external_key key = { .prefixlen = 160,
				    .slot = IN_FAMILY(SLOT(ctx->generation), ctx->v4),
				    .addr = *addr };

	return bpf_map_lookup_elem(&externals, &key);
}

static __always_inline void ask_routes(struct bpf_fib_lookup *fib, const struct context *ctx, const union addr *src)
{
	if (ctx->v4) {
		fib->family = AF_INET_;
		fib->tos = ctx->tos & ~ECN_MASK;
		fib->ipv4_src = src->be32[3];
		fib->ipv4_dst = ctx->key.dst.be32[3];
		return;
	}
	fib->family = AF_INET6_;
	__builtin_memcpy(fib->ipv6_src, src, sizeof(*src));
	__builtin_memcpy(fib->ipv6_dst, &ctx->key.dst, sizeof(ctx->key.dst));
}

static __always_inline void keep_gateway(struct context *ctx, const struct bpf_fib_lookup *fib)
{
	if (fib->family == AF_INET_)
		map_v4(&ctx->gateway, fib->ipv4_dst);
	else
		__builtin_memcpy(&ctx->gateway, fib->ipv6_dst, sizeof(ctx->gateway));
}

/*
 * Look the way out up for the context's packet, whose largest piece on the wire has size bytes. The context gets interface, next hop,
 * MTU, and the MAC addresses if they are known. Packets are routed by the source that their sender gave them, as the kernel routes before it
 * masquerades; answers by that which they leave with, so that they go where the question came from. 0, or the reason why there is no
 * way; TOO_BIG: the context has the MTU.
 */
__noinline int find_way_out(struct __sk_buff *skb, __u32 size)
{
	struct context *ctx = context();
	struct host *host = this_node();
	struct bpf_fib_lookup fib = {};
	struct egress *egress;
	__u32 index, mtu = 0;
	long ret;

	if (!ctx || !host || !host->stack)
		return REASON_NO_EGRESS;
	fib.ifindex = host->stack;
	fib.tot_len = size;
	fib.l4_protocol = ctx->key.protocol;
	fib.sport = ctx->key.sport;
	fib.dport = ctx->key.dport;
	ask_routes(&fib, ctx, ctx->reply && ctx->outside.translated ? &ctx->rewrite.src : &ctx->key.src);
	ret = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	ctx->mtu = fib.mtu_result;
	if (ret == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return REASON_TOO_BIG;
	if (ret != BPF_FIB_LKUP_RET_SUCCESS && ret != BPF_FIB_LKUP_RET_NO_NEIGH)
		return REASON_NO_EGRESS;
	index = fib.ifindex;
	egress = bpf_map_lookup_elem(&egresses, &index);
	if (!egress)
		return REASON_NO_EGRESS;
	ctx->out = index;
	ctx->out_flags = egress->flags;
	ctx->outside.neighbour = ret == BPF_FIB_LKUP_RET_SUCCESS;
	if (!ctx->outside.neighbour) { /* then there is the size of the packet still where the MTU would be */
		bpf_check_mtu(skb, index, &mtu, 0, 0);
		ctx->mtu = mtu;
	}
	__builtin_memcpy(&ctx->out_dst, fib.dmac, ETH_ALEN);
	__builtin_memcpy(&ctx->out_src, fib.smac, ETH_ALEN);
	keep_gateway(ctx, &fib);
	return 0;
}
