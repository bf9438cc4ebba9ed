// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/dataplane/trace"
	"github.com/lace-net/lace/topology"
)

func address(s string) netip.Addr { return netip.MustParseAddr(s) }

// knownNames are those of edge-1 in a small world: web (backend) at interface 7, db (storage) at 8, peer 1 is edge-2.
func knownNames() *names {
	n := &names{node: "edge-1", file: "/etc/lace/topology.toml", networks: map[uint32]string{100: "backend", 200: "storage"},
		locator: topology.Locator{Prefix: netip.MustParsePrefix("5f00:1ace:1::/48")},
		peers: []plan.Peer{
			{Index: 1, Name: "edge-2", Locator: topology.Locator{Prefix: netip.MustParsePrefix("5f00:1ace:2::/48")}},
			{Index: 2, Name: "edge-3", Locator: topology.Locator{Prefix: netip.MustParsePrefix("5f00:1ace:3::/48")}},
		},
		links: map[uint32]string{1: "lo", 2: "eth0", 3: "lc-host-peer", 7: "lace0", 8: "lace1"},
		externals: []plan.External{
			{Name: "internet", ID: 0xe00001, Prefixes: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}},
			{Name: "office", ID: 0xe00002, Prefixes: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}},
		},
	}
	for id, name := range outerNames() {
		n.networks[id] = name
	}
	for _, e := range n.externals {
		n.networks[uint32(e.ID)] = e.Name
	}
	n.addPorts([]netdev.Port{
		{Index: 7, Attachment: plan.Attachment{Container: "default/a", Name: "web", Network: "backend", NetworkID: 100, V4: address("10.40.1.7"), V6: address("fd40::7")}},
		{Index: 8, Attachment: plan.Attachment{Container: "default/0123456789abcdef", Network: "storage", NetworkID: 200, V4: address("10.60.1.8")}},
	})
	return n
}

func tcp(src, dst string) trace.Flow {
	a, b := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	return trace.Flow{Protocol: "tcp", Src: a.Addr(), SrcPort: a.Port(), Dst: b.Addr(), DstPort: b.Port()}
}

// toEdge2 is the verdict on a new flow of web to another node.
func toEdge2() trace.Event {
	return trace.Event{Time: time.Unix(0, 0).UTC(), Verdict: bpf.LaceVerdictVERDICT_PASSED, Reason: bpf.LaceReasonREASON_ENCAPSULATED,
		Stage: bpf.LaceStageSTAGE_DELIVER, Ifindex: 7, Network: 100, To: 200, Peer: 1, Generation: 5, Line: 31, Length: 84,
		Way: uint8(maps.WayNode), SID: address("5f00:1ace:2:14:0:c800::"), Flow: tcp("10.40.1.7:40000", "10.60.2.9:80")}
}

func refused() trace.Event {
	return trace.Event{Time: time.Unix(0, 0).UTC(), Verdict: bpf.LaceVerdictVERDICT_REFUSED, Reason: bpf.LaceReasonREASON_NO_ROUTE,
		Stage: bpf.LaceStageSTAGE_ROUTE, Ifindex: 7, Network: 100, Length: 84, Flow: tcp("10.40.1.7:40000", "10.99.0.1:80")}
}

