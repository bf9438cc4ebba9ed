// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/cmd/lace/control"
	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
)

// peeredNetworks has three networks, of which web and staging overlap, and one way from web to db.
const peeredNetworks = `version = 1
[underlay]
locator-block = "5f00:1ace::/32"
[node.edge-1]
underlay = "fd00:a::1"
locator = "5f00:1ace:1::/48"
uplinks = ["up0"]
[node.edge-2]
underlay = "fd00:a::2"
locator = "5f00:1ace:2::/48"
[network.web]
type = "l3"
id = 100
subnets = ["10.40.0.0/16", "fd40::/48"]
[network.db]
type = "l3"
id = 200
subnets = ["10.50.0.0/16", "fd50::/48"]
[network.staging]
type = "l3"
id = 300
subnets = ["10.40.0.0/16"]
[[peering]]
from = "web"
to = "db"
`

// Lines of peeredNetworks.
const (
	lineWeb     = 11
	linePeering = 23
)

// edge is node edge-1: a namespace with an uplink, a BPF file system and a data plane of its own.
type edge struct {
	t     *testing.T
	work  chan func() // done one after the other on a thread in the namespace
	dir   string
	bpffs string
	plane *dataplane.Dataplane
}

func newEdge(t *testing.T, text string) *edge {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces and to load programs: run the tests as root")
	}
	n := &edge{t: t, dir: t.TempDir(), work: make(chan func())}
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		for f := range n.work {
			f()
		}
	}()
	t.Cleanup(func() { close(n.work) })
	n.mount()
	n.in(func() error { return unix.Unshare(unix.CLONE_NEWNET) })
	n.in(makeUplink)
	n.write("topology.toml", text)
	n.write("lace.toml", fmt.Sprintf("node = \"edge-1\"\ntopology = %q\nhook-socket = %q\nbpffs = %q\n", n.path("topology.toml"), n.path("lace.sock"), n.bpffs))
	return n
}

func (n *edge) mount() {
	n.t.Helper()
	dir := n.path("bpf")
	must(n.t, os.Mkdir(dir, 0o700))
	must(n.t, unix.Mount("laceexplain", dir, "bpf", 0, ""))
	n.t.Cleanup(func() { must(n.t, unix.Unmount(dir, 0)) })
	n.bpffs = filepath.Join(dir, "lace")
}

// makeLink makes a veth pair, up, of which name has an address and knows its neighbour at the other end.
func makeLink(name, peer, prefix, neighbour string) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer}); err != nil {
		return nil, err
	}
	near, err := netlink.LinkByName(name)
	if err != nil {
		return nil, err
	}
	far, err := netlink.LinkByName(peer)
	if err != nil {
		return nil, err
	}
	addr, err := netlink.ParseAddr(prefix)
	if err != nil {
		return nil, err
	}
	family := unix.AF_INET
	if addr.IP.To4() == nil {
		addr.Flags, family = unix.IFA_F_NODAD, unix.AF_INET6
	}
	return near, errors.Join(netlink.LinkSetUp(near), netlink.LinkSetUp(far), netlink.AddrAdd(near, addr),
		netlink.NeighAdd(&netlink.Neigh{LinkIndex: near.Attrs().Index, IP: net.ParseIP(neighbour), HardwareAddr: far.Attrs().HardwareAddr,
			Family: family, State: netlink.NUD_PERMANENT}))
}

// makeUplink makes up0, whose neighbour is edge-2.
func makeUplink() error {
	_, err := makeLink("up0", "far0", "fd00:a::1/64", "fd00:a::2")
	return err
}

func (n *edge) path(name string) string { return filepath.Join(n.dir, name) }

func (n *edge) write(name, text string) {
	n.t.Helper()
	must(n.t, os.WriteFile(n.path(name), []byte(text), 0o600))
}

// in calls f in the node's namespace.
func (n *edge) in(f func() error) {
	n.t.Helper()
	done := make(chan error)
	n.work <- func() { done <- f() }
	must(n.t, <-done)
}

// open makes the node's data plane.
func (n *edge) open() *edge {
	n.t.Helper()
	n.in(func() (err error) {
		n.plane, err = dataplane.Open(n.t.Context(), dataplane.Options{Topology: parsed(n.t, n.path("topology.toml")), Node: "edge-1", BPFFS: n.bpffs,
			Log: slog.New(slog.NewTextHandler(n.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))})
		return err
	})
	n.t.Cleanup(func() { n.plane.Close() })
	return n
}

