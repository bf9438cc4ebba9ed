// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/topology"
)

var update = flag.Bool("update", false, "write the golden files anew")

func load(t testing.TB, name string) *topology.Topology {
	t.Helper()
	top, err := topology.Load(filepath.Join("testdata", name+".toml"))
	if err != nil {
		t.Fatal(err)
	}
	return top
}

var containers = []Attachment{
	{Container: "default/c1", Name: "web", Network: "backend", IfName: "eth0", V4: netip.MustParseAddr("10.40.1.2"), V6: netip.MustParseAddr("fd40:0:0:1::2"), MAC: MAC{2, 0, 0, 0, 0, 1}},
	{Container: "k8s.io/p1", Network: "storage", IfName: "eth0", V4: netip.MustParseAddr("10.40.0.66"), MAC: MAC{2, 0, 0, 0, 0, 2}, Sticky: true},
}

var goldens = []struct {
	name, topology, node string
	attachments          []Attachment
}{
	{"dual-stack", "fabric", "edge-1", containers},
	{"via-and-uplinks", "fabric", "edge-2", nil},
	{"alone", "alone", "one", nil},
	{"srh-ipv6-only", "srh", "b.example.org", nil},
	{"peered", "peered", "edge-2", nil},
	{"segments", "segments", "edge-1", onSegments},
	{"segments-elsewhere", "segments", "edge-3", nil},
	{"outside", "outside", "edge-2", []Attachment{webContainer}},
	{"outside-egress", "outside", "edge-1", nil},
}

func TestGolden(t *testing.T) {
	for _, c := range goldens {
		t.Run(c.name, func(t *testing.T) {
			p, err := Build(load(t, c.topology), c.node, c.attachments)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, c.name+".txt", p.String())
			text, err := json.MarshalIndent(p, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, c.name+".json", string(text)+"\n")
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v; write it with -update", err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got), write it anew with -update if it is right:\n%s", file, diff)
	}
}

// No order of the input shows in the plan, and nothing of the input is changed.
func TestDeterministic(t *testing.T) {
	deterministic(t, load(t, "fabric"), containers)
	deterministic(t, load(t, "peered"), nil)
	deterministic(t, load(t, "segments"), onSegments)
	deterministic(t, load(t, "outside"), nil)
}

func deterministic(t *testing.T, top *topology.Topology, containers []Attachment) {
	t.Helper()
	want, err := Build(top, "edge-1", containers)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		shuffled, attachments := *top, slices.Clone(containers)
		shuffled.Nodes, shuffled.Networks, shuffled.Peerings = slices.Clone(top.Nodes), slices.Clone(top.Networks), slices.Clone(top.Peerings)
		r.Shuffle(len(shuffled.Peerings), func(i, j int) {
			shuffled.Peerings[i], shuffled.Peerings[j] = shuffled.Peerings[j], shuffled.Peerings[i]
		})
		r.Shuffle(len(shuffled.Nodes), func(i, j int) {
			shuffled.Nodes[i], shuffled.Nodes[j] = shuffled.Nodes[j], shuffled.Nodes[i]
		})
		r.Shuffle(len(shuffled.Networks), func(i, j int) {
			shuffled.Networks[i], shuffled.Networks[j] = shuffled.Networks[j], shuffled.Networks[i]
		})
		r.Shuffle(len(attachments), func(i, j int) { attachments[i], attachments[j] = attachments[j], attachments[i] })
		before := slices.Clone(attachments)
		got, err := Build(&shuffled, "edge-1", attachments)
		if err != nil {
			t.Fatal(err)
		}
		if got.String() != want.String() {
			t.Fatalf("another order, another plan:\n%s", cmp.Diff(want.String(), got.String()))
		}
		if !slices.Equal(before, attachments) {
			t.Fatal("Build changed its input")
		}
	}
}

// Every node sends a block's packets to where its owner takes them, and to a peer that is there.
func TestNodesAgree(t *testing.T) {
	top := load(t, "fabric")
	plans := map[string]*Plan{}
	for _, n := range top.Nodes {
		if n.Kind == topology.KindHost {
			p, err := Build(top, n.Name, nil)
			if err != nil {
				t.Fatal(err)
			}
			plans[n.Name] = p
		}
	}
	for name, p := range plans {
		for i, peer := range p.Peers {
			if peer.Index != uint32(i+1) || peer.Name == name {
				t.Errorf("%s: peer %d is %+v", name, i, peer)
			}
		}
		for _, b := range p.Blocks {
			if b.Local {
				continue
			}
			peer := p.Peers[b.Peer-1]
			if !peer.Locator.Contains(b.SID.Addr) {
				t.Errorf("%s: block %s of %s goes to SID %s outside %s", name, b.Prefix, peer.Name, b.SID, peer.Locator)
			}
			if owner, ok := plans[peer.Name]; ok && !owner.takes(b) {
				t.Errorf("%s sends %s to %s, which does not take it", name, b.Prefix, peer.Name)
			}
		}
	}
}

