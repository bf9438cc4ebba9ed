// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	typeQinQ = 0x88a8
	typeFree = 0x88b5 // set apart for experiments

	protoFragment = 44
)

// tag is a VLAN tag and what follows it.
func tag(id int, kind int, payload []byte) []byte { return join(be16(id), be16(kind), payload) }

// TestFrames sends frames of all kinds and compares them byte by byte: on the wire, at the other node and on this one.
func TestFrames(t *testing.T) {
	takesLong(t)
	for _, form := range forms {
		t.Run(form.name, func(t *testing.T) {
			s := newSegBed(t, bedOptions{srh: form.srh})
			t.Run("whole", func(t *testing.T) { checkFrames(t, s) })
			t.Run("priority", func(t *testing.T) { checkPriorityTag(t, s) })
			t.Run("priority of a node", func(t *testing.T) { checkPriorityTagOfNode(t, s) })
			t.Run("refused", func(t *testing.T) { checkRefusedFrames(t, s) })
		})
	}
}

// marked are payloads of a size that differ by a number.
func marked(number, size int) []byte {
	return append(binary.BigEndian.AppendUint32([]byte("mark"), uint32(number)), pattern(uint64(number), max(size-8, 0))...)
}

// frameKindsOf are EtherTypes and what is behind them, from one container to another.
func frameKindsOf(from, to *container) map[string]func(n int) (kind int, payload []byte) {
	packet := func(n, size int) []byte {
		return ipv4(from.port.V4, to.port.V4, protoUDP, 64, udp(netip.AddrPortFrom(from.port.V4, 5), netip.AddrPortFrom(to.port.V4, 5), marked(n, size)))
	}
	packet6 := func(n, size int) []byte {
		return ipv6(from.port.V6, to.port.V6, protoUDP, 64, udp(netip.AddrPortFrom(from.port.V6, 5), netip.AddrPortFrom(to.port.V6, 5), marked(n, size)))
	}
	mtu := from.port.MTU
	kinds := map[string]func(int) (int, []byte){
		"IPv4":                func(n int) (int, []byte) { return typeIPv4, packet(n, 8) },
		"IPv4 of the largest": func(n int) (int, []byte) { return typeIPv4, packet(n, mtu-28) },
		"IPv6":                func(n int) (int, []byte) { return typeIPv6, packet6(n, 8) },
		"IPv6 of the largest": func(n int) (int, []byte) { return typeIPv6, packet6(n, mtu-48) },
		"tagged IPv4":         func(n int) (int, []byte) { return typeVLAN, tag(7, typeIPv4, packet(n, 40)) },
		"tagged IPv4 of another": func(n int) (int, []byte) {
			return typeVLAN, tag(0xefff, typeIPv4, ipv4(netip.MustParseAddr("192.0.2.1"), to.port.V4, 253, 64, marked(n, 8)))
		},
		"tagged IPv6":           func(n int) (int, []byte) { return typeVLAN, tag(4094, typeIPv6, packet6(n, 1)) },
		"tagged of the largest": func(n int) (int, []byte) { return typeVLAN, tag(100, typeIPv4, packet(n, mtu-4-28)) },
		"tagged ARP":            func(n int) (int, []byte) { return typeVLAN, tag(7, typeARP, marked(n, 28)) },
		"tagged free":           func(n int) (int, []byte) { return typeVLAN, tag(7, typeFree, marked(n, 10)) },
		"QinQ":                  func(n int) (int, []byte) { return typeQinQ, tag(5, typeVLAN, tag(6, typeIPv4, packet(n, 60))) },
		"QinQ free":             func(n int) (int, []byte) { return typeQinQ, tag(5, typeVLAN, tag(6, typeFree, marked(n, 8))) },
		"three tags": func(n int) (int, []byte) {
			return typeQinQ, tag(5, typeQinQ, tag(6, typeVLAN, tag(7, typeIPv6, packet6(n, 8))))
		},
		"802.1ad":             func(n int) (int, []byte) { return typeQinQ, tag(9, typeIPv6, packet6(n, 33)) },
		"LLC":                 func(n int) (int, []byte) { return 11, join([]byte{0x42, 0x42, 3}, marked(n, 8)) },
		"MPLS":                func(n int) (int, []byte) { return 0x8847, join([]byte{0, 1, 1, 64}, packet(n, 8)) },
		"PPPoE":               func(n int) (int, []byte) { return 0x8864, join([]byte{0x11, 0, 0, 1, 0, 10, 0, 0x21}, marked(n, 8)) },
		"free of the largest": func(n int) (int, []byte) { return typeFree, marked(n, mtu) },
		"a frame in a frame":  func(n int) (int, []byte) { return 0x6558, ethernet([6]byte{2}, [6]byte{4}, typeIPv4, packet(n, 8)) },
	}
	for size := 8; size <= 64; size += 7 {
		kinds[fmt.Sprint("free ", size)] = func(n int) (int, []byte) { return typeFree, marked(n, size) }
	}
	return kinds
}

