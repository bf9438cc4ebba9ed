// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// probeDecap runs a decapsulation by flags on a made-up packet. Kernel 6.1 loads the flags and
// refuses them at run time, so neither its version nor the verifier tells.
func probeDecap(spec *ebpf.CollectionSpec) (bool, error) {
	probe := spec.Programs["probe_decap"]
	p, err := ebpf.NewProgram(probe)
	if err != nil {
		return false, fmt.Errorf("load the decapsulation probe: %w (eBPF needs root and a kernel with CONFIG_BPF_SYSCALL)", err)
	}
	defer p.Close()
	rc, err := p.Run(&ebpf.RunOptions{Data: probePacket(), DataOut: make([]byte, 256)})
	if err != nil {
		return false, fmt.Errorf("run the decapsulation probe: %w", err)
	}
	return rc == 0, nil
}

// probePacket is Ethernet, IPv6 with next header 4, IPv4 with an empty UDP datagram: 82 bytes.
func probePacket() []byte {
	b := make([]byte, 14+40+20+8)
	binary.BigEndian.PutUint16(b[12:], 0x86dd)
	outer := b[14:]
	outer[0] = 0x60
	binary.BigEndian.PutUint16(outer[4:], 28)
	outer[6], outer[7] = 4, 64
	inner := b[54:]
	inner[0] = 0x45
	binary.BigEndian.PutUint16(inner[2:], 28)
	inner[8], inner[9] = 64, 17
	return b
}

// loopback is interface 1 in every network namespace.
const loopback = 1

// probeTCX attaches an empty program to the loopback for a moment; it lets every packet pass.
func probeTCX(empty *ebpf.Program) (bool, error) {
	l, err := link.AttachTCX(link.TCXOptions{Interface: loopback, Program: empty, Attach: ebpf.AttachTCXIngress, Anchor: link.Tail()})
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, link.ErrNotSupported) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("probe for TCX on the loopback: %w", err)
	}
	return true, l.Close()
}
