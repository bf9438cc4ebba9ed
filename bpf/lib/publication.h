/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Ports of this node's addresses that are containers'. */
#pragma once

#include "fib.h"
#include "flow.h"

static __always_inline bool is_loopback(const union addr *addr)
{
	if (is_mapped_v4(addr))
		return (addr->be32[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !(addr->be32[0] | addr->be32[1] | addr->be32[2]) && addr->be32[3] == bpf_htonl(1);
}

/* For whom is a port of that address published? It is one of this node. */
static __always_inline struct publication *find_published(const struct context *ctx, const union addr *addr,
							  __be16 port)
{
	struct publication_key key = {
		.slot = SLOT(ctx->generation), .addr = *addr, .port = port, .protocol = ctx->key.protocol, .v4 = ctx->v4
	};
	struct publication *publication;

	if (key.protocol != IPPROTO_TCP && key.protocol != IPPROTO_UDP)
		return NULL;
	publication = bpf_map_lookup_elem(&published, &key);
	if (publication)
		return publication;
	__builtin_memset(&key.addr, 0, sizeof(key.addr));
	return bpf_map_lookup_elem(&published, &key);
}

/* The same of any address. */
static __always_inline struct publication *find_publication(const struct context *ctx, const union addr *addr,
							    __be16 port)
{
	return is_own_address(addr) || is_loopback(addr) ? find_published(ctx, addr, port) : NULL;
}

/* A known flow that is masqueraded to the same container keeps the port that it has. before: what its packets became. */
static __always_inline void keep_port(struct context *ctx, const struct rewrite *before)
{
	if (!ctx->outside.masquerade || !same_addr(&before->dst, &ctx->rewrite.dst) ||
	    before->dport != ctx->rewrite.dport)
		return;
	ctx->rewrite = *before;
	ctx->outside.masquerade = 0;
}

/* The packet goes to the container instead; who sent it stays. */
static __always_inline void publish(struct context *ctx, const struct publication *publication)
{
	ctx->outside.translated = 1;
	ctx->rewrite.src = ctx->key.src;
	ctx->rewrite.sport = ctx->key.sport;
	ctx->rewrite.dst = publication->addr;
	ctx->rewrite.dport = publication->port;
}
