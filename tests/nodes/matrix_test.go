// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// A matrix is four networks with a container each, and which of them may open flows to which others. Two such
// topologies, A and B, are in force in turn; what they have in common is in matrixAlways.

// pair is who opens flows, and to whom: networks 0 to 3.
type pair [2]int

var (
	matrixAlways = pair{0, 1}
	matrixA      = []pair{matrixAlways, {1, 2}, {2, 3}, {3, 0}, {2, 0}}
	matrixB      = []pair{matrixAlways, {2, 1}, {3, 2}, {0, 3}, {0, 2}}
	matrixPairs  = func() (all []pair) {
		for i := range 4 {
			for j := range 4 {
				if i != j {
					all = append(all, pair{i, j})
				}
			}
		}
		return all
	}()
)

func matrixNetwork(i int) string { return fmt.Sprint("m", i) }

// matrixTables are the networks, with the peerings of these pairs.
func matrixTables(pairs ...pair) string {
	var text strings.Builder
	text.WriteString("[conntrack]\nmax = 262144\n")
	for i := range 4 {
		fmt.Fprintf(&text, "[network.%s]\ntype = \"l3\"\nid = %d\nsubnets = [\"10.5%d.0.0/16\", \"fd5%[3]d::/48\"]\n", matrixNetwork(i), 110+i, i)
	}
	for _, p := range pairs {
		fmt.Fprintf(&text, "[[peering]]\nfrom = %q\nto = %q\n", matrixNetwork(p[0]), matrixNetwork(p[1]))
	}
	return text.String()
}

// Numbers of the probes.
const (
	matrixPort  = 1000 // where they go
	matrixKnown = 900  // where those on established flows come from; the others have a new port each
	matrixFirst = 1024
	matrixSets  = 2 // one on new flows, one on known ones
)

// perRound is how many probes are sent back to back.
var perRound = len(matrixPairs) * matrixSets

// maxRounds bounds a matrix; each round needs a new port.
const maxRounds = 60000

// matrix sends probes for all pairs in a fixed order from one thread, bound to one processor: what is sent later is decided
// later.
type matrix struct {
	from, to [4]*container
	out      [4]*sender
	mac      [4][6]byte
	sent     atomic.Int64  // probes so far: the index of the next
	arrived  []atomic.Bool // by index
	answered []atomic.Bool // those of matrixAlways
	stop     chan struct{} // nothing more is sent
	over     chan struct{} // nothing more is read
	done     sync.WaitGroup
	read     sync.WaitGroup
}

// startMatrix begins to send a round every millisecond, fewer where processors are slow.
func startMatrix(t *testing.T, from, to [4]*container) *matrix {
	t.Helper()
	m := &matrix{from: from, to: to, stop: make(chan struct{}), over: make(chan struct{}), arrived: make([]atomic.Bool, maxRounds*perRound), answered: make([]atomic.Bool, maxRounds*perRound)}
	for i, c := range from {
		m.out[i], m.mac[i] = c.sender(t, "eth0"), c.mac(t, "eth0")
		for _, a := range to[i].addresses() {
			u := to[i].listenUDP(t, netip.AddrPortFrom(a, matrixPort))
			enlarge(t, u)
			go m.receive(u)
		}
	}
	m.readAnswers(t, from[matrixAlways[0]])
	m.done.Go(func() { m.send(t) })
	t.Cleanup(m.end)
	return m
}

func (m *matrix) end() {
	select {
	case <-m.stop:
	default:
		close(m.stop)
	}
	m.done.Wait()
	close(m.over)
	m.read.Wait()
}

// enlarge gives a socket room for what comes while nobody reads.
func enlarge(t *testing.T, u *net.UDPConn) {
	t.Helper()
	raw, err := u.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20) }))
	must(t, err)
}

