// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/dataplane/trace"
	"github.com/lace-net/lace/topology"
)

// Verdicts, as the programs return them.
const (
	shot     = 2
	redirect = 7
)

// asidePlan has two containers in a network of two nodes.
func asidePlan() *plan.Plan {
	locator := func(s string) topology.Locator { return topology.Locator{Prefix: netip.MustParsePrefix(s)} }
	p := &plan.Plan{
		Locator: locator("5f00:1ace:1::/48"), LocatorBlock: netip.MustParsePrefix("5f00:1ace::/32"),
		Networks:  []plan.Network{{Name: "backend", ID: 100, BlockBits4: plan.Lengths{24}, Line: 12}},
		Conntrack: topology.Conntrack{Max: 1000, UDP: time.Minute},
		Peers:     []plan.Peer{{Index: 1, Locator: locator("5f00:1ace:2::/48")}},
		Blocks: []plan.Block{
			{Network: 100, Prefix: netip.MustParsePrefix("10.40.1.0/24"), Local: true},
			{Network: 100, Prefix: netip.MustParsePrefix("10.40.2.0/24"), Peer: 1, SID: locator("5f00:1ace:2::/48").SID(topology.EndDT46, 100)},
		},
	}
	for i := range byte(2) {
		p.Ports = append(p.Ports, plan.Port{HostIf: ifname(int(i)), Gateway4: netip.MustParseAddr("10.40.1.1"), Source: p.Locator.Source(100, 0),
			Attachment: plan.Attachment{NetworkID: 100, V4: netip.AddrFrom4([4]byte{10, 40, 1, 10 + i}), MAC: plan.MAC{2, 0x4c, 0, 0, 0, i}}})
	}
	return p
}

// configured is an agent that has written asidePlan; first and second are the interfaces of its containers.
func configured(t *testing.T, b *bed) (h *Hooks, first, second int) {
	t.Helper()
	h = b.load(false)
	p := asidePlan()
	devices := map[string]maps.Device{}
	var index [2]int
	for i := range index {
		host, _ := b.veth(ifname(i), newNetns(t))
		index[i] = host.Attrs().Index
		devices[ifname(i)] = maps.Device{Index: uint32(index[i]), MTU: 1460}
	}
	hops := []maps.Nexthop{{Peer: 1, Ifindex: uint32(index[1]), MTU: 1500, Known: true, Dst: plan.MAC{2, 9}, Src: plan.MAC{2, 8}}}
	_, err := h.Maps().Sync(p, false, devices, hops)
	must(t, err)
	must(t, h.Maps().InitFlows())
	must(t, h.Maps().Beat())
	return h, index[0], index[1]
}

// datagram is a frame of the first container.
func datagram(to string) []byte {
	b := make([]byte, 14+20+8)
	copy(b, plan.GatewayMAC[:])
	copy(b[6:], []byte{2, 0x4c, 0, 0, 0, 0, 0x08, 0})
	ip := b[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(ip[2:], 28)
	dst := netip.MustParseAddr(to).As4()
	copy(ip[12:], []byte{10, 40, 1, 10})
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[20:], 4242)
	binary.BigEndian.PutUint16(ip[22:], 53)
	binary.BigEndian.PutUint16(ip[24:], 8)
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	return b
}

func (b *bed) aside() *Aside {
	b.t.Helper()
	a, err := LoadAside(b.dir)
	must(b.t, err)
	b.t.Cleanup(func() { a.Close() })
	return a
}

func (b *bed) runAside(a *Aside, p Program, ifindex int, frame []byte) (o Outcome, events []trace.Event) {
	b.t.Helper()
	must(b.t, in(b.t, b.ns, func() (err error) { o, err = a.Run(p, ifindex, frame); return err }))
	for _, raw := range o.Events {
		ev, err := trace.Decode(raw, time.Time{})
		must(b.t, err)
		events = append(events, ev)
	}
	return o, events
}

func stagesOf(events []trace.Event) (out []bpf.LaceStage) {
	for _, e := range events {
		if e.Verdict == bpf.LaceVerdictVERDICT_STEP {
			out = append(out, e.Stage)
		}
	}
	return out
}

