// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
)

// peered is the lab of conf/lab/peering.toml with a container of each network on both nodes. Each serves a file of
// its own at port 80, and says at port 7 what it is told.
type peered struct {
	*bed
	text                 string // of the topology
	web1, db1, metrics1  *guest
	web2, db2, metrics2  *guest
	sums                 map[netip.Addr]string // of the file that is served there
	networks             map[netip.Addr]string
	toDB, meeting, ofWeb int // lines: web > db, what is watched, and network web
}

// joined are the networks that may open flows to each other, in this direction.
var joined = map[[2]string]bool{
	{"web", "web"}: true, {"db", "db"}: true, {"metrics", "metrics"}: true,
	{"web", "db"}: true, {"db", "metrics"}: true, {"metrics", "db"}: true,
}

func upPeered(t *testing.T) *peered {
	t.Helper()
	need(t)
	p := &peered{text: shipped(t, "peering.toml"), sums: map[netip.Addr]string{}, networks: map[netip.Addr]string{}}
	p.bed = up(t, p.text)
	for host, guests := range map[string][]**guest{
		"edge-1": {&p.web1, &p.db1, &p.metrics1},
		"edge-2": {&p.web2, &p.db2, &p.metrics2},
	} {
		for i, network := range []string{"web", "db", "metrics"} {
			*guests[i] = p.serve(host, network)
		}
	}
	p.toDB, p.meeting = lineOf(t, p.text, "[[peering]]\nfrom = \"web\""), lineOf(t, p.text, "[[peering]]\nfrom = { watched")
	p.ofWeb = lineOf(t, p.text, "[network.web]")
	return p
}

// in is the same lab seen from a part of the test.
func (p *peered) in(name string, f func(p *peered)) {
	p.t.Helper()
	p.t.Run(name, func(t *testing.T) {
		c := *p
		c.bed = p.with(t)
		c.rebind(&c.web1, &c.db1, &c.metrics1, &c.web2, &c.db2, &c.metrics2)
		f(&c)
	})
}

func (p *peered) guests() []*guest {
	return []*guest{p.web1, p.db1, p.metrics1, p.web2, p.db2, p.metrics2}
}

// serve starts a container named after its network and node: web1 is that of web on edge-1.
func (p *peered) serve(host, network string) *guest {
	p.t.Helper()
	g := p.node(host).nerdctl(network+strings.TrimPrefix(host, "edge-"), "lace.network="+network)
	sum := g.in("head -c 65536 /dev/urandom >/www/file && sha256sum </www/file && httpd -p 80 -h /www")
	g.in("nc -ll -p 7 -e cat </dev/null >/dev/null 2>&1 &")
	for _, a := range g.addresses() {
		p.sums[a], p.networks[a] = sum, network
	}
	return g
}

// lineOf is the number of the line that a text begins at, in the only place that it has.
func lineOf(t *testing.T, whole, text string) int {
	t.Helper()
	before, _, _ := strings.Cut(whole, text)
	if strings.Count(whole, text) != 1 {
		t.Fatalf("%q is not once in the topology:\n%s", text, whole)
	}
	return strings.Count(before, "\n") + 1
}

// gateway is the first address of a guest's block, which tells it of what is refused.
func (g *guest) gateway(six bool) netip.Addr {
	if six {
		return netip.PrefixFrom(g.v6, 64).Masked().Addr().Next()
	}
	return netip.PrefixFrom(g.v4, 24).Masked().Addr().Next()
}

// fetches asks each address for its file by HTTP. The answers are the sums of what came, or why nothing did.
func (g *guest) fetches(to []netip.Addr) map[netip.Addr]string {
	g.t.Helper()
	var line strings.Builder
	for _, a := range to {
		fmt.Fprintf(&line, `echo "%s $(timeout 20 wget -q -O /tmp/got http://%s/file 2>&1 && sha256sum </tmp/got)";`, a, netip.AddrPortFrom(a, 80))
	}
	return g.answers(g.in("%s", line.String()))
}

// pings sends one echo request to each address by the node's ping, which shows ICMP errors. The answers are its words.
func (g *guest) pings(to []netip.Addr) map[netip.Addr]string {
	g.t.Helper()
	var line strings.Builder
	for _, a := range to {
		fmt.Fprintf(&line, `echo "%s $(ping -n -c 1 -W 5 %[1]s 2>&1 | sed -n 2p)";`, a)
	}
	return g.answers(g.must("nsenter", "-t", g.pid(), "-n", "sh", "-c", line.String()))
}

