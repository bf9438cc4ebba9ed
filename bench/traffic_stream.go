// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"net/netip"
	"time"
)

// blockSize is what one read or write of a stream moves, as with iperf3.
const blockSize = 128 << 10

// serveStream takes one connection and counts its bytes. The end of the stream is acknowledged with a
// byte, so that the sender's clock runs until all has arrived.
func serveStream(addr netip.AddrPort, _ time.Duration, ready func()) (tally, error) {
	s, err := acceptOne(addr, ready, socket.choose)
	if err != nil {
		return tally{}, err
	}
	defer s.close()
	buf := make([]byte, blockSize)
	start := time.Now()
	for n := uint64(0); ; {
		k, err := s.read(buf)
		if errors.Is(err, io.EOF) {
			_, err := s.write(buf[:1])
			return tally{n, time.Since(start)}, err
		}
		if err != nil {
			return tally{}, err
		}
		n += uint64(k)
	}
}

func sendStream(addr netip.AddrPort, length time.Duration, _ func()) (tally, error) {
	s, err := dialWith(addr, socket.choose)
	if err != nil {
		return tally{}, err
	}
	defer s.close()
	buf := make([]byte, blockSize)
	var n uint64
	start := time.Now()
	for time.Since(start) < length {
		k, err := s.write(buf)
		if err != nil {
			return tally{}, err
		}
		n += uint64(k)
	}
	if err := s.finish(); err != nil {
		return tally{}, err
	}
	_, err = s.read(buf[:1])
	return tally{n, time.Since(start)}, err
}

// acceptOne waits for one connection and sets it up.
func acceptOne(addr netip.AddrPort, ready func(), setUp func(socket) error) (socket, error) {
	l, err := listen(addr)
	if err != nil {
		return -1, err
	}
	defer l.close()
	ready()
	s, err := l.accept()
	if err != nil {
		return -1, err
	}
	if err := setUp(s); err != nil {
		s.close()
		return -1, err
	}
	return s, nil
}

func dialWith(addr netip.AddrPort, setUp func(socket) error) (socket, error) {
	s, err := dial(addr)
	if err != nil {
		return -1, err
	}
	if err := setUp(s); err != nil {
		s.close()
		return -1, err
	}
	return s, nil
}
