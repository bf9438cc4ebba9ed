// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"time"
)

// A connection asks with one byte: one more like this, or the last of the sample.
const (
	askMore = 'm'
	askLast = 'l'
)

// serveConnections answers one byte on each connection and closes it, up to the one that says it is the last.
func serveConnections(addr netip.AddrPort, _ time.Duration, ready func()) (tally, error) {
	l, err := listen(addr)
	if err != nil {
		return tally{}, err
	}
	defer l.close()
	ready()
	buf := make([]byte, 1)
	start := time.Now()
	for n := uint64(1); ; n++ {
		s, err := l.accept()
		if err != nil {
			return tally{}, err
		}
		err = echo(s, buf)
		s.close()
		if err != nil {
			return tally{}, err
		}
		if buf[0] == askLast {
			return tally{n, time.Since(start)}, nil
		}
	}
}

// sendConnections counts connect, ask, answer, close.
func sendConnections(addr netip.AddrPort, length time.Duration, _ func()) (tally, error) {
	start := time.Now()
	var n uint64
	for time.Since(start) < length {
		if err := askOnce(addr, askMore); err != nil {
			return tally{}, err
		}
		n++
	}
	t := tally{n, time.Since(start)}
	return t, askOnce(addr, askLast)
}

func askOnce(addr netip.AddrPort, what byte) error {
	s, err := dialWith(addr, socket.tune)
	if err != nil {
		return err
	}
	defer s.close()
	return ask(s, []byte{what})
}
