// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"fmt"
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

// eth0 is the interface of a container in one network.
func eth0(network string) Interface {
	return Interface{Network: network, IfName: "eth0", Gateway: true}
}

func one(i Interface) Request { return Request{Interfaces: []Interface{i}} }

func TestParseLabels(t *testing.T) {
	tests := []struct {
		name                string
		labels, annotations labelMap
		want                Request
	}{
		{"network alone", labelMap{LabelNetwork: "backend"}, nil, one(eth0("backend"))},
		{"annotation alone", nil, labelMap{LabelNetwork: "backend"}, one(eth0("backend"))},
		{"annotation wins key by key", labelMap{LabelNetwork: "a", LabelName: "n"}, labelMap{LabelNetwork: "b"},
			Request{Name: "n", Interfaces: []Interface{eth0("b")}}},
		{"everything", labelMap{LabelNetwork: "backend", LabelIP: "10.40.1.7, fd40::7", LabelMAC: "02:00:00:00:00:07", LabelName: "db-1", LabelSticky: "true"}, nil,
			Request{Name: "db-1", Sticky: true, Interfaces: []Interface{{Network: "backend", IfName: "eth0", Gateway: true, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 7},
				IPs: []netip.Addr{netip.MustParseAddr("10.40.1.7"), netip.MustParseAddr("fd40::7")}}}}},
		{"globally administered MAC", labelMap{LabelNetwork: "backend", LabelMAC: "00-16-3e-00-00-01"}, nil,
			one(Interface{Network: "backend", IfName: "eth0", Gateway: true, MAC: net.HardwareAddr{0, 0x16, 0x3e, 0, 0, 1}})},
		{"records and other keys are no wishes", labelMap{LabelNetwork: "backend", RecordAddress: "10.40.1.9", "app": "web"}, nil, one(eth0("backend"))},
		{"two networks", labelMap{LabelNetwork: " backend , storage", LabelIP: "10.40.1.7", "lace.net.storage.ip": "10.50.0.18", "lace.net.storage.mac": "02:00:00:00:00:08"}, nil,
			Request{Interfaces: []Interface{{Network: "backend", IfName: "eth0", Gateway: true, IPs: []netip.Addr{netip.MustParseAddr("10.40.1.7")}},
				{Network: "storage", IfName: "eth1", IPs: []netip.Addr{netip.MustParseAddr("10.50.0.18")}, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 8}}}}},
		{"the second has the default route", labelMap{LabelNetwork: "a,b", "lace.net.b.gateway": "true"}, nil,
			Request{Interfaces: []Interface{{Network: "a", IfName: "eth0"}, {Network: "b", IfName: "eth1", Gateway: true}}}},
		{"none has the default route", labelMap{LabelNetwork: "a,b", "lace.net.a.gateway": "false"}, nil,
			Request{Interfaces: []Interface{{Network: "a", IfName: "eth0"}, {Network: "b", IfName: "eth1"}}}},
		{"false elsewhere changes nothing", labelMap{LabelNetwork: "a,b", "lace.net.b.gateway": "false"}, nil,
			Request{Interfaces: []Interface{eth0("a"), {Network: "b", IfName: "eth1"}}}},
		{"names change places", labelMap{LabelNetwork: "a,b", "lace.net.a.ifname": "eth1", "lace.net.b.ifname": "eth0"}, nil,
			Request{Interfaces: []Interface{{Network: "a", IfName: "eth1", Gateway: true}, {Network: "b", IfName: "eth0"}}}},
		{"one network's labels in full", labelMap{LabelNetwork: "a", "lace.net.a.ip": "10.40.1.7", "lace.net.a.ifname": "a-b_c.d"}, nil,
			one(Interface{Network: "a", IfName: "a-b_c.d", Gateway: true, IPs: []netip.Addr{netip.MustParseAddr("10.40.1.7")}})},
		{"names with dots", labelMap{LabelNetwork: "a.b-c_d,x.ip", "lace.net.a.b-c_d.ifname": "n0", "lace.net.x.ip.ifname": "n1"}, nil,
			Request{Interfaces: []Interface{{Network: "a.b-c_d", IfName: "n0", Gateway: true}, {Network: "x.ip", IfName: "n1"}}}},
		{"annotation of one network wins", labelMap{LabelNetwork: "a", "lace.net.a.ifname": "n0"}, labelMap{"lace.net.a.ifname": "n1"},
			one(Interface{Network: "a", IfName: "n1", Gateway: true})},
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

