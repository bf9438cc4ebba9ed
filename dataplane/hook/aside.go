// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
)

// shared are the pinned tables whose rows decide about a packet. Whatever a packet leaves behind (flows, counters,
// events, budgets) is in tables of the programs' own.
var shared = []string{
	"generation", "node_config", "heartbeat", "ports", "endpoints", "fdb", "groups", "members", "networks", "blocks", "peerings",
	"externals", "published", "this_host", "addresses", "egresses", "peers", "nexthops",
}

// Aside is the programs once more, beside those that are attached: they read the configuration that holds, and leave no
// trace in what the attached ones know and count. They tell of every stage that a packet comes to.
type Aside struct {
	coll   *ebpf.Collection
	maps   *maps.Maps
	events *ringbuf.Reader
}

// Outcome is what became of a packet.
type Outcome struct {
	Return uint32         // of the entry program: TC_ACT_SHOT is 2, TC_ACT_REDIRECT 7, TC_ACT_UNSPEC 0xffffffff
	Frame  []byte         // the packet as it was left, from its Ethernet header on
	Reason bpf.LaceReason // by which it was counted as one that goes on; 0: it was not
	Events [][]byte       // struct event of bpf/lib/types.h, in their order
}

// LoadAside loads the programs with the configuration that is pinned below dir. Nothing that is attached or pinned
// changes; an agent may run or not.
func LoadAside(dir string) (*Aside, error) {
	spec, err := bpf.LoadLace()
	if err != nil {
		return nil, fmt.Errorf("read the built-in eBPF object: %w", err)
	}
	decap, err := probeDecap(spec)
	if err != nil {
		return nil, err
	}
	if err := setConstants(spec, decap); err != nil {
		return nil, err
	}
	if err := spec.Variables[bpf.LaceVarExplaining].Set(uint8(1)); err != nil {
		return nil, fmt.Errorf("set constant %s: %w", bpf.LaceVarExplaining, err)
	}
	replace, closeAll, err := openPinned(dir, shared)
	if err != nil {
		return nil, err
	}
	defer closeAll() // the collection has clones
	a := &Aside{}
	if a.coll, err = ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace}); err != nil {
		return nil, explainLoad(err, PinDir(dir))
	}
	if err := a.prepare(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	if err := a.learn(dir); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// learn tells the programs where the attached ones have seen MAC addresses that no pool and no endpoint has: they write to
// that table too, so that they get a copy.
func (a *Aside) learn(dir string) error {
	live, closeAll, err := openPinned(dir, []string{"learned"})
	if err != nil {
		return err
	}
	defer closeAll()
	var key bpf.LaceSightingKey
	var value bpf.LaceSighting
	rows := live["learned"].Iterate()
	for rows.Next(&key, &value) {
		if err := a.coll.Maps["learned"].Put(key, value); err != nil {
			return fmt.Errorf("copy table learned: %w", err)
		}
	}
	if err := rows.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) { // rows come and go meanwhile
		return fmt.Errorf("read table learned: %w", err)
	}
	return nil
}

// prepare gives the programs a table of flows and tail calls of their own, and listens to their events.
func (a *Aside) prepare() (err error) {
	if a.maps, err = maps.New(a.coll.Maps); err != nil {
		return err
	}
	if err := a.maps.InitFlows(); err != nil {
		return err
	}
	if err := putStages(a.coll); err != nil {
		return err
	}
	if a.events, err = ringbuf.NewReader(a.coll.Maps["events"]); err != nil {
		return fmt.Errorf("listen to the programs: %w", err)
	}
	a.events.SetDeadline(time.Unix(1, 0)) // what they tell is there when they have run
	return nil
}

// Run has a packet come in at an interface of this network namespace and returns what became of it. No packet
// leaves: the kernel only says what the program would have done. frame begins with an Ethernet header.
func (a *Aside) Run(p Program, ifindex int, frame []byte) (Outcome, error) {
	program := a.coll.Programs[string(p)]
	if program == nil {
		return Outcome{}, fmt.Errorf("run a packet: there is no program %q", p)
	}
	before, err := a.passed()
	if err != nil {
		return Outcome{}, err
	}
	run := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+outRoom), Context: skContext(ifindex)}
	rc, err := program.Run(run)
	if err != nil {
		return Outcome{}, fmt.Errorf("run a packet through program %s at interface %d: %w", p, ifindex, err)
	}
	o := Outcome{Return: rc, Frame: run.DataOut}
	if o.Events, err = a.told(); err != nil {
		return o, err
	}
	after, err := a.passed()
	for reason, packets := range after {
		if packets > before[reason] {
			o.Reason = reason
		}
	}
	return o, err
}

// outRoom is what a program may add to a packet: an outer header, or what an ICMP error has more than its cause.
const outRoom = 512

// skContext is struct __sk_buff of linux/bpf.h, with nothing but the interface where the packet comes in.
func skContext(ifindex int) []byte {
	const size, offsetIfindex = 192, 40
	c := make([]byte, size)
	binary.NativeEndian.PutUint32(c[offsetIfindex:], uint32(ifindex))
	return c
}

func (a *Aside) told() (events [][]byte, err error) {
	for {
		record, err := a.events.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return events, nil
		}
		if err != nil {
			return events, fmt.Errorf("read what the programs tell: %w", err)
		}
		events = append(events, record.RawSample)
	}
}

// passed counts the packets that went on, by reason.
func (a *Aside) passed() (map[bpf.LaceReason]uint64, error) {
	counters, err := a.maps.Counters()
	packets := map[bpf.LaceReason]uint64{}
	for _, c := range counters {
		if !maps.IsRefusal(c.Reason) {
			packets[c.Reason] = c.Packets
		}
	}
	return packets, err
}

// Close takes the programs and their tables away.
func (a *Aside) Close() error {
	var err error
	if a.events != nil {
		err = a.events.Close()
	}
	a.coll.Close()
	return err
}
