// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// owned is the kind of traffic in which each flow says its number and wants it back, twice: the second time, when all are open, an
// answer that is taken for another flow's is seen.
const owned = "owned"

// ownedWait bounds the wait for an answer, of which a busy machine may lose one.
const ownedWait = 500 * time.Millisecond

// ownedPatience bounds the whole exchange.
const ownedPatience = time.Minute

// exchangeOwned opens so many flows to one server, half of them from each pod, by the same ports, and makes sure that all are answered.
func (b *bed) exchangeOwned(ctx context.Context, family, flows int) error {
	ctx, cancel := context.WithTimeout(ctx, ownedPatience)
	defer cancel()
	at := b.addr[family].String()
	server, err := startServer(ctx, nil, []string{"serve", "--netns", string(b.server), "--metric", owned, "--addr", at})
	if err != nil {
		return err
	}
	if err := b.askOwned(ctx, at, flows/len(b.pod)); err != nil {
		cancel() // nothing more will reach the server
		_, served := server.finish()
		return errors.Join(err, served)
	}
	_, err = server.finish()
	return err
}

// askOwned lets the second pod open its flows when those of the first are open, and both ask again when all are.
func (b *bed) askOwned(ctx context.Context, at string, flows int) error {
	var owners [len(b.pod)]*server
	var release [len(b.pod)]func() error
	for i, pod := range b.pod {
		in, out, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("make a pipe to the owner of flows: %w", err)
		}
		defer in.Close()
		defer out.Close()
		release[i] = out.Close
		owners[i], err = startServer(ctx, in, []string{owned, "--netns", string(pod), "--addr", at, "--first", fmt.Sprint(i * flows), "--flows", fmt.Sprint(flows)})
		if err != nil {
			return err
		}
	}
	for i, o := range owners {
		if err := release[i](); err != nil {
			return fmt.Errorf("let flows be asked again: %w", err)
		}
		if _, err := o.finish(); err != nil {
			return err
		}
	}
	return nil
}

// serveOwned sends back what comes, until each owner has sent something empty.
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
	start, buf, asked := time.Now(), make([]byte, 64), uint64(0)
	for owners := len(new(bed).pod); owners > 0; {
		size, from, err := unix.Recvfrom(int(s), buf, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return tally{}, fmt.Errorf("receive: %w", err)
		case size == 0:
			owners--
		default:
			asked++
			if err := unix.Sendto(int(s), buf[:size], 0, from); err != nil {
				return tally{}, fmt.Errorf("answer: %w", err)
			}
		}
	}
	return tally{asked, time.Since(start)}, nil
}

// runOwned is a role of this binary: many flows from one network namespace. It says "ready" when all have been answered, and has all ask again
// when its input ends. One process of them has fewer sockets than most systems let it have.
func runOwned(args []string) error {
	fs := flag.NewFlagSet(owned, flag.ContinueOnError)
	netns := fs.String("netns", "", "`name` of the network namespace")
	addr := fs.String("addr", "", "`address` of the server")
	first := fs.Uint64("first", 0, "`number` of the first flow")
	flows := fs.Int("flows", 0, "`count`")
	if err := fs.Parse(args); err != nil {
		return asUsage(err)
	}
	to, err := netip.ParseAddr(*addr)
	if err != nil {
		return usageError{err}
	}
	runtime.LockOSThread()
	if err := enter(*netns); err != nil {
		return err
	}
	t, err := askOwned(netip.AddrPortFrom(to, trafficPort), *first, *flows)
	if err != nil {
		return fmt.Errorf("%s in %s at %s: %w", owned, *netns, to, err)
	}
	return json.NewEncoder(os.Stdout).Encode(t)
}

// askOwned has all flows ask in turn, and once more when they may.
func askOwned(to netip.AddrPort, first uint64, flows int) (tally, error) {
	start := time.Now()
	sockets, err := openOwned(to, flows)
	if err != nil {
		return tally{}, err
	}
	if err := askAll(sockets, first); err != nil {
		return tally{}, err
	}
	fmt.Println("ready")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return tally{}, fmt.Errorf("wait to ask again: %w", err)
	}
	if err := askAll(sockets, first); err != nil {
		return tally{}, err
	}
	_, err = unix.Write(int(sockets[0]), nil)
	return tally{uint64(flows), time.Since(start)}, err
}

func askAll(sockets []socket, first uint64) error {
	for i, s := range sockets {
		if err := s.askOwn(first + uint64(i)); err != nil {
			return fmt.Errorf("flow %d: %w", first+uint64(i), err)
		}
	}
	return nil
}

// openOwned makes the sockets, bound to ports from firstOwn on.
func openOwned(to netip.AddrPort, flows int) ([]socket, error) {
	if err := allowSockets(uint64(flows) + 64); err != nil {
		return nil, err
	}
	var sockets []socket
	for i := range flows {
		s, err := openOwn(firstOwn+uint16(i), to)
		if err != nil {
			return nil, err
		}
		sockets = append(sockets, s)
	}
	return sockets, nil
}

// allowSockets raises the limit where it is lower.
func allowSockets(count uint64) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read how many sockets are allowed: %w", err)
	}
	limit.Cur, limit.Max = max(limit.Cur, count), max(limit.Max, count)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("allow %d sockets (ulimit -n): %w", count, err)
	}
	return nil
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
			return fmt.Errorf("was answered what flow %d had asked", binary.BigEndian.Uint64(got[:]))
		}
		return nil
	}
	return errors.New("was not answered: its answers went elsewhere, or were lost")
}