func TestAsideTellsEveryStage(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	_, first, second := configured(t, b)
	a := b.aside()
	route, deliver := bpf.LaceStageSTAGE_ROUTE, bpf.LaceStageSTAGE_DELIVER
	for _, tt := range []struct {
		name, to string
		stages   []bpf.LaceStage
		verdict  bpf.LaceVerdict
		reason   bpf.LaceReason
		output   int
		sid      string
	}{
		{"local", "10.40.1.11", []bpf.LaceStage{0, route, deliver}, bpf.LaceVerdictVERDICT_PASSED, bpf.LaceReasonREASON_LOCAL, second, ""},
		{"remote", "10.40.2.7", []bpf.LaceStage{0, route, deliver}, bpf.LaceVerdictVERDICT_PASSED, bpf.LaceReasonREASON_ENCAPSULATED, 0, "5f00:1ace:2:14:0:6400::"},
		{"nowhere", "10.99.0.1", []bpf.LaceStage{0, route, bpf.LaceStageSTAGE_ERROR}, bpf.LaceVerdictVERDICT_REFUSED, bpf.LaceReasonREASON_NO_ROUTE, 0, ""},
		{"again", "10.40.1.11", []bpf.LaceStage{0}, bpf.LaceVerdictVERDICT_STEP, 0, 0, ""}, // known by now, to the run
	} {
		o, events := b.runAside(a, PodL3, first, datagram(tt.to))
		if o.Return != redirect {
			t.Errorf("%s: program returns %d", tt.name, o.Return)
		}
		if got := stagesOf(events); !slices.Equal(got, tt.stages) {
			t.Errorf("%s: came to stages %v, want %v", tt.name, got, tt.stages)
		}
		last := events[len(events)-1]
		for _, e := range events { // the error stage comes after the verdict
			if e.Verdict != bpf.LaceVerdictVERDICT_STEP {
				last = e
			}
		}
		if last.Verdict != tt.verdict || last.Reason != tt.reason || int(last.Output) != tt.output || (tt.sid != "" && last.SID.String() != tt.sid) {
			t.Errorf("%s: got %+v", tt.name, last)
		}
	}
}

// trail is what a packet would leave in the live tables.
type trail struct {
	flows, counted, refused, events int
	generation                      uint32
	pins                            []string
}

func (b *bed) trail(h *Hooks) (s trail) {
	b.t.Helper()
	table, err := h.Maps().OpenFlows()
	must(b.t, err)
	defer table.Close()
	must(b.t, maps.EachFlow(table, func(maps.Flow) error { s.flows++; return nil }))
	counters, err := h.Maps().Counters()
	must(b.t, err)
	byNetwork, err := h.Maps().NetworkCounters()
	must(b.t, err)
	s.counted, s.refused = len(counters), len(byNetwork)
	r, err := ringbuf.NewReader(h.Collection().Maps["events"])
	must(b.t, err)
	defer r.Close()
	r.SetDeadline(time.Unix(1, 0))
	for ; ; s.events++ {
		if _, err := r.Read(); errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	s.generation, err = h.Maps().Generation()
	must(b.t, err)
	s.pins = b.pins()
	return s
}

func TestAsideLeavesNoTrace(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	h, first, _ := configured(t, b)
	before := b.trail(h)
	a := b.aside()
	for _, to := range []string{"10.40.1.11", "10.40.2.7", "10.99.0.1", "10.40.1.99"} {
		b.runAside(a, PodL3, first, datagram(to))
	}
	after := b.trail(h)
	if after.flows != before.flows || after.counted != before.counted || after.refused != before.refused || after.events != 0 ||
		after.generation != before.generation || !slices.Equal(after.pins, before.pins) {
		t.Errorf("before %+v\nafter  %+v", before, after)
	}
}

// The configuration is the one that holds now, with an agent and without.
func TestAsideFollowsTheLiveTables(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	h, first, _ := configured(t, b)
	a := b.aside()
	must(t, h.Maps().Ports.Delete(bpf.LacePortKey{Ifindex: uint32(first), Slot: activeSlot(t, h)}))
	must(t, h.Close())
	o, events := b.runAside(a, PodL3, first, datagram("10.40.1.11"))
	if o.Return != shot || events[len(events)-1].Reason != bpf.LaceReasonREASON_NO_PORT {
		t.Errorf("program returns %d after %+v", o.Return, events)
	}
	b.aside() // no agent holds the tables now
}

func activeSlot(t *testing.T, h *Hooks) uint32 {
	t.Helper()
	g, err := h.Maps().Generation()
	must(t, err)
	return uint32(maps.SlotOf(g))
}

func TestAsideWithoutTables(t *testing.T) {
	b := newBed(t)
	_, err := LoadAside(b.dir)
	wantError(t, err, b.dir, "has an agent of this version run on this host")
}

func TestAsideRefusesWhatItCannotRun(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	_, first, _ := configured(t, b)
	a := b.aside()
	_, err := a.Run("nothing", first, datagram("10.40.1.11"))
	wantError(t, err, `no program "nothing"`)
	err = in(t, b.ns, func() error { _, err := a.Run(PodL3, 1<<20, datagram("10.40.1.11")); return err })
	wantError(t, err, "program pod_l3 at interface 1048576")
}

// What the attached programs have learned decides here too, and what is learned here stays here.
func TestAsideKnowsWhatWasLearned(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	h, _, _ := configured(t, b)
	live := h.Collection().Maps["learned"]
	key, value := bpf.LaceSightingKey{Network: 200}, bpf.LaceSighting{Locator: 42, Seen: 1}
	must(t, live.Put(key, value))
	own := b.aside().coll.Maps["learned"]
	var got bpf.LaceSighting
	if err := own.Lookup(key, &got); err != nil || got != value {
		t.Errorf("the copy has %+v, %v", got, err)
	}
	key.Network++
	must(t, own.Put(key, value))
	if err := live.Lookup(key, &got); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("the live table has %+v, %v", got, err)
	}
}
