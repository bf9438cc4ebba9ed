// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// vlan is a tag that the kernel has taken off a frame before the programs run.
type vlan struct{ proto, tci uint16 }

// tagger is a program that gives a frame the tag, as the kernel does at an interface, and goes on to another program: what
// BPF_PROG_TEST_RUN has no field for.
func (n *node) tagger(program string, tag vlan) *ebpf.Program {
	n.t.Helper()
	next, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(n.t, err)
	n.t.Cleanup(func() { next.Close() })
	must(n.t, next.Put(uint32(0), n.coll.Programs[program]))
	return newProgram(n.t, "tagger", asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Mov.Imm(asm.R2, int32(onWire(tag.proto))), asm.Mov.Imm(asm.R3, int32(tag.tci)), asm.FnSkbVlanPush.Call(),
		asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, next.FD()), asm.Mov.Imm(asm.R3, 0), asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, ok), asm.Return(),
	})
}

func newProgram(t testing.TB, name string, insns asm.Instructions) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, License: "GPL", Instructions: insns})
	must(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}
