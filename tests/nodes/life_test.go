// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// flood is pings at a fixed rate whose replies are counted.
type flood struct {
	p    *pinger
	stop chan struct{}
	done sync.WaitGroup
	sent int
	got  atomic.Int64
}

// floodRate is in pings a second.
func floodRate() int {
	if inVM {
		return 100
	}
	return 1000
}

func startFlood(t *testing.T, from *container, to netip.Addr) *flood {
	t.Helper()
	p, err := from.newPinger(to)
	must(t, err)
	if c, ok := p.PacketConn.(*net.IPConn); ok {
		must(t, c.SetReadBuffer(4<<20))
	}
	f := &flood{p: p, stop: make(chan struct{})}
	f.done.Go(func() { f.send(t) })
	go f.receive()
	t.Cleanup(func() { p.Close() })
	return f
}

func (f *flood) send(t *testing.T) {
	tick := time.NewTicker(time.Second / time.Duration(floodRate()))
	defer tick.Stop()
	for {
		select {
		case <-f.stop:
			return
		case <-tick.C:
		}
		if err := f.p.send(uint16(f.sent), 56); err != nil {
			t.Errorf("ping %d: %v", f.sent, err)
			return
		}
		f.sent++
	}
}

func (f *flood) receive() {
	for {
		if _, err := f.p.receive(time.Now().Add(time.Hour)); err != nil {
			return
		}
		f.got.Add(1)
	}
}

// check ends the flood and holds that every ping came back.
func (f *flood) check(t *testing.T) {
	t.Helper()
	close(f.stop)
	f.done.Wait()
	for end := time.Now().Add(patience / 10); int(f.got.Load()) < f.sent && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if got := int(f.got.Load()); got != f.sent || got == 0 {
		t.Errorf("%d of %d pings to %s came back", got, f.sent, f.p.dst)
	} else {
		t.Logf("%d pings to %s, none lost", got, f.p.dst)
	}
}

// stream is one TCP connection that always sends, at a modest rate, and whose echo is compared.
type stream struct {
	c     *net.TCPConn
	stop  chan struct{}
	ended chan error
	bytes int64
}

func startStream(t *testing.T, from, to *container, at int) *stream {
	t.Helper()
	return startStreamTo(t, from.namespace, to.listenTCP(t, to.addresses()[at], func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) }))
}

// startStreamTo is startStream to a server that sends everything back.
func startStreamTo(t *testing.T, from *namespace, server netip.AddrPort) *stream {
	t.Helper()
	c, err := from.dialTCP(t, server, nil)
	must(t, err)
	s := &stream{c: c, stop: make(chan struct{}), ended: make(chan error, 1)}
	go func() { s.ended <- s.run() }()
	t.Cleanup(func() { c.Close() })
	return s
}

func (s *stream) run() error {
	back := make([]byte, 4000)
	for seed := uint64(0); ; seed++ {
		select {
		case <-s.stop:
			return nil
		default:
		}
		out := pattern(seed, len(back))
		if _, err := s.c.Write(out); err != nil {
			return err
		}
		if err := s.c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := io.ReadFull(s.c, back); err != nil {
			return fmt.Errorf("after %d bytes: %w", s.bytes, err)
		}
		if !slices.Equal(out, back) {
			return errors.New("the echo is another one")
		}
		s.bytes += int64(len(out))
		time.Sleep(time.Millisecond)
	}
}

// check ends the stream and holds that nothing was lost: the kernel did not send anything twice.
func (s *stream) check(t *testing.T) {
	t.Helper()
	close(s.stop)
	if err := <-s.ended; err != nil {
		t.Errorf("stream: %v", err)
	}
	info, err := tcpInfo(s.c)
	must(t, err)
	if info.Total_retrans > 0 && !inVM { // a slow machine's timers run out by themselves
		t.Errorf("%d segments had to be sent again", info.Total_retrans)
	}
	t.Logf("%d bytes there and back", s.bytes)
}

