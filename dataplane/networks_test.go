// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// lan is an L2 network: this node's pool is 10.70.0.16/28, that of node two 10.70.0.32/28.
const lan = "[network.lan]\ntype = \"l2\"\nid = 500\nsubnets = [\"10.70.0.0/24\"]\ngateway = [\"10.70.0.1\"]\n"

// Endpoints of lan: two here, one of which has a MAC only, and one at another node.
const (
	machine = "[endpoint.machine]\nnetwork = \"lan\"\nnode = \"one\"\nmac = \"52:54:00:00:00:01\"\naddress = [\"10.70.0.200\"]\n"
	mute    = "[endpoint.mute]\nnetwork = \"lan\"\nnode = \"one\"\nmac = \"52:54:00:00:00:02\"\n"
	afar    = "[endpoint.afar]\nnetwork = \"lan\"\nnode = \"two\"\nmac = \"52:54:00:00:00:03\"\naddress = [\"10.70.0.203\"]\n"
)

// reopen is a restart of the agent, with another topology perhaps.
func (b *bed) reopen(t *topology.Topology) {
	b.t.Helper()
	must(b.t, b.d.Close())
	b.open(t)
}

// attached are the networks that a container has, by interface name.
func (b *bed) attached(id string) map[string]string {
	ports, _ := b.d.Attached(id)
	networks := map[string]string{}
	for _, p := range ports {
		networks[p.IfName] = p.Network
	}
	return networks
}

// interfaces are those of the container, but for the loopback, with MTU and first address.
func (p *pod) interfaces() (names []string, mtu map[string]int, addr map[string]string) {
	p.t.Helper()
	mtu, addr = map[string]int{}, map[string]string{}
	must(p.t, p.in(func() error {
		all, err := net.Interfaces()
		for _, i := range all {
			if i.Flags&net.FlagLoopback != 0 {
				continue
			}
			names, mtu[i.Name] = append(names, i.Name), i.MTU
			if have, err := i.Addrs(); err == nil && len(have) > 0 {
				addr[i.Name] = have[0].String()
			}
		}
		return err
	}))
	slices.Sort(names)
	return names, mtu, addr
}

func wantError(t *testing.T, what string, err error, says ...string) {
	t.Helper()
	for _, s := range says {
		if err == nil || !strings.Contains(err.Error(), s) {
			t.Errorf("%s: the error is %v, want one with %q", what, err, s)
		}
	}
}

// TestTwoNetworks: a routed network and a segment for one container, which the next agent finds again.
func TestTwoNetworks(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	top := parse(t, web, lan)
	b.open(top)
	p := b.pod("default/both", "web", "lan")
	check := func(when string, ports []Port) {
		t.Helper()
		if len(ports) != 2 || ports[0].IfName != "eth0" || ports[1].IfName != "eth1" {
			t.Fatalf("%s: the ports are %+v", when, ports)
		}
		routed, segment := ports[0], ports[1]
		if routed.Network != "web" || routed.Type != topology.L3 || routed.MTU != 1460 || !routed.Gateway || len(routed.Routes) != 1 {
			t.Errorf("%s: the first port is %+v", when, routed)
		}
		if segment.Network != "lan" || segment.Type != topology.L2 || segment.MTU != 1442 || segment.Gateway || len(segment.Routes) != 0 ||
			segment.Gateway4 != netip.MustParseAddr("10.70.0.1") || segment.MAC[0] != 2 || [4]byte(segment.MAC[2:]) != segment.V4.As4() {
			t.Errorf("%s: the second port is %+v", when, segment)
		}
		if row, ok := b.stationOf(segment); !ok || row.Ifindex != uint32(segment.Ifindex) || row.Mtu != 1442 {
			t.Errorf("%s: the station is %+v, %v", when, row, ok)
		}
		for _, port := range ports {
			if !port.V4.IsValid() || port.V4 != p.ports[slices.Index(ifNames(ports), port.IfName)].V4 {
				t.Errorf("%s: %s has %s", when, port.IfName, port.V4)
			}
		}
		names, mtu, addr := p.interfaces()
		if !slices.Equal(names, []string{"eth0", "eth1"}) || mtu["eth0"] != 1460 || mtu["eth1"] != 1442 ||
			addr["eth0"] != routed.V4.String()+"/32" || addr["eth1"] != segment.V4.String()+"/24" {
			t.Errorf("%s: the container has %v with %v and %v", when, names, mtu, addr)
		}
	}
	check("attached", p.ports)
	for _, when := range []string{"again", "and by the next agent"} {
		must(t, p.attach("web", "lan"))
		check(when, p.ports)
		b.reopen(top)
		found, _ := b.d.Attached(p.id)
		check(when+", adopted", found)
	}
	must(t, b.in(func() error { return b.d.Detach(context.Background(), p.id) }))
	if names, _, _ := p.interfaces(); len(names) != 0 || len(b.attached(p.id)) != 0 {
		t.Errorf("after Detach the container has %v, and %v", names, b.attached(p.id))
	}
	for _, port := range p.ports {
		claimed := claim{network: network(t, top, port.Network), container: "default/other", want: []netip.Addr{port.V4}}
		_, _, err := b.d.lease(claimed)
		wantError(t, "its address for another one", err, "is taken by container default/both")
	}
	must(t, b.in(func() error { return b.d.Release(context.Background(), p.id) }))
	for _, pool := range b.d.pools {
		if !pool.empty() {
			t.Errorf("after Release network %s has %d leases", pool.network, len(pool.leases))
		}
	}
}

