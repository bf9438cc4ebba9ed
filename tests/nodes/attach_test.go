// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/plan"
)

// small is a network whose block on node 1 has five addresses for containers.
const small = twoNetworks + `
[network.small]
type = "l3"
id = 300
subnets = ["10.60.0.0/24"]
block-size = { v4 = 29 }
`

// TestAttach is what one node's agent does for containers, right ones and wrong ones.
func TestAttach(t *testing.T) {
	takesLong(t)
	n := newBed(t, bedOptions{nodes: 1, networks: small}).nodes[0]
	for _, tt := range []struct {
		name string
		test func(*testing.T, *node)
	}{
		{"again", checkAttachAgain}, {"at once", checkAttachAtOnce}, {"fifty", checkFifty}, {"wishes", checkWishes},
		{"refusals", checkRefusals}, {"full", checkFullBlock}, {"move", checkMove}, {"dying", checkDying},
		{"foreign", checkForeignInterfaces}, {"reserved", checkReserved},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := n.holdings()
			tt.test(t, n)
			_, err := n.agent.call(order{Do: "retain"})
			must(t, err)
			if after := n.holdings(); !slices.Equal(before, after) {
				t.Errorf("before:\n%q\nafter:\n%q", before, after)
			}
		})
	}
}

func checkAttachAgain(t *testing.T, n *node) {
	c := n.run(t, "again", "backend")
	first, held := c.port, n.holdings()
	if c.attach(t, "backend"); c.port != first || !slices.Equal(held, n.holdings()) {
		t.Errorf("the second time %+v, the first %+v", c.port, first)
	}
	c.order(t, "detach")
	c.order(t, "detach")
	if c.attach(t, "backend"); c.port.V4 != first.V4 || c.port.V6 != first.V6 || c.port.MAC != first.MAC {
		t.Errorf("after a detach %+v, before %+v", c.port, first)
	}
	c.reaches(t, c.port.Gateway4)
	// The container's restart: the same id, another namespace.
	next := &container{namespace: newNamespace(t, "next"), node: n, id: c.id}
	if next.attach(t, "backend"); next.port.V4 != first.V4 {
		t.Errorf("after a restart %+v, before %+v", next.port, first)
	}
	next.reaches(t, next.port.Gateway6)
	if _, err := c.LinkByName("eth0"); err == nil {
		t.Error("the old namespace still has eth0")
	}
	// Another name for the interface.
	if next.attach(t, "backend", func(w *wish) { w.IfName = "net1" }); len(n.portLinks(t)) != 1 {
		t.Errorf("one container has the interfaces %q", n.portLinks(t))
	}
	next.reaches(t, next.port.Gateway4)
	next.order(t, "release")
}

func checkAttachAtOnce(t *testing.T, n *node) {
	c := n.newContainer(t, "once")
	ports := make([]port, 8)
	var all sync.WaitGroup
	for i := range ports {
		all.Go(func() {
			got, err := n.agent.call(order{Do: "attach", Request: c.request("backend")})
			if err != nil {
				t.Errorf("attach %d at once: %v", i, err)
			}
			ports[i] = got.Port
		})
	}
	all.Wait()
	if slices.ContainsFunc(ports, func(p port) bool { return p != ports[0] }) {
		t.Errorf("attached at once as %+v", ports)
	}
	c.reaches(t, ports[0].Gateway4)
}

func checkFifty(t *testing.T, n *node) {
	all := make([]*container, 50)
	for i := range all {
		all[i] = n.newContainer(t, fmt.Sprint("many", i))
	}
	var running sync.WaitGroup
	begin := time.Now()
	for _, c := range all {
		running.Go(func() {
			got, err := n.agent.call(order{Do: "attach", Request: c.request("backend")})
			if err != nil {
				t.Errorf("attach %s: %v", c.id, err)
			}
			c.port = got.Port
		})
	}
	running.Wait()
	t.Logf("50 containers in %s", time.Since(begin))
	seen := map[netip.Addr]bool{}
	for _, c := range all {
		seen[c.port.V4] = true
	}
	if len(seen) != len(all) {
		t.Errorf("50 containers have %d addresses", len(seen))
	}
	for _, i := range []int{1, 25, 49} {
		all[0].reaches(t, all[i].port.V4)
		all[i].reaches(t, all[0].port.V6)
	}
}

