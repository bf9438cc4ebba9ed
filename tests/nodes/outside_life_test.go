// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// business is traffic of all kinds between containers, hosts and the outside, which must not notice what agents do.
type business struct {
	streams   []*stream
	exchanges []*exchange
	floods    []*flood
}

// echoTCP serves connections and sends everything back.
func (n *namespace) echoTCP(t *testing.T, at netip.AddrPort) netip.AddrPort {
	t.Helper()
	return n.serveTCP(t, at, func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) })
}

// begin has the container at another node use the outside by the first one if the topology says so, that at the first one too, and
// everybody the published port.
func begin(t *testing.T, i *internet, web, far *container) *business {
	t.Helper()
	b := &business{}
	n := i.nodes[0]
	for v, server := range serverAddresses {
		own := outside(1)[v]
		at := i.server.echoTCP(t, netip.AddrPortFrom(server, 0))
		udp := i.server.echoUDP(t, server, "")
		for _, c := range []*container{web, far} {
			b.streams = append(b.streams, startStreamTo(t, c.namespace, at))
			b.exchanges = append(b.exchanges, startExchangeTo(t, c.namespace, udp))
		}
		for _, client := range []*namespace{i.server, n.namespace, i.nodes[1].namespace, far.namespace} {
			b.streams = append(b.streams, startStreamTo(t, client, netip.AddrPortFrom(own, echoPort)))
			b.exchanges = append(b.exchanges, startExchangeTo(t, client, netip.AddrPortFrom(own, echoPort)))
		}
		b.exchanges = append(b.exchanges, startExchangeTo(t, n.namespace, far.echoUDP(t, far.addresses()[v], "")))
		b.floods = append(b.floods, startFlood(t, web, server))
	}
	return b
}

func (b *business) check(t *testing.T) {
	t.Helper()
	for _, s := range b.streams {
		s.check(t)
	}
	for _, e := range b.exchanges {
		e.check(t)
	}
	for _, f := range b.floods {
		f.check(t)
	}
}

// goOn waits until all exchanges have had some more questions answered.
func (b *business) goOn(t *testing.T, questions int64) {
	t.Helper()
	for _, e := range b.exchanges {
		goal := e.asked.Load() + questions
		until(t, "questions are answered", func() bool { return e.asked.Load() >= goal || len(e.ended) > 0 })
	}
}

// businessTables have the outside reached by the first node, published ports open, and hosts reach containers.
const businessTables = `
[network.app]
type = "l3"
id = 100
subnets = ["10.40.0.0/16", "fd40::/48"]
host = true
[network.internet]
type = "external"
prefixes = ["0.0.0.0/0", "::/0"]
` + byTheFirst + entered

// newBusiness is two nodes with a container each; the first one's has published ports that send everything back.
func newBusiness(t *testing.T, o bedOptions) (*internet, *container, *container) {
	t.Helper()
	o.nodes = 2
	i := newInternet(t, o)
	web, far := i.nodes[0].run(t, "web", "app", publish(publishedPorts...)), i.nodes[1].run(t, "far", "app")
	settle(t, web, far)
	for _, a := range web.addresses() {
		web.echoTCP(t, netip.AddrPortFrom(a, 82))
		web.echoUDPAt(t, netip.AddrPortFrom(a, 82), "")
	}
	return i, web, far
}

// TestAgentsComeAndGoOutside stops, kills and replaces agents under traffic between containers, hosts and the outside.
func TestAgentsComeAndGoOutside(t *testing.T) {
	takesLong(t)
	i, web, far := newBusiness(t, bedOptions{networks: businessTables})
	before := i.nodes[0].holdings()
	b := begin(t, i, web, far)
	for _, n := range i.nodes {
		n.stop()
		b.goOn(t, 20)
		n.start()
		n.agent.kill()
		n.start()
		b.goOn(t, 20)
	}
	b.check(t)
	if after := i.nodes[0].holdings(); !slices.Equal(before, after) {
		t.Errorf("before:\n%q\nafter:\n%q", before, after)
	}
}