func ifNames(ports []Port) (names []string) {
	for _, p := range ports {
		names = append(names, p.IfName)
	}
	return names
}

// stationOf reads the active row of a port's MAC address.
func (b *bed) stationOf(p Port) (bpf.LaceStation, bool) {
	b.t.Helper()
	m := b.d.hooks.Maps()
	g, err := m.Generation()
	must(b.t, err)
	k := bpf.LaceFdbKey{Scope: maps.Scope(p.NetworkID, maps.SlotOf(g))}
	k.Mac.U8 = p.MAC
	row, ok, err := m.FDB.Get(k)
	must(b.t, err)
	return row, ok
}

// TestOneNetworkFails: all interfaces are wired, or none is that was not before.
func TestOneNetworkFails(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	top := parse(t, web, lan)
	b.open(top)
	p := b.bare("default/both")
	must(t, p.in(func() error { return makePair("eth1", "far") }))
	wantError(t, "an interface of somebody else's", p.attach("web", "lan"), "to network lan", "interface eth1 in the container")
	if names, _, _ := p.interfaces(); !slices.Equal(names, []string{"eth1", "far"}) {
		t.Errorf("the container has %v", names)
	}
	if n := rowsOfNetwork(t, b.d.hooks.Maps(), 100); n != 0 || len(b.d.ports) != 0 || !b.d.pools[100].empty() || !b.d.pools[500].empty() {
		t.Errorf("%d rows, %d ports, and leases %v %v are left", n, len(b.d.ports), b.d.pools[100].leases, b.d.pools[500].leases)
	}
	wantError(t, "an address of nobody", p.request(Interface{Network: "web"}, Interface{Network: "lan", IPs: ips("10.99.0.1")}), "outside 10.70.0.16/28, the pool of network lan on node one")
	if !b.d.pools[100].empty() {
		t.Error("the addresses of the first network are kept")
	}

	must(t, p.attach("web")) // and now it is there before
	had := p.port
	wantError(t, "the same again", p.attach("web", "lan"), "interface eth1 in the container")
	if ports, _ := b.d.Attached(p.id); len(ports) != 1 || ports[0].V4 != had.V4 || ports[0].Ifindex != had.Ifindex {
		t.Errorf("what was wired before is %+v", ports)
	}
	must(t, p.in(func() error { return removeLink("eth1") }))
	must(t, p.attach("web", "lan"))
}

// TestNetworksThatAreNotAskedForGo: an address is free then, and what stays keeps its own.
func TestNetworksThatAreNotAskedForGo(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, web, db, lan))
	p := b.pod("default/moves", "web", "lan")
	in := map[string]netip.Addr{"web": p.ports[0].V4, "lan": p.ports[1].V4}
	for _, step := range []struct {
		ask  []string
		want map[string]string
	}{
		{[]string{"lan"}, map[string]string{"eth0": "lan"}}, // under another name
		{[]string{"lan", "db", "web"}, map[string]string{"eth0": "lan", "eth1": "db", "eth2": "web"}},
		{[]string{"db", "lan"}, map[string]string{"eth0": "db", "eth1": "lan"}}, // in each other's place
		{[]string{"web"}, map[string]string{"eth0": "web"}},
	} {
		must(t, p.attach(step.ask...))
		have := b.attached(p.id)
		names, _, _ := p.interfaces()
		if len(have) != len(step.want) || len(names) != len(step.want) {
			t.Errorf("asked for %v: %v, and the container has %v", step.ask, have, names)
		}
		for name, network := range step.want {
			if have[name] != network || !slices.Contains(names, name) {
				t.Errorf("asked for %v: %s is %q, want %q", step.ask, name, have[name], network)
			}
		}
		for _, port := range p.ports {
			if was, ok := in[port.Network]; ok && was != port.V4 {
				t.Errorf("asked for %v: the address in %s was %s, and is %s", step.ask, port.Network, was, port.V4)
			}
		}
		for id, pool := range b.d.pools {
			if asked := slices.ContainsFunc(p.ports, func(p Port) bool { return p.NetworkID == id }); asked == pool.empty() {
				t.Errorf("asked for %v: network %s has %d leases", step.ask, pool.network, len(pool.leases))
			}
		}
	}
}

