// SPDX-License-Identifier: Apache-2.0

package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -output-stem lace -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -idirafter /usr/include/x86_64-linux-gnu" -type port_key -type port -type endpoint_key -type endpoint -type fdb_key -type station -type sighting_key -type sighting -type group -type member_key -type member -type budget_key -type budget -type endpoint_flags -type l2_gso -type budget_kind -type network -type block_key -type block -type peering_key -type peering -type peer_key -type peer -type nexthop -type config -type timeouts -type counter -type refusal_key -type flow_key -type flow -type fragment_key -type fragment -type collection -type event -type reason -type stage -type verdict -type flow_state -type flow_flags -type port_flags -type network_flags -type block_flags -type nexthop_flags Lace lace.c
