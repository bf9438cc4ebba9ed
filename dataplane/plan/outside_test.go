// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/topology"
)

func planOutside(t *testing.T, node string) *Plan {
	t.Helper()
	p, err := Build(load(t, "outside"), node, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// outwardRows writes peerings that lead out of the overlay as "300>internet 0.0.0.0/0 masquerade, by edge-1".
func outwardRows(p *Plan) []string {
	names := p.names()
	var out []string
	for _, x := range p.Peerings {
		if x.External {
			out = append(out, strings.TrimSpace(fmt.Sprintf("%d>%s %s %s", x.From, names.network(x.To), x.Prefix, outward(x, names.egress(x)))))
		}
	}
	return out
}

// Who has a network sends its packets out, by itself or by the node that is named; that one has the rows of those that it carries for.
func TestWaysOut(t *testing.T) {
	web := []string{"300>internet 0.0.0.0/0 masquerade", "300>internet ::/0 masquerade"}
	for node, want := range map[string][]string{
		"edge-1": slices.Concat([]string{
			"100>office 192.0.2.0/24 by edge-3", "100>office 2001:db8::/32 by edge-3",
			"200>internet 0.0.0.0/0 masquerade", "200>internet ::/0 masquerade"}, web),
		"edge-2": slices.Concat([]string{
			"100>office 192.0.2.0/24 by edge-3", "100>office 2001:db8::/32 by edge-3",
			"200>internet 0.0.0.0/0 masquerade, by edge-1", "200>internet ::/0 masquerade, by edge-1"}, web),
		"edge-3": slices.Concat([]string{"100>office 192.0.2.0/24", "100>office 2001:db8::/32"}, web),
	} {
		if diff := cmp.Diff(want, outwardRows(planOutside(t, node))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", node, diff)
		}
	}
}

// What comes from outside or from hosts comes in at any node, so that each has the rows, and the blocks that they lead to.
func TestWaysIn(t *testing.T) {
	want := []string{
		"900>300 10.41.0.0/16:59", "900>300 fd41::/48:59", "900>500 10.70.0.0/24:62",
		"14921982>300 10.41.0.0/16:49", "14921982>300 fd41::/48:49",
		"16777214>300 10.41.0.0/16:49", "16777214>300 fd41::/48:49", "16777214>500 10.70.0.0/24:62",
		"16777215>300 10.41.0.0/16:13", "16777215>300 fd41::/48:13", "16777215>400 10.60.0.0/24:29",
	}
	for node, foreign := range map[string]string{"edge-1": "lan cell vault", "edge-2": "cell", "edge-3": "vault"} {
		p := planOutside(t, node)
		got := slices.DeleteFunc(rows(p), func(row string) bool { return !slices.Contains(want, row) })
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", node, diff)
		}
		if len(p.Peerings) != len(want)+len(outwardRows(p)) {
			t.Errorf("%s has other rows too: %v", node, rows(p))
		}
		var names []string
		for _, n := range p.Foreign {
			names = append(names, n.Name)
			if !slices.ContainsFunc(p.Blocks, func(b Block) bool { return b.Network == n.ID && b.SID.IsValid() }) {
				t.Errorf("%s knows no block of %s", node, n.Name)
			}
		}
		if strings.Join(names, " ") != foreign {
			t.Errorf("%s: foreign networks %v, want %s", node, names, foreign)
		}
	}
}

func TestOutsideOfEveryNode(t *testing.T) {
	for _, node := range []string{"edge-1", "edge-2", "edge-3"} {
		p := planOutside(t, node)
		if got := join(p.HostRoutes); got != "10.41.0.0/16 10.60.0.0/24 fd41::/48" {
			t.Errorf("%s: host routes %s", node, got)
		}
		var externals []string
		for _, e := range p.Externals {
			externals = append(externals, fmt.Sprint(e.Name, " ", e.ID, " ", e.Prefixes, " ", e.Line))
		}
		want := []string{"office 900 [192.0.2.0/24 2001:db8::/32] 45", "internet 14921982 [0.0.0.0/0 ::/0] 42"}
		if diff := cmp.Diff(want, externals); diff != "" {
			t.Errorf("%s: external networks (-want +got):\n%s", node, diff)
		}
		if p.Masquerade != (topology.Masquerade{First: 20000, Last: 29999}) {
			t.Errorf("%s: masquerade %s", node, p.Masquerade)
		}
		for _, n := range p.Networks {
			if n.Type == topology.External || n.Host != (n.Name == "web" || n.Name == "cell") {
				t.Errorf("%s: network %+v", node, n)
			}
		}
	}
}

// A node sends what another one carries to a SID in whose network that one has a row for the sender, to be sent out there.
func TestNodesAgreeOnEgress(t *testing.T) {
	carried := 0
	for _, node := range []string{"edge-1", "edge-2", "edge-3"} {
		p := planOutside(t, node)
		for _, row := range p.Peerings {
			if row.Peer == 0 {
				if row.SID.IsValid() {
					t.Errorf("%s: row %+v leads nowhere by a SID", node, row)
				}
				continue
			}
			carried++
			peer := p.Peers[row.Peer-1]
			f, id, err := peer.Locator.ParseSID(row.SID.Addr)
			if err != nil || f != topology.EndDT46 || id != row.To {
				t.Errorf("%s: row %+v leads to function %d, network %d, %v", node, row, f, id, err)
			}
			here := row
			here.Peer, here.SID = 0, topology.SID{}
			if !slices.Contains(planOutside(t, peer.Name).Peerings, here) {
				t.Errorf("%s sends by %s what that has no row for: %+v", node, peer.Name, row)
			}
		}
	}
	if carried != 6 {
		t.Errorf("%d rows by other nodes", carried)
	}
}

// Without an external network and host = true nothing of it is planned.
func TestNothingOutside(t *testing.T) {
	p, err := Build(load(t, "peered"), "edge-1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if p.hostSide() || p.Externals != nil || p.HostRoutes != nil || strings.Contains(p.String(), HostSide) || strings.Contains(p.String(), "masquerade") {
		t.Errorf("planned:\n%s", p)
	}
}

func TestPublishText(t *testing.T) {
	for want, p := range map[string]Publish{
		"8080:80/tcp":               {Protocol: 6, Port: 8080, To: 80},
		"192.0.2.1:53:53/udp":       {Address: netip.MustParseAddr("192.0.2.1"), Protocol: 17, Port: 53, To: 53},
		"[2001:db8::1]:8080:80/tcp": {Address: netip.MustParseAddr("2001:db8::1"), Protocol: 6, Port: 8080, To: 80},
		"1:2/132":                   {Protocol: 132, Port: 1, To: 2},
	} {
		if got := p.String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestDiffOutside(t *testing.T) {
	const peering = "[[peering]]\nfrom = \"lan\"\nto = \"internet\"\nmasquerade = true\negress = \"edge-1\"\n"
	for _, c := range []struct{ name, old, new, want string }{
		{"ports", `"20000-29999"`, `"20000-29998"`, "~ masquerade: ports 20000-29998, was 20000-29999"},
		{"no masquerade", peering, strings.Replace(peering, "masquerade = true\n", "", 1), `
~ peering lan > internet 0.0.0.0/0: masquerade none, was yes
~ peering lan > internet ::/0: masquerade none, was yes`},
		{"another egress", peering, strings.Replace(peering, "edge-1", "edge-3", 1), `
~ peering lan > internet 0.0.0.0/0: by edge-3, was edge-1; SID 5f00:1ace:3:14:e3b0:fe00::, was 5f00:1ace:1:14:e3b0:fe00::
~ peering lan > internet ::/0: by edge-3, was edge-1; SID 5f00:1ace:3:14:e3b0:fe00::, was 5f00:1ace:1:14:e3b0:fe00::`},
		{"each its own", peering, strings.Replace(peering, "egress = \"edge-1\"\n", "", 1), `
~ peering lan > internet 0.0.0.0/0: by none, was edge-1; SID none, was 5f00:1ace:1:14:e3b0:fe00::
~ peering lan > internet ::/0: by none, was edge-1; SID none, was 5f00:1ace:1:14:e3b0:fe00::`},
		{"prefixes", `"192.0.2.0/24", `, "", `
~ external network office: prefixes 2001:db8::/32, was 192.0.2.0/24 2001:db8::/32
- peering db > office 192.0.2.0/24: ids 100 > 900, external yes, by edge-3, SID 5f00:1ace:3:14:3:8400::`},
		{"hosts", "id = 400\nsubnets = [\"10.60.0.0/24\"]\nhost = true", "id = 400\nsubnets = [\"10.60.0.0/24\"]\nhost = false", `
- foreign network cell: id 400
- host route 10.60.0.0/24: by lc-host
- block cell 10.60.0.32/28: on edge-3, SID 5f00:1ace:3:14:1:9000::
- peering hosts > cell 10.60.0.0/24: ids 16777215 > 400`},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, text := planOutside(t, "edge-2"), load(t, "outside").Canonical()
			if !strings.Contains(text, c.old) {
				t.Fatalf("no %q in\n%s", c.old, text)
			}
			top, err := topology.Parse("changed.toml", []byte(strings.Replace(text, c.old, c.new, 1)))
			if err != nil {
				t.Fatal(err)
			}
			next, err := Build(top, "edge-2", nil)
			if err != nil {
				t.Fatal(err)
			}
			checkChanges(t, before, next, c.want)
		})
	}
}

// No container is in an external network, and none is offered one.
func TestContainerOutside(t *testing.T) {
	top := load(t, "outside")
	for name, want := range map[string]string{
		"office":   "container c: network office is external, and no container is in it; name one of the overlay, and peer it with office",
		"internot": `container c: the topology has no network "internot"; it has cell, db, lan, vault, web`,
	} {
		a := Attachment{Container: "c", Network: name}
		if _, err := NewPort(top, "edge-1", a); err == nil || err.Error() != want {
			t.Errorf("a port: %v", err)
		}
		if _, err := Build(top, "edge-1", []Attachment{a}); err == nil || err.Error() != want {
			t.Errorf("a plan: %v", err)
		}
	}
}
