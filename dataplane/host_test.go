// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
)

// outside is a host out there: 192.0.2.9, at the node's interface out0, which has 192.0.2.1.
func (b *bed) outside() *pod {
	b.t.Helper()
	out := b.bare("outside")
	must(b.t, b.in(func() error {
		if err := makePair("out0", "far0"); err != nil {
			return err
		}
		ns, err := unix.Open(out.netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(ns)
		far, err := netlink.LinkByName("far0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetNsFd(far, ns); err != nil {
			return err
		}
		return addressed("out0", "192.0.2.1/24")
	}))
	must(b.t, out.in(func() error { return addressed("far0", "192.0.2.9/24") }))
	out.port.V4 = netip.MustParseAddr("192.0.2.9")
	return out
}

// addressed gives an interface an address and sets it up.
func addressed(name, address string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, a); err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// leading are the interfaces that packets may leave by, as the programs know them, with what they masquerade as.
func (b *bed) leading() map[string]netip.Addr {
	b.t.Helper()
	out := map[string]netip.Addr{}
	must(b.t, b.in(func() error {
		var index uint32
		var row bpf.LaceEgress
		rows := b.d.Hooks().Collection().Maps["egresses"].Iterate()
		for rows.Next(&index, &row) {
			l, err := netlink.LinkByIndex(int(index))
			if err != nil {
				return err
			}
			out[l.Attrs().Name] = netip.AddrFrom4([4]byte(binary.NativeEndian.AppendUint32(nil, row.V4)))
		}
		return rows.Err()
	}))
	return out
}

// sites are the programs that interfaces have, by their names, ports left out.
func (b *bed) sites() map[string]bool {
	b.t.Helper()
	out := map[string]bool{}
	must(b.t, b.in(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			attached, err := b.programs(l)
			if err != nil {
				return err
			}
			if attached {
				out[l.Attrs().Name] = true
			}
		}
		return nil
	}))
	return out
}

// programs says whether a program is at an interface's ingress, in either way.
func (b *bed) programs(l netlink.Link) (bool, error) {
	if b.d.Features().TCX {
		res, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: ebpf.AttachTCXIngress})
		return err == nil && len(res.Programs) > 0, err
	}
	filters, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
	return len(filters) > 0, err
}

// udp is a socket of the host.
func (b *bed) udp(from string) *net.UDPConn {
	b.t.Helper()
	var c *net.UDPConn
	must(b.t, b.in(func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from)))
		return err
	}))
	b.t.Cleanup(func() { c.Close() })
	return c
}

// tell answers every datagram with the address that it came from.
func (p *pod) tell(port uint16) {
	c := p.udp(port)
	go func() {
		b := make([]byte, 64)
		for {
			_, from, err := c.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				c.WriteToUDPAddrPort([]byte(from.String()), from)
			}
		}
	}()
}

// seenAs asks until it is told what the other end takes a socket for; invalid: nobody answers.
func seenAs(c *net.UDPConn, to string) netip.AddrPort {
	b := make([]byte, 64)
	for end := time.Now().Add(patience()); time.Now().Before(end); {
		c.WriteToUDPAddrPort([]byte("?"), netip.MustParseAddrPort(to)) // an error is that of an earlier one
		c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		n, _, err := c.ReadFromUDPAddrPort(b)
		if err == nil {
			return netip.MustParseAddrPort(string(b[:n]))
		}
	}
	return netip.AddrPort{}
}

