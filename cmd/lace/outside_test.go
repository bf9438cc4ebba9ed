// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/dataplane/trace"
	"github.com/lace-net/lace/topology"
)

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

const (
	internetID = 0xe00001
	officeID   = 0xe00002
	hostsID    = uint32(topology.HostsID)
	outsideID  = uint32(topology.OutsideID)
)

// masqueraded is the verdict on a new flow of web to the internet.
func masqueraded() trace.Event {
	e := toEdge2()
	e.Reason, e.To, e.Peer, e.SID, e.Way = bpf.LaceReasonREASON_EGRESS, internetID, 0, netip.Addr{}, uint8(maps.WayOut)
	e.Flow = tcp("10.40.1.7:40000", "198.51.100.7:443")
	e.Rewrite = trace.Rewrite{Src: at("192.0.2.1:12345"), Dst: at("198.51.100.7:443")}
	return e
}

func TestTracePrintsWhatIsOutside(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*trace.Event)
		want   string
	}{
		"masqueraded": {func(*trace.Event) {},
			"passed  egress           deliver   10.40.1.7:40000 > 198.51.100.7:443 tcp  web (backend) > internet  as 192.0.2.1:12345  topology.toml:31  84 bytes\n"},
		"by its own address": {func(e *trace.Event) { e.Rewrite = trace.Rewrite{} },
			"passed  egress           deliver   10.40.1.7:40000 > 198.51.100.7:443 tcp  web (backend) > internet  topology.toml:31  84 bytes\n"},
		"a masqueraded echo": {func(e *trace.Event) {
			e.Flow = trace.Flow{Protocol: "icmp", ICMP: "EchoRequest", ICMPID: 7, Src: address("10.40.1.7"), Dst: address("198.51.100.7")}
			e.Rewrite = trace.Rewrite{Src: at("192.0.2.1:12345"), Dst: at("198.51.100.7:8")}
		}, "10.40.1.7 > 198.51.100.7 icmp EchoRequest id 7  web (backend) > internet  as 192.0.2.1 id 12345  topology.toml:31  84 bytes\n"},
		"carried to the node that it leaves by": {func(e *trace.Event) {
			e.Reason, e.Peer, e.SID, e.Way, e.Rewrite = bpf.LaceReasonREASON_ENCAPSULATED, 1, address("5f00:1ace:2:14:e0:1::"), uint8(maps.WayNode), trace.Rewrite{}
		}, "web (backend) > internet by edge-2  topology.toml:31  SID 5f00:1ace:2:14:e0:1::  84 bytes\n"},
		"to a published port": {func(e *trace.Event) {
			e.Reason, e.Ifindex, e.Outer, e.Network, e.To, e.Output, e.Way = bpf.LaceReasonREASON_INGRESS, 2, trace.SideOutside, officeID, 100, 7, uint8(maps.WayContainer)
			e.Flow = tcp("203.0.113.9:50000", "192.0.2.1:8080")
			e.Rewrite = trace.Rewrite{Src: at("203.0.113.9:50000"), Dst: at("10.40.1.7:80")}
		}, "passed  ingress          deliver   203.0.113.9:50000 > 192.0.2.1:8080 tcp  office > web (backend)  published 8080 > web:80  topology.toml:31  84 bytes\n"},
		"to a published port of a container without a name": {func(e *trace.Event) {
			e.Reason, e.To, e.Output, e.Way = bpf.LaceReasonREASON_LOCAL, 200, 8, uint8(maps.WayContainer)
			e.Flow = tcp("10.40.1.7:40000", "192.0.2.1:8080")
			e.Rewrite = trace.Rewrite{Src: at("192.0.2.1:12345"), Dst: at("10.60.1.8:80")}
		}, "web (backend) > default/0123456789ab (storage)  as 192.0.2.1:12345  published 8080 > 10.60.1.8:80  topology.toml:31  84 bytes\n"},
		"from the host": {func(e *trace.Event) {
			e.Reason, e.Ifindex, e.Outer, e.Network, e.To, e.Output, e.Way, e.Rewrite = bpf.LaceReasonREASON_FROM_HOST, 3, trace.SideHost, hostsID, 100, 7, uint8(maps.WayContainer), trace.Rewrite{}
			e.Flow = tcp("192.0.2.1:50000", "10.40.1.7:80")
		}, "passed  from_host        deliver   192.0.2.1:50000 > 10.40.1.7:80 tcp      host > web (backend)  topology.toml:31  84 bytes\n"},
		"from the host to another node": {func(e *trace.Event) {
			e.Ifindex, e.Outer, e.Network, e.To, e.Peer, e.SID, e.Rewrite = 3, trace.SideHost, hostsID, 100, 1, address("5f00:1ace:2:14:0:6400::"), trace.Rewrite{}
			e.Way = uint8(maps.WayNode)
		}, "host > edge-2 (backend)  topology.toml:31  SID 5f00:1ace:2:14:0:6400::  84 bytes\n"},
		"from the host of another node": {func(e *trace.Event) {
			e.Ifindex, e.Network, e.To, e.Output, e.Peer, e.SID, e.Rewrite = 2, hostsID, 100, 7, 1, address("5f00:1ace:1:14:0:6400::"), trace.Rewrite{}
		}, "host of edge-2 > web (backend)  topology.toml:31  SID 5f00:1ace:1:14:0:6400::  84 bytes\n"},
		"to the host, though its peering has it leave by another node": {func(e *trace.Event) {
			e.Reason, e.To, e.Way, e.Rewrite, e.Peer, e.SID = bpf.LaceReasonREASON_TO_HOST, hostsID, uint8(maps.WayHost), trace.Rewrite{}, 1, address("5f00:1ace:2:14:e0:1::")
		}, "  web (backend) > host  topology.toml:31  84 bytes\n"},
		"to the host": {func(e *trace.Event) {
			e.Reason, e.To, e.Way, e.Rewrite = bpf.LaceReasonREASON_TO_HOST, hostsID, uint8(maps.WayHost), trace.Rewrite{}
		}, "passed  to_host          deliver   10.40.1.7:40000 > 198.51.100.7:443 tcp  web (backend) > host  topology.toml:31  84 bytes\n"},
		"from an address that nobody knows": {func(e *trace.Event) {
			*e = refused()
			e.Reason, e.Stage, e.Ifindex, e.Outer, e.Network, e.Flow = bpf.LaceReasonREASON_NO_EXTERNAL, bpf.LaceStageSTAGE_ENTER, 2, trace.SideOutside, outsideID, tcp("[2001:db8::9]:50000", "[2001:db8::1]:8080")
		}, "refused no_external      enter     [2001:db8::9]:50000 > [2001:db8::1]:8080 tcp  outside  84 bytes\n"},
	} {
		t.Run(name, func(t *testing.T) {
			e := masqueraded()
			tt.change(&e)
			var out bytes.Buffer
			if err := knownNames().trace(e).print(&out, false); err != nil || !strings.HasSuffix(out.String(), tt.want) {
				t.Errorf("%v\ngot  %swant %s", err, out.String(), tt.want)
			}
		})
	}
	var out bytes.Buffer
	must(t, knownNames().trace(masqueraded()).print(&out, true))
	if want := `"way":"out",`; !strings.Contains(out.String(), want) {
		t.Errorf("want %s in %s", want, out.String())
	}
	if want := `"rewrite":{"src":"192.0.2.1","src_port":12345,"dst":"198.51.100.7","dst_port":443}}`; !strings.Contains(out.String(), want) {
		t.Errorf("want %s in %s", want, out.String())
	}
}