func (g *guest) answers(text string) map[netip.Addr]string {
	g.t.Helper()
	all := map[netip.Addr]string{}
	for line := range strings.Lines(text) {
		word, answer, _ := strings.Cut(strings.TrimSpace(line), " ")
		a, err := netip.ParseAddr(word)
		if err != nil {
			g.t.Fatalf("%v printed %q: %v", g, line, err)
		}
		all[a] = answer
	}
	return all
}

// reaches compares what a guest gets from everybody with what the peerings say.
func (p *peered) reaches(g *guest) {
	p.t.Helper()
	var all []netip.Addr
	for _, other := range p.guests() {
		all = append(all, other.addresses()...)
	}
	fetched, pinged := g.fetches(all), g.pings(all)
	for _, a := range all {
		file, echo := p.sums[a], fmt.Sprintf("64 bytes from %s:", a)
		if !joined[[2]string{p.networks[g.v4], p.networks[a]}] {
			file, echo = refusal(g, a)
		}
		if fetched[a] != file {
			p.t.Errorf("%v fetches from %s in %s: %q, want %q", g, a, p.networks[a], fetched[a], file)
		}
		if !strings.HasPrefix(pinged[a], echo) {
			p.t.Errorf("%v pings %s in %s: %q, want %q", g, a, p.networks[a], pinged[a], echo)
		}
	}
}

// refusal is what wget and ping say of an address that no peering leads to: what ICMP tells them at once.
func refusal(g *guest, to netip.Addr) (wget, ping string) {
	if to.Is6() {
		return "wget: can't connect to remote host: Permission denied",
			fmt.Sprintf("From %s icmp_seq=1 Destination unreachable: Administratively prohibited", g.gateway(true))
	}
	return fmt.Sprintf("wget: can't connect to remote host (%s): No route to host", to),
		fmt.Sprintf("From %s icmp_seq=1 Packet filtered", g.gateway(false))
}

// TestPeeredNetworks looks at what peerings join and keep apart, and at all that tells of it.
func TestPeeredNetworks(t *testing.T) {
	p := upPeered(t)
	p.in("who reaches whom", func(p *peered) {
		for _, g := range p.guests() {
			p.reaches(g)
		}
	})
	p.in("verdicts", (*peered).verdicts)
	p.in("flows", (*peered).flows)
	p.in("counters", (*peered).counters)
	p.in("explanations", (*peered).explanations)
	p.in("without an agent", (*peered).withoutAgent)
	p.in("nothing is left", (*peered).nothingLeft)
	for _, host := range []string{"edge-1", "edge-2"} {
		absent(t, p.node(host).agentLog(), "level=ERROR")
	}
}

// verdicts opens flows of all kinds and wants one verdict for each, on each node that decides.
func (p *peered) verdicts() {
	one, two := p.node("edge-1").watch(), p.node("edge-2").watch()
	p.web1.fetches(p.db2.addresses())
	p.web1.pings(p.db2.addresses())
	p.web1.fetches(p.db1.addresses())
	p.db2.fetches(p.web1.addresses())
	p.metrics2.fetches(p.db1.addresses())
	there, here := one.sawUntil(p.web1), two.sawUntil(p.db2)
	for _, six := range []bool{false, true} {
		web1, db1, db2, metrics2 := p.web1.at(six), p.db1.at(six), p.db2.at(six), p.metrics2.at(six)
		icmp := map[bool]string{false: "icmp", true: "icmp6"}[six]
		sid2, sid1 := "5f00:1ace:2:14:0:6600::", "5f00:1ace:1:14:0:6600::"
		for _, protocol := range []string{"tcp", icmp} {
			flow := question{protocol, web1, db2}
			there.only(flow, verdict{Verdict: "passed", Reason: "encapsulated", Stage: "deliver", Node: "edge-1", SID: sid2, Line: p.toDB,
				Container: "default/" + p.web1.id, Name: "web1", Network: "web", ToNetwork: "db", ToNode: "edge-2"})
			here.only(flow, verdict{Verdict: "passed", Reason: "decapsulated", Stage: "deliver", Node: "edge-2", SID: sid2, Line: p.toDB,
				Network: "web", FromNode: "edge-1", ToContainer: "default/" + p.db2.id, ToName: "db2", ToNetwork: "db"})
		}
		there.only(question{"tcp", web1, db1}, verdict{Verdict: "passed", Reason: "local", Stage: "deliver", Node: "edge-1", Line: p.toDB,
			Container: "default/" + p.web1.id, Name: "web1", Network: "web", ToContainer: "default/" + p.db1.id, ToName: "db1", ToNetwork: "db"})
		here.each(question{"tcp", db2, web1}, verdict{Verdict: "refused", Reason: "no_route", Stage: "route", Node: "edge-2",
			Container: "default/" + p.db2.id, Name: "db2", Network: "db"})
		there.none(question{"tcp", db2, web1})
		here.only(question{"tcp", metrics2, db1}, verdict{Verdict: "passed", Reason: "encapsulated", Stage: "deliver", Node: "edge-2", SID: sid1,
			Line: p.meeting, Container: "default/" + p.metrics2.id, Name: "metrics2", Network: "metrics", ToNetwork: "db", ToNode: "edge-1"})
		there.only(question{"tcp", metrics2, db1}, verdict{Verdict: "passed", Reason: "decapsulated", Stage: "deliver", Node: "edge-1", SID: sid1,
			Line: p.meeting, Network: "metrics", FromNode: "edge-2", ToContainer: "default/" + p.db1.id, ToName: "db1", ToNetwork: "db"})
	}
	p.t.Logf("of edge-1:\n%s", strings.Join(one.text(), "\n"))
}

