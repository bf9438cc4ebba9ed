// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"net/netip"
	"testing"
)

// mixed are a routed network and a segment with a gateway. web may open flows to seg, and with both the other way round too.
func mixed(both bool) string {
	text := webNetwork + `
[network.seg]
type = "l2"
id = 500
subnets = ["10.60.0.0/24", "fd60::/64"]
gateway = ["10.60.0.1", "fd60::1"]
[[peering]]
from = "web"
to = "seg"
`
	if both {
		text += "bidirectional = true\n"
	}
	return text
}

// mixedBed is two nodes with a container of each network.
type mixedBed struct {
	*bed
	web, seg [2]*container
}

func newMixedBed(t *testing.T, both bool) *mixedBed {
	t.Helper()
	m := &mixedBed{bed: newBed(t, bedOptions{nodes: 2, networks: mixed(both)})}
	for i, n := range m.nodes {
		m.web[i], m.seg[i] = n.run(t, "web", "web"), n.run(t, "seg", "seg")
		settle(t, m.web[i], m.seg[i])
	}
	return m
}

// each runs a test from a container of the first node to that on the same node and the other one, in both families.
func (m *mixedBed) each(t *testing.T, from *container, to [2]*container, test func(t *testing.T, from, to *container, at int)) {
	for i, name := range []string{"near", "far"} {
		for at, a := range from.addresses() {
			t.Run(title(name, family(a)), func(t *testing.T) { test(t, from, to[i], at) })
		}
	}
}

// TestSegmentPeering joins a routed network and a segment by the segment's gateway, in both directions.
func TestSegmentPeering(t *testing.T) {
	takesLong(t)
	m := newMixedBed(t, true)
	t.Run("to the segment", func(t *testing.T) { m.each(t, m.web[0], m.seg, checkOpens) })
	t.Run("out of the segment", func(t *testing.T) { m.each(t, m.seg[0], m.web, checkOpens) })
	t.Run("within", func(t *testing.T) { checkPings(t, m.seg[:]...); checkGateway(t, m.seg[0]) })
	for name, from := range map[string][2]*container{"routed": m.web, "segment": m.seg} {
		to := m.seg
		if name == "segment" {
			to = m.web
		}
		t.Run("errors of the "+name, func(t *testing.T) {
			m.each(t, from[0], to, func(t *testing.T, from, to *container, at int) {
				checkTraceroute(t, from, to.addresses()[at], from.gateway(to.addresses()[at]))
				checkHops(t, from, to, at)
				checkClosedPort(t, from, to, at)
			})
			for at := range 2 {
				checkNowhere(t, from[0], at)
			}
		})
	}
	t.Run("too big", func(t *testing.T) {
		for at := range 2 {
			checkTooBig(t, m.seg[1], m.web[0], at, 1460)
			checkTooBig(t, m.web[1], m.seg[0], at, 1460)
		}
	})
	t.Run("wire", func(t *testing.T) { checkPeeredWire(t, m) })
}

// checkNowhere sends to where no peering leads.
func checkNowhere(t *testing.T, from *container, at int) {
	to := netip.MustParseAddr([]string{"192.0.2.1", "2001:db8::1"}[at])
	if _, err := ask(from.dialUDP(t, netip.AddrPortFrom(to, 9)), []byte("anybody?"), patience); !errors.Is(err, prohibited(to)) {
		t.Errorf("%s to %s: %v", from.name, to, err)
	}
}

// checkPeeredWire holds that what goes over the gateway is routed: packets, no frames, to End.DT46.
func checkPeeredWire(t *testing.T, m *mixedBed) {
	wire := m.wire.capture(t, "n1")
	m.seg[0].reaches(t, m.web[1].port.V4)
	m.web[0].reaches(t, m.seg[1].port.V6)
	wire.await(t, "a packet out of the segment", func(f []byte) bool {
		o, ok := parseOuter(f)
		return ok && o.src == segSID(1, "5ce") && o.next == protoIPv4 && o.dst == netip.MustParseAddr("5f00:1ace:2:14:0:6500::")
	})
	wire.await(t, "a packet to the segment", func(f []byte) bool {
		o, ok := parseOuter(f)
		return ok && o.dst == segSID(2, "14") && o.next == protoIPv6 && o.src == netip.MustParseAddr("5f00:1ace:1:5ce:0:6500::")
	})
	if n := wire.count(carrying(func(c carried) bool { return isKind(c.frame, typeIPv4) })); n > 0 {
		t.Errorf("%d packets between two networks went as frames", n)
	}
}

// TestSegmentPeeringOneWay has a peering with a direction.
func TestSegmentPeeringOneWay(t *testing.T) {
	takesLong(t)
	m := newMixedBed(t, false)
	t.Run("opens", func(t *testing.T) { m.each(t, m.web[0], m.seg, checkOpens) })
	t.Run("refuses", func(t *testing.T) { m.each(t, m.seg[0], m.web, checkRefuses) })
}