// left is a flow of web to the internet, and entered one of the office to a port that web publishes; both directions.
func left() maps.Connection {
	c := sent()
	c.To, c.Dst, c.Peer, c.SID, c.Way, c.Ifindex = outsideID, at("203.0.113.9:443"), 0, netip.Addr{}, maps.WayOut, 2
	c.Translated, c.Rewrite = true, maps.Rewrite{Src: at("192.0.2.1:12345"), Dst: c.Dst}
	*c.Answer = maps.Flow{Network: outsideID, To: 100, Src: c.Dst, Dst: c.Rewrite.Src, Protocol: 6, State: c.State, Reply: true,
		Way: maps.WayContainer, Ifindex: 7, Translated: true, Rewrite: maps.Rewrite{Src: c.Dst, Dst: c.Src}}
	return c
}

func entered() maps.Connection {
	c := sent()
	c.Network, c.To, c.Src, c.Dst, c.Peer, c.SID, c.Way, c.Ifindex = outsideID, 100, at("203.0.113.9:50000"), at("192.0.2.1:8080"), 0, netip.Addr{}, maps.WayContainer, 7
	c.Translated, c.Rewrite = true, maps.Rewrite{Src: c.Src, Dst: at("10.40.1.7:80")}
	*c.Answer = maps.Flow{Network: 100, To: outsideID, Src: at("10.40.1.7:80"), Dst: c.Src, Protocol: 6, State: c.State, Reply: true,
		Way: maps.WayOut, Ifindex: 2, Translated: true, Rewrite: maps.Rewrite{Src: c.Dst, Dst: c.Src}}
	return c
}

