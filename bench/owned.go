// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// owned is the kind of traffic in which each flow says its number and wants it back.
const owned = "owned"

// ownedPasses are how often each flow asks, all of them open: from the second time on an answer that belongs to another
// flow is seen.
const ownedPasses = 2

// ownedWait bounds the wait for an answer, of which a busy machine may lose one.
const ownedWait = 500 * time.Millisecond

// ownedPatience bounds the whole exchange.
const ownedPatience = time.Minute

// exchangeOwned opens so many flows to one server, spread over both pods, and is how many of them were answered.
func (b *bed) exchangeOwned(ctx context.Context, family, flows int) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, ownedPatience)
	defer cancel()
	at := b.addr[family].String()
	server, err := startServer(ctx, []string{"serve", "--netns", string(b.server), "--metric", owned, "--addr", at})
	if err != nil {
		return 0, err
	}
	got, err := runClient(ctx, []string{owned, "--netns", string(b.pod[0]) + "," + string(b.pod[1]), "--addr", at, "--flows", fmt.Sprint(flows)})
	if err != nil {
		cancel() // nothing more will reach the server
	}
	_, served := server.finish()
	if err != nil || served != nil {
		return 0, errors.Join(err, served)
	}
	if got.Count != uint64(flows) {
		return 0, fmt.Errorf("%d of %d flows were answered", got.Count, flows)
	}
	return int(got.Count), nil
}

// serveOwned sends back what comes, until something is empty.
func serveOwned(addr netip.AddrPort, _ time.Duration, ready func()) (tally, error) {
	s, err := newSocket(addr, unix.SOCK_DGRAM)
	if err != nil {
		return tally{}, err
	}
	defer s.close()
	if err := s.bind(addr); err != nil {
		return tally{}, err
	}
	ready()
	start, buf := time.Now(), make([]byte, 64)
	for n := uint64(0); ; n++ {
		size, from, err := unix.Recvfrom(int(s), buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return tally{}, fmt.Errorf("receive: %w", err)
		}
		if size == 0 {
			return tally{n, time.Since(start)}, nil
		}
		if err := unix.Sendto(int(s), buf[:size], 0, from); err != nil {
			return tally{}, fmt.Errorf("answer: %w", err)
		}
	}
}

// runOwned is a role of this binary: the flows of several network namespaces, which have the same ports in each of them.
func runOwned(args []string) error {
	fs := flag.NewFlagSet(owned, flag.ContinueOnError)
	netns := fs.String("netns", "", "`names` of network namespaces")
	addr := fs.String("addr", "", "`address` of the server")
	flows := fs.Int("flows", 0, "`number`")
	if err := fs.Parse(args); err != nil {
		return asUsage(err)
	}
	to, err := netip.ParseAddr(*addr)
	if err != nil {
		return usageError{err}
	}
	runtime.LockOSThread()
	t, err := askOwned(strings.Split(*netns, ","), netip.AddrPortFrom(to, trafficPort), *flows)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(t)
}

// askOwned has all flows ask in turn, and once more.
func askOwned(netns []string, to netip.AddrPort, flows int) (tally, error) {
	start := time.Now()
	sockets, err := openOwned(netns, to, flows)
	if err != nil {
		return tally{}, err
	}
	for range ownedPasses {
		for i, s := range sockets {
			if err := s.askOwn(uint64(i)); err != nil {
				return tally{}, fmt.Errorf("flow %d of %d: %w", i+1, flows, err)
			}
		}
	}
	_, err = unix.Write(int(sockets[0]), nil)
	return tally{uint64(flows), time.Since(start)}, err
}

// openOwned makes the sockets, in turn in each of the namespaces, all bound to ports from firstOwn on.
func openOwned(netns []string, to netip.AddrPort, flows int) ([]socket, error) {
	limit := unix.Rlimit{Cur: uint64(flows) + 64, Max: uint64(flows) + 64}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("allow %d sockets: %w", flows, err)
	}
	var sockets []socket
	for i, name := range netns {
		if err := enter(name); err != nil {
			return nil, err
		}
		last := flows * (i + 1) / len(netns)
		for port := uint16(firstOwn); len(sockets) < last; port++ {
			s, err := openOwn(port, to)
			if err != nil {
				return nil, err
			}
			sockets = append(sockets, s)
		}
	}
	return sockets, nil
}

func openOwn(port uint16, to netip.AddrPort) (socket, error) {
	s, err := newSocket(to, unix.SOCK_DGRAM)
	if err != nil {
		return -1, err
	}
	any := netip.IPv4Unspecified()
	if to.Addr().Is6() {
		any = netip.IPv6Unspecified()
	}
	tv := unix.NsecToTimeval(int64(ownedWait))
	err = errors.Join(s.bind(netip.AddrPortFrom(any, port)), s.connect(to), unix.SetsockoptTimeval(int(s), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	return s, err
}

// askOwn wants the flow's own number back.
func (s socket) askOwn(number uint64) error {
	var want, got [8]byte
	binary.BigEndian.PutUint64(want[:], number)
	for range tries {
		if _, err := unix.Write(int(s), want[:]); err != nil {
			return fmt.Errorf("ask: %w", err)
		}
		_, err := unix.Read(int(s), got[:])
		if errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for the answer: %w", err)
		}
		if got != want {
			return fmt.Errorf("was answered what flow %d had asked", binary.BigEndian.Uint64(got[:])+1)
		}
		return nil
	}
	return errors.New("was not answered: its answers went elsewhere, or were lost")
}