// at is the guest's address of one family.
func (g *guest) at(six bool) netip.Addr {
	if six {
		return g.v6
	}
	return g.v4
}

// flows holds a connection of each family and looks at what lace conntrack has of them.
func (p *peered) flows() {
	for _, six := range []bool{false, true} {
		c := p.web1.talk(p.db2.at(six))
		one, two := p.node("edge-1"), p.node("edge-2")
		there, here := one.flow(c), two.flow(c)
		same := tracked{Protocol: "tcp", State: "established", Src: p.web1.at(six), Dst: p.db2.at(six), SrcPort: there.SrcPort, DstPort: 7,
			Network: "web", ToNetwork: "db", SID: "5f00:1ace:2:14:0:6600::", File: "/etc/lace/topology.toml", Line: p.toDB}
		want := same
		want.Container, want.Name, want.ToNode = "default/"+p.web1.id, "web1", "edge-2"
		there.is(p.t, want)
		want = same
		want.FromNode, want.ToContainer, want.ToName = "edge-1", "default/"+p.db2.id, "db2"
		here.is(p.t, want)
		port := fmt.Sprint(there.SrcPort)
		for filter, flows := range map[string]int{
			"--state established": 1, "--state new": 0, "--network web": 1, "--network db": 1, "--network metrics": 0, "--proto tcp": 1, "--proto udp": 0,
			"--container web1": 1, "--container db1": 0, "--address " + p.db2.at(six).String(): 1, "--address 10.99.0.1": 0,
		} {
			filter := append(strings.Fields(filter), "--port", port)
			if got := one.tracked(filter...); len(got) != flows {
				p.t.Errorf("lace conntrack %v: %d flows, want %d", filter, len(got), flows)
			}
			if got := one.count(filter...); got.Flows != flows {
				p.t.Errorf("lace conntrack count %v: %d flows, want %d", filter, got.Flows, flows)
			}
		}
		for _, n := range []*node{one, two} {
			if got := n.entries(there.SrcPort); got != 2 {
				p.t.Errorf("%s has %d entries of the flow, want 2", n.host, got)
			}
			n.deletes(c, there.SrcPort)
		}
		c.goesOn()
		c.end()
	}
	out := p.node("edge-1").must("lace", "conntrack", "--network", "db")
	p.t.Logf("of edge-1:\n%s", out)
	contains(p.t, out, "web1 (web) > edge-2 (db)")
}

// deletes takes the connection out of the table, in both directions. It may be back at once, as a flow that is younger.
func (n *node) deletes(c *conversation, port uint16) {
	n.t.Helper()
	c.pause()
	defer c.goesOn()
	if out := n.must("lace", "conntrack", "delete", "--port", fmt.Sprint(port)); out != "deleted 1 flow" {
		n.t.Errorf("lace conntrack delete on %s: %s", n.host, out)
	}
	if got := n.entries(port); got != 0 {
		n.t.Errorf("%s has %d entries of the deleted flow", n.host, got)
	}
}