func TestRefusedRequests(t *testing.T) {
	takesLong(t)
	const twin = "[network.twin]\ntype = \"l2\"\nid = 501\nsubnets = [\"10.70.0.0/23\"]\n"
	b := newBed(t)
	b.open(parse(t, web, db, lan, twin))
	p := b.bare("default/one")
	nine := make([]Interface, 9)
	for _, test := range []struct {
		name, says string
		all        []Interface
	}{
		{"nothing", "asks for no network", nil},
		{"too many", "asks for 9 networks: at most 8", nine},
		{"one twice", "network web is asked for twice", []Interface{{Network: "web"}, {Network: "web", IfName: "other"}}},
		{"one name", "networks web and db are both asked for as interface eth0", []Interface{{Network: "web"}, {Network: "db", IfName: "eth0"}}},
		{"two ways out", "networks web and db are both asked for the default route", []Interface{{Network: "web", Gateway: true}, {Network: "db", Gateway: true}}},
		{"no such network", `network "dbb" is not in the topology`, []Interface{{Network: "web"}, {Network: "dbb"}}},
		{"the same subnets", "subnet 10.70.0.0/23 of network twin overlaps 10.70.0.0/24 of network lan: one container cannot be in both", []Interface{{Network: "lan"}, {Network: "twin"}}},
		{"a device", "devices of the host can join L2 networks only", []Interface{{Network: "web", Device: "eth9"}}},
	} {
		wantError(t, test.name, p.request(test.all...), test.says)
		if test.name == "a device" {
			continue
		}
		wantError(t, test.name+", reserved", b.d.Reserve(context.Background(), Request{Container: "default/one", Interfaces: test.all}), test.says)
	}
	_, err := b.d.Attach(context.Background(), Request{Container: "device/x", Interfaces: []Interface{{Network: "web"}}})
	wantError(t, "the id of a device", err, "are those of devices")
	for _, pool := range b.d.pools {
		if !pool.empty() {
			t.Errorf("network %s has %d leases", pool.network, len(pool.leases))
		}
	}
}

// TestMACsInSegments: what is known to be another's is refused, by name.
func TestMACsInSegments(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, lan, web, machine, afar))
	first := b.bare("default/first")
	given := plan.MAC{0x52, 0x54, 0, 0, 0, 9}
	must(t, first.request(Interface{Network: "lan", MAC: given}))
	second := b.bare("default/second")
	for _, test := range []struct {
		mac  string
		says []string
	}{
		{given.String(), []string{"is taken by container default/first"}},
		{"52:54:00:00:00:01", []string{"is that of endpoint machine at node one"}},
		{"52:54:00:00:00:03", []string{"is that of endpoint afar at node two"}},
		{"02:4c:0a:46:00:25", []string{"belongs to address 10.70.0.37", "of node two"}},
		{"02:4c:0a:46:00:f0", []string{"belongs to address 10.70.0.240", "that no node owns"}},
		{topology.GatewayMAC.String(), []string{"a unicast address other than the gateway's is wanted"}},
		{"01:00:5e:00:00:01", []string{"a unicast address other than the gateway's is wanted"}},
	} {
		var mac plan.MAC
		must(t, mac.UnmarshalText([]byte(test.mac)))
		wantError(t, test.mac, second.request(Interface{Network: "lan", MAC: mac}), append(test.says, "container default/second")...)
		if _, ok := b.d.Attached(second.id); ok {
			t.Fatalf("%s: the container is attached", test.mac)
		}
	}
	must(t, second.request(Interface{Network: "web", MAC: given})) // another network does not see it
	must(t, second.request(Interface{Network: "lan", IPs: ips("10.70.0.20"), MAC: plan.MAC{0x02, 0x4c, 10, 70, 0, 20}}))
}

