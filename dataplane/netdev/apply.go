// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// applier is one run of Apply, or of Prepare.
type applier struct {
	*Handle
	*recorder
	o     Options
	keep  bool                    // nothing is removed
	links map[string]netlink.Link // as they were at the start, and those made since
	stack netlink.Link            // lc-host, once it is as it should be
}

// ensureLink returns the link of ours with want's name, kind and, for a VRF, table. It makes it
// where it is missing, and anew where its kind of making cannot be changed later.
func (a *applier) ensureLink(want netlink.Link, usable func(netlink.Link) bool) (*device, error) {
	name := want.Attrs().Name
	have := a.links[name]
	if have != nil && !owned(have) {
		return nil, foreign(have)
	}
	if have != nil && !usable(have) {
		if err := a.remove(have); err != nil {
			return nil, err
		}
		have = nil
	}
	if have == nil {
		var err error
		if have, err = a.create(want); err != nil {
			return nil, err
		}
	}
	return a.host.read(a.recorder, have)
}

func (a *applier) create(want netlink.Link) (netlink.Link, error) {
	name := want.Attrs().Name
	want.Attrs().Group = group
	if err := a.do(want.Type()+" "+name, "create", func() error { return a.host.LinkAdd(want) }); err != nil {
		return nil, err
	}
	l, err := a.host.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("read %s %s after making it: %w", want.Type(), name, err)
	}
	a.links[name] = l
	return l, nil
}

func (a *applier) remove(l netlink.Link) error {
	delete(a.links, l.Attrs().Name)
	return a.do(l.Type()+" "+l.Attrs().Name, "remove", func() error { return a.host.removeLink(l) })
}

func attrs(name string) netlink.LinkAttrs {
	at := netlink.NewLinkAttrs()
	at.Name = name
	return at
}

func always(netlink.Link) bool { return true }

// network makes one network's VRF, bridge and headroom device.
func (a *applier) network(n *plan.Network) error {
	vrf, err := a.vrf(n)
	if err != nil {
		return err
	}
	bridge, err := a.bridge(n, vrf)
	if err != nil {
		return err
	}
	if err := a.headroom(n, bridge); err != nil {
		return err
	}
	return bridge.up()
}

// vrf returns nil in the form without VRFs.
func (a *applier) vrf(n *plan.Network) (netlink.Link, error) {
	if !a.o.VRF {
		return nil, nil
	}
	d, err := a.ensureLink(&netlink.Vrf{LinkAttrs: attrs(n.VRF), Table: n.Table}, func(l netlink.Link) bool {
		return l.(*netlink.Vrf).Table == n.Table
	})
	if err != nil {
		return nil, err
	}
	return d.Link, each(func() error { return d.alias(networkAlias + n.Name) }, d.up)
}

func (a *applier) bridge(n *plan.Network, vrf netlink.Link) (*device, error) {
	at := attrs(n.Bridge)
	at.HardwareAddr = plan.GatewayMAC[:]
	d, err := a.ensureLink(&netlink.Bridge{LinkAttrs: at}, always)
	if err != nil {
		return nil, err
	}
	return d, each(
		func() error { return d.alias(networkAlias + n.Name) },
		func() error { return d.mac(plan.GatewayMAC) },
		d.noLinkLocal,
		d.noRouterAdvertisements,
		d.bridgeSettings,
		func() error { return d.mtu(a.mtu(n.Overhead)) },
		func() error { return d.master(vrf) },
		func() error { return a.gateways(d, n.Gateways) },
	)
}

// mtu is the largest IP packet of a container, where so much is put before it.
func (a *applier) mtu(overhead int) int {
	if a.o.MTU == 0 {
		return 0
	}
	return a.o.MTU - overhead
}

