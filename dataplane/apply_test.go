// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/topology"
)

const nodes = `
version = 1
[underlay]
locator-block = "5f00:1ace::/32"
[node.one]
underlay = "fd00:a::1"
locator = "5f00:1ace:1::/48"
uplinks = ["up0"]
[node.two]
underlay = "fd00:a::2"
locator = "5f00:1ace:2::/48"
`

const (
	web     = "[network.web]\ntype = \"l3\"\nid = 100\nsubnets = [\"10.40.0.0/16\"]\n"
	db      = "[network.db]\ntype = \"l3\"\nid = 200\nsubnets = [\"10.50.0.0/16\"]\n"
	another = "[network.another]\ntype = \"l3\"\nid = 300\nsubnets = [\"10.60.0.0/16\"]\n"
	peering = "[[peering]]\nfrom = \"web\"\nto = \"db\"\n"
	small   = "[conntrack]\nmax = 1024\n"
)

func parse(t *testing.T, parts ...string) *topology.Topology {
	t.Helper()
	top, err := topology.Parse("topology.toml", []byte(nodes+strings.Join(parts, "")))
	must(t, err)
	return top
}

// asker sends numbered datagrams, one after the other, and counts those that are not answered.
type asker struct {
	stop        chan struct{}
	done        sync.WaitGroup
	mu          sync.Mutex
	asked, lost int
}

func (p *pod) asker(from uint16, to netip.AddrPort) *asker {
	a := &asker{stop: make(chan struct{})}
	c := p.udp(from)
	a.done.Go(func() {
		for i := uint32(0); ; i++ {
			select {
			case <-a.stop:
				return
			default:
			}
			ok := asks(c, to, i, patience()/4) // a machine that stands still for a moment has lost nothing
			a.mu.Lock()
			a.asked++
			if !ok {
				a.lost++
			}
			a.mu.Unlock()
		}
	})
	return a
}

func (a *asker) count() (asked, lost int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked, a.lost
}

// goesOn waits until datagrams are answered that were sent after now.
func (a *asker) goesOn(t *testing.T) {
	t.Helper()
	asked, lost := a.count()
	until(t, "datagrams are answered", func() bool {
		now, nowLost := a.count()
		return now-nowLost > asked-lost+5
	})
}

// TestApplyUnderTraffic applies topologies back and forth: what all of them allow is answered all the time, what only some
// allow is answered under those and under no other.
func TestApplyUnderTraffic(t *testing.T) {
	b := newBed(t)
	peered, apart := parse(t, web, db, peering), parse(t, web, db)
	others := []*topology.Topology{
		apart, parse(t, web, db, peering, another), parse(t, web, another), parse(t, web, db, small), parse(t, web),
		parse(t, web, db, "[[peering]]\nfrom = \"db\"\nto = \"web\"\n"),
	}
	b.open(peered)
	client, server, store := b.pod("default/client", "web"), b.pod("default/server", "web"), b.pod("default/store", "db")
	server.echo(2000)
	store.echo(2000)
	shop := netip.AddrPortFrom(store.port.V4, 2000)
	always := client.asker(1000, netip.AddrPortFrom(server.port.V4, 2000))
	sometimes := client.udp(1001)
	number := uint32(0)
	allowed := func() bool {
		number++
		return asks(sometimes, shop, number, 200*time.Millisecond)
	}
	until(t, "the peered network answers", allowed)
	for round := range 2 {
		for i, top := range others {
			if done := b.mustApply(top); !done.Changed {
				t.Errorf("round %d: topology %d changed nothing: %+v", round, i, done)
			}
			always.goesOn(t)
			if i == 1 {
				until(t, "with the peering and another network", allowed)
			} else if allowed() {
				t.Errorf("round %d: topology %d has no peering, and lets the flow go on", round, i)
			}
			b.mustApply(peered)
			until(t, "the peered network answers again", allowed)
			always.goesOn(t)
		}
	}
	close(always.stop)
	always.done.Wait()
	asked, lost := always.count()
	t.Logf("%d datagrams", asked)
	if lost > 0 {
		t.Errorf("of %d datagrams that every topology allows %d were not answered; log:\n%s", asked, lost, b.logs)
	}
}

// TestApplyTwice: the same topology once more is no change, and no generation.
func TestApplyTwice(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, web))
	b.pod("default/one", "web")
	first := b.mustApply(parse(t, web, db, peering))
	if !first.Changed || first.Took <= 0 {
		t.Errorf("another topology: %+v", first)
	}
	again := b.mustApply(parse(t, web, db, peering))
	if again.Changed || again.Generation != first.Generation {
		t.Errorf("the same once more: %+v after %+v", again, first)
	}
	resized := b.mustApply(parse(t, web, db, peering, small))
	if !resized.Changed || resized.Generation != first.Generation {
		t.Errorf("another size of the flows: %+v after %+v", resized, first)
	}
}