func TestEightNetworksHaveRoom(t *testing.T) {
	var names []string
	for i := range maxNetworks {
		names = append(names, strings.Repeat(string(rune('a'+i)), maxNetwork))
	}
	r, _, err := ParseLabels(labelMap{LabelNetwork: strings.Join(names, ", ")}, nil)
	if err != nil || len(r.Interfaces) != maxNetworks || r.Interfaces[7].IfName != "eth7" || r.Interfaces[7].Network != names[7] {
		t.Errorf("%+v, error %v", r, err)
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
		{"a network twice", labelMap{LabelNetwork: "a,b, a"}, `names network "a" twice`},
		{"nothing between commas", labelMap{LabelNetwork: "a,,b"}, "has a comma with no network before or behind it"},
		{"nine networks", labelMap{LabelNetwork: "a,b,c,d,e,f,g,h,i"}, "names 9 networks; a container joins at most 8"},
		{"long network", labelMap{LabelNetwork: strings.Repeat("a", 64)}, "longer than 63 bytes"},
		{"network with a blank", labelMap{LabelNetwork: "a b"}, "is no network name"},
		{"typo", network("lace.netwrok", "a"), `unknown label "lace.netwrok" (did you mean "lace.network"?); Lace knows lace.network, lace.ip, lace.mac, lace.name, lace.sticky, lace.publish, and lace.net.<network>. with ip, mac, ifname, gateway, publish`},
		{"unknown field", network("lace.net.backend.ipp", "10.40.1.7"), `unknown label "lace.net.backend.ipp" (did you mean "lace.net.backend.ip"?)`},
		{"no field", network("lace.net.backend", "x"), `unknown label "lace.net.backend"`},
		{"no name", network("lace.net..ip", "x"), `unknown label "lace.net..ip"`},
		{"field alone", network("lace.net.ip", "x"), `unknown label "lace.net.ip"`},
		{"typo in front", network("lace.nets.backend.mac", "x"), `(did you mean "lace.net.backend.mac"?)`},
		{"network that is not named", network("lace.net.storage.ip", "10.50.0.18"), `"lace.net.storage.ip" is about network "storage", which lace.network does not name; it names "backend"`},
		{"network with a typo", network("lace.net.bakend.ip", "10.40.1.7"), `(did you mean "lace.net.backend.ip"?)`},
		{"network's label without lace.network", labelMap{"lace.net.storage.ip": "10.50.0.18"}, `"lace.net.storage.ip" is set, but lace.network is not`},
		{"network's value without lace.network", labelMap{"lace.net.storage.ip": "ten"}, `lace.net.storage.ip = "ten": "ten" is no IP address`},
		{"network's address", network("lace.net.backend.ip", "ten"), `lace.net.backend.ip = "ten": "ten" is no IP address`},
		{"network's MAC", network("lace.net.backend.mac", "ten"), "is no MAC address"},
		{"network's gateway", network("lace.net.backend.gateway", "maybe"), "neither true nor false"},
		{"both addresses", labelMap{LabelNetwork: "a", LabelIP: "10.40.1.7", "lace.net.a.ip": "10.40.1.7"}, "lace.ip and lace.net.a.ip are both set"},
		{"both MACs", labelMap{LabelNetwork: "a", LabelMAC: "02:00:00:00:00:01", "lace.net.a.mac": "02:00:00:00:00:01"}, "lace.mac and lace.net.a.mac are both set"},
		{"two default routes", labelMap{LabelNetwork: "a,b", "lace.net.a.gateway": "true", "lace.net.b.gateway": "true"}, `gateway is true for the networks "a", "b"`},
		{"one name twice", labelMap{LabelNetwork: "a,b", "lace.net.a.ifname": "x", "lace.net.b.ifname": "x"}, `networks "a" and "b" both have the interface "x"`},
		{"the other's usual name", labelMap{LabelNetwork: "a,b", "lace.net.a.ifname": "eth1"}, `networks "a" and "b" both have the interface "eth1"; give one of them another name with lace.net.b.ifname`},
		{"empty interface", network("lace.net.backend.ifname", ""), "is empty"},
		{"long interface", network("lace.net.backend.ifname", "abcdefghijklmnop"), "is 16 bytes long; the name of an interface has at most 15"},
		{"interface with a slash", network("lace.net.backend.ifname", "a/b"), "is no name of an interface"},
		{"interface with a colon", network("lace.net.backend.ifname", "a:b"), "is no name of an interface"},
		{"interface with a blank", network("lace.net.backend.ifname", "a b"), "is no name of an interface"},
		{"interface that is a pattern", network("lace.net.backend.ifname", "eth%d"), "is no name of an interface"},
		{"interface in another script", network("lace.net.backend.ifname", "a\u2003b"), "is no name of an interface"},
		{"loopback", network("lace.net.backend.ifname", "lo"), "is no name that an interface of a network can have"},
		{"all interfaces", network("lace.net.backend.ifname", "all"), "is no name that an interface of a network can have"},
		{"directory", network("lace.net.backend.ifname", ".."), "is no name that an interface of a network can have"},
		{"nothing alike", network("lace.bandwidth", "a"), `unknown label "lace.bandwidth"; Lace knows`},
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
	labels := labelMap{LabelNetwork: "a,b", LabelIP: "x", LabelMAC: "y", "lace.foo": "z", "lace.net.b.mac": "w", "lace.net.c.ip": "10.40.1.1",
		"lace.net.a.mac": "02:00:00:00:00:01", "lace.net.a.gateway": "1", "lace.net.b.gateway": "1", "lace.net.b.ifname": "eth0"}
	_, _, first := ParseLabels(labels, nil)
	for i, want := range []string{`unknown label "lace.foo"`, "lace.net.b.mac = ", `"lace.net.c.ip" is about`, "lace.ip = ", "lace.mac = ",
		"lace.mac and lace.net.a.mac", `both have the interface "eth0"`, "gateway is true"} {
		if line := strings.Split(first.Error(), "\n"); i >= len(line) || !strings.Contains(line[i], want) {
			t.Errorf("line %d does not say %q:\n%v", i, want, first)
		}
	}
	for range 20 {
		if _, _, err := ParseLabels(labels, nil); err.Error() != first.Error() {
			t.Fatalf("the order changes:\n%v\n%v", first, err)
		}
	}
	_, _, err := ParseLabels(labelMap{LabelNetwork: "a,a", LabelIP: "x", "lace.net.q.mac": "y"}, nil)
	if n := strings.Count(err.Error(), "\n"); n != 2 {
		t.Errorf("%d lines, want 3:\n%v", n+1, err)
	}
}

func TestOddLabelsAreBounded(t *testing.T) {
	labels := labelMap{LabelNetwork: "a"}
	for i := range 1000 {
		labels[fmt.Sprintf("lace.net.n%d.ip", i)] = "10.40.1.1"
	}
	if _, _, err := ParseLabels(labels, nil); err == nil || strings.Count(err.Error(), "\n") != maxOdd-1 {
		t.Errorf("want %d lines:\n%v", maxOdd, err)
	}
}

func addresses(list ...string) (ips []netip.Addr) {
	for _, ip := range list {
		ips = append(ips, netip.MustParseAddr(ip))
	}
	return ips
}

var (
	onBackend = Result{Network: "backend", IfName: "eth0", V4: netip.MustParsePrefix("10.40.1.9/24"), V6: netip.MustParsePrefix("fd40::9/64"), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 9}}
	onStorage = Result{Network: "storage", IfName: "eth1", V4: netip.MustParsePrefix("10.50.0.18/24"), MAC: net.HardwareAddr{2, 0x4c, 10, 50, 0, 18}}
	asked     = Request{Interfaces: []Interface{{Network: "backend"}, {Network: "storage"}}}
)