// ports puts the plan's ports into their bridges: those of a network that left the topology and came back are in none.
func (a *applier) ports(p *plan.Plan) error {
	var errs []error
	for i := range p.Ports {
		l, bridge := a.links[p.Ports[i].HostIf], a.links[p.Ports[i].Bridge]
		if l == nil || bridge == nil || !isPort(l) || l.Attrs().MasterIndex == bridge.Attrs().Index {
			continue
		}
		d, err := a.host.read(a.recorder, l)
		if err == nil {
			err = d.join(bridge, p.Ports[i].MAC)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// gateways gives the bridge its addresses. Outside a VRF it holds none, so that the host's own
// tables see nothing of the network: the program answers for the gateway.
func (a *applier) gateways(d *device, want []netip.Prefix) error {
	if !a.o.VRF {
		want = nil
	}
	if a.keep && len(want) == 0 {
		return nil
	}
	ipv6 := d.noIPv6
	if slices.ContainsFunc(want, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		ipv6 = d.withIPv6
	}
	if a.keep {
		have, err := d.addressList()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(have, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
			ipv6 = d.withIPv6
		}
		want = append(slices.Clone(want), have...)
	}
	return each(ipv6, func() error { return d.addresses(want) })
}

// headroomPort is no UDP port that anybody uses: two VXLAN devices of one number must differ in
// it, and this one is never up, so that it is never opened.
const headroomPort = 0x4c63

// headroom adds a port that is never up to the bridge. It is a VXLAN device over IPv6, which asks
// for 84 bytes in front of each packet; the bridge passes that on to all its ports, and the container's end of a veth then
// leaves the room that the encapsulation needs, which else costs a reallocation for each packet.
// A kernel without VXLAN does without.
func (a *applier) headroom(n *plan.Network, bridge *device) error {
	d, err := a.ensureLink(&netlink.Vxlan{
		LinkAttrs: attrs(headroomName(n)), VxlanId: int(n.ID), Port: headroomPort,
		SrcAddr: netip.IPv6Loopback().AsSlice(),
	}, always)
	if unsupported(err) {
		a.Handle.log.Debug("no headroom device: this kernel has no VXLAN (CONFIG_VXLAN), encapsulation copies each packet's head", "network", n.Name)
		return nil
	}
	if err != nil {
		return err
	}
	return each(
		func() error { return d.alias(networkAlias + n.Name) },
		func() error { return d.mtu(a.mtu(n.Overhead)) },
		func() error { return d.master(bridge.Link) },
	)
}

func headroomName(n *plan.Network) string { return fmt.Sprintf("lacer%d", n.ID) }

// removeStale removes our links that the plan no longer has, and what a crash left half made.
func (a *applier) removeStale(p *plan.Plan) error {
	wanted := map[string]bool{}
	wanted[segmenterNear], wanted[segmenterFar] = needsSegmenter(p), needsSegmenter(p)
	loErr := a.leaveHost(p)
	keep := needsHostPair(p) || loErr != nil // else what lo was like is forgotten
	wanted[plan.HostSide], wanted[plan.HostPeer] = keep, keep
	for i := range p.Networks {
		n := &p.Networks[i]
		wanted[n.Bridge], wanted[headroomName(n)] = true, true
		wanted[n.VRF] = a.o.VRF
	}
	var doomed []netlink.Link
	for _, name := range slices.Sorted(maps.Keys(a.links)) {
		l := a.links[name]
		if wanted[name] || !owned(l) || roleOf(name) == rolePort && !halfMade(l) {
			continue
		}
		doomed = append(doomed, l)
	}
	if len(doomed) == 0 {
		return loErr
	}
	if err := a.host.removeLinks(doomed, a.links); err != nil {
		return errors.Join(loErr, err)
	}
	for _, l := range doomed {
		a.done(l.Type()+" "+l.Attrs().Name, "remove")
		delete(a.links, l.Attrs().Name)
	}
	return loErr
}

// vrfSupport is the scratch VRF of ProbeVRF; its table is above those of all networks.
const (
	probeVRF   = "lacevprobe"
	probeTable = 0x4d000000
)

// ProbeVRF finds out whether the kernel has VRFs by making one and taking it away again. The
// first VRF of a network namespace makes the kernel add rule 1000, which stays (see Remove).
func (h *Handle) ProbeVRF() (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	links, err := h.host.links()
	if err != nil {
		return false, err
	}
	a := &applier{Handle: h, recorder: h.recorder(), links: links}
	d, err := a.ensureLink(&netlink.Vrf{LinkAttrs: attrs(probeVRF), Table: probeTable}, always)
	if unsupported(err) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("find out whether the kernel has VRFs: %w", err)
	}
	return true, a.remove(d.Link)
}