// entries counts the directions of flows at a port, in the table itself.
func (n *node) entries(port uint16) (found int) {
	n.t.Helper()
	m, done, err := hook.OpenMaps(n.root() + "/sys/fs/bpf/lace")
	if err != nil {
		n.t.Fatal(err)
	}
	defer done()
	table, err := m.OpenFlows()
	if err != nil {
		n.t.Fatal(err)
	}
	defer table.Close()
	err = maps.EachFlow(table, func(f maps.Flow) error {
		if f.Src.Port() == port || f.Dst.Port() == port {
			found++
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

// refusedReasons are those of refusals, of all that these tests come to see.
var refusedReasons = []string{"no_route", "no_endpoint", "multicast", "hop_limit", "neighbour_unknown", "spoofed_address", "dhcp_server", "no_flow", "unknown_mac"}

// traffic is the counters of networks on a node, by network and reason.
func (n *node) traffic() map[string]uint64 {
	n.t.Helper()
	var s struct {
		Traffic []struct {
			Network, Reason string
			ID              int
			Packets         uint64
			Refused         bool
		}
	}
	if err := json.Unmarshal([]byte(n.must("lace", "status", "--json")), &s); err != nil {
		n.t.Fatal(err)
	}
	all := map[string]uint64{}
	for _, c := range s.Traffic {
		if c.Refused != slices.Contains(refusedReasons, c.Reason) {
			n.t.Errorf("%s of %s is shown as refused: %v", c.Reason, c.Network, c.Refused)
		}
		all[c.Network+" "+c.Reason] += c.Packets
	}
	return all
}

// counters sends packets one by one and wants each counted for the network of the container that it concerns.
func (p *peered) counters() {
	one, two := p.node("edge-1"), p.node("edge-2")
	before1, before2 := one.traffic(), two.traffic()
	ten := func(g *guest, to netip.Addr) {
		g.must("nsenter", "-t", g.pid(), "-n", "sh", "-c", fmt.Sprintf("ping -q -n -i 0.01 -c 10 -W 5 %s || :", to))
	}
	ten(p.web1, p.db2.v4)
	ten(p.metrics1, p.db1.v6)
	ten(p.db2, p.web1.v6)
	after1, after2 := one.traffic(), two.traffic()
	for host, want := range map[string]struct {
		before, after map[string]uint64
		grown         map[string]uint64
	}{
		"edge-1": {before1, after1, map[string]uint64{"web encapsulated": 10, "web decapsulated": 10, "metrics local": 10, "db local": 10, "web no_route": 0}},
		"edge-2": {before2, after2, map[string]uint64{"db encapsulated": 10, "db decapsulated": 10, "db no_route": 10, "web encapsulated": 0, "web decapsulated": 0}},
	} {
		for what, packets := range want.grown {
			if got := want.after[what] - want.before[what]; got != packets {
				p.t.Errorf("%s: %s grew by %d, want %d", host, what, got, packets)
			}
		}
	}
}

// asked is a flow that lace explain was asked about before it was opened.
type asked struct {
	from, to *guest // to: nil where nobody has the address
	addr     netip.Addr
	tcp      explained
	icmp     explained
}

// explanations asks what would become of flows, and then opens them: the verdicts are the same.
func (p *peered) explanations() {
	watchers := map[string]*watcher{"edge-1": p.node("edge-1").watch(), "edge-2": p.node("edge-2").watch()}
	var all []asked
	for _, six := range []bool{false, true} {
		for _, a := range []asked{
			{from: p.web1, to: p.db2}, {from: p.web1, to: p.db1}, {from: p.db1, to: p.web1}, {from: p.db2, to: p.web1},
			{from: p.metrics2, to: p.db2}, {from: p.web2, to: p.metrics1}, {from: p.db2, addr: p.db2.at(six).Next().Next()},
		} {
			if a.to != nil {
				a.addr = a.to.at(six)
			}
			a.tcp, a.icmp = a.from.explains(a.from.name(), a.addr, "tcp"), a.from.explains(a.from.name(), a.addr, "icmp")
			a.from.fetches([]netip.Addr{a.addr})
			all = append(all, a)
		}
	}
	seen := map[string]verdicts{"edge-1": watchers["edge-1"].sawUntil(p.web1), "edge-2": watchers["edge-2"].sawUntil(p.db2)}
	for _, a := range all {
		happened := seen[a.from.host].first(question{"tcp", a.from.at(a.addr.Is6()), a.addr})
		a.tcp.agrees(p.t, happened)
		a.icmp.agrees(p.t, happened)
		if a.to != nil && a.to.host != a.from.host && happened.Verdict == "passed" {
			p.asksTheOther(a)
		}
	}
	p.remoteQuestions()
	p.t.Logf("of edge-1:\n%s", p.web1.must("lace", "explain", "--from", "web1", "--to", p.db2.v4.String()+":80/tcp"))
}

// asksTheOther goes on with a question where the first answer leads: at the node that the packet goes to.
func (p *peered) asksTheOther(a asked) {
	from := a.from.at(a.addr.Is6())
	contains(p.t, a.tcp.Next, fmt.Sprintf("%s will be asked: may network %s open flows to %s", a.to.host, p.networks[from], p.networks[a.addr]))
	there := a.to.explains(from.String(), a.addr, "tcp")
	if there.Verdict != "passed" || there.Reason != "decapsulated" || there.Line.Line != a.tcp.Line.Line || there.From.Node != a.from.host ||
		!strings.HasPrefix(there.Way.Container, a.to.name()+" ") {
		p.t.Errorf("%s explains %v > %s: %+v", a.to.host, a.from, a.addr, there)
	}
}

// remoteQuestions asks a node for what no other should send it, where it decides by itself, and for what makes no sense.
func (p *peered) remoteQuestions() {
	for _, six := range []bool{false, true} {
		there := p.web1.explains(p.db2.at(six).String(), p.web1.at(six), "tcp")
		if there.Verdict != "refused" || there.Reason != "no_peering" || there.From.Node != "edge-2" || there.Way != nil {
			p.t.Errorf("edge-1 explains %s > %s: %+v", p.db2.at(six), p.web1.at(six), there)
		}
	}
	for words, want := range map[string]string{
		"--from web9 --to 10.42.1.9:80/tcp":                             `no container of this node has that name or id`,
		"--from web1 --to 10.42.1.9:80":                                 "--to",
		"--from fd41:0:0:1::1 --to [fd42:0:0:2::1]:80/tcp":              "it is the gateway of network web",
		"--from web1 --network db --to " + p.db2.v4.String() + ":1/tcp": "container web1 is in network web, not in db",
	} {
		s := p.node("edge-1").try(append([]string{"lace", "explain"}, strings.Fields(words)...)...)
		if s.status == 0 || !strings.Contains(s.err, want) {
			p.t.Errorf("lace explain %s: status %d, %s; want %q", words, s.status, s.err, want)
		}
	}
}

// withoutAgent kills both agents. Flows go on and are opened, and all that tells of them works.
func (p *peered) withoutAgent() {
	one, two := p.node("edge-1"), p.node("edge-2")
	c := p.web1.talk(p.db2.v6)
	one.killAgent()
	two.killAgent()
	c.goesOn()
	for _, g := range []*guest{p.web1, p.db2} {
		p.reaches(g)
	}
	w := one.watch()
	p.web1.fetches([]netip.Addr{p.db2.v4})
	happened := w.sawUntil(p.web1).first(question{"tcp", p.web1.v4, p.db2.v4})
	said := p.web1.explains("web1", p.db2.v4, "tcp")
	said.agrees(p.t, happened)
	if happened.Name != "web1" || happened.ToNode != "edge-2" || happened.Line != p.toDB {
		p.t.Errorf("without an agent lace trace says %+v", happened)
	}
	contains(p.t, strings.Join(said.Notes, "\n"), "no agent runs")
	f := one.flow(c)
	if f.State != "established" || f.Name != "web1" || f.Line != p.toDB {
		p.t.Errorf("without an agent lace conntrack says %+v", f)
	}
	one.deletes(c, f.SrcPort)
	if s := one.try("lace", "apply"); s.status != 1 || !strings.Contains(s.err, "agent") {
		p.t.Errorf("lace apply without an agent: status %d, %s", s.status, s.err)
	}
	contains(p.t, one.must("lace", "apply", "--dry-run"), "no agent runs, so there is nothing to compare it with")
	one.start()
	two.start()
	c.end()
	p.reaches(p.web1)
}

// nothingLeft takes all containers away, and with them go their flows.
func (p *peered) nothingLeft() {
	for _, g := range p.guests() {
		g.remove()
	}
	for _, n := range []*node{p.node("edge-1"), p.node("edge-2")} {
		n.eventuallyEmpty()
		n.eventually("the flows of "+n.host+" are gone", func() error {
			if left := n.count().Entries; left != 0 {
				return fmt.Errorf("%d entries:\n%s", left, n.must("lace", "conntrack"))
			}
			return nil
		})
	}
}