func TestRecordIsReadAgain(t *testing.T) {
	backend := Interface{Network: "backend", IPs: addresses("10.40.1.9", "fd40::9"), MAC: onBackend.MAC}
	storage := Interface{Network: "storage", IPs: addresses("10.50.0.18"), MAC: onStorage.MAC}
	both := addressRecord([]Result{onBackend, onStorage})
	if want := (labelMap{RecordAddress: "backend=10.40.1.9,fd40::9;storage=10.50.0.18", RecordMAC: "backend=02:00:00:00:00:09;storage=02:4c:0a:32:00:12"}); !maps.Equal(both, want) {
		t.Errorf("record %v, want %v", both, want)
	}
	for name, tt := range map[string]struct {
		record labelMap
		asked  Request
		want   []Interface
	}{
		"both":                         {both, asked, []Interface{backend, storage}},
		"another order":                {both, Request{Interfaces: []Interface{{Network: "storage"}, {Network: "backend"}}}, []Interface{storage, backend}},
		"one more than was":            {addressRecord([]Result{onBackend}), asked, []Interface{backend, {Network: "storage"}}},
		"as the first release wrote":   {labelMap{RecordAddress: "10.40.1.9,fd40::9", RecordMAC: "02:00:00:00:00:09"}, one(Interface{Network: "backend"}), []Interface{backend}},
		"of networks that are left":    {addressRecord([]Result{onStorage, onBackend}), one(Interface{Network: "storage"}), []Interface{storage}},
		"one part cannot be read":      {labelMap{RecordAddress: "backend=?;storage=10.50.0.18"}, asked, []Interface{{Network: "backend"}, {Network: "storage", IPs: storage.IPs}}},
		"nothing of it can be read":    {labelMap{RecordAddress: "garbage", RecordMAC: "x"}, asked, asked.Interfaces},
		"another network's first part": {labelMap{RecordAddress: "other=10.40.1.9"}, asked, asked.Interfaces},
	} {
		r, filled := withRecord(tt.asked, tt.record)
		if d := cmp.Diff(tt.want, r.Interfaces, equal); d != "" {
			t.Errorf("%s: filled %v\n%s", name, filled, d)
		}
	}
	if asked.Interfaces[0].IPs != nil {
		t.Error("the request itself was changed")
	}
}

