// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
)

func TestConntrackRefusesWhatNothingPasses(t *testing.T) {
	for args, want := range map[string]string{
		"show":                     `there is no "show"; it is list, count or delete`,
		"list now":                 `unexpected argument "now"`,
		"--state open":             `there is no state "open"; it is one of new, answered, established, closing, closed`,
		"--proto tpc":              `there is no protocol "tpc"; it is tcp, udp, icmp, icmp6, sctp, or a number up to 255`,
		"--proto 256":              `there is no protocol "256"`,
		"--port 65536":             "there is no port 65536; the highest is 65535",
		"--address x":              "invalid value",
		"delete":                   "delete needs a filter, or --all for every flow of this node",
		"delete --all --port 80":   "delete takes either a filter or --all, not both",
		"list --all":               "--all belongs to delete; list takes all flows without it",
		"count --all --proto icmp": "--all belongs to delete",
	} {
		var usage *usageError
		if err := runConntrack(t.Context(), hostEnv(), strings.Fields(args)); !errors.As(err, &usage) || !strings.Contains(usage.problem, want) {
			t.Errorf("lace conntrack %s: got %v, want %q", args, err, want)
		}
	}
}

// sent is a flow of web to edge-2, answered.
func sent() maps.Connection {
	f := maps.Flow{Network: 100, To: 200, Src: netip.MustParseAddrPort("10.40.1.7:40000"), Dst: netip.MustParseAddrPort("10.60.2.9:80"), Protocol: 6,
		State: bpf.LaceFlowStateFLOW_ESTABLISHED, Age: 725 * time.Second, Idle: 9 * time.Second, Packets: 12, Bytes: 34567, Peer: 1, Way: maps.WayNode,
		SID: address("5f00:1ace:2:14:0:c800::"), Line: 31, Generation: 5}
	back := maps.Flow{Network: 200, To: 100, Src: f.Dst, Dst: f.Src, Protocol: 6, State: f.State, Reply: true, Underlay: true, Age: f.Age,
		Idle: 3 * time.Second, Packets: 9, Bytes: 7800, Ifindex: 7, Peer: 1, Line: 31, Generation: 5}
	return maps.Connection{Flow: f, Answer: &back}
}

func TestConntrackPrints(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*maps.Connection)
		want   string
	}{
		"to another node": {func(*maps.Connection) {},
			"tcp   established  12m05s      3s      12/34.6K        9/7800  10.40.1.7:40000 > 10.60.2.9:80        web (backend) > edge-2 (storage)  topology.toml:31\n"},
		"from another node": {func(c *maps.Connection) {
			there, back := *c.Answer, c.Flow
			there.Reply, back.Reply = false, true
			there.Source, there.Peer = address("5f00:1ace:2:5ce:0:c800::"), 2 // of a file that has been changed since
			*c = maps.Connection{Flow: there, Answer: &back}
		}, "tcp   established  12m05s      3s        9/7800      12/34.6K  10.60.2.9:80 > 10.40.1.7:40000        edge-2 (storage) > web (backend)  topology.toml:31\n"},
		"here, and unanswered": {func(c *maps.Connection) {
			c.Dst, c.Ifindex, c.Way, c.Peer, c.State, c.Answer = netip.MustParseAddrPort("10.60.1.8:80"), 8, maps.WayContainer, 0, bpf.LaceFlowStateFLOW_NEW, nil
		}, "tcp   new          12m05s      9s      12/34.6K             -  10.40.1.7:40000 > 10.60.1.8:80        web (backend) > default/0123456789ab (storage)  topology.toml:31\n"},
		"echo": {func(c *maps.Connection) {
			c.Protocol, c.Line = 1, 0
			c.Src, c.Dst = netip.AddrPortFrom(c.Src.Addr(), 77), netip.AddrPortFrom(c.Dst.Addr(), 8)
		}, "icmp  established  12m05s      3s      12/34.6K        9/7800  10.40.1.7 > 10.60.2.9 id 77           web (backend) > edge-2 (storage)\n"},
		"inside of an L2 network": {func(c *maps.Connection) { c.Bridged, c.To, c.Line = true, 100, 0 },
			"tcp   established  12m05s      3s      12/34.6K        9/7800  10.40.1.7:40000 > 10.60.2.9:80        web (backend) > edge-2 (backend)  bridged\n"},
		"of nobody that is known": {func(c *maps.Connection) {
			c.Protocol, c.Network, c.To, c.Peer = 47, 0, 0, 0
			c.Src, c.Dst = netip.AddrPortFrom(c.Src.Addr(), 0), netip.AddrPortFrom(c.Dst.Addr(), 0)
		}, "47    established  12m05s      3s      12/34.6K        9/7800  10.40.1.7 > 10.60.2.9                 ?  topology.toml:31\n"},
	} {
		t.Run(name, func(t *testing.T) {
			c := sent()
			tt.change(&c)
			var out bytes.Buffer
			if err := knownNames().tracked(c).print(&out, false); err != nil || out.String() != tt.want {
				t.Errorf("%v\ngot  %swant %s", err, out.String(), tt.want)
			}
		})
	}
	var out bytes.Buffer
	want := `{"protocol":"tcp","state":"established","src":"10.40.1.7","src_port":40000,"dst":"10.60.2.9","dst_port":80,"age":725,"idle":3,` +
		`"sent":{"packets":12,"bytes":34567},"answered":{"packets":9,"bytes":7800},"container":"default/a","name":"web","network":"backend",` +
		`"to_network":"storage","to_node":"edge-2","way":"node","sid":"5f00:1ace:2:14:0:c800::","file":"/etc/lace/topology.toml","line":31,"generation":5}`
	if err := knownNames().tracked(sent()).print(&out, true); err != nil || strings.TrimSpace(out.String()) != want {
		t.Errorf("%v\ngot  %swant %s", err, out.String(), want)
	}
}

