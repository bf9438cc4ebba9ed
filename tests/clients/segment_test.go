// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

const (
	storage = "lace.network=storage"

	// nas is the virtual machine that the topology declares on edge-1.
	nasMAC, nasAddress = "52:54:00:00:00:01", "10.50.0.200"
)

// segment is the lab of conf/lab/mixed.toml with containers of its L2 network storage: two on edge-1, one on each other node.
type segment struct {
	*bed
	text                  string // of the topology
	one, near, two, three *guest
}

func upSegment(t *testing.T) *segment {
	t.Helper()
	need(t)
	needPrograms(t, map[string]string{"arping": "iputils-arping", "ndisc6": "ndisc6", "iperf3": "iperf3", "dnsmasq": "dnsmasq-base", "keepalived": "keepalived"})
	s := &segment{text: shipped(t, "mixed.toml")}
	s.bed = up(t, s.text)
	one, two, three := s.node("edge-1"), s.node("edge-2"), s.node("edge-3")
	s.one, s.near = one.nerdctl("one", storage).direct(), one.nerdctl("near", storage).direct()
	s.two, s.three = two.nerdctl("two", storage).direct(), three.nerdctl("three", storage).direct()
	return s
}

// in is the same lab seen from a part of the test.
func (s *segment) in(name string, f func(s *segment)) {
	s.t.Helper()
	s.t.Run(name, func(t *testing.T) {
		c := *s
		c.bed = s.with(t)
		c.rebind(&c.one, &c.near, &c.two, &c.three)
		f(&c)
	})
}

func (s *segment) guests() []*guest { return []*guest{s.one, s.near, s.two, s.three} }

// asMachine is a line of words that run in the guest's network and else see the node: for programs that the image lacks.
func (g *guest) asMachine(words ...string) []string {
	g.t.Helper()
	return append([]string{"nsenter", "-t", g.pid(), "-n"}, words...)
}

// TestSegment looks at one Ethernet segment over three nodes as its containers see it.
func TestSegment(t *testing.T) {
	s := upSegment(t)
	s.in("everybody reaches everybody", (*segment).reachable)
	s.in("neighbours", (*segment).neighbours)
	s.in("labels", (*segment).labels)
	s.in("refusals", (*segment).refusals)
	s.in("throughput", (*segment).throughput)
	s.in("peering", (*segment).peering)
	s.in("verdicts", (*segment).verdicts)
	s.in("without an agent", (*segment).withoutAgent)
	for _, g := range s.guests() {
		g.remove()
	}
	for _, host := range []string{"edge-1", "edge-2", "edge-3"} {
		s.node(host).eventuallyEmpty()
		absent(t, s.node(host).agentLog(), "level=ERROR")
	}
}

func (s *segment) reachable() {
	for _, g := range s.guests() {
		inSegment(g)
		g.ping(s.guests()...)
		for _, other := range []*guest{s.near, s.three} {
			if g != other {
				g.in("ping -q -c 1 -W 5 -I eth0 %s", other.linkLocal())
			}
		}
	}
	transfer(s.one, s.near, s.two)
}

func (g *guest) linkLocal() string {
	g.t.Helper()
	return g.in("ip -o -6 addr show dev eth0 scope link | sed 's|.*inet6 ||; s|/.*||'")
}

// inSegment looks at all that a container of network storage alone sees of it.
func inSegment(g *guest) {
	g.t.Helper()
	number := g.host[len(g.host)-1] - '0'
	pool4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 50, 0, 16 * number}), 28)
	pool6 := netip.MustParsePrefix(fmt.Sprintf("fd50::%d:0/112", number))
	if !pool4.Contains(g.v4) || !pool6.Contains(g.v6) {
		g.t.Errorf("%v is not in the pools %v, %v", g, pool4, pool6)
	}
	contains(g.t, g.in("cat /sys/class/net/eth0/mtu"), "1442")
	contains(g.t, g.in("cat /sys/class/net/eth0/address"), fmt.Sprintf("02:4c:0a:32:00:%02x", g.v4.As4()[3]))
	sees(g, "ip route", "default via 10.50.0.1 dev eth0 onlink", "10.50.0.0/24 dev eth0 scope link src "+g.v4.String())
	sees(g, "ip -6 route | sed 's/ *metric.[0-9]*//' | grep -v ff00::/8", "fd50::/64 dev eth0", "fe80::/64 dev eth0", "default via fd50::1 dev eth0 onlink")
	g.in("ping -q -c 1 -W 5 10.50.0.1 && ping -q -c 1 -W 5 fd50::1")
}