func TestRecordIsAWishOnlyWhereTheUserHasNone(t *testing.T) {
	record := addressRecord([]Result{onBackend})
	r, _ := withRecord(one(Interface{Network: "backend", IPs: addresses("10.40.1.1")}), record)
	if d := cmp.Diff(addresses("10.40.1.1", "fd40::9"), r.Interfaces[0].IPs, equal); d != "" || r.Interfaces[0].MAC != nil {
		t.Errorf("MAC %v belongs to another address; %s", r.Interfaces[0].MAC, d)
	}
	r, _ = withRecord(one(Interface{Network: "backend", IPs: addresses("10.40.1.9"), MAC: onStorage.MAC}), record)
	if r.Interfaces[0].MAC.String() != onStorage.MAC.String() || len(r.Interfaces[0].IPs) != 2 {
		t.Errorf("got %+v", r)
	}
}

func TestWishesGiveUpOneNetworkAtATime(t *testing.T) {
	var got []string
	for _, w := range wishes(asked, addressRecord([]Result{onBackend, onStorage})) {
		got = append(got, addressesOf(w))
	}
	want := []string{"[10.40.1.9 fd40::9] [10.50.0.18]", "[] [10.50.0.18]", "[10.40.1.9 fd40::9] []", "[] []"}
	if !slices.Equal(got, want) {
		t.Errorf("wishes\n%q, want\n%q", got, want)
	}
	if n := len(wishes(asked, nil)); n != 1 {
		t.Errorf("%d wishes without a record, want 1", n)
	}
}

// FuzzParseLabels: any label gives a request in bounds or a bounded, printable error.
func FuzzParseLabels(f *testing.F) {
	f.Add(LabelNetwork, "backend", LabelIP, "10.40.1.7,fd40::7")
	f.Add(LabelNetwork, "backend,storage", "lace.net.storage.ifname", "eth0")
	f.Add(LabelNetwork, "a.b, c", "lace.net.a.b.gateway", "true")
	f.Add("lace.netwrok", "\x00", LabelMAC, "02:00:00:00:00:01")
	f.Add("lace.", "", LabelSticky, "1")
	f.Add(LabelNetwork, "backend", LabelPublish, "[2001:db8::1]:8080-8081:80-81/udp")
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
		if asks {
			checkAccepted(t, r)
		}
	})
}

// checkAccepted holds what the data plane may rely on.
func checkAccepted(t *testing.T, r Request) {
	t.Helper()
	networks, names, gateways := map[string]bool{}, map[string]bool{}, 0
	var ports []Publish
	for _, i := range r.Interfaces {
		networks[i.Network], names[i.IfName] = true, true
		if i.Gateway {
			gateways++
		}
		if i.Network == "" || len(i.IPs) > 2 || (i.MAC != nil && i.MAC[0]&1 != 0) ||
			i.IfName == "lo" || len(i.IfName) < 1 || len(i.IfName) > 15 || strings.ContainsAny(i.IfName, "/:% \t\n") {
			t.Fatalf("accepted %+v", i)
		}
		ports = append(ports, i.Publish...)
	}
	checkPublished(t, ports)
	if n := len(r.Interfaces); n < 1 || n > maxNetworks || len(networks) != n || len(names) != n || gateways > 1 {
		t.Fatalf("accepted %+v", r)
	}
}

// FuzzRecord: whatever stands on a record, the wish stays within what labels may ask for.
func FuzzRecord(f *testing.F) {
	f.Add("backend=10.40.1.9,fd40::9;storage=10.50.0.18", "backend=02:00:00:00:00:09")
	f.Add("10.40.1.9", "02:00:00:00:00:09")
	f.Add(";=;", "=;;")
	f.Fuzz(func(t *testing.T, ips, macs string) {
		r, filled := withRecord(asked, labelMap{RecordAddress: ips, RecordMAC: macs})
		for _, i := range r.Interfaces {
			if len(i.IPs) > 2 || (i.MAC != nil && i.MAC[0]&1 != 0) {
				t.Fatalf("accepted %+v", i)
			}
		}
		if len(filled) > len(r.Interfaces) {
			t.Fatalf("filled %v", filled)
		}
	})
}