// TestNetworkLeavesAndComesBack: its containers stay wired without traffic, keep their addresses, and go on.
func TestNetworkLeavesAndComesBack(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	both := parse(t, web, db)
	moved := parse(t, strings.Replace(web, "10.40", "10.41", 1), db)
	b.open(both)
	client, server := b.pod("default/client", "web"), b.pod("default/server", "web")
	server.echo(2000)
	c, number := client.udp(1000), uint32(0)
	answered := func() bool {
		number++
		return asks(c, netip.AddrPortFrom(server.port.V4, 2000), number, 200*time.Millisecond)
	}
	must(t, b.d.Reserve(context.Background(), Request{Container: "default/stopped", Interfaces: []Interface{{Network: "web", IPs: ips("10.40.1.77")}}}))
	until(t, "an answer", answered)
	for name, without := range map[string]*topology.Topology{"the network is gone": parse(t, db), "its subnet is another": moved} {
		b.mustApply(without)
		if answered() {
			t.Errorf("%s, and packets still pass", name)
		}
		if !strings.Contains(b.logs.String(), "a container's network is not as the topology says") {
			t.Errorf("%s: no warning in the log", name)
		}
		if _, ok := b.d.Attached(client.id); ok {
			t.Errorf("%s: the container counts as attached", name)
		}
		must(t, b.in(b.d.resync)) // changes nothing of it
		if n := b.d.hooks.Maps(); rowsOfNetwork(t, n, 100) != 0 && name == "the network is gone" {
			t.Errorf("%s: tables have rows of it", name)
		}
		b.mustApply(both)
		until(t, "an answer after the network came back", answered)
		if p, ok := b.d.Attached(client.id); !ok || p[0].V4 != client.port.V4 {
			t.Errorf("%s and came back: the container has %+v, %v", name, p, ok)
		}
		if _, _, err := b.d.lease(claim{network: network(t, both, "web"), container: "default/new", want: ips("10.40.1.77")}); err == nil || !strings.Contains(err.Error(), "is taken by container default/stopped") {
			t.Errorf("%s and came back: the address of a stopped container was given away: %v", name, err)
		}
	}
}

func network(t *testing.T, top *topology.Topology, name string) *topology.Network {
	t.Helper()
	n, ok := top.Network(name)
	if !ok {
		t.Fatalf("no network %s", name)
	}
	return n
}

func rowsOfNetwork(t *testing.T, m *maps.Maps, id topology.NetworkID) (n int) {
	t.Helper()
	endpoints, err := m.Endpoints.All()
	must(t, err)
	for k := range endpoints {
		if maps.Network(k.Scope) == id {
			n++
		}
	}
	ports, err := m.Ports.All()
	must(t, err)
	for _, p := range ports {
		if topology.NetworkID(p.Network) == id {
			n++
		}
	}
	return n
}

// TestApplyFails: whatever goes wrong before the switch, the topology before stays in force as a whole.
func TestApplyFails(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	old := parse(t, web)
	b.open(old)
	client, server := b.pod("default/client", "web"), b.pod("default/server", "web")
	server.echo(2000)
	always := client.asker(1000, netip.AddrPortFrom(server.port.V4, 2000))
	before, err := b.d.hooks.Maps().Generation()
	must(t, err)

	elsewhere, err := topology.Parse("topology.toml", []byte(strings.ReplaceAll(nodes, "node.one", "node.three")+web))
	must(t, err)
	many := &strings.Builder{} // more than map peerings takes: 2^17 rows
	for i := range 46 {
		fmt.Fprintf(many, "[network.n%d]\ntype = \"l3\"\nid = %d\nblock-size = { v4 = 28 }\nlabels = { all = \"yes\" }\nsubnets = [\n", i, 1000+i)
		for j := range 64 {
			fmt.Fprintf(many, "\"10.%d.%d.%d/28\",\n", 100+i, j/16, j%16*16)
		}
		many.WriteString("]\n")
	}
	many.WriteString("[[peering]]\nfrom = { all = \"yes\" }\nto = { all = \"yes\" }\n")
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, test := range []struct {
		name, says string
		ctx        context.Context
		top        *topology.Topology
		foreign    string // a link of somebody else's
	}{
		{"the node is not in it", `no node "one"`, context.Background(), elsewhere, ""},
		{"too late", "waited for others too long", cancelled, parse(t, web, db), ""},
		{"a link is somebody else's", "laceb200", context.Background(), parse(t, web, db), "laceb200"},
		{"a table is full", "map peerings: it holds 131072 rows and is full", context.Background(), parse(t, web, many.String()), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.foreign != "" {
				must(t, b.in(func() error { return makePair(test.foreign, "x0") }))
				defer func() { must(t, b.in(func() error { return removeLink(test.foreign) })) }()
			}
			err := b.in(func() error {
				_, err := b.d.Apply(test.ctx, test.top)
				return err
			})
			if err == nil || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), "apply the topology") {
				t.Errorf("the error is %v", err)
			}
			if after, err := b.d.hooks.Maps().Generation(); err != nil || after != before {
				t.Errorf("generation %d, before %d: %v", after, before, err)
			}
			if b.d.Plan().Hash != old.Hash {
				t.Error("the plan is another one")
			}
			if err := b.in(func() error { return removeLink("laceb1000") }); err == nil {
				t.Error("a bridge of the new topology was left")
			}
			always.goesOn(t)
			if err := client.attach("db"); err == nil || !strings.Contains(err.Error(), `network "db" is not in the topology`) {
				t.Errorf("attach to a network of the new topology: %v", err)
			}
		})
	}
	close(always.stop)
	always.done.Wait()
	if asked, lost := always.count(); lost > 0 {
		t.Errorf("of %d datagrams %d were not answered", asked, lost)
	}
}

