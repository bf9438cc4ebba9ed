// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// pair is two containers of one network on one node.
type pair struct {
	*bed
	clsact   bool
	host     [2]netlink.Link
	far      [2]netlink.Link
	farNetns [2]netns.NsHandle
	plan     *plan.Plan
}

func newPair(b *bed, clsact bool) *pair {
	p := &pair{bed: b, clsact: clsact, plan: &plan.Plan{
		Locator:      topology.Locator{Prefix: netip.MustParsePrefix("5f00:1ace:1::/48")},
		LocatorBlock: netip.MustParsePrefix("5f00:1ace::/32"),
		Networks:     []plan.Network{{Name: "backend", ID: 100, BlockBits4: plan.Lengths{24}}},
		Conntrack:    topology.Conntrack{UDPNew: time.Minute, UDP: time.Minute},
		Blocks:       []plan.Block{{Network: 100, Prefix: netip.MustParsePrefix("10.40.1.0/24"), Local: true}},
	}}
	for i := range p.host {
		p.farNetns[i] = newNetns(b.t)
		p.host[i], p.far[i] = b.veth(ifname(i), p.farNetns[i])
		p.plan.Ports = append(p.plan.Ports, plan.Port{HostIf: ifname(i), Gateway4: netip.MustParseAddr("10.40.1.1"),
			Attachment: plan.Attachment{NetworkID: 100, V4: p.addr(i), MAC: plan.MAC(p.far[i].Attrs().HardwareAddr)}})
	}
	return p
}

func (p *pair) addr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 40, 1, byte(10 + i)}) }

// agent is one that starts: it loads, writes the tables and attaches, but does not commit.
func (p *pair) agent() *Hooks {
	p.t.Helper()
	h := p.load(p.clsact)
	_, err := h.Maps().Sync(p.plan, false, p.devices(), nil)
	must(p.t, err)
	return h
}

func (p *pair) devices() map[string]maps.Device {
	out := map[string]maps.Device{}
	for i, l := range p.host {
		out[ifname(i)] = maps.Device{Index: uint32(l.Attrs().Index), MTU: 1460}
	}
	return out
}

func (p *pair) attachAll(h *Hooks) map[int]bool {
	p.t.Helper()
	keep := map[int]bool{}
	for _, l := range p.host {
		keep[l.Attrs().Index] = true
		must(p.t, p.attach(h, l.Attrs().Index, PodL3))
	}
	return keep
}

// frame is a UDP datagram from the first container to the second that carries a number.
func (p *pair) frame(number uint32) []byte {
	b := make([]byte, 14+20+8+4, 64)
	copy(b, plan.GatewayMAC[:])
	copy(b[6:], p.far[0].Attrs().HardwareAddr)
	binary.BigEndian.PutUint16(b[12:], unix.ETH_P_IP)
	ip := b[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], 32)
	src, dst := p.addr(0).As4(), p.addr(1).As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	binary.BigEndian.PutUint16(ip[20:], 1000)
	binary.BigEndian.PutUint16(ip[22:], 2000)
	binary.BigEndian.PutUint16(ip[24:], 12)
	binary.BigEndian.PutUint32(ip[28:], number)
	return b
}

// socket is a packet socket on an end of the pair.
func (p *pair) socket(i int) int {
	p.t.Helper()
	fd := -1
	must(p.t, in(p.t, p.farNetns[i], func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(htons(unix.ETH_P_IP)))
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: p.far[i].Attrs().Index})
	}))
	p.t.Cleanup(func() { unix.Close(fd) })
	must(p.t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
	must(p.t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}))
	return fd
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// stream sends numbered packets until it is stopped, and says which did not arrive.
type stream struct {
	p        *pair
	from, to int
	stopped  chan struct{}
	done     sync.WaitGroup
	sent     uint32
	mu       sync.Mutex
	seen     map[uint32]int
}

func (p *pair) stream() *stream {
	s := &stream{p: p, from: p.socket(0), to: p.socket(1), stopped: make(chan struct{}), seen: map[uint32]int{}}
	s.done.Add(2)
	go s.send()
	go s.receive()
	return s
}

func (s *stream) send() {
	defer s.done.Done()
	tick := time.NewTicker(100 * time.Microsecond)
	defer tick.Stop()
	for {
		select {
		case <-s.stopped:
			return
		case <-tick.C:
		}
		if _, err := unix.Write(s.from, s.p.frame(s.sent)); err != nil {
			s.p.t.Errorf("send packet %d: %v", s.sent, err)
			return
		}
		s.sent++
	}
}

// receive goes on until all is sent and nothing has come for the socket's time-out.
func (s *stream) receive() {
	defer s.done.Done()
	b := make([]byte, 2048)
	for {
		n, err := unix.Read(s.to, b)
		if errors.Is(err, unix.EAGAIN) {
			select {
			case <-s.stopped:
				return
			default:
				continue
			}
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			s.p.t.Errorf("receive: %v", err)
			return
		}
		if n >= 46 && binary.BigEndian.Uint16(b[36:]) == 2000 {
			s.mu.Lock()
			s.seen[binary.BigEndian.Uint32(b[42:])]++
			s.mu.Unlock()
		}
	}
}

func (s *stream) received() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.seen)
}

// flows waits until packets arrive that were sent after now.
func (s *stream) flows(what string) {
	s.p.t.Helper()
	before := s.received()
	until(s.p.t, what, func() bool { return s.received() > before+20 })
}