// TestReloadOutside puts topologies in each other's place under such traffic, which all of them allow.
func TestReloadOutside(t *testing.T) {
	takesLong(t)
	o := bedOptions{networks: businessTables}
	i, web, far := newBusiness(t, o)
	o.nodes, o.more = 2, "[network.another]\ntype = \"external\"\nprefixes = [\"203.0.113.0/24\", \"2001:db8:113::/48\"]\n[network.more]\ntype = \"l3\"\nid = 500\nsubnets = [\"10.99.0.0/16\"]\nhost = true\n"
	texts := []string{i.topology, o.topology()}
	b := begin(t, i, web, far)
	for k := range applies() / 3 {
		for _, n := range i.nodes {
			n.apply(texts[(k+1)%2])
		}
		b.goOn(t, 5)
	}
	b.check(t)
}

// TestEgressIsTakenAway ends what the topology does not allow any more, and begins anew when it does.
func TestEgressIsTakenAway(t *testing.T) {
	takesLong(t)
	t.Parallel()
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork, more: masqueraded})
	n := i.nodes[0]
	open := i.topology
	shut, _, _ := strings.Cut(open, "[[peering]]")
	c := n.run(t, "c", "app")
	settle(t, c)
	for _, server := range serverAddresses {
		udp, tcp := i.server.tellUDP(t, netip.AddrPortFrom(server, 0)), i.server.echoTCP(t, netip.AddrPortFrom(server, 0))
		u := c.dialUDP(t, udp)
		was, err := ask(u, []byte("who am I?"), patience)
		must(t, err)
		data := startStreamTo(t, c.namespace, tcp)
		n.apply(shut)
		wire := i.router.capture(t, "lan0")
		until(t, "the flow is refused", func() bool {
			_, err := ask(u, []byte("still here?"), patience)
			return errors.Is(err, prohibited(server))
		})
		before := n.counter("no_route")
		until(t, "the connection's packets are refused", func() bool { return n.counter("no_route")+n.counter("no_flow") > before })
		if k := wire.count(containing([]byte("still here?"))); k > 0 {
			t.Errorf("%d packets leave that are not allowed to", k)
		}
		n.apply(open)
		if _, err := ask(u, []byte("who am I?"), patience); err != nil {
			t.Errorf("after the peering is back: %v (was %s)", err, was)
		}
		close(data.stop)
		data.c.Close()
	}
}

// hostSettings are all that the host's sysctls of interfaces say, of those that Lace does not make.
func (n *namespace) hostSettings(t *testing.T) []string {
	t.Helper()
	var all []string
	must(t, n.do(func() error {
		for _, family := range []string{"ipv4", "ipv6"} {
			files, err := filepath.Glob("/proc/sys/net/" + family + "/conf/*/*")
			if err != nil {
				return err
			}
			more, err := filepath.Glob("/proc/sys/net/" + family + "/*")
			if err != nil {
				return err
			}
			for _, file := range append(files, more...) {
				if what, err := os.ReadFile(file); err == nil && !strings.Contains(file, "stable_secret") {
					all = append(all, file+" = "+strings.TrimSpace(string(what)))
				}
			}
		}
		return nil
	}))
	return slices.DeleteFunc(all, func(s string) bool { return strings.Contains(s, "/lace") || strings.Contains(s, "/lc-host") })
}

// TestRemoveOutside holds that uninstalling takes away all that hosts, external networks and published ports need, and that the only
// settings of the host that change meanwhile are lo's two.
func TestRemoveOutside(t *testing.T) {
	takesLong(t)
	var before, settings []string
	i, web, far := newBusiness(t, bedOptions{networks: businessTables, prepare: func(b *bed) {
		n := b.nodes[0]
		n.sysctl(t, "ipv4/ip_forward", "0")
		before, settings = n.settledDump(t), n.hostSettings(t)
	}})
	n := i.nodes[0]
	far.reaches(t, serverAddresses[0])
	s := &shopFront{i, web}
	web.tellTCP(t, netip.AddrPortFrom(web.port.V4, 80))
	web.tellUDP(t, netip.AddrPortFrom(web.port.V4, 80))
	s.sold(t, n.namespace, netip.MustParseAddr("127.0.0.1"), outside(1)[0])
	if diff := changed(settings, n.hostSettings(t)); !slices.Equal(diff, []string{"/proc/sys/net/ipv4/conf/lo/accept_local = 1", "/proc/sys/net/ipv4/conf/lo/route_localnet = 1"}) {
		t.Errorf("settings of the host that are others now: %q", diff)
	}
	n.agent.kill()
	n.uninstall()
	var after []string
	until(t, "the last interfaces are gone", func() bool {
		after = n.dump()
		return !slices.ContainsFunc(after, func(s string) bool { return strings.Contains(s, "lace") || strings.Contains(s, "lc-host") })
	})
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("Lace left or took (-before +after):\n%s", diff)
	}
	if diff := changed(settings, n.hostSettings(t)); diff != nil {
		t.Errorf("settings of the host that are others than before: %q", diff)
	}
	if _, err := n.dialTCP(t, netip.MustParseAddrPort("127.0.0.1:8080"), nil); err == nil {
		t.Error("a published port is still open")
	}
	checkNothingAttached(t, n)
}

