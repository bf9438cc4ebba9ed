// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/tests/slow"
	"github.com/lace-net/lace/topology"
)

var namespaces atomic.Int32

// newNetns makes a network namespace that lives as long as the test.
func newNetns(t *testing.T) (path string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces: run the tests as root")
	}
	name := fmt.Sprintf("lacend-%d-%d", os.Getpid(), namespaces.Add(1))
	err := inNetns(mustNetns(t, "/proc/self/ns/net"), func() error {
		ns, err := netns.NewNamed(name)
		if err == nil {
			ns.Close()
		}
		return err
	})
	if err != nil {
		t.Fatalf("make network namespace %s: %v", name, err)
	}
	t.Cleanup(func() { netns.DeleteNamed(name) })
	return "/run/netns/" + name
}

func mustNetns(t *testing.T, path string) netns.NsHandle {
	t.Helper()
	ns, err := openNetns(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// dialTest is a connection of the test's own, to look and to make things behind the agent's back.
func dialTest(t *testing.T, path string) *conn {
	t.Helper()
	ns, err := openNetns(path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := dial(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

// openTest opens a Handle in a namespace.
func openTest(t *testing.T, path string) *Handle {
	t.Helper()
	var h *Handle
	err := inNetns(mustNetns(t, path), func() (err error) {
		h, err = Open(slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// host is a new namespace with a Handle and lo up.
func host(t *testing.T) (*Handle, *conn) {
	t.Helper()
	path := newNetns(t)
	c := dialTest(t, path)
	must(t, c.LinkSetUp(mustLink(t, c, "lo")))
	return openTest(t, path), c
}

// skipWithoutVRF skips a test of the form with VRFs where there are none.
func skipWithoutVRF(t *testing.T, h *Handle) {
	t.Helper()
	ok, err := h.ProbeVRF()
	must(t, err)
	if !ok {
		t.Skip("this kernel has no VRF (CONFIG_NET_VRF): run this test binary in a VM with scripts/run-in-vm")
	}
}

// forms runs a test in the form without VRFs and, where the kernel has them, with.
func forms(t *testing.T, f func(t *testing.T, vrf bool)) {
	t.Run("no-vrf", func(t *testing.T) { f(t, false) })
	t.Run("vrf", func(t *testing.T) {
		h, _ := host(t)
		skipWithoutVRF(t, h)
		f(t, true)
	})
}

var takesLong = slow.TakesLong

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustLink(t *testing.T, c *conn, name string) netlink.Link {
	t.Helper()
	l, err := c.link(name)
	if err != nil || l == nil {
		t.Fatalf("interface %s: %v, %v", name, l, err)
	}
	return l
}

func noLink(t *testing.T, c *conn, name string) {
	t.Helper()
	if l, err := c.link(name); l != nil || err != nil {
		t.Errorf("interface %s should not be: %v, %v", name, l, err)
	}
}

// until polls for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain: %s", what)
}

func noChanges(t *testing.T, changes []Change, err error) {
	t.Helper()
	if err != nil || len(changes) > 0 {
		t.Errorf("nothing should have changed: %v, %v", changes, err)
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

func locator(s string) topology.Locator { return topology.Locator{Prefix: netip.MustParsePrefix(s)} }

const (
	uplinkMTU = 1500
	podMTU    = 1460
)

// testPlan is a node with one network of both families and no peers.
func testPlan() *plan.Plan {
	return &plan.Plan{
		Node: "edge-1", Locator: locator("5f00:1ace:1::/48"), Underlay: netip.MustParseAddr("fd00:a::1"),
		Networks: []plan.Network{{
			Name: "backend", ID: 100, Type: topology.L3, VRF: "lacev100", Table: 0x4c000064, Bridge: "laceb100", Overhead: 40,
			Gateways: []netip.Prefix{netip.MustParsePrefix("10.40.1.1/24"), netip.MustParsePrefix("fd40:0:1::1/64")},
		}},
	}
}

func withPeer(p *plan.Plan, underlay string) *plan.Plan {
	n := uint32(len(p.Peers))
	p.Peers = append(p.Peers, plan.Peer{
		Index: n, Name: fmt.Sprintf("edge-%d", n+2), Locator: locator(fmt.Sprintf("5f00:1ace:%x::/48", n+2)),
		Underlay: netip.MustParseAddr(underlay),
	})
	return p
}

// testPort is a port of testPlan's network.
func testPort(netnsPath string) PortSpec {
	a := sampleAttachment
	return PortSpec{
		Port: plan.Port{
			Attachment: a, HostIf: a.HostIf(), Bridge: "laceb100", VRF: "lacev100", Type: topology.L3, Overhead: 40,
			Gateway4: netip.MustParseAddr("10.40.1.1"), Gateway6: netip.MustParseAddr("fd40:0:1::1"),
			Prefixes: prefixes("10.40.1.2/32", "fd40:0:1::2/128"), Routes: prefixes("0.0.0.0/0", "::/0"),
		},
		Netns: netnsPath, MTU: podMTU,
	}
}

func prefixes(texts ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, s := range texts {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

// veth joins two namespaces and sets both ends up. Their link-local addresses, from which the
// kernel solicits neighbours, are there at once: the detection of duplicates takes seconds.
func veth(t *testing.T, a *conn, nameA string, b *conn, nameB string) (netlink.Link, netlink.Link) {
	t.Helper()
	must(t, a.LinkAdd(&netlink.Veth{LinkAttrs: attrs(nameA), PeerName: nameB, PeerNamespace: netlink.NsFd(b.ns)}))
	la, lb := mustLink(t, a, nameA), mustLink(t, b, nameB)
	must(t, a.sysctl("ipv6/conf/"+nameA+"/accept_dad", "0"))
	must(t, b.sysctl("ipv6/conf/"+nameB+"/accept_dad", "0"))
	must(t, a.LinkSetUp(la))
	must(t, b.LinkSetUp(lb))
	return la, lb
}

func addAddress(t *testing.T, c *conn, l netlink.Link, p string) {
	t.Helper()
	must(t, c.AddrAdd(l, address(netip.MustParsePrefix(p))))
}

func addRoute(t *testing.T, c *conn, dst, gw string, l netlink.Link) {
	t.Helper()
	r := &netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst)), LinkIndex: l.Attrs().Index}
	if gw != "" {
		r.Gw = netip.MustParseAddr(gw).AsSlice()
	}
	must(t, c.RouteAdd(r))
}
