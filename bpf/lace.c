//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The data plane, one compilation unit. A stage is a file; this is their order. A packet of a known flow goes
 * from its entry program to its end at once; the stages decide what is new.
 *
 *   container, L3   pod_l3 ─┬─ gateway
 *                           └─ route ── deliver ── uplink or container
 *   container, L2   pod_l2 ─┬─ as above, for what is sent to the gateway
 *                           ├─ bridge ─ deliver ── uplink or container
 *                           ├─ neighbour ───────── back, or as a frame for one or for many
 *                           └─ flood ───────────── uplinks and containers
 *   uplink          uplink ─┬─ route ── deliver ── container
 *                           └─ frame ─┬ bridge ─── deliver ── container
 *                                     ├ neighbour ─ back
 *                                     └ flood ───── containers
 */
#include <stdbool.h>
#include <stddef.h>
#include "classify.h"
#include "gateway.h"
#include "route.h"
#include "deliver.h"
#include "masquerade.h"
#include "egress.h"
#include "error.h"
#include "uplink.h"
#include "outer.h"
#include "frame.h"
#include "flood.h"
#include "neighbour.h"
#include "collect.h"
#include "probe.h"

/* Enums and structs reach BTF, and so Go, only where a variable has their type. */
const enum reason *reason_in_btf __attribute__((unused));
const enum stage *stage_in_btf __attribute__((unused));
const enum verdict *verdict_in_btf __attribute__((unused));
const enum flow_state *flow_state_in_btf __attribute__((unused));
const enum flow_flags *flow_flags_in_btf __attribute__((unused));
const enum port_flags *port_flags_in_btf __attribute__((unused));
const enum network_flags *network_flags_in_btf __attribute__((unused));
const enum block_flags *block_flags_in_btf __attribute__((unused));
const enum endpoint_flags *endpoint_flags_in_btf __attribute__((unused));
const enum l2_gso *l2_gso_in_btf __attribute__((unused));
const enum budget_kind *budget_kind_in_btf __attribute__((unused));
const enum peering_flags *peering_flags_in_btf __attribute__((unused));
const enum egress_flags *egress_flags_in_btf __attribute__((unused));
const enum way *way_in_btf __attribute__((unused));
const enum outer_side *outer_side_in_btf __attribute__((unused));
const enum nexthop_flags *nexthop_flags_in_btf __attribute__((unused));
const struct collection *collection_in_btf __attribute__((unused));
const struct event *event_in_btf __attribute__((unused));

char _license[] SEC("license") = "Dual BSD/GPL";
