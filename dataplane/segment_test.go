// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// machine is what is behind a device of the node: a namespace with the other end of a veth, which has the addresses of an
// endpoint that the topology declares.
func (b *bed) machine(device, mac string, addr netip.Prefix) *pod {
	b.t.Helper()
	m := b.bare("machine")
	m.port.V4 = addr.Addr()
	must(b.t, b.in(func() error { return makePair(device, "far") }))
	must(b.t, b.in(func() error { return moveInto(m.netns, "far") }))
	must(b.t, m.in(func() error { return becomes("far", mac, addr) }))
	return m
}

func moveInto(netns, name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	f, err := os.Open(netns)
	if err != nil {
		return err
	}
	defer f.Close()
	return netlink.LinkSetNsFd(l, int(f.Fd()))
}

func becomes(name, mac string, addr netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	hardware, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetHardwareAddr(l, hardware); err != nil {
		return err
	}
	a, err := netlink.ParseAddr(addr.String())
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, a); err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// TestSegmentUnderTraffic: containers and a machine of one segment answer each other, while the topology changes and the agent is
// another one.
func TestSegmentUnderTraffic(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	tops := []string{lan, lan + "flood-rate = 10\n", lan + "flood = false\n"}
	top := parse(t, tops[0], machine, web)
	b.open(top)
	m := b.machine("vm0", "52:54:00:00:00:01", netip.MustParsePrefix("10.70.0.200/24"))
	b.mustAttachDevice(DeviceRequest{Device: "vm0", Network: "lan", Name: "machine"})
	client, server := b.pod("default/client", "lan"), b.pod("default/server", "web", "lan")
	server.port = server.ports[1]
	server.echo(2000)
	m.echo(2000)
	pairs := map[string]*asker{
		"container to container": client.asker(1000, netip.AddrPortFrom(server.port.V4, 2000)),
		"container to machine":   client.asker(1001, netip.AddrPortFrom(m.port.V4, 2000)),
		"machine to container":   m.asker(1002, netip.AddrPortFrom(server.port.V4, 2000)),
	}
	lost := map[string]int{} // the first ones may be, until neighbours are known
	for name, a := range pairs {
		a.goesOn(t)
		_, lost[name] = a.count()
	}
	for i := range 2 * len(tops) {
		b.mustApply(parse(t, tops[(i+1)%len(tops)], machine, web))
		for _, a := range pairs {
			a.goesOn(t)
		}
	}
	b.reopen(top)
	for name, a := range pairs {
		a.goesOn(t)
		close(a.stop)
		a.done.Wait()
		asked, all := a.count()
		t.Logf("%s: %d datagrams", name, asked)
		if all > lost[name] {
			t.Errorf("%s: of %d datagrams %d were not answered; log:\n%s", name, asked, all-lost[name], b.logs)
		}
	}
	b.mustDetachDevice("vm0")
	if asks(client.udp(1003), netip.AddrPortFrom(m.port.V4, 2000), 1, 300*time.Millisecond) {
		t.Error("a device that is detached still answers")
	}
}
