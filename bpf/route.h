/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Route: whose is the destination? Blocks have few distinct lengths in a network, so one exact look-up
 * for each length (longest first) is a third of the cost of a longest-prefix trie. Next: deliver, error.
 */
#pragma once

#include "lib/packet.h"

#define ICMP_UNREACHABLE_V4 3
#define ICMP_UNREACHABLE_V6 1

/* The first bits of a 32-bit word of an address; 0 to 32 of them. */
static __always_inline __be32 mask_word(__be32 word, int bits)
{
	if (bits <= 0)
		return 0;
	if (bits >= 32)
		return word;
	return word & bpf_htonl(~0u << (32 - bits));
}

static __always_inline struct block *find_block(const struct context *ctx)
{
	struct block_key key;
	struct block *block;

#pragma unroll
	for (int i = 0; i < BLOCK_LENGTHS; i++) {
		int bits = ctx->bits[i];

		if (!bits)
			return NULL;
		key.network_bits = ctx->network << 8 | bits;
		key.prefix.be32[0] = mask_word(ctx->dst.be32[0], bits);
		key.prefix.be32[1] = mask_word(ctx->dst.be32[1], bits - 32);
		key.prefix.be32[2] = mask_word(ctx->dst.be32[2], bits - 64);
		key.prefix.be32[3] = mask_word(ctx->dst.be32[3], bits - 96);
		block = bpf_map_lookup_elem(&blocks, &key);
		if (block)
			return block;
	}
	return NULL;
}

SEC("tc")
int stage_route(struct __sk_buff *skb)
{
	struct context *ctx = context();
	struct endpoint_key key;
	struct endpoint *endpoint;
	struct block *block;

	if (!ctx)
		return TC_ACT_SHOT;
	block = find_block(ctx);
	if (!block) /* "administratively prohibited": the one code that UDP sockets see at once */
		return refuse(skb, ctx, REASON_NO_ROUTE, ctx->v4 ? ICMP_UNREACHABLE_V4 : ICMP_UNREACHABLE_V6,
			      ctx->v4 ? 13 : 1, 0);
	if (!(block->flags & BLOCK_LOCAL)) {
		ctx->peer = block->peer;
		ctx->sid = block->sid;
		return go_to(skb, STAGE_DELIVER);
	}
	key.network = ctx->network;
	key.addr = ctx->dst;
	endpoint = bpf_map_lookup_elem(&endpoints, &key);
	if (!endpoint) /* host unreachable, address unreachable */
		return refuse(skb, ctx, REASON_NO_ENDPOINT, ctx->v4 ? ICMP_UNREACHABLE_V4 : ICMP_UNREACHABLE_V6,
			      ctx->v4 ? 1 : 3, 0);
	ctx->ifindex = endpoint->ifindex;
	ctx->mac = endpoint->mac;
	ctx->mtu = endpoint->mtu;
	return go_to(skb, STAGE_DELIVER);
}
