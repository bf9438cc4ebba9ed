// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/dataplane/trace"
)

// smallest is the least table of flows that there is.
const smallest = "[conntrack]\nmax = 1024\n"

// exchange is one UDP flow on which a question is asked and answered again and again; each may be lost only once.
type exchange struct {
	c     *net.UDPConn
	asked atomic.Int64
	stop  chan struct{}
	ended chan error
}

func startExchange(t *testing.T, from, to *container, at int) *exchange {
	t.Helper()
	return startExchangeTo(t, from.namespace, to.echoUDP(t, to.addresses()[at], ""))
}

// startExchangeTo is startExchange to a server that sends everything back.
func startExchangeTo(t *testing.T, from *namespace, server netip.AddrPort) *exchange {
	t.Helper()
	e := &exchange{c: from.dialUDP(t, server), stop: make(chan struct{}), ended: make(chan error, 1)}
	until(t, "the first question is answered", func() bool { _, err := ask(e.c, []byte("first"), onePing); return err == nil })
	go func() { e.ended <- e.run() }()
	return e
}

func (e *exchange) run() error {
	tick := time.NewTicker(time.Second / time.Duration(floodRate()))
	defer tick.Stop()
	for {
		select {
		case <-e.stop:
			return nil
		case <-tick.C:
		}
		question := binary.BigEndian.AppendUint32(nil, uint32(e.asked.Load()))
		got, err := ask(e.c, question, patience)
		if err != nil {
			return fmt.Errorf("question %d: %w", e.asked.Load(), err)
		}
		if !slices.Equal(got, question) {
			return fmt.Errorf("question %d was answered %x", e.asked.Load(), got)
		}
		e.asked.Add(1)
	}
}

// check ends the exchange and holds that every question was answered, in order.
func (e *exchange) check(t *testing.T) {
	t.Helper()
	close(e.stop)
	if err := <-e.ended; err != nil {
		t.Error(err)
	}
	t.Logf("%d questions answered", e.asked.Load())
}

// synFlood sends SYNs from ever new ports.
type synFlood struct {
	stop chan struct{}
	done sync.WaitGroup
	sent atomic.Int64
}

// startSYNFlood sends to an address where nobody answers, as fast as the rate of floods says times ten.
func startSYNFlood(t *testing.T, from *container, to netip.Addr) *synFlood {
	t.Helper()
	f := &synFlood{stop: make(chan struct{})}
	out, mac := from.sender(t, "eth0"), from.mac(t, "eth0")
	f.done.Go(func() {
		tick := time.NewTicker(10 * time.Second / time.Duration(floodRate()))
		defer tick.Stop()
		for port := uint16(1); ; {
			select {
			case <-f.stop:
				return
			case <-tick.C:
			}
			for range 100 {
				port = port%65535 + 1
				src := netip.AddrPortFrom(from.like(to), port)
				out.send(t, ethernet(plan.GatewayMAC, mac, etherType(to), ip(src.Addr(), to, protoTCP, 64, tcp(src, netip.AddrPortFrom(to, 80), 2, nil))))
				f.sent.Add(1)
			}
		}
	})
	t.Cleanup(f.end)
	return f
}

func (f *synFlood) end() {
	select {
	case <-f.stop:
	default:
		close(f.stop)
	}
	f.done.Wait()
}

