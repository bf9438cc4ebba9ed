// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// verdict is what `lace trace --json` prints of an event, as far as these tests compare it.
type verdict struct {
	Node, Verdict, Reason, Stage string
	Container, Name, Network     string
	FromNode                     string `json:"from_node"`
	ToContainer                  string `json:"to_container"`
	ToName                       string `json:"to_name"`
	ToNetwork                    string `json:"to_network"`
	ToNode                       string `json:"to_node"`
	SID                          string
	Line                         int
	Flow                         struct {
		Protocol string
		Src, Dst netip.Addr
	}
}

// question is what a flow is, but for the port that its sender takes.
type question struct {
	protocol string
	src, dst netip.Addr
}

func (q question) String() string { return fmt.Sprintf("%s %s > %s", q.protocol, q.src, q.dst) }

func (v verdict) question() question { return question{v.Flow.Protocol, v.Flow.Src, v.Flow.Dst} }

// watcher follows lace trace on a node.
type watcher struct {
	*node
	mu    sync.Mutex
	lines []string
	end   func()
	done  chan struct{}
}

// watch starts lace trace and returns when it listens.
func (n *node) watch(args ...string) *watcher {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{node: n, done: make(chan struct{})}
	cmd := command(ctx, n.exec(append([]string{"lace", "trace", "--json"}, args...)...)...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	w.end = sync.OnceFunc(func() { cancel(); <-w.done })
	n.t.Cleanup(w.end)
	said := bufio.NewScanner(stderr)
	listens := said.Scan() && strings.Contains(said.Text(), "as they come")
	go func() {
		defer close(w.done)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			w.mu.Lock()
			w.lines = append(w.lines, lines.Text())
			w.mu.Unlock()
		}
		_ = cmd.Wait() // it was told to end
	}()
	if !listens {
		n.t.Fatalf("lace trace on %s says %q", n.host, said.Text())
	}
	return w
}

func (w *watcher) text() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.lines)
}

func (w *watcher) all() (seen verdicts) {
	w.t.Helper()
	seen.t = w.t
	for _, line := range w.text() {
		var v verdict
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			w.t.Fatalf("lace trace on %s printed %s: %v", w.host, line, err)
		}
		seen.all = append(seen.all, v)
	}
	return seen
}

// sees waits for an event.
func (w *watcher) sees(what string, is func(v verdict) bool) {
	w.t.Helper()
	w.eventually("lace trace on "+w.host+" shows "+what, func() error {
		if seen := w.all(); !slices.ContainsFunc(seen.all, is) {
			return fmt.Errorf("it shows\n%s", strings.Join(w.text(), "\n"))
		}
		return nil
	})
}

// sawUntil ends it when all events before now were told, and returns them. A guest of the node sends a packet that is
// refused, as a mark: events keep their order.
func (w *watcher) sawUntil(g *guest) verdicts {
	w.t.Helper()
	mark := netip.MustParseAddr("10.99.0.1")
	w.eventually("lace trace on "+w.host+" shows the mark", func() error {
		g.tryIn("ping -q -c 1 -W 1 " + mark.String())
		for _, v := range w.all().all {
			if v.Flow.Dst == mark {
				return nil
			}
		}
		return errors.New("it does not")
	})
	w.end()
	return w.all()
}

// verdicts are all that were told of a node.
type verdicts struct {
	t   *testing.T
	all []verdict
}

func (s verdicts) of(q question) (found []verdict) {
	for _, v := range s.all {
		if v.question() == q {
			found = append(found, v)
		}
	}
	return found
}

// first is the first verdict about a flow, of at least one.
func (s verdicts) first(q question) verdict {
	s.t.Helper()
	if found := s.of(q); len(found) > 0 {
		return found[0]
	}
	s.t.Errorf("no verdict about %v", q)
	return verdict{}
}