func checkWishes(t *testing.T, n *node) {
	mac := plan.MAC{2, 1, 2, 3, 4, 5}
	c := n.run(t, "wish", "backend", withIPs("10.40.1.77", "fd40:0:0:1::abcd"), func(w *wish) { w.MAC, w.IfName = mac, "net0" })
	if c.port.V4 != netip.MustParseAddr("10.40.1.77") || c.port.V6 != netip.MustParseAddr("fd40:0:0:1::abcd") {
		t.Errorf("got %s and %s", c.port.V4, c.port.V6)
	}
	if got := c.mac(t, "net0"); [6]byte(mac) != got {
		t.Errorf("MAC %x, asked for %x", got, mac)
	}
	c.reaches(t, c.port.Gateway4)
	c.reaches(t, c.port.Gateway6)
	refused(t, n, n.newContainer(t, "twin"), "backend", "MAC address 02:01:02:03:04:05 is taken", func(w *wish) { w.MAC = mac })
	same := n.run(t, "same", "other", withIPs("10.40.1.77"), func(w *wish) { w.MAC = mac })
	if same.port.V4 != c.port.V4 {
		t.Errorf("another network's %s is not free", c.port.V4)
	}
}

// refused holds that an attach fails with these words, and leaves nothing.
func refused(t *testing.T, n *node, c *container, network, says string, change ...func(*wish)) {
	t.Helper()
	before := n.holdings()
	_, err := n.agent.call(order{Do: "attach", Request: c.request(network, change...)})
	if err == nil || !strings.Contains(err.Error(), says) {
		t.Errorf("%q; want an error with %q", err, says)
	}
	if after := n.holdings(); !slices.Equal(before, after) {
		t.Errorf("%s: before:\n%q\nafter:\n%q", says, before, after)
	}
}

func checkRefusals(t *testing.T, n *node) {
	n.run(t, "holder", "backend", withIPs("10.40.1.50"))
	c := n.newContainer(t, "refused")
	none := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(none, nil, 0o600))
	netns := func(path string) func(*wish) { return func(w *wish) { w.Netns = path } }
	ifName := func(name string) func(*wish) { return func(w *wish) { w.IfName = name } }
	for _, tt := range []struct {
		network, says string
		change        func(*wish)
	}{
		{"nowhere", `network "nowhere" is not in the topology`, withIPs()},
		{"backend", "taken by container", withIPs("10.40.1.50")},
		{"backend", "outside 10.40.1.0/24", withIPs("10.40.2.5")},
		{"backend", "gateway", withIPs("10.40.1.1")},
		{"backend", "gateway", withIPs("fd40:0:0:1::1")},
		{"backend", "broadcast", withIPs("10.40.1.255")},
		{"backend", "at most one", withIPs("10.40.1.7", "10.40.1.8")},
		{"small", "no block of that family", withIPs("fd40::5")},
		{"backend", "something else", netns(none)},
		{"backend", "is gone", netns("/run/netns/lacen-never")},
		{"backend", "is gone", netns("/proc/999999999/ns/net")},
		{"backend", "the host's own", netns(n.path)},
		{"backend", "interface name", ifName("a/b")},
		{"backend", "interface name", ifName("lo")},
		{"backend", "interface name", ifName("sixteen-letters-")},
		{"backend", "MAC", func(w *wish) { w.MAC = plan.MAC{1, 0, 0, 0, 0, 1} }},
		{"backend", "MAC", func(w *wish) { w.MAC = plan.MAC{6, 0, 0x6c, 0x61, 0x63, 0x65} }},
		{"backend", "without an id", func(w *wish) { w.Container = "" }},
		{"backend", "at most 63", func(w *wish) { w.Name, w.Sticky = strings.Repeat("n", 64), true }},
	} {
		refused(t, n, c, tt.network, tt.says, tt.change)
	}
	before := n.holdings()
	if _, err := n.agent.call(order{Do: "attach-late", Request: c.request("backend")}); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("an attach whose time is up: %v", err)
	}
	if after := n.holdings(); !slices.Equal(before, after) {
		t.Errorf("before:\n%q\nafter:\n%q", before, after)
	}
	c.attach(t, "backend")
	refused(t, n, c, "backend", "taken by container", withIPs("10.40.1.50"))
	c.reaches(t, c.port.Gateway4) // as it was
}

