// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// plane loads the programs and pins the events below a BPF file system of the test's own.
func plane(t *testing.T) (*ebpf.Collection, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loading eBPF programs needs root; run as root")
	}
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mount a BPF file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	spec, err := bpf.LoadLace()
	if err != nil {
		t.Fatal(err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(coll.Close)
	if err := coll.Maps["events"].Pin(filepath.Join(dir, "events")); err != nil {
		t.Fatal(err)
	}
	return coll, dir
}

// send sends a packet from the loopback interface, which is in no table if the test does not put it there.
func send(t *testing.T, coll *ebpf.Collection, packet []byte, times uint32) {
	t.Helper()
	sendThrough(t, coll, "pod_l3", packet, times)
}

func sendThrough(t *testing.T, coll *ebpf.Collection, program string, packet []byte, times uint32) {
	t.Helper()
	_, err := coll.Programs[program].Run(&ebpf.RunOptions{Data: packet, DataOut: make([]byte, 1600), Repeat: times})
	if err != nil {
		t.Fatal(err)
	}
}

var errGotIt = errors.New("got it")

func TestRefusedPacketIsTold(t *testing.T) {
	coll, dir := plane(t)
	lock := filepath.Join(t.TempDir(), "lock")
	send(t, coll, udp4(), 1) // from before Open: left out
	r, err := Open(dir, lock)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := Open(dir, lock); err == nil || !strings.Contains(err.Error(), "another lace trace") {
		t.Errorf("a second reader: got %v", err)
	}
	long := append(udp4(), make([]byte, 1200)...)
	send(t, coll, long, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var got Event
	err = r.Each(ctx, func(e Event) error { got = e; return errGotIt })
	if !errors.Is(err, errGotIt) {
		t.Fatalf("no event: %v", err)
	}
	if got.Verdict != bpf.LaceVerdictVERDICT_REFUSED || got.Stage != bpf.LaceStageSTAGE_ENTRY || got.SID.IsValid() {
		t.Errorf("got %s at %s with SID %v", VerdictName(got.Verdict), StageName(got.Stage), got.SID)
	}
	if got.Reason != bpf.LaceReasonREASON_NO_PORT || int(got.Length) != len(long) {
		t.Errorf("got reason %d and %d bytes, want no_port and %d", got.Reason, got.Length, len(long))
	}
	if want := "10.40.1.5:4242 > 10.40.2.7:53 udp"; got.Flow.String() != want {
		t.Errorf("got flow %q, want %q", got.Flow, want)
	}
	if age := time.Since(got.Time); age < 0 || age > time.Minute {
		t.Errorf("the event is %v old", age)
	}
}

// edge1 makes the loaded programs those of a node: 10.40.1.5 is a container behind the loopback interface, which is where
// BPF_PROG_TEST_RUN has packets come in, and 10.40.2.0/24 is on another node.
func edge1(t *testing.T, coll *ebpf.Collection) *maps.Maps {
	t.Helper()
	locator, far := locatorOf("5f00:1ace:1::/48"), locatorOf("5f00:1ace:2::/48")
	return install(t, coll, &plan.Plan{
		Networks: []plan.Network{{Name: "backend", ID: 100, BlockBits4: plan.Lengths{24}, Line: 12}},
		Blocks:   []plan.Block{{Network: 100, Prefix: netip.MustParsePrefix("10.40.2.0/24"), Peer: 1, SID: far.SID(topology.EndDT46, 100)}},
		Ports: []plan.Port{{HostIf: "lace0", Gateway4: netip.MustParseAddr("10.40.1.1"), Source: locator.Source(100, 0),
			Attachment: plan.Attachment{Network: "backend", NetworkID: 100, V4: netip.MustParseAddr("10.40.1.5"), MAC: plan.MAC{2, 0x4c, 10, 40, 1, 5}}}},
	})
}

// install makes the loaded programs those of edge-1, whose one peer is edge-2.
func install(t *testing.T, coll *ebpf.Collection, p *plan.Plan) *maps.Maps {
	t.Helper()
	for i := range bpf.LaceStageSTAGE_MAX {
		if i == bpf.LaceStageSTAGE_ENTRY {
			continue
		}
		program := coll.Programs["stage_"+StageName(i)]
		if program == nil {
			program = coll.Programs[StageName(i)] // an entry program that others hand packets on to
		}
		if err := coll.Maps["stages"].Put(uint32(i), program); err != nil {
			t.Fatal(err)
		}
	}
	m, err := maps.New(coll.Maps)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.InitFlows(); err != nil {
		t.Fatal(err)
	}
	p.LocatorBlock, p.Locator = netip.MustParsePrefix("5f00:1ace::/32"), locatorOf("5f00:1ace:1::/48")
	p.Peers = []plan.Peer{{Index: 1, Name: "edge-2", Locator: locatorOf("5f00:1ace:2::/48")}}
	_, err = m.Sync(p, false, map[string]maps.Device{"lace0": {Index: loopback, MTU: 1460}},
		[]maps.Nexthop{{Peer: 1, Ifindex: loopback, MTU: 1500, Known: true}})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Beat(); err != nil {
		t.Fatal(err)
	}
	return m
}

const loopback = 1

func locatorOf(prefix string) topology.Locator {
	return topology.Locator{Prefix: netip.MustParsePrefix(prefix)}
}

// toGateway is udp4 as its container sends it.
func toGateway() []byte {
	b := udp4()
	copy(b, plan.GatewayMAC[:])
	return b
}

// TestNewFlowIsToldOnce: a flow that passes has one event, whatever it sends; a packet that is refused has one, too.
func TestNewFlowIsToldOnce(t *testing.T) {
	coll, dir := plane(t)
	m := edge1(t, coll)
	r, err := Open(dir, filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	spoofed := toGateway()
	spoofed[14+15] = 6
	for _, packet := range [][]byte{toGateway(), toGateway(), toGateway(), spoofed} {
		send(t, coll, packet, 1)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var got []Event
	err = r.Each(ctx, func(e Event) error {
		if got = append(got, e); len(got) == 2 {
			return errGotIt
		}
		return nil
	})
	if !errors.Is(err, errGotIt) {
		t.Fatalf("%d events: %v", len(got), err)
	}
	generation, err := m.Generation()
	if err != nil {
		t.Fatal(err)
	}
	passed := got[0]
	passed.Time = time.Time{}
	want := Event{Verdict: bpf.LaceVerdictVERDICT_PASSED, Reason: bpf.LaceReasonREASON_ENCAPSULATED, Stage: bpf.LaceStageSTAGE_DELIVER,
		Ifindex: loopback, Network: 100, To: 100, Peer: 1, Generation: generation, Line: 12, Length: uint32(len(udp4())),
		SID: netip.MustParseAddr("5f00:1ace:2:14:0:6400::"), Way: 1, Flow: ParseFlow(toGateway(), true)}
	if want.MTU = passed.MTU; passed != want {
		t.Errorf("the flow is told as\n%+v, want\n%+v", passed, want)
	}
	if e := got[1]; e.Verdict != bpf.LaceVerdictVERDICT_REFUSED || e.Reason != bpf.LaceReasonREASON_SPOOFED_ADDRESS || e.Network != 100 || e.SID.IsValid() || e.Line != 0 {
		t.Errorf("the spoofed packet is told as %+v", e)
	}
	sameInTables(t, m)
}

// storage makes edge-1 a node with an Ethernet segment: 10.50.0.18 is a container behind the loopback interface, 10.50.0.32/28 is on edge-2.
func storage(t *testing.T, coll *ebpf.Collection) {
	t.Helper()
	locator, far := locatorOf("5f00:1ace:1::/48"), locatorOf("5f00:1ace:2::/48")
	install(t, coll, &plan.Plan{
		Networks: []plan.Network{{Name: "storage", ID: 200, Type: topology.L2, BlockBits4: plan.Lengths{28}, Line: 14}},
		Blocks: []plan.Block{{Network: 200, Prefix: netip.MustParsePrefix("10.50.0.16/28"), Local: true},
			{Network: 200, Prefix: netip.MustParsePrefix("10.50.0.32/28"), Peer: 1, SID: far.SID(topology.EndDT46, 200)}},
		Ports: []plan.Port{{HostIf: "lace0", Type: topology.L2, Source: locator.Source(200, 0),
			Attachment: plan.Attachment{Network: "storage", NetworkID: 200, V4: netip.MustParseAddr("10.50.0.18"), MAC: plan.MAC{2, 0x4c, 10, 50, 0, 18}}}},
	})
}

// ipFrame is udp4 inside of the segment.
func ipFrame(dst, src byte) []byte {
	b := udp4()
	copy(b, []byte{2, 0x4c, 10, 50, 0, dst, 2, 0x4c, 10, 50, 0, src})
	copy(b[14+12:], []byte{10, 50, 0, src, 10, 50, 0, dst})
	return b
}

// from2 is a frame as edge-2 sends it.
func from2(b []byte) []byte {
	b = frameInSRv6(b, false, false)
	src, sid := netip.MustParseAddr("5f00:1ace:2:5ce:0:c800::").As16(), netip.MustParseAddr("5f00:1ace:1:17:0:c800::").As16()
	copy(b[14+8:], src[:])
	copy(b[14+24:], sid[:])
	return b
}

// TestFramesAreTold: what L2 networks refuse and let pass, with the words and addresses of its frames.
func TestFramesAreTold(t *testing.T) {
	coll, dir := plane(t)
	storage(t, coll)
	r, err := Open(dir, filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	question := arp(1)
	copy(question[22:], question[6:12])
	copy(question[28:], []byte{10, 50, 0, 18})
	copy(question[38:], []byte{10, 50, 0, 29})
	many := frame(0x88b5, make([]byte, 46)...)
	copy(many, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	stranger := frame(0x88b5, make([]byte, 46)...)
	copy(stranger, []byte{0x52, 0x54, 0, 0, 0, 9})
	for _, tt := range []struct {
		program string
		packet  []byte
		want    string
	}{
		{"pod_l2", question, "refused neighbour_unknown neighbour 10.50.0.18 > 10.50.0.29 arp who-has"},
		{"pod_l2", stranger, "refused unknown_mac bridge 02:4c:0a:32:00:12 > 52:54:00:00:00:09 ethertype 0x88b5"},
		{"pod_l2", many, "refused flood_off flood 02:4c:0a:32:00:12 > ff:ff:ff:ff:ff:ff ethertype 0x88b5"},
		{"pod_l2", ipFrame(34, 18), "passed encapsulated deliver 10.50.0.18:4242 > 10.50.0.34:53 udp"},
		{"uplink", from2(ipFrame(18, 19)), "refused spoofed_mac bridge 10.50.0.19:4242 > 10.50.0.18:53 udp in 5f00:1ace:2:5ce:0:c800:: > 5f00:1ace:1:17:0:c800::"},
		{"uplink", from2(ipFrame(18, 34)[:20]), "refused malformed frame 02:4c:0a:32:00:22 > 02:4c:0a:32:00:12 ethertype 0x0800 in 5f00:1ace:2:5ce:0:c800:: > 5f00:1ace:1:17:0:c800::"},
	} {
		sendThrough(t, coll, tt.program, tt.packet, 1)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		var got string
		err := r.Each(ctx, func(e Event) error {
			got = strings.Join([]string{VerdictName(e.Verdict), maps.ReasonName(e.Reason), StageName(e.Stage), e.Flow.String()}, " ")
			return errGotIt
		})
		if cancel(); !errors.Is(err, errGotIt) || got != tt.want {
			t.Errorf("%v\ngot  %s\nwant %s", err, got, tt.want)
		}
	}
}

// sameInTables: what is counted and remembered of those packets is what was told.
func sameInTables(t *testing.T, m *maps.Maps) {
	t.Helper()
	networks, err := m.NetworkCounters()
	if err != nil {
		t.Fatal(err)
	}
	counted := map[bpf.LaceReason]uint64{}
	for _, c := range networks {
		if c.Network == 100 {
			counted[c.Reason] = c.Packets
		}
	}
	if counted[bpf.LaceReasonREASON_ENCAPSULATED] != 3 || counted[bpf.LaceReasonREASON_SPOOFED_ADDRESS] != 1 {
		t.Errorf("network 100 has counted %v", counted)
	}
	table, err := m.OpenFlows()
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	flows := 0
	err = maps.EachConnection(table, func(maps.Flow) bool { return true }, func(c maps.Connection) error {
		flows++
		if c.Src.String() != "10.40.1.5:4242" || c.Dst.String() != "10.40.2.7:53" || c.Packets != 3 || c.Bytes != 3*32 || c.Peer != 1 || c.Line != 12 ||
			c.Answer == nil || c.Answer.Ifindex != loopback || !c.Answer.Underlay || c.Age > time.Minute {
			t.Errorf("the flow is remembered as %+v, answered by %+v", c.Flow, c.Answer)
		}
		return nil
	})
	if err != nil || flows != 1 {
		t.Errorf("%d flows are remembered, %v", flows, err)
	}
}

// A flood is told in part, and how much was left out is told with it.
func TestFloodIsCounted(t *testing.T) {
	coll, dir := plane(t)
	r, err := Open(dir, filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	const flood = 200_000
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			send(t, coll, udp4(), flood)
		}
	}()
	told, missed := 0, 0
	err = r.Each(ctx, func(e Event) error {
		told++
		if missed += int(e.Missed); missed > 0 && told > 1 {
			return errGotIt
		}
		return nil
	})
	cancel()
	if !errors.Is(err, errGotIt) {
		t.Fatalf("%d events told, %d missed: %v", told, missed, err)
	}
}

// TestOpenWithoutPins: a host on which no agent has run since it started has neither pins nor a directory for the lock.
func TestOpenWithoutPins(t *testing.T) {
	lock := filepath.Join(t.TempDir(), "run", "lock")
	_, err := Open(t.TempDir(), lock)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "no agent of this version has run since this host started") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(filepath.Dir(lock)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a trace of nothing made the lock's directory: %v", err)
	}
}

// TestLockNeedsNoAgent: systemd removes the agent's directory with the agent, the events stay.
func TestLockNeedsNoAgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "lace", "lock")
	lock, err := takeLock(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := takeLock(path); err == nil || !strings.Contains(err.Error(), "another lace trace holds "+path) {
		t.Errorf("a second lock: %v", err)
	}
	lock.Close()
	lock, err = takeLock(path)
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
}
