// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

const (
	// alsoBack lets db and metrics open flows to web, too.
	alsoBack = "\n[[peering]]\nfrom = { watched = \"yes\" }\nto = \"web\"\n"

	// alsoCache is a network more, which web may use.
	alsoCache = "\n[network.cache]\ntype = \"l3\"\nid = 104\nsubnets = [\"10.44.0.0/16\", \"fd44::/48\"]\n\n[[peering]]\nfrom = \"web\"\nto = \"cache\"\n"

	noRoute4 = "No route to host"
)

// heldTopology is what a node works with.
type heldTopology struct {
	Topology   string
	Generation int
}

func (n *node) topologyHeld() (h heldTopology) {
	n.t.Helper()
	if err := json.Unmarshal([]byte(n.must("lace", "status", "--json")), &h); err != nil {
		n.t.Fatal(err)
	}
	return h
}

// applies makes a text the topology of both nodes and returns what each printed.
func (p *peered) applies(text string) (out []string) {
	p.t.Helper()
	file := p.file("topology.toml", text)
	for _, n := range []*node{p.node("edge-1"), p.node("edge-2")} {
		out = append(out, n.must("lace", "apply", file))
		if now := n.must("cat", "/etc/lace/topology.toml"); now != strings.TrimSpace(text) {
			p.t.Errorf("%s has the topology\n%s", n.host, now)
		}
	}
	return out
}

// fetched wants a container to get the other's file, or to be told that there is no way.
func (p *peered) fetched(from, to *guest, want bool) {
	p.t.Helper()
	for a, got := range from.fetches(to.addresses()) {
		file := p.sums[a]
		if !want {
			file, _ = refusal(from, a)
		}
		if got != file {
			p.t.Errorf("%v fetches from %s: %q, want %q", from, a, got, file)
		}
	}
}

// TestApply changes the topology under traffic. What both the old and the new one allow loses no packet.
func TestApply(t *testing.T) {
	p := upPeered(t)
	stays4, stays6, stream := p.web1.talk(p.db2.v4), p.web1.talk(p.db1.v6), p.web1.stream(p.db2.v6)
	p.in("dry run", (*peered).dryRun)
	p.in("there and back", (*peered).thereAndBack)
	p.in("bad files", (*peered).badFiles)
	p.in("a network comes and goes", (*peered).comesAndGoes)
	p.in("by signal", (*peered).bySignal)
	for _, c := range []*conversation{stays4, stays6} {
		c.goesOn()
		c.end()
	}
	stream()
	p.in("nothing is left", (*peered).nothingLeft)
	if got := strings.Count(p.node("edge-1").agentLog(), "level=ERROR"); got != 1 {
		t.Errorf("the agent of edge-1 logged %d errors, want that of the signal", got)
	}
}

// difference is what alsoBack changes on each node.
const difference = "+ peering db > web 10.41.0.0/16: ids 102 > 101\n+ peering db > web fd41::/48: ids 102 > 101\n" +
	"+ peering metrics > web 10.41.0.0/16: ids 103 > 101\n+ peering metrics > web fd41::/48: ids 103 > 101"

func (p *peered) dryRun() {
	n := p.node("edge-1")
	before := n.topologyHeld()
	file := p.file("topology.toml", p.text+alsoBack)
	if out := n.must("lace", "apply", "--dry-run", file); out != difference {
		p.t.Errorf("lace apply --dry-run prints\n%s\nwant\n%s", out, difference)
	}
	if out := n.must("lace", "apply", "--dry-run"); out != "nothing would change" {
		p.t.Errorf("lace apply --dry-run without a file prints %s", out)
	}
	if after := n.topologyHeld(); after != before {
		p.t.Errorf("before a dry run %+v, then %+v", before, after)
	}
	p.fetched(p.db2, p.web1, false)
}

// thereAndBack opens the other direction for a while. What was opened in it ends with it.
func (p *peered) thereAndBack() {
	p.fetched(p.db2, p.web1, false)
	for i, out := range p.applies(p.text + alsoBack) {
		if !strings.HasPrefix(out, difference+"\ngeneration ") || !strings.Contains(out, " is active, took ") {
			p.t.Errorf("lace apply on node %d prints\n%s", i+1, out)
		}
	}
	p.fetched(p.db2, p.web1, true)
	p.fetched(p.db1, p.web1, true)
	p.fetched(p.metrics2, p.web1, true)
	back, far4, near6 := p.db2.talk(p.web1.v6), p.metrics2.talk(p.web1.v4), p.metrics1.talk(p.web1.v6)
	if out := p.node("edge-1").must("lace", "apply"); out != "nothing changes" {
		p.t.Errorf("lace apply of what holds prints %s", out)
	}
	one, two := p.node("edge-1").watch(), p.node("edge-2").watch()
	p.applies(p.text)
	two.seesTheEnd(back)
	two.seesTheEnd(far4)
	one.seesTheEnd(near6)
	ended := []*conversation{back, far4, near6}
	heard := make([]int, len(ended))
	for i, c := range ended {
		heard[i] = c.heard()
	}
	for _, from := range []*guest{p.db2, p.metrics1, p.metrics2} {
		p.fetched(from, p.web1, false)
	}
	for i, c := range ended {
		if now := c.heard(); now != heard[i] {
			p.t.Errorf("after the end of its flow the conversation with %s went on, from %d to %d", c.to, heard[i], now)
		}
	}
	for _, n := range []*node{p.node("edge-1"), p.node("edge-2")} {
		for _, left := range n.tracked("--network", "metrics", "--port", "7") {
			if left.State != "closed" {
				p.t.Errorf("%s knows %+v", n.host, left)
			}
		}
	}
	for _, c := range ended {
		c.in("touch %s/end; killall nc; nc -ll -p 7 -e cat </dev/null >/dev/null 2>&1 &", c.dir)
	}
}

