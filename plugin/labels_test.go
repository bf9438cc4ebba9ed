// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/plugin/wire"
)

var equal = cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}

type labelMap = map[string]string

func TestParseLabels(t *testing.T) {
	tests := []struct {
		name                string
		labels, annotations labelMap
		want                Request
	}{
		{"network alone", labelMap{LabelNetwork: "backend"}, nil, Request{Network: "backend"}},
		{"annotation alone", nil, labelMap{LabelNetwork: "backend"}, Request{Network: "backend"}},
		{"annotation wins key by key", labelMap{LabelNetwork: "a", LabelName: "n"}, labelMap{LabelNetwork: "b"}, Request{Network: "b", Name: "n"}},
		{"everything", labelMap{LabelNetwork: "backend", LabelIP: "10.40.1.7, fd40::7", LabelMAC: "02:00:00:00:00:07", LabelName: "db-1", LabelSticky: "true"}, nil,
			Request{Network: "backend", IPs: []netip.Addr{netip.MustParseAddr("10.40.1.7"), netip.MustParseAddr("fd40::7")},
				MAC: net.HardwareAddr{2, 0, 0, 0, 0, 7}, Name: "db-1", Sticky: true}},
		{"globally administered MAC", labelMap{LabelNetwork: "backend", LabelMAC: "00-16-3e-00-00-01"}, nil,
			Request{Network: "backend", MAC: net.HardwareAddr{0, 0x16, 0x3e, 0, 0, 1}}},
		{"records and other keys are no wishes", labelMap{LabelNetwork: "backend", RecordAddress: "10.40.1.9", "app": "web"}, nil, Request{Network: "backend"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, asks, err := ParseLabels(tt.labels, tt.annotations)
			if err != nil || !asks {
				t.Fatalf("asks %v, error %v", asks, err)
			}
			if d := cmp.Diff(tt.want, got, equal); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseLabelsAsksNothing(t *testing.T) {
	for _, labels := range []labelMap{nil, {"app": "web"}, {RecordAddress: "10.40.1.9"}, {"lacework": "x"}} {
		if _, asks, err := ParseLabels(labels, nil); asks || err != nil {
			t.Errorf("%v: asks %v, error %v", labels, asks, err)
		}
	}
}

func TestParseLabelsRefuses(t *testing.T) {
	network := func(key, value string) labelMap { return labelMap{LabelNetwork: "backend", key: value} }
	tests := []struct {
		name   string
		labels labelMap
		want   string
	}{
		{"no network", labelMap{LabelIP: "10.40.1.7"}, `"lace.ip" is set, but lace.network is not`},
		{"empty network", labelMap{LabelNetwork: ""}, "names no network"},
		{"several networks", labelMap{LabelNetwork: "a,b"}, "names several networks; this release joins a container to one"},
		{"long network", labelMap{LabelNetwork: strings.Repeat("a", 64)}, "longer than 63 bytes"},
		{"network with a blank", labelMap{LabelNetwork: "a b"}, "is no network name"},
		{"typo", network("lace.netwrok", "a"), `unknown label "lace.netwrok" (did you mean "lace.network"?); Lace knows lace.network, lace.ip, lace.mac, lace.name, lace.sticky`},
		{"nothing alike", network("lace.quality", "a"), `unknown label "lace.quality"; Lace knows`},
		{"no address", network(LabelIP, "ten"), `"ten" is no IP address`},
		{"prefix", network(LabelIP, "10.40.1.7/24"), "without prefix length"},
		{"empty address", network(LabelIP, ""), `"" is no IP address`},
		{"two of a family", network(LabelIP, "10.40.1.7,10.40.1.8"), "two addresses of IPv4"},
		{"mapped", network(LabelIP, "::ffff:10.40.1.7"), "write 10.40.1.7"},
		{"zone", network(LabelIP, "fd40::1%eth0"), "has a zone"},
		{"multicast", network(LabelIP, "ff02::1"), "no unicast address"},
		{"unspecified", network(LabelIP, "0.0.0.0"), "no unicast address"},
		{"no MAC", network(LabelMAC, "02:00"), "is no MAC address"},
		{"EUI-64", network(LabelMAC, "02:00:00:00:00:00:00:01"), "is no MAC address"},
		{"group MAC", network(LabelMAC, "03:00:00:00:00:01"), "group address"},
		{"zero MAC", network(LabelMAC, "00:00:00:00:00:00"), "no address of any interface"},
		{"gateway's MAC", network(LabelMAC, "06:00:6c:61:63:65"), "is the gateway's"},
		{"name", network(LabelName, "-a"), "is no name"},
		{"control characters are escaped", network(LabelName, "a\x1b[2J"), `"a\x1b[2J"`},
		{"sticky", network(LabelSticky, "maybe"), "neither true nor false"},
		{"long value", network(LabelName, strings.Repeat("n", 300)), "is 300 bytes long; at most 256"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, asks, err := ParseLabels(tt.labels, nil)
			if !asks || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("asks %v, error %v, want %q", asks, err, tt.want)
			}
		})
	}
}

func TestParseLabelsReportsAllAtOnce(t *testing.T) {
	_, _, err := ParseLabels(labelMap{LabelNetwork: "a,b", LabelIP: "x", LabelMAC: "y", "lace.foo": "z"}, nil)
	if n := strings.Count(err.Error(), "\n"); n != 3 {
		t.Errorf("%d lines, want 4:\n%v", n+1, err)
	}
}

func TestRecordIsAWishOnlyWhereTheUserHasNone(t *testing.T) {
	res := Result{V4: netip.MustParsePrefix("10.40.1.9/24"), V6: netip.MustParsePrefix("fd40::9/64"), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 9}}
	labels := addressRecord(res)
	r, filled := withRecord(Request{IPs: []netip.Addr{netip.MustParseAddr("10.40.1.1")}}, labels)
	if !filled || len(r.IPs) != 2 || r.IPs[0].String() != "10.40.1.1" || r.IPs[1].String() != "fd40::9" || r.MAC.String() != "02:00:00:00:00:09" {
		t.Errorf("filled %v, request %+v", filled, r)
	}
	if r, filled := withRecord(Request{}, labelMap{RecordAddress: "garbage", RecordMAC: "x"}); filled || r.IPs != nil || r.MAC != nil {
		t.Errorf("an unreadable record gave %+v", r)
	}
}

// FuzzParseLabels: any label gives a request in bounds or a bounded, printable error.
func FuzzParseLabels(f *testing.F) {
	f.Add(LabelNetwork, "backend", LabelIP, "10.40.1.7,fd40::7")
	f.Add("lace.netwrok", "\x00", LabelMAC, "02:00:00:00:00:01")
	f.Add("lace.", "", LabelSticky, "1")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		labels := labelMap{k1: v1, k2: v2}
		r, asks, err := ParseLabels(labels, nil)
		if _, wireAsks := wire.Asks(labels, nil); wireAsks != asks {
			t.Fatalf("agent and hook disagree about %q: %v, %v", slices.Collect(maps.Keys(labels)), asks, wireAsks)
		}
		if err != nil {
			if n := len(err.Error()); n > 4096 {
				t.Fatalf("error of %d bytes", n)
			}
			return
		}
		if asks && (r.Network == "" || len(r.IPs) > 2 || (r.MAC != nil && r.MAC[0]&1 != 0)) {
			t.Fatalf("accepted %+v", r)
		}
	})
}
