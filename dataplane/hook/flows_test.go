// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
)

// now is the time as flows have it.
func now(t *testing.T) uint32 {
	t.Helper()
	var ts unix.Timespec
	must(t, unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts))
	return uint32(ts.Nano() >> 30)
}

// table opens the flows that the programs use now.
func table(t *testing.T, h *Hooks) *ebpf.Map {
	t.Helper()
	m, err := h.Maps().OpenFlows()
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

// udpFlow writes both directions of a flow, idle for some ticks each, and returns their keys.
func udpFlow(t *testing.T, m *ebpf.Map, port uint16, from, to uint32, state bpf.LaceFlowState, idle, answerIdle uint32) [2]bpf.LaceFlowKey {
	t.Helper()
	k := bpf.LaceFlowKey{Network: from, Sport: port, Dport: 53, Protocol: unix.IPPROTO_UDP}
	k.Src.U8 = netip.MustParseAddr("::ffff:10.40.1.10").As16()
	k.Dst.U8 = netip.MustParseAddr("::ffff:10.40.1.11").As16()
	back := k
	back.Network, back.Src, back.Dst, back.Sport, back.Dport = to, k.Dst, k.Src, k.Dport, k.Sport
	at := now(t)
	must(t, m.Put(k, bpf.LaceFlow{Network: to, Since: at - idle, Seen: at - idle, State: uint8(state)}))
	must(t, m.Put(back, bpf.LaceFlow{Network: from, Since: at - idle, Seen: at - answerIdle, State: uint8(state), Flags: uint16(bpf.LaceFlowFlagsFLOW_REPLY)}))
	return [2]bpf.LaceFlowKey{k, back}
}

func rowsOf(t *testing.T, m *ebpf.Map, keys [2]bpf.LaceFlowKey) (n int) {
	t.Helper()
	for _, k := range keys {
		var v bpf.LaceFlow
		if m.Lookup(k, &v) == nil {
			n++
		}
	}
	return n
}

// TestCollect: what is idle goes, with both directions, and nothing else does. UDP flows may be idle for 56 ticks here.
func TestCollect(t *testing.T) {
	const established, fresh = bpf.LaceFlowStateFLOW_ESTABLISHED, bpf.LaceFlowStateFLOW_NEW
	h := newPair(newBed(t), false).agent()
	collect := func(c maps.Collection) maps.Collected {
		t.Helper()
		done, err := h.Collect(c)
		must(t, err)
		return done
	}
	m := table(t, h)
	busy := udpFlow(t, m, 1, 100, 100, established, 0, 0)
	oneWay := udpFlow(t, m, 2, 100, 100, established, 0, 1000)
	idle := udpFlow(t, m, 3, 100, 200, established, 60, 60)
	unanswered := udpFlow(t, m, 4, 100, 200, fresh, 30, 30)
	if done := collect(maps.Collection{}); done.Removed != 2 || done.Entries != 6 || done.Room != int(m.MaxEntries()) || done.States[established] != 4 || done.States[fresh] != 2 {
		t.Errorf("the first run: %+v", done)
	}
	if rowsOf(t, m, idle) != 0 || rowsOf(t, m, busy) != 2 || rowsOf(t, m, oneWay) != 2 || rowsOf(t, m, unanswered) != 2 {
		t.Error("the first run took the wrong ones")
	}
	if done := collect(maps.Collection{Pressure: true}); done.Removed != 2 || rowsOf(t, m, unanswered) != 0 {
		t.Errorf("under pressure: %+v, and the flow that was not answered has %d rows", done, rowsOf(t, m, unanswered))
	}
	foreign := udpFlow(t, m, 5, 200, 300, established, 0, 0)
	for _, c := range []maps.Collection{
		{All: true, Network: 400}, {All: true, Addr: netip.MustParseAddr("10.40.1.12")},
		{All: true, Network: 400, Addr: netip.MustParseAddr("10.40.1.10")},
	} {
		if done := collect(c); done.Removed != 0 {
			t.Errorf("%+v took %d rows of others", c, done.Removed)
		}
	}
	if done := collect(maps.Collection{All: true, Network: 300, Addr: netip.MustParseAddr("10.40.1.11")}); done.Removed != 2 || rowsOf(t, m, foreign) != 0 || rowsOf(t, m, busy) != 2 {
		t.Errorf("the flows of an address: %+v", done)
	}
	if done := collect(maps.Collection{All: true}); done.Removed != 4 || done.Entries != 0 {
		t.Errorf("all: %+v", done)
	}
}

// masqueraded makes a flow of udpFlow one that leaves the overlay as 192.0.2.1, and returns its keys.
func masqueraded(t *testing.T, m *ebpf.Map, keys [2]bpf.LaceFlowKey, at uint32) [2]bpf.LaceFlowKey {
	t.Helper()
	const outside = 0xfffffe
	out, in := bpf.LaceFlow{Network: outside}, bpf.LaceFlow{Network: keys[0].Network}
	for _, v := range []*bpf.LaceFlow{&out, &in} {
		v.Seen, v.Since, v.Flags, v.State = at, at, uint16(bpf.LaceFlowFlagsFLOW_TRANSLATED), uint8(bpf.LaceFlowStateFLOW_ESTABLISHED)
	}
	in.Flags |= uint16(bpf.LaceFlowFlagsFLOW_REPLY)
	node := bpf.LaceAddr{U8: netip.MustParseAddr("::ffff:192.0.2.1").As16()}
	ask := keys[0]
	out.To.Src, out.To.Dst, out.To.Sport, out.To.Dport = node, ask.Dst, be16(10000), ask.Dport
	in.To.Src, in.To.Dst, in.To.Sport, in.To.Dport = ask.Dst, ask.Src, ask.Dport, ask.Sport
	answer := ask
	answer.Network, answer.Src, answer.Dst, answer.Sport, answer.Dport = outside, ask.Dst, node, ask.Dport, be16(10000)
	must(t, m.Delete(keys[1]))
	must(t, m.Put(ask, out))
	must(t, m.Put(answer, in))
	return [2]bpf.LaceFlowKey{ask, answer}
}

// TestCollectTranslated: a flow that is rewritten goes with both directions, by the addresses of either.
func TestCollectTranslated(t *testing.T) {
	h := newPair(newBed(t), false).agent()
	m := table(t, h)
	for name, tt := range map[string]struct {
		idle uint32
		run  maps.Collection
		gone bool
	}{
		"idle":                     {60, maps.Collection{}, true},
		"in use":                   {0, maps.Collection{}, false},
		"of the node's address":    {0, maps.Collection{All: true, Addr: netip.MustParseAddr("192.0.2.1")}, true},
		"of the container":         {0, maps.Collection{All: true, Network: 100, Addr: netip.MustParseAddr("10.40.1.10")}, true},
		"of another node's":        {0, maps.Collection{All: true, Addr: netip.MustParseAddr("192.0.2.2")}, false},
		"of another network":       {0, maps.Collection{All: true, Network: 300}, false},
		"of whatever is out there": {0, maps.Collection{All: true, Network: 0xfffffe}, true},
	} {
		plain := udpFlow(t, m, 1, 100, 100, bpf.LaceFlowStateFLOW_ESTABLISHED, tt.idle, tt.idle)
		keys := masqueraded(t, m, plain, now(t)-tt.idle)
		done, err := h.Collect(tt.run)
		must(t, err)
		if left := rowsOf(t, m, keys); (left == 0) != tt.gone || left == 1 || done.Removed != 2-left {
			t.Errorf("%s: %d rows are left, after %+v", name, left, done)
		}
		_, err = h.Collect(maps.Collection{All: true})
		must(t, err)
	}
}

// TestFlowsOutliveTheAgent: the object's own small table does not take the place of the one that is pinned.
func TestFlowsOutliveTheAgent(t *testing.T) {
	takesLong(t)
	p := newPair(newBed(t), false)
	h := p.agent()
	_, err := h.Maps().SyncFlows(5000)
	must(t, err)
	flow := udpFlow(t, table(t, h), 1, 100, 100, 2, 0, 0)
	must(t, h.Close())
	again := table(t, p.agent())
	if rowsOf(t, again, flow) != 2 || again.MaxEntries() != 10000 {
		t.Errorf("after a restart the table has %d rows, and %d of the flow", again.MaxEntries(), rowsOf(t, again, flow))
	}
	m, done, err := OpenMaps(p.dir)
	must(t, err)
	defer done()
	other, err := m.OpenFlows()
	must(t, err)
	defer other.Close()
	if rowsOf(t, other, flow) != 2 {
		t.Error("a command beside the agent does not see the flow")
	}
}

// TestSwitchUnderTraffic resizes the flows, writes new generations and ends containers' flows, over and over, under a stream
// of packets that is allowed all the time: none is lost, and it stays one flow.
func TestSwitchUnderTraffic(t *testing.T) {
	takesLong(t)
	ways(t, func(t *testing.T, b *bed, clsact bool) {
		p := newPair(b, clsact)
		h := p.agent()
		must(t, h.Commit(p.attachAll(h)))
		s := p.stream()
		s.flows("the first packets")
		first := p.flow(h)
		for i := range 20 {
			_, err := h.Maps().SyncFlows(2000 + 1000*(i%2))
			must(t, err)
			p.plan.Networks[0].Line = i + 1
			done, err := h.Maps().Sync(p.plan, false, p.devices(), nil)
			must(t, err)
			if !done.Switched {
				t.Fatal("the generation stays")
			}
			must(t, h.Maps().DecideAgain())
			_, err = h.Collect(maps.Collection{})
			must(t, err)
			s.flows("packets after a change")
		}
		g, err := h.Maps().Generation()
		must(t, err)
		until(t, "the flow is of the last generation, and line", func() bool {
			f := p.flow(h)
			return f.Generation == g && f.Line == 20
		})
		last := p.flow(h)
		if last.Since != first.Since || last.Packets <= first.Packets {
			t.Errorf("it began as %+v and is %+v: it was made anew", first, last)
		}
		s.end()
	})
}

// flow is the stream's own, in its direction.
func (p *pair) flow(h *Hooks) (f bpf.LaceFlow) {
	p.t.Helper()
	k := bpf.LaceFlowKey{Network: 100, Sport: be16(1000), Dport: be16(2000), Protocol: unix.IPPROTO_UDP}
	k.Src.U8, k.Dst.U8 = p.addr(0).As16(), p.addr(1).As16()
	m, err := h.Maps().OpenFlows()
	must(p.t, err)
	defer m.Close()
	must(p.t, m.Lookup(k, &f))
	return f
}

func be16(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

// TestFullTableKeepsFlows: while the table is full new flows are refused, and the stream goes on.
func TestFullTableKeepsFlows(t *testing.T) {
	takesLong(t)
	p := newPair(newBed(t), false)
	h := p.agent()
	_, err := h.Maps().SyncFlows(1024)
	must(t, err)
	must(t, h.Commit(p.attachAll(h)))
	s := p.stream()
	s.flows("the first packets")
	m := table(t, h)
	for i := uint32(0); ; i++ { // others fill it
		k := bpf.LaceFlowKey{Network: 7, Protocol: 99}
		binary.NativeEndian.PutUint32(k.Src.U8[:], i)
		if m.Put(k, bpf.LaceFlow{Seen: now(t), Network: 7}) != nil {
			break
		}
	}
	stranger := p.frame(1)
	binary.BigEndian.PutUint16(stranger[34:], 4711)
	_, err = unix.Write(s.from, stranger)
	must(t, err)
	until(t, "a new flow is refused", func() bool { return p.counted()["conntrack_full"] == 1 })
	s.flows("packets of the flow that is there")
	_, err = h.Collect(maps.Collection{All: true, Network: 7})
	must(t, err)
	_, err = unix.Write(s.from, stranger)
	must(t, err)
	s.flows("packets, and among them the new flow's")
	if n := p.counted()["conntrack_full"]; n != 1 {
		t.Errorf("%d packets were refused for a full table, want one", n)
	}
	close(s.stopped)
	s.done.Wait()
}