// TestSYNFlood fills a small table of flows: what is established goes on, also when it is decided again; what is new is refused by name,
// and passes again soon after the flood.
func TestSYNFlood(t *testing.T) {
	takesLong(t)
	t.Parallel()
	o := bedOptions{nodes: 2, networks: peered, more: smallest}
	b := newBed(t, o)
	n := b.nodes[0]
	web, near, far, bad := n.run(t, "web", "web"), n.run(t, "near", "db"), b.nodes[1].run(t, "far", "db"), n.run(t, "bad", "web")
	settle(t, bad)
	var exchanges []*exchange
	var streams []*stream
	for at, db := range []*container{near, far} {
		exchanges = append(exchanges, startExchange(t, web, db, at))
		streams = append(streams, startStream(t, web, db, 1-at))
	}
	flood := startSYNFlood(t, bad, netip.MustParseAddr("10.42.2.250"))
	until(t, "the table is full", func() bool { return n.counter("conntrack_full") > 100 })
	if _, err := ask(web.dialUDP(t, netip.AddrPortFrom(far.port.V4, 9)), []byte("a new flow"), onePing); err == nil {
		t.Error("a new flow got an answer while the table is full")
	}
	o.more += "[network.another]\ntype = \"l3\"\nid = 500\nsubnets = [\"10.99.0.0/16\"]\n"
	n.apply(o.topology()) // all flows are decided again, in a table with no room
	for _, e := range exchanges {
		goal := e.asked.Load() + 100
		until(t, "known flows go on in the flood", func() bool { return e.asked.Load() >= goal })
	}
	until(t, "the flood goes on for a while", func() bool { return flood.sent.Load() > int64(20*floodRate()) })
	for _, e := range exchanges {
		e.check(t)
	}
	for _, s := range streams {
		s.check(t)
	}
	flood.end()
	sent, full := flood.sent.Load(), n.counter("conntrack_full")
	began := time.Now()
	within(t, "a new flow passes", 2*time.Minute, func() bool { // unanswered flows go early: after 17 s
		return web.ping(far.port.V4, 56, onePing) == nil
	})
	t.Logf("%d SYNs, %d packets of new flows refused; new flows pass %s after the flood", sent, full, time.Since(began))
}

// within is until with a bound of its own.
func within(t *testing.T, what string, bound time.Duration, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(bound); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain: %s", what)
}

// TestResizeUnderTraffic gives the table of flows another size, again and again, while flows over a peering with one direction
// are in use: an answer that is not known would be refused.
func TestResizeUnderTraffic(t *testing.T) {
	takesLong(t)
	sizes := [2]bedOptions{}
	for i, max := range []int{1024, 65536} {
		sizes[i] = bedOptions{nodes: 2, networks: peered, more: fmt.Sprintf("[conntrack]\nmax = %d\n", max)}
	}
	b := newBed(t, sizes[0])
	n := b.nodes[0]
	web, near, far := n.run(t, "web", "web"), n.run(t, "near", "db"), b.nodes[1].run(t, "far", "db")
	var exchanges []*exchange
	var streams []*stream
	for at := range 2 {
		exchanges = append(exchanges, startExchange(t, web, near, at), startExchange(t, web, far, at))
		streams = append(streams, startStream(t, web, near, at), startStream(t, web, far, at))
	}
	for i := range applies() {
		next := sizes[(i+1)%2].topology()
		for _, n := range b.nodes {
			n.apply(next)
		}
		if got, want := n.status().Room, []int{1024, 65536}[(i+1)%2]; got != want {
			t.Errorf("room for %d flows, want %d", got, want)
		}
		if i%8 == 0 { // many idle ones, which do not all fit into the small table
			idle(t, web, far, 3000)
			began := time.Now() // what was seen in the same second is as good as another
			until(t, "the idle ones have been quiet for longer", func() bool { return time.Since(began) > 3*time.Second })
		}
	}
	for _, e := range exchanges {
		e.check(t)
	}
	for _, s := range streams {
		s.check(t)
	}
}

// idle opens flows that nobody answers and that send once.
func idle(t *testing.T, from, to *container, count int) {
	t.Helper()
	out, mac := from.sender(t, "eth0"), from.mac(t, "eth0")
	for i := range count {
		src, dst := netip.AddrPortFrom(from.port.V4, uint16(10000+i)), netip.AddrPortFrom(to.port.V4, 9)
		out.send(t, ethernet(plan.GatewayMAC, mac, typeIPv4, ipv4(src.Addr(), dst.Addr(), protoUDP, 64, udp(src, dst, []byte("idle")))))
	}
}

// verdicts collects the events of a node, as `lace trace` does.
type verdicts struct {
	mu  sync.Mutex
	all []trace.Event
}

func (n *node) verdicts(t *testing.T) *verdicts {
	t.Helper()
	r, err := trace.Open(hook.PinDir(n.bpffs), filepath.Join(t.TempDir(), "lock"))
	must(t, err)
	v := &verdicts{}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- r.Each(ctx, func(e trace.Event) error {
			v.mu.Lock()
			defer v.mu.Unlock()
			v.all = append(v.all, e)
			return nil
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-ended, r.Close()); err != nil {
			t.Error(err)
		}
	})
	return v
}

