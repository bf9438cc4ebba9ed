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

/* The key of packets after they were rewritten. */
static __always_inline void rewrite_key(struct flow_key *key, const struct rewrite *to)
{
	key->src = to->src;
	key->dst = to->dst;
	key->sport = to->sport;
	key->dport = to->dport;
}

/* The key of the other direction of a flow: that of its packets as they go on, turned round. */
static __always_inline void opposite(struct flow_key *to, const struct flow_key *key, const struct flow *flow)
{
	struct flow_key onward;

	if (!(flow->flags & FLOW_TRANSLATED)) {
		turn(to, key, flow->network);
		return;
	}
	onward = *key;
	rewrite_key(&onward, &flow->to);
	turn(to, &onward, flow->network);
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
	opposite(&key, &ctx->key, flow);
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

/* What is counted of a packet that comes to a container here. */
static __always_inline enum reason way_in(const struct context *ctx)
{
	if (ctx->underlay)
		return REASON_DECAPSULATED;
	if (!ctx->outside.side)
		return REASON_LOCAL;
	return ctx->outside.side == OUTER_OUTSIDE ? REASON_INGRESS : REASON_FROM_HOST;
}

/* Which way does the packet go on? */
static __always_inline enum reason way_on(const struct context *ctx)
{
	switch (ctx->outside.way) {
	case WAY_CONTAINER:
		return way_in(ctx);
	case WAY_NODE:
		return REASON_ENCAPSULATED;
	case WAY_OUT:
		return REASON_EGRESS;
	}
	return REASON_TO_HOST;
}

/* Out of which interface, and to whom, as it has just been looked up. Without the next hop's MAC address that holds for one packet only. */
static __always_inline void leave_by(struct flow *flow, const struct context *ctx)
{
	bool lasts = ctx->outside.neighbour || ctx->out_flags & EGRESS_RAW;

	flow->ifindex = ctx->out;
	flow->mac = ctx->out_dst;
	flow->from = ctx->out_src;
	flow->mtu = ctx->mtu;
	flow->looked = tick() - !lasts;
	flow->flags &= ~FLOW_RAW;
	if (ctx->out_flags & EGRESS_RAW)
		flow->flags |= FLOW_RAW;
}

/* The direction of the packet. */
static __always_inline void begin_there(struct flow *flow, const struct context *ctx)
{
	begin(flow, ctx);
	flow->network = ctx->network;
	flow->way = ctx->outside.way;
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
	if (ctx->outside.side || ctx->outside.translated)
		flow->source = ctx->source;
	if (ctx->outside.translated) {
		flow->flags |= FLOW_TRANSLATED;
		flow->to = ctx->rewrite;
	}
	if (ctx->outside.way == WAY_OUT)
		leave_by(flow, ctx);
	flow->counter = traffic_index(ctx->traffic, way_on(ctx));
}

/* The counter of the network that the packet goes to. */
static __always_inline __u32 traffic_of(const struct context *ctx, enum reason reason)
{
	struct network *network = find_network(ctx, ctx->network);

	return traffic_index(network ? network->traffic : 0, reason);
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
	switch (ctx->outside.way) {
	case WAY_CONTAINER:
		flow->counter = traffic_of(ctx, REASON_LOCAL);
		return true;
	case WAY_NODE:
		flow->flags |= FLOW_UNDERLAY;
		flow->counter = traffic_index(ctx->traffic, REASON_DECAPSULATED);
		compose_sid(&flow->sid, cfg->locator, cfg->locator_bits,
			    ctx->bridged ? FUNCTION_END_DT2U : FUNCTION_END_DT46, ctx->key.network);
		return true;
	case WAY_OUT:
		flow->counter = traffic_index(ctx->traffic, REASON_INGRESS);
		return true;
	}
	flow->counter = traffic_index(ctx->traffic, REASON_FROM_HOST);
	return true;
}

/* The way back out of the overlay, or to the host. */
static __always_inline bool back_outside(struct flow *flow, const struct context *ctx)
{
	struct config *cfg = node(ctx->generation);

	if (!cfg)
		return false;
	flow->counter = traffic_index(ctx->traffic, REASON_TO_HOST);
	flow->way = ctx->outside.side == OUTER_LOOPBACK ? WAY_LOOPBACK : WAY_HOST;
	if (ctx->outside.side == OUTER_OUTSIDE) {
		flow->counter = traffic_index(ctx->traffic, REASON_EGRESS);
		flow->way = WAY_OUT;
		flow->looked = tick() - 1;
	}
	if (ctx->outside.way != WAY_NODE)
		return true;
	flow->flags |= FLOW_UNDERLAY;
	compose_sid(&flow->sid, cfg->locator, cfg->locator_bits, FUNCTION_END_DT46, named(ctx, ctx->key.network));
	return true;
}

/*
 * The way back to the node that sent the packet. What comes back from an address outside, or one of this node, is sent on as from the external network
 * that the packet was sent to.
 */
static __always_inline bool back_to_node(struct flow *flow, const struct context *ctx)
{
	struct config *cfg = node(ctx->generation);

	if (!cfg)
		return false;
	flow->way = WAY_NODE;
	flow->sid = ctx->back;
	flow->mac = ctx->from; /* of a frame */
	flow->counter = traffic_index(ctx->traffic, REASON_ENCAPSULATED);
	if (ctx->external)
		compose_sid(&flow->source, cfg->locator, cfg->locator_bits, FUNCTION_SOURCE, ctx->external);
	return true;
}

/* The other direction. */
static __always_inline bool begin_back(struct __sk_buff *skb, struct flow *flow, const struct context *ctx)
{
	begin(flow, ctx);
	flow->network = ctx->key.network;
	if (!ctx->reply)
		flow->flags |= FLOW_REPLY;
	if (ctx->outside.translated) {
		struct flow_key turned;

		turn(&turned, &ctx->key, 0);
		flow->flags |= FLOW_TRANSLATED;
		flow->to.src = turned.src;
		flow->to.dst = turned.dst;
		flow->to.sport = turned.sport;
		flow->to.dport = turned.dport;
	}
	if (ctx->outside.side)
		return back_outside(flow, ctx);
	return ctx->underlay ? back_to_node(flow, ctx) : back_to_container(skb, flow, ctx);
}

static __always_inline void count_first(struct flow *flow, const struct context *ctx)
{
	flow->packets = 1;
	flow->bytes = ctx->l3_len;
	flow->seq = ctx->seq;
	flow->ack = ctx->ack;
}

static __always_inline bool same_key(const struct flow_key *a, const struct flow_key *b)
{
	return a->network == b->network && same_addr(&a->src, &b->src) && same_addr(&a->dst, &b->dst) &&
	       a->sport == b->sport && a->dport == b->dport && a->protocol == b->protocol;
}

static __always_inline bool same_rewrite(const struct rewrite *a, const struct rewrite *b)
{
	return same_addr(&a->src, &b->src) && same_addr(&a->dst, &b->dst) && a->sport == b->sport &&
	       a->dport == b->dport;
}

/* The key of the other direction, of a packet that is being decided. */
static __always_inline void far_key(struct flow_key *to, const struct context *ctx)
{
	struct flow_key key = ctx->key;

	if (ctx->outside.translated)
		rewrite_key(&key, &ctx->rewrite);
	turn(to, &key, ctx->network);
}

/*
 * Ticks that a closed flow keeps its place against others: its ends have said all that they had to say, but the one that closed first still waits
 * for what may be on its way, and takes another's SYN for that (TIME_WAIT, 60 s).
 */
#define PLACE_KEPT 56
#define PLACE_KEPT_PRESSED 1

static __always_inline bool makes_place(const struct flow *flow, const struct flow_key *key, __u32 kept)
{
	return flow->state == FLOW_CLOSED && key->protocol == IPPROTO_TCP && !(flow->flags & FLOW_ENDED) &&
	       tick() - flow->seen > kept;
}

/*
 * Is the entry's way on that to the entry of this key, which it was found by? Where it is translated it may be another flow's by now. Only asked about
 * TCP, of which ports turn round.
 */
static __always_inline bool leads_back(const struct flow *flow, const struct flow_key *to)
{
	if (!(flow->flags & FLOW_TRANSLATED))
		return true;
	return same_addr(&flow->to.src, &to->dst) && same_addr(&flow->to.dst, &to->src) &&
	       flow->to.sport == to->dport && flow->to.dport == to->sport;
}

/*
 * Write the entry of the way back of a flow that comes from outside or is translated: its key may be another flow's, which is not
 * to be lost. What closed a while ago makes place; so does an earlier flow of the same packets. kept: ticks that are a while. 0, or the reason why
 * not. A function of its own, as keys take much of the stack.
 */
static __noinline int claim(const struct flow_key *back, const struct flow *flow, __u32 kept)
{
	struct context *ctx = context();
	void *table = flow_table();
	struct flow_key theirs;
	struct flow *old;

	if (!ctx || !table || !back || !flow)
		return REASON_CONNTRACK_FULL;
	if (!bpf_map_update_elem(table, back, flow, BPF_NOEXIST))
		return 0;
	old = bpf_map_lookup_elem(table, back);
	if (!old)
		return REASON_CONNTRACK_FULL;
	opposite(&theirs, back, old);
	if (!same_key(&theirs, &ctx->key)) {
		if (!makes_place(old, back, kept))
			return REASON_FLOW_CLASH;
		old = bpf_map_lookup_elem(table, &theirs);
		if (old && leads_back(old, back))
			bpf_map_delete_elem(table, &theirs);
	}
	return bpf_map_update_elem(table, back, flow, BPF_ANY) ? REASON_CONNTRACK_FULL : 0;
}

/* Write the entry of the way back. 0, or the reason why not. */
static __noinline int commit_back(struct __sk_buff *skb, const struct flow_key *back)
{
	struct context *ctx = context();
	void *table = flow_table();
	struct flow flow;

	if (!ctx || !table || !back)
		return REASON_CONNTRACK_FULL;
	if (!begin_back(skb, &flow, ctx))
		return REASON_NO_PORT;
	if (ctx->known)
		keep(&flow, back);
	else if (ctx->outside.side || ctx->outside.translated)
		return claim(back, &flow, PLACE_KEPT_PRESSED);
	return bpf_map_update_elem(table, back, &flow, BPF_ANY) ? REASON_CONNTRACK_FULL : 0;
}

/* A known flow whose packets are to become something else now is another one. An answer cannot begin that. */
static __always_inline enum reason check_translation(struct context *ctx)
{
	struct flow *old = find_flow(&ctx->key);
	void *table = flow_table();
	struct flow_key back;

	if (!old || !table)
		return REASON_NONE;
	if (!(old->flags & FLOW_TRANSLATED) == !ctx->outside.translated &&
	    (!ctx->outside.translated || same_rewrite(&old->to, &ctx->rewrite)))
		return REASON_NONE;
	if (ctx->reply)
		return REASON_NO_FLOW;
	opposite(&back, &ctx->key, old);
	bpf_map_delete_elem(table, &back);
	bpf_map_delete_elem(table, &ctx->key);
	ctx->known = 0;
	return REASON_NONE;
}

static __noinline int commit_there(struct __sk_buff *skb)
{
	struct context *ctx = context();
	void *table = flow_table();
	struct flow flow;

	if (!ctx || !table)
		return REASON_CONNTRACK_FULL;
	begin_there(&flow, ctx);
	if (ctx->known)
		keep(&flow, &ctx->key);
	else
		count_first(&flow, ctx);
	return bpf_map_update_elem(table, &ctx->key, &flow, BPF_ANY) ? REASON_CONNTRACK_FULL : 0;
}

/*
 * Write the decision about the packet's flow down, for both directions. What was known of it stays. 0, or the reason why not:
 * then nothing new is left, and a flow that was known is as it was. An answer from another node says nothing of where the
 * flow that it belongs to has to go: that is decided at the next packet there.
 */
__noinline int commit(struct __sk_buff *skb)
{
	struct context *ctx = context();
	enum reason reason = REASON_NONE;
	void *table = flow_table();
	struct flow_key back;
	struct flow *now;

	if (!ctx || !table)
		return REASON_CONNTRACK_FULL;
	if (ctx->known)
		reason = check_translation(ctx);
	if (reason)
		return reason;
	far_key(&back, ctx);
	if (!ctx->outside.reserved && !(ctx->known && ctx->reply && ctx->underlay))
		reason = commit_back(skb, &back);
	if (reason)
		return reason;
	if (commit_there(skb)) {
		if (!ctx->known)
			bpf_map_delete_elem(table, &back);
		return REASON_CONNTRACK_FULL;
	}
	if (!ctx->known) {
		tell(skb, way_on(ctx), VERDICT_PASSED);
		return 0;
	}
	now = bpf_map_lookup_elem(table, &ctx->key);
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
static __always_inline void end_flow(struct context *ctx, bool forbidden)
{
	struct flow *old = ctx->known ? find_flow(&ctx->key) : NULL;
	void *table = flow_table();
	struct flow_key back;

	if (!old || !table)
		return;
	opposite(&back, &ctx->key, old);
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