func (s *stream) end() {
	s.p.t.Helper()
	close(s.stopped)
	s.done.Wait()
	lost, twice := 0, 0
	for i := range s.sent {
		switch s.seen[i] {
		case 0:
			lost++
		case 1:
		default:
			twice++
		}
	}
	s.p.t.Logf("%d packets sent", s.sent)
	if lost > 0 || twice > 0 {
		s.p.t.Errorf("of %d packets %d were lost, %d came twice; counted: %v", s.sent, lost, twice, s.p.counted())
	}
}

// counted reads the counters by the words of their reasons.
func (p *pair) counted() map[string]uint64 {
	p.t.Helper()
	m, done, err := OpenMaps(p.dir)
	must(p.t, err)
	defer done()
	counters, err := m.Counters()
	must(p.t, err)
	out := map[string]uint64{}
	for _, c := range counters {
		out[maps.ReasonName(c.Reason)] = c.Packets
	}
	return out
}

// TestReplaceWithoutLoss upgrades the agent again and again under a stream of packets.
func TestReplaceWithoutLoss(t *testing.T) {
	takesLong(t)
	ways(t, func(t *testing.T, b *bed, clsact bool) {
		p := newPair(b, clsact)
		h := p.agent()
		must(t, h.Commit(p.attachAll(h)))
		s := p.stream()
		s.flows("the first packets")
		for range 5 {
			next := p.agent()
			keep := p.attachAll(next)
			must(t, next.Commit(keep))
			must(t, h.Close())
			h = next
			s.flows("packets after an upgrade")
		}
		must(t, h.Close())
		s.flows("packets without an agent")
		s.end()
	})
}

// TestReplaceAnOlderLayout: an agent whose tables have another shape left its programs attached, with their tables and tail
// calls pinned. They go on until each interface has its new program, and then all of that goes.
func TestReplaceAnOlderLayout(t *testing.T) {
	takesLong(t)
	ways(t, func(t *testing.T, b *bed, clsact bool) {
		p := newPair(b, clsact)
		h := p.agent()
		must(t, h.Commit(p.attachAll(h)))
		must(t, h.Close())
		older := filepath.Join(p.dir, "v2")
		must(t, os.Rename(PinDir(p.dir), older))
		s := p.stream()
		s.flows("packets by the older agent's programs")

		next := p.agent()
		s.flows("packets after the new tables are there")
		must(t, p.attach(next, p.host[0].Attrs().Index, PodL3))
		s.flows("packets while one interface has its new program")
		must(t, next.Commit(p.attachAll(next)))
		must(t, next.Close())
		s.flows("packets by the new programs")
		s.end()
		if _, err := os.Stat(older); !os.IsNotExist(err) {
			t.Errorf("the tables of the older layout are still there: %v", err)
		}
		if got := count(p.pins(), "stages/"); got != 1 {
			t.Errorf("%d tables of tail calls are pinned, want 1: %v", got, p.pins())
		}
	})
}

// TestKilledBetweenSteps leaves off after each step of an upgrade: what a killed agent leaves are its
// pins, its descriptors go. Traffic goes on, and the next agent puts all in order.
func TestKilledBetweenSteps(t *testing.T) {
	takesLong(t)
	steps := map[string]func(p *pair, h *Hooks){
		"loaded":         func(*pair, *Hooks) {},
		"one attached":   func(p *pair, h *Hooks) { must(p.t, p.attach(h, p.host[0].Attrs().Index, PodL3)) },
		"all attached":   func(p *pair, h *Hooks) { p.attachAll(h) },
		"links dropped":  func(p *pair, h *Hooks) { must(p.t, h.dropLinks(p.attachAll(h))) },
		"stages dropped": func(p *pair, h *Hooks) { must(p.t, h.dropOldStages(p.attachAll(h))) },
		"committed":      func(p *pair, h *Hooks) { must(p.t, h.Commit(p.attachAll(h))) },
	}
	for name, step := range steps {
		t.Run(name, func(t *testing.T) {
			ways(t, func(t *testing.T, b *bed, clsact bool) {
				p := newPair(b, clsact)
				h := p.agent()
				must(t, h.Commit(p.attachAll(h)))
				must(t, h.Close())
				s := p.stream()
				s.flows("packets before the upgrade")

				killed := p.agent()
				step(p, killed)
				must(t, killed.Close())
				s.flows("packets after the agent was killed")

				last := p.agent()
				must(t, last.Commit(p.attachAll(last)))
				must(t, last.Close())
				s.flows("packets after the next agent")
				s.end()
				if got := count(p.pins(), "stages/"); got != 1 {
					t.Errorf("%d tables of tail calls are pinned, want 1: %v", got, p.pins())
				}
			})
		})
	}
}

// TestCommitKeepsStagesOfWhatIsBehind: an interface that could not be given the new program goes on
// with the old one.
func TestCommitKeepsStagesOfWhatIsBehind(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	p := newPair(b, false)
	h := p.agent()
	keep := p.attachAll(h)
	must(t, h.Commit(keep))
	must(t, h.Close())
	s := p.stream()

	next := p.agent()
	first := p.host[0].Attrs().Index
	if err := p.attach(next, first, "no_such"); err == nil {
		t.Fatal("a program that is not there was attached")
	}
	must(t, next.Commit(keep))
	s.flows("packets by the old program")
	must(t, p.attach(next, first, PodL3))
	must(t, next.Commit(keep))
	s.flows("packets by the new program")
	s.end()
	if got := count(p.pins(), "stages/"); got != 1 {
		t.Errorf("%d tables of tail calls are pinned, want 1", got)
	}
}
