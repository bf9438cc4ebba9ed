// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
)

func TestStatusPrints(t *testing.T) {
	st := &status{
		Node: "edge-1", Topology: "abc", Agent: true, Conntrack: fill{Entries: 2, Max: 4096}, Generation: 7,
		Peers: []peerStatus{
			{Name: "near", Locator: "l", Gateway: netip.MustParseAddr("fd00:a::2"), MAC: "02:00:00:00:00:01"},
			{Name: "silent", Locator: "l", Gateway: netip.MustParseAddr("fd00:a::3")},
			{Name: "raw", Locator: "l"}, {Name: "lost", Locator: "l", Problem: "no route"},
		},
		Ports:    []portStatus{{Container: "default/a", Network: "six", V6: netip.MustParseAddr("fd60::2"), HostIf: "lace0", MTU: 1460}},
		Counters: []counterStatus{{Reason: "local", Packets: 7, Bytes: 700, Help: "went"}},
		Traffic:  []trafficStatus{{Network: "backend", ID: 100, Reason: "local", Packets: 5, Bytes: 500}, {Reason: "local", Packets: 2, Bytes: 200}},
	}
	var out bytes.Buffer
	if err := st.print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"topology  abc", "agent     running", "near    l        fd00:a::2 02:00:00:00:00:01",
		"fd00:a::3 (not resolved yet)", "raw     l        point to point", "lost    l        no route", "default/a  six      -     fd60::2  lace0      1460",
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