func TestTraceFilters(t *testing.T) {
	passed, refusal := knownNames().trace(toEdge2()), knownNames().trace(refused())
	local := toEdge2()
	local.Peer, local.Output, local.SID, local.Flow = 0, 8, netip.Addr{}, tcp("10.40.1.7:40000", "10.60.1.8:80")
	for _, tt := range []struct {
		name   string
		filter traceFilter
		event  *traced
		takes  bool
	}{
		{"none", traceFilter{}, passed, true},
		{"sender's network", traceFilter{network: "backend"}, passed, true},
		{"receiver's network", traceFilter{network: "storage"}, passed, true},
		{"other network", traceFilter{network: "staging"}, passed, false},
		{"name", traceFilter{container: "web"}, passed, true},
		{"id", traceFilter{container: "default/a"}, passed, true},
		{"receiver", traceFilter{container: "default/0123456789abcdef"}, knownNames().trace(local), true},
		{"receiver of another", traceFilter{container: "default/0123456789abcdef"}, passed, false},
		{"other name", traceFilter{container: "db"}, passed, false},
		{"reason", traceFilter{reason: "no_route"}, refusal, true},
		{"other reason", traceFilter{reason: "too_big"}, refusal, false},
		{"verdict", traceFilter{verdict: "refused"}, refusal, true},
		{"other verdict", traceFilter{verdict: "passed"}, refusal, false},
		{"source", traceFilter{address: address("10.40.1.7")}, passed, true},
		{"destination", traceFilter{address: address("10.60.2.9")}, passed, true},
		{"other address", traceFilter{address: address("10.40.1.8")}, passed, false},
		{"source port", traceFilter{port: 40000}, passed, true},
		{"destination port", traceFilter{port: 80}, passed, true},
		{"other port", traceFilter{port: 81}, passed, false},
		{"all must hold", traceFilter{network: "backend", port: 81}, passed, false},
	} {
		if got := tt.filter.takes(tt.event); got != tt.takes {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func TestTracePrints(t *testing.T) {
	inSRv6 := tcp("10.60.2.9:40000", "10.40.1.7:80")
	inSRv6.Outer = &trace.Outer{Src: address("5f00:1ace:3:5ce:0:c800::"), SID: address("5f00:1ace:1:14:0:6400::")}
	for name, tt := range map[string]struct {
		change func(*trace.Event)
		want   string
	}{
		"to another node": {func(*trace.Event) {},
			"00:00:00.000000 passed  encapsulated     deliver   10.40.1.7:40000 > 10.60.2.9:80 tcp      web (backend) > edge-2 (storage)  topology.toml:31  SID 5f00:1ace:2:14:0:c800::  84 bytes\n"},
		"a node that is not numbered as the file has it": {func(e *trace.Event) { e.Peer = 2 },
			"00:00:00.000000 passed  encapsulated     deliver   10.40.1.7:40000 > 10.60.2.9:80 tcp      web (backend) > edge-2 (storage)  topology.toml:31  SID 5f00:1ace:2:14:0:c800::  84 bytes\n"},
		"to a container here": {func(e *trace.Event) {
			e.Reason, e.Peer, e.SID, e.Output, e.Flow = bpf.LaceReasonREASON_LOCAL, 0, netip.Addr{}, 8, tcp("10.40.1.7:40000", "10.60.1.8:80")
		}, "00:00:00.000000 passed  local            deliver   10.40.1.7:40000 > 10.60.1.8:80 tcp      web (backend) > default/0123456789ab (storage)  topology.toml:31  84 bytes\n"},
		"from another node": {func(e *trace.Event) {
			e.Reason, e.Ifindex, e.Output, e.Network, e.To = bpf.LaceReasonREASON_DECAPSULATED, 2, 7, 200, 100
			e.SID, e.Flow = address("5f00:1ace:1:14:0:6400::"), tcp("10.60.2.9:40000", "10.40.1.7:80")
		}, "00:00:00.000000 passed  decapsulated     deliver   10.60.2.9:40000 > 10.40.1.7:80 tcp      edge-2 (storage) > web (backend)  topology.toml:31  SID 5f00:1ace:1:14:0:6400::  84 bytes\n"},
		"refused at the uplink, with the outer header": {func(e *trace.Event) {
			*e = refused()
			e.Reason, e.Stage, e.Ifindex, e.Network, e.To, e.Peer, e.SID, e.Flow = bpf.LaceReasonREASON_NO_PEERING, bpf.LaceStageSTAGE_ENTRY, 2, 200, 100, 1, inSRv6.Outer.SID, inSRv6
		}, "00:00:00.000000 refused no_peering       entry     10.60.2.9:40000 > 10.40.1.7:80 tcp in 5f00:1ace:3:5ce:0:c800:: > 5f00:1ace:1:14:0:6400::  edge-3 (storage) > web (backend)  84 bytes\n"},
		"refused, and others not told": {func(e *trace.Event) { *e = refused(); e.Missed = 3 },
			"00:00:00.000000 refused no_route         route     10.40.1.7:40000 > 10.99.0.1:80 tcp      web (backend)  84 bytes\n                3 more were not told: there were too many\n"},
		"a frame that is no IP": {func(e *trace.Event) {
			*e = refused()
			e.Reason, e.Stage, e.Flow = bpf.LaceReasonREASON_UNKNOWN_MAC, bpf.LaceStageSTAGE_BRIDGE, trace.Flow{SrcMAC: "02:4c:0a:28:01:07", DstMAC: "52:54:00:00:00:09", Protocol: "ethertype 0x88b5"}
		}, "00:00:00.000000 refused unknown_mac      bridge    02:4c:0a:28:01:07 > 52:54:00:00:00:09 ethertype 0x88b5  web (backend)  84 bytes\n"},
		"a question": {func(e *trace.Event) {
			*e = refused()
			e.Reason, e.Stage, e.Flow = bpf.LaceReasonREASON_NEIGHBOUR_UNKNOWN, bpf.LaceStageSTAGE_NEIGHBOUR, trace.Flow{Protocol: "arp", ARP: "who-has", Src: address("10.40.1.7"), Dst: address("10.40.1.9")}
		}, "00:00:00.000000 refused neighbour_unknown neighbour 10.40.1.7 > 10.40.1.9 arp who-has       web (backend)  84 bytes\n"},
		"ended": {func(e *trace.Event) {
			*e = refused()
			e.Verdict, e.To = bpf.LaceVerdictVERDICT_ENDED, 300
		}, "00:00:00.000000 ended   no_route         route     10.40.1.7:40000 > 10.99.0.1:80 tcp      web (backend) > (300)  84 bytes\n"},
		"of nobody that is known": {func(e *trace.Event) { *e = refused(); e.Network, e.Ifindex = 0, 99 },
			"00:00:00.000000 refused no_route         route     10.40.1.7:40000 > 10.99.0.1:80 tcp      interface #99  84 bytes\n"},
		"a node that the file does not have": {func(e *trace.Event) { e.Peer, e.SID = 9, netip.Addr{} },
			"00:00:00.000000 passed  encapsulated     deliver   10.40.1.7:40000 > 10.60.2.9:80 tcp      web (backend) > node#9 (storage)  topology.toml:31  84 bytes\n"},
	} {
		t.Run(name, func(t *testing.T) {
			e := toEdge2()
			tt.change(&e)
			var out bytes.Buffer
			if err := knownNames().trace(e).print(&out, false); err != nil || out.String() != tt.want {
				t.Errorf("%v\ngot  %swant %s", err, out.String(), tt.want)
			}
		})
	}
}

func TestTracePrintsJSON(t *testing.T) {
	var out bytes.Buffer
	if err := knownNames().trace(toEdge2()).print(&out, true); err != nil || strings.Count(out.String(), "\n") != 1 {
		t.Fatalf("%v, %s", err, out.String())
	}
	want := `{"time":"1970-01-01T00:00:00Z","node":"edge-1","verdict":"passed","reason":"encapsulated","stage":"deliver","container":"default/a","name":"web",` +
		`"network":"backend","to_network":"storage","to_node":"edge-2","interface":"lace0","way":"node","sid":"5f00:1ace:2:14:0:c800::","file":"/etc/lace/topology.toml","line":31,` +
		`"generation":5,"length":84,"flow":{"protocol":"tcp","src":"10.40.1.7","dst":"10.60.2.9","src_port":40000,"dst_port":80}}`
	if !json.Valid(out.Bytes()) || strings.TrimSpace(out.String()) != want {
		t.Errorf("got  %swant %s", out.String(), want)
	}
}

func TestTraceRefusesWhatNothingPasses(t *testing.T) {
	for args, want := range map[string]string{
		"--reason no_rout":  `there is no reason "no_rout"`,
		"--verdict dropped": `there is no verdict "dropped"; it is passed, refused or ended`,
		"--port 65536":      "there is no port 65536; the highest is 65535",
		"--count -1":        "-1 events cannot be shown",
		"--address x":       "invalid value",
		"web":               `unexpected argument "web"`,
	} {
		var usage *usageError
		if err := runTrace(t.Context(), hostEnv(), strings.Fields(args)); !errors.As(err, &usage) || !strings.Contains(usage.problem, want) {
			t.Errorf("lace trace %s: got %v, want %q", args, err, want)
		}
	}
}

// TestTraceEndsAtItsCount: only what passes the filter counts.
func TestTraceEndsAtItsCount(t *testing.T) {
	var out bytes.Buffer
	tr := &tracing{filter: traceFilter{verdict: "passed"}, count: 2, names: knownNames(), out: &out}
	for i, e := range []trace.Event{toEdge2(), refused(), toEdge2()} {
		err := tr.show(e)
		if last := i == 2; errors.Is(err, errEnough) != last || !last && err != nil {
			t.Errorf("event %d: %v", i, err)
		}
	}
	if got := strings.Count(out.String(), "\n"); got != 2 {
		t.Errorf("%d lines:\n%s", got, out.String())
	}
}

// watched tells when something was written to it.
type watched struct {
	bytes.Buffer
	written chan struct{}
}

func (w *watched) Write(b []byte) (int, error) {
	select {
	case w.written <- struct{}{}:
	default:
	}
	return w.Buffer.Write(b)
}

// TestTraceOfPinnedTables: the command beside no agent, and a packet of an interface that is in no table.
func TestTraceOfPinnedTables(t *testing.T) {
	config, coll := tables(t)
	var out bytes.Buffer
	listens := &watched{written: make(chan struct{}, 1)}
	e := hostEnv()
	e.stdout, e.stderr = &out, listens
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- runTrace(ctx, e, []string{"--config", config, "--count", "1", "--address", "10.40.1.7", "--json"})
	}()
	select {
	case <-listens.written:
	case err := <-done:
		t.Fatalf("lace trace ends before a packet came: %v", err)
	}
	frame := make([]byte, 64)
	copy(frame[12:], []byte{8, 0, 0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0, 10, 40, 1, 7, 10, 40, 2, 9, 0, 100, 0, 53, 0, 30})
	if _, err := coll.Programs["pod_l3"].Run(&ebpf.RunOptions{Data: frame, DataOut: make([]byte, 256)}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatalf("lace trace: %v, %s", err, listens.String())
	}
	var line traced
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || ctx.Err() != nil {
		t.Fatalf("%v in %q", err, out.String())
	}
	if line.Node != "edge-1" || line.Verdict != "refused" || line.Reason != "no_port" || line.Stage != "entry" || line.Interface != "lo" ||
		line.Flow.DstPort != 53 || time.Since(line.Time) > time.Hour {
		t.Errorf("got %s", out.String())
	}
}

// TestTraceWithoutAgent: a host on which none has run since it started is told so, not of a missing lock.
func TestTraceWithoutAgent(t *testing.T) {
	dir := t.TempDir()
	file := writeFile(t, "lace.toml", "bpffs = \""+dir+"/bpf\"\nhook-socket = \""+dir+"/run/lace.sock\"\n")
	err := runTrace(t.Context(), hostEnv(), []string{"--config", file})
	if err == nil || !strings.Contains(err.Error(), "no agent of this version has run since this host started") {
		t.Errorf("got %v", err)
	}
}
