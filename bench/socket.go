// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socket is a blocking socket that is read and written by raw system calls. Only one goroutine runs in
// a traffic process, so nothing is lost by not telling the Go scheduler that a call blocks. It has no time limit:
// a timer for each wait would be measured too. The bench ends the whole process where it takes too long.
type socket int

func newSocket(addr netip.AddrPort, kind int) (socket, error) {
	family := unix.AF_INET
	if addr.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make a socket: %w", err)
	}
	return socket(fd), nil
}

func (s socket) close() { _ = unix.Close(int(s)) }

func listen(addr netip.AddrPort) (socket, error) {
	s, err := newSocket(addr, unix.SOCK_STREAM)
	if err != nil {
		return -1, err
	}
	if err := s.bind(addr); err != nil {
		s.close()
		return -1, err
	}
	if err := unix.Listen(int(s), 4096); err != nil {
		s.close()
		return -1, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return s, nil
}

func (s socket) bind(addr netip.AddrPort) error {
	if err := unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fmt.Errorf("allow %s to be used again: %w", addr, err)
	}
	raw, size := rawSockaddr(addr)
	if _, _, errno := unix.RawSyscall(unix.SYS_BIND, uintptr(s), uintptr(unsafe.Pointer(&raw[0])), size); errno != 0 {
		return fmt.Errorf("bind to %s: %w", addr, errno)
	}
	return nil
}

func (s socket) accept() (socket, error) {
	for {
		fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(s), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		switch errno {
		case 0:
			return socket(fd), nil
		case unix.EINTR, unix.ECONNABORTED:
		default:
			return -1, fmt.Errorf("accept: %w", errno)
		}
	}
}

func dial(addr netip.AddrPort) (socket, error) {
	s, err := newSocket(addr, unix.SOCK_STREAM)
	if err != nil {
		return -1, err
	}
	if err := s.connect(addr); err != nil {
		s.close()
		return -1, err
	}
	return s, nil
}

// connect is raw as well: it waits for the other end.
func (s socket) connect(to netip.AddrPort) error {
	raw, size := rawSockaddr(to)
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(s), uintptr(unsafe.Pointer(&raw[0])), size)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return fmt.Errorf("connect to %s: %w", to, errno)
		}
	}
}

// tune sends small writes at once, on a connection by choose.
func (s socket) tune() error {
	if err := unix.SetsockoptInt(int(s), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	return s.choose()
}

// choose takes cubic: bbr paces by its own model of the path and so measures itself.
func (s socket) choose() error {
	if err := unix.SetsockoptString(int(s), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic"); err != nil {
		return fmt.Errorf("choose cubic as congestion control: %w", err)
	}
	return nil
}

// read returns io.EOF at the end of the stream.
func (s socket) read(b []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(s), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return 0, fmt.Errorf("read: %w", errno)
		case n == 0:
			return 0, io.EOF
		default:
			return int(n), nil
		}
	}
}

func (s socket) write(b []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, fmt.Errorf("write: %w", errno)
		}
	}
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [4]byte
}

// batch makes n messages with room for size bytes each.
func batch(n, size int) []mmsghdr {
	msgs := make([]mmsghdr, n)
	for i := range msgs {
		iov := &unix.Iovec{Base: &make([]byte, size)[0]}
		iov.SetLen(size)
		msgs[i].hdr.Iov = iov
		msgs[i].hdr.SetIovlen(1)
	}
	return msgs
}

func (s socket) sendBatch(msgs []mmsghdr) (int, error) {
	return s.mmsg(unix.SYS_SENDMMSG, msgs, 0)
}

func (s socket) receiveBatch(msgs []mmsghdr) (int, error) {
	return s.mmsg(unix.SYS_RECVMMSG, msgs, unix.MSG_WAITFORONE)
}

func (s socket) mmsg(call uintptr, msgs []mmsghdr, flags uintptr) (int, error) {
	n, _, errno := unix.RawSyscall6(call, uintptr(s), uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs)), flags, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// rawSockaddr is struct sockaddr_in or sockaddr_in6, and its size.
func rawSockaddr(a netip.AddrPort) (raw [unix.SizeofSockaddrInet6]byte, size uintptr) {
	binary.BigEndian.PutUint16(raw[2:], a.Port())
	if a.Addr().Is4() {
		binary.NativeEndian.PutUint16(raw[:], unix.AF_INET)
		copy(raw[4:], a.Addr().AsSlice())
		return raw, unix.SizeofSockaddrInet4
	}
	binary.NativeEndian.PutUint16(raw[:], unix.AF_INET6)
	copy(raw[8:], a.Addr().AsSlice())
	return raw, unix.SizeofSockaddrInet6
}

// finish says that nothing more will be written.
func (s socket) finish() error {
	if err := unix.Shutdown(int(s), unix.SHUT_WR); err != nil {
		return fmt.Errorf("end the stream: %w", err)
	}
	return nil
}
