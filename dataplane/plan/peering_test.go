// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/topology"
)

// rows writes peerings as "100>300 10.41.0.0/16:28".
func rows(p *Plan) []string {
	var out []string
	for _, x := range p.Peerings {
		out = append(out, fmt.Sprintf("%d>%d %s:%d", x.From, x.To, x.Prefix, x.Line))
	}
	return out
}

// One row for each subnet of the network that is reached, sorted by both ids and the prefix.
func TestPeeringRows(t *testing.T) {
	p, err := Build(load(t, "peered"), "edge-1", nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"100>200 10.43.0.0/16:31",
		"200>100 10.42.0.0/20:31", "200>100 10.42.64.0/20:31",
		"200>300 10.41.0.0/16:31", "200>300 fd41::/48:31",
		"300>100 10.42.0.0/20:28", "300>100 10.42.64.0/20:28",
		"300>200 10.43.0.0/16:31",
	}
	if diff := cmp.Diff(want, rows(p)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(p.Foreign) != 0 {
		t.Errorf("foreign networks %+v where each network has a block here", p.Foreign)
	}
	lines := map[string]int{}
	for _, n := range p.Networks {
		lines[n.Name] = n.Line
	}
	if diff := cmp.Diff(map[string]int{"web": 10, "db": 15, "metrics": 20, "apart": 24}, lines); diff != "" {
		t.Errorf("lines of the networks (-want +got):\n%s", diff)
	}
	if p.Conntrack.Max != 262144 || p.Conntrack.UDP != 6*time.Minute || p.Conntrack.ICMP != time.Minute {
		t.Errorf("conntrack %+v", p.Conntrack)
	}
}

// withForeign is the peered topology with a node, edge-3, that owns blocks of some networks only. The blocks of a network are
// those that its own topology says, so the others come from one in which edge-3 is not.
func withForeign(t *testing.T, own ...string) *topology.Topology {
	t.Helper()
	text := load(t, "peered").Canonical() + "[network.zone]\ntype='l3'\nid=500\nsubnets=['10.44.0.0/16']\n[[peering]]\nfrom='metrics'\nto='zone'\n"
	whole, err := topology.Parse("whole.toml", []byte(text+"\n[node.edge-3]\nunderlay='fd00:a::3'\nlocator='5f00:1ace:3::/48'\n"))
	if err != nil {
		t.Fatal(err)
	}
	without, err := topology.Parse("without.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range whole.Networks {
		if !slices.Contains(own, n.Name) {
			whole.Networks[i] = without.Networks[i]
		}
	}
	return whole
}

// A network without a block here is foreign where one with a block is peered with it; what two foreign networks do
// with each other is no concern of the node.
func TestForeign(t *testing.T) {
	for _, c := range []struct {
		own, foreign []string
		rows         []string
	}{
		{own: []string{"apart"}},
		{[]string{"db"}, []string{"metrics 200 [24] []", "web 300 [24] [64]"}, []string{"100>200 10.43.0.0/16", "200>100 10.42.0.0/20", "200>100 10.42.64.0/20", "300>100 10.42.0.0/20", "300>100 10.42.64.0/20"}},
		{[]string{"web", "apart"}, []string{"db 100 [24] []", "metrics 200 [24] []"}, []string{"200>300 10.41.0.0/16", "200>300 fd41::/48", "300>100 10.42.0.0/20", "300>100 10.42.64.0/20", "300>200 10.43.0.0/16"}},
	} {
		t.Run(strings.Join(c.own, "+"), func(t *testing.T) {
			p, err := Build(withForeign(t, c.own...), "edge-3", nil)
			if err != nil {
				t.Fatal(err)
			}
			checkForeign(t, p, c.own, c.foreign)
			var got []string
			for _, row := range rows(p) {
				got = append(got, row[:strings.LastIndex(row, ":")])
			}
			if diff := cmp.Diff(c.rows, got); diff != "" {
				t.Errorf("peerings (-want +got):\n%s", diff)
			}
		})
	}
}

func checkForeign(t *testing.T, p *Plan, own, foreign []string) {
	t.Helper()
	var got []string
	for _, f := range p.Foreign {
		got = append(got, fmt.Sprint(f.Name, " ", f.ID, " ", []uint8(f.BlockBits4), " ", []uint8(f.BlockBits6)))
		if f.Line == 0 {
			t.Errorf("foreign network %s has no line", f.Name)
		}
	}
	if diff := cmp.Diff(foreign, got); diff != "" {
		t.Errorf("foreign (-want +got):\n%s", diff)
	}
	if len(p.Networks) != len(own) {
		t.Errorf("%d networks, want %v", len(p.Networks), own)
	}
	if !slices.IsSortedFunc(p.Blocks, func(a, b Block) int { return int(a.Network) - int(b.Network) }) {
		t.Errorf("blocks are not in the order of the networks: %v", p.Blocks)
	}
	names := p.names()
	blocks := map[string]int{}
	for _, b := range p.Blocks {
		blocks[names.network(b.Network)]++
		if local := slices.Contains(own, names.network(b.Network)) && b.Peer == 0; b.Local != local {
			t.Errorf("block %+v of %s", b, names.network(b.Network))
		}
		if !b.Local && !b.SID.IsValid() {
			t.Errorf("block %+v has no SID", b)
		}
	}
	for _, f := range p.Foreign {
		if blocks[f.Name] == 0 {
			t.Errorf("no blocks of %s", f.Name)
		}
		if !strings.Contains(p.String(), fmt.Sprintf("%s, not here", f.Name)) {
			t.Errorf("the text does not tell of %s:\n%s", f.Name, p)
		}
	}
	if want := len(own) + len(foreign); len(blocks) != want {
		t.Errorf("blocks of %v, want of %d networks", blocks, want)
	}
}

// meshed is networks that are all peered with each other, and nodes.
func meshed(networks, nodes int) string {
	var b strings.Builder
	b.WriteString("version = 1\nunderlay.locator-block = '5f00:1ace::/32'\n")
	for i := range nodes {
		fmt.Fprintf(&b, "[node.n%d]\nunderlay='fd00:b::%x'\nlocator='5f00:1ace:%x::/48'\n", i, i+1, i)
	}
	for i := range networks {
		fmt.Fprintf(&b, "[network.n%d]\ntype='l3'\nid=%d\nsubnets=['10.%d.0.0/16', 'fd40:%x::/48']\nlabels.mesh='all'\n", i, i+1, i, i)
	}
	b.WriteString("[[peering]]\nfrom.mesh='all'\nto.mesh='all'\n")
	return b.String()
}

// From the text of a file to the plan of a node, for 64 networks that are all peered, 100 nodes.
func TestLargeMeshIsFast(t *testing.T) {
	text := meshed(64, 100)
	start := time.Now()
	top, err := topology.Parse("mesh.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	parsed := time.Since(start)
	p, err := Build(top, "n50", nil)
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	t.Logf("parse %s, build %s: %d peerings, %d blocks", parsed, took-parsed, len(p.Peerings), len(p.Blocks))
	if len(p.Peerings) != 64*63*2 || len(p.Blocks) != 64*100*2 {
		t.Errorf("%d peerings, %d blocks", len(p.Peerings), len(p.Blocks))
	}
	if took > 2*time.Second {
		t.Errorf("took %s", took)
	}
	start = time.Now()
	changes := Diff(p, p)
	t.Logf("difference in %s", time.Since(start))
	if len(changes) != 0 {
		t.Errorf("%d changes from a plan to itself, first %v", len(changes), changes[0])
	}
}