// only wants this verdict about the flow, once, and none about its answers.
func (s verdicts) only(q question, want verdict) {
	s.t.Helper()
	s.each(q, want)
	if found := s.of(q); len(found) > 1 {
		s.t.Errorf("%d verdicts about %v: %+v", len(found), q, found)
	}
	if strings.HasPrefix(q.protocol, "icmp") {
		s.none(question{q.protocol, q.dst, q.src})
	}
}

// each wants this verdict about the flow, and no other. There may be several: TCP tries again.
func (s verdicts) each(q question, want verdict) {
	s.t.Helper()
	s.first(q)
	for _, got := range s.of(q) {
		if got.Flow = want.Flow; got != want {
			s.t.Errorf("verdict about %v:\n%+v, want\n%+v", q, got, want)
		}
	}
}

func (s verdicts) none(q question) {
	s.t.Helper()
	if found := s.of(q); len(found) > 0 {
		s.t.Errorf("verdicts about %v: %+v", q, found)
	}
}

// tracked is what `lace conntrack --json` prints of a flow, as far as these tests compare it.
type tracked struct {
	Protocol, State          string
	Src, Dst                 netip.Addr
	SrcPort                  uint16 `json:"src_port"`
	DstPort                  uint16 `json:"dst_port"`
	Container, Name, Network string
	FromNode                 string `json:"from_node"`
	ToContainer              string `json:"to_container"`
	ToName                   string `json:"to_name"`
	ToNetwork                string `json:"to_network"`
	ToNode                   string `json:"to_node"`
	SID, File                string
	Line                     int
	Sent, Answered           amount
}

type amount struct{ Packets, Bytes uint64 }

// is compares all but the amounts, which have to be there.
func (f tracked) is(t *testing.T, want tracked) {
	t.Helper()
	if f.Sent.Packets < 3 || f.Answered.Packets < 2 || f.Sent.Bytes < 40*f.Sent.Packets {
		t.Errorf("amounts of %+v", f)
	}
	f.Sent, f.Answered = want.Sent, want.Answered
	if f != want {
		t.Errorf("flow\n%+v, want\n%+v", f, want)
	}
}

// tracked are the flows that the node knows.
func (n *node) tracked(filter ...string) (all []tracked) {
	n.t.Helper()
	out := n.must(append([]string{"lace", "conntrack", "--json"}, filter...)...)
	for line := range strings.Lines(out) {
		var f tracked
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			n.t.Fatalf("lace conntrack printed %s: %v", line, err)
		}
		all = append(all, f)
	}
	return all
}

// counted is what `lace conntrack count --json` prints.
type counted struct {
	Flows, Entries, Max int
	By                  map[string]map[string]int
}

func (n *node) count(filter ...string) (c counted) {
	n.t.Helper()
	out := n.must(append([]string{"lace", "conntrack", "count", "--json"}, filter...)...)
	if err := json.Unmarshal([]byte(out), &c); err != nil || c.Max == 0 {
		n.t.Fatalf("lace conntrack count printed %s: %v", out, err)
	}
	return c
}

// explained is what `lace explain --json` prints, as far as these tests compare it.
type explained struct {
	From            struct{ Name, Network, Node string }
	Verdict, Reason string
	Line            struct {
		File, Text string
		Line       int
	}
	Way   *struct{ Container, Node, SID string }
	Steps []struct{ Stage string }
	Next  string
	Notes []string
}

func (n *node) explains(from string, to netip.Addr, protocol string) (x explained) {
	n.t.Helper()
	target := to.String() + "/icmp"
	if protocol != "icmp" {
		target = netip.AddrPortFrom(to, 80).String() + "/" + protocol
	}
	out := n.must("lace", "explain", "--json", "--from", from, "--to", target)
	if err := json.Unmarshal([]byte(out), &x); err != nil || len(x.Steps) == 0 {
		n.t.Fatalf("lace explain printed %s: %v", out, err)
	}
	return x
}

