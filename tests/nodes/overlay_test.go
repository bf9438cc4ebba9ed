// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// forms are the encapsulations and their overheads.
var forms = []struct {
	name     string
	srh      bool
	overhead int
}{{"reduced", false, 40}, {"srh", true, 64}}

// TestOverlay is what containers on three nodes of one link see of each other.
func TestOverlay(t *testing.T) {
	for _, form := range forms {
		t.Run(form.name, func(t *testing.T) {
			b := newBed(t, bedOptions{nodes: 3, srh: form.srh})
			a, local := b.nodes[0].run(t, "a", "backend"), b.nodes[0].run(t, "local", "backend")
			far, third := b.nodes[1].run(t, "far", "backend"), b.nodes[2].run(t, "third", "backend")
			t.Run("MTU", func(t *testing.T) { checkMTU(t, a, 1500-form.overhead) })
			t.Run("ping", func(t *testing.T) { checkPings(t, a, local, far, third) })
			t.Run("gateway", func(t *testing.T) { checkGateway(t, a) })
			for _, at := range []int{0, 1} {
				name := family(a.addresses()[at])
				t.Run("UDP-"+name, func(t *testing.T) { checkSizes(t, a, far, at); checkSizes(t, a, local, at) })
				t.Run("TCP-"+name, func(t *testing.T) { checkTransfers(t, a, far, at); checkTransfers(t, a, local, at) })
				t.Run("wire-"+name, func(t *testing.T) { checkWire(t, b, a, far, at, form.srh) })
				t.Run("hops-"+name, func(t *testing.T) { checkHops(t, a, far, at); checkHops(t, a, local, at) })
				t.Run("unreachable-"+name, func(t *testing.T) { checkUnreachable(t, a, at) })
				t.Run("too-big-"+name, func(t *testing.T) { checkTooBig(t, far, a, at, 1500-form.overhead) })
			}
		})
	}
}

func checkMTU(t *testing.T, c *container, want int) {
	inside := c.link(t, "eth0").Attrs().MTU
	outside := c.node.link(t, c.port.HostIf).Attrs().MTU
	if inside != want || outside != want || c.port.MTU != want {
		t.Errorf("MTU %d inside, %d outside, %d reported; want %d", inside, outside, c.port.MTU, want)
	}
}

// checkPings has all containers ping all others.
func checkPings(t *testing.T, all ...*container) {
	for _, from := range all {
		for _, to := range all {
			if from == to {
				continue
			}
			for _, a := range to.addresses() {
				from.reaches(t, a)
			}
		}
	}
}

func checkGateway(t *testing.T, c *container) {
	c.reaches(t, c.port.Gateway4)
	c.reaches(t, c.port.Gateway6)
}

// checkSizes sends datagrams from empty to the largest there is, which the sender fragments.
func checkSizes(t *testing.T, from, other *container, at int) {
	to := other.addresses()[at]
	headers := 28
	if to.Is6() {
		headers = 48
	}
	server := other.echoUDP(t, to, "echo")
	for _, size := range []int{0, 1, from.port.MTU - headers, from.port.MTU - headers + 1, 9000, 65507 - len("echo")} {
		payload := pattern(uint64(size), size)
		if got := from.gets(t, server, payload); !bytes.Equal(got, append([]byte("echo"), payload...)) {
			t.Errorf("%d bytes to %s came back as %d others", size, to, len(got))
		}
	}
}

// transferSize is some MB, fewer where processors are slow.
func transferSize() int {
	if inVM {
		return 1 << 20
	}
	return 8 << 20
}

func checkTransfers(t *testing.T, a, b *container, at int) {
	a.transfer(t, b.listenTCP(t, b.addresses()[at], digest), transferSize())
	b.transfer(t, a.listenTCP(t, a.addresses()[at], digest), transferSize())
}

// dscpAndECN is what the wire test marks its datagrams with: expedited forwarding and ECT(0).
const dscpAndECN = 46<<2 | 2

// checkWire looks at every byte that Lace puts around a packet from n1 to n2.
func checkWire(t *testing.T, b *bed, a, far *container, at int, srhForm bool) {
	from, to := a.addresses()[at], far.addresses()[at]
	server := far.echoUDP(t, to, "")
	wire := b.wire.capture(t, "n1")
	labels := map[uint32]bool{}
	for flow := range 4 {
		c := a.dialUDP(t, server)
		setOption(t, c, to, unix.IP_TOS, unix.IPV6_TCLASS, dscpAndECN)
		label := uint32(0)
		for i := range 3 {
			marker := fmt.Appendf(nil, "flow %d packet %d", flow, i)
			until(t, "an answer comes", func() bool { _, err := ask(c, marker, onePing); return err == nil })
			o, ok := parseOuter(wire.await(t, "a datagram", func(f []byte) bool { return isFrom(f, "5f00:1ace:1::/48") && bytes.Contains(f, marker) }))
			if !ok {
				t.Fatal("no IPv6 packet")
			}
			checkOuter(t, o, from, srhForm)
			if i > 0 && o.label != label {
				t.Errorf("the flow label went from %x to %x", label, o.label)
			}
			label = o.label
		}
		labels[label] = true
	}
	if len(labels) < 2 || labels[0] {
		t.Errorf("four flows have the labels %v", labels)
	}
	checkNothingBare(t, wire)
}

