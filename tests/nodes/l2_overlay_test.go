// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSegment is what containers on three nodes of one Ethernet segment see of each other.
func TestSegment(t *testing.T) {
	for _, form := range []struct {
		name string
		srh  bool
		mtu  int
	}{{"reduced", false, 1500}, {"srh", true, 1500}, {"jumbo", false, 9000}} {
		t.Run(form.name, func(t *testing.T) {
			if form.mtu > 1500 {
				takesLong(t)
			}
			s := newSegBed(t, bedOptions{srh: form.srh, prepare: func(b *bed) { b.setWireMTU(t, form.mtu) }})
			mtu := form.mtu - segOverhead(form.srh)
			t.Run("MTU", func(t *testing.T) { checkMTU(t, s.a, mtu) })
			t.Run("ping", func(t *testing.T) { checkPings(t, s.all()...) })
			t.Run("link-local", func(t *testing.T) { checkLinkLocal(t, s.all()...) })
			for _, at := range []int{0, 1} {
				name := family(s.a.addresses()[at])
				t.Run("UDP-"+name, func(t *testing.T) { checkSizes(t, s.a, s.far, at); checkSizes(t, s.a, s.local, at) })
				t.Run("TCP-"+name, func(t *testing.T) { checkTransfers(t, s.a, s.far, at); checkTransfers(t, s.local, s.a, at) })
				t.Run("wire-"+name, func(t *testing.T) { checkCarried(t, s, at, form.srh) })
				t.Run("hops-"+name, func(t *testing.T) { checkSameHops(t, s.a, s.far, at); checkSameHops(t, s.a, s.local, at) })
				t.Run("too-big-"+name, func(t *testing.T) {
					checkFrameTooBig(t, s.far, s.a, at, mtu)
					checkFrameTooBig(t, s.local, s.a, at, mtu)
				})
			}
		})
	}
}

// setWireMTU sets the MTU of the underlay.
func (b *bed) setWireMTU(t *testing.T, mtu int) {
	t.Helper()
	for _, n := range b.nodes {
		must(t, b.wire.LinkSetMTU(b.wire.link(t, n.host), mtu))
		must(t, n.LinkSetMTU(n.link(t, uplink), mtu))
	}
}

// checkLinkLocal has all ping all by the addresses that their kernels make of their MAC addresses.
func checkLinkLocal(t *testing.T, all ...*container) {
	for _, from := range all {
		for _, to := range all {
			if from != to {
				from.reaches(t, linkLocal(to.port.MAC).WithZone("eth0"))
			}
		}
	}
}

// checkCarried looks at every byte that Lace puts around a frame from n1 to n2.
func checkCarried(t *testing.T, s *segBed, at int, srhForm bool) {
	from, to := s.a.addresses()[at], s.far.addresses()[at]
	server := s.far.echoUDP(t, to, "")
	wire := s.wire.capture(t, "n1")
	sent, came := s.a.capture(t, "eth0"), s.far.capture(t, "eth0")
	labels := map[uint32]bool{}
	for flow := range 4 {
		c := s.a.dialUDP(t, server)
		setOption(t, c, to, unix.IP_TOS, unix.IPV6_TCLASS, dscpAndECN)
		label := uint32(0)
		for i := range 3 {
			marker := fmt.Appendf(nil, "flow %d packet %d", flow, i)
			until(t, "an answer comes", func() bool { _, err := ask(c, marker, onePing); return err == nil })
			there := func(f []byte) bool { return bytes.Contains(f, marker) && [6]byte(f[:6]) == s.far.port.MAC }
			first := sent.await(t, "a datagram", there)
			got, ok := parseCarried(wire.await(t, "a datagram", func(f []byte) bool { return isFrom(f, "5f00:1ace:1::/48") && bytes.Contains(f, marker) }))
			if !ok {
				t.Fatal("no frame in IPv6")
			}
			checkCarriedOuter(t, got, srhForm)
			if last := came.await(t, "a datagram", there); len(got.frame) != len(first) || !bytes.Equal(bare(first), bare(got.frame)) || !bytes.Equal(got.frame, last) {
				t.Errorf("a frame changes on its way:\n%x\n%x\n%x", first, got.frame, last)
			}
			if i > 0 && got.label != label {
				t.Errorf("the flow label went from %x to %x", label, got.label)
			}
			label = got.label
		}
		labels[label] = true
	}
	if len(labels) < 2 || labels[0] {
		t.Errorf("four flows have the labels %v", labels)
	}
	if p, ok := parseIP(sent.await(t, "a datagram", func(f []byte) bool { return [6]byte(f[:6]) == s.far.port.MAC })[14:]); !ok || p.src != from {
		t.Errorf("%+v is no packet from %s", p, from)
	}
	checkNothingBare(t, wire)
}

