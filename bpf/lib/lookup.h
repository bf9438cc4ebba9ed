/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the tables say of networks, nodes and addresses, in the generation of the packet. */
#pragma once

#include "srv6.h"

static __always_inline struct network *find_network(const struct context *ctx, __u32 network)
{
	__u32 scope = SCOPE(network, ctx->generation);

	return bpf_map_lookup_elem(&networks, &scope);
}

/* The node that an address of the underlay, a SID or an outer source, belongs to. */
static __always_inline struct peer *find_peer(const struct context *ctx, const union addr *addr,
					      const struct config *cfg)
{
	struct peer_key key = { .locator = first_half(addr) & cfg->locator_mask, .slot = SLOT(ctx->generation) };

	return bpf_map_lookup_elem(&peers, &key);
}

/* The context's peer is the node that its SID belongs to. */
static __always_inline enum reason find_peer_of_sid(struct context *ctx, const struct config *cfg)
{
	struct peer *peer = find_peer(ctx, &ctx->sid, cfg);

	if (!peer)
		return REASON_NO_ROUTE;
	ctx->peer = peer->index;
	return REASON_NONE;
}

static __always_inline __u32 nexthop_index(const struct context *ctx)
{
	return SLOT(ctx->generation) * NEXTHOPS + ctx->peer;
}

static __always_inline struct nexthop *find_nexthop(const struct context *ctx)
{
	__u32 index = nexthop_index(ctx);

	return bpf_map_lookup_elem(&nexthops, &index);
}

static __always_inline struct endpoint *find_container(const struct context *ctx, __u32 network, const union addr *addr)
{
	struct endpoint_key key = { .scope = SCOPE(network, ctx->generation), .addr = *addr };

	return bpf_map_lookup_elem(&endpoints, &key);
}

/* The first bits of a 32-bit word of an address; 0 to 32 of them. */
static __always_inline __be32 mask_word(__be32 word, int bits)
{
	if (bits <= 0)
		return 0;
	if (bits >= 32)
		return word;
	return word & bpf_htonl(~0u << (32 - bits));
}

/*
 * Whose part of a network is the address in? Blocks have few distinct lengths in a network, so one exact look-up for each length (longest
 * first) is a third of the cost of a longest-prefix trie.
 */
static __always_inline struct block *find_block(const struct context *ctx, __u32 id, const struct network *network,
						const union addr *addr, bool v4)
{
	const __u8 *lengths = v4 ? network->bits4 : network->bits6;
	struct block_key key = { .scope = SCOPE(id, ctx->generation) };
	struct block *block;

#pragma unroll
	for (int i = 0; i < BLOCK_LENGTHS; i++) {
		int bits = lengths[i];

		if (!bits)
			return NULL;
		key.bits = bits;
		key.prefix.be32[0] = mask_word(addr->be32[0], bits);
		key.prefix.be32[1] = mask_word(addr->be32[1], bits - 32);
		key.prefix.be32[2] = mask_word(addr->be32[2], bits - 64);
		key.prefix.be32[3] = mask_word(addr->be32[3], bits - 96);
		block = bpf_map_lookup_elem(&blocks, &key);
		if (block)
			return block;
	}
	return NULL;
}