// container attaches a namespace of its own to a network.
func (n *edge) container(name, network, addr string) netns.NsHandle {
	n.t.Helper()
	return n.wired(name, dataplane.Interface{Network: network, IPs: []netip.Addr{netip.MustParseAddr(addr)}, Gateway: true})
}

// wired attaches a namespace of its own to several.
func (n *edge) wired(name string, all ...dataplane.Interface) netns.NsHandle {
	n.t.Helper()
	ns := newNetns(n.t)
	n.in(func() error {
		_, err := n.plane.Attach(n.t.Context(), dataplane.Request{Container: "default/" + name, Name: name, Interfaces: all,
			Netns: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(ns))})
		return err
	})
	return ns
}

func newNetns(t *testing.T) (ns netns.NsHandle) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			ns, err = netns.Get()
		}
		done <- err
	}()
	must(t, <-done)
	t.Cleanup(func() { ns.Close() })
	return ns
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// peered is edge-1 of peeredNetworks with its containers.
func peered(t *testing.T) *edge {
	t.Helper()
	n := newEdge(t, peeredNetworks).open()
	n.container("web-1", "web", "10.40.1.10")
	n.container("web-2", "web", "10.40.1.11")
	n.container("db-1", "db", "10.50.1.10")
	n.container("old-1", "staging", "10.40.1.10")
	return n
}

// explain runs the command; the error is its own.
func (n *edge) explain(args string) (out string, err error) {
	n.t.Helper()
	var b bytes.Buffer
	n.in(func() error {
		err = runExplain(n.t.Context(), &env{stdout: &b}, append([]string{"--config", n.path("lace.toml")}, strings.Fields(args)...))
		return nil
	})
	return b.String(), err
}

func (n *edge) explained(args string) (x explanation) {
	n.t.Helper()
	out, err := n.explain(args + " --json")
	must(n.t, err)
	must(n.t, json.Unmarshal([]byte(out), &x))
	return x
}

func TestExplain(t *testing.T) {
	n := peered(t)
	entry := "entry route deliver"
	for _, tt := range []struct {
		name, args, stages, verdict string
		line                        uint32
		want                        []string // in the text
	}{
		{"same network", "--from web-1 --to 10.40.1.11:80/tcp", entry, "passed local", lineWeb,
			[]string{"web-1 (default/web-1), network web, 10.40.1.10", "[network.web]", "container web-2 (default/web-2), interface lace", "MTU 1460"}},
		{"echo, by id", "--from default/web-1 --to 10.40.1.11/icmp", entry, "passed local", lineWeb, nil},
		{"IPv6", "--from web-1 --to [fd40:0:0:2::7]:53/udp", entry, "passed encapsulated", lineWeb, []string{"node edge-2, SID 5f00:1ace:2:14:0:6400::"}},
		{"peered network here", "--from web-1 --to 10.50.1.10:5432/tcp", entry, "passed local", linePeering,
			[]string{`:23: [[peering]] from = "web" to = "db"`, "container db-1"}},
		{"peered network there", "--from web-1 --to 10.50.2.7:5432/tcp", entry, "passed encapsulated", linePeering,
			[]string{"node edge-2, SID 5f00:1ace:2:14:0:c800::, outer source 5f00:1ace:1:5ce:0:6400::, path MTU 1460",
				"edge-2 will be asked: may network web open flows to db at 10.50.2.7:5432/tcp?",
				"On edge-2 run: lace explain --from 10.40.1.10 --to 10.50.2.7:5432/tcp --network web"}},
		{"against the peering", "--from db-1 --to 10.40.1.10:80/tcp", "entry route error", "refused no_route", 0, []string{"verdict  refused, no_route: "}},
		{"nobody there", "--from web-1 --to 10.40.1.99:80/udp", "entry route error", "refused no_endpoint", 0, nil},
		{"gateway", "--from web-1 --to 10.40.1.1/icmp", "entry gateway", "passed gateway_answered", 0, nil},
		{"overlap", "--from 10.40.1.10 --network staging --to 10.40.1.11:80/tcp", "entry route error", "refused no_endpoint", 0, nil},
		{"from another node", "--from 10.40.2.9 --network web --to 10.40.1.10:80/tcp", entry, "passed decapsulated", lineWeb,
			[]string{"10.40.2.9, network web, on node edge-2", "container web-1", "edge-2 decides first"}},
		{"from a peered network of another node", "--from 10.40.2.9 --network web --to 10.50.1.10/icmp", entry, "passed decapsulated", linePeering, nil},
		{"from another node against the peering", "--from 10.50.2.9 --to 10.40.1.10:80/tcp", "entry route", "refused no_peering", 0, nil},
		{"IPv6 from another node", "--from fd40:0:0:2::9 --to [fd40:0:0:1::a]:53/udp", entry, "passed decapsulated", lineWeb, nil},
		{"IPv6 echo from another node", "--from fd40:0:0:2::9 --to [fd50:0:0:1::a]/icmp", entry, "passed decapsulated", linePeering, nil},
	} {
		x := n.explained(tt.args)
		var stages []string
		for _, s := range x.Steps {
			stages = append(stages, s.Stage)
		}
		if got := strings.Join(stages, " "); got != tt.stages {
			t.Errorf("%s: came to stages %q, want %q", tt.name, got, tt.stages)
		}
		if got := x.Verdict + " " + x.Reason; got != tt.verdict || x.Meaning == "" {
			t.Errorf("%s: %q (%s), want %q", tt.name, got, x.Meaning, tt.verdict)
		}
		if tt.line != 0 && (x.Line == nil || x.Line.Line != tt.line) {
			t.Errorf("%s: line %v, want %d", tt.name, x.Line, tt.line)
		}
		text, err := n.explain(tt.args)
		must(t, err)
		for _, want := range tt.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s: want %q in\n%s", tt.name, want, text)
			}
		}
	}
}