// bare is a frame of UDP without its checksum, which a kernel leaves to others while offloads are on.
func bare(frame []byte) []byte {
	f := bytes.Clone(frame)
	at := 14 + 20 + 6
	if isKind(f, typeIPv6) {
		at = 14 + 40 + 6
	}
	clear(f[at : at+2])
	return f
}

func checkCarriedOuter(t *testing.T, c carried, srhForm bool) {
	t.Helper()
	source, sid := segSID(1, "5ce"), segSID(2, oneStation)
	if c.src != source || c.dst != sid || c.next != protoFrame || c.hops != 64 || c.class != dscpAndECN {
		t.Errorf("outer header: %s → %s, next header %d, hop limit %d, class %x", c.src, c.dst, c.next, c.hops, c.class)
	}
	var want []byte
	if srhForm {
		want = srh(protoFrame, 0, sid, nil)
	}
	if !bytes.Equal(c.srh, want) {
		t.Errorf("segment routing header %x, want %x", c.srh, want)
	}
	if c.length != len(c.srh)+len(c.inner) {
		t.Errorf("payload length %d, there are %d + %d bytes", c.length, len(c.srh), len(c.inner))
	}
}

// checkSameHops holds that a segment costs no hop.
func checkSameHops(t *testing.T, from, to *container, at int) {
	seen := to.capture(t, "eth0")
	for _, hops := range []int{1, 64, 255} {
		marker := fmt.Appendf(nil, "still %d hops", hops)
		c := from.dialUDP(t, netip.AddrPortFrom(to.addresses()[at], 33434))
		setOption(t, c, to.addresses()[at], unix.IP_TTL, unix.IPV6_UNICAST_HOPS, hops)
		until(t, "the datagram comes", func() bool {
			c.Write(marker)
			time.Sleep(time.Millisecond)
			return seen.count(containing(marker)) > 0
		})
		p, _ := parseIP(seen.await(t, "the datagram", containing(marker))[14:])
		if int(p.hops) != hops || p.src != from.addresses()[at] {
			t.Errorf("sent with %d hops, came with %d from %s", hops, p.hops, p.src)
		}
	}
}

// checkFrameTooBig lets a container with a wrong MTU send more than the way takes: it is told by whom it sends to, there being
// nobody between.
func checkFrameTooBig(t *testing.T, far, near *container, at, mtu int) {
	from := near.node.run(t, "big", near.network)
	defer from.order(t, "release")
	from.setMTU(t, 12000)
	to := far.addresses()[at]
	from.reaches(t, to)
	errs := from.capture(t, "eth0")
	c := from.dialUDP(t, far.echoUDP(t, to, ""))
	setOption(t, c, to, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	if _, err := c.Write(pattern(1, 11000)); err != nil {
		t.Fatal(err)
	}
	e := errs.awaitError(t, func(e icmpError) bool { return e.about.dst == to })
	if e.mtu != mtu || e.from != to || e.about.src != from.like(to) {
		t.Errorf("too big: %+v; want MTU %d from %s", e, mtu, to)
	}
	until(t, "the sender knows the path's MTU", func() bool {
		_, err := c.Write(pattern(2, 11000))
		return errors.Is(err, unix.EMSGSIZE)
	})
	bigger := near.node.run(t, "bigger", near.network)
	defer bigger.order(t, "release")
	bigger.setMTU(t, 12000)
	far.setMTU(t, 12000)
	defer far.setMTU(t, far.port.MTU)
	before := near.node.counter("too_big")
	bigger.transfer(t, far.listenTCP(t, to, digest), transferSize())
	if far.node != near.node && near.node.counter("too_big") == before {
		t.Error("nothing was too big")
	}
}
