//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/types.h>
#include "lib/maps.h"
#include <linux/pkt_cls.h>
const enum reason *reason_in_btf __attribute__((unused));
const enum stage *stage_in_btf __attribute__((unused));
const enum verdict *verdict_in_btf __attribute__((unused));
const enum flow_state *flow_state_in_btf __attribute__((unused));
const enum flow_flags *flow_flags_in_btf __attribute__((unused));
const enum port_flags *port_flags_in_btf __attribute__((unused));
const enum network_flags *network_flags_in_btf __attribute__((unused));
const enum block_flags *block_flags_in_btf __attribute__((unused));
const enum nexthop_flags *nexthop_flags_in_btf __attribute__((unused));
const struct collection *collection_in_btf __attribute__((unused));
const struct event *event_in_btf __attribute__((unused));
volatile const __u8 decap_by_flags = 1;
volatile const __u8 explaining = 0;
SEC("tc") int probe_empty(struct __sk_buff *skb) { 
	__u32 k = decap_by_flags + explaining; 
	void *a = bpf_map_lookup_elem(&flows, &k);
	return TC_ACT_OK + !!a;
}
char _license[] SEC("license") = "Dual BSD/GPL";