func TestConntrackPrintsWhatIsOutside(t *testing.T) {
	for want, c := range map[string]maps.Connection{
		"10.40.1.7:40000 > 203.0.113.9:443     web (backend) > office  as 192.0.2.1:12345  topology.toml:31\n":      left(),
		"203.0.113.9:50000 > 192.0.2.1:8080    office > web (backend)  published 8080 > web:80  topology.toml:31\n": entered(),
		"192.0.2.1:8080 > 10.40.1.7:40000      host > web (backend)  topology.toml:31\n": {Flow: maps.Flow{Network: hostsID, To: 100, Protocol: 6,
			Src: at("192.0.2.1:8080"), Dst: at("10.40.1.7:40000"), Ifindex: 7, Line: 31}},
		"10.40.1.7:40000 > 9.9.9.9:443         web (backend) > internet by edge-2  topology.toml:31\n": {Flow: maps.Flow{Network: 100, To: internetID, Protocol: 6,
			Src: at("10.40.1.7:40000"), Dst: at("9.9.9.9:443"), Way: maps.WayNode, Peer: 1, SID: address("5f00:1ace:2:14:e0:1::"), Line: 31}},
	} {
		var out bytes.Buffer
		if err := knownNames().tracked(c).print(&out, false); err != nil || !strings.HasSuffix(out.String(), "  "+want) {
			t.Errorf("%v\ngot  %swant %s", err, out.String(), want)
		}
	}
	var out bytes.Buffer
	must(t, knownNames().tracked(left()).print(&out, true))
	if want := `"to_network":"office","way":"out","rewrite":{"src":"192.0.2.1","src_port":12345,"dst":"203.0.113.9","dst_port":443},`; !strings.Contains(out.String(), want) {
		t.Errorf("want %s in %s", want, out.String())
	}
}

// TestFiltersKnowTranslatedFlows: by what they are before and after, and the same of both directions.
func TestFiltersKnowTranslatedFlows(t *testing.T) {
	for _, tt := range []struct {
		name   string
		filter flowFilter
		c      maps.Connection
		takes  bool
	}{
		{"the container's address", flowFilter{address: address("10.40.1.7")}, left(), true},
		{"the address it has outside", flowFilter{address: address("192.0.2.1")}, left(), true},
		{"another", flowFilter{address: address("192.0.2.2")}, left(), false},
		{"the port it has outside", flowFilter{port: 12345}, left(), true},
		{"its own port", flowFilter{port: 40000}, left(), true},
		{"another port", flowFilter{port: 12346}, left(), false},
		{"the container", flowFilter{container: "web"}, left(), true},
		{"the external network", flowFilter{network: "office"}, left(), true},
		{"a shorter prefix", flowFilter{network: "internet"}, left(), false},
		{"the published port", flowFilter{port: 8080}, entered(), true},
		{"the container's port", flowFilter{port: 80}, entered(), true},
		{"the container that publishes", flowFilter{container: "web"}, entered(), true},
		{"the network that sends", flowFilter{network: "office"}, entered(), true},
		{"the address that is published at", flowFilter{address: address("192.0.2.1")}, entered(), true},
	} {
		for i, f := range []maps.Flow{tt.c.Flow, *tt.c.Answer} {
			if got := tt.filter.takesFlow(knownNames(), f); got != tt.takes {
				t.Errorf("%s: %v of direction %d", tt.name, got, i)
			}
		}
	}
	for _, tt := range []struct {
		filter traceFilter
		takes  bool
	}{
		{traceFilter{address: address("192.0.2.1")}, true}, {traceFilter{port: 12345}, true}, {traceFilter{network: "internet"}, true},
		{traceFilter{address: address("192.0.2.2")}, false}, {traceFilter{port: 12346}, false}, {traceFilter{network: "office"}, false},
	} {
		if got := tt.filter.takes(knownNames().trace(masqueraded())); got != tt.takes {
			t.Errorf("%+v takes an event: %v", tt.filter, got)
		}
	}
}

