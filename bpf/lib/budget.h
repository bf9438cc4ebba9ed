/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Buckets of tokens: what one container makes others do is bounded, and none can spend another's. */
#pragma once

#include "packet.h"

/* May it be done once more? A bucket holds burst tokens, and gets one in every ns. */
static __always_inline bool spend(__u32 kind, __u32 of, __u32 burst, __u64 ns)
{
	struct budget_key key = { .kind = kind, .of = of };
	struct budget *budget = bpf_map_lookup_elem(&budgets, &key);
	__u64 now = bpf_ktime_get_coarse_ns();
	__u64 earned;

	if (!budget) {
		struct budget fresh = { .tokens = (__s64)burst - 1, .stamp = now };

		bpf_map_update_elem(&budgets, &key, &fresh, BPF_ANY);
		return true;
	}
	earned = (now - budget->stamp) / ns;
	if (earned) {
		budget->stamp = now;
		budget->tokens += earned;
		if (budget->tokens > burst)
			budget->tokens = burst;
	}
	if (budget->tokens <= 0)
		return false;
	budget->tokens--;
	return true;
}
