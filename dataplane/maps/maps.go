// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
)

// Names of the maps that outlive the agent, pinned. The others are scratch of the programs.
var Pinned = []string{
	"generation", "node_config", "heartbeat", "ports", "endpoints", "fdb", "groups", "members", "learned", "networks", "blocks", "peerings", "externals", "published",
	"this_host", "addresses", "egresses", "peers", "nexthops",
	"flows", "fragments", "traffic", "refusals", "counters", "budgets", "events",
}

// Maps are the tables of one data plane. Any number of processes may read them; one, the agent, writes the configuration,
// one call at a time. Keys of the configuration name a slot: see Generation.
type Maps struct {
	Ports     Table[bpf.LacePortKey, bpf.LacePort]
	Endpoints Table[bpf.LaceEndpointKey, bpf.LaceEndpoint]
	FDB       Table[bpf.LaceFdbKey, bpf.LaceStation]
	Groups    Table[uint32, bpf.LaceGroup] // by scope
	Members   Table[bpf.LaceMemberKey, bpf.LaceMember]
	Networks  Table[uint32, bpf.LaceNetwork] // by scope
	Blocks    Table[bpf.LaceBlockKey, bpf.LaceBlock]
	Peerings  Table[bpf.LacePeeringKey, bpf.LacePeering]
	Externals Table[bpf.LaceExternalKey, bpf.LaceExternal]
	Published Table[bpf.LacePublicationKey, bpf.LacePublication]
	Peers     Table[bpf.LacePeerKey, bpf.LacePeer]

	generation *ebpf.Map
	config     *ebpf.Map
	heartbeat  *ebpf.Map
	host       Table[uint32, bpf.LaceHost]
	addresses  Table[bpf.LaceAddr, uint32]   // interfaces by address
	egresses   Table[uint32, bpf.LaceEgress] // by interface
	nexthops   Table[uint32, bpf.LaceNexthop]
	learned    *ebpf.Map
	flows      *ebpf.Map // the outer one
	traffic    *ebpf.Map
	refusals   *ebpf.Map
	counters   *ebpf.Map

	resizing sync.RWMutex // read: the inner map of flows must not be replaced meanwhile
}

// New finds the tables among loaded or pinned maps, by the names of Pinned.
func New(m map[string]*ebpf.Map) (*Maps, error) {
	for _, name := range Pinned {
		if m[name] == nil {
			return nil, fmt.Errorf("map %s is not there: is the data plane loaded?", name)
		}
	}
	return &Maps{
		Ports:      Table[bpf.LacePortKey, bpf.LacePort]{"ports", m["ports"]},
		Endpoints:  Table[bpf.LaceEndpointKey, bpf.LaceEndpoint]{"endpoints", m["endpoints"]},
		FDB:        Table[bpf.LaceFdbKey, bpf.LaceStation]{"fdb", m["fdb"]},
		Groups:     Table[uint32, bpf.LaceGroup]{"groups", m["groups"]},
		Members:    Table[bpf.LaceMemberKey, bpf.LaceMember]{"members", m["members"]},
		Networks:   Table[uint32, bpf.LaceNetwork]{"networks", m["networks"]},
		Blocks:     Table[bpf.LaceBlockKey, bpf.LaceBlock]{"blocks", m["blocks"]},
		Peerings:   Table[bpf.LacePeeringKey, bpf.LacePeering]{"peerings", m["peerings"]},
		Externals:  Table[bpf.LaceExternalKey, bpf.LaceExternal]{"externals", m["externals"]},
		Published:  Table[bpf.LacePublicationKey, bpf.LacePublication]{"published", m["published"]},
		Peers:      Table[bpf.LacePeerKey, bpf.LacePeer]{"peers", m["peers"]},
		generation: m["generation"],
		config:     m["node_config"],
		heartbeat:  m["heartbeat"],
		host:       Table[uint32, bpf.LaceHost]{"this_host", m["this_host"]},
		addresses:  Table[bpf.LaceAddr, uint32]{"addresses", m["addresses"]},
		egresses:   Table[uint32, bpf.LaceEgress]{"egresses", m["egresses"]},
		nexthops:   Table[uint32, bpf.LaceNexthop]{"nexthops", m["nexthops"]},
		learned:    m["learned"],
		flows:      m["flows"],
		traffic:    m["traffic"],
		refusals:   m["refusals"],
		counters:   m["counters"],
	}, nil
}

// isFull tells the kernel's answer to one row too many: E2BIG of a hash map, ENOSPC of a trie.
func isFull(err error) bool { return errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) }

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

// coarse reads the clock that the programs go by, in nanoseconds.
func coarse() (uint64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &now); err != nil {
		return 0, fmt.Errorf("read the coarse clock: %w", err)
	}
	return uint64(now.Nano()), nil
}

// Beat vouches for the nexthops: the programs use their MAC addresses for two minutes from now on, and
// ask the kernel's own neighbour table after that.
func (m *Maps) Beat() error {
	now, err := coarse()
	if err != nil {
		return err
	}
	if err := m.heartbeat.Put(uint32(0), now); err != nil {
		return fmt.Errorf("write map heartbeat: %w", err)
	}
	return nil
}
