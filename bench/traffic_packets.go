// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	packetSize    = 64 // bytes of UDP payload
	sendBatchSize = 32
	recvBatchSize = 64
	socketBuffer  = 8 << 20
	quiet         = 150 * time.Millisecond // without a packet the sample is over
)

// servePackets counts the packets of one sample, which ends when none comes any more. It is the one
// process that runs on another CPU: what it does with a packet is the same for every way that the packet came, and would
// hide the way. The way itself, up to the socket, stays on the sender's CPU.
func servePackets(addr netip.AddrPort, _ time.Duration, ready func()) (tally, error) {
	if err := moveToSink(); err != nil {
		return tally{}, err
	}
	s, err := newSocket(addr, unix.SOCK_DGRAM)
	if err != nil {
		return tally{}, err
	}
	defer s.close()
	if err := s.bind(addr); err != nil {
		return tally{}, err
	}
	if err := unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer); err != nil {
		return tally{}, fmt.Errorf("enlarge the receive buffer: %w", err)
	}
	ready()
	msgs := batch(recvBatchSize, 2048)
	first, err := s.receiveBatch(msgs)
	if err != nil {
		return tally{}, fmt.Errorf("receive the first packet: %w", err)
	}
	tv := unix.NsecToTimeval(int64(quiet))
	if err := unix.SetsockoptTimeval(int(s), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return tally{}, fmt.Errorf("bound the wait for packets: %w", err)
	}
	return countPackets(s, msgs, uint64(first))
}

func countPackets(s socket, msgs []mmsghdr, n uint64) (tally, error) {
	start := time.Now()
	for {
		k, err := s.receiveBatch(msgs)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return tally{n, time.Since(start)}, nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return tally{}, fmt.Errorf("receive packets: %w", err)
		}
		n += uint64(k)
	}
}

// sendPackets sends as fast as it can.
func sendPackets(addr netip.AddrPort, length time.Duration, _ func()) (tally, error) {
	s, err := newSocket(addr, unix.SOCK_DGRAM)
	if err != nil {
		return tally{}, err
	}
	defer s.close()
	if err := unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer); err != nil {
		return tally{}, fmt.Errorf("enlarge the send buffer: %w", err)
	}
	if err := s.connect(addr); err != nil {
		return tally{}, err
	}
	msgs := batch(sendBatchSize, packetSize)
	start := time.Now()
	var n uint64
	for time.Since(start) < length {
		k, err := s.sendBatch(msgs)
		if err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOBUFS) {
			return tally{}, fmt.Errorf("send packets: %w", err)
		}
		n += uint64(k)
	}
	return tally{n, time.Since(start)}, nil
}
