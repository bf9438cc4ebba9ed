// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

const (
	world   = "[network.world]\ntype = \"external\"\nprefixes = [\"192.0.2.0/24\", \"2001:db8::/32\"]\n"
	outward = "[[peering]]\nfrom = \"web\"\nto = \"world\"\nmasquerade = true\n"
	inward  = "[[peering]]\nfrom = \"world\"\nto = \"web\"\n"
	dual    = "[network.web]\ntype = \"l3\"\nid = 100\nsubnets = [\"10.40.0.0/16\", \"fd40::/48\"]\nhost = true\n"
)

func tcp(port uint16) plan.Publish { return plan.Publish{Protocol: 6, Port: port, To: 80} }

func udp(port uint16) plan.Publish { return plan.Publish{Protocol: 17, Port: port, To: 80} }

func at(address string, p plan.Publish) plan.Publish {
	p.Address = netip.MustParseAddr(address)
	return p
}

// publish attaches a container to network web with ports of the node.
func (p *pod) publish(ports ...plan.Publish) error {
	return p.request(Interface{Network: "web", Gateway: true, Publish: ports})
}

// rows are what the programs know of published ports.
func (b *bed) rows() []string {
	b.t.Helper()
	all, err := b.d.Hooks().Maps().Published.All()
	must(b.t, err)
	generation, err := b.d.Hooks().Maps().Generation()
	must(b.t, err)
	var out []string
	for k, v := range all {
		if maps.Slot(k.Slot) == maps.SlotOf(generation) {
			out = append(out, fmt.Sprintf("%s %d", netip.AddrFrom16(v.Addr.U8).Unmap(), k.V4))
		}
	}
	slices.Sort(out)
	return out
}

// loopback says what is set for published ports: the program at lo, and the two values of the host.
func (b *bed) loopback() (set [3]bool) {
	b.t.Helper()
	must(b.t, b.in(func() error {
		set[0] = b.d.attached[1]
		for i, name := range []string{"accept_local", "route_localnet"} {
			text, err := os.ReadFile("/proc/sys/net/ipv4/conf/lo/" + name)
			if err != nil {
				return err
			}
			set[1+i] = strings.TrimSpace(string(text)) == "1"
		}
		return nil
	}))
	return set
}

// TestPublish: ports are a container's as long as it is there, whoever the agent is, and follow it from topology to topology.
func TestPublish(t *testing.T) {
	b := newBed(t)
	top := parse(t, dual, world, inward)
	b.open(top)
	if set := b.loopback(); set != [3]bool{} {
		t.Errorf("while nothing is published lo has %v", set)
	}
	p := b.pod("default/p", "web")
	must(t, p.publish(tcp(8080), udp(8081)))
	want := []string{p.port.V4.String() + " 1", p.port.V4.String() + " 1", p.port.V6.String() + " 0", p.port.V6.String() + " 0"}
	check := func(when string) {
		t.Helper()
		if got := b.rows(); !slices.Equal(got, want) {
			t.Errorf("%s: published are %v, want %v", when, got, want)
		}
		ports, _ := b.d.Attached(p.id)
		if !slices.Equal(ports[0].Publish, []plan.Publish{tcp(8080), udp(8081)}) || !slices.Equal(b.d.Plan().Ports[0].Publish, ports[0].Publish) {
			t.Errorf("%s: the port is %+v", when, ports[0])
		}
		if set := b.loopback(); set != [3]bool{true, true, true} {
			t.Errorf("%s: lo has %v", when, set)
		}
	}
	check("attached")
	must(t, p.publish(tcp(8080), udp(8081)))
	check("attached twice")
	must(t, b.in(b.d.resync))
	check("mended")
	b.reopen(top)
	check("with the next agent")
	b.mustApply(parse(t, dual, world, inward, db))
	check("with another topology")

	b.mustApply(parse(t, world, db)) // its network has left
	if got := b.rows(); len(got) != 0 {
		t.Errorf("a container without a network publishes %v", got)
	}
	other := b.pod("default/other", "db")
	err := other.request(Interface{Network: "db", Publish: []plan.Publish{tcp(8080)}})
	wantError(t, "a port of a container that waits for its network", err, "0.0.0.0:8080/tcp", "container default/p (default/p) has it")
	b.mustApply(top)
	check("with the first topology again")

	must(t, p.publish())
	if set := b.loopback(); set != [3]bool{} || len(b.rows()) != 0 {
		t.Errorf("after nothing is asked for lo has %v, and published are %v", set, b.rows())
	}
	must(t, p.publish(tcp(8080)))
	must(t, b.in(func() error { return b.d.Detach(context.Background(), p.id) }))
	if set := b.loopback(); set != [3]bool{} || len(b.rows()) != 0 {
		t.Errorf("after Detach lo has %v, and published are %v", set, b.rows())
	}
}

