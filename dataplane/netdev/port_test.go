// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// network is a host with testPlan applied, and an empty container.
func network(t *testing.T, vrf bool) (h *Handle, c *conn, container string) {
	t.Helper()
	h, c = host(t)
	_, err := h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
	must(t, err)
	return h, c, newNetns(t)
}

func wire(t *testing.T, h *Handle, s PortSpec) Link {
	t.Helper()
	_, err := h.CreatePort(s)
	must(t, err)
	l, err := h.ConfigurePort(s)
	must(t, err)
	return l
}

func TestCreatePortLeavesBothEndsDown(t *testing.T) {
	h, c, container := network(t, false)
	s := testPort(container)
	l, err := h.CreatePort(s)
	must(t, err)
	in := mustLink(t, dialTest(t, container), "eth0")
	out := mustLink(t, c, s.HostIf)
	if in.Attrs().RawFlags&unix.IFF_UP != 0 || out.Attrs().RawFlags&unix.IFF_UP != 0 {
		t.Error("an end is up before its program can be there")
	}
	if l.Index != out.Attrs().Index || l.PeerIndex != in.Attrs().Index || l.PeerMAC != s.MAC || l.MAC != macOf(out) {
		t.Errorf("Link is %+v", l)
	}
}

func TestPort(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c, container := network(t, vrf)
		s := testPort(container)
		wire(t, h, s)
		out := mustLink(t, c, s.HostIf)
		d, err := c.detail(out.Attrs().Index)
		must(t, err)
		if diff := differing(d.slave, portSettings); len(diff) > 0 || len(d.slave) == 0 {
			t.Errorf("port settings differ: %v", diff)
		}
		if v, ok := d.inet6Setting(confDisableIPv6); !ok || v != 1 {
			t.Errorf("disable_ipv6 of the host end is %d", v)
		}
		if a := out.Attrs(); a.MTU != podMTU || a.MasterIndex != mustLink(t, c, "laceb100").Attrs().Index || a.RawFlags&unix.IFF_UP == 0 || a.Group != group {
			t.Errorf("host end is %+v", a)
		}
		inside := dialTest(t, container)
		in := mustLink(t, inside, "eth0")
		if a := in.Attrs(); a.MTU != podMTU || macOf(in) != s.MAC || a.RawFlags&unix.IFF_UP == 0 {
			t.Errorf("container end is %+v", a)
		}
		if mustLink(t, inside, "lo").Attrs().Flags&net.FlagUp == 0 {
			t.Error("lo is down in the container")
		}
		checkContainer(t, h, inside, in)
	})
}

func checkContainer(t *testing.T, h *Handle, inside *conn, in netlink.Link) {
	t.Helper()
	d, err := inside.read(h.recorder(), in)
	must(t, err)
	have, err := d.addressList()
	must(t, err)
	want := []netip.Prefix{netip.MustParsePrefix("10.40.1.2/32"), netip.MustParsePrefix("fd40:0:1::2/128")}
	if diff := cmp.Diff(want, have, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("addresses in the container: %s", diff)
	}
	all, err := list(func() ([]netlink.Addr, error) { return inside.AddrList(in, netlink.FAMILY_V6) })
	must(t, err)
	for _, a := range all {
		if a.Flags&unix.IFA_F_NODAD == 0 {
			t.Errorf("%s waits for the detection of duplicates", a.IP)
		}
	}
	if v, _ := d.detail.inet6Setting(confAcceptRA); v != 0 {
		t.Errorf("accept_ra in the container is %d", v)
	}
	for to, gw := range map[string]string{"10.40.1.1": "", "192.0.2.1": "10.40.1.1", "10.40.1.9": "10.40.1.1", "fd40:0:1::1": "", "2001:db8::1": "fd40:0:1::1"} {
		rs, err := inside.RouteGet(netip.MustParseAddr(to).AsSlice())
		must(t, err)
		got := fromNetlink(rs[0])
		if got.dev != in.Attrs().Index || got.gw.IsValid() != (gw != "") || gw != "" && got.gw.String() != gw {
			t.Errorf("route to %s is %v, want via %q", to, got, gw)
		}
	}
}

func TestWiringTwiceChangesNothing(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, _, container := network(t, vrf)
		s := testPort(container)
		first := wire(t, h, s)
		l, err := h.CreatePort(s)
		noChanges(t, l.Changes, err)
		l, err = h.ConfigurePort(s)
		noChanges(t, l.Changes, err)
		if l.Index != first.Index || l.PeerIndex != first.PeerIndex {
			t.Errorf("the port became another: %+v, %+v", first, l)
		}
		changes, err := h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
		noChanges(t, changes, err)
	})
}

