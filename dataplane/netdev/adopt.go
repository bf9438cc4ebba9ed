// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/plan"
)

// AdoptDevice has a device of the host, which Attachment.Device names, join its network: a tap, or the end of a veth that somebody
// else made. It gets our alias, loses its IPv6 (the alias remembers that it had it), joins the bridge and is set up; name, MAC
// address and MTU stay. A device that is as it should be is not touched. It refuses what is missing here, not
// Ethernet, in use by the host or by others, one of the uplinks, or Lace's own. When it fails, ReleaseDevice undoes what was done.
func (h *Handle) AdoptDevice(p plan.Port, uplinks []Uplink) (Link, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, err := h.adoptDevice(&p, uplinks)
	if err != nil {
		return l, fmt.Errorf("take device %s into network %s: %w", p.Device, p.Network, err)
	}
	return l, nil
}

func (h *Handle) adoptDevice(p *plan.Port, uplinks []Uplink) (Link, error) {
	if p.Device == "" || p.HostIf != p.Device {
		return Link{}, fmt.Errorf("host interface %q is not the device", p.HostIf)
	}
	if err := checkMAC(p.Attachment); err != nil {
		return Link{}, err
	}
	bridge, err := h.bridge(p.Bridge)
	if err != nil {
		return Link{}, err
	}
	d, err := h.candidate(p, uplinks)
	if err != nil {
		return Link{}, err
	}
	if err := d.adopt(p, bridge); err != nil {
		return Link{}, err
	}
	return Link{Name: p.Device, Index: d.Attrs().Index, MAC: macOf(d.Link), MTU: d.Attrs().MTU, Changes: d.changes}, nil
}

// candidate finds the device and refuses it where it is not free.
func (h *Handle) candidate(p *plan.Port, uplinks []Uplink) (*device, error) {
	links, err := h.host.links()
	if err != nil {
		return nil, err
	}
	l := links[p.Device]
	if l == nil {
		return nil, fmt.Errorf("there is no such interface in the host's network namespace: make it first, and name the end that is on the host")
	}
	if err := suitable(l, uplinks); err != nil {
		return nil, err
	}
	if err := vacant(l, p.Attachment); err != nil {
		return nil, err
	}
	if err := free(l, links); err != nil {
		return nil, err
	}
	d, err := h.host.read(h.recorder(), l)
	if err != nil {
		return nil, err
	}
	return d, d.unused()
}

// suitable refuses a device that can never be a port.
func suitable(l netlink.Link, uplinks []Uplink) error {
	name := l.Attrs().Name
	switch {
	case roleOf(name) != roleNone:
		return fmt.Errorf("its name is one of those that Lace gives: rename it")
	case loopback(l) || raw(l):
		return fmt.Errorf("it is no Ethernet device (%s): a tap or a veth is wanted", l.Attrs().EncapType)
	case slices.Contains([]string{"bridge", "vrf"}, l.Type()):
		return fmt.Errorf("it is a %s, which others are put into: a tap or a veth is wanted", l.Type())
	case slices.ContainsFunc(uplinks, func(u Uplink) bool { return u.Index == l.Attrs().Index }):
		return fmt.Errorf("it is an uplink of this node: name another one")
	}
	return nil
}

// vacant refuses a device that somebody has marked as his.
func vacant(l netlink.Link, a plan.Attachment) error {
	alias := l.Attrs().Alias
	if alias == "" {
		return nil
	}
	if lb, ok := adopted(l); ok {
		return lb.belongs(a)
	}
	return fmt.Errorf("it has the alias %q: if nobody needs that, clear it (ip link set dev %s alias '')", alias, l.Attrs().Name)
}

// free refuses a device that is in somebody else's bridge, bond or VRF.
func free(l netlink.Link, links map[string]netlink.Link) error {
	index := l.Attrs().MasterIndex
	if index == 0 {
		return nil
	}
	name := fmt.Sprintf("interface %d", index)
	for _, m := range links {
		if m.Attrs().Index != index {
			continue
		}
		if _, ours := adopted(l); ours && owned(m) {
			return nil
		}
		name = m.Attrs().Name
	}
	return fmt.Errorf("it is in %s: take it out (ip link set dev %s nomaster)", name, l.Attrs().Name)
}

// unused refuses a device by which the host itself talks.
func (d *device) unused() error {
	have, err := d.addressList()
	if err != nil {
		return err
	}
	for _, p := range have {
		if !p.Addr().Is6() || !p.Addr().IsLinkLocalUnicast() {
			return fmt.Errorf("it has the host's address %s: a device that joins a network is the host's no more; remove the address (ip addr del %[1]s dev %s) or name another one", p, d.Attrs().Name)
		}
	}
	return nil
}

// adopt marks the device before it changes anything, so that the mark tells a later agent what to undo.
func (d *device) adopt(p *plan.Port, bridge netlink.Link) error {
	lb, _ := adopted(d.Link)
	lb.Attachment = p.Attachment
	if disabled, ok := d.detail.inet6Setting(confDisableIPv6); ok && disabled == 0 {
		lb.hadIPv6 = true
	}
	alias, err := encodeAlias(lb)
	if err != nil {
		return err
	}
	return each(
		func() error { return d.alias(alias) },
		d.noIPv6,
		func() error { return d.join(bridge, p.MAC) },
		d.up,
	)
}

// ReleaseDevice gives a device back that AdoptDevice took: it leaves the bridge, its IPv6 is as it was and our alias goes. One that
// is gone, or that is not ours (any more), is fine. The device stays up.
func (h *Handle) ReleaseDevice(name string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, err := h.host.link(name)
	if l == nil || err != nil {
		return err
	}
	lb, ok := adopted(l)
	if !ok {
		return nil
	}
	return h.releaseDevice(l, lb)
}

// releaseDevice clears the mark last, so that a release that was interrupted can be done again.
func (h *Handle) releaseDevice(l netlink.Link, lb label) error {
	d, err := h.host.read(h.recorder(), l)
	if err != nil {
		return err
	}
	err = each(
		d.leaveBridge,
		func() error { return d.restoreIPv6(lb) },
		func() error { return d.alias("") },
	)
	if err != nil {
		return fmt.Errorf("release device %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// leaveBridge takes the device out of a bridge of ours; one that others have put it into meanwhile is theirs.
func (d *device) leaveBridge() error {
	if d.Attrs().MasterIndex == 0 {
		return nil
	}
	master, err := d.LinkByIndex(d.Attrs().MasterIndex)
	if err != nil {
		return fmt.Errorf("read the master of %s: %w", d.Attrs().Name, err)
	}
	if !owned(master) {
		return nil
	}
	return d.master(nil)
}

func (d *device) restoreIPv6(lb label) error {
	if !lb.hadIPv6 {
		return nil
	}
	return d.inet6(confDisableIPv6, "disable_ipv6", 0)
}
