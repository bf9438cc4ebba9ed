// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// capture keeps the frames that pass an interface, in both directions.
type capture struct {
	name   string
	mu     sync.Mutex
	frames [][]byte
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(be16(int(v))) }

// packetSocket opens AF_PACKET on an interface of the namespace.
func (n *namespace) packetSocket(t testing.TB, link string, proto uint16) int {
	t.Helper()
	index := n.link(t, link).Attrs().Index
	fd := -1
	must(t, n.do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(proto), Ifindex: index}))
	}))
	return fd
}

// capture begins to keep what passes an interface, until the test ends.
func (n *namespace) capture(t testing.TB, link string) *capture {
	t.Helper()
	c := &capture{name: link + " of " + n.name}
	fd := n.packetSocket(t, link, unix.ETH_P_ALL)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		c.read(fd, stop)
		unix.Close(fd)
	}()
	t.Cleanup(func() { close(stop); <-stopped })
	return c
}

func (c *capture) read(fd int, stop <-chan struct{}) {
	b, control := make([]byte, 1<<17), make([]byte, 256)
	for {
		select {
		case <-stop:
			return
		default:
		}
		size, aside, _, _, err := unix.Recvmsg(fd, b, control, 0)
		if err != nil {
			if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
				time.Sleep(10 * time.Millisecond) // the interface is down or gone
			}
			continue
		}
		c.mu.Lock()
		c.frames = append(c.frames, withTag(b[:size], control[:aside]))
		c.mu.Unlock()
	}
}

// withTag is a frame with the VLAN tag that the kernel keeps beside it: struct tpacket_auxdata.
func withTag(frame, control []byte) []byte {
	const statusTag, statusType = 1 << 4, 1 << 6
	for _, m := range messages(control) {
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA || len(m.Data) < 20 || len(frame) < 12 {
			continue
		}
		status, kind := binary.NativeEndian.Uint32(m.Data), uint16(typeVLAN)
		if status&statusTag == 0 {
			break
		}
		if status&statusType != 0 {
			kind = binary.NativeEndian.Uint16(m.Data[18:])
		}
		return join(frame[:12], be16(int(kind)), be16(int(binary.NativeEndian.Uint16(m.Data[16:]))), frame[12:])
	}
	return bytes.Clone(frame)
}

func messages(control []byte) []unix.SocketControlMessage {
	all, _ := unix.ParseSocketControlMessage(control) // what the kernel wrote
	return all
}

// all returns the frames so far.
func (c *capture) all() [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.frames[:len(c.frames):len(c.frames)]
}

// count is how many frames match.
func (c *capture) count(match func([]byte) bool) int {
	n := 0
	for _, f := range c.all() {
		if match(f) {
			n++
		}
	}
	return n
}

// await waits for a frame that matches.
func (c *capture) await(t testing.TB, what string, match func([]byte) bool) []byte {
	t.Helper()
	var found []byte
	until(t, fmt.Sprintf("%s passes %s", what, c.name), func() bool {
		for _, f := range c.all() {
			if match(f) {
				found = f
				return true
			}
		}
		return false
	})
	return found
}

// containing matches frames with these bytes in them.
func containing(marker []byte) func([]byte) bool {
	return func(f []byte) bool { return bytes.Contains(f, marker) }
}

// sender injects frames at an interface.
type sender struct{ fd int }

func (n *namespace) sender(t testing.TB, link string) *sender {
	t.Helper()
	s := &sender{n.packetSocket(t, link, 0)}
	t.Cleanup(func() { unix.Close(s.fd) })
	return s
}

func (s *sender) send(t testing.TB, frame []byte) {
	t.Helper()
	if _, err := unix.Write(s.fd, frame); err != nil {
		t.Fatalf("send a frame of %d bytes: %v", len(frame), err)
	}
}
