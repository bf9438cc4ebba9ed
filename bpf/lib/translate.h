/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Translate: addresses, ports and identifiers of a packet become those of the context's rewrite, and all checksums follow by
 * difference (RFC 1624, RFC 3022 4.2), in packets that are still to be segmented and checksummed too.
 */
#pragma once

#include "flow.h"

/* Can packets of the flow be told apart by more than their addresses, and are their checksums known? */
static __always_inline bool is_translatable(const struct flow_key *key)
{
	return key->protocol == IPPROTO_TCP || key->protocol == IPPROTO_UDP || is_icmp(key);
}

#define TCP_CHECKSUM 16
#define UDP_CHECKSUM 6
#define ICMP_CHECKSUM 2
#define ICMP_ID 4

/* Source and destination address. */
struct addresses_v4 {
	__be32 src;
	__be32 dst;
};

struct addresses_v6 {
	union addr src;
	union addr dst;
};

/* Source and destination port. */
struct ports {
	__be16 src;
	__be16 dst;
};

/*
 * How a checksum that covers the addresses learns of their change. Of a packet whose sum the interface has computed (COMPLETE) the
 * kernel keeps the sum itself: there IPv6 addresses count as payload as well, and their change and that of the checksum cancel out. Only
 * such a packet has a sum to be updated.
 */
static __always_inline __u64 pseudo_flag(struct __sk_buff *skb, bool v4)
{
	return !v4 && bpf_csum_update(skb, 0) >= 0 ? 0 : BPF_F_PSEUDO_HDR;
}

/* An IPv4 header's addresses. sum: the unfolded difference. offset: of the header. */
static __always_inline bool rewrite_v4(struct __sk_buff *skb, __u32 offset, const union addr *src,
				       const union addr *dst, __s64 *sum)
{
	struct addresses_v4 old, new = { .src = src->be32[3], .dst = dst->be32[3] };
	__u16 check;

	if (!load(skb, offset + offsetof(struct iphdr, saddr), &old, sizeof(old)) ||
	    !load(skb, offset + offsetof(struct iphdr, check), &check, sizeof(check)))
		return false;
	*sum = bpf_csum_diff((void *)&old, sizeof(old), (void *)&new, sizeof(new), 0);
	check = fold_sum(*sum + (__u16)~check);
	return store(skb, offset + offsetof(struct iphdr, check), &check, sizeof(check)) &&
	       store(skb, offset + offsetof(struct iphdr, saddr), &new, sizeof(new));
}

static __always_inline bool rewrite_v6(struct __sk_buff *skb, __u32 offset, const union addr *src,
				       const union addr *dst, __s64 *sum)
{
	struct addresses_v6 old, new = { .src = *src, .dst = *dst };

	if (!load(skb, offset + offsetof(struct ipv6hdr, saddr), &old, sizeof(old)))
		return false;
	*sum = bpf_csum_diff((void *)&old, sizeof(old), (void *)&new, sizeof(new), 0);
	return store(skb, offset + offsetof(struct ipv6hdr, saddr), &new, sizeof(new));
}

static __always_inline bool rewrite_addresses(struct __sk_buff *skb, bool v4, __u32 offset, const union addr *src,
					      const union addr *dst, __s64 *sum)
{
	return v4 ? rewrite_v4(skb, offset, src, dst, sum) : rewrite_v6(skb, offset, src, dst, sum);
}

/* The ports at offset. check: of the checksum that covers them. */
static __always_inline bool rewrite_ports(struct __sk_buff *skb, __u32 offset, __u32 check, struct ports new,
					  __u64 flags)
{
	struct ports old;
	__u32 from, to;

	if (!load(skb, offset, &old, sizeof(old)))
		return false;
	__builtin_memcpy(&from, &old, sizeof(from));
	__builtin_memcpy(&to, &new, sizeof(to));
	if (from == to)
		return true;
	return !bpf_l4_csum_replace(skb, check, from, to, flags | sizeof(from)) &&
	       store(skb, offset, &new, sizeof(new));
}

/* The identifier of an ICMP query at offset. */
static __always_inline bool rewrite_id(struct __sk_buff *skb, __u32 offset, __u32 check, __be16 new)
{
	__be16 old;

	if (!load(skb, offset + ICMP_ID, &old, sizeof(old)))
		return false;
	if (old == new)
		return true;
	return !bpf_l4_csum_replace(skb, check, old, new, sizeof(old)) &&
	       store(skb, offset + ICMP_ID, &new, sizeof(new));
}

/* The transport header. sum: what the addresses changed by. */
static __always_inline bool rewrite_transport(struct __sk_buff *skb, const struct context *ctx, __u32 offset, __s64 sum)
{
	struct ports ports = { .src = ctx->rewrite.sport, .dst = ctx->rewrite.dport };
	/* A UDP checksum of 0 is none, and stays so. */
	__u64 udp = ctx->key.protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u32 check = offset + (udp ? UDP_CHECKSUM : TCP_CHECKSUM);

	if (is_icmp(&ctx->key))
		check = offset + ICMP_CHECKSUM;
	if (sum && ctx->key.protocol != IPPROTO_ICMP &&
	    bpf_l4_csum_replace(skb, check, 0, sum, pseudo_flag(skb, ctx->v4) | udp))
		return false;
	return is_icmp(&ctx->key) ? rewrite_id(skb, offset, check, ctx->rewrite.sport)
				  : rewrite_ports(skb, offset, check, ports, udp);
}

/*
 * Rewrite the packet behind the Ethernet header: whole, or a fragment. 0, or not. A function of its own, which the verifier
 * looks at once.
 */
__noinline int translate(struct __sk_buff *skb)
{
	struct context *ctx = context();
	__s64 sum = 0;

	if (!ctx || !rewrite_addresses(skb, ctx->v4, ETH_HLEN, &ctx->rewrite.src, &ctx->rewrite.dst, &sum))
		return -1;
	if (ctx->kind == PACKET_LATER_FRAGMENT) {
		if (!ctx->v4) /* nothing in it makes up for the addresses, where the interface has summed them */
			bpf_csum_update(skb, sum);
		return 0;
	}
	return rewrite_transport(skb, ctx, ETH_HLEN + ctx->l4, sum) ? 0 : -1;
}