func TestExplainWithRoutingHeader(t *testing.T) {
	n := newEdge(t, strings.Replace(peeredNetworks, "[node.edge-1]", "encapsulation = \"srh\"\n[node.edge-1]", 1)).open()
	n.container("web-1", "web", "10.40.1.10")
	if x := n.explained("--from web-1 --to 10.40.2.9:80/tcp"); x.Way == nil || x.Way.MTU != 1436 || x.Way.Source.String() != "5f00:1ace:1:5ce:0:6400::" {
		t.Errorf("out: %+v", x)
	}
	if x := n.explained("--from 10.40.2.9 --network web --to 10.40.1.10:80/tcp"); x.Reason != "decapsulated" {
		t.Errorf("in: %+v", x)
	}
}

func TestExplainSaysWhatAnAddressIs(t *testing.T) {
	n := peered(t)
	for args, want := range map[string]string{
		"--from nobody --to 10.40.1.10/icmp":                    "no container of this node has that name or id",
		"--from web-3 --to 10.40.1.10/icmp":                     "did you mean web-",
		"--from web-1 --network db --to 10.50.1.10/icmp":        "container web-1 is in network web, not in db",
		"--from old-1 --to fd40::9/icmp":                        "has no address of the family of fd40::9 in network staging",
		"--from 10.40.1.10 --to 10.40.1.11/icmp":                "could be one of several; name the network with --network:\n  web-1",
		"--from 10.40.2.9 --to 10.40.1.11/icmp":                 "could be one of several",
		"--from 10.40.1.1 --to 10.40.1.10/icmp":                 "the gateway of network",
		"--from 10.50.1.99 --to 10.40.1.10/icmp":                "in this node's block 10.50.1.0/24 of network db, and no container has it",
		"--from fd00:a::1 --to fd40::9/icmp":                    "this node's own address in the underlay",
		"--from fd00:a::2 --to fd40::9/icmp":                    "the address of node edge-2 in the underlay",
		"--from 5f00:1ace:2:14:0:6400:: --to fd40::9/icmp":      "in the locator block: a SID or an outer source",
		"--from 192.0.2.1 --to 10.40.1.10/icmp":                 "in no block of a network",
		"--from 10.40.1.10 --to fd40::9/icmp":                   "of different families",
		"--from 10.40.2.9 --network web --to 10.40.3.9:80/tcp":  "does not come to this node",
		"--from web-1 --to 10.40.1.10":                          "names no protocol",
		"--from web-1 --to 10.40.1.10:0/tcp":                    "is no address with a port",
		"--from web-1 --to 10.40.1.10:80/sctp":                  `protocol "sctp" is not known`,
		"--from web-1 --to web-2:80/tcp":                        "is no address with a port",
		"--from web-1 --to fe80::1%eth0/icmp":                   "is no address of a container",
		"--to 10.40.1.10/icmp":                                  "--from and --to are wanted",
		"--from web-1 --to 10.40.1.10/icmp --config /nowhere/x": "no such file",
		"--from web-1 --to 10.40.1.10/icmp and more":            `unexpected argument "and"`,
	} {
		if _, err := n.explain(args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", args, err, want)
		}
	}
}