// checkFrames sends each kind of frame to the other node and on this one.
func checkFrames(t *testing.T, s *segBed) {
	out := s.a.raw(t)
	wire := s.wire.capture(t, "n1")
	n := 0
	for _, to := range []*container{s.far, s.local} {
		seen := to.capture(t, "eth0")
		for name, make := range frameKindsOf(s.a, to) {
			n++
			kind, payload := make(n)
			sent := ethernet(to.port.MAC, out.mac, kind, payload)
			mark := marked(n, 8)
			out.send(t, sent)
			if got := seen.await(t, name, containing(mark)); !bytes.Equal(got, sent) {
				t.Errorf("%s, %d bytes to %s, came as %d others:\n%x\n%x", name, len(sent), to.name, len(got), sent, got)
			}
			if to == s.local {
				continue
			}
			c, ok := parseCarried(wire.await(t, name, containing(mark)))
			if !ok || c.next != protoFrame || !bytes.Equal(c.frame, sent) || c.dst != segSID(2, oneStation) || c.length != len(c.srh)+len(sent) {
				t.Errorf("%s: on the wire %+v, sent %x", name, c, sent)
			}
		}
		time.Sleep(50 * time.Millisecond) // a second copy would have come by now
		for i := 1; i <= n; i++ {
			in := func(f []byte) bool { return [6]byte(f[:6]) == to.port.MAC && bytes.Contains(f, marked(i, 8)) }
			if got := seen.count(in); got > 1 {
				t.Errorf("frame %d came %d times to %s", i, got, to.name)
			}
		}
	}
}

// checkPriorityTag sends frames with a tag that has a priority and no VLAN, which receivers take for untagged ones: they are
// looked at as such, and lose the tag.
func checkPriorityTag(t *testing.T, s *segBed) {
	out := s.a.raw(t)
	for i, to := range []*container{s.far, s.local} {
		seen := to.capture(t, "eth0")
		packet := func(from netip.Addr, text string) []byte {
			return ipv4(from, to.port.V4, protoUDP, 64, udp(netip.AddrPortFrom(from, 5), netip.AddrPortFrom(to.port.V4, uint16(500+i)), []byte(text)))
		}
		before := s.a.node.counter("spoofed_address")
		spoofed := to.like(to.port.V4).Next()
		out.to(t, to.port.MAC, typeVLAN, tag(5<<13, typeIPv4, packet(spoofed, "this must not arrive")))
		out.to(t, to.port.MAC, typeVLAN, tag(0, typeVLAN, tag(0, typeIPv4, packet(spoofed, "nor this must not arrive"))))
		until(t, "a priority-tagged packet with another address is refused", func() bool { return s.a.node.counter("spoofed_address") > before })
		out.to(t, to.port.MAC, typeVLAN, tag(5<<13, typeIPv4, packet(s.a.port.V4, "this may")))
		want := ethernet(to.port.MAC, out.mac, typeIPv4, packet(s.a.port.V4, "this may"))
		if got := seen.await(t, "what may", containing([]byte("this may"))); !bytes.Equal(got, want) {
			t.Errorf("came as %x, want %x", got, want)
		}
		if n := seen.count(containing([]byte("must not arrive"))); n > 0 {
			t.Errorf("%d spoofed packets came behind a tag", n)
		}
	}
}

// checkPriorityTagOfNode has a node send what none of Lace does.
func checkPriorityTagOfNode(t *testing.T, s *segBed) {
	seen := s.a.capture(t, "eth0")
	wire := s.wire.sender(t, "n1")
	n := s.nodes[0]
	inject := func(frame []byte) {
		wire.send(t, ethernet(n.mac(t, uplink), [6]byte{2, 0, 0, 0, 0, 9}, typeIPv6, ipv6(segSID(2, "5ce"), segSID(1, oneStation), protoFrame, 60, frame)))
	}
	packet := ipv4(s.local.port.V4, s.a.port.V4, protoUDP, 64, udp(netip.AddrPortFrom(s.local.port.V4, 5), netip.AddrPortFrom(s.a.port.V4, 5), []byte("this must not arrive")))
	for _, kind := range []int{typeVLAN, typeQinQ} {
		before := n.counter("malformed")
		inject(ethernet(s.a.port.MAC, s.far.port.MAC, kind, tag(3<<13, typeIPv4, packet)))
		until(t, "it is refused", func() bool { return n.counter("malformed") > before })
	}
	inject(ethernet(s.a.port.MAC, s.far.port.MAC, typeVLAN, tag(3, typeIPv4, []byte("this may"))))
	seen.await(t, "what may", containing([]byte("this may")))
	if seen.count(containing([]byte("must not arrive"))) > 0 {
		t.Error("it came through")
	}
}

