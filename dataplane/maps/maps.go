// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
)

// Names of the maps that outlive the agent, pinned. The others are scratch of the programs.
var Pinned = []string{
	"node_config", "heartbeat", "ports", "endpoints", "networks", "blocks", "peers", "nexthops", "counters", "budgets", "events",
}

// Maps are the tables of one data plane.
type Maps struct {
	Ports     Table[uint32, bpf.LacePort]
	Endpoints Table[bpf.LaceEndpointKey, bpf.LaceEndpoint]
	Networks  Table[uint32, uint32]
	Blocks    Table[bpf.LaceBlockKey, bpf.LaceBlock]
	Peers     Table[uint64, bpf.LacePeer]

	config    *ebpf.Map
	heartbeat *ebpf.Map
	nexthops  *ebpf.Map
	counters  *ebpf.Map
}

// New finds the tables among loaded or pinned maps, by the names of Pinned.
func New(m map[string]*ebpf.Map) (*Maps, error) {
	for _, name := range Pinned {
		if m[name] == nil {
			return nil, fmt.Errorf("map %s is not there: is the data plane loaded?", name)
		}
	}
	return &Maps{
		Ports:     Table[uint32, bpf.LacePort]{"ports", m["ports"]},
		Endpoints: Table[bpf.LaceEndpointKey, bpf.LaceEndpoint]{"endpoints", m["endpoints"]},
		Networks:  Table[uint32, uint32]{"networks", m["networks"]},
		Blocks:    Table[bpf.LaceBlockKey, bpf.LaceBlock]{"blocks", m["blocks"]},
		Peers:     Table[uint64, bpf.LacePeer]{"peers", m["peers"]},
		config:    m["node_config"],
		heartbeat: m["heartbeat"],
		nexthops:  m["nexthops"],
		counters:  m["counters"],
	}, nil
}

// isFull tells the kernel's answer to one row too many.
func isFull(err error) bool { return errors.Is(err, unix.E2BIG) }

// addr is the form of an address in the maps: IPv4 as ::ffff:a.b.c.d.
func addr(a netip.Addr) (out struct{ U8 [16]uint8 }) {
	if a.IsValid() {
		out.U8 = a.As16()
	}
	return out
}

// be32 is an IPv4 address as the programs compare it: its four bytes as they are on the wire.
func be32(a netip.Addr) uint32 {
	if !a.Is4() {
		return 0
	}
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

// firstHalf is the first 64 bits of a prefix, as they are on the wire, and the mask over them.
func firstHalf(p netip.Prefix) (value, mask uint64) {
	b := p.Masked().Addr().As16()
	var m [8]byte
	binary.BigEndian.PutUint64(m[:], ^uint64(0)<<(64-min(p.Bits(), 64)))
	mask = binary.NativeEndian.Uint64(m[:])
	return binary.NativeEndian.Uint64(b[:8]) & mask, mask
}

// mappedBits is the length of a prefix among 128-bit addresses: 96 more for IPv4.
func mappedBits(p netip.Prefix) uint32 {
	if p.Addr().Is4() {
		return uint32(p.Bits()) + 96
	}
	return uint32(p.Bits())
}

// WriteConfig writes what holds for the whole node. vrf: the gateways' addresses are on bridges in VRFs.
func (m *Maps) WriteConfig(p *plan.Plan, vrf bool) error {
	c := bpf.LaceConfig{LocatorBits: uint8(p.Locator.Bits())}
	c.Locator, c.LocatorMask = firstHalf(p.Locator.Prefix)
	c.LocatorBlock, c.LocatorBlockMask = firstHalf(p.LocatorBlock)
	if p.Encapsulation.Overhead() > 40 {
		c.Srh = 1
	}
	if vrf {
		c.Vrf = 1
	}
	c.Gateway.U8 = plan.GatewayMAC
	if err := m.config.Put(uint32(0), c); err != nil {
		return fmt.Errorf("write map node_config: %w", err)
	}
	return nil
}

// Beat vouches for the nexthops: the programs use their MAC addresses for two minutes from now on, and
// ask the kernel's own neighbour table after that.
func (m *Maps) Beat() error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &now); err != nil {
		return fmt.Errorf("read the coarse clock: %w", err)
	}
	if err := m.heartbeat.Put(uint32(0), uint64(now.Nano())); err != nil {
		return fmt.Errorf("write map heartbeat: %w", err)
	}
	return nil
}
