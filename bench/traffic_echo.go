// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"net/netip"
	"time"
)

// warmUp is the number of transactions before the clock starts: neighbours resolved, window open.
const warmUp = 200

// serveEcho sends back what one connection brings, until it ends.
func serveEcho(addr netip.AddrPort, _ time.Duration, ready func()) (tally, error) {
	s, err := acceptOne(addr, ready, socket.tune)
	if err != nil {
		return tally{}, err
	}
	defer s.close()
	buf := make([]byte, 64)
	start := time.Now()
	for n := uint64(0); ; n++ {
		err := echo(s, buf)
		if errors.Is(err, io.EOF) {
			return tally{n, time.Since(start)}, nil
		}
		if err != nil {
			return tally{}, err
		}
	}
}

func echo(s socket, buf []byte) error {
	n, err := s.read(buf)
	if err != nil {
		return err
	}
	_, err = s.write(buf[:n])
	return err
}

// sendEcho counts round trips of one byte on one connection.
func sendEcho(addr netip.AddrPort, length time.Duration, _ func()) (tally, error) {
	s, err := dialWith(addr, socket.tune)
	if err != nil {
		return tally{}, err
	}
	defer s.close()
	buf := make([]byte, 1)
	for range warmUp {
		if err := ask(s, buf); err != nil {
			return tally{}, err
		}
	}
	start := time.Now()
	var n uint64
	for time.Since(start) < length {
		if err := ask(s, buf); err != nil {
			return tally{}, err
		}
		n++
	}
	return tally{n, time.Since(start)}, nil
}

func ask(s socket, buf []byte) error {
	if _, err := s.write(buf); err != nil {
		return err
	}
	_, err := s.read(buf)
	return err
}