// checkRefusedFrames sends what no receiver may get.
func checkRefusedFrames(t *testing.T, s *segBed) {
	out := s.a.raw(t)
	v4, to := s.a.port.V4, s.far
	marker := []byte("this must not arrive")
	places := []*capture{s.far.capture(t, "eth0"), s.local.capture(t, "eth0"), s.third.capture(t, "eth0"), s.wire.capture(t, "n1")}
	for _, tt := range []struct {
		name, reason string
		dst          [6]byte
		kind         int
		payload      []byte
	}{
		{"short IPv4", "malformed", to.port.MAC, typeIPv4, marker[:19]},
		{"IPv4 longer than its frame", "malformed", to.port.MAC, typeIPv4, ipv4(v4, to.port.V4, 253, 64, marker)[:30]},
		{"short IPv6", "malformed", to.port.MAC, typeIPv6, append([]byte{0x60}, marker...)},
		{"unknown MAC", "unknown_mac", [6]byte{0x52, 0x54, 0, 9, 9, 9}, typeFree, marker},
		{"unknown MAC of this pool", "unknown_mac", [6]byte{2, 0x4c, 10, 60, 0, 17 + 13}, typeFree, marker},
		{"MAC of no pool", "unknown_mac", [6]byte{2, 0x4c, 10, 60, 0, 250}, typeFree, marker},
		{"too big and no IP", "too_big", to.port.MAC, typeFree, append(marker, make([]byte, 1442)...)},
	} {
		if len(tt.payload) > 1442 {
			s.a.setMTU(t, 1600)
		}
		before := s.a.node.counter(tt.reason)
		out.to(t, tt.dst, tt.kind, tt.payload)
		until(t, tt.name+" is counted as "+tt.reason, func() bool { return s.a.node.counter(tt.reason) > before })
	}
	s.a.setMTU(t, 1442)
	out.to(t, to.port.MAC, typeFree, []byte("this may"))
	places[0].await(t, "what may", containing([]byte("this may")))
	for _, p := range places {
		if n := p.count(containing(marker[:19])); n > 0 {
			t.Errorf("%d of them came to %s", n, p.name)
		}
	}
}

// gsoModes are what l2-gso says.
var gsoModes = []string{"shim", "segment"}

// TestBulk sends what kernels hand over whole and the wire takes in pieces, and looks at every piece.
func TestBulk(t *testing.T) {
	for _, mode := range gsoModes {
		for _, form := range forms {
			if form.srh && mode == "segment" {
				continue // pieces go like any other frame
			}
			t.Run(title(mode, form.name), func(t *testing.T) {
				if form.srh {
					takesLong(t)
				}
				s := newSegBed(t, bedOptions{srh: form.srh, underlay: fmt.Sprintf("l2-gso = %q", mode)})
				for _, n := range s.nodes {
					n.wireLikeANIC(t)
				}
				for at := range 2 {
					name := family(s.a.addresses()[at])
					t.Run("TCP-"+name, func(t *testing.T) { checkBulkTCP(t, s, at, mode) })
					t.Run("UDP-"+name, func(t *testing.T) { checkBulkUDP(t, s, at, mode) })
					t.Run("tagged TCP-"+name, func(t *testing.T) { checkBulkTagged(t, s, at, mode) })
				}
				t.Run("broadcast", func(t *testing.T) { checkBulkBroadcast(t, s) })
			})
		}
	}
}

// wirePieces are the frames that n1 sent in other frames, checked: none larger than the wire, none a fragment, none with a wrong
// checksum. Only what was handed over whole is behind a shim.
func wirePieces(t *testing.T, wire *capture, mode string, match func(carried) bool) (whole, shims int) {
	t.Helper()
	for _, f := range wire.all() {
		o, six := parseOuter(f)
		if len(f) > 14+1500 {
			t.Fatalf("a frame of %d bytes on the wire", len(f))
		}
		if six && o.next == protoFragment {
			t.Fatalf("a fragment on the wire: %x", f[:60])
		}
		c, ok := parseCarried(f)
		if !ok || !isFrom(f, "5f00:1ace:1::/48") || !match(c) {
			continue
		}
		if c.length != len(c.srh)+len(c.inner) {
			t.Fatalf("payload length %d, there are %d + %d bytes", c.length, len(c.srh), len(c.inner))
		}
		checkInnerSum(t, c.frame)
		whole++
		if c.shim {
			shims++
		}
	}
	if mode == "segment" && shims > 0 {
		t.Errorf("%d of %d frames are behind a shim", shims, whole)
	}
	if mode == "shim" && shims == 0 {
		t.Errorf("of %d frames none is behind a shim", whole)
	}
	return whole, shims
}

