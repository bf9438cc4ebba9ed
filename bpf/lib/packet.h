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

static __always_inline void count(struct __sk_buff *skb, __u32 reason)
{
	struct counter *counter = bpf_map_lookup_elem(&counters, &reason);

	if (!counter)
		return;
	counter->packets++;
	counter->bytes += skb->len;
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

/* Tell whoever listens of a refused packet. */
static __noinline int tell(struct __sk_buff *skb, __u32 reason)
{
	__u32 zero = 0;
	struct event_budget *budget = bpf_map_lookup_elem(&event_budgets, &zero);
	struct context *ctx = context();
	__u64 len = skb->len;
	struct event *event;

	if (!budget || !ctx || !may_tell(budget))
		return 0;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return 0;
	event->time = bpf_ktime_get_ns();
	event->reason = reason;
	event->ifindex = skb->ifindex;
	event->len = len;
	event->missed = budget->missed;
	budget->missed = 0;
	event->ethernet = !ctx->raw;
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

static __always_inline int drop(struct __sk_buff *skb, enum reason reason)
{
	count(skb, reason);
	tell(skb, reason);
	return TC_ACT_SHOT;
}

static __always_inline struct config *node(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&node_config, &zero);
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
	count(skb, reason);
	tell(skb, reason);
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

/* What lies behind the headers of an IPv6 packet. */
struct upper {
	__u32 offset;
	__u8 protocol; /* ROUTING: a routing header, which no packet here may have */
	bool later;    /* a fragment, not the first: the offset is inside of the payload */
};

static __always_inline bool is_extension(__u8 nexthdr)
{
	return nexthdr == NEXTHDR_HOP || nexthdr == NEXTHDR_ROUTING || nexthdr == NEXTHDR_FRAGMENT ||
	       nexthdr == NEXTHDR_AUTH || nexthdr == NEXTHDR_DEST;
}

/* Go over the extension headers behind the IPv6 header. False: cut short, or too many. */
static __always_inline bool find_upper(struct __sk_buff *skb, __u8 nexthdr, struct upper *upper)
{
	__u8 head[4];

	upper->offset = ETH_HLEN + sizeof(struct ipv6hdr);
	upper->later = false;
	for (int i = 0; i < EXTENSIONS_MAX; i++) {
		upper->protocol = nexthdr;
		if (!is_extension(nexthdr) || nexthdr == NEXTHDR_ROUTING)
			return true;
		if (bpf_skb_load_bytes(skb, upper->offset, head, sizeof(head)))
			return false;
		if (nexthdr == NEXTHDR_FRAGMENT) {
			upper->offset += 8;
			upper->later = head[2] || head[3] & 0xf8;
		} else {
			upper->offset += nexthdr == NEXTHDR_AUTH ? (head[1] + 2) * 4 : (head[1] + 1) * 8;
		}
		nexthdr = head[0];
		if (upper->later) {
			upper->protocol = nexthdr;
			return true;
		}
	}
	return false;
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
