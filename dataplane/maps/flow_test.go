// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
)

// newFlowTable is the real object's flow table, of another size.
func newFlowTable(t testing.TB, room uint32) *ebpf.Map {
	t.Helper()
	needRoot(t)
	spec, err := bpf.LoadLace()
	must(t, err)
	inner := spec.Maps["flows_initial"].Copy()
	inner.MaxEntries = room
	m, err := ebpf.NewMap(inner)
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

func flowKey(network uint32, protocol uint8, src, dst string, sport, dport uint16) bpf.LaceFlowKey {
	k := bpf.LaceFlowKey{Network: network, Protocol: protocol, Sport: netPort(sport), Dport: netPort(dport)}
	k.Src.U8, k.Dst.U8 = addr(netip.MustParseAddr(src)).U8, addr(netip.MustParseAddr(dst)).U8
	return k
}

// putBoth writes a flow in both directions: the second one the container's answers, out to another node.
func putBoth(t testing.TB, table *ebpf.Map, k bpf.LaceFlowKey, v bpf.LaceFlow) {
	t.Helper()
	must(t, table.Put(k, v))
	back := v
	back.Network, back.Flags, back.Packets, back.Bytes = k.Network, uint16(bpf.LaceFlowFlagsFLOW_REPLY), v.Packets/2, v.Bytes/2
	must(t, table.Put(partner(k, v.Network), back))
}

func all(Flow) bool { return true }

func connections(t testing.TB, table *ebpf.Map) (out []Connection) {
	t.Helper()
	must(t, EachConnection(table, all, func(c Connection) error { out = append(out, c); return nil }))
	return out
}

func TestFlowStatesAreThoseOfC(t *testing.T) {
	values := enumOf(t, "flow_state")
	last := values[len(values)-1]
	if last.Name != "FLOW_STATES" || int(last.Value) != len(flowStates) {
		t.Errorf("the enum ends with %s = %d, there are %d words", last.Name, last.Value, len(flowStates))
	}
	for i, v := range values[:len(values)-1] {
		if want := strings.ToLower(strings.TrimPrefix(v.Name, "FLOW_")); int(v.Value) != i || FlowStates()[i] != want || FlowStateName(bpf.LaceFlowState(i)) != want {
			t.Errorf("%s = %d is called %q, want %q", v.Name, v.Value, flowStates[i], want)
		}
	}
	if got := FlowStateName(9); got != "state_9" {
		t.Errorf("a state of a newer version is called %q", got)
	}
}

// TestPartner: an answer's key, and the answer to that again.
func TestPartner(t *testing.T) {
	for name, tt := range map[string][2]bpf.LaceFlowKey{
		"TCP":           {flowKey(100, 6, "10.40.1.5", "10.60.1.7", 40000, 80), flowKey(200, 6, "10.60.1.7", "10.40.1.5", 80, 40000)},
		"IPv6, UDP":     {flowKey(100, 17, "fd40::5", "fd60::7", 40000, 53), flowKey(200, 17, "fd60::7", "fd40::5", 53, 40000)},
		"no ports":      {flowKey(100, 47, "10.40.1.5", "10.60.1.7", 0, 0), flowKey(200, 47, "10.60.1.7", "10.40.1.5", 0, 0)},
		"echo":          {flowKey(100, 1, "10.40.1.5", "10.60.1.7", 77, 8), flowKey(200, 1, "10.60.1.7", "10.40.1.5", 77, 0)},
		"timestamp":     {flowKey(100, 1, "10.40.1.5", "10.60.1.7", 77, 13), flowKey(200, 1, "10.60.1.7", "10.40.1.5", 77, 14)},
		"echo of IPv6":  {flowKey(100, 58, "fd40::5", "fd60::7", 77, 128), flowKey(200, 58, "fd60::7", "fd40::5", 77, 129)},
		"other of ICMP": {flowKey(100, 1, "10.40.1.5", "10.60.1.7", 77, 3), flowKey(200, 1, "10.60.1.7", "10.40.1.5", 77, 3)},
	} {
		if got := partner(tt[0], 200); got != tt[1] {
			t.Errorf("%s: the other direction is %+v, want %+v", name, got, tt[1])
		}
		if got := partner(tt[1], 100); got != tt[0] {
			t.Errorf("%s: the other direction of the other is %+v, want %+v", name, got, tt[0])
		}
	}
}

func TestConnections(t *testing.T) {
	table := newFlowTable(t, 64)
	now, err := flowTick()
	must(t, err)
	sid := netip.MustParseAddr("5f00:1ace:2:14:0:c800::")
	v := bpf.LaceFlow{Packets: 8, Bytes: 800, Since: now - 100, Seen: now - 3, Generation: 5, Network: 200, Line: 12, Ifindex: 0, Peer: 2,
		State: uint8(bpf.LaceFlowStateFLOW_ESTABLISHED), Flags: uint16(bpf.LaceFlowFlagsFLOW_PICKED | bpf.LaceFlowFlagsFLOW_BRIDGED | bpf.LaceFlowFlagsFLOW_DIRECT)}
	source := netip.MustParseAddr("5f00:1ace:2:5ce:0:c800::")
	v.Sid.U8, v.Source.U8 = sid.As16(), source.As16()
	key := flowKey(100, 6, "10.40.1.5", "10.60.1.7", 40000, 80)
	putBoth(t, table, key, v)
	got := connections(t, table)
	if len(got) != 1 || got[0].Answer == nil {
		t.Fatalf("two directions of one flow are told as %+v", got)
	}
	want := Flow{
		Network: 100, To: 200, Src: netip.MustParseAddrPort("10.40.1.5:40000"), Dst: netip.MustParseAddrPort("10.60.1.7:80"), Protocol: 6,
		State: bpf.LaceFlowStateFLOW_ESTABLISHED, Picked: true, Bridged: true, Direct: true, Age: 100 << 30, Idle: 3 << 30, Packets: 8, Bytes: 800, Peer: 2, SID: sid, Source: source,
		Line: 12, Generation: 5, key: key, back: partner(key, 200),
	}
	flow := got[0].Flow
	if flow.Age < want.Age || flow.Age > want.Age+30<<30 || flow.Idle-want.Idle != flow.Age-want.Age { // the clock goes on
		t.Errorf("age %v and idle %v, want about %v and %v", flow.Age, flow.Idle, want.Age, want.Idle)
	}
	if flow.Age, flow.Idle = want.Age, want.Idle; flow != want {
		t.Errorf("got  %+v\nwant %+v", flow, want)
	}
	if a := got[0].Answer; !a.Reply || a.Packets != 4 || a.Network != 200 || a.To != 100 || a.Src != want.Dst || a.Dst != want.Src {
		t.Errorf("the answers are %+v", a)
	}
}

// TestTranslatedFlows: the other direction is found by what the packets become, and either one stands for both.
func TestTranslatedFlows(t *testing.T) {
	const outside = 0xfffffe
	for name, tt := range map[string]struct{ ask, become, answer bpf.LaceFlowKey }{
		"TCP": {
			flowKey(100, 6, "10.40.1.5", "192.0.2.7", 40000, 80),
			flowKey(0, 6, "198.51.100.1", "192.0.2.7", 10001, 80),
			flowKey(outside, 6, "192.0.2.7", "198.51.100.1", 80, 10001),
		},
		"echo": {
			flowKey(100, 58, "fd40::5", "2001:db8::7", 77, 128),
			flowKey(0, 58, "2001:db8:1::1", "2001:db8::7", 10002, 128),
			flowKey(outside, 58, "2001:db8::7", "2001:db8:1::1", 10002, 129),
		},
	} {
		t.Run(name, func(t *testing.T) {
			table := newFlowTable(t, 64)
			translated := uint16(bpf.LaceFlowFlagsFLOW_TRANSLATED)
			there := bpf.LaceFlow{Network: outside, Way: uint8(WayOut), Flags: translated, Packets: 3}
			setRewrite(&there, tt.become)
			back := bpf.LaceFlow{Network: 100, Flags: translated | uint16(bpf.LaceFlowFlagsFLOW_REPLY), Packets: 2}
			setRewrite(&back, partner(tt.ask, 0))
			must(t, table.Put(tt.ask, there))
			must(t, table.Put(tt.answer, back))
			got := connections(t, table)
			if len(got) != 1 || got[0].Answer == nil || got[0].Reply || got[0].Packets != 3 || got[0].Answer.Packets != 2 {
				t.Fatalf("one flow is told as %+v", got)
			}
			ask, answer := got[0].Flow, *got[0].Answer
			if !ask.Translated || ask.Way != WayOut || ask.Rewrite.Src != endOf(tt.become.Src, tt.become.Sport) || ask.Rewrite.Dst != endOf(tt.become.Dst, tt.become.Dport) {
				t.Errorf("the direction out is %+v", ask)
			}
			if answer.Rewrite.Dst.Addr() != ask.Src.Addr() || answer.Dst.Addr() != ask.Rewrite.Src.Addr() {
				t.Errorf("the direction in is %+v", answer)
			}
			told := 0
			must(t, EachConnection(table, func(f Flow) bool { return f.Network == outside }, func(c Connection) error {
				if told++; c.Network != 100 {
					t.Errorf("a filter that takes the answers only is told of %+v", c)
				}
				return nil
			}))
			if told != 1 {
				t.Errorf("a filter that takes the answers only is told of %d flows", told)
			}
			if deleted, err := DeleteFlow(table, answer); err != nil || !deleted || len(connections(t, table)) != 0 {
				t.Errorf("deleted: %v, %v, left: %+v", deleted, err, connections(t, table))
			}
		})
	}
}

// setRewrite gives a row what its packets become.
func setRewrite(v *bpf.LaceFlow, k bpf.LaceFlowKey) {
	v.To.Src, v.To.Dst, v.To.Sport, v.To.Dport = k.Src, k.Dst, k.Sport, k.Dport
}

func TestWaysAreThoseOfC(t *testing.T) {
	for _, v := range enumOf(t, "way") {
		if want := strings.ToLower(strings.TrimPrefix(v.Name, "WAY_")); Way(v.Value).String() != want {
			t.Errorf("way %d is %q, want %q", v.Value, Way(v.Value), want)
		}
	}
	if got := Way(9).String(); got != "way_9" {
		t.Errorf("a way of a newer version is called %q", got)
	}
}

// TestLoneDirections: what is half collected is told all the same, and once.
func TestLoneDirections(t *testing.T) {
	table := newFlowTable(t, 64)
	ask := flowKey(100, 1, "10.40.1.5", "10.40.2.7", 77, 8)
	must(t, table.Put(ask, bpf.LaceFlow{Network: 100}))
	must(t, table.Put(partner(flowKey(100, 17, "10.40.1.5", "10.40.2.7", 9, 53), 100), bpf.LaceFlow{Network: 100, Flags: uint16(bpf.LaceFlowFlagsFLOW_REPLY)}))
	got := connections(t, table)
	if len(got) != 2 || got[0].Answer != nil || got[1].Answer != nil || got[0].Reply == got[1].Reply {
		t.Errorf("got %+v", got)
	}
}

func TestTimesNeverRunBack(t *testing.T) {
	for _, tt := range []struct {
		then, now uint32
		want      time.Duration
	}{{10, 10, 0}, {10, 12, 2 << 30}, {12, 10, 0}, {^uint32(0), 1, 2 << 30}} {
		if got := sinceTick(tt.then, tt.now); got != tt.want {
			t.Errorf("from %d to %d: %v, want %v", tt.then, tt.now, got, tt.want)
		}
	}
}

func TestDeleteFlow(t *testing.T) {
	table := newFlowTable(t, 64)
	putBoth(t, table, flowKey(100, 6, "10.40.1.5", "10.60.1.7", 40000, 80), bpf.LaceFlow{Network: 200})
	putBoth(t, table, flowKey(100, 6, "10.40.1.5", "10.60.1.7", 40001, 80), bpf.LaceFlow{Network: 200})
	got := connections(t, table)
	gone := got[0]
	for _, want := range []bool{true, false} {
		if deleted, err := DeleteFlow(table, *gone.Answer); err != nil || deleted != want {
			t.Errorf("deleted: %v, %v, want %v", deleted, err, want)
		}
	}
	left := connections(t, table)
	if len(left) != 1 || left[0].Answer == nil || left[0].Src == gone.Src {
		t.Errorf("after one of two flows was deleted there are %+v", left)
	}
}

var errStop = errors.New("stop")

func TestErrorEndsTheWalk(t *testing.T) {
	table := newFlowTable(t, 64)
	for i := range uint16(8) {
		putBoth(t, table, flowKey(100, 6, "10.40.1.5", "10.40.1.7", i, 80), bpf.LaceFlow{Network: 100})
	}
	told := 0
	if err := EachFlow(table, func(Flow) error { told++; return errStop }); err != errStop || told != 1 {
		t.Errorf("%d flows told, then %v", told, err)
	}
	table.Close()
	if err := EachFlow(table, func(Flow) error { return nil }); err == nil || !strings.Contains(err.Error(), "read the flow table") {
		t.Errorf("of a closed table: %v", err)
	}
}

// fillFlows writes n flows, both directions, in batches.
func fillFlows(t testing.TB, table *ebpf.Map, n int) {
	t.Helper()
	var keys []bpf.LaceFlowKey
	var values []bpf.LaceFlow
	flush := func() {
		_, err := table.BatchUpdate(keys, values, nil)
		must(t, err)
		keys, values = keys[:0], values[:0]
	}
	for i := range n {
		k := flowKey(100, 6, "10.40.1.5", "10.40.2.7", uint16(i), 80)
		k.Src.U8[13], k.Src.U8[14], k.Src.U8[15] = byte(i>>8), byte(i>>16), byte(i>>24)
		keys = append(keys, k, partner(k, 100))
		values = append(values, bpf.LaceFlow{Network: 100}, bpf.LaceFlow{Network: 100, Flags: uint16(bpf.LaceFlowFlagsFLOW_REPLY)})
		if len(keys) >= 8192 {
			flush()
		}
	}
	if len(keys) > 0 {
		flush()
	}
}

// TestManyFlows: all are told, once, while others come and go, and without holding them.
func TestManyFlows(t *testing.T) {
	takesLong(t)
	const n = 100_000
	table := newFlowTable(t, 2*n+64)
	fillFlows(t, table, n)
	done := make(chan struct{})
	stopped := make(chan error)
	go func() {
		defer close(stopped)
		k := flowKey(300, 17, "10.40.1.5", "10.40.1.7", 1, 53)
		for {
			select {
			case <-done:
				return
			default:
			}
			_ = table.Put(k, bpf.LaceFlow{Network: 300})
			_ = table.Delete(k)
		}
	}()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	told := map[uint32]int{}
	err := EachConnection(table, all, func(c Connection) error { told[c.Network]++; return nil })
	runtime.GC()
	runtime.ReadMemStats(&after)
	close(done)
	<-stopped
	must(t, err)
	if told[100] != n {
		t.Errorf("%d of %d flows were told", told[100], n)
	}
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
		t.Errorf("a walk keeps %d bytes", grown)
	}
}

func BenchmarkEachConnection(b *testing.B) {
	for _, n := range []int{1000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			table := newFlowTable(b, uint32(2*n))
			fillFlows(b, table, n)
			b.ResetTimer()
			for range b.N {
				told := 0
				must(b, EachConnection(table, all, func(Connection) error { told++; return nil }))
				if told != n {
					b.Fatalf("%d of %d flows were told", told, n)
				}
			}
		})
	}
}

func TestStatesAreACopy(t *testing.T) {
	FlowStates()[0] = "x"
	if !slices.Equal(FlowStates(), flowStates) || flowStates[0] != "new" {
		t.Errorf("the words are %v", flowStates)
	}
}
