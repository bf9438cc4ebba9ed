// SPDX-License-Identifier: Apache-2.0

package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -output-stem lace -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -idirafter /usr/include/x86_64-linux-gnu" -type port -type endpoint_key -type endpoint -type block_key -type block -type peer -type nexthop -type config -type counter -type reason -type stage -type port_flags -type block_flags -type nexthop_flags Lace lace.c