// TestPoolOfSegment: containers have all addresses to which the topology gives no other use.
func TestPoolOfSegment(t *testing.T) {
	pools := "pools = { one = [\"10.70.0.0/28\", \"fd70::/124\"] }\nsubnets = [\"10.70.0.0/24\", \"fd70::/64\"]\n"
	six := "[endpoint.six]\nnetwork = \"lan\"\nnode = \"one\"\nmac = \"52:54:00:00:00:06\"\naddress = [\"fd70::100\"]\n"
	top := parse(t, strings.Replace(lan, "subnets = [\"10.70.0.0/24\"]\n", pools, 1), six)
	n := network(t, top, "lan")
	p := poolOf(n, "one")
	taken := map[netip.Addr]bool{}
	for i := range 13 { // of 16 places, without those of network address and gateway, and one to go
		l := mustLease(t, p, string(rune('a'+i)), "", nil, false)
		if offset(p.block.V4, l.v4) != offset(p.block.V6, l.v6) || taken[l.v4] {
			t.Errorf("lease %d has %s and %s", i, l.v4, l.v6)
		}
		taken[l.v4] = true
	}
	l := mustLease(t, p, "last", "last", nil, false)
	for _, a := range []string{"10.70.0.0", "10.70.0.1"} {
		if taken[netip.MustParseAddr(a)] || l.v4 == netip.MustParseAddr(a) {
			t.Errorf("%s was handed out", a)
		}
	}
	_, _, err := p.lease(claim{container: "more", network: n})
	wantError(t, "a full pool", err, "the pool of node one (10.70.0.0/28, fd70::/124) is full: its 14 addresses")
	for addr, says := range map[string]string{
		"10.70.0.0": "is the network address of 10.70.0.0/24", "10.70.0.1": "is the gateway", "10.70.0.255": "is the broadcast address",
		"10.70.0.77": "is outside 10.70.0.0/28, the pool of network lan on node one", "fd70::100": "is the address of endpoint six",
	} {
		_, _, err := p.lease(claim{container: "wishes", want: ips(addr), network: n})
		wantError(t, addr, err, says)
	}
	_, _, err = poolOf(n, "two").lease(claim{container: "there", network: n})
	wantError(t, "a node without a pool", err, "node two has no pool of it")
}

// TestNetworkChangesItsType: what a container was wired for is no more, until it is wired again or the old type is back.
func TestNetworkChangesItsType(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	routed := parse(t, web)
	flat := strings.Replace(web, "l3", "l2", 1) + "pools = { one = [\"10.40.1.0/24\"], two = [\"10.40.2.0/24\"] }\n"
	segment, slower := parse(t, flat), parse(t, flat+"flood-rate = 10\n")
	b.open(routed)
	p, q := b.pod("default/one", "web"), b.pod("default/two", "web")
	had := p.port.V4
	typeNow := func(pod *pod) topology.NetworkType {
		ports, ok := b.d.Attached(pod.id)
		if !ok {
			return 0
		}
		return ports[0].Type
	}
	wantTypes := func(when string, one, two topology.NetworkType) {
		t.Helper()
		if typeNow(p) != one || typeNow(q) != two {
			t.Errorf("%s: the containers are in networks of types %d and %d, want %d and %d", when, typeNow(p), typeNow(q), one, two)
		}
		must(t, b.in(b.d.resync)) // changes nothing of it
		if typeNow(p) != one || typeNow(q) != two {
			t.Errorf("%s, after a resync: the containers are in networks of types %d and %d, want %d and %d", when, typeNow(p), typeNow(q), one, two)
		}
	}
	b.mustApply(segment)
	wantTypes("another type", 0, 0)
	if !strings.Contains(b.logs.String(), "network web was of type l3, and is of type l2") {
		t.Errorf("the log does not say why:\n%s", b.logs)
	}
	must(t, p.attach("web"))
	if p.port.V4 != had {
		t.Errorf("the container had %s, and has %s", had, p.port.V4)
	}
	b.mustApply(slower)
	wantTypes("one is wired again", topology.L2, 0)
	b.mustApply(routed)
	wantTypes("the old type is back", 0, topology.L3)
	b.reopen(segment)
	wantTypes("the next agent has another type", topology.L2, 0) // the tables tell what those were wired for that had traffic
}