// TestPublishedInOneFamily: a segment that has a gateway of one family only answers in that.
func TestPublishedInOneFamily(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, "[network.web]\ntype = \"l2\"\nid = 500\nsubnets = [\"10.70.0.0/24\", \"fd70::/64\"]\ngateway = [\"10.70.0.1\"]\n"))
	p := b.bare("default/p")
	must(t, p.publish(tcp(8080)))
	if got := b.rows(); !slices.Equal(got, []string{p.port.V4.String() + " 1"}) {
		t.Errorf("published are %v", got)
	}
	wantError(t, "the other family", p.publish(at("::", tcp(8080))), "of a family with a gateway")
}

func TestPublishedPortIsTaken(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, dual, world, inward))
	first := b.pod("default/first", "web")
	must(t, first.publish(tcp(8080), at("fd00:a::1", tcp(8082)), at("127.0.0.1", udp(8083))))
	second := b.pod("default/second", "web")
	for _, clash := range []plan.Publish{tcp(8080), at("192.0.2.1", tcp(8080)), at("::", tcp(8082)), tcp(8082), udp(8083)} {
		err := second.publish(tcp(9000), clash)
		wantError(t, fmt.Sprint(clash), err, "attach container default/second: publish port", "container default/first (default/first) has it on this node")
		if ports, _ := b.d.Attached(second.id); len(ports) != 1 || len(ports[0].Publish) != 0 {
			t.Errorf("after an attach that was refused there is %+v", ports)
		}
	}
	must(t, second.publish(udp(8080), at("0.0.0.0", tcp(8082)), at("127.0.0.2", udp(8083))))
	must(t, first.publish(tcp(8080), tcp(8084))) // it has the first one already
	must(t, b.in(func() error { return b.d.Detach(context.Background(), first.id) }))
	must(t, second.publish(tcp(8080)))
}

// TestPublishedPortOfAProcess: what a process of the host listens at cannot be published; what it has only connected from can.
func TestPublishedPortOfAProcess(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, dual, world, inward))
	p := b.pod("default/p", "web")
	listen := func(network, address string) (close func()) {
		t.Helper()
		must(t, b.in(func() error {
			if strings.HasPrefix(network, "udp") {
				c, err := net.ListenPacket(network, address)
				close = func() { c.Close() }
				return err
			}
			l, err := net.Listen(network, address)
			close = func() { l.Close() }
			return err
		}))
		return close
	}
	for _, tt := range []struct {
		network, address string
		asked            plan.Publish
		taken            bool
	}{
		{"tcp4", "0.0.0.0:8080", tcp(8080), true},
		{"tcp4", "127.0.0.1:8080", tcp(8080), true},
		{"tcp", ":8080", at("fd00:a::1", tcp(8080)), true},
		{"tcp6", "[fd00:a::1]:8080", tcp(8080), true},
		{"udp4", "127.0.0.1:8080", udp(8080), true},
		{"udp6", "[::]:8080", udp(8080), true},
		{"udp4", "127.0.0.1:8080", tcp(8080), false},
		{"tcp4", "127.0.0.1:8080", at("192.0.2.1", tcp(8080)), false},
		{"tcp4", "127.0.0.1:8080", at("::", tcp(8080)), false},
		{"tcp6", "[::1]:8080", at("0.0.0.0", tcp(8080)), false},
	} {
		done := listen(tt.network, tt.address)
		err := p.publish(tt.asked)
		done()
		if !tt.taken {
			must(t, err)
			must(t, p.publish())
			continue
		}
		wantError(t, fmt.Sprintf("%s at %s", tt.network, tt.address), err, "publish port", "8080", "a process of this host has it")
		must(t, p.publish(tt.asked)) // nobody listens any more
		must(t, p.publish())
	}
	must(t, p.publish(tcp(8080)))
	defer listen("tcp", ":8080")() // it had the port first, and nobody asks again
	must(t, p.publish(tcp(8080)))
}

