// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/tests/slow"
	"github.com/lace-net/lace/topology"
)

// bed is a node of one process: a network namespace with a bpffs of its own, and a data plane that was opened in it. What
// is done to the data plane is done on a thread of that namespace.
type bed struct {
	t     *testing.T
	work  chan func()
	bpffs string
	logs  *strings.Builder
	d     *Dataplane
}

func newBed(t *testing.T) *bed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces and to load programs: run the tests as root")
	}
	b := &bed{t: t, work: make(chan func()), logs: &strings.Builder{}}
	mount := t.TempDir()
	must(t, unix.Mount("lacedp", mount, "bpf", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(mount, 0)) })
	b.bpffs = filepath.Join(mount, "lace")
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		for f := range b.work {
			f()
		}
	}()
	t.Cleanup(func() { close(b.work) })
	must(t, b.in(func() error { return unix.Unshare(unix.CLONE_NEWNET) }))
	must(t, b.in(func() error { return uplinkUp() }))
	return b
}

// in calls f in the node's namespace.
func (b *bed) in(f func() error) error {
	done := make(chan error)
	b.work <- func() { done <- f() }
	return <-done
}

// uplinkUp makes a pair of interfaces, one of which is the uplink. Nobody is at the other end.
func uplinkUp() error {
	if err := makePair("up0", "wire0"); err != nil {
		return err
	}
	for _, name := range []string{"lo", "up0", "wire0"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
	}
	l, err := netlink.LinkByName("up0")
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr("fd00:a::1/64")
	if err != nil {
		return err
	}
	a.Flags = unix.IFA_F_NODAD
	return netlink.AddrAdd(l, a)
}

func makePair(name, peer string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer})
}

func removeLink(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkDel(l)
}

// open starts the agent's half that this package is.
func (b *bed) open(t *topology.Topology) {
	b.t.Helper()
	must(b.t, b.in(func() (err error) {
		b.d, err = Open(context.Background(), Options{Topology: t, Node: "one", BPFFS: b.bpffs, Log: slog.New(slog.NewTextHandler(b.logs, nil))})
		return err
	}))
	d := b.d
	b.t.Cleanup(func() { d.Close() })
}

func (b *bed) apply(t *topology.Topology) (done Applied, err error) {
	err = b.in(func() error {
		done, err = b.d.Apply(context.Background(), t)
		return err
	})
	return done, err
}

func (b *bed) mustApply(t *topology.Topology) Applied {
	b.t.Helper()
	done, err := b.apply(t)
	must(b.t, err)
	return done
}

// pod is a container: a network namespace.
type pod struct {
	*bed
	id    string
	netns string
	port  Port   // the first of ports
	ports []Port // as Attach gave them
	work  chan func()
}

// pod is a container that is attached to networks, the first of which has its default route.
func (b *bed) pod(id string, networks ...string) *pod {
	b.t.Helper()
	p := b.bare(id)
	must(b.t, p.attach(networks...))
	return p
}

// bare is a container without any network.
func (b *bed) bare(id string) *pod {
	b.t.Helper()
	p := &pod{bed: b, id: id, work: make(chan func()), netns: filepath.Join(b.t.TempDir(), "ns")}
	go func() {
		runtime.LockOSThread()
		for f := range p.work {
			f()
		}
	}()
	b.t.Cleanup(func() { close(p.work) })
	must(b.t, p.in(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := os.WriteFile(p.netns, nil, 0o600); err != nil {
			return err
		}
		return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), p.netns, "", unix.MS_BIND, "")
	}))
	b.t.Cleanup(func() { must(b.t, unix.Unmount(p.netns, unix.MNT_DETACH)) })
	return p
}

func (p *pod) attach(networks ...string) error {
	var all []Interface
	for i, n := range networks {
		all = append(all, Interface{Network: n, Gateway: i == 0})
	}
	return p.request(all...)
}

func (p *pod) request(all ...Interface) error {
	return p.bed.in(func() error {
		ports, err := p.d.Attach(context.Background(), Request{Container: p.id, Name: p.id, Netns: p.netns, Interfaces: all})
		if err == nil {
			p.port, p.ports = ports[0], ports
		}
		return err
	})
}

func (p *pod) in(f func() error) error {
	done := make(chan error)
	p.work <- func() { done <- f() }
	return <-done
}

// udp opens a socket at a port of the container.
func (p *pod) udp(port uint16) *net.UDPConn {
	p.t.Helper()
	var c *net.UDPConn
	must(p.t, p.in(func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.port.V4, port)))
		return err
	}))
	p.t.Cleanup(func() { c.Close() })
	return c
}

// echo answers every datagram with itself.
func (p *pod) echo(port uint16) {
	c := p.udp(port)
	go func() {
		b := make([]byte, 64)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				c.WriteToUDPAddrPort(b[:n], from)
			}
		}
	}()
}

// asks says whether a datagram of a socket is answered, within a time.
func asks(c *net.UDPConn, to netip.AddrPort, number uint32, wait time.Duration) bool {
	text := fmt.Sprint(number)
	c.WriteToUDPAddrPort([]byte(text), to) // an error that came back for an earlier one is no answer either
	end := time.Now().Add(wait)
	b := make([]byte, 64)
	for time.Now().Before(end) {
		c.SetReadDeadline(end)
		n, _, err := c.ReadFromUDPAddrPort(b)
		if err == nil && string(b[:n]) == text {
			return true
		}
	}
	return false
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience bounds waits for what comes at once. Processors of the VM are emulated.
func patience() time.Duration {
	if os.Getenv("LACE_VM") != "" {
		return time.Minute
	}
	return 10 * time.Second
}

var takesLong = slow.TakesLong

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience()); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain: %s", what)
}