// send runs until the matrix ends.
func (m *matrix) send(t *testing.T) {
	runtime.LockOSThread() // and never unlocks: the thread ends with its binding
	if err := bindToOne(); err != nil {
		t.Error(err)
		return
	}
	tick := time.NewTicker(time.Second / time.Duration(floodRate()))
	defer tick.Stop()
	for round := range maxRounds {
		select {
		case <-m.stop:
			return
		case <-tick.C:
		}
		for set := range matrixSets {
			for i := range matrixPairs {
				if err := m.probe(round, set, i); err != nil {
					t.Errorf("probe %v of round %d: %v", matrixPairs[i], round, err)
					return
				}
				m.sent.Add(1)
			}
		}
	}
	t.Errorf("%d rounds were not enough", maxRounds)
}

// bindToOne keeps the calling thread on the first processor that it may use.
func bindToOne() error {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("read the processors: %w", err)
	}
	for cpu := range 1024 {
		if all.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("bind the sender to a processor: %w", err)
	}
	return nil
}

// probe sends one datagram with its index; the families take turns.
func (m *matrix) probe(round, set, i int) error {
	from, to := matrixPairs[i][0], matrixPairs[i][1]
	a := m.to[to].addresses()[round%2]
	source := netip.AddrPortFrom(m.from[from].like(a), uint16(matrixFirst+round))
	if set == 1 {
		source = netip.AddrPortFrom(source.Addr(), matrixKnown)
	}
	index := binary.BigEndian.AppendUint32([]byte("probe"), uint32((round*matrixSets+set)*len(matrixPairs)+i))
	d := udp(source, netip.AddrPortFrom(a, matrixPort), index)
	_, err := unix.Write(m.out[from].fd, ethernet(plan.GatewayMAC, m.mac[from], etherType(a), ip(source.Addr(), a, protoUDP, 64, d)))
	return err
}

// receive notes what arrives, and answers on the flows that are always allowed.
func (m *matrix) receive(u *net.UDPConn) {
	b := make([]byte, 100)
	for {
		n, from, err := u.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		index, ok := parseProbe(b[:n], "probe")
		if err != nil || !ok {
			continue
		}
		m.arrived[index].Store(true)
		if matrixPairs[index%len(matrixPairs)] == matrixAlways {
			u.WriteToUDPAddrPort(append([]byte("reply"), b[5:n]...), from)
		}
	}
}

func parseProbe(b []byte, word string) (int, bool) {
	if len(b) != 9 || string(b[:5]) != word {
		return 0, false
	}
	index := int(binary.BigEndian.Uint32(b[5:]))
	return index, index < maxRounds*perRound
}

// readAnswers notes the answers as they come in at a container.
func (m *matrix) readAnswers(t *testing.T, c *container) {
	fd := c.packetSocket(t, "eth0", unix.ETH_P_ALL)
	m.read.Go(func() {
		defer unix.Close(fd)
		b := make([]byte, 2048)
		for {
			n, _, err := unix.Recvfrom(fd, b, 0)
			if index, ok := parseProbe(b[max(n-9, 0):max(n, 0)], "reply"); err == nil && ok {
				m.answered[index].Store(true)
			}
			select {
			case <-m.over:
				return
			default:
			}
		}
	})
}

// goOn waits until some rounds have been sent.
func (m *matrix) goOn(t *testing.T, rounds int) {
	t.Helper()
	until := m.sent.Load() + int64(rounds*perRound)
	for end := time.Now().Add(patience); m.sent.Load() < until; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the probes have stopped")
		}
	}
}

// side is the topology in force, as a probe shows it.
type side int

const (
	sideA side = iota
	sideB
)

func (s side) String() string { return string("AB"[s]) }

// sides has what passes by each.
var sides = [2]map[pair]bool{sideA: allowed(matrixA), sideB: allowed(matrixB)}

func allowed(pairs []pair) map[pair]bool {
	all := map[pair]bool{}
	for _, p := range pairs {
		all[p] = true
	}
	return all
}

// change is a time in which the side in force may become another one.
type change struct {
	begin, end int64 // probes sent before, and until it was over
	to         side  // that is in force at the end
	most       int   // how often it may change
}

// during notes a change.
func (m *matrix) during(to side, most int, f func()) change {
	c := change{begin: m.sent.Load(), to: to, most: most}
	f()
	c.end = m.sent.Load() + 1 // the next one may be on its way
	return c
}