// footprints is what packets leave in the live tables.
func (n *edge) footprints() (out string) {
	n.t.Helper()
	m, done, err := hook.OpenMaps(n.bpffs)
	must(n.t, err)
	defer done()
	counters, err := m.Counters()
	must(n.t, err)
	// The containers' own stacks talk to multicast groups as they like, and so does the host's out of lc-host.
	chatter := []string{"multicast", "no_flow"}
	counters = slices.DeleteFunc(counters, func(c maps.Counter) bool { return slices.Contains(chatter, maps.ReasonName(c.Reason)) })
	byNetwork, err := m.NetworkCounters()
	must(n.t, err)
	byNetwork = slices.DeleteFunc(byNetwork, func(c maps.NetworkCounter) bool { return slices.Contains(chatter, maps.ReasonName(c.Reason)) })
	table, err := m.OpenFlows()
	must(n.t, err)
	defer table.Close()
	flows := 0
	must(n.t, maps.EachFlow(table, func(maps.Flow) error { flows++; return nil }))
	generation, err := m.Generation()
	must(n.t, err)
	return fmt.Sprint(counters, byNetwork, flows, generation)
}

func TestExplainLeavesNoFootprints(t *testing.T) {
	n := peered(t)
	before := n.footprints()
	for _, args := range []string{"--from web-1 --to 10.40.1.11:80/tcp", "--from web-1 --to 10.50.2.7:80/tcp", "--from db-1 --to 10.40.1.10/icmp",
		"--from 10.50.2.9 --to 10.40.1.10:80/tcp"} {
		n.explained(args)
	}
	if after := n.footprints(); after != before {
		t.Errorf("before %s\nafter  %s", before, after)
	}
}

func TestExplainTellsOfAFlowThatIsOpen(t *testing.T) {
	n := newEdge(t, peeredNetworks).open()
	web := n.container("web-1", "web", "10.40.1.10")
	n.container("db-1", "db", "10.50.1.10")
	ask := "--from web-1 --to 10.50.1.10:5353/udp"
	if x := n.explained(ask); x.Flow != nil {
		t.Errorf("before any packet there is %+v", x.Flow)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // as the thread ends in the container
		done <- sendUDP(web, "10.40.1.10:7777", "10.50.1.10:5353")
	}()
	must(t, <-done)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		x := n.explained(ask)
		if x.Flow != nil && x.Flow.SourcePort == 7777 && x.Flow.Packets == 1 && x.Flow.State == "new" {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the flow is told as %+v", x.Flow)
		}
	}
	if x := n.explained("--from web-1 --to 10.50.1.10:5354/udp"); x.Flow != nil {
		t.Errorf("to another port there is %+v", x.Flow)
	}
	if text, err := n.explain(ask); err != nil || !strings.Contains(text, "flow     open from port 7777: new for ") {
		t.Errorf("%v\n%s", err, text)
	}
}

func sendUDP(ns netns.NsHandle, from, to string) error {
	if err := netns.Set(ns); err != nil {
		return err
	}
	conn, err := net.DialUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from)), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte("hello"))
	return err
}

// Names and lines are the agent's, as long as there is one.
func TestExplainAsksTheAgent(t *testing.T) {
	n := peered(t)
	ask := "--from web-1 --to 10.50.1.10:5432/tcp"
	if x := n.explained(ask); len(x.Notes) != 1 || !strings.Contains(x.Notes[0], "no agent runs") {
		t.Errorf("without an agent: %q", x.Notes)
	}
	r := &reloader{file: n.path("topology.toml"), plane: n.plane, log: slog.New(slog.DiscardHandler)}
	s, err := control.Listen(n.path("control.sock"), r.answer, slog.New(slog.DiscardHandler))
	must(t, err)
	go s.Run(t.Context())
	if x := n.explained(ask); len(x.Notes) != 0 || x.Line == nil || x.Line.Text != `[[peering]] from = "web" to = "db"` {
		t.Errorf("with an agent: %+v, %q", x.Line, x.Notes)
	}
	n.write("topology.toml", "# a line more\n"+strings.Replace(peeredNetworks, "[[peering]]", "bidirectional = true\n[[peering]]", 1))
	x := n.explained(ask)
	if len(x.Notes) != 1 || !strings.Contains(x.Notes[0], "not the file any more") || x.Line == nil || x.Line.Text != "" || x.Line.Line != linePeering {
		t.Errorf("with another file: %+v, %q", x.Line, x.Notes)
	}
}
