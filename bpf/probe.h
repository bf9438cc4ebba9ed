/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Programs that are only run by BPF_PROG_TEST_RUN, to find out what the kernel can do. */
#pragma once

#include "lib/srv6.h"

/* Give it Ethernet, outer IPv6, inner IPv4: returns 0 where the kernel decapsulates by flags. */
SEC("tc")
int probe_decap(struct __sk_buff *skb)
{
	return bpf_skb_adjust_room(skb, -OUTER_LEN, BPF_ADJ_ROOM_MAC,
				   BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_DECAP_L3_IPV4)
		       ? 1
		       : 0;
}

/* Does nothing: what a program costs before it does anything. */
SEC("tc")
int probe_empty(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}