func TestOneFamily(t *testing.T) {
	for _, family := range []string{"v4", "v6"} {
		t.Run(family, func(t *testing.T) {
			h, _, container := network(t, false)
			s := testPort(container)
			other := s.Gateway6
			if family == "v4" {
				s.V6, s.Prefixes, s.Routes = netip.Addr{}, s.Prefixes[:1], s.Routes[:1]
			} else {
				s.V4, s.Prefixes, s.Routes, other = netip.Addr{}, s.Prefixes[1:], s.Routes[1:], s.Gateway4
			}
			wire(t, h, s)
			noRouteTo(t, dialTest(t, container), other.String())
			l, err := h.ConfigurePort(s)
			noChanges(t, l.Changes, err)
		})
	}
}

// A container runtime may switch IPv6 off in the namespaces it makes.
func TestIPv6SwitchedOffInTheContainer(t *testing.T) {
	h, _, container := network(t, false)
	inside := dialTest(t, container)
	must(t, inside.sysctl("ipv6/conf/all/disable_ipv6", "1"))
	must(t, inside.sysctl("ipv6/conf/default/disable_ipv6", "1"))
	wire(t, h, testPort(container))
	checkContainer(t, h, inside, mustLink(t, inside, "eth0"))
}

func TestConfigureCorrectsDrift(t *testing.T) {
	h, _, container := network(t, false)
	s := testPort(container)
	wire(t, h, s)
	inside := dialTest(t, container)
	in := mustLink(t, inside, "eth0")
	must(t, inside.LinkSetDown(in))
	must(t, inside.LinkSetMTU(in, 1400))
	must(t, inside.LinkSetHardwareAddr(in, net.HardwareAddr{2, 0, 0, 0, 0, 9}))
	addAddress(t, inside, in, "192.0.2.1/24")
	must(t, inside.AddrDel(in, address(netip.MustParsePrefix("10.40.1.2/32"))))
	_, err := h.ConfigurePort(s)
	must(t, err)
	in = mustLink(t, inside, "eth0")
	if in.Attrs().MTU != podMTU || macOf(in) != s.MAC {
		t.Errorf("container end is %+v", in.Attrs())
	}
	checkContainer(t, h, inside, in)
	l, err := h.ConfigurePort(s)
	noChanges(t, l.Changes, err)
}

func TestRestartedContainerGetsANewPort(t *testing.T) {
	h, c, old := network(t, false)
	s := testPort(old)
	first := wire(t, h, s)
	s.Netns = newNetns(t)
	second := wire(t, h, s)
	if first.Index == second.Index {
		t.Error("the port is the old one")
	}
	noLink(t, dialTest(t, old), "eth0")
	mustLink(t, dialTest(t, s.Netns), "eth0")
	mustLink(t, c, s.HostIf)
}

func TestTakenInterfaceNameInTheContainer(t *testing.T) {
	h, c, container := network(t, false)
	inside := dialTest(t, container)
	must(t, inside.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("eth0")}))
	s := testPort(container)
	_, err := h.CreatePort(s)
	wantError(t, err, "default/4f1c", "eth0", "a bridge", "--net none")
	noLink(t, c, s.HostIf)
	mustLink(t, inside, "eth0")
}

func TestForeignDefaultRouteInTheContainer(t *testing.T) {
	h, _, container := network(t, false)
	inside := dialTest(t, container)
	must(t, inside.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("br9")}))
	br := mustLink(t, inside, "br9")
	must(t, inside.LinkSetUp(br))
	addAddress(t, inside, br, "192.0.2.1/24")
	addRoute(t, inside, "0.0.0.0/0", "192.0.2.254", br)
	s := testPort(container)
	_, err := h.CreatePort(s)
	must(t, err)
	_, err = h.ConfigurePort(s)
	wantError(t, err, "0.0.0.0/0", "not Lace's")
	rs, err := inside.RouteGet(net.IPv4(198, 51, 100, 1))
	if err != nil || rs[0].LinkIndex != br.Attrs().Index {
		t.Errorf("the foreign default route is gone: %v, %v", rs, err)
	}
}

func TestForeignHostInterfaceIsNotTouched(t *testing.T) {
	h, c, container := network(t, false)
	s := testPort(container)
	must(t, c.LinkAdd(&netlink.Bridge{LinkAttrs: attrs(s.HostIf)}))
	_, err := h.CreatePort(s)
	wantError(t, err, s.HostIf, "not Lace's", "ip link del")
	wantError(t, h.DeletePort(s.HostIf), s.HostIf, "not Lace's")
	ports, err := h.Ports()
	if err != nil || len(ports) > 0 {
		t.Errorf("Ports = %v, %v", ports, err)
	}
	mustLink(t, c, s.HostIf)
}

