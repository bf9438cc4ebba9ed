// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is a network namespace with a netlink connection into it.
type namespace struct {
	*netlink.Handle
	name string
	path string
	ns   netns.NsHandle
}

var namespaces atomic.Int32

func init() { nl.EnableErrorMessageReporting = true }

// newNamespace makes a network namespace that lives as long as the test, or until it is removed.
func newNamespace(t testing.TB, role string) *namespace {
	t.Helper()
	n := &namespace{name: fmt.Sprintf("lacen-%d-%d-%s", os.Getpid(), namespaces.Add(1), role)}
	n.path = "/run/netns/" + n.name
	home, err := netns.Get()
	must(t, err)
	defer home.Close()
	must(t, onThread(home, func() (err error) {
		if n.ns, err = netns.NewNamed(n.name); err != nil {
			return fmt.Errorf("make network namespace %s: %w", n.name, err)
		}
		n.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	}))
	t.Cleanup(n.remove)
	lo := n.link(t, "lo")
	must(t, n.LinkSetUp(lo))
	// The detection of duplicates takes seconds, and there are none.
	n.sysctl(t, "ipv6/conf/default/accept_dad", "0")
	n.sysctl(t, "ipv6/conf/all/accept_dad", "0")
	return n
}

// remove ends the namespace as a container's ends: its name and its last references go.
func (n *namespace) remove() {
	if n.Handle == nil {
		return
	}
	n.Handle.Close()
	n.Handle = nil
	n.ns.Close()
	netns.DeleteNamed(n.name)
}

// onThread runs f on a thread in ns. A thread that cannot go back is thrown away with its goroutine.
func onThread(ns netns.NsHandle, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			result <- err
			return
		}
		defer home.Close()
		if err = netns.Set(ns); err == nil {
			err = f()
		}
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

// do runs f in the namespace: sockets that it makes stay there.
func (n *namespace) do(f func() error) error { return onThread(n.ns, f) }

// sysctl sets a value below /proc/sys/net.
func (n *namespace) sysctl(t testing.TB, path, value string) {
	t.Helper()
	must(t, n.do(func() error { return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0) }))
}

func (n *namespace) link(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := n.LinkByName(name)
	if err != nil {
		t.Fatalf("interface %s of %s: %v", name, n.name, err)
	}
	return l
}

// mac is an interface's Ethernet address.
func (n *namespace) mac(t testing.TB, name string) [6]byte {
	t.Helper()
	return [6]byte(n.link(t, name).Attrs().HardwareAddr)
}

func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

// joinNamespaces makes a veth pair between two namespaces and sets both ends up.
func joinNamespaces(t testing.TB, a *namespace, nameA string, b *namespace, nameB string) {
	t.Helper()
	must(t, a.LinkAdd(&netlink.Veth{LinkAttrs: attrs(nameA), PeerName: nameB, PeerNamespace: netlink.NsFd(b.ns)}))
	must(t, a.LinkSetUp(a.link(t, nameA)))
	must(t, b.LinkSetUp(b.link(t, nameB)))
}

// give puts addresses with prefix lengths on an interface.
func (n *namespace) give(t testing.TB, link string, prefixes ...string) {
	t.Helper()
	for _, s := range prefixes {
		p := netip.MustParsePrefix(s)
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := n.AddrAdd(n.link(t, link), a); err != nil {
			t.Fatalf("give %s of %s address %s: %v", link, n.name, s, err)
		}
	}
}

// route adds a route; via may be empty.
func (n *namespace) route(t testing.TB, dst, via, link string, change ...func(*netlink.Route)) {
	t.Helper()
	r := &netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst)), LinkIndex: n.link(t, link).Attrs().Index}
	if via != "" {
		r.Gw = netip.MustParseAddr(via).AsSlice()
	}
	for _, f := range change {
		f(r)
	}
	if err := n.RouteAdd(r); err != nil {
		t.Fatalf("add route to %s in %s: %v", dst, n.name, err)
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// laceLinks are the names of Lace's interfaces in the namespace.
func (n *namespace) laceLinks(t testing.TB) []string {
	t.Helper()
	var names []string
	for _, l := range n.links(t) {
		if strings.HasPrefix(l.Attrs().Name, "lace") {
			names = append(names, l.Attrs().Name)
		}
	}
	return names
}

func (n *namespace) links(t testing.TB) []netlink.Link {
	t.Helper()
	for range 20 {
		if all, err := n.LinkList(); err == nil {
			return all
		}
	}
	t.Fatalf("the interfaces of %s change all the time", n.name)
	return nil
}