// check ends the matrix and holds what every single probe has shown against the sides: one at each instant, none that was
// to pass lost, none through that was not, the side changed only while it might, and no more often.
func (m *matrix) check(t *testing.T, now side, changes []change) {
	t.Helper()
	close(m.stop)
	m.done.Wait()
	sent := int(m.sent.Load())
	m.settle(t, sent)
	switches, last := 0, -1
	count := map[string]int{}
	for i := range sent {
		p, got := matrixPairs[i%len(matrixPairs)], m.arrived[i].Load()
		a, b := sides[sideA][p], sides[sideB][p]
		switch {
		case a != b:
		case got == a:
			continue
		case got:
			count["through that neither side allows"]++
			continue
		default:
			count["lost that both sides allow"]++
			continue
		}
		shows := sideB
		if got == a {
			shows = sideA
		}
		for len(changes) > 0 && int64(last) >= changes[0].end {
			now, switches, changes = m.pass(t, now, switches, changes)
		}
		if shows != now {
			switches++
			if len(changes) == 0 || int64(i+perRound) < changes[0].begin {
				t.Fatalf("probe %d, %v of round %d, shows %s while %s is in force%s", i, p, i/perRound, shows, now, m.rounds(i))
			}
			if switches > changes[0].most {
				t.Fatalf("probe %d, %v of round %d, shows %s: the %d. change of what is in force, while one topology is put in the place of another: a mix%s", i, p, i/perRound, shows, switches, m.rounds(i))
			}
			now = shows
		}
		last = i
	}
	for what, n := range count {
		t.Errorf("%d of %d probes %s", n, sent, what)
	}
	t.Logf("%d probes", sent)
}

// rounds shows the rounds about a probe: for each probe the side that it shows, "." where both say the same, and "!" where none does.
func (m *matrix) rounds(about int) string {
	var text strings.Builder
	for round := max(about/perRound-3, 0); round <= about/perRound+3; round++ {
		fmt.Fprintf(&text, "\nround %d ", round)
		for i := round * perRound; i < (round+1)*perRound && i < len(m.arrived); i++ {
			p, got := matrixPairs[i%len(matrixPairs)], m.arrived[i].Load()
			a, b := sides[sideA][p], sides[sideB][p]
			switch {
			case a != b && got == a:
				text.WriteByte('A')
			case a != b:
				text.WriteByte('B')
			case got == a:
				text.WriteByte('.')
			default:
				text.WriteByte('!')
			}
		}
	}
	return text.String()
}

// pass leaves a change behind.
func (m *matrix) pass(t *testing.T, now side, switches int, changes []change) (side, int, []change) {
	t.Helper()
	if now != changes[0].to {
		t.Fatalf("after probe %d %s is in force, not %s", changes[0].end, now, changes[0].to)
	}
	return now, 0, changes[1:]
}

// settle waits until the last probes and answers have come, and counts those that did not.
func (m *matrix) settle(t *testing.T, sent int) {
	t.Helper()
	lost := func() (n int) {
		for i := range sent {
			if matrixPairs[i%len(matrixPairs)] == matrixAlways && !m.answered[i].Load() {
				n++
			}
		}
		return n
	}
	for end := time.Now().Add(patience / 10); lost() > 0 && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	if n := lost(); n > 0 {
		t.Errorf("%d of %d probes on flows that are always allowed have no answer", n, sent/len(matrixPairs))
	}
	seen, same := -1, 0
	until(t, "the last probes have come", func() bool {
		now := 0
		for i := range sent {
			if m.arrived[i].Load() {
				now++
			}
		}
		if same++; now != seen {
			seen, same = now, 0
		}
		return same > 5
	})
}

// applies is how often a topology is put in the place of the other.
func applies() int {
	if inVM {
		return 6
	}
	return 24
}

// matrixBed is nodes with a container of each network, and the texts of A and B, and of all peerings of both.
type matrixBed struct {
	*bed
	at   [2][4]*container // by node
	text [2]string
	both string
}