func TestHalfMadePortIsMadeAnew(t *testing.T) {
	h, c, container := network(t, false)
	s := testPort(container)
	at := attrs(s.HostIf)
	at.Group = group
	must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: at, PeerName: "eth0", PeerNamespace: netlink.NsFd(mustNetns(t, container))}))
	wire(t, h, s)
	if a := mustLink(t, c, s.HostIf).Attrs(); a.Alias != sampleAlias {
		t.Errorf("alias is %q", a.Alias)
	}
}

func TestPorts(t *testing.T) {
	h, c, container := network(t, false)
	s := testPort(container)
	l := wire(t, h, s)
	must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: attrs("lace00000000000"), PeerName: "x0"})) // foreign
	ports, err := h.Ports()
	must(t, err)
	want := []Port{{
		Attachment: s.Attachment, HostIf: s.HostIf, Index: l.Index, PeerIndex: l.PeerIndex,
		Bridge: mustLink(t, c, "laceb100").Attrs().Index, Up: true, MTU: podMTU, MAC: l.MAC,
	}}
	if diff := cmp.Diff(want, ports, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Error(diff)
	}
}

func TestDeletePort(t *testing.T) {
	h, c, container := network(t, false)
	s := testPort(container)
	wire(t, h, s)
	must(t, h.DeletePort(s.HostIf))
	noLink(t, c, s.HostIf)
	noLink(t, dialTest(t, container), "eth0")
	must(t, h.DeletePort(s.HostIf))
	wantError(t, h.DeletePort("eth0"), "eth0")
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	h, c, container := network(t, false)
	s := testPort(container)
	s.Container = strings.Repeat("c", 250) // its alias does not fit
	s.HostIf = s.Attachment.HostIf()
	_, err := h.CreatePort(s)
	wantError(t, err, "do not fit")
	noLink(t, c, s.HostIf)
	noLink(t, dialTest(t, container), "eth0")
}

func TestVanishedContainer(t *testing.T) {
	h, c := host(t)
	_, err := h.Apply(testPlan(), Options{MTU: uplinkMTU})
	must(t, err)
	var ns netns.NsHandle
	must(t, inNetns(mustNetns(t, "/proc/self/ns/net"), func() (err error) {
		ns, err = netns.NewNamed("lacend-vanishing")
		return err
	}))
	s := testPort("/run/netns/lacend-vanishing")
	_, err = h.CreatePort(s)
	must(t, err)
	must(t, errors.Join(netns.DeleteNamed("lacend-vanishing"), ns.Close()))
	_, err = h.ConfigurePort(s)
	wantError(t, err, "default/4f1c", "lacend-vanishing", "it is gone")
	_, err = h.CreatePort(s)
	wantError(t, err, "it is gone")
	until(t, "the port goes with its container", func() bool { l, err := c.link(s.HostIf); return l == nil && err == nil })
}

// Two clients may ask for one container at the same time, and many for many.
func TestConcurrentAttach(t *testing.T) {
	h, _, one := network(t, false)
	var group sync.WaitGroup
	errs := make(chan error, 100)
	for i := range 8 {
		s := testPort(newNetns(t))
		s.Container = fmt.Sprintf("default/%d", i)
		s.HostIf = s.Attachment.HostIf()
		s.MAC[5] = byte(0x10 + i)
		for _, spec := range []PortSpec{s, s, testPort(one)} {
			group.Go(func() {
				_, err := h.CreatePort(spec)
				errs <- err
				_, err = h.ConfigurePort(spec)
				errs <- err
			})
		}
		group.Go(func() {
			_, err := h.Apply(testPlan(), Options{MTU: uplinkMTU})
			errs <- err
		})
	}
	group.Wait()
	close(errs)
	for err := range errs {
		must(t, err)
	}
	if ports, err := h.Ports(); len(ports) != 9 || err != nil {
		t.Errorf("%d ports, %v", len(ports), err)
	}
}