// seesTheEnd waits for the verdict on a conversation that is not allowed any more. The packet is one of either direction.
func (w *watcher) seesTheEnd(c *conversation) {
	w.t.Helper()
	there, back := question{"tcp", c.at(c.to.Is6()), c.to}, question{"tcp", c.to, c.at(c.to.Is6())}
	w.sees("the end of "+there.String(), func(v verdict) bool {
		return v.Verdict == "ended" && (v.question() == there && v.Reason == "no_route" && v.Name == c.name() || v.question() == back)
	})
}

// badFiles are refused by all errors that lace check has, and nothing changes.
func (p *peered) badFiles() {
	n := p.node("edge-1")
	before, installed := n.topologyHeld(), n.must("cat", "/etc/lace/topology.toml")
	for what, text := range map[string]string{
		"unknown words": strings.NewReplacer("locator-block", "locator-blok", "from = \"web\"", "from = \"wep\"").Replace(p.text),
		"overlap":       strings.Replace(p.text, "10.42.0.0/16", "10.41.0.0/16", 1),
		"no TOML":       "version = \n",
		"another world": strings.NewReplacer("edge-1", "edge-3").Replace(p.text),
	} {
		file := p.file("topology.toml", text)
		status, said := 2, n.try("lace", "check", file).err
		if what == "another world" {
			status, said = 1, "edge-1" // right, but not for this node
		}
		for _, args := range [][]string{{"lace", "apply", file}, {"lace", "apply", "--dry-run", file}} {
			s := n.try(args...)
			if s.status != status || said == "" || !strings.Contains(s.err, said) {
				p.t.Errorf("%s: %v: status %d, %s; want %d and %s", what, args, s.status, s.err, status, said)
			}
		}
	}
	if now := n.must("cat", "/etc/lace/topology.toml"); now != installed || n.topologyHeld() != before {
		p.t.Errorf("after files that are wrong: %+v, then %+v\n%s", before, n.topologyHeld(), now)
	}
	p.fetched(p.web1, p.db2, true)
	p.fetched(p.db2, p.web1, false)
}

// comesAndGoes applies a network more, uses it, and takes it away from under its container.
func (p *peered) comesAndGoes() {
	n := p.node("edge-2")
	n.refused(`network "cache" is not in the topology; there are: db, metrics, web`, nerdctlRun(labels("lace.network=cache"), "--rm", image, "true")...)
	for _, out := range p.applies(p.text + alsoCache) {
		contains(p.t, out, "+ network cache: id 104")
	}
	cache := p.serve("edge-2", "cache")
	p.fetched(p.web1, cache, true)
	p.fetched(p.db2, cache, false)
	p.applies(p.text)
	w := n.watch()
	if out := cache.in("ping -q -c 1 -W 1 %s || :", p.web2.v4); !strings.Contains(out, "100% packet loss") {
		p.t.Errorf("a container of a network that is gone pings %s: %s", p.web2.v4, out)
	}
	w.sees("what it sends", func(v verdict) bool {
		return v.Verdict == "refused" && v.Name == "cache2" && v.Flow.Dst == p.web2.v4
	})
	w.end()
	p.fetched(p.web1, cache, false)
	p.applies(p.text + alsoCache)
	p.fetched(p.web1, cache, true) // the same container again
	cache.remove()
	p.applies(p.text)
}

// bySignal has the agent read the file that somebody else has put there: one that is wrong, and then one that is right.
func (p *peered) bySignal() {
	n := p.node("edge-1")
	before := n.topologyHeld()
	installs := func(text string) {
		n.sh("cp %s /etc/lace/topology.toml && kill -HUP $(cat /run/lab/agent.pid)", p.file("topology.toml", text))
	}
	installs(p.text + "nod = 1\n")
	n.eventually("the agent's log has the error", func() error {
		if log := n.agentLog(); !strings.Contains(log, "the topology is not applied, the one before goes on") || !strings.Contains(log, "unknown key") {
			return errors.New("it has not")
		}
		return nil
	})
	p.fetched(p.db1, p.web1, false)
	p.fetched(p.web1, p.db1, true)
	installs(p.text + alsoBack)
	n.eventually("the signal's topology holds", func() error {
		if got := p.db1.fetches([]netip.Addr{p.web1.v4})[p.web1.v4]; strings.Contains(got, noRoute4) {
			return errors.New(got)
		}
		return nil
	})
	p.fetched(p.db1, p.web1, true)
	p.applies(p.text)
	if after := n.topologyHeld(); after.Topology != before.Topology || after.Generation <= before.Generation {
		p.t.Errorf("before %+v, then %+v", before, after)
	}
	p.fetched(p.db1, p.web1, false)
}