// TestDetachEndsFlows: what is established is decided again at once, the container's own flows are removed, others stay.
func TestDetachEndsFlows(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, web))
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	must(t, b.in(func() error {
		go func() { ran <- b.d.Run(ctx) }()
		return nil
	}))
	defer func() {
		cancel()
		must(t, <-ran)
	}()
	client, server, other := b.pod("default/client", "web"), b.pod("default/server", "web"), b.pod("default/other", "web")
	server.echo(2000)
	other.echo(2000)
	c := client.udp(1000)
	until(t, "both answer", func() bool {
		return asks(c, netip.AddrPortFrom(server.port.V4, 2000), 1, time.Second) && asks(c, netip.AddrPortFrom(other.port.V4, 2000), 2, time.Second)
	})
	until(t, "there is a count of the flows", func() bool { return b.d.Conntrack().Max == 65536 })
	before, err := b.d.hooks.Maps().Generation()
	must(t, err)
	must(t, b.in(func() error { return b.d.Detach(ctx, server.id) }))
	after, err := b.d.hooks.Maps().Generation()
	must(t, err)
	if after != before+2 {
		t.Errorf("generation %d after %d: flows are not decided again", after, before)
	}
	until(t, "the flows of the container are gone", func() bool { return b.flowsOf(server.port.V4) == 0 })
	if n := b.flowsOf(other.port.V4); n != 2 {
		t.Errorf("another container's flow has %d rows, want 2", n)
	}
	if !asks(c, netip.AddrPortFrom(other.port.V4, 2000), 3, time.Second) {
		t.Error("another container's flow ended")
	}
	if got := b.d.Conntrack(); got.At.IsZero() || len(got.States) != int(bpf.LaceFlowStateFLOW_STATES) {
		t.Errorf("Conntrack: %+v", got)
	}
}

func (b *bed) flowsOf(a netip.Addr) (n int) {
	b.t.Helper()
	table, err := b.d.hooks.Maps().OpenFlows()
	must(b.t, err)
	defer table.Close()
	must(b.t, maps.EachFlow(table, func(f maps.Flow) error {
		if f.Src.Addr() == a || f.Dst.Addr() == a {
			n++
		}
		return nil
	}))
	return n
}

// TestAddressInheritsNoFlow: the flows of a container are gone before another one has its address, also where nobody had
// the time to remove them.
func TestAddressInheritsNoFlow(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, web)) // Run does not run
	client, server := b.pod("default/client", "web"), b.pod("default/server", "web")
	server.echo(2000)
	c := client.udp(1000)
	until(t, "an answer", func() bool { return asks(c, netip.AddrPortFrom(server.port.V4, 2000), 1, time.Second) })
	must(t, b.in(func() error { return b.d.Detach(context.Background(), server.id) }))
	if b.flowsOf(server.port.V4) != 2 {
		t.Fatal("the flow is gone already: there is nothing to see here")
	}
	was := server.port.V4
	must(t, server.attach("web"))
	if server.port.V4 != was || b.flowsOf(was) != 0 {
		t.Errorf("the container has %s, and %d rows of flows of %s", server.port.V4, b.flowsOf(was), was)
	}
}