// neighbours asks by ARP and neighbour discovery whose addresses are taken, as one does before taking one.
func (s *segment) neighbours() {
	const gateway = "06:00:6c:61:63:65"
	for target, mac := range map[string]string{
		s.one.v4.String(): s.one.mac(), s.near.v4.String(): s.near.mac(), s.three.v4.String(): s.three.mac(), "10.50.0.1": gateway,
	} {
		said := s.two.try(s.two.asMachine("arping", "-D", "-c", "1", "-w", "5", "-I", "eth0", target)...)
		if said.status != 1 || !strings.Contains(strings.ToLower(said.out), mac) {
			s.t.Errorf("arping -D %s: status %d, want an answer of %s:\n%s", target, said.status, mac, said.out)
		}
	}
	for target, mac := range map[string]string{
		s.one.v6.String(): s.one.mac(), s.three.v6.String(): s.three.mac(), "fd50::1": gateway, s.one.linkLocal(): s.one.mac(),
	} {
		said := s.two.try(s.two.asMachine("ndisc6", "-n", "-q", "-r", "1", "-w", "5000", target, "eth0")...)
		if said.status != 0 || strings.ToLower(said.out) != mac {
			s.t.Errorf("ndisc6 %s: status %d, want an answer of %s:\n%s", target, said.status, mac, said.out)
		}
	}
	s.silence()
}

// silence asks for what nobody has: free addresses here and on another node, a machine that is not there, its own address.
func (s *segment) silence() {
	asked := [][]string{
		{"arping", "-D", "-c", "1", "-w", "1", "-I", "eth0", s.free(s.near.v4)}, {"arping", "-D", "-c", "1", "-w", "1", "-I", "eth0", s.free(s.two.v4)},
		{"arping", "-D", "-c", "1", "-w", "1", "-I", "eth0", nasAddress}, {"arping", "-D", "-c", "1", "-w", "1", "-I", "eth0", s.two.v4.String()},
		{"ndisc6", "-n", "-r", "1", "-w", "1000", s.free(s.three.v6), "eth0"}, {"ndisc6", "-n", "-r", "1", "-w", "1000", s.free(s.two.v6), "eth0"},
	}
	inParallel(len(asked), len(asked), func(i int) {
		said := s.two.try(s.two.asMachine(asked[i]...)...)
		if !strings.Contains(said.out+said.err, map[string]string{"arping": "Received 0 response(s)", "ndisc6": "No response."}[asked[i][0]]) {
			s.t.Errorf("%v: status %d, want silence:\n%s\n%s", asked[i], said.status, said.out, said.err)
		}
	})
	for host, want := range map[string]string{"edge-1": "neighbour_answered", "edge-2": "neighbour_unknown"} {
		if s.node(host).traffic()["storage "+want] == 0 {
			s.t.Errorf("%s has not counted %s", host, want)
		}
	}
}

func (g *guest) mac() string { g.t.Helper(); return g.in("cat /sys/class/net/eth0/address") }

// free is the next address of a pool that nobody has.
func (s *segment) free(a netip.Addr) string {
	taken := append(s.one.addresses(), s.near.addresses()...)
	for slices.Contains(taken, a) || a == s.two.v4 || a == s.two.v6 || a == s.three.v6 {
		a = a.Next()
	}
	return a.String()
}

// labels asks for an address and for a MAC that does not follow from any. Others find it all the same.
func (s *segment) labels() {
	g := s.node("edge-1").ctr("asks", storage, "lace.ip=10.50.0.30,fd50::1:77", "lace.mac=52:54:00:00:00:77")
	if g.v4.String() != "10.50.0.30" || g.v6.String() != "fd50::1:77" || g.mac() != "52:54:00:00:00:77" {
		s.t.Errorf("got %v, %s", g, g.mac())
	}
	g.ping(s.guests()...)
	s.three.ping(g)
	s.near.ping(g)
	g.remove()
}

