// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// devicePort is a port of segmentPlan's L2 network at a device named tap0.
func devicePort() plan.Port {
	a := sampleDevice
	return plan.Port{
		Attachment: a, HostIf: a.HostIf(), Bridge: "laceb200", VRF: "lacev200", Type: topology.L2, Overhead: 58,
		Prefixes: prefixes("10.50.0.200/24"),
	}
}

// devices are the ways in which somebody else may have made tap0, up as he left it.
var devices = map[string]func(*testing.T, *conn){
	"tap": func(t *testing.T, c *conn) {
		tun(t, c, "tap0", unix.IFF_TAP)
		must(t, c.LinkSetUp(mustLink(t, c, "tap0")))
	},
	"veth": func(t *testing.T, c *conn) { veth(t, c, "tap0", dialTest(t, newNetns(t)), "vm0") },
}

// tun makes a tun or a tap that stays, as libvirt does, by a device node of its own: a virtual machine without udev has none.
func tun(t *testing.T, c *conn, name string, kind uint16) {
	t.Helper()
	node := filepath.Join(t.TempDir(), "tun")
	must(t, unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 200))))
	must(t, inNetns(c.ns, func() error {
		fd, err := unix.Open(node, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s (has the kernel CONFIG_TUN?): %w", node, err)
		}
		defer unix.Close(fd)
		r, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		r.SetUint16(kind | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, r); err != nil {
			return fmt.Errorf("make %s: %w", name, err)
		}
		return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
	}))
}

// state is what of a device must be after its release as it was before.
type state struct {
	Index, MTU, Master, Group int
	MAC, Alias                string
	Flags                     net.Flags
	IPv6                      int32
}

func stateOf(t *testing.T, c *conn, name string) state {
	t.Helper()
	a := mustLink(t, c, name).Attrs()
	d, err := c.detail(a.Index)
	must(t, err)
	v6, _ := d.inet6Setting(confDisableIPv6)
	return state{a.Index, a.MTU, a.MasterIndex, int(a.Group), a.HardwareAddr.String(), a.Alias, a.Flags &^ net.FlagRunning, v6}
}

func TestDeviceJoinsAndLeaves(t *testing.T) {
	for kind, make := range devices {
		t.Run(kind, func(t *testing.T) {
			forms(t, func(t *testing.T, vrf bool) {
				h, c, _ := segment(t, vrf)
				make(t, c)
				before := stateOf(t, c, "tap0")
				l, err := h.AdoptDevice(devicePort(), nil)
				must(t, err)
				if l.Name != "tap0" || l.Index != before.Index || l.MTU != before.MTU || l.MAC.String() != before.MAC || l.PeerIndex != 0 {
					t.Errorf("Link is %+v", l)
				}
				want := before
				want.IPv6, want.Master = 1, mustLink(t, c, "laceb200").Attrs().Index
				want.Alias = "lace port=1 c=device/tap0 net=200/storage if=tap0 dev=tap0 v4=10.50.0.200 mac=525400000001 nogw ip6 name=vm"
				if diff := cmp.Diff(want, stateOf(t, c, "tap0")); diff != "" {
					t.Errorf("tap0: %s", diff)
				}
				d, err := c.detail(l.Index)
				must(t, err)
				if diff := differing(d.slave, portSettings); len(diff) > 0 || len(d.slave) == 0 {
					t.Errorf("port settings differ: %v", diff)
				}
				l, err = h.AdoptDevice(devicePort(), nil)
				noChanges(t, l.Changes, err)
				must(t, h.ReleaseDevice("tap0"))
				if diff := cmp.Diff(before, stateOf(t, c, "tap0")); diff != "" {
					t.Errorf("tap0 after its release: %s", diff)
				}
				must(t, h.ReleaseDevice("tap0"))
			})
		})
	}
}

func TestDeviceIsFoundAgain(t *testing.T) {
	h, c, container := segment(t, false)
	devices["tap"](t, c)
	_, err := h.AdoptDevice(devicePort(), nil)
	must(t, err)
	wire(t, h, segmentPort(container))
	ports, err := h.Ports()
	must(t, err)
	if len(ports) != 2 || ports[1].HostIf != "tap0" {
		t.Fatalf("Ports = %+v", ports)
	}
	if diff := cmp.Diff(sampleDevice, ports[1].Attachment, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Error(diff)
	}
	if ports[1].Bridge != mustLink(t, c, "laceb200").Attrs().Index {
		t.Errorf("its bridge is %d", ports[1].Bridge)
	}
}

