/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Flows. Each has two entries, one for either direction, that say where its packets go: one look-up
 * decides a packet of a known flow. Both entries have the same state.
 */
#pragma once

#include "flow.h"
#include "lookup.h"

static __always_inline void *flow_table(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&flows, &zero);
}

static __always_inline struct flow *find_flow(const struct flow_key *key)
{
	void *table = flow_table();

	return table ? bpf_map_lookup_elem(table, key) : NULL;
}

static __always_inline bool is_bare_syn(const struct context *ctx)
{
	return ctx->key.protocol == IPPROTO_TCP && (ctx->tcp & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/*
 * Does the packet open a new flow over an old one? A SYN does where the old one is closed, and where it comes from the side
 * that had been opened to: only what that side may open itself can be let pass then. Until the handshake is complete that
 * side may open at the same time (RFC 5382 REQ-2).
 */
static __always_inline bool reopens(const struct flow *flow, const struct context *ctx)
{
	if (ctx->kind == PACKET_LATER_FRAGMENT || ctx->kind == PACKET_ICMP_ERROR || !is_bare_syn(ctx))
		return false;
	return flow->state == FLOW_CLOSED || (flow->flags & FLOW_REPLY && flow->state > FLOW_ANSWERED);
}

/*
 * A reset ends a connection only where its receiver would believe it: it has the number that is due, or that was last
 * acknowledged (RFC 5961 3.2); against an unanswered SYN it acknowledges that one, and has the number that follows it where
 * the sender of the SYN takes it back.
 */
static __always_inline bool is_valid_reset(const struct flow *flow, const struct flow *partner,
					   const struct context *ctx)
{
	if (flow->state == FLOW_NEW && flow->flags & FLOW_REPLY)
		return ctx->tcp & TCP_ACK && ctx->ack == partner->seq;
	if (flow->state == FLOW_NEW)
		return ctx->seq == flow->seq;
	return ctx->seq == partner->ack || ctx->seq == flow->seq;
}

static __always_inline __u8 next_state(struct flow *flow, const struct flow *partner, const struct context *ctx)
{
	bool reply = flow->flags & FLOW_REPLY;

	if (flow->state == FLOW_CLOSED)
		return flow->state;
	if (ctx->tcp & TCP_RST)
		return is_valid_reset(flow, partner, ctx) ? FLOW_CLOSED : flow->state;
	if (ctx->tcp & TCP_FIN) {
		if (flow->state == FLOW_NEW && !(flow->flags & FLOW_PICKED))
			return flow->state; /* no connection yet that it could end */
		flow->flags |= FLOW_FIN;
		return partner->flags & FLOW_FIN ? FLOW_CLOSED : FLOW_CLOSING;
	}
	if (flow->state == FLOW_NEW && reply)
		return ctx->tcp & TCP_SYN ? FLOW_ANSWERED : flow->flags & FLOW_PICKED ? FLOW_ESTABLISHED : FLOW_NEW;
	if (flow->state == FLOW_ANSWERED && !reply && ctx->tcp & TCP_ACK)
		return FLOW_ESTABLISHED;
	return flow->state;
}

/* What may change the state: looks at both directions. */
static __noinline int follow(struct flow *flow)
{
	struct context *ctx = context();
	struct flow *partner;
	struct flow_key key;
	__u8 state;

	if (!ctx || !flow)
		return 0;
	turn(&key, &ctx->key, flow->network);
	partner = find_flow(&key);
	if (!partner)
		return 0;
	if (ctx->key.protocol == IPPROTO_TCP)
		state = next_state(flow, partner, ctx);
	else
		state = FLOW_ESTABLISHED;
	flow->state = state;
	partner->state = state;
	return 0;
}

static __always_inline void track_tcp(struct flow *flow, const struct context *ctx)
{
	if (flow->state != FLOW_ESTABLISHED || ctx->tcp & (TCP_SYN | TCP_FIN | TCP_RST))
		follow(flow);
	if (ctx->tcp & TCP_RST)
		return;
	if ((__s32)(ctx->seq - flow->seq) > 0 || flow->state == FLOW_NEW) /* another SYN may have another number */
		flow->seq = ctx->seq;
	flow->ack = ctx->ack;
}

/*
 * A packet of a known flow. Errors about a flow do not keep it alive, nor does a SYN that is sent again and again to
 * nobody; answers do, and whatever is sent the way it was opened (RFC 4787 REQ-6). Counts are those of one CPU at a
 * time: two that count in the same instant may lose a packet.
 */
static __always_inline void track(struct flow *flow, const struct context *ctx)
{
	bool tcp = ctx->key.protocol == IPPROTO_TCP;
	__u32 now;

	if (ctx->kind == PACKET_ICMP_ERROR)
		return;
	flow->packets++;
	flow->bytes += ctx->l3_len;
	now = tick();
	if (flow->seen != now && !(tcp && flow->state == FLOW_NEW))
		flow->seen = now;
	if (ctx->kind == PACKET_LATER_FRAGMENT)
		return;
	if (tcp)
		track_tcp(flow, ctx);
	else if (flow->state == FLOW_NEW && flow->flags & FLOW_REPLY)
		follow(flow);
}

/* What an entry keeps when its flow is decided again. */
static __always_inline void keep(struct flow *flow, const struct flow_key *key)
{
	struct flow *old = find_flow(key);

	if (!old)
		return;
	flow->packets = old->packets;
	flow->bytes = old->bytes;
	flow->since = old->since;
	flow->seen = old->seen;
	flow->seq = old->seq;
	flow->ack = old->ack;
	flow->state = old->state;
	flow->flags |= old->flags & (FLOW_PICKED | FLOW_FIN);
}

/* What both entries of a flow have. */
static __always_inline void begin(struct flow *flow, const struct context *ctx)
{
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->since = tick();
	flow->seen = flow->since;
	flow->generation = ctx->generation;
	flow->line = ctx->line;
	flow->peer = ctx->peer;
	if (ctx->key.protocol == IPPROTO_TCP && !ctx->known && !is_bare_syn(ctx))
		flow->flags = FLOW_PICKED;
	if (ctx->bridged)
		flow->flags |= FLOW_BRIDGED;
	if (ctx->router)
		flow->flags |= FLOW_ROUTER;
}

/* Which way does the packet go on? */
static __always_inline enum reason way_on(const struct context *ctx)
{
	if (ctx->underlay)
		return REASON_DECAPSULATED;
	return ctx->ifindex ? REASON_LOCAL : REASON_ENCAPSULATED;
}

/* The direction of the packet. */
static __always_inline void begin_there(struct flow *flow, const struct context *ctx)
{
	begin(flow, ctx);
	flow->network = ctx->network;
	flow->ifindex = ctx->ifindex;
	flow->mac = ctx->bridged ? ctx->to : ctx->mac;
	flow->mtu = ctx->mtu;
	flow->sid = ctx->sid;
	if (ctx->reply)
		flow->flags |= FLOW_REPLY;
	if (ctx->direct)
		flow->flags |= FLOW_DIRECT;
	if (ctx->underlay) {
		flow->flags |= FLOW_UNDERLAY;
		flow->source = ctx->source;
	}
	flow->counter = traffic_index(ctx->traffic, way_on(ctx));
}

/* The way back to the container that sent the packet. */
static __always_inline bool back_to_container(struct __sk_buff *skb, struct flow *flow, const struct context *ctx)
{
	struct port *port = find_port(skb->ifindex, ctx->generation);
	struct config *cfg = node(ctx->generation);

	if (!port || !cfg)
		return false;
	flow->ifindex = skb->ifindex;
	flow->mac = port->mac;
	flow->mtu = port->mtu;
	if (port->flags & PORT_DIRECT)
		flow->flags |= FLOW_DIRECT;
	if (ctx->ifindex) {
		struct network *network = find_network(ctx, ctx->network);

		flow->counter = traffic_index(network ? network->traffic : 0, REASON_LOCAL);
		return true;
	}
	flow->flags |= FLOW_UNDERLAY;
	flow->counter = traffic_index(ctx->traffic, REASON_DECAPSULATED);
	compose_sid(&flow->sid, cfg->locator, cfg->locator_bits, ctx->bridged ? FUNCTION_END_DT2U : FUNCTION_END_DT46,
		    ctx->key.network);
	return true;
}

/* The other direction. */
static __always_inline bool begin_back(struct __sk_buff *skb, struct flow *flow, const struct context *ctx)
{
	begin(flow, ctx);
	flow->network = ctx->key.network;
	if (!ctx->reply)
		flow->flags |= FLOW_REPLY;
	if (!ctx->underlay)
		return back_to_container(skb, flow, ctx);
	flow->sid = ctx->back;
	flow->mac = ctx->from; /* of a frame */
	flow->counter = traffic_index(ctx->traffic, REASON_ENCAPSULATED);
	return true;
}

static __always_inline void count_first(struct flow *flow, const struct context *ctx)
{
	flow->packets = 1;
	flow->bytes = ctx->l3_len;
	flow->seq = ctx->seq;
	flow->ack = ctx->ack;
}

/*
 * Write the decision about the packet's flow down, for both directions. What was known of it stays. 0, or the reason why not:
 * then nothing new is left, and a flow that was known is as it was. An answer from another node says nothing of where the
 * flow that it belongs to has to go: that is decided at the next packet there.
 */
__noinline int commit(struct __sk_buff *skb)
{
	struct context *ctx = context();
	void *table = flow_table();
	struct flow_key back;
	struct flow flow;

	if (!ctx || !table)
		return REASON_CONNTRACK_FULL;
	turn(&back, &ctx->key, ctx->network);
	if (!(ctx->known && ctx->reply && ctx->underlay)) {
		if (!begin_back(skb, &flow, ctx))
			return REASON_NO_PORT;
		if (ctx->known)
			keep(&flow, &back);
		if (bpf_map_update_elem(table, &back, &flow, BPF_ANY))
			return REASON_CONNTRACK_FULL;
	}
	begin_there(&flow, ctx);
	if (ctx->known)
		keep(&flow, &ctx->key);
	else
		count_first(&flow, ctx);
	if (bpf_map_update_elem(table, &ctx->key, &flow, BPF_ANY)) {
		if (!ctx->known)
			bpf_map_delete_elem(table, &back);
		return REASON_CONNTRACK_FULL;
	}
	if (!ctx->known) {
		tell(skb, way_on(ctx), VERDICT_PASSED);
		return 0;
	}

	struct flow *now = bpf_map_lookup_elem(table, &ctx->key);

	if (now)
		track(now, ctx);
	return 0;
}

/*
 * A connection that was ended stays known as such while its ends go on to send: else it would be taken up in the
 * middle by the side that may open flows to the other.
 */
static __always_inline bool has_ended(struct flow *flow)
{
	if (!(flow->flags & FLOW_ENDED))
		return false;
	flow->seen = tick();
	return true;
}

static __always_inline void bury(const struct flow_key *key)
{
	struct flow *flow = find_flow(key);

	if (!flow)
		return;
	flow->flags |= FLOW_ENDED;
	flow->state = FLOW_CLOSED;
	flow->seen = tick();
}

/* The flow cannot go on, in neither direction. forbidden: by the topology, so that its ends may both go on to send. */
static __always_inline void end_flow(struct context *ctx, __u32 network, bool forbidden)
{
	void *table = flow_table();
	struct flow_key back;

	if (!ctx->known || !table)
		return;
	turn(&back, &ctx->key, network);
	if (forbidden && ctx->key.protocol == IPPROTO_TCP) {
		bury(&ctx->key);
		bury(&back);
	} else {
		bpf_map_delete_elem(table, &ctx->key);
		bpf_map_delete_elem(table, &back);
	}
	ctx->known = 0;
	ctx->ended = 1;
}