func TestBadPortSpecs(t *testing.T) {
	h, c, container := network(t, false)
	before, err := c.links()
	must(t, err)
	for name, bad := range map[string]struct {
		change func(*PortSpec)
		want   string
	}{
		"no bridge":       {func(s *PortSpec) { s.Bridge = "laceb9" }, "laceb9 is missing"},
		"no namespace":    {func(s *PortSpec) { s.Netns = "/run/netns/lacend-none" }, "it is gone"},
		"not a namespace": {func(s *PortSpec) { s.Netns = "/dev/null" }, "something else"},
		"other kind":      {func(s *PortSpec) { s.Netns = "/proc/self/ns/mnt" }, "something else"},
		"lo":              {func(s *PortSpec) { s.IfName = "lo" }, "cannot be used"},
		"long name":       {func(s *PortSpec) { s.IfName = "eth0123456789012" }, "cannot be used"},
		"slash":           {func(s *PortSpec) { s.IfName = "../x" }, "cannot be used"},
		"no address":      {func(s *PortSpec) { s.V4, s.V6 = netip.Addr{}, netip.Addr{} }, "no address"},
		"no gateway":      {func(s *PortSpec) { s.Gateway6 = netip.Addr{} }, "do not belong together"},
		"gateway alone":   {func(s *PortSpec) { s.Gateway6, s.Routes = netip.Addr{}, s.Routes[:1] }, "do not belong together"},
		"no prefix":       {func(s *PortSpec) { s.Prefixes = s.Prefixes[:1] }, "do not belong together"},
		"other prefix":    {func(s *PortSpec) { s.Prefixes = prefixes("10.40.1.3/32", "fd40:0:1::2/128") }, "do not belong together"},
		"two prefixes":    {func(s *PortSpec) { s.Prefixes = append(s.Prefixes, s.Prefixes[0]) }, "do not belong together"},
		"prefix alone":    {func(s *PortSpec) { s.V6 = netip.Addr{} }, "do not belong together"},
		"route nowhere":   {func(s *PortSpec) { s.Type, s.Gateway4 = topology.L2, netip.Addr{} }, "do not belong together"},
		"a device":        {func(s *PortSpec) { s.Device = "tap0" }, "does not belong"},
		"small MTU":       {func(s *PortSpec) { s.MTU = 1279 }, "1280"},
		"no MTU":          {func(s *PortSpec) { s.MTU = 0 }, "1280"},
		"multicast MAC":   {func(s *PortSpec) { s.MAC[0] |= 1 }, "MAC"},
		"gateway's MAC":   {func(s *PortSpec) { s.MAC = plan.GatewayMAC }, "MAC"},
		"zero MAC":        {func(s *PortSpec) { s.MAC = plan.MAC{} }, "MAC"},
	} {
		t.Run(name, func(t *testing.T) {
			s := testPort(container)
			bad.change(&s)
			s.HostIf = s.Attachment.HostIf()
			_, err := h.CreatePort(s)
			wantError(t, err, "default/4f1c", bad.want)
		})
	}
	s := testPort(container)
	s.HostIf = "eth0"
	_, err = h.CreatePort(s)
	wantError(t, err, "does not belong")
	after, err := c.links()
	if err != nil || len(after) != len(before) {
		t.Errorf("links before: %d, after: %d, %v", len(before), len(after), err)
	}
}

func TestTheHostsOwnNamespaceIsRefused(t *testing.T) {
	path := newNetns(t)
	h := openTest(t, path)
	_, err := h.Apply(testPlan(), Options{MTU: uplinkMTU})
	must(t, err)
	_, err = h.CreatePort(testPort(path))
	wantError(t, err, "host's own")
}

// The kernel's own gateway answers the container in a VRF, through bridge, forwarding entry and isolation.
func TestGatewayAnswersInVRF(t *testing.T) {
	h, _ := host(t)
	skipWithoutVRF(t, h)
	h, _, container := network(t, true)
	wire(t, h, testPort(container))
	inside := dialTest(t, container)
	for _, gw := range []string{"10.40.1.1", "fd40:0:1::1"} {
		until(t, "the container learns the MAC of "+gw, func() bool {
			must(t, inNetns(inside.ns, func() error { return poke(gw) }))
			ns, err := list(func() ([]netlink.Neigh, error) {
				return inside.NeighList(mustLink(t, inside, "eth0").Attrs().Index, netlink.FAMILY_ALL)
			})
			must(t, err)
			for _, n := range ns {
				if n.IP.Equal(net.ParseIP(gw)) && n.HardwareAddr.String() == plan.GatewayMAC.String() {
					return true
				}
			}
			return false
		})
	}
}

// poke sends one datagram, so that the kernel has to resolve the neighbour.
func poke(to string) error {
	conn, err := net.Dial("udp", net.JoinHostPort(to, "9"))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte("x"))
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil
	}
	return err
}