// A device whose network left stays adopted, and joins again when the network comes back.
func TestDeviceOutlivesItsNetwork(t *testing.T) {
	h, c, _ := segment(t, false)
	devices["tap"](t, c)
	_, err := h.AdoptDevice(devicePort(), nil)
	must(t, err)
	o := Options{MTU: uplinkMTU}
	_, err = h.Apply(testPlan(), o)
	must(t, err)
	if m := mustLink(t, c, "tap0").Attrs().MasterIndex; m != 0 {
		t.Errorf("tap0 is in interface %d", m)
	}
	p := segmentPlan()
	p.Ports = []plan.Port{devicePort()}
	_, err = h.Apply(p, o)
	must(t, err)
	if m := mustLink(t, c, "tap0").Attrs().MasterIndex; m != mustLink(t, c, "laceb200").Attrs().Index {
		t.Errorf("tap0 is in interface %d", m)
	}
	changes, err := h.Apply(p, o)
	noChanges(t, changes, err)
}

// Its owner may take the device away at any time, and make one of the same name.
func TestDeviceVanishes(t *testing.T) {
	h, c, _ := segment(t, false)
	devices["tap"](t, c)
	_, err := h.AdoptDevice(devicePort(), nil)
	must(t, err)
	must(t, c.LinkDel(mustLink(t, c, "tap0")))
	if ports, err := h.Ports(); len(ports) > 0 || err != nil {
		t.Errorf("Ports = %+v, %v", ports, err)
	}
	must(t, h.ReleaseDevice("tap0"))
	devices["tap"](t, c)
	if ports, err := h.Ports(); len(ports) > 0 || err != nil {
		t.Errorf("Ports = %+v, %v: the new device is nobody's yet", ports, err)
	}
	_, err = h.AdoptDevice(devicePort(), nil)
	must(t, err)
}

// A device moves to another network, and what its owner did to it meanwhile is corrected.
func TestDeviceIsAdoptedAnew(t *testing.T) {
	h, c, _ := segment(t, false)
	devices["tap"](t, c)
	before := stateOf(t, c, "tap0")
	_, err := h.AdoptDevice(devicePort(), nil)
	must(t, err)
	must(t, c.LinkSetDown(mustLink(t, c, "tap0")))
	must(t, c.sysctl("ipv6/conf/tap0/disable_ipv6", "0"))
	p := devicePort()
	p.Network, p.NetworkID, p.Bridge = "backend", 100, "laceb100"
	_, err = h.AdoptDevice(p, nil)
	must(t, err)
	if s := stateOf(t, c, "tap0"); s.Master != mustLink(t, c, "laceb100").Attrs().Index || s.Flags&net.FlagUp == 0 || s.IPv6 != 1 {
		t.Errorf("tap0 is %+v", s)
	}
	must(t, h.ReleaseDevice("tap0"))
	if diff := cmp.Diff(before, stateOf(t, c, "tap0")); diff != "" {
		t.Errorf("tap0 after its release: %s", diff)
	}
}

// A device whose IPv6 was off before has it off after.
func TestReleaseLeavesIPv6Off(t *testing.T) {
	h, c, _ := segment(t, false)
	devices["tap"](t, c)
	must(t, c.sysctl("ipv6/conf/tap0/disable_ipv6", "1"))
	before := stateOf(t, c, "tap0")
	_, err := h.AdoptDevice(devicePort(), nil)
	must(t, err)
	must(t, h.ReleaseDevice("tap0"))
	if diff := cmp.Diff(before, stateOf(t, c, "tap0")); diff != "" {
		t.Errorf("tap0 after its release: %s", diff)
	}
}

// What others did with the device meanwhile stays.
func TestReleaseLeavesAForeignBridge(t *testing.T) {
	h, c, _ := segment(t, false)
	devices["tap"](t, c)
	_, err := h.AdoptDevice(devicePort(), nil)
	must(t, err)
	must(t, c.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("br0")}))
	must(t, c.LinkSetMaster(mustLink(t, c, "tap0"), mustLink(t, c, "br0")))
	_, err = h.AdoptDevice(devicePort(), nil)
	wantError(t, err, "tap0", "br0", "nomaster")
	must(t, h.ReleaseDevice("tap0"))
	if s := stateOf(t, c, "tap0"); s.Master != mustLink(t, c, "br0").Attrs().Index || s.Alias != "" || s.IPv6 != 0 {
		t.Errorf("tap0 is %+v", s)
	}
}

func TestRemoveReleasesDevices(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c, _ := segment(t, vrf)
		for _, make := range devices {
			make(t, c)
			before := stateOf(t, c, "tap0")
			_, err := h.Apply(segmentPlan(), Options{VRF: vrf, MTU: uplinkMTU})
			must(t, err)
			_, err = h.AdoptDevice(devicePort(), nil)
			must(t, err)
			must(t, h.Remove())
			if diff := cmp.Diff(before, stateOf(t, c, "tap0")); diff != "" {
				t.Errorf("tap0 after Remove: %s", diff)
			}
			must(t, c.LinkDel(mustLink(t, c, "tap0")))
		}
	})
}

func TestDeviceIsNoPortOfOurs(t *testing.T) {
	h, c, _ := segment(t, false)
	devices["tap"](t, c)
	_, err := h.AdoptDevice(devicePort(), nil)
	must(t, err)
	wantError(t, h.DeletePort("tap0"), "tap0")
	mustLink(t, c, "tap0")
}

