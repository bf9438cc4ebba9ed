// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"net/netip"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/plan"
)

func TestStatusPrints(t *testing.T) {
	st := &status{
		Node: "edge-1", Topology: "abc", Agent: true, Conntrack: fill{Entries: 2, Max: 4096}, Generation: 7,
		Peers: []peerStatus{
			{Name: "near", Locator: "l", Gateway: netip.MustParseAddr("fd00:a::2"), MAC: "02:00:00:00:00:01"},
			{Name: "silent", Locator: "l", Gateway: netip.MustParseAddr("fd00:a::3")},
			{Name: "raw", Locator: "l"}, {Name: "lost", Locator: "l", Problem: "no route"},
		},
		Ports: []portStatus{{Container: "default/a", Network: "six", V6: netip.MustParseAddr("fd60::2"), HostIf: "lace0", IfName: "eth1", MTU: 1460},
			{Container: "device/tap0", Network: "six", HostIf: "tap0", IfName: "tap0", Device: true, MTU: 1500}},
		Counters: []counterStatus{{Reason: "local", Packets: 7, Bytes: 700, Help: "went"}},
		Traffic:  []trafficStatus{{Network: "backend", ID: 100, Reason: "local", Packets: 5, Bytes: 500}, {Reason: "local", Packets: 2, Bytes: 200}},
	}
	if strings.Contains(printed(t, st), "L2 NETWORK") {
		t.Error("without an L2 network there is a table of them")
	}
	var out bytes.Buffer
	if err := st.print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"topology  abc", "agent     running", "near    l        fd00:a::2 02:00:00:00:00:01",
		"fd00:a::3 (not resolved yet)", "raw     l        point to point", "lost    l        no route", "default/a    six      eth1    -     fd60::2  lace0      1460", "device/tap0  six      device  -     -        tap0       1500",
		"2 of 4096 entries (0.0 %)  7\n", "local   7        700    went\n", "backend  local   5        500\n", "-        local   2        200\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("want %q in\n%s", want, out.String())
		}
	}
	out.Reset()
	if err := (&status{Problem: "f:1: one\nf:2: two"}).print(&out); err != nil || !strings.Contains(out.String(), "topology  f:1: one\n          f:2: two\n") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

func printed(t *testing.T, st *status) string {
	t.Helper()
	var out bytes.Buffer
	must(t, st.print(&out))
	return out.String()
}

// TestStatusOfSegments: pools, nodes, ports and what was learned of L2 networks, read from a node that holds them.
func TestStatusOfSegments(t *testing.T) {
	n := segmented(t)
	n.learn(200, plan.MAC{2, 0, 0, 0, 0, 1}, "5f00:1ace:2::")
	n.learn(200, plan.MAC{2, 0, 0, 0, 0, 2}, "5f00:1ace:3::")
	n.learn(900, plan.MAC{2, 0, 0, 0, 0, 3}, "5f00:1ace:3::") // of a network that is not there
	out, err := n.run(runStatus, "")
	must(t, err)
	for _, want := range []string{
		"storage  200  l2    5f00:1ace:1:14:0:c800::  [10.50.0.1 fd50::1]\n",
		"web      100  l3    5f00:1ace:1:14:0:6400::  [10.40.1.1/24 fd40:0:0:1::1/64]\n",
		"storage     [10.50.0.16/28 fd50::1:0/112]  1000/s  4      2          2        2 others (edge-2, edge-3)\n",
		"quiet       [fd60::1:0/112]                off     1      0          0        2 others (edge-2, edge-3)\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in\n%s", want, out)
		}
	}
	for _, want := range []string{`both +web +eth0 +10\.40\.1\.10 `, `both +storage +eth1 +10\.50\.0\.20 `, `nas-1 +storage +device +10\.50\.0\.200 +- +vm0 +1500`} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("want %q in\n%s", want, out)
		}
	}
	out, err = n.run(runStatus, "--json")
	must(t, err)
	var st status
	must(t, json.Unmarshal([]byte(out), &st))
	want := &segmentStatus{Gateways: addresses("10.50.0.1", "fd50::1"), Pools: []netip.Prefix{netip.MustParsePrefix("10.50.0.16/28"), netip.MustParsePrefix("fd50::1:0/112")},
		Nodes: []string{"edge-2", "edge-3"}, Endpoints: 2, Ports: 4, Learned: 2}
	if got := st.segment(200); !reflect.DeepEqual(got, want) || st.segment(100) != nil || !st.Networks[1].Flood {
		t.Errorf("got %+v in\n%s", got, out)
	}
}

// learn writes a MAC address down as the programs do, seen now at a node.
func (n *edge) learn(network uint32, mac plan.MAC, locator string) {
	n.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(hook.PinDir(n.bpffs), "learned"), nil)
	must(n.t, err)
	defer m.Close()
	var now unix.Timespec
	must(n.t, unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &now))
	k, v := bpf.LaceSightingKey{Network: network}, bpf.LaceSighting{Seen: uint32(now.Nano() >> 30)}
	k.Mac.U8 = mac
	at := address(locator).As16()
	v.Locator = binary.NativeEndian.Uint64(at[:8])
	must(n.t, m.Put(k, v))
}