// isFrom matches IPv6 packets by their source.
func isFrom(frame []byte, prefix string) bool {
	o, ok := parseOuter(frame)
	return ok && netip.MustParsePrefix(prefix).Contains(o.src)
}

// Outer addresses of network 100 from n1 to n2, byte by byte: locator, function, network, zeros.
var (
	sourceOf1 = netip.MustParseAddr("5f00:1ace:1:5ce:0:6400::")
	sidOf2    = netip.MustParseAddr("5f00:1ace:2:14:0:6400::")
)

func checkOuter(t *testing.T, o outer, from netip.Addr, srhForm bool) {
	t.Helper()
	next := byte(protoIPv4)
	if from.Is6() {
		next = protoIPv6
	}
	if o.src != sourceOf1 || o.dst != sidOf2 || o.next != next || o.hops != 64 || o.class != dscpAndECN {
		t.Errorf("outer header: %s → %s, next header %d, hop limit %d, class %x", o.src, o.dst, o.next, o.hops, o.class)
	}
	var want []byte
	if srhForm {
		want = srh(next, 0, sidOf2, nil)
	}
	if !bytes.Equal(o.srh, want) {
		t.Errorf("segment routing header %x, want %x", o.srh, want)
	}
	if o.length != len(o.srh)+len(o.inner) {
		t.Errorf("payload length %d, there are %d + %d bytes", o.length, len(o.srh), len(o.inner))
	}
	p, ok := parseIP(o.inner)
	if !ok || p.hops != 63 || p.class != dscpAndECN || p.src != from {
		t.Errorf("inner packet: %+v", p)
	}
}

// checkNothingBare holds that no packet of a container was on the wire as it is.
func checkNothingBare(t *testing.T, wire *capture) {
	t.Helper()
	overlay := netip.MustParsePrefix("fd40::/10") // the topologies' networks are fd40 to fd7f
	for _, f := range wire.all() {
		o, six := parseOuter(f)
		kind := binary.BigEndian.Uint16(f[12:])
		if kind == typeIPv4 || kind == typeARP || six && (overlay.Contains(o.src) || overlay.Contains(o.dst)) {
			t.Errorf("a bare packet on the wire: %x", f)
		}
	}
}

// checkHops holds that the way costs one hop, and that the gateway says so when there is none left.
func checkHops(t *testing.T, a, b *container, at int) {
	from, to := a.addresses()[at], b.addresses()[at]
	seen := b.capture(t, "eth0")
	errs := a.capture(t, "eth0")
	for _, ttl := range []int{1, 2, 64, 255} {
		marker := fmt.Appendf(nil, "hops %d %s", ttl, to)
		c := a.dialUDP(t, netip.AddrPortFrom(to, 33434))
		setOption(t, c, to, unix.IP_TTL, unix.IPV6_UNICAST_HOPS, ttl)
		write := func() bool { _, err := c.Write(marker); return err == nil || isICMP(err) }
		if ttl == 1 {
			checkExpired(t, errs, write, from, a.gateway(to))
			continue
		}
		write()
		p, _ := parseIP(seen.await(t, "the datagram", containing(marker))[14:])
		if int(p.hops) != ttl-1 || p.src != from {
			t.Errorf("sent with %d hops, came with %d from %s", ttl, p.hops, p.src)
		}
	}
	if seen.count(containing(fmt.Appendf(nil, "hops 1 %s", to))) > 0 {
		t.Error("a packet with one hop came through")
	}
}

func checkExpired(t *testing.T, errs *capture, send func() bool, from, gateway netip.Addr) {
	t.Helper()
	if !send() {
		t.Fatal("the datagram cannot be sent")
	}
	e := errs.awaitError(t, func(e icmpError) bool { return e.about.src == from && (e.kind == 11 || e.from.Is6() && e.kind == 3) })
	if e.from != gateway || e.code != 0 || e.about.hops != 1 {
		t.Errorf("time exceeded: %+v, want it from %s", e, gateway)
	}
}

// gateway is that of a's family.
func (c *container) gateway(a netip.Addr) netip.Addr {
	if a.Is4() {
		return c.port.Gateway4
	}
	return c.port.Gateway6
}