// payloadOf is the IP packet of a frame, behind its tags.
func payloadOf(f []byte) []byte {
	at := 12
	for len(f) >= at+4 && (int(binary.BigEndian.Uint16(f[at:])) == typeVLAN || int(binary.BigEndian.Uint16(f[at:])) == typeQinQ) {
		at += 4
	}
	return f[at+2:]
}

// checkInnerSum holds that a frame's TCP or UDP checksum is right, and that it is no fragment.
func checkInnerSum(t *testing.T, frame []byte) {
	t.Helper()
	b := payloadOf(frame)
	p, ok := parseIP(b)
	if !ok || p.proto != protoTCP && p.proto != protoUDP {
		return
	}
	if b[0]>>4 == 4 && (binary.BigEndian.Uint16(b[6:])&0x3fff != 0 || checksum(b[:20]) != 0 || int(binary.BigEndian.Uint16(b[2:])) != len(b)) {
		t.Fatalf("a wrong IPv4 header: %x", b[:20])
	}
	if b[0]>>4 == 6 && int(binary.BigEndian.Uint16(b[4:])) != len(b)-40 {
		t.Fatalf("a wrong IPv6 header: %x", b[:40])
	}
	if checksum(pseudo(p.src, p.dst, p.proto, len(p.payload)), p.payload) != 0 {
		t.Fatalf("a wrong checksum: %x", frame)
	}
}

func isLarge(c carried) bool { return len(c.frame) > 1200 }

func checkBulkTCP(t *testing.T, s *segBed, at int, mode string) {
	wire := s.wire.capture(t, "n1")
	s.a.transfer(t, s.far.listenTCP(t, s.far.addresses()[at], digest), transferSize())
	until(t, "all of it was on the wire", func() bool { return wire.count(carrying(isLarge)) >= transferSize()/1442 })
	whole, shims := wirePieces(t, wire, mode, isLarge)
	for _, f := range wire.all() {
		if c, ok := parseCarried(f); ok && c.shim && !hasData(c.frame) {
			t.Fatalf("a frame without data is behind a shim: %x", f)
		}
	}
	t.Logf("%d full frames, %d behind a shim", whole, shims)
	s.far.transfer(t, s.a.listenTCP(t, s.a.addresses()[at], digest), transferSize())
	s.a.transfer(t, s.local.listenTCP(t, s.local.addresses()[at], digest), transferSize())
}

// hasData tells TCP segments with data in them.
func hasData(frame []byte) bool {
	p, ok := parseIP(payloadOf(frame))
	return ok && p.proto == protoTCP && len(p.payload) >= 20 && len(p.payload) > int(p.payload[12]>>4)*4
}

const gsoPieces, gsoPiece = 12, 1300

// checkBulkUDP hands over several datagrams as one (UDP_SEGMENT).
func checkBulkUDP(t *testing.T, s *segBed, at int, mode string) {
	for _, to := range []*container{s.far, s.local} {
		u := to.listenUDP(t, netip.AddrPortFrom(to.addresses()[at], 0))
		wire := s.wire.capture(t, "n1")
		c := s.a.dialUDP(t, netip.MustParseAddrPort(u.LocalAddr().String()))
		setAny(t, c, unix.IPPROTO_UDP, unix.UDP_SEGMENT, gsoPiece)
		content := pattern(3, gsoPieces*gsoPiece-100)
		_, err := c.Write(content)
		must(t, err)
		must(t, u.SetReadDeadline(time.Now().Add(patience)))
		var got []byte
		for range gsoPieces {
			b := make([]byte, 65536)
			n, err := u.Read(b)
			if err != nil || n > gsoPiece {
				t.Fatalf("a datagram of %d bytes came: %v", n, err)
			}
			got = append(got, b[:n]...)
		}
		if !bytes.Equal(got, content) {
			t.Errorf("%d bytes to %s came as %d others", len(content), to.name, len(got))
		}
		if to == s.far {
			wire.await(t, "the last datagram", containing(content[len(content)-50:]))
			if whole, _ := wirePieces(t, wire, mode, isLarge); whole != gsoPieces {
				t.Errorf("%d datagrams on the wire, want %d", whole, gsoPieces)
			}
		}
	}
}