func checkFullBlock(t *testing.T, n *node) {
	var all []*container
	for i := range 5 {
		all = append(all, n.run(t, fmt.Sprint("full", i), "small"))
	}
	more := n.newContainer(t, "more")
	refused(t, n, more, "small", "is full: its 5 addresses are held by 5 running and 0 stopped containers")
	all[2].order(t, "detach")
	refused(t, n, more, "small", "4 running and 1 stopped")
	all[2].order(t, "release")
	if more.attach(t, "small"); more.port.V4 != all[2].port.V4 {
		t.Errorf("got %s, only %s was free", more.port.V4, all[2].port.V4)
	}
	more.reaches(t, all[0].port.V4)
}

// checkMove takes a container to another network, and back to another address.
func checkMove(t *testing.T, n *node) {
	c, peer := n.run(t, "mover", "backend"), n.run(t, "peer", "other")
	c.attach(t, "other")
	c.reaches(t, peer.port.V4)
	c.attach(t, "other", withIPs("10.40.1.99"))
	peer.reaches(t, netip.MustParseAddr("10.40.1.99"))
	if got := n.status(); len(got.Ports) != 2 || len(got.Endpoints) != 4 {
		t.Errorf("two containers have the ports %v and the endpoints %q", got.Ports, got.Endpoints)
	}
}

// checkDying ends containers' namespaces while they are attached.
func checkDying(t *testing.T, n *node) {
	rounds := 30
	if inVM {
		rounds = 8
	}
	for i := range rounds {
		c := n.newContainer(t, fmt.Sprint("dying", i))
		done := make(chan error, 1)
		go func() {
			_, err := n.agent.call(order{Do: "attach", Request: c.request("backend")})
			done <- err
		}()
		time.Sleep(time.Duration(i) * 200 * time.Microsecond)
		c.remove()
		if err := <-done; err != nil && strings.Contains(err.Error(), "waited") {
			t.Errorf("attach of a dying container: %v", err)
		}
		c.order(t, "detach")
		c.order(t, "release")
	}
	until(t, "no interface is left", func() bool { return len(n.portLinks(t)) == 0 })
}

// checkForeignInterfaces puts somebody else's interfaces where Lace wants its own.
func checkForeignInterfaces(t *testing.T, n *node) {
	c := n.newContainer(t, "taken")
	must(t, c.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("eth0")}))
	refused(t, n, c, "backend", "eth0")
	if c.link(t, "eth0").Type() != "bridge" {
		t.Error("the container's own eth0 is gone")
	}
	must(t, c.LinkDel(c.link(t, "eth0")))
	c.attach(t, "backend")
	name := c.port.HostIf
	c.order(t, "detach")
	must(t, n.LinkAdd(&netlink.Bridge{LinkAttrs: attrs(name)}))
	refused(t, n, c, "backend", name)
	c.order(t, "detach")
	if l := n.link(t, name); l.Type() != "bridge" {
		t.Errorf("the host's own %s is a %s now", name, l.Type())
	}
	must(t, n.LinkDel(n.link(t, name)))
	c.attach(t, "backend")
}

// TestForeignBridge leaves a bridge of somebody else's with the name of Lace's as it is.
func TestForeignBridge(t *testing.T) {
	takesLong(t)
	n := newBed(t, bedOptions{nodes: 1, prepare: func(b *bed) {
		must(t, b.nodes[0].LinkAdd(&netlink.Bridge{LinkAttrs: attrs("laceb100")}))
	}}).nodes[0]
	index := n.link(t, "laceb100").Attrs().Index
	refused(t, n, n.newContainer(t, "c"), "backend", "laceb100")
	other := n.run(t, "other", "other") // the other network works
	other.reaches(t, other.port.Gateway4)
	n.stop()
	n.uninstall()
	if l := n.link(t, "laceb100"); l.Attrs().Index != index || l.Attrs().Alias != "" {
		t.Errorf("the host's own laceb100 became %+v", l.Attrs())
	}
}