// about is the last event with a verdict about a socket's flow, in either direction.
func (v *verdicts) about(c net.Conn, verdict bpf.LaceVerdict) (trace.Event, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	a, b := netip.MustParseAddrPort(c.LocalAddr().String()), netip.MustParseAddrPort(c.RemoteAddr().String())
	for _, e := range slices.Backward(v.all) {
		src, dst := netip.AddrPortFrom(e.Flow.Src, e.Flow.SrcPort), netip.AddrPortFrom(e.Flow.Dst, e.Flow.DstPort)
		if e.Verdict == verdict && (src == a && dst == b || src == b && dst == a) {
			return e, true
		}
	}
	return trace.Event{}, false
}

// TestFlowsEnd takes a peering away while flows use it: they end with a verdict that says so, their entries are gone or closed, and
// the sockets are told. When it is back datagrams and new connections pass, while a connection that was ended stays so.
func TestFlowsEnd(t *testing.T) {
	takesLong(t)
	s := newShop(t, "")
	open := s.topology
	shut, _, _ := strings.Cut(open, "[[peering]]")
	told := s.nodes[0].verdicts(t)
	for at := range 2 {
		for name, db := range map[string]*container{"near": s.near, "far": s.far} {
			t.Run(title(name, family(db.addresses()[at])), func(t *testing.T) {
				s.nodes[0].apply(open)
				checkEnds(t, s, db, at, told, open, shut)
			})
		}
	}
}

func checkEnds(t *testing.T, s *shop, db *container, at int, told *verdicts, open, shut string) {
	n, a := s.nodes[0], db.addresses()[at]
	line := strings.Count(open[:strings.Index(open, "[[peering]]")], "\n") + 1
	u := s.web.dialUDP(t, db.echoUDP(t, a, ""))
	stays := startExchange(t, db, s.sameNetwork(t, db), at) // within db, which nothing happens to
	data := startStream(t, s.web, db, at)
	if _, err := ask(u, []byte("one"), patience); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{u, data.c} {
		until(t, "the flow's verdict is told", func() bool {
			e, ok := told.about(c, bpf.LaceVerdictVERDICT_PASSED)
			return ok && e.Line == uint32(line) && e.Network == 101 && e.To == 102
		})
		if f, ok := n.flowOf(c); !ok || !f.Whole || f.Line != uint32(line) || f.To != 102 || f.State != "established" {
			t.Errorf("flow %s to %s is known as %+v", c.LocalAddr(), c.RemoteAddr(), f)
		}
	}
	n.apply(shut)
	if _, err := ask(u, []byte("two"), patience); !errors.Is(err, prohibited(a)) {
		t.Errorf("a datagram on a flow that is not allowed any more: %v, want %v", err, prohibited(a))
	}
	for _, c := range []net.Conn{u, data.c} {
		until(t, "the flow's end is told", func() bool {
			e, ok := told.about(c, bpf.LaceVerdictVERDICT_ENDED)
			return ok && (e.Reason == bpf.LaceReasonREASON_NO_ROUTE || e.Reason == bpf.LaceReasonREASON_NO_PEERING)
		})
		if f, ok := n.flowOf(c); ok && (c != data.c || f.State != "closed") { // a connection stays, to be known as ended
			t.Errorf("flow %s to %s is still known as %+v", c.LocalAddr(), c.RemoteAddr(), f)
		}
	}
	n.apply(open)
	if got, err := ask(u, []byte("three"), patience); err != nil || string(got) != "three" {
		t.Errorf("after the peering is back: %q, %v", got, err)
	}
	before := n.counter("no_flow")
	until(t, "what the connection sends again is refused", func() bool { return n.counter("no_flow") > before })
	s.web.transfer(t, db.listenTCP(t, a, digest), 1000)
	close(data.stop)
	data.c.Close()
	if err := <-data.ended; err == nil {
		t.Error("a connection that was ended went on")
	}
	stays.check(t)
}

// sameNetwork is another container of db, on the node of the first.
func (s *shop) sameNetwork(t *testing.T, db *container) *container {
	t.Helper()
	return db.node.run(t, "other", "db")
}