// TestOutside: packets of the host, of a container and of somebody outside go where the topology lets them, whoever the agent is.
func TestOutside(t *testing.T) {
	b := newBed(t)
	far := b.outside()
	top := parse(t, dual, world, outward, inward)
	b.open(top)
	p := b.pod("default/p", "web")
	must(t, p.publish(udp(8080)))
	p.tell(80)
	far.tell(53)
	fromPod, fromFar, fromHost := p.udp(4000), far.udp(4001), b.udp("0.0.0.0:4002")
	toItself, fromLocalhost := b.udp("0.0.0.0:4003"), b.udp("127.0.0.1:4004")
	v4 := p.port.V4.String()
	check := func(when string) {
		t.Helper()
		if as := seenAs(fromPod, "192.0.2.9:53"); as.Addr().String() != "192.0.2.1" || as.Port() < 10000 || as.Port() > 32767 {
			t.Errorf("%s: outside a container is %s", when, as)
		}
		if as := seenAs(fromFar, "192.0.2.1:8080"); as.String() != "192.0.2.9:4001" {
			t.Errorf("%s: who asks at a published port is %s", when, as)
		}
		if as := seenAs(fromHost, v4+":80"); as.Port() != 4002 {
			t.Errorf("%s: the host is %s", when, as)
		}
		if as := seenAs(toItself, "192.0.2.1:8080"); as.String() != "192.0.2.1:4003" {
			t.Errorf("%s: the host that asks at its own address is %s", when, as)
		}
		if as := seenAs(fromLocalhost, "127.0.0.1:8080"); !as.IsValid() || as.Addr().IsLoopback() {
			t.Errorf("%s: the host that asks at localhost is %s", when, as)
		}
	}
	check("attached")
	if leading := b.leading(); leading["out0"] != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("packets may leave by %v", leading)
	}
	for _, name := range []string{"lo", "up0", "out0", plan.HostPeer} {
		if !b.sites()[name] {
			t.Errorf("%s has no program: %v", name, b.sites())
		}
	}
	b.reopen(top)
	check("with the next agent")

	b.mustApply(parse(t, web)) // neither outside nor host
	if leading, sites := b.leading(), b.sites(); len(leading) != 0 || sites["out0"] || sites["lo"] || !sites["up0"] {
		t.Errorf("without external networks packets may leave by %v, and programs are at %v", leading, sites)
	}
	if host := b.host(); host.Stack != 0 || host.Peer != 0 {
		t.Errorf("without external networks the host is %+v", host)
	}
	b.mustApply(top)
	check("with the topology from before")

	b.reopen(parse(t, web))
	if sites := b.sites(); sites["out0"] || sites["lo"] || !sites["up0"] {
		t.Errorf("an agent that has no external networks leaves programs at %v", sites)
	}
}

// host is what the programs know of the host.
func (b *bed) host() (row bpf.LaceHost) {
	b.t.Helper()
	must(b.t, b.d.Hooks().Collection().Maps["this_host"].Lookup(uint32(0), &row))
	return row
}

// TestAddressOfTheHostGoes: what goes by an address that is gone begins anew with another one; other flows go on.
func TestAddressOfTheHostGoes(t *testing.T) {
	b := newBed(t)
	far := b.outside()
	b.open(parse(t, dual, world, outward, inward))
	p, neighbour := b.pod("default/p", "web"), b.pod("default/neighbour", "web")
	far.tell(53)
	neighbour.tell(53)
	fromPod, local := p.udp(4000), p.udp(4001)
	if as := seenAs(fromPod, "192.0.2.9:53"); as.Addr().String() != "192.0.2.1" {
		t.Fatalf("outside the container is %s", as)
	}
	if as := seenAs(local, neighbour.port.V4.String()+":53"); as.Addr() != p.port.V4 {
		t.Fatalf("the neighbour sees %s", as)
	}
	flows := func() (translated, others int) {
		t.Helper()
		table, err := b.d.Hooks().Maps().OpenFlows()
		must(t, err)
		defer table.Close()
		must(t, maps.EachFlow(table, func(f maps.Flow) error {
			if f.Translated {
				translated++
			} else {
				others++
			}
			return nil
		}))
		return translated, others
	}
	if translated, others := flows(); translated != 2 || others != 2 {
		t.Fatalf("there are %d rows of flows that are masqueraded, and %d others", translated, others)
	}
	must(t, b.in(func() error { return readdress("out0", "192.0.2.1/24", "192.0.2.2/24") }))
	must(t, b.in(b.d.resync))
	b.d.purgeGone(t.Context())
	if translated, others := flows(); translated != 0 || others != 2 {
		t.Errorf("after the address has gone there are %d rows of flows that are masqueraded, and %d others", translated, others)
	}
	if as := seenAs(fromPod, "192.0.2.9:53"); as.Addr().String() != "192.0.2.2" {
		t.Errorf("after the address has changed the container is %s outside", as)
	}
}

