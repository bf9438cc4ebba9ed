/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where MAC addresses of L2 networks are. Those of ports here and those that the topology declares are in a table. 02:4c and four
 * bytes stand for an address (IPv4, or the end of an IPv6 one), whose pool says which node has it. Any other is learned from frames of
 * other nodes, each of which lets its containers send from their own MAC addresses only.
 */
#pragma once

#include "conntrack.h"

/* How a MAC address begins that stands for an address. */
#define DERIVED_0 0x02
#define DERIVED_1 0x4c

/* The MAC address that a link-local address is made of. False: it is of another kind. */
static __always_inline bool eui64_mac(const union addr *addr, struct mac *mac)
{
	const __u8 *id = addr->u8 + 8;

	if (addr->be32[0] != bpf_htonl(0xfe800000) || addr->be32[1] || id[3] != 0xff || id[4] != 0xfe)
		return false;
	mac->u8[0] = id[0] ^ 2;
	mac->u8[1] = id[1];
	mac->u8[2] = id[2];
	mac->u8[3] = id[5];
	mac->u8[4] = id[6];
	mac->u8[5] = id[7];
	return true;
}

/* The block of the address that a MAC address stands for; NULL: it stands for none of this network. */
static __always_inline struct block *derived_block(const struct context *ctx, const struct network *network,
						   const struct mac *mac)
{
	bool v4 = is_unspecified(&network->base6);
	union addr addr = network->base6;
	__be32 rest;

	if (mac->u8[0] != DERIVED_0 || mac->u8[1] != DERIVED_1)
		return NULL;
	__builtin_memcpy(&rest, mac->u8 + 2, sizeof(rest));
	if (v4)
		map_v4(&addr, rest);
	else
		addr.be32[3] = rest;
	return find_block(ctx, ctx->key.network, network, &addr, v4);
}

static __always_inline struct station *find_declared(const struct context *ctx, const struct mac *mac)
{
	struct fdb_key key = { .scope = SCOPE(ctx->key.network, ctx->generation), .mac = *mac };

	return bpf_map_lookup_elem(&fdb, &key);
}

static __always_inline struct sighting *find_learned(const struct context *ctx, const struct mac *mac)
{
	struct sighting_key key = { .network = ctx->key.network, .mac = *mac };

	return bpf_map_lookup_elem(&learned, &key);
}

/* The node that has a locator, as the end of a frame's way: by function, or where a router takes frames. */
static __always_inline enum reason find_node(struct context *ctx, const struct config *cfg, const union addr *sid,
					     __u16 function)
{
	struct peer *peer = find_peer(ctx, sid, cfg);

	if (!peer)
		return REASON_UNKNOWN_MAC;
	ctx->outside.way = WAY_NODE;
	ctx->ifindex = 0;
	ctx->peer = peer->index;
	ctx->router = !!peer->network;
	ctx->sid = peer->sid_l2;
	if (is_unspecified(&ctx->sid))
		compose_sid(&ctx->sid, first_half(sid) & cfg->locator_mask, cfg->locator_bits, function,
			    ctx->key.network);
	return REASON_NONE;
}

/* Where is the MAC address? The context gets the port here, or the node and its SID. */
static __always_inline enum reason find_station(struct context *ctx, const struct config *cfg,
						const struct network *network, const struct mac *mac)
{
	struct station *station = find_declared(ctx, mac);
	struct sighting *sighting;
	struct block *block;
	union addr locator = {};

	if (station && station->ifindex) {
		ctx->outside.way = WAY_CONTAINER;
		ctx->ifindex = station->ifindex;
		ctx->mtu = station->mtu;
		ctx->direct = !!(station->flags & ENDPOINT_DIRECT);
		return REASON_NONE;
	}
	if (station)
		return find_node(ctx, cfg, &station->sid, FUNCTION_END_DT2U);
	block = derived_block(ctx, network, mac);
	if (block)
		return block->flags & BLOCK_LOCAL ? REASON_UNKNOWN_MAC
						  : find_node(ctx, cfg, &block->sid, FUNCTION_END_DT2U);
	sighting = find_learned(ctx, mac);
	if (!sighting)
		return REASON_UNKNOWN_MAC;
	__builtin_memcpy(&locator, &sighting->locator, sizeof(sighting->locator));
	return find_node(ctx, cfg, &locator, FUNCTION_END_DT2U);
}

static __always_inline void learn(const struct context *ctx, const struct config *cfg)
{
	struct sighting_key key = { .network = ctx->key.network, .mac = ctx->from };
	struct sighting *known = bpf_map_lookup_elem(&learned, &key);
	struct sighting value = { .locator = first_half(&ctx->source) & cfg->locator_mask, .seen = tick() };

	if (known && known->locator == value.locator && known->seen == value.seen)
		return;
	bpf_map_update_elem(&learned, &key, &value, BPF_ANY);
}

/* May the frame's source MAC address come from that node? One that only its frames tell of is learned. */
static __always_inline enum reason check_station(const struct context *ctx, const struct config *cfg,
						 const struct network *network)
{
	struct station *station = find_declared(ctx, &ctx->from);
	struct block *block;

	if (ctx->from.u8[0] & 1 || same_mac(ctx->from.u8, cfg->gateway.u8))
		return REASON_SPOOFED_MAC;
	if (station)
		return station->ifindex || station->peer != ctx->peer ? REASON_SPOOFED_MAC : REASON_NONE;
	block = derived_block(ctx, network, &ctx->from);
	if (!block) {
		learn(ctx, cfg);
		return REASON_NONE;
	}
	return block->flags & BLOCK_LOCAL || block->peer != ctx->peer ? REASON_SPOOFED_MAC : REASON_NONE;
}

/* May that node speak for the address? An address of no pool says nothing. */
static __always_inline bool speaks_for(const struct context *ctx, const struct network *network, const union addr *addr,
				       bool v4)
{
	struct block *block = find_block(ctx, ctx->key.network, network, addr, v4);

	return !block || (!(block->flags & BLOCK_LOCAL) && block->peer == ctx->peer);
}

/*
 * May the frame of another node come in? Its network has to be an L2 network of this node, and its source one that the node has. The
 * context gets what is said of the network. 0, or the reason why not. A function of its own, which the verifier looks at once.
 */
__noinline int admit(__u32 id)
{
	struct context *ctx = context();
	struct config *cfg = ctx ? node(ctx->generation) : NULL;
	struct network *network = ctx ? find_network(ctx, id) : NULL;
	enum reason reason;

	if (!cfg || !network || !(network->flags & NETWORK_LOCAL))
		return REASON_UNKNOWN_NETWORK;
	if (!(network->flags & NETWORK_L2))
		return REASON_WRONG_PAYLOAD;
	ctx->network = id;
	ctx->line = network->line;
	ctx->traffic = network->traffic;
	reason = check_station(ctx, cfg, network);
	if (reason || ctx->opaque)
		return reason;
	return speaks_for(ctx, network, &ctx->key.src, ctx->v4) ? REASON_NONE : REASON_SPOOFED_ADDRESS;
}