// TestAgentComesAndGoes stops, kills and replaces both agents and their programs under traffic, which must not notice.
func TestAgentComesAndGoes(t *testing.T) {
	takesLong(t)
	b := newBed(t, bedOptions{nodes: 2})
	x, y := b.nodes[0].run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	local := b.nodes[0].run(t, "local", "backend")
	checkPings(t, x, y, local)
	before := b.nodes[0].holdings()
	floods := []*flood{startFlood(t, x, y.port.V4), startFlood(t, x, y.port.V6), startFlood(t, x, local.port.V4)}
	streams := []*stream{startStream(t, x, y, 0), startStream(t, y, x, 1)}
	for range 2 {
		for _, n := range b.nodes {
			n.stop() // an agent that ends, and the next one's programs take the place of its own
			n.start()
			n.agent.kill()
			n.start()
		}
	}
	for _, f := range floods {
		f.check(t)
	}
	for _, s := range streams {
		s.check(t)
	}
	if after := b.nodes[0].holdings(); !slices.Equal(before, after) {
		t.Errorf("before:\n%q\nafter:\n%q", before, after)
	}
	again := x.port
	if x.attach(t, "backend"); x.port != again {
		t.Errorf("attached again as %+v, was %+v", x.port, again)
	}
	checkPings(t, x, y, local)
}

// rounds is how often the agent is killed.
func rounds() int {
	if inVM {
		return 6
	}
	return 20
}

// TestKilledAtAnyMoment kills the agent while it starts and while it attaches, and looks at what is there afterwards.
func TestKilledAtAnyMoment(t *testing.T) {
	takesLong(t)
	b := newBed(t, bedOptions{nodes: 2})
	n := b.nodes[0]
	x, y := n.run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	checkPings(t, x, y)
	flow := startFlood(t, x, y.port.V4)
	all := []*container{x}
	for i := range rounds() {
		c := n.newContainer(t, fmt.Sprint("c", i))
		all = append(all, c)
		killDuring(n, i, c)
		n.launch()
		if i%3 == 0 { // also while it starts
			time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
			n.agent.kill()
			n.launch()
		}
		n.awaitReady()
		if i%2 == 0 {
			c.attach(t, "backend")
		}
	}
	flow.check(t)
	checkConsistent(t, n, all, y)
}

// killDuring kills the agent some time after it was asked to attach a container.
func killDuring(n *node, round int, c *container) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.agent.call(order{Do: "attach", Request: c.request("backend")})
	}()
	time.Sleep(time.Duration(rand.IntN(1+round*1000)) * time.Microsecond)
	n.agent.kill()
	<-done
}

// checkConsistent attaches all containers again, of which some are and some are not, and compares the kernel's
// objects with what that makes.
func checkConsistent(t *testing.T, n *node, all []*container, far *container) {
	t.Helper()
	var live []string
	addresses := map[netip.Addr]bool{}
	for _, c := range all {
		c.attach(t, "backend")
		live = append(live, c.id)
		addresses[c.port.V4], addresses[c.port.V6] = true, true
	}
	if len(addresses) != 2*len(all) {
		t.Errorf("%d containers have %d addresses", len(all), len(addresses))
	}
	_, err := n.agent.call(order{Do: "retain", Live: live})
	must(t, err)
	s := n.status()
	if len(s.Ports) != len(all) || len(s.Endpoints) != 2*len(all) {
		t.Errorf("%d containers, %d ports, %d endpoints", len(all), len(s.Ports), len(s.Endpoints))
	}
	if links := n.portLinks(t); len(links) != len(all) {
		t.Errorf("%d containers, interfaces %q", len(all), links)
	}
	if pins := n.linkPins(); s.Features.TCX && len(pins) != len(all)+1 {
		t.Errorf("%d containers and an uplink, pinned links %q", len(all), pins)
	}
	for _, c := range all {
		c.reaches(t, far.port.V4)
		c.reaches(t, far.port.V6)
	}
}