func changed(before, after []string) (all []string) {
	for _, s := range after {
		if !slices.Contains(before, s) {
			all = append(all, s)
		}
	}
	return all
}

// checkNothingAttached holds that no interface of the host has a program.
func checkNothingAttached(t *testing.T, n *node) {
	t.Helper()
	for _, name := range []string{"lo", uplink} {
		index := n.link(t, name).Attrs().Index
		must(t, n.do(func() error {
			got, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXIngress})
			if err == nil && len(got.Programs) > 0 {
				t.Errorf("%s has %d programs", name, len(got.Programs))
			}
			return nil // before 6.6 there are only the filters, which the dump has
		}))
	}
}

// TestTheHostsOwn has the host use the network for itself while Lace takes packets out of all its interfaces: nothing of that is touched.
func TestTheHostsOwn(t *testing.T) {
	takesLong(t)
	t.Parallel()
	i, web, far := newBusiness(t, bedOptions{networks: businessTables, prepare: func(b *bed) {
		b.nodes[0].give(t, "lo", "192.0.2.200/32")
	}})
	n := i.nodes[0]
	far.reaches(t, serverAddresses[0])
	web.reaches(t, serverAddresses[1])
	counters := n.status().Counters
	for v, server := range serverAddresses {
		own := outside(1)[v]
		for _, pair := range []struct {
			from, to *namespace
			at, want netip.Addr
		}{{n.namespace, i.server, server, own}, {i.server, n.namespace, own, server}, {n.namespace, n.namespace, own, own},
			{n.namespace, n.namespace, []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}[v], []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}[v]},
			{n.namespace, i.nodes[1].namespace, outside(2)[v], own}, {i.nodes[1].namespace, n.namespace, own, outside(2)[v]}} {
			t.Run(title(pair.from.name, pair.at.String()), func(t *testing.T) { checkUse(t, pair.from, pair.to, pair.at, pair.want) })
		}
		t.Run(title("errors", family(own)), func(t *testing.T) {
			refusedAt(t, n.namespace, netip.AddrPortFrom(server, 9))
			refusedAt(t, i.server, netip.AddrPortFrom(own, 9))
			refusedAt(t, n.namespace, netip.AddrPortFrom(own, 9))
			checkTracerouteFromLink(t, n.namespace, uplink, server, routerAddresses[v], server)
			checkTracerouteFromLink(t, i.server, "eth0", own, serverSide[v], own)
		})
	}
	i.server.reaches(t, netip.MustParseAddr("192.0.2.1"))
	now := n.status().Counters
	for reason, count := range now { // what Lace counts are its own packets; the pings above may have been answered late
		if reason == "gateway_answered" || reason == "multicast" || count == counters[reason] {
			continue
		}
		t.Errorf("%d packets of the host's own were %s", count-counters[reason], reason)
	}
}

// refusedAt holds that a closed port is told.
func refusedAt(t *testing.T, from *namespace, at netip.AddrPort) {
	t.Helper()
	until(t, fmt.Sprintf("%s is told that %s is closed", from.name, at), func() bool {
		_, err := ask(from.dialUDP(t, at), []byte("anybody?"), onePing)
		return errors.Is(err, unix.ECONNREFUSED)
	})
}