// refusals wants the very text on the client's terminal.
func (s *segment) refusals() {
	n := s.node("edge-1")
	holder := n.nerdctl("holder", storage, "lace.mac=52:54:00:00:00:99")
	asks := `lace: container asks for network "storage": network storage: `
	for _, tt := range []struct {
		label, want string
	}{
		{"lace.mac=52:54:00:00:00:99", "to network storage: MAC address 52:54:00:00:00:99 is taken by container "},
		{"lace.mac=" + s.three.mac(), "MAC address " + s.three.mac() + " belongs to address " + s.three.v4.String() + " of node edge-3: MACs that begin with 02:4c follow from addresses in an L2 network; ask for another one, or none"},
		{"lace.mac=" + nasMAC, "MAC address " + nasMAC + " is that of endpoint nas-1 at node edge-1: ask for another one, or none"},
		{"lace.ip=10.50.0.1", asks + "address 10.50.0.1 of network storage is the gateway: ask for another one, or none"},
		{"lace.ip=" + nasAddress, asks + "address " + nasAddress + " of network storage is the address of endpoint nas-1: ask for another one, or none"},
		{"lace.ip=" + s.three.v4.String(), asks + "address " + s.three.v4.String() + " is outside 10.50.0.16/28, the pool of network storage on node edge-1"},
		{"lace.net.web.ip=10.41.1.9", `lace: "lace.net.web.ip" is about network "web", which lace.network does not name; it names "storage"`},
	} {
		n.refused(tt.want, nerdctlRun(labels(storage, tt.label), "--rm", image, "true")...)
	}
	refusedByAll(n, []string{storage, "lace.ip=" + holder.v4.String()}, asks+"address "+holder.v4.String()+" is taken by container holder (default/"+holder.id+")")
	holder.remove()
}

// iperf is what of iperf3's result these tests look at.
type iperf struct {
	End struct {
		Received struct {
			Bytes float64
		} `json:"sum_received"`
		Sum struct {
			Bytes float64
			Lost  float64 `json:"lost_percent"`
		}
	}
}

// throughput sends TCP and UDP by iperf3 from node to node and within one, segmentation and all.
func (s *segment) throughput() {
	server := s.one.daemon("iperf3", "-s", "--forceflush")
	server.says("Server listening")
	for _, from := range []*guest{s.three, s.near} {
		for _, to := range s.one.addresses() {
			tcp := from.iperf(to, "-C", "cubic", "-n", "64M")
			if tcp.End.Received.Bytes < 32<<20 { // the end of the test overtakes what is in buffers
				s.t.Errorf("TCP from %v to %s: %+v", from, to, tcp.End)
			}
			udp := from.iperf(to, "-u", "-b", "8M", "-n", "200K", "-w", "1M")
			if udp.End.Sum.Bytes < 200<<10 || udp.End.Sum.Lost > 10 {
				s.t.Errorf("UDP from %v to %s: %+v", from, to, udp.End)
			}
		}
	}
	server.stop()
}

// iperf is a client's run.
func (g *guest) iperf(to netip.Addr, flags ...string) (r iperf) {
	g.t.Helper()
	out := g.must(g.asMachine(append([]string{"iperf3", "-J", "-c", to.String()}, flags...)...)...)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		g.t.Fatalf("iperf3 prints %s: %v", out, err)
	}
	return r
}

// peering lets web open flows to the segment, through the gateway that it declares, and not the other way.
func (s *segment) peering() {
	web := s.node("edge-1").nerdctl("web", "lace.network=web").direct()
	far := s.node("edge-2").nerdctl("far", "lace.network=web").direct()
	transfer(s.three, web)
	transfer(s.near, far)
	for _, g := range []*guest{web, far} {
		g.ping(s.guests()...)
	}
	refused := []struct{ from, to *guest }{{s.one, web}, {s.three, far}}
	inParallel(len(refused), len(refused), func(i int) {
		from, to := refused[i].from, refused[i].to.addresses()
		fetched, pinged := from.fetches(to), from.pings(to)
		for _, a := range to {
			if file, echo := refusal(from, a); fetched[a] != file || pinged[a] != echo {
				s.t.Errorf("%v fetches from %s: %q, and pings it: %q; want %q and %q", from, a, fetched[a], pinged[a], file, echo)
			}
		}
	})
	web.remove()
	far.remove()
}