// TestRealMasqueradeIsNamed: a container's datagram leaves, and trace, conntrack and explain tell of it by the same names.
func TestRealMasqueradeIsNamed(t *testing.T) {
	n := newEdge(t, openNetworks)
	n.in(makeWayOut)
	n.open()
	web := n.container("web-1", "web", "10.40.1.10")
	r, err := trace.Open(hook.PinDir(n.bpffs), n.path("trace.lock"))
	must(t, err)
	t.Cleanup(func() { r.Close() })
	var who *names
	n.in(func() (err error) {
		s, err := agentSettings("trace", []string{"--config", n.path("lace.toml")})
		if err == nil {
			who, err = newNames(&env{}, s)
		}
		return err
	})
	t.Cleanup(who.close)
	sent := make(chan error)
	go func() {
		runtime.LockOSThread() // as the thread ends in the container
		sent <- sendUDP(web, "10.40.1.10:7777", "198.51.100.7:53")
	}()
	must(t, <-sent)

	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tr := &tracing{filter: traceFilter{network: "internet", verdict: "passed"}, count: 1, names: who, out: &out}
	if err := r.Each(ctx, tr.show); !errors.Is(err, errEnough) {
		t.Fatalf("no event tells of it: %v", err)
	}
	told := regexp.MustCompile(`passed  egress +deliver +10\.40\.1\.10:7777 > 198\.51\.100\.7:53 udp +web-1 \(web\) > internet  as 192\.0\.2\.1:(\d+)  topology\.toml:30  `).FindStringSubmatch(out.String())
	if told == nil {
		t.Fatalf("it is told as\n%s", out.String())
	}
	listed, err := n.run(runConntrack, "--port "+told[1])
	must(t, err)
	if want := "10.40.1.10:7777 > 198.51.100.7:53     web-1 (web) > internet  as 192.0.2.1:" + told[1] + "  topology.toml:30\n"; !strings.HasSuffix(listed, want) {
		t.Errorf("want %q in\n%s", want, listed)
	}
	if x := n.explained("--from web-1 --to 198.51.100.7:53/udp"); x.Flow == nil || x.Flow.SourcePort != 7777 || x.Flow.Packets != 1 {
		t.Errorf("the open flow is explained as %+v", x.Flow)
	}
}

func TestExternalOf(t *testing.T) {
	prefixes := func(texts ...string) (all []netip.Prefix) {
		for _, p := range texts {
			all = append(all, netip.MustParsePrefix(p))
		}
		return all
	}
	some := []plan.External{{Name: "internet", Prefixes: prefixes("0.0.0.0/0", "2000::/3")}, {Name: "office", Prefixes: prefixes("192.0.2.0/24", "2001:db8::/32")},
		{Name: "within", Prefixes: prefixes("192.0.2.128/25", "2001:db8:1::1/128")}}
	for a, want := range map[string]string{
		"192.0.2.1": "office", "192.0.2.127": "office", "192.0.2.128": "within", "192.0.3.1": "internet",
		"2001:db8::1": "office", "2001:db8:1::1": "within", "2001:db8:1::2": "office", "2001:db9::1": "internet", "fd00::1": "",
	} {
		got := ""
		if e := externalOf(some, address(a)); e != nil {
			got = e.Name
		}
		if got != want {
			t.Errorf("%s is in %q, want %q", a, got, want)
		}
	}
}