func TestUnsuitableDevicesAreRefused(t *testing.T) {
	for name, bad := range map[string]struct {
		spoil func(*testing.T, *conn, *plan.Port)
		want  []string
	}{
		"missing": {func(t *testing.T, _ *conn, p *plan.Port) { rename(p, "tap9") }, []string{"no such interface", "on the host"}},
		"in a container": {func(t *testing.T, c *conn, p *plan.Port) {
			must(t, c.LinkSetNsFd(mustLink(t, c, "tap0"), int(mustNetns(t, newNetns(t)))))
		}, []string{"no such interface", "host's network namespace"}},
		"loopback": {func(t *testing.T, _ *conn, p *plan.Port) { rename(p, "lo") }, []string{"no Ethernet device"}},
		"raw": {func(t *testing.T, c *conn, p *plan.Port) {
			tun(t, c, "tun1", unix.IFF_TUN)
			rename(p, "tun1")
		}, []string{"no Ethernet device"}},
		"bridge": {func(t *testing.T, c *conn, p *plan.Port) {
			must(t, c.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("br0")}))
			rename(p, "br0")
		}, []string{"it is a bridge"}},
		"in a bridge": {func(t *testing.T, c *conn, p *plan.Port) {
			must(t, c.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("br0")}))
			must(t, c.LinkSetMaster(mustLink(t, c, "tap0"), mustLink(t, c, "br0")))
		}, []string{"it is in br0", "nomaster"}},
		"in our bridge": {func(t *testing.T, c *conn, p *plan.Port) {
			must(t, c.LinkSetMaster(mustLink(t, c, "tap0"), mustLink(t, c, "laceb200")))
		}, []string{"it is in laceb200", "nomaster"}},
		"our name":     {func(t *testing.T, _ *conn, p *plan.Port) { rename(p, "laceb100") }, []string{"Lace gives"}},
		"segmenter":    {func(t *testing.T, _ *conn, p *plan.Port) { rename(p, segmenterNear) }, []string{"Lace gives"}},
		"IPv4 address": {func(t *testing.T, c *conn, p *plan.Port) { addAddress(t, c, mustLink(t, c, "tap0"), "192.0.2.1/24") }, []string{"192.0.2.1/24", "ip addr del"}},
		"IPv6 address": {func(t *testing.T, c *conn, p *plan.Port) { addAddress(t, c, mustLink(t, c, "tap0"), "2001:db8::1/64") }, []string{"2001:db8::1/64"}},
		"alias": {func(t *testing.T, c *conn, p *plan.Port) {
			must(t, c.LinkSetAlias(mustLink(t, c, "tap0"), "vm of tina"))
		}, []string{"vm of tina", "alias ''"}},
		"later alias": {func(t *testing.T, c *conn, p *plan.Port) {
			must(t, c.LinkSetAlias(mustLink(t, c, "tap0"), "lace port=9 c=x"))
		}, []string{"lace port=9"}},
		"other's": {func(t *testing.T, c *conn, p *plan.Port) {
			a, err := encodeAlias(label{Attachment: plan.Attachment{Container: "device/tap1", Device: "tap1"}})
			must(t, err)
			must(t, c.LinkSetAlias(mustLink(t, c, "tap0"), a))
		}, []string{"device/tap1"}},
		"no bridge":     {func(t *testing.T, _ *conn, p *plan.Port) { p.Bridge = "laceb9" }, []string{"laceb9 is missing"}},
		"no device":     {func(t *testing.T, _ *conn, p *plan.Port) { p.Device = "" }, []string{"is not the device"}},
		"multicast MAC": {func(t *testing.T, _ *conn, p *plan.Port) { p.MAC[0] |= 1 }, []string{"MAC"}},
	} {
		t.Run(name, func(t *testing.T) {
			h, c, _ := segment(t, false)
			devices["tap"](t, c)
			p := devicePort()
			bad.spoil(t, c, &p)
			before, err := c.links()
			must(t, err)
			_, err = h.AdoptDevice(p, nil)
			wantError(t, err, bad.want...)
			after, err := c.links()
			must(t, err)
			for name, l := range before {
				if a := after[name]; a == nil || a.Attrs().Alias != l.Attrs().Alias || a.Attrs().MasterIndex != l.Attrs().MasterIndex {
					t.Errorf("%s changed: %+v", name, a)
				}
			}
		})
	}
}

func rename(p *plan.Port, device string) { p.Device, p.HostIf = device, device }

func TestUplinkIsRefused(t *testing.T) {
	h, c, _ := segment(t, false)
	devices["tap"](t, c)
	p := segmentPlan()
	p.Uplinks = []string{"tap0"}
	uplinks, err := h.Uplinks(p)
	must(t, err)
	_, err = h.AdoptDevice(devicePort(), uplinks)
	wantError(t, err, "tap0", "uplink")
	if s := stateOf(t, c, "tap0"); s.Alias != "" || s.Master != 0 {
		t.Errorf("tap0 is %+v", s)
	}
}