func TestNumbersStayShort(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 9999: "9999", 10000: "10.0K", 999_949: "999.9K", 999_950: "1.0M", 12_345_678: "12.3M",
		5_000_000_000: "5.0G", 1<<64 - 1: "18.4E"} {
		if got := short(n); got != want {
			t.Errorf("%d is written %s, want %s", n, got, want)
		}
	}
	for s, want := range map[int64]string{0: "0s", 59: "59s", 60: "1m00s", 3599: "59m59s", 3600: "1h00m", 86399: "23h59m", 86400: "1d00h", 12*86400 + 3*3600: "12d03h"} {
		if got := span(s); got != want {
			t.Errorf("%d seconds are written %s, want %s", s, got, want)
		}
	}
}

// TestFlowFilters: each says the same of both directions.
func TestFlowFilters(t *testing.T) {
	echo := sent()
	echo.Protocol, echo.Answer.Protocol = 1, 1
	echo.Src, echo.Dst = netip.AddrPortFrom(echo.Src.Addr(), 80), netip.AddrPortFrom(echo.Dst.Addr(), 8)
	echo.Answer.Src, echo.Answer.Dst = netip.AddrPortFrom(echo.Dst.Addr(), 80), netip.AddrPortFrom(echo.Src.Addr(), 0)
	for _, tt := range []struct {
		name   string
		filter flowFilter
		c      maps.Connection
		takes  bool
	}{
		{"none", flowFilter{}, sent(), true},
		{"sender's network", flowFilter{network: "backend"}, sent(), true},
		{"receiver's network", flowFilter{network: "storage"}, sent(), true},
		{"other network", flowFilter{network: "staging"}, sent(), false},
		{"name", flowFilter{container: "web"}, sent(), true},
		{"id", flowFilter{container: "default/a"}, sent(), true},
		{"other name", flowFilter{container: "db"}, sent(), false},
		{"protocol", flowFilter{protocol: "tcp"}, sent(), true},
		{"protocol's number", flowFilter{protocol: "6"}, sent(), true},
		{"other protocol", flowFilter{protocol: "udp"}, sent(), false},
		{"state", flowFilter{state: "established"}, sent(), true},
		{"other state", flowFilter{state: "new"}, sent(), false},
		{"source", flowFilter{address: address("10.40.1.7")}, sent(), true},
		{"destination", flowFilter{address: address("10.60.2.9")}, sent(), true},
		{"other address", flowFilter{address: address("10.60.2.8")}, sent(), false},
		{"port", flowFilter{port: 80}, sent(), true},
		{"other port", flowFilter{port: 81}, sent(), false},
		{"an identifier is no port", flowFilter{port: 80}, echo, false},
		{"all must hold", flowFilter{protocol: "tcp", port: 81}, sent(), false},
	} {
		for i, f := range []maps.Flow{tt.c.Flow, *tt.c.Answer} {
			if got := tt.filter.takesFlow(knownNames(), f); got != tt.takes {
				t.Errorf("%s: %v of direction %d", tt.name, got, i)
			}
		}
	}
}