func newMatrixBed(t *testing.T, nodes int) *matrixBed {
	t.Helper()
	options := func(pairs ...pair) bedOptions { return bedOptions{nodes: nodes, networks: matrixTables(pairs...)} }
	m := &matrixBed{text: [2]string{options(matrixA...).topology(), options(matrixB...).topology()}}
	union := options(append(append([]pair{}, matrixA...), matrixB[1:]...)...)
	m.both = union.topology()
	m.bed = newBed(t, options(matrixA...))
	for i, n := range m.nodes {
		for j := range 4 {
			m.at[i][j] = n.run(t, fmt.Sprint(n.host, "m", j), matrixNetwork(j))
		}
		settle(t, m.at[i][:]...)
	}
	return m
}

// TestReloadUnderTraffic puts two topologies in each other's place while probes run between all networks: at every
// instant exactly one of them holds.
func TestReloadUnderTraffic(t *testing.T) {
	takesLong(t)
	t.Run("one node", func(t *testing.T) {
		b := newMatrixBed(t, 1)
		checkReloads(t, b, b.nodes[0], b.at[0], b.at[0])
	})
	t.Run("sender's node", func(t *testing.T) {
		b := newMatrixBed(t, 2)
		b.nodes[1].apply(b.both) // which leaves the decision to the other
		checkReloads(t, b, b.nodes[0], b.at[0], b.at[1])
	})
	t.Run("receiver's node", func(t *testing.T) {
		b := newMatrixBed(t, 2)
		b.nodes[0].apply(b.both)
		checkReloads(t, b, b.nodes[1], b.at[0], b.at[1])
	})
}

// checkReloads applies A and B in turn at one node, with TCP connections that both allow.
func checkReloads(t *testing.T, b *matrixBed, n *node, from, to [4]*container) {
	streams := []*stream{startStream(t, from[0], to[1], 0), startStream(t, from[0], to[1], 1)}
	m := startMatrix(t, from, to)
	m.goOn(t, 20)
	var changes []change
	var took time.Duration
	for i := range applies() {
		next := side((i + 1) % 2)
		changes = append(changes, m.during(next, 1, func() { took += n.apply(b.text[next]).Took }))
		m.goOn(t, 20)
	}
	m.check(t, sideA, changes)
	for _, s := range streams {
		s.check(t)
	}
	t.Logf("%d topologies applied, %s each", applies(), took/time.Duration(applies()))
}

// TestKilledWhileApplying kills the agent at any moment of an Apply, and starts the next one with either topology: at every
// instant one of the two holds.
func TestKilledWhileApplying(t *testing.T) {
	takesLong(t)
	b := newMatrixBed(t, 1)
	n, all := b.nodes[0], b.at[0]
	streams := []*stream{startStream(t, all[0], all[1], 0), startStream(t, all[0], all[1], 1)}
	m := startMatrix(t, all, all)
	m.goOn(t, 20)
	var changes []change
	now, cut := sideA, 0
	for i := range rounds() {
		wanted, next := 1-now, side(rand.IntN(2))
		changes = append(changes, m.during(next, 3, func() {
			if killApplying(n, b.text[wanted], time.Duration(rand.IntN(1+i*3000))*time.Microsecond) {
				cut++
			}
			b.topology = b.text[next]
			n.start()
		}))
		now = next
		m.goOn(t, 20)
	}
	m.check(t, sideA, changes)
	for _, s := range streams {
		s.check(t)
	}
	t.Logf("of %d agents %d were killed before they said that the topology was applied", rounds(), cut)
	if cut == 0 {
		t.Error("no agent was killed while it applied a topology")
	}
}

// killApplying kills the agent some time after it was told to apply a topology, and says whether it had not ended that yet.
func killApplying(n *node, text string, after time.Duration) bool {
	done := make(chan error, 1)
	go func() {
		_, err := n.agent.call(order{Do: "apply", Topology: text})
		done <- err
	}()
	time.Sleep(after)
	n.agent.kill()
	return <-done != nil
}
