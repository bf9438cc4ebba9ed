// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ICMP echo, by family.
const (
	echoRequest4, echoReply4 = 8, 0
	echoRequest6, echoReply6 = 128, 129
)

var echoes atomic.Uint32

// pinger is a raw ICMP socket.
type pinger struct {
	net.PacketConn
	dst netip.Addr
	id  uint16
}

// newPinger opens a socket in the namespace; a zone is the name of an interface there. It closes with the test.
func (n *namespace) newPinger(dst netip.Addr) (*pinger, error) {
	if zone := dst.Zone(); zone != "" { // by its number: names are those of the test's own namespace
		l, err := n.LinkByName(zone)
		if err != nil {
			return nil, err
		}
		dst = dst.WithZone(strconv.Itoa(l.Attrs().Index))
	}
	p := &pinger{dst: dst, id: uint16(echoes.Add(1))}
	network, any := "ip4:icmp", "0.0.0.0"
	if dst.Is6() {
		network, any = "ip6:ipv6-icmp", "::"
	}
	err := n.do(func() (err error) {
		p.PacketConn, err = net.ListenPacket(network, any)
		return err
	})
	return p, err
}

// send sends one request. size is that of the payload behind the 8 bytes of the header.
func (p *pinger) send(seq uint16, size int) error {
	b := make([]byte, 8+size)
	b[0] = echoRequest4
	if p.dst.Is6() {
		b[0] = echoRequest6
	}
	binary.BigEndian.PutUint16(b[4:], p.id)
	binary.BigEndian.PutUint16(b[6:], seq)
	for i := range b[8:] {
		b[8+i] = byte(i)
	}
	if p.dst.Is4() {
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	_, err := p.WriteTo(b, &net.IPAddr{IP: p.dst.AsSlice(), Zone: p.dst.Zone()})
	return err
}

// receive returns the sequence number of the next reply to this pinger.
func (p *pinger) receive(deadline time.Time) (uint16, error) {
	b := make([]byte, 65536)
	for {
		if err := p.SetReadDeadline(deadline); err != nil {
			return 0, err
		}
		n, from, err := p.ReadFrom(b)
		if err != nil {
			return 0, err
		}
		source, _ := netip.ParseAddr(from.String())
		if n < 8 || source.WithZone("").Unmap() != p.dst.WithZone("") || b[0] != echoReply4 && b[0] != echoReply6 || binary.BigEndian.Uint16(b[4:]) != p.id {
			continue
		}
		return binary.BigEndian.Uint16(b[6:]), nil
	}
}

// ping sends one echo request and waits for its reply.
func (n *namespace) ping(dst netip.Addr, size int, wait time.Duration) error {
	p, err := n.newPinger(dst)
	if err != nil {
		return err
	}
	defer p.Close()
	if err := p.send(1, size); err != nil {
		return err
	}
	_, err = p.receive(time.Now().Add(wait))
	return err
}

// onePing is how long a ping that should succeed may take before the next try.
const onePing = 500 * time.Millisecond

// reaches polls until a ping comes back.
func (n *namespace) reaches(t testing.TB, dst netip.Addr) {
	t.Helper()
	until(t, fmt.Sprintf("%s pings %s", n.name, dst), func() bool { return n.ping(dst, 56, onePing) == nil })
}

// listenUDP opens a socket in the namespace; it closes with the test.
func (n *namespace) listenUDP(t testing.TB, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	network := "udp6"
	if at.Addr().Is4() {
		network = "udp4"
	}
	must(t, n.do(func() (err error) {
		c, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

// echoUDP answers every datagram with itself, behind a word.
func (n *namespace) echoUDP(t testing.TB, a netip.Addr, word string) netip.AddrPort {
	t.Helper()
	return n.echoUDPAt(t, netip.AddrPortFrom(a, 0), word)
}

// echoUDPAt is echoUDP at a port.
func (n *namespace) echoUDPAt(t testing.TB, at netip.AddrPort, word string) netip.AddrPort {
	t.Helper()
	c := n.listenUDP(t, at)
	go func() {
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				c.WriteToUDPAddrPort(append([]byte(word), b[:n]...), from)
			}
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// dialUDP opens a connected socket in the namespace; it closes with the test.
func (n *namespace) dialUDP(t testing.TB, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	must(t, n.do(func() (err error) {
		c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

// ask sends a datagram and returns the answer.
func ask(c *net.UDPConn, payload []byte, wait time.Duration) ([]byte, error) {
	if _, err := c.Write(payload); err != nil {
		return nil, err
	}
	if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	b := make([]byte, 65536)
	n, err := c.Read(b)
	return b[:n], err
}

// gets polls until the answer to a datagram comes, and returns it.
func (n *namespace) gets(t testing.TB, to netip.AddrPort, payload []byte) []byte {
	t.Helper()
	c := n.dialUDP(t, to)
	var got []byte
	until(t, fmt.Sprintf("%s gets %d bytes back from %s", n.name, len(payload), to), func() (ok bool) {
		var err error
		got, err = ask(c, payload, onePing)
		return err == nil
	})
	return got
}

// pattern is the content of transfers: len bytes of a seed.
func pattern(seed uint64, size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// listenTCP serves connections, one goroutine each, until the test ends.
func (n *namespace) listenTCP(t testing.TB, a netip.Addr, handle func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	return n.serveTCP(t, netip.AddrPortFrom(a, 0), handle)
}

// serveTCP is listenTCP at a port.
func (n *namespace) serveTCP(t testing.TB, at netip.AddrPort, handle func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	var l *net.TCPListener
	must(t, n.do(func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go handle(c)
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// digest answers a connection with the hash of all that came.
func digest(c *net.TCPConn) {
	defer c.Close()
	h := sha256.New()
	if _, err := io.Copy(h, c); err == nil {
		c.Write(h.Sum(nil))
	}
}

// dialTCP connects in the namespace; change may set options before that.
func (n *namespace) dialTCP(t testing.TB, to netip.AddrPort, change func(fd int) error) (*net.TCPConn, error) {
	t.Helper()
	d := net.Dialer{Timeout: patience, Control: func(_, _ string, c syscall.RawConn) (err error) {
		if change != nil {
			c.Control(func(fd uintptr) { err = change(int(fd)) })
		}
		return err
	}}
	var c net.Conn
	err := n.do(func() (err error) {
		c, err = d.DialContext(context.Background(), "tcp", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// transfer sends size bytes by TCP and compares what the other side says it got.
func (n *namespace) transfer(t testing.TB, to netip.AddrPort, size int) {
	t.Helper()
	if err := n.tryTransfer(t, to, size); err != nil {
		t.Fatalf("transfer of %d bytes from %s to %s: %v", size, n.name, to, err)
	}
}

func (n *namespace) tryTransfer(t testing.TB, to netip.AddrPort, size int) error {
	c, err := n.dialTCP(t, to, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	content := pattern(7, size)
	if _, err := c.Write(content); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if want := sha256.Sum256(content); err == nil && !bytes.Equal(got, want[:]) {
		err = fmt.Errorf("the content came as %x, want %x", got, want)
	}
	return err
}

// tcpInfo is the kernel's account of a connection.
func tcpInfo(c *net.TCPConn) (info *unix.TCPInfo, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if failed := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); failed != nil {
		return nil, failed
	}
	return info, err
}

// setOption sets an option of a socket for IPv4 or IPv6, after its address.
func setOption(t testing.TB, c syscall.Conn, a netip.Addr, option4, option6, value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	must(t, err)
	var failed error
	must(t, raw.Control(func(fd uintptr) {
		if a.Is4() {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, option4, value)
		} else {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, option6, value)
		}
	}))
	must(t, failed)
}

// family names a subtest.
func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

func title(parts ...string) string { return strings.Join(parts, "-") }