// tables loads the programs and pins empty tables as an agent does, below a BPF file system of the test's own.
func tables(t *testing.T) (config string, coll *ebpf.Collection) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("eBPF tables need root: run the tests as root")
	}
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mount a BPF file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	pins := hook.PinDir(filepath.Join(dir, "lace"))
	if err := os.MkdirAll(pins, 0o700); err != nil {
		t.Fatal(err)
	}
	spec, err := bpf.LoadLace()
	if err != nil {
		t.Fatal(err)
	}
	coll, err = ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(coll.Close)
	for _, name := range maps.Pinned {
		if err := coll.Maps[name].Pin(filepath.Join(pins, name)); err != nil {
			t.Fatal(err)
		}
	}
	topo := writeFile(t, "topology.toml", smallTopology)
	return writeFile(t, "lace.toml", fmt.Sprintf("node = \"edge-1\"\nbpffs = \"%s/lace\"\ntopology = %q\nhook-socket = \"%s\"\n",
		dir, topo, filepath.Join(t.TempDir(), "lace.sock"))), coll
}

const smallTopology = `version = 1
[underlay]
locator-block = "5f00:1ace::/32"
[node.edge-1]
underlay = "fd00:a::1"
locator = "5f00:1ace:1::/48"
[node.edge-2]
underlay = "fd00:a::2"
locator = "5f00:1ace:2::/48"
[network.backend]
type = "l3"
id = 100
subnets = ["10.40.0.0/16"]
`

// putFlow writes both directions of a flow of network 100 to edge-2.
func putFlow(t *testing.T, table *ebpf.Map, protocol uint8, sport, dport, answerTo uint16, state bpf.LaceFlowState) {
	t.Helper()
	wire := func(p uint16) uint16 { return p>>8 | p<<8 }
	k := bpf.LaceFlowKey{Network: 100, Protocol: protocol, Sport: wire(sport), Dport: wire(dport)}
	k.Src.U8, k.Dst.U8 = address("::ffff:10.40.1.7").As16(), address("::ffff:10.40.2.9").As16()
	back := bpf.LaceFlowKey{Network: 100, Src: k.Dst, Dst: k.Src, Protocol: protocol, Sport: k.Dport, Dport: k.Sport}
	if isICMP(protocol) {
		back.Sport, back.Dport = k.Sport, wire(answerTo)
	}
	v := bpf.LaceFlow{Network: 100, Peer: 1, Way: uint8(maps.WayNode), State: uint8(state), Line: 10, Packets: 2}
	if err := table.Put(k, v); err != nil {
		t.Fatal(err)
	}
	v.Way = uint8(maps.WayContainer)
	v.Flags = uint16(bpf.LaceFlowFlagsFLOW_REPLY | bpf.LaceFlowFlagsFLOW_UNDERLAY)
	if err := table.Put(back, v); err != nil {
		t.Fatal(err)
	}
}

// lace runs a command as the shell does, and returns what it prints.
func lace(t *testing.T, args ...string) string {
	t.Helper()
	var out, problems bytes.Buffer
	e := hostEnv()
	e.stdout, e.stderr = &out, &problems
	if code := dispatch(t.Context(), e, args); code != exitOK {
		t.Fatalf("lace %v: exit %d, %s", args, code, problems.String())
	}
	return out.String()
}