func (p *Plan) takes(b Block) bool {
	sid := slices.ContainsFunc(p.Networks, func(n Network) bool { return n.ID == b.Network && n.SID == b.SID })
	return sid && slices.ContainsFunc(p.Blocks, func(own Block) bool {
		return own.Local && own.Network == b.Network && own.Prefix == b.Prefix
	})
}

func TestBuildErrors(t *testing.T) {
	top := load(t, "fabric")
	for _, c := range []struct {
		name, node  string
		attachments []Attachment
		want        string
	}{
		{"unknown node", "edge-9", nil, `the topology has no node "edge-9"; did you mean "edge-1"? It has edge-1, edge-2`},
		{"another node", "somewhere", nil, `the topology has no node "somewhere"; it has edge-1, edge-2`},
		{"no node", "", nil, `the topology has no node ""; it has edge-1, edge-2`},
		{"router", "gw", nil, `node "gw" is a router: Lace does not run there; name a host`},
		{"unknown network", "edge-1", []Attachment{{Container: "default/c", Network: "backed"}}, `container default/c: the topology has no network "backed"; did you mean "backend"?`},
		{"another network", "edge-1", []Attachment{{Container: "default/c", Network: "x-y-z"}}, `container default/c: the topology has no network "x-y-z"; it has backend, storage`},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := Build(top, c.node, c.attachments)
			if p != nil || err == nil || err.Error() != c.want {
				t.Errorf("got %v, %v\nwant %s", p, err, c.want)
			}
		})
	}
}

// A network's number is the topology's, whatever the attachment had when it was made.
func TestPortFollowsTopology(t *testing.T) {
	a := containers[0]
	a.NetworkID = 7
	p, err := Build(load(t, "fabric"), "edge-1", []Attachment{a})
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Ports[0]; got.NetworkID != 100 || got.Bridge != "laceb100" || got.HostIf != a.HostIf() {
		t.Errorf("got %+v", got)
	}
}

func TestHostIf(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range []Attachment{{Container: "a/b", IfName: "eth0"}, {Container: "a/b", IfName: "eth1"}, {Container: "a/be", IfName: "th0"}} {
		name := a.HostIf()
		if len(name) != 15 || !strings.HasPrefix(name, "lace") || seen[name] || name != a.HostIf() {
			t.Errorf("host interface %q of %+v", name, a)
		}
		seen[name] = true
	}
}

func TestWriteToReportsItsWriter(t *testing.T) {
	p, err := Build(load(t, "alone"), "one", nil)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	n, err := p.WriteTo(&b)
	if err != nil || n != int64(b.Len()) || b.String() != p.String() {
		t.Errorf("WriteTo: %d, %v; wrote %d bytes", n, err, b.Len())
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skipf("needs /dev/full: %v", err)
	}
	defer full.Close()
	if _, err := p.WriteTo(full); err == nil {
		t.Error("WriteTo a full device succeeded")
	}
}

func large(networks, nodes int) string {
	var b strings.Builder
	b.WriteString("version = 1\nunderlay.locator-block = '5f00:1ace::/32'\n")
	for i := range nodes {
		fmt.Fprintf(&b, "[node.n%d]\nunderlay='fd00:b::%x'\nlocator='5f00:1ace:%x::/48'\n", i, i+1, i)
	}
	for i := range networks {
		fmt.Fprintf(&b, "[network.n%d]\ntype='l3'\nid=%d\nsubnets=['10.0.0.0/8', 'fd40::/48']\n", i, i+1)
	}
	return b.String()
}

func BenchmarkBuild64Networks100Nodes(b *testing.B) {
	top, err := topology.Parse("large.toml", []byte(large(64, 100)))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		p, err := Build(top, "n50", nil)
		if err != nil || len(p.Blocks) != 64*100*2 {
			b.Fatalf("%d blocks, %v", len(p.Blocks), err)
		}
	}
}