// wholeFrame hands a frame with TCP in it to the container's kernel whole, as one with offloads is: struct virtio_net_hdr.
func (r *raw) wholeFrame(t testing.TB, frame []byte, transport int, v4 bool, size int) {
	t.Helper()
	must(t, unix.SetsockoptInt(r.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	const needsChecksum, tcp4, tcp6 = 1, 1, 4
	kind := byte(tcp6)
	if v4 {
		kind = tcp4
	}
	native := func(v int) []byte { return binary.NativeEndian.AppendUint16(nil, uint16(v)) }
	r.send(t, join([]byte{needsChecksum, kind}, native(transport+20), native(size), native(transport), native(16), frame))
	must(t, unix.SetsockoptInt(r.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 0))
}

// taggedTCP is a frame for a VLAN with a TCP segment whose checksum is left to others.
func taggedTCP(dst, src [6]byte, from, to netip.Addr, payload []byte) (frame []byte, transport int) {
	segment := tcp(netip.AddrPortFrom(from, 7000), netip.AddrPortFrom(to, 7001), 0x10, payload)
	binary.BigEndian.PutUint16(segment[16:], ^checksum(pseudo(from, to, protoTCP, len(segment))))
	packet := ip(from, to, protoTCP, 64, segment)
	return ethernet(dst, src, typeVLAN, tag(42, etherType(from), packet)), 18 + len(packet) - len(segment)
}

// checkBulkTagged sends TCP in a VLAN of the containers' own, handed over whole.
func checkBulkTagged(t *testing.T, s *segBed, at int, mode string) {
	out := s.a.raw(t)
	content := pattern(uint64(5+at), 10*1200)
	for _, to := range []*container{s.far, s.local} {
		seen, wire := to.capture(t, "eth0"), s.wire.capture(t, "n1")
		frame, transport := taggedTCP(to.port.MAC, out.mac, s.a.addresses()[at], to.addresses()[at], content)
		out.wholeFrame(t, frame, transport, at == 0, 1200)
		checkStreamOf(t, seen, content, to == s.far)
		if to == s.far {
			isTagged := func(c carried) bool { return isKind(c.frame, typeVLAN) }
			wire.await(t, "the last piece", containing(content[len(content)-50:]))
			if whole, _ := wirePieces(t, wire, mode, isTagged); whole != 10 {
				t.Errorf("%d tagged frames on the wire, want 10", whole)
			}
		}
	}
}

// checkStreamOf puts together what came of a tagged stream.
func checkStreamOf(t *testing.T, seen *capture, content []byte, checkSums bool) {
	t.Helper()
	until(t, "the stream comes to "+seen.name, func() bool {
		got := make([]byte, len(content))
		for _, f := range seen.all() {
			if !isKind(f, typeVLAN) || int(binary.BigEndian.Uint16(f[14:])) != 42 {
				continue
			}
			p, ok := parseIP(payloadOf(f))
			if !ok || p.proto != protoTCP || len(p.payload) <= 20 {
				continue
			}
			if checkSums {
				checkInnerSum(t, f)
			}
			copy(got[min(len(got), int(binary.BigEndian.Uint32(p.payload[4:]))-1):], p.payload[20:])
		}
		return bytes.Equal(got, content)
	})
}

// checkBulkBroadcast hands over several datagrams for many as one.
func checkBulkBroadcast(t *testing.T, s *segBed) {
	to := netip.MustParseAddrPort("10.60.0.255:6666")
	var all []*capture
	for _, c := range s.all()[1:] {
		all = append(all, c.capture(t, "eth0"))
	}
	c := s.a.dialBroadcast(t, to)
	setAny(t, c, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000)
	content := pattern(9, 5000)
	_, err := c.Write(content)
	must(t, err)
	for _, seen := range all {
		for i := range 5 {
			part := content[i*1000 : i*1000+1000]
			f := seen.await(t, "a datagram for all", containing(part))
			if len(f) != 14+28+1000 {
				t.Errorf("a datagram came to %s as a frame of %d bytes", seen.name, len(f))
			}
			if n := seen.count(containing(part)); n != 1 {
				t.Errorf("a datagram came %d times to %s", n, seen.name)
			}
		}
	}
}

// setAny sets an option of a socket.
func setAny(t testing.TB, c syscall.Conn, level, option, value int) {
	t.Helper()
	rc, err := c.SyscallConn()
	must(t, err)
	failed := errors.New("not run")
	must(t, rc.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), level, option, value) }))
	must(t, failed)
}