func TestRefusedPublications(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	lan := "[network.lan]\ntype = \"l2\"\nid = 500\nsubnets = [\"10.70.0.0/24\"]\n"
	b.open(parse(t, web, lan, db))
	p := b.bare("default/p")
	many := make([]plan.Publish, 257)
	for i := range many {
		many[i] = tcp(uint16(9000 + i))
	}
	for name, tt := range map[string]struct {
		network string
		ports   []plan.Publish
		want    string
	}{
		"no port":              {"web", []plan.Publish{{Protocol: 6, To: 80}}, "port 0 is none"},
		"no port to lead to":   {"web", []plan.Publish{{Protocol: 6, Port: 80}}, "port 0 is none"},
		"another protocol":     {"web", []plan.Publish{{Protocol: 132, Port: 80, To: 80}}, "only TCP and UDP"},
		"multicast":            {"web", []plan.Publish{at("224.0.0.1", tcp(80))}, "address 224.0.0.1 is none"},
		"link-local":           {"web", []plan.Publish{at("fe80::1", tcp(80))}, "address fe80::1 is none"},
		"IPv6 in an IPv4 net":  {"web", []plan.Publish{at("::", tcp(80))}, "that address :: of this node could lead to"},
		"L2 without a gateway": {"lan", []plan.Publish{tcp(80)}, "the network has no gateway"},
		"twice":                {"web", []plan.Publish{tcp(80), udp(80), tcp(80)}, "asks for it twice"},
		"too many":             {"web", many, "more than 256 ports"},
		"once, and everywhere": {"web", []plan.Publish{at("192.0.2.1", tcp(80)), tcp(80)}, "asks for it twice"},
	} {
		err := p.request(Interface{Network: tt.network, Publish: tt.ports})
		wantError(t, name, err, "attach container default/p", tt.want)
	}
	err := p.request(Interface{Network: "web", Publish: many[:200]}, Interface{Network: "db", Publish: many[200:]})
	wantError(t, "too many in two networks", err, "more than 256 ports")
	if ports, wired := b.d.Attached(p.id); wired || len(b.rows()) != 0 {
		t.Errorf("after all that there is %+v, and %v", ports, b.rows())
	}
	for _, pool := range b.d.pools {
		if !pool.empty() {
			t.Errorf("after all that network %s has %d leases", pool.network, len(pool.leases))
		}
	}
	must(t, p.request(Interface{Network: "web", Publish: many[:256]}))
	if got := len(b.rows()); got != 256 {
		t.Errorf("%d ports are published, want 256", got)
	}
}

// TestNoContainerIsOutside: an external network has no place for containers.
func TestNoContainerIsOutside(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, web, world))
	p := b.bare("default/p")
	wantError(t, "an external network", p.attach("world"), "network world is external")
	wantError(t, "an external network, reserved", b.d.Reserve(t.Context(), Request{Container: "default/p", Interfaces: []Interface{{Network: "world"}}}), "network world is external")
	if err := p.attach("wep"); err == nil || !strings.HasSuffix(err.Error(), "there are: web") {
		t.Errorf("a network that is not there: %v", err)
	}
}

// TestPublishedInVain: what nobody may come in by is published all the same, and said.
func TestPublishedInVain(t *testing.T) {
	takesLong(t)
	for name, tt := range map[string]struct {
		top  *topology.Topology
		port plan.Publish
		want string
	}{
		"no peering":         {parse(t, web, world, outward), tcp(80), "nobody outside of the overlay may come in by"},
		"another's address":  {parse(t, dual), at("192.0.2.77", tcp(80)), "an address that this node does not have"},
		"a peering":          {parse(t, web, world, inward), tcp(80), ""},
		"host = true":        {parse(t, dual), at("fd00:a::1", tcp(80)), ""},
		"localhost":          {parse(t, dual), at("127.0.0.1", tcp(80)), ""},
		"all IPv4 addresses": {parse(t, dual), at("0.0.0.0", tcp(80)), ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			b.open(tt.top)
			must(t, b.bare("default/p").publish(tt.port))
			said := strings.Contains(b.logs.String(), "level=WARN")
			if said != (tt.want != "") || !strings.Contains(b.logs.String(), tt.want) {
				t.Errorf("said was %s", b.logs)
			}
		})
	}
}

// TestPortsChangeHands: flows by a port that leads elsewhere now are decided again.
func TestPortsChangeHands(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, dual, world, inward))
	p := b.pod("default/p", "web")
	generation := func() uint32 {
		t.Helper()
		g, err := b.d.Hooks().Maps().Generation()
		must(t, err)
		return g
	}
	for _, step := range []struct {
		ports []plan.Publish
		again bool
	}{{[]plan.Publish{tcp(8080)}, true}, {[]plan.Publish{tcp(8080)}, false}, {[]plan.Publish{{Protocol: 6, Port: 8080, To: 81}}, true}, {nil, true}} {
		before := generation()
		must(t, p.publish(step.ports...))
		if (generation() != before) != step.again {
			t.Errorf("after %v the generation is %d, was %d", step.ports, generation(), before)
		}
	}
}