// isICMP tells the errors that a socket reports because an ICMP error came.
func isICMP(err error) bool {
	for _, e := range []error{unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ECONNREFUSED, unix.EACCES, unix.EPROTO, unix.EMSGSIZE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// awaitError waits for an ICMP error.
func (c *capture) awaitError(t testing.TB, match func(icmpError) bool) (e icmpError) {
	t.Helper()
	c.await(t, "an ICMP error", func(f []byte) (ok bool) {
		if len(f) < 34 {
			return false
		}
		e, ok = parseICMPError(f[14:])
		return ok && match(e)
	})
	return e
}

// checkUnreachable holds that the sender learns at once of a destination without a container, and of one outside.
func checkUnreachable(t *testing.T, a *container, at int) {
	tests := []struct {
		to, why    string
		kind, code byte
	}{
		{"10.40.1.250", "no container", 3, 1}, {"192.0.2.1", "no block", 3, 13},
		{"fd40:0:0:1::fff0", "no container", 1, 3}, {"2001:db8::1", "no block", 1, 1},
	}
	errs := a.capture(t, "eth0")
	for _, tt := range tests[2*at : 2*at+2] {
		to := netip.MustParseAddr(tt.to)
		c := a.dialUDP(t, netip.AddrPortFrom(to, 9))
		if _, err := c.Write([]byte("anybody?")); err != nil && !isICMP(err) {
			t.Fatal(err)
		}
		e := errs.awaitError(t, func(e icmpError) bool { return e.about.dst == to })
		if e.from != a.gateway(to) || e.kind != tt.kind || e.code != tt.code || e.about.src != a.addresses()[at] {
			t.Errorf("%s, %s: %+v", to, tt.why, e)
		}
	}
	tcpFailsAtOnce(t, a, netip.MustParseAddr(tests[2*at+1].to))
}

func tcpFailsAtOnce(t *testing.T, a *container, to netip.Addr) {
	t.Helper()
	begin := time.Now()
	c, err := a.dialTCP(t, netip.AddrPortFrom(to, 9), nil)
	if err == nil {
		c.Close()
		t.Errorf("connected to %s", to)
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("connect to %s: %v after %s; want an error at once", to, err, time.Since(begin))
	}
}

// checkTooBig lets a container send more than the way takes, as one with a wrong MTU does.
func checkTooBig(t *testing.T, far, near *container, at, mtu int) {
	from := near.node.run(t, "big", near.network)
	defer from.order(t, "release")
	from.setMTU(t, 9000)
	to := far.addresses()[at]
	errs := from.capture(t, "eth0")
	server := far.echoUDP(t, to, "")
	c := from.dialUDP(t, server)
	do, dont := unix.IP_PMTUDISC_DO, unix.IP_PMTUDISC_DONT
	setOption(t, c, to, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, do)
	if _, err := c.Write(pattern(1, 4000)); err != nil {
		t.Fatal(err)
	}
	e := errs.awaitError(t, func(e icmpError) bool { return e.about.dst == to })
	if e.mtu != mtu || e.from != from.gateway(to) || e.about.src != from.like(to) {
		t.Errorf("too big: %+v; want MTU %d from %s", e, mtu, from.gateway(to))
	}
	until(t, "the sender knows the path's MTU", func() bool {
		_, err := c.Write(pattern(2, 4000))
		return errors.Is(err, unix.EMSGSIZE)
	})
	if to.Is4() { // without DF: Linux sends fragments when it was told
		setOption(t, c, to, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, dont)
	} else {
		setOption(t, c, to, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_WANT)
	}
	until(t, "the sender fragments", func() bool {
		got, err := ask(c, pattern(3, 4000), onePing)
		return err == nil && bytes.Equal(got, pattern(3, 4000))
	})
	checkBigTCP(t, from, far, at)
}

// setMTU sets both ends of the container's veth.
func (c *container) setMTU(t *testing.T, mtu int) {
	t.Helper()
	must(t, c.node.LinkSetMTU(c.node.link(t, c.port.HostIf), mtu))
	must(t, c.LinkSetMTU(c.link(t, "eth0"), mtu))
}

// checkBigTCP sends streams between ends that both believe in 9000 bytes, and know no path yet.
func checkBigTCP(t *testing.T, near, far *container, at int) {
	from := near.node.run(t, "bigger", near.network)
	defer from.order(t, "release")
	from.setMTU(t, 9000)
	far.setMTU(t, 9000)
	defer far.setMTU(t, far.port.MTU)
	before := from.node.counter("too_big")
	from.transfer(t, far.listenTCP(t, far.addresses()[at], digest), transferSize())
	if from.node.counter("too_big") == before {
		t.Error("nothing was too big")
	}
	if near.network == far.network {
		far.transfer(t, from.listenTCP(t, from.addresses()[at], digest), transferSize())
	}
}