func TestConntrackOfPinnedTables(t *testing.T) {
	config, coll := tables(t)
	table := coll.Maps["flows_initial"]
	for port := range uint16(3) {
		putFlow(t, table, 6, 40000+port, 80, 0, bpf.LaceFlowStateFLOW_ESTABLISHED)
	}
	putFlow(t, table, 6, 40009, 443, 0, bpf.LaceFlowStateFLOW_NEW)
	putFlow(t, table, 1, 77, 8, 0, bpf.LaceFlowStateFLOW_ESTABLISHED)
	run := func(args ...string) string {
		return lace(t, append([]string{"conntrack"}, append(args, "--config", config)...)...)
	}

	lines := strings.Split(strings.TrimSpace(run()), "\n")
	if len(lines) != 6 || !strings.HasPrefix(lines[0], "PROTO STATE ") {
		t.Errorf("five flows and their header are\n%s", strings.Join(lines, "\n"))
	}
	want := regexp.MustCompile(`^icmp  established +\S+ +\S+ +2/0 +2/0  10\.40\.1\.7 > 10\.40\.2\.9 id 77 +\(backend\) > edge-2 \(backend\)  topology\.toml:10$`)
	if !slices.ContainsFunc(lines, want.MatchString) {
		t.Errorf("the echo is not in\n%s", strings.Join(lines, "\n"))
	}
	seen := 0
	for scan := bufio.NewScanner(strings.NewReader(run("list", "--json", "--port", "80"))); scan.Scan(); seen++ {
		var line tracked
		if err := json.Unmarshal(scan.Bytes(), &line); err != nil || line.DstPort != 80 || line.ToNode != "edge-2" || line.Answered.Packets != 2 {
			t.Errorf("%v in %s", err, scan.Text())
		}
	}
	if seen != 3 {
		t.Errorf("%d flows to port 80, want 3", seen)
	}
	if got, want := run("count"), "flows  5\ntable  10 of 2048 entries (0.5 %)\n\nPROTO  NEW  ANSWERED  ESTABLISHED  CLOSING  CLOSED\nicmp   0    0         1            0        0\ntcp    1    0         3            0        0\n"; got != want {
		t.Errorf("count prints\n%swant\n%s", got, want)
	}
	if got, want := run("count", "--json", "--proto", "icmp"), `{"entries":10,"max":2048,"flows":1,"by":{"icmp":{"established":1}}}`+"\n"; got != want {
		t.Errorf("count prints %swant %s", got, want)
	}
	for _, step := range []struct{ filter, want string }{
		{"--port 443", "deleted 1 flow\n"}, {"--port 443", "deleted 0 flows\n"}, {"--state established --proto tcp --json", `{"deleted":3}` + "\n"}, {"--all", "deleted 1 flow\n"},
	} {
		if got := run(append([]string{"delete"}, strings.Fields(step.filter)...)...); got != step.want {
			t.Errorf("delete %s prints %q, want %q", step.filter, got, step.want)
		}
	}
	if got := run("count"); !strings.Contains(got, "0 of 2048 entries") {
		t.Errorf("after all were deleted:\n%s", got)
	}
}

// TestStatusOfPinnedTables: without an agent, and with counters of a network that is in the topology no more.
func TestStatusOfPinnedTables(t *testing.T) {
	config, coll := tables(t)
	putFlow(t, coll.Maps["flows_initial"], 6, 40000, 80, 0, bpf.LaceFlowStateFLOW_NEW)
	for network, packets := range map[uint32]uint64{100: 5, 300: 7} {
		k := bpf.LaceRefusalKey{Network: network, Reason: uint32(bpf.LaceReasonREASON_NO_ROUTE)}
		if err := coll.Maps["refusals"].Put(k, bpf.LaceCounter{Packets: packets, Bytes: 100 * packets}); err != nil {
			t.Fatal(err)
		}
	}
	if err := coll.Maps["generation"].Put(uint32(0), uint32(6)); err != nil {
		t.Fatal(err)
	}
	var st status
	out := lace(t, "status", "--config", config, "--json")
	if err := json.Unmarshal([]byte(out), &st); err != nil || strings.Contains(out, "null") {
		t.Fatalf("%v in\n%s", err, out)
	}
	want := []trafficStatus{{"backend", 100, "no_route", 5, 500, true}, {"300", 300, "no_route", 7, 700, true}}
	if st.Generation != 6 || st.Conntrack != (fill{2, 2048}) || !slices.Equal(st.Traffic, want) {
		t.Errorf("status is %+v", st)
	}
}

// TestConntrackWithoutAgent: a host on which none has run is told so.
func TestConntrackWithoutAgent(t *testing.T) {
	file := writeFile(t, "lace.toml", "bpffs = \""+t.TempDir()+"\"\n")
	if err := runConntrack(t.Context(), hostEnv(), []string{"--config", file}); err == nil || !strings.Contains(err.Error(), "has an agent of this version run on this host") {
		t.Errorf("got %v", err)
	}
}
