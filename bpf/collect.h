/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Collect: takes idle flows out of the table, in the kernel, as reading them all out and back in would take thirty times as
 * long. The agent runs it; no packet waits for it.
 */
#pragma once

#include "lib/conntrack.h"

/* Under pressure closed flows have to go, and those that nobody answered: the others are what the table is for. */
#define PRESSED_CLOSED 2
#define PRESSED_UNANSWERED 16

struct bpf_map;

struct scan {
	__u32 timeouts[8]; /* struct timeouts */
	union addr addr;
	__u32 network;
	__u32 now;
	__u32 pressure;
	__u32 all;
	__u32 entries;
	__u32 collected;
	__u32 states[FLOW_STATES];
};

/* Offset of a field of struct timeouts, in words. */
#define TIMEOUT(field) (offsetof(struct timeouts, field) / sizeof(__u32))

_Static_assert(sizeof(struct timeouts) == 8 * sizeof(__u32), "timeouts");

static __always_inline __u32 tcp_timeout(__u32 state)
{
	if (state == FLOW_ESTABLISHED)
		return TIMEOUT(tcp_established);
	if (state == FLOW_CLOSING)
		return TIMEOUT(tcp_closing);
	return state == FLOW_CLOSED ? TIMEOUT(tcp_closed) : TIMEOUT(tcp_opening);
}

/* Which timeout holds. A function of its own: its branches are not the caller's, which the verifier has to follow each. */
__noinline int which_timeout(__u32 protocol, __u32 state)
{
	switch (protocol) {
	case IPPROTO_TCP:
		return tcp_timeout(state);
	case IPPROTO_UDP:
		return state == FLOW_NEW ? TIMEOUT(udp_new) : TIMEOUT(udp);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return TIMEOUT(icmp);
	}
	return TIMEOUT(other);
}

static __always_inline __u32 press(__u32 limit, __u8 state)
{
	if (state == FLOW_CLOSED && limit > PRESSED_CLOSED)
		return PRESSED_CLOSED;
	if (state <= FLOW_ANSWERED && limit > PRESSED_UNANSWERED)
		return PRESSED_UNANSWERED;
	return limit;
}

static __always_inline bool is_idle(const struct flow *flow, __u32 now, __u32 limit)
{
	return (__s32)(now - flow->seen) >= (__s32)limit;
}

/* Is the flow one that the filter takes? Zero fields take all. */
static __always_inline bool is_meant(const struct scan *scan, const struct flow_key *key, const struct flow *flow)
{
	if (scan->network && scan->network != key->network && scan->network != flow->network)
		return false;
	if (flow->flags & FLOW_TRANSLATED &&
	    (same_addr(&scan->addr, &flow->to.src) || same_addr(&scan->addr, &flow->to.dst)))
		return true;
	return is_unspecified(&scan->addr) || same_addr(&scan->addr, &key->src) || same_addr(&scan->addr, &key->dst);
}

static __always_inline long keep_entry(struct scan *scan, __u8 state)
{
	scan->entries++;
	if (state < FLOW_STATES)
		scan->states[state]++;
	return 0;
}

static long visit(struct bpf_map *table, struct flow_key *key, struct flow *flow, struct scan *scan)
{
	__u8 state = flow->state < FLOW_STATES ? flow->state : 0;
	__u64 which = which_timeout(key->protocol, state);
	struct flow_key back, own;
	struct flow *partner;
	__u32 limit;

	/* Opaque, so that the bound that the verifier has to see is not optimized away. */
	asm volatile("" : "+r"(which));
	limit = scan->timeouts[which & 7];
	if (scan->pressure)
		limit = press(limit, state);
	if (!(scan->all ? is_meant(scan, key, flow) : is_idle(flow, scan->now, limit)))
		return keep_entry(scan, state);
	own = *key;
	opposite(&back, &own, flow);
	/* As long as one direction is in use the other one stays. */
	if (!scan->all) {
		partner = bpf_map_lookup_elem(table, &back);
		if (partner && !is_idle(partner, scan->now, limit))
			return keep_entry(scan, state);
	}
	/* Where both are in one bucket the second one is visited after it has gone. */
	if (!bpf_map_delete_elem(table, &back))
		scan->collected++;
	if (!bpf_map_delete_elem(table, &own))
		scan->collected++;
	return 0;
}

SEC("syscall")
int collect(struct collection *args)
{
	struct config *cfg = node(active_generation());
	void *table = flow_table();
	struct scan scan = {};

	if (!cfg || !table)
		return 1;
	__builtin_memcpy(scan.timeouts, &cfg->timeouts, sizeof(scan.timeouts));
	scan.now = args->now;
	scan.pressure = args->pressure;
	scan.all = args->all;
	scan.network = args->network;
	__builtin_memcpy(&scan.addr, &args->addr, sizeof(scan.addr));
	bpf_for_each_map_elem(table, visit, &scan, 0);
	args->entries = scan.entries;
	args->collected = scan.collected;
#pragma unroll
	for (int i = 0; i < FLOW_STATES; i++)
		args->states[i] = scan.states[i];
	return 0;
}
