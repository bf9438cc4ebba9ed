/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Headers, checksums, counting: what every stage needs. */
#pragma once

#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"

#define IP_OFFSET 0x1fff
#define IP_MF_OR_OFFSET 0x3fff
#define IP_DF 0x4000

#define NEXTHDR_HOP 0
#define NEXTHDR_ROUTING 43
#define NEXTHDR_FRAGMENT 44
#define NEXTHDR_AUTH 51
#define NEXTHDR_DEST 60

#define EXTENSIONS_MAX 6 /* no honest packet has more */

#define ECN_MASK 3
#define ECN_ECT1 1
#define ECN_ECT0 2
#define ECN_CE 3

/* The packet is not ours: let the next program, or the stack, have it. */
#define PASS TC_ACT_UNSPEC

static __always_inline void *packet_start(struct __sk_buff *skb)
{
	return (void *)(long)skb->data;
}

static __always_inline void *packet_end(struct __sk_buff *skb)
{
	return (void *)(long)skb->data_end;
}

/*
 * Make the first len bytes directly readable, as far as the packet has them. The caller still
 * compares against packet_end. Senders and GRO leave headers in the linear part nearly always.
 */
static __always_inline void pull(struct __sk_buff *skb, __u32 len)
{
	__u32 linear = skb->data_end - skb->data;

	if (linear < len && linear < skb->len)
		bpf_skb_pull_data(skb, len < skb->len ? len : skb->len);
}

static __always_inline struct context *context(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&contexts, &zero);
}

#define EVENT_BURST 256
#define EVENT_NS 1000000 /* one more event every millisecond on each CPU */

static __always_inline bool may_tell(struct event_budget *budget)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__u64 earned = (now - budget->stamp) / EVENT_NS;

	if (earned) {
		budget->stamp = now;
		budget->tokens = earned + budget->tokens < EVENT_BURST ? earned + budget->tokens : EVENT_BURST;
	}
	if (!budget->tokens) {
		budget->missed++;
		return false;
	}
	budget->tokens--;
	return true;
}

/* Set by `lace explain` in programs of its own, which are never attached. */
volatile const __u8 explaining = 0;

/*
 * The network that a packet comes from, or goes to, as people name it: of what is outside of the overlay, the external network that its
 * address was found in.
 */
static __always_inline __u32 named(const struct context *ctx, __u32 network)
{
	return network == NETWORK_OUTSIDE && ctx->external ? ctx->external : network;
}

static __always_inline void describe(struct event *event, const struct __sk_buff *skb, const struct context *ctx)
{
	event->time = bpf_ktime_get_ns();
	event->ifindex = skb->ifindex;
	event->len = skb->len;
	event->network = named(ctx, ctx->key.network);
	event->to = named(ctx, ctx->network);
	event->line = ctx->line;
	event->peer = ctx->peer;
	event->generation = ctx->generation;
	event->output = ctx->ifindex;
	event->sid = ctx->sid;
	event->mtu = ctx->mtu;
	event->stage = ctx->stage;
	event->ethernet = !ctx->raw;
	event->way = ctx->outside.way;
	event->outer = ctx->outside.side;
	event->translated = ctx->outside.translated;
	if (ctx->outside.translated)
		event->rewrite = ctx->rewrite;
	else
		__builtin_memset(&event->rewrite, 0, sizeof(event->rewrite));
	__builtin_memset(event->pad, 0, sizeof(event->pad));
}

