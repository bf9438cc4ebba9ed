// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestRemove holds that uninstalling leaves a host as it was, to the last route.
func TestRemove(t *testing.T) {
	var before []string
	b := newBed(t, bedOptions{nodes: 2, prepare: func(b *bed) {
		n := b.nodes[0]
		n.give(t, "lo", "192.0.2.1/32", "2001:db8::1/128")
		must(t, n.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("br9")}))
		must(t, n.LinkSetUp(n.link(t, "br9")))
		n.give(t, "br9", "198.51.100.1/24", "2001:db8:2::1/64")
		n.route(t, "::/0", "fd00:a::fe", uplink)
		n.route(t, "203.0.113.0/24", "198.51.100.9", "br9")
		must(t, n.NeighAdd(&netlink.Neigh{LinkIndex: n.link(t, uplink).Attrs().Index, IP: []byte("\xfd\x00\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x63"),
			State: netlink.NUD_PERMANENT, HardwareAddr: []byte{2, 0, 0, 0, 0, 0x63}}))
		before = n.settledDump(t)
	}})
	n := b.nodes[0]
	x, y := n.run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	n.run(t, "z", "other", func(w *wish) { w.Name, w.Sticky = "z", true })
	checkPings(t, x, y)
	if during := n.dump(); slices.Equal(before, during) {
		t.Error("the dump does not see Lace at all")
	}
	n.agent.kill()
	n.uninstall()
	n.uninstall() // once more does nothing, and is no error
	var after []string
	until(t, "the last interfaces are gone", func() bool {
		after = n.dump()
		return !slices.ContainsFunc(after, func(s string) bool { return strings.Contains(s, "lace") })
	})
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("Lace left or took (-before +after):\n%s", diff)
	}
	if _, err := os.Stat(n.bpffs); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", n.bpffs, err)
	}
	n.start() // and from the beginning
	again := n.run(t, "again", "backend")
	checkPings(t, again, y)
}

// settledDump is the dump once the kernel has done what it does a little later: link-local addresses, local routes.
func (n *namespace) settledDump(t *testing.T) []string {
	t.Helper()
	last, same := n.dump(), 0
	until(t, "the kernel's tables come to rest", func() bool {
		now := n.dump()
		if same++; !slices.Equal(last, now) {
			last, same = now, 0
		}
		return same >= 25
	})
	return last
}

// dump is a namespace's links, addresses, routes, rules, kept neighbours and ingress filters as text. Left out are what changes by
// itself, counters and the state of learnt neighbours, and the two rules that the kernel adds with the first VRF and that
// nobody can take away without harm.
func (n *namespace) dump() []string {
	var all []string
	links, err := n.LinkList()
	errs := []error{err}
	for _, l := range links {
		a := l.Attrs()
		all = append(all, fmt.Sprintf("link %d %s %s mtu %d master %d alias %q %s flags %x group %d", a.Index, a.Name, l.Type(), a.MTU, a.MasterIndex, a.Alias, a.HardwareAddr, a.RawFlags, a.Group))
		filters, err := n.FilterList(l, netlink.HANDLE_MIN_INGRESS)
		errs = append(errs, err)
		for _, f := range filters {
			all = append(all, fmt.Sprintf("filter %s %+v", a.Name, f))
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		lines, err := n.dumpFamily(family)
		all, errs = append(all, lines...), append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		all = append(all, "errors "+err.Error())
	}
	slices.Sort(all)
	return all
}

func (n *namespace) dumpFamily(family int) ([]string, error) {
	var all []string
	addrs, err1 := n.AddrList(nil, family)
	for _, a := range addrs {
		all = append(all, fmt.Sprintf("address %d %s %x", a.LinkIndex, a.IPNet, a.Flags))
	}
	routes, err2 := n.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	for _, r := range routes {
		all = append(all, fmt.Sprintf("route %s table %d protocol %d type %d priority %d", r, r.Table, r.Protocol, r.Type, r.Priority))
	}
	rules, err3 := n.RuleList(family)
	for _, r := range rules {
		if r.Priority != 1000 {
			all = append(all, fmt.Sprintf("rule %d %s", family, r))
		}
	}
	neighbours, err4 := n.NeighList(0, family)
	for _, h := range neighbours {
		if h.State == netlink.NUD_PERMANENT || h.FlagsExt != 0 {
			all = append(all, fmt.Sprintf("neighbour %d %s %s flags %x", h.LinkIndex, h.IP, h.HardwareAddr, h.FlagsExt))
		}
	}
	return all, errors.Join(err1, err2, err3, err4)
}
