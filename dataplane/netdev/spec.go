// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// PortSpec is a container's interface as it should be.
type PortSpec struct {
	plan.Port
	Netns string // path of the container's network namespace
	MTU   int    // of both ends, exactly
}

const (
	minMTU  = 68   // RFC 791
	minMTU6 = 1280 // RFC 8200, section 5
	maxMTU  = 65535
)

// check refuses what the kernel would refuse later, or worse, accept.
func (s *PortSpec) check() error {
	least := minMTU
	if s.V6.IsValid() {
		least = minMTU6
	}
	switch {
	case s.HostIf != s.Attachment.HostIf() || roleOf(s.HostIf) != rolePort || s.Device != "":
		return fmt.Errorf("host interface %q does not belong to container %s and interface %s", s.HostIf, s.Container, s.IfName)
	case !validIfName(s.IfName):
		return fmt.Errorf("interface name %q cannot be used in a container: 1 to 15 characters without spaces, / or :, and not lo", s.IfName)
	case !s.V4.IsValid() && !s.V6.IsValid():
		return fmt.Errorf("container %s has no address in network %s", s.Container, s.Network)
	case !s.agree(s.V4, s.Gateway4, netip.Addr.Is4), !s.agree(s.V6, s.Gateway6, netip.Addr.Is6):
		return fmt.Errorf("container %s: address %s %s, prefixes %s, gateway %s %s and routes %s do not belong together",
			s.Container, s.V4, s.V6, s.Prefixes, s.Gateway4, s.Gateway6, s.Routes)
	case s.MTU < least || s.MTU > maxMTU:
		return fmt.Errorf("container %s: MTU %d is not between %d and %d: the uplink's MTU must be larger by the encapsulation's overhead", s.Container, s.MTU, least, maxMTU)
	}
	return checkMAC(s.Attachment)
}

func checkMAC(a plan.Attachment) error {
	if a.MAC[0]&1 != 0 || a.MAC == (plan.MAC{}) || a.MAC == plan.GatewayMAC {
		return fmt.Errorf("container %s: %s cannot be its MAC address: a unicast address other than the gateway's is wanted", a.Container, a.MAC)
	}
	return nil
}

// agree says whether a family's words go together: the address stands in one prefix, and what leads to a gateway has one. That of
// a routed network is always there, as it alone is on the link.
func (s *PortSpec) agree(addr, gateway netip.Addr, is func(netip.Addr) bool) bool {
	ofFamily := func(p netip.Prefix) bool { return is(p.Addr()) }
	routed := s.Type == topology.L3 || slices.ContainsFunc(s.Routes, ofFamily)
	if !addr.IsValid() {
		return !slices.ContainsFunc(slices.Concat(s.Prefixes, s.Routes), ofFamily)
	}
	if !is(addr) || gateway.IsValid() && !is(gateway) || !gateway.IsValid() && routed {
		return false
	}
	own := slices.DeleteFunc(slices.Clone(s.Prefixes), func(p netip.Prefix) bool { return !ofFamily(p) })
	return len(own) == 1 && own[0].IsValid() && own[0].Addr() == addr
}

func validIfName(name string) bool {
	return name != "" && len(name) < unix.IFNAMSIZ && name != "lo" && name != "." && name != ".." && !strings.ContainsAny(name, " /:%\t\n\v\f\r\x00")
}

// routes are those of the container's interface. The gateway of a routed network is alone on the link; that of an Ethernet
// segment is among the others, to which the kernel itself has a route.
func (s *PortSpec) routes(dev int) []route {
	var rs []route
	for _, f := range []struct{ addr, gw netip.Addr }{{s.V4, s.Gateway4}, {s.V6, s.Gateway6}} {
		if s.Type == topology.L3 && f.addr.IsValid() {
			rs = append(rs, onLink(netip.PrefixFrom(f.gw, f.gw.BitLen()), dev))
		}
	}
	for _, dst := range s.Routes {
		r := route{dst: dst, table: unix.RT_TABLE_MAIN, kind: unix.RTN_UNICAST, dev: dev, gw: s.Gateway4}
		if dst.Addr().Is6() {
			r.gw, r.metric = s.Gateway6, defaultMetric6
		}
		rs = append(rs, r)
	}
	return rs
}

// onLink is a route of the main table to what is reached by the device itself.
func onLink(dst netip.Prefix, dev int) route {
	r := route{dst: dst, table: unix.RT_TABLE_MAIN, kind: unix.RTN_UNICAST, dev: dev}
	if dst.Addr().Is6() {
		r.metric = defaultMetric6
	} else {
		r.scope = netlink.SCOPE_LINK
	}
	return r
}