func readdress(name, old, address string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(old)
	if err != nil {
		return err
	}
	if err := netlink.AddrDel(l, a); err != nil {
		return err
	}
	return addressed(name, address)
}

// TestInterfacesToTheOutside: they come and go with the host's, and those that a failed topology wanted go again.
func TestInterfacesToTheOutside(t *testing.T) {
	b := newBed(t)
	b.outside()
	b.open(parse(t, web))
	if sites := b.sites(); sites["out0"] {
		t.Errorf("without an external network programs are at %v", sites)
	}
	top := parse(t, dual, world, inward)
	must(t, b.in(func() error { // a link of somebody else's, which is in the way
		attrs := netlink.NewLinkAttrs()
		attrs.Name = plan.HostSide
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	}))
	if _, err := b.apply(top); err == nil {
		t.Error("a topology came into force that has no room for its link")
	}
	if leading, sites := b.leading(), b.sites(); len(leading) != 0 || sites["out0"] {
		t.Errorf("after that packets may leave by %v, and programs are at %v", leading, sites)
	}
	must(t, b.in(func() error { return removeLink(plan.HostSide) }))
	b.mustApply(top)
	if leading, sites := b.leading(), b.sites(); !leading["out0"].IsValid() || !sites["out0"] || !sites[plan.HostPeer] {
		t.Errorf("packets may leave by %v, and programs are at %v", leading, sites)
	}
	must(t, b.pod("default/p", "web").publish(tcp(8080)))
	must(t, b.in(func() error { return removeLink("out0") }))
	must(t, b.in(b.d.resync))
	if leading := b.leading(); len(leading) != 1 { // the uplink
		t.Errorf("after one is gone packets may leave by %v", leading)
	}
	must(t, b.in(func() error { return Remove(b.bpffs, b.d.log) }))
	if sites := b.sites(); len(sites) != 0 {
		t.Errorf("after Remove programs are at %v", sites)
	}
	if set := b.loopback(); set[1] || set[2] {
		t.Errorf("after Remove lo has %v", set)
	}
}

// TestWhatIsInUseStays: until a topology holds packets go as the one before says.
func TestWhatIsInUseStays(t *testing.T) {
	eth := func(index int, v4 string) netdev.Egress {
		return netdev.Egress{Index: index, V4: netip.MustParseAddr(v4)}
	}
	before := hostState{side: netdev.HostSide{Stack: 7, Peer: 8, MAC: plan.MAC{2}}, egresses: []netdev.Egress{eth(2, "192.0.2.1"), eth(3, "192.0.2.2")}}
	got := hostState{side: netdev.HostSide{Loopback: 1}, egresses: []netdev.Egress{eth(3, "192.0.2.3")}}.and(before)
	if got.side != (netdev.HostSide{Stack: 7, Peer: 8, Loopback: 1, MAC: plan.MAC{2}}) || !slices.Equal(got.egresses, []netdev.Egress{eth(3, "192.0.2.3"), eth(2, "192.0.2.1")}) {
		t.Errorf("got %+v", got)
	}
	now := hostState{side: netdev.HostSide{Stack: 9, Peer: 10, MAC: plan.MAC{3}}}
	if got := now.and(before); got.side != now.side {
		t.Errorf("what is made anew is %+v, want %+v", got.side, now.side)
	}
}