// checkReserved keeps addresses for containers that do not run.
func checkReserved(t *testing.T, n *node) {
	stopped := n.newContainer(t, "stopped")
	w := stopped.request("backend", withIPs("10.40.1.60"))
	_, err := n.agent.call(order{Do: "reserve", Request: w})
	must(t, err)
	refused(t, n, n.newContainer(t, "rival"), "backend", "taken by", withIPs("10.40.1.60"))
	if stopped.attach(t, "backend"); stopped.port.V4 != netip.MustParseAddr("10.40.1.60") {
		t.Errorf("reserved 10.40.1.60, got %s", stopped.port.V4)
	}
}

// TestStickyNames keeps addresses by name over rm and run, and over agents.
func TestStickyNames(t *testing.T) {
	takesLong(t)
	n := newBed(t, bedOptions{nodes: 1, networks: small}).nodes[0]
	named := func(name string, sticky bool) func(*wish) {
		return func(w *wish) { w.Name, w.Sticky = name, sticky }
	}
	have := map[string]netip.Addr{}
	for _, name := range []string{"web", "db", "cache"} {
		c := n.run(t, name, "small", named(name, true))
		have[name] = c.port.V4
		if name != "cache" { // which is removed while no agent runs
			c.order(t, "release")
		}
		c.remove()
	}
	n.stop()
	n.start()
	_, err := n.agent.call(order{Do: "retain"})
	must(t, err)
	rival := n.newContainer(t, "rival")
	for name, a := range have {
		refused(t, n, rival, "small", fmt.Sprintf("taken by the sticky reservation of %q", name), withIPs(a.String()))
	}
	for name, a := range have {
		c := n.run(t, "new"+name, "small", named(name, name != "db"))
		if c.port.V4 != a {
			t.Errorf("%s had %s, has %s", name, a, c.port.V4)
		}
		c.order(t, "release")
	}
	n.agent.kill()
	n.start()
	rival.attach(t, "small", withIPs(have["db"].String())) // which is sticky no longer
	refused(t, n, n.newContainer(t, "other"), "small", "sticky reservation", withIPs(have["web"].String()))
}

// TestAttachedOverAgents finds containers again after a restart, and lets go of those that ended meanwhile.
func TestAttachedOverAgents(t *testing.T) {
	takesLong(t)
	n := newBed(t, bedOptions{nodes: 1}).nodes[0]
	stays, ends := n.run(t, "stays", "backend"), n.run(t, "ends", "backend")
	n.stop()
	ends.remove()
	until(t, "the ended container's interface is gone", func() bool { return len(n.portLinks(t)) == 1 })
	n.start()
	_, err := n.agent.call(order{Do: "retain", Live: []string{stays.id}})
	must(t, err)
	if s := n.status(); len(s.Ports) != 1 || len(s.Endpoints) != 2 {
		t.Errorf("one container has the ports %v and endpoints %q", s.Ports, s.Endpoints)
	}
	stays.reaches(t, stays.port.Gateway4)
	next := n.run(t, "next", "backend", withIPs(ends.port.V4.String()))
	next.reaches(t, stays.port.V4)
}

// TestNetworkLeavesTopology starts an agent whose topology no longer has the network of a container that runs.
func TestNetworkLeavesTopology(t *testing.T) {
	takesLong(t)
	b := newBed(t, bedOptions{nodes: 1})
	n := b.nodes[0]
	stays, a, z := n.run(t, "stays", "backend"), n.run(t, "a", "other"), n.run(t, "z", "other")
	a.reaches(t, z.port.V4)
	n.stop()
	b.topology, _, _ = strings.Cut(b.topology, "[network.other]")
	n.start()
	if err := a.ping(z.port.V4, 56, onePing); err == nil {
		t.Error("a network that is no more carries traffic")
	}
	stays.reaches(t, stays.port.Gateway4)
	refused(t, n, a, "other", "not in the topology")
	_, err := n.agent.call(order{Do: "retain", Live: []string{stays.id, z.id}})
	must(t, err)
	if links := n.portLinks(t); len(links) != 2 { // one that runs keeps its interface
		t.Errorf("of three containers one ended; interfaces %q", links)
	}
	if _, err := n.LinkByName("laceb200"); err == nil {
		t.Error("the network's bridge is still there")
	}
	_, err = n.agent.call(order{Do: "retain", Live: []string{stays.id}})
	must(t, err)
	if links := n.portLinks(t); len(links) != 1 {
		t.Errorf("of three containers two ended; interfaces %q", links)
	}
}