/* Tell whoever listens. Only refused packets are rationed: of a flow there is one event. */
__noinline int tell(struct __sk_buff *skb, __u32 reason, __u32 verdict)
{
	__u32 zero = 0;
	struct event_budget *budget = bpf_map_lookup_elem(&event_budgets, &zero);
	struct context *ctx = context();
	__u64 len = skb->len;
	struct event *event;

	if (!budget || !ctx || (verdict == VERDICT_REFUSED && !may_tell(budget)))
		return 0;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return 0;
	describe(event, skb, ctx);
	event->reason = reason;
	event->verdict = verdict;
	event->missed = budget->missed;
	budget->missed = 0;
	/* Opaque before each check, and two of them: older verifiers learn nothing from one for 0. */
	asm volatile("" : "+r"(len));
	if (len > EVENT_HEAD)
		len = EVENT_HEAD;
	asm volatile("" : "+r"(len));
	if (len < ETH_HLEN || bpf_skb_load_bytes(skb, 0, event->head, len))
		len = 0;
	event->head_len = len;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* The packet has come to a stage. */
static __always_inline void step(struct __sk_buff *skb, struct context *ctx, enum stage stage)
{
	ctx->stage = stage;
	if (explaining)
		tell(skb, REASON_NONE, VERDICT_STEP);
}

/* A tail call: what the packet's context is, NULL where there is none. */
static __always_inline struct context *come_to(struct __sk_buff *skb, enum stage stage)
{
	struct context *ctx = context();

	if (ctx)
		step(skb, ctx, stage);
	return ctx;
}

/* Count a packet that goes on. index: into traffic. */
static __always_inline void count(struct __sk_buff *skb, __u32 index)
{
	struct counter *counter = bpf_map_lookup_elem(&traffic, &index);

	if (!counter)
		return;
	counter->packets++;
	counter->bytes += skb->len;
}

static __always_inline __u32 traffic_index(__u32 number, enum reason reason)
{
	return number * TRAFFIC_REASONS + reason;
}

static __always_inline void count_refusal_of(__u32 network, __u32 reason, __u32 len)
{
	struct refusal_key key = { .network = network, .reason = reason };
	struct counter *counter = bpf_map_lookup_elem(&refusals, &key);

	if (counter) {
		__sync_fetch_and_add(&counter->packets, 1);
		__sync_fetch_and_add(&counter->bytes, len);
		return;
	}

	struct counter first = { .packets = 1, .bytes = len };

	bpf_map_update_elem(&refusals, &key, &first, BPF_NOEXIST);
}

/* Count a refused packet and tell of it. */
__noinline int note(struct __sk_buff *skb, __u32 reason)
{
	struct counter *counter = bpf_map_lookup_elem(&counters, &reason);
	struct context *ctx = context();

	if (!counter || !ctx)
		return 0;
	counter->packets++;
	counter->bytes += skb->len;
	count_refusal_of(named(ctx, ctx->key.network), reason, skb->len);
	return tell(skb, reason, ctx->ended ? VERDICT_ENDED : VERDICT_REFUSED);
}

static __always_inline int drop(struct __sk_buff *skb, enum reason reason)
{
	note(skb, reason);
	return TC_ACT_SHOT;
}

static __always_inline __u32 active_generation(void)
{
	__u32 zero = 0;
	__u32 *active = bpf_map_lookup_elem(&generation, &zero);

	return active ? *active : 0;
}

static __always_inline struct config *node(__u32 of)
{
	__u32 slot = SLOT(of);

	return bpf_map_lookup_elem(&node_config, &slot);
}

/* The context of a packet that has just come in: nothing of the one before is left in what events show. */
static __always_inline struct context *start(struct __sk_buff *skb)
{
	struct context *ctx = context();

	if (!ctx)
		return NULL;
	ctx->key.network = 0;
	ctx->generation = active_generation();
	__builtin_memset(&ctx->sid, 0, sizeof(ctx->sid));
	ctx->network = 0;
	ctx->line = 0;
	ctx->peer = 0;
	ctx->ifindex = 0;
	ctx->traffic = 0;
	ctx->mtu = 0;
	ctx->known = 0;
	ctx->reply = 0;
	ctx->ended = 0;
	ctx->raw = 0;
	ctx->l2 = 0;
	ctx->bridged = 0;
	ctx->opaque = 0;
	ctx->direct = 0;
	ctx->shim = 0;
	ctx->router = 0;
	ctx->external = 0;
	__builtin_memset(&ctx->outside, 0, sizeof(ctx->outside));
	step(skb, ctx, STAGE_ENTRY);
	return ctx;
}

static __always_inline struct port *find_port(__u32 ifindex, __u32 of)
{
	struct port_key key = { .ifindex = ifindex, .slot = SLOT(of) };

	return bpf_map_lookup_elem(&ports, &key);
}

static __always_inline int go_to(struct __sk_buff *skb, enum stage stage)
{
	bpf_tail_call(skb, &stages, stage);
	return drop(skb, REASON_STAGE_MISSING);
}

/* Ask the error stage for an ICMP answer to the container; mtu is 0 but for "too big". */
static __always_inline int refuse(struct __sk_buff *skb, struct context *ctx, enum reason reason, __u8 type, __u8 code,
				  __u16 mtu)
{
	note(skb, reason);
	ctx->icmp_type = type;
	ctx->icmp_code = code;
	ctx->icmp_mtu = mtu;
	return go_to(skb, STAGE_ERROR);
}

static __always_inline void map_v4(union addr *addr, __be32 v4)
{
	addr->be32[0] = 0;
	addr->be32[1] = 0;
	addr->be32[2] = bpf_htonl(0xffff);
	addr->be32[3] = v4;
}

static __always_inline bool same_addr(const union addr *a, const union addr *b)
{
	return a->be32[0] == b->be32[0] && a->be32[1] == b->be32[1] && a->be32[2] == b->be32[2] &&
	       a->be32[3] == b->be32[3];
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	return *(__u32 *)a == *(__u32 *)b && *(__u16 *)(a + 4) == *(__u16 *)(b + 4);
}

static __always_inline bool is_link_local(const union addr *addr)
{
	return (addr->be32[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline bool is_unspecified(const union addr *addr)
{
	return !(addr->be32[0] | addr->be32[1] | addr->be32[2] | addr->be32[3]);
}

/* An IPv6 packet with such an address could be taken for one of IPv4 in the tables. */
static __always_inline bool is_mapped_v4(const union addr *addr)
{
	return !(addr->be32[0] | addr->be32[1]) && addr->be32[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_multicast(const union addr *addr)
{
	if (is_mapped_v4(addr))
		return (addr->be32[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000);
	return addr->u8[0] == 0xff;
}

static __always_inline __be64 first_half(const union addr *addr)
{
	__be64 half;

	__builtin_memcpy(&half, addr, sizeof(half));
	return half;
}

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* The same of a sum of 32-bit words. */
static __always_inline __u16 fold_sum(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	return fold(sum);
}

/* One less in the TTL; the checksum follows by RFC 1624. */
static __always_inline void decrement_ttl(struct iphdr *ip)
{
	__u32 sum = ip->check + bpf_htons(0x0100);

	ip->check = sum + (sum >= 0xffff);
	ip->ttl--;
}

/* Set the type of service; the checksum follows by RFC 1624. */
static __always_inline void set_tos(struct iphdr *ip, __u8 tos)
{
	__u32 sum = (__u16)~ip->check + (__u16)~bpf_htons(ip->tos) + bpf_htons(tos);

	/* tos is the low byte of the first word; the version is unchanged. */
	ip->check = fold(sum);
	ip->tos = tos;
}

static __always_inline bool is_extension(__u8 nexthdr)
{
	return nexthdr == NEXTHDR_HOP || nexthdr == NEXTHDR_ROUTING || nexthdr == NEXTHDR_FRAGMENT ||
	       nexthdr == NEXTHDR_AUTH || nexthdr == NEXTHDR_DEST;
}

/*
 * Go over the extension headers, the first of which is at offset; the context gets what is behind them. A function of
 * its own, which the verifier looks at once. False: cut short, or too many.
 */
__noinline int find_upper(struct __sk_buff *skb, __u32 offset, __u8 nexthdr)
{
	struct context *ctx = context();
	struct upper upper = {};
	struct {
		__u8 head[4];
		__be32 id;
	} ext;

	if (!ctx)
		return false;
	for (int i = 0; i < EXTENSIONS_MAX && is_extension(nexthdr) && nexthdr != NEXTHDR_ROUTING && !upper.later;
	     i++) {
		if (bpf_skb_load_bytes(skb, offset, &ext, sizeof(ext)))
			return false;
		if (nexthdr == NEXTHDR_FRAGMENT) {
			offset += 8;
			upper.id = ext.id;
			upper.later = ext.head[2] << 8 | (ext.head[3] & 0xf8);
			upper.first = !upper.later && ext.head[3] & 1;
		} else {
			offset += nexthdr == NEXTHDR_AUTH ? (ext.head[1] + 2) * 4 : (ext.head[1] + 1) * 8;
		}
		nexthdr = ext.head[0];
	}
	upper.offset = offset;
	upper.protocol = nexthdr;
	ctx->upper = upper;
	return upper.later || nexthdr == NEXTHDR_ROUTING || !is_extension(nexthdr);
}

/* Read len bytes at offset; directly where they are in the linear part. len is a literal. */
static __always_inline bool load(struct __sk_buff *skb, __u64 offset, void *to, __u32 len)
{
	/* Opaque before the check, so that what is checked is the register that is used. */
	asm volatile("" : "+r"(offset));
	if (offset < 256) {
		void *from = packet_start(skb) + offset;

		if (from + len <= packet_end(skb)) {
			__builtin_memcpy(to, from, len);
			return true;
		}
	}
	return !bpf_skb_load_bytes(skb, offset, to, len);
}

/* Write them, in the same way; the checksums are the caller's. */
static __always_inline bool store(struct __sk_buff *skb, __u64 offset, const void *from, __u32 len)
{
	asm volatile("" : "+r"(offset));
	if (offset < 256) {
		void *to = packet_start(skb) + offset;

		if (to + len <= packet_end(skb)) {
			__builtin_memcpy(to, from, len);
			return true;
		}
	}
	return !bpf_skb_store_bytes(skb, offset, from, len, 0);
}

static __always_inline __u8 traffic_class(const struct ipv6hdr *ip)
{
	return bpf_ntohs(*(__be16 *)ip) >> 4;
}

static __always_inline void set_traffic_class(struct ipv6hdr *ip, __u8 tc)
{
	__be16 *word = (__be16 *)ip;

	*word = (*word & bpf_htons(0xf00f)) | bpf_htons((__u16)tc << 4);
}

/* Read the IP header at offset; the context gets addresses, class and length of the packet. False: it is not whole, or not honest. */
static __always_inline bool read_v4(struct __sk_buff *skb, struct context *ctx, __u32 offset)
{
	struct iphdr *ip = packet_start(skb) + offset;
	__u32 total;

	if ((void *)(ip + 1) > packet_end(skb) || ip->version != 4 || ip->ihl < 5)
		return false;
	total = skb->gso_size ? skb->len - offset : bpf_ntohs(ip->tot_len);
	if (total < ip->ihl * 4u || total > skb->len - offset)
		return false;
	ctx->v4 = 1;
	ctx->tos = ip->tos;
	ctx->l3_len = total < 0xffff ? total : 0xffff;
	map_v4(&ctx->key.src, ip->saddr);
	map_v4(&ctx->key.dst, ip->daddr);
	return true;
}

static __always_inline bool read_v6(struct __sk_buff *skb, struct context *ctx, __u32 offset)
{
	struct ipv6hdr *ip = packet_start(skb) + offset;
	__u32 total;

	if ((void *)(ip + 1) > packet_end(skb) || ip->version != 6)
		return false;
	total = skb->gso_size ? skb->len - offset : bpf_ntohs(ip->payload_len) + sizeof(*ip);
	if (total > skb->len - offset)
		return false;
	ctx->v4 = 0;
	ctx->tos = traffic_class(ip);
	ctx->l3_len = total < 0xffff ? total : 0xffff;
	__builtin_memcpy(&ctx->key.src, &ip->saddr, sizeof(ctx->key.src));
	__builtin_memcpy(&ctx->key.dst, &ip->daddr, sizeof(ctx->key.dst));
	return !is_mapped_v4(&ctx->key.dst) && !is_mapped_v4(&ctx->key.src);
}