// agrees compares an explanation with the verdict on a real packet.
func (x explained) agrees(t *testing.T, v verdict) {
	t.Helper()
	node, sid, container := "", "", ""
	if x.Way != nil {
		node, sid = x.Way.Node, x.Way.SID
		container, _, _ = strings.Cut(x.Way.Container, " ")
	}
	if x.Verdict != v.Verdict || x.Reason != v.Reason || x.Line.Line != v.Line || node != v.ToNode || sid != v.SID || container != v.ToName || x.From.Name != v.Name {
		t.Errorf("lace explain says\n%+v, the packet was\n%+v", x, v)
	}
	if x.Line.Line != 0 && !strings.HasPrefix(x.Line.Text, "[") {
		t.Errorf("line %d is shown as %q", x.Line.Line, x.Line.Text)
	}
}

// name is that of the guest's network and node, see serve.
func (g *guest) name() string { return g.prefix[len(g.prefix)-1] }

// conversation is a TCP connection over which a guest says one number after the other, and hears each of them again.
type conversation struct {
	*guest
	to   netip.Addr
	dir  string // its files in the guest
	told int    // a number that was heard
}

var conversations int

// talk opens a connection to the echo server at an address, and returns when it goes.
func (g *guest) talk(to netip.Addr) *conversation {
	g.t.Helper()
	conversations++
	c := &conversation{guest: g, to: to, dir: fmt.Sprintf("/tmp/talk%d", conversations)}
	g.in(`mkdir %[1]s; cd %[1]s; { i=0
		until [ -e end ]; do [ -e pause ] || { i=$((i+1)); echo $i; }; usleep 20000; done | tee said | nc %[2]s 7 >heard 2>err; echo $? >status
		} </dev/null >/dev/null 2>&1 &`, c.dir, to)
	c.goesOn()
	return c
}

func (c *conversation) file(name string) string {
	c.t.Helper()
	return c.in("cat %s/%s 2>/dev/null || :", c.dir, name)
}

// heard is the last number that came back.
func (c *conversation) heard() int {
	c.t.Helper()
	lines := strings.Fields(c.file("heard"))
	if len(lines) == 0 {
		return 0
	}
	last, err := strconv.Atoi(lines[len(lines)-1])
	if err != nil {
		return len(lines) // it is being written
	}
	return last
}

// pause says nothing more until goesOn, and returns when all that was said was heard.
func (c *conversation) pause() {
	c.t.Helper()
	c.in("touch %s/pause", c.dir)
	before := ""
	c.eventually("the conversation pauses", func() error {
		said := c.file("said")
		quiet := said == before && c.file("heard") == said
		if before = said; !quiet {
			return errors.New("it does not")
		}
		return nil
	})
}

// goesOn wants ten more numbers than were heard before.
func (c *conversation) goesOn() {
	c.t.Helper()
	c.in("rm -f %s/pause", c.dir)
	c.eventually(fmt.Sprintf("the conversation of %v with %s goes on", c.guest, c.to), func() error {
		if heard := c.heard(); heard < c.told+10 {
			return fmt.Errorf("%d was heard, %d before; nc: %s %s", heard, c.told, c.file("status"), c.file("err"))
		}
		return nil
	})
	c.told = c.heard()
}

// end closes the connection, and wants everything that was said.
func (c *conversation) end() {
	c.t.Helper()
	c.in("touch %s/end", c.dir)
	c.eventually("the conversation ends", func() error {
		if c.file("status") != "0" {
			return fmt.Errorf("status %q, nc: %s", c.file("status"), c.file("err"))
		}
		return nil
	})
	if said, heard := c.file("said"), c.file("heard"); said != heard || said == "" {
		c.t.Errorf("of %v with %s: said\n%s\nheard\n%s", c.guest, c.to, said, heard)
	}
}

// flow is what the node knows of a conversation.
func (n *node) flow(c *conversation) tracked {
	n.t.Helper()
	found := n.tracked("--container", map[bool]string{true: c.name(), false: ""}[n.host == c.host], "--address", c.to.String(), "--port", "7", "--state", "established")
	if len(found) != 1 {
		n.t.Fatalf("%s knows %d flows of the conversation with %s: %+v", n.host, len(found), c.to, found)
	}
	return found[0]
}
