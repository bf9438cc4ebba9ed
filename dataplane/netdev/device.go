// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// How the kernel makes the link-local address of a device: out of its MAC address, or not at all (IN6_ADDR_GEN_MODE_*).
const (
	addrGenEUI64 = 0
	addrGenNone  = 1
)

// device is one link as it was read, and the ways to make it as it should be. Each of them
// changes and records only what differs.
type device struct {
	*conn
	*recorder
	netlink.Link
	detail detail
}

// read completes a link. The link may have been listed a while ago.
func (c *conn) read(r *recorder, l netlink.Link) (*device, error) {
	d, err := c.detail(l.Attrs().Index)
	if err != nil {
		return nil, fmt.Errorf("read interface %s: %w", l.Attrs().Name, err)
	}
	return &device{c, r, l, d}, nil
}

func (d *device) object() string { return d.Type() + " " + d.Attrs().Name }

// set records one change of this link.
func (d *device) set(what string, change func() error) error {
	return d.do(d.object(), what, change)
}

// each runs steps in order and stops at the first that fails.
func each(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (d *device) alias(want string) error {
	if d.Attrs().Alias == want {
		return nil
	}
	return d.set("set alias "+want, func() error { return d.LinkSetAlias(d.Link, want) })
}

// mtu sets the MTU; 0 leaves it. Then it reads the device again: below 1280 (RFC 8200, section 5) that has no IPv6, and no settings of it.
func (d *device) mtu(want int) (err error) {
	if want == 0 || d.Attrs().MTU == want {
		return nil
	}
	if err := d.set(fmt.Sprintf("set MTU %d", want), func() error { return d.LinkSetMTU(d.Link, want) }); err != nil {
		return err
	}
	d.detail, err = d.conn.detail(d.Attrs().Index)
	return err
}

func (d *device) mac(want plan.MAC) error {
	if bytes.Equal(d.Attrs().HardwareAddr, want[:]) {
		return nil
	}
	return d.set("set MAC "+want.String(), func() error { return d.LinkSetHardwareAddr(d.Link, want[:]) })
}

func (d *device) up() error {
	if d.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	return d.set("set up", func() error { return d.LinkSetUp(d.Link) })
}

// noARP: whoever is meant, the frame goes to the one other end.
func (d *device) noARP() error {
	if d.Attrs().RawFlags&unix.IFF_NOARP != 0 {
		return nil
	}
	return d.set("set arp off", func() error { return d.LinkSetARPOff(d.Link) })
}

// master puts the link below another one, nil takes it out.
func (d *device) master(want netlink.Link) error {
	if want == nil && d.Attrs().MasterIndex == 0 {
		return nil
	}
	if want == nil {
		return d.set("take out of its master", func() error { return d.LinkSetNoMaster(d.Link) })
	}
	if d.Attrs().MasterIndex == want.Attrs().Index {
		return nil
	}
	return d.set("put into "+want.Attrs().Name, func() error { return d.LinkSetMaster(d.Link, want) })
}

func (d *device) noLinkLocal() error {
	mode, ok := d.detail.inet6.number(inet6AddrGenMode)
	if !ok || mode == addrGenNone {
		return nil
	}
	return d.set("set addrgenmode none", func() error { return d.LinkSetIP6AddrGenMode(d.Link, addrGenNone) })
}

// linkLocal has the kernel make a link-local address, at once where the device is up already: as netlink does not.
func (d *device) linkLocal() error {
	mode, ok := d.detail.inet6.number(inet6AddrGenMode)
	if !ok || mode == addrGenEUI64 {
		return nil
	}
	path := fmt.Sprintf("ipv6/conf/%s/addr_gen_mode", d.Attrs().Name)
	return d.set("set addrgenmode eui64", func() error { return d.sysctl(path, fmt.Sprint(addrGenEUI64)) })
}

// inet6 sets one of the device's net.ipv6.conf values. A device without IPv6 needs none of those
// that only switch something off.
func (d *device) inet6(place int, name string, want int32) error {
	have, ok := d.detail.inet6Setting(place)
	if !ok || have == want {
		return nil
	}
	path := fmt.Sprintf("ipv6/conf/%s/%s", d.Attrs().Name, name)
	return d.set(fmt.Sprintf("set %s %d", name, want), func() error { return d.sysctl(path, fmt.Sprint(want)) })
}

// inet4 sets one of the device's net.ipv4.conf values where the kernel has it.
func (d *device) inet4(name string, want int32) error {
	path := fmt.Sprintf("ipv4/conf/%s/%s", d.Attrs().Name, name)
	have, ok, err := d.readSysctl(path)
	if err != nil || !ok || have == want {
		return err
	}
	return d.set(fmt.Sprintf("set IPv4 %s %d", name, want), func() error { return d.sysctl(path, fmt.Sprint(want)) })
}

func (d *device) noIPv6() error { return d.inet6(confDisableIPv6, "disable_ipv6", 1) }

func (d *device) withIPv6() error {
	if _, ok := d.detail.inet6Setting(confDisableIPv6); !ok {
		return fmt.Errorf("%s: give it IPv6: the kernel has IPv6 switched off or the MTU %d is below 1280; boot without ipv6.disable=1, or use a network without IPv6 subnets", d.object(), d.Attrs().MTU)
	}
	return d.inet6(confDisableIPv6, "disable_ipv6", 0)
}

// noRouterAdvertisements: nobody in an overlay network tells a device its routes.
func (d *device) noRouterAdvertisements() error { return d.inet6(confAcceptRA, "accept_ra", 0) }

// noDuplicateDetection: addresses are unique by the plan, and the link-local one by the MAC address.
func (d *device) noDuplicateDetection() error { return d.inet6(confAcceptDAD, "accept_dad", 0) }

var bridgeSettings = []setting{
	{nl.IFLA_BR_STP_STATE, 4, 0, "stp"},
	{nl.IFLA_BR_FORWARD_DELAY, 4, 0, "forward delay"},
	{nl.IFLA_BR_MCAST_SNOOPING, 1, 0, "multicast snooping"},
}

// portSettings keep containers apart even where no program is attached: the bridge sends frames
// only between a port and itself, to the MAC addresses that it was told. Broadcast and multicast
// stay on, for the gateway's own ARP and neighbour solicitations.
var portSettings = []setting{
	{nl.IFLA_BRPORT_LEARNING, 1, 0, "learning"},
	{nl.IFLA_BRPORT_UNICAST_FLOOD, 1, 0, "flooding"},
	{nl.IFLA_BRPORT_ISOLATED, 1, 1, "isolation"},
}

func (d *device) bridgeSettings() error {
	diff := differing(d.detail.info, bridgeSettings)
	if len(diff) == 0 {
		return nil
	}
	return d.set(describe(diff), func() error {
		return d.setInfo(d.Link, nl.IFLA_INFO_KIND, nl.IFLA_INFO_DATA, "bridge", diff)
	})
}

func (d *device) portSettings() error {
	diff := differing(d.detail.slave, portSettings)
	if len(diff) == 0 {
		return nil
	}
	return d.set(describe(diff), func() error {
		return d.setInfo(d.Link, nl.IFLA_INFO_SLAVE_KIND, nl.IFLA_INFO_SLAVE_DATA, "bridge", diff)
	})
}

func describe(settings []setting) string {
	what := "set"
	for _, s := range settings {
		what += fmt.Sprintf(" %s %d", s.name, s.value)
	}
	return what
}

// forwardMAC tells the bridge which address is behind this port, as it does not learn.
func (d *device) forwardMAC(mac plan.MAC) error {
	err := d.NeighAdd(&netlink.Neigh{
		LinkIndex: d.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: mac[:],
		State: netlink.NUD_NOARP, Flags: netlink.NTF_MASTER,
	})
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return d.set("forward "+mac.String(), func() error { return err })
}

// addresses makes the addresses of the link exactly those, without duplicate address detection:
// their uniqueness is the plan's. Link-local ones are left alone. The kernel routes to what a prefix contains.
func (d *device) addresses(want []netip.Prefix) error {
	have, err := d.addressList()
	if err != nil {
		return err
	}
	for _, p := range have {
		if slices.Contains(want, p) || p.Addr().IsLinkLocalUnicast() {
			continue
		}
		err := d.set("remove address "+p.String(), func() error { return d.AddrDel(d.Link, address(p)) })
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return err
		}
	}
	for _, p := range want {
		if slices.Contains(have, p) {
			continue
		}
		if err := d.set("add address "+p.String(), func() error { return d.AddrAdd(d.Link, address(p)) }); err != nil {
			return err
		}
	}
	return nil
}

func (d *device) addressList() ([]netip.Prefix, error) {
	all, err := list(func() ([]netlink.Addr, error) { return d.AddrList(d.Link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("%s: list addresses: %w", d.object(), err)
	}
	var have []netip.Prefix
	for _, a := range all {
		if p, ok := prefix(a.IPNet); ok {
			have = append(have, p)
		}
	}
	return have, nil
}

func address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// ipNet keeps the host bits: it describes addresses as well as routes.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefix is the reverse of ipNet.
func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits), ok
}

// macOf is zero for a device without an Ethernet address.
func macOf(l netlink.Link) (m plan.MAC) {
	copy(m[:], l.Attrs().HardwareAddr)
	return m
}
