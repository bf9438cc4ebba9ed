// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the eBPF data plane: one compilation unit, lace.c, and what bpf2go makes of it.
package bpf