// verdicts wants that what is asked before and told afterwards of frames is what happened.
func (s *segment) verdicts() {
	line := lineOf(s.t, s.text, "[network.storage]")
	one, three := s.node("edge-1").watch(), s.node("edge-3").watch()
	said := map[netip.Addr]explained{}
	for _, a := range []netip.Addr{s.near.v4, s.three.v6} {
		said[a] = s.one.explains("one", a, "tcp")
	}
	for _, six := range []bool{false, true} {
		for _, to := range []*guest{s.near, s.three} {
			s.one.in("nc -w 5 %s 7 </dev/null || :", to.at(six)) // nobody listens: the answer is a reset, by the flow
		}
	}
	there, here := one.sawUntil(s.one), three.sawUntil(s.three)
	sid := "5f00:1ace:3:17:0:c800::"
	for _, six := range []bool{false, true} {
		from, near, far := s.one.at(six), s.near.at(six), s.three.at(six)
		there.only(question{"tcp", from, far}, verdict{Verdict: "passed", Reason: "encapsulated", Stage: "deliver", Node: "edge-1", SID: sid, Line: line,
			Container: "default/" + s.one.id, Name: "one", Network: "storage", ToNetwork: "storage", ToNode: "edge-3"})
		here.only(question{"tcp", from, far}, verdict{Verdict: "passed", Reason: "decapsulated", Stage: "deliver", Node: "edge-3", SID: sid, Line: line,
			Network: "storage", FromNode: "edge-1", ToContainer: "default/" + s.three.id, ToName: "three", ToNetwork: "storage"})
		there.only(question{"tcp", from, near}, verdict{Verdict: "passed", Reason: "local", Stage: "deliver", Node: "edge-1", Line: line,
			Container: "default/" + s.one.id, Name: "one", Network: "storage", ToContainer: "default/" + s.near.id, ToName: "near", ToNetwork: "storage"})
	}
	for a, x := range said {
		x.agrees(s.t, there.first(question{"tcp", s.one.at(a.Is6()), a}))
	}
	s.t.Logf("of edge-1:\n%s", strings.Join(one.text(), "\n"))
	s.frames()
}

// frames asks what would become of questions for addresses and of frames for all, and what MACs are known.
func (s *segment) frames() {
	n := s.node("edge-1")
	for to, want := range map[string]string{
		s.near.v6.String() + "/nd":   "answer   ",
		s.three.v4.String() + "/arp": "way      node edge-3, SID 5f00:1ace:3:18:0:c800::",
		s.free(s.near.v4) + "/arp":   "verdict  refused, neighbour_unknown",
		"ff:ff:ff:ff:ff:ff":          "way      copies to 1 port (near (default/" + s.near.id + ")) and 2 nodes (edge-2, edge-3)",
		"52:54:00:12:34:56":          "verdict  refused, unknown_mac",
	} {
		contains(s.t, n.must("lace", "explain", "--from", "one", "--to", to), want)
	}
	table := strings.Fields(n.must("lace", "fdb", "--network", "storage"))
	for _, known := range []string{s.one.mac(), s.near.mac()} {
		if !slices.Contains(table, known) {
			s.t.Errorf("lace fdb does not have %s: %q", known, table)
		}
	}
}

// withoutAgent kills an agent. Flows go on, new ones are opened, and who asks for neighbours is answered.
func (s *segment) withoutAgent() {
	n := s.node("edge-1")
	stop := s.three.stream(s.one.v4)
	n.killAgent()
	s.one.must(s.one.asMachine("ip", "neigh", "flush", "dev", "eth0")...)
	s.one.ping(s.guests()...)
	s.two.must(s.two.asMachine("arping", "-c", "1", "-w", "5", "-I", "eth0", s.near.v4.String())...)
	n.start()
	stop()
	n.eventuallyHolds(2, 4)
	s.two.ping(s.guests()...)
}
