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
	b := make([]byte, 1<<17)
	for {
		select {
		case <-stop:
			return
		default:
		}
		size, _, err := unix.Recvfrom(fd, b, 0)
		if err != nil {
			if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
				time.Sleep(10 * time.Millisecond) // the interface is down or gone
			}
			continue
		}
		c.mu.Lock()
		c.frames = append(c.frames, bytes.Clone(b[:size]))
		c.mu.Unlock()
	}
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
