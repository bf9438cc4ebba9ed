// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// outerNets is nets with three external networks from line 29 on: internet (29), office (33) and carrier (38). A test goes on at line 43.
const outerNets = nets + `[network.internet]
type = "external"
prefixes = ["0.0.0.0/0", "::/0"]
labels = { side = "out" }
[network.office]
type = "external"
id = 900
prefixes = ["192.0.2.0/24", "2001:db8::/32"]
labels = { side = "out" }
[network.carrier]
type = "external"
prefixes = ["100.64.0.0/10",
  "10.99.0.0/16"]
labels = { env = "prod" }
`

func outerPeering(from, to string, more ...string) string {
	return peering(from, to) + strings.Join(more, "\n") + "\n"
}

// ways writes the pairs of a topology with the way out, "web>internet:43 masquerade edge-1".
func ways(top *Topology) []string {
	pairs := []string{}
	for i, p := range top.Peerings {
		words := []string{joined(top)[i]}
		if p.Masquerade {
			words = append(words, "masquerade")
		}
		if p.Egress != "" {
			words = append(words, p.Egress)
		}
		pairs = append(pairs, strings.Join(words, " "))
	}
	return pairs
}

func TestExternal(t *testing.T) {
	top := mustParse(t, outerNets)
	roundTrip(t, top)
	for name, want := range map[string]string{
		"internet": "external 14921982 [0.0.0.0/0 ::/0] map[side:out] 29",
		"office":   "external 900 [192.0.2.0/24 2001:db8::/32] map[side:out] 33",
		"carrier":  "external 15040565 [10.99.0.0/16 100.64.0.0/10] map[env:prod] 38",
	} {
		n, _ := top.Network(name)
		if got := fmt.Sprint(n.Type, " ", n.ID, " ", n.Prefixes, " ", n.Labels, " ", n.Line); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
		for _, node := range []string{"edge-1", "edge-2"} {
			if n.On(node) || n.Block(node) != (Block{}) {
				t.Errorf("%s is on %s", name, node)
			}
		}
	}
}

// The number of an external network without an id is that of its name in every file, and apart from those that hosts and the outside have.
func TestDerivedID(t *testing.T) {
	for i := range 1000 {
		id := derivedID(fmt.Sprint("n", i))
		if id < 0xe00000 || id > 0xefffff || id >= FirstReserved {
			t.Fatalf("id %#x", id)
		}
	}
	if a, b := derivedID("internet"), derivedID("internet"); a != b || a == derivedID("office") {
		t.Errorf("ids %d and %d", a, b)
	}
	given := mustParse(t, outerNets)
	said := mustParse(t, strings.Replace(outerNets, "prefixes = [\"0.0.0.0/0\"", "id = 14921982\nprefixes = [\"0.0.0.0/0\"", 1))
	if given.Hash != said.Hash {
		t.Error("the id of a name, said, is another topology")
	}
}

// twins are two names of which the same number follows.
func twins(t testing.TB) (a, b string) {
	t.Helper()
	seen := map[NetworkID]string{}
	for i := range 1 << 16 {
		name := fmt.Sprint("x", i)
		if other, is := seen[derivedID(name)]; is {
			return other, name
		}
		seen[derivedID(name)] = name
	}
	t.Fatal("no two names have the same number")
	return "", ""
}

func TestDerivedIDClash(t *testing.T) {
	a, b := twins(t)
	text := base + fmt.Sprintf("[network.%s]\ntype='external'\nprefixes=['192.0.2.0/24']\n[network.%s]\ntype='external'\nprefixes=['198.51.100.0/24']\n", a, b)
	want := fmt.Sprintf("t.toml:17: network.%s.id: %d, which follows from the name, is the id of %s (line 14) too; write an id", b, derivedID(b), a)
	checkErrors(t, []errorCase{
		{"two names", text, want},
		{"a name and an id", base + fmt.Sprintf("[network.%s]\ntype='external'\nid=%d\nprefixes=['192.0.2.0/24']\n[network.%s]\ntype='external'\nprefixes=['198.51.100.0/24']\n", "first", derivedID(b), b),
			fmt.Sprintf("t.toml:18: network.%s.id: %d, which follows from the name, is the id of first (line 16) too; write an id", b, derivedID(b))},
	})
	roundTrip(t, mustParse(t, text+"id = 7\n"))
}

func TestOuterPeerings(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"out", outerPeering("'web'", "'internet'"), []string{"web>internet:43"}},
		{"masqueraded", outerPeering("'web'", "'internet'", "masquerade = true"), []string{"web>internet:43 masquerade"}},
		{"said not to be", outerPeering("'web'", "'internet'", "masquerade = false"), []string{"web>internet:43"}},
		{"by a node", outerPeering("'web'", "'internet'", "egress = 'edge-1'"), []string{"web>internet:43 edge-1"}},
		{"both", outerPeering("'web'", "'internet'", "masquerade = true", "egress = 'edge-2'"), []string{"web>internet:43 masquerade edge-2"}},
		{"in", outerPeering("'internet'", "'web'"), []string{"internet>web:43"}},
		{"both ways: masqueraded on the way out", outerPeering("'web'", "'internet'", "masquerade = true", "bidirectional = true", "egress = 'edge-1'"), []string{"internet>web:43", "web>internet:43 masquerade edge-1"}},
		{"both ways, from out there", outerPeering("'internet'", "'web'", "bidirectional = true"), []string{"internet>web:43", "web>internet:43"}},
		{"by labels", outerPeering("{ env = 'prod' }", "{ side = 'out' }", "masquerade = true"), []string{
			"metrics>internet:43 masquerade", "metrics>office:43 masquerade", "web>internet:43 masquerade", "web>office:43 masquerade"}},
		{"external ones among others", outerPeering("{ env = 'prod' }", "{ env = 'prod' }"), []string{
			"carrier>metrics:43", "carrier>web:43", "metrics>carrier:43", "metrics>web:43", "web>carrier:43", "web>metrics:43"}},
		{"the same twice", outerPeering("'web'", "'internet'", "masquerade = true") + outerPeering("{ tier = 'web' }", "{ side = 'out' }", "masquerade = true"), []string{
			"web>internet:43 masquerade", "web>office:47 masquerade"}},
		{"ways in, beside one out", outerPeering("'web'", "'internet'", "masquerade = true") + outerPeering("'internet'", "'web'"), []string{"internet>web:47", "web>internet:43 masquerade"}},
		{"one way each", outerPeering("'web'", "'internet'", "masquerade = true") + outerPeering("'db'", "'internet'", "egress = 'edge-1'"), []string{"db>internet:47 edge-1", "web>internet:43 masquerade"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			top := mustParse(t, outerNets+c.text)
			if diff := cmp.Diff(c.want, ways(top)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			roundTrip(t, top)
		})
	}
}

// outerErrors are as errorCases.
var outerErrors = []errorCase{
	// the network
	{"no prefixes", base + "[network.out]\ntype='external'\n", `t.toml:14: network.out.prefixes: is missing; add a list of prefixes, as ["0.0.0.0/0", "::/0"]`},
	{"empty prefixes", base + "[network.out]\ntype='external'\nprefixes=[]", `t.toml:16: network.out.prefixes: no prefix; add one, as 0.0.0.0/0`},
	{"a string", base + "[network.out]\ntype='external'\nprefixes='::/0'", `t.toml:16: network.out.prefixes: is the string "::/0"; write a list of prefixes, as ["0.0.0.0/0", "::/0"]`},
	{"keys of others", base + "[network.out]\ntype='external'\nprefixes=['::/0']\n" + strings.Join([]string{"subnets=['10.0.0.0/8']", "block-size.v4=24", "blocks={}", "pool-size.v4=24", "pools={}", "gateway=[]", "dhcp=true", "flood=true", "flood-rate=7", "host=true"}, "\n"), `t.toml:17: network.out.subnets: an external network has none; write prefixes
t.toml:18: network.out.block-size: an external network has none; leave it out
t.toml:19: network.out.blocks: an external network has none; leave it out
t.toml:20: network.out.pool-size: an external network has none; leave it out
t.toml:21: network.out.pools: an external network has none; leave it out
t.toml:22: network.out.gateway: an external network has none; leave it out: the hosts' own routes lead there
t.toml:23: network.out.dhcp: an external network has none; leave it out
t.toml:24: network.out.flood: an external network has none; leave it out
t.toml:25: network.out.flood-rate: an external network has none; leave it out
t.toml:26: network.out.host: an external network has none; leave it out: peerings say who reaches the hosts' own addresses`},
	{"subnets for prefixes", base + "[network.out]\ntype='external'\nsubnets=['10.0.0.0/8']", `t.toml:16: network.out.subnets: an external network has none; write prefixes`},
	{"prefixes for subnets, L3", change(13, "prefixes = ['10.40.0.0/16']"), `t.toml:13: network.backend.prefixes: an L3 network has none; write subnets`},
	{"prefixes for subnets, L2", changeOf(segment, 13, "prefixes = ['10.50.0.0/24']"), `t.toml:13: network.storage.prefixes: an L2 network has none; write subnets`},
	{"no id, L3", change(12, ""), `t.toml:10: network.backend.id: is missing; add a number from 1 to 16777199 that no other network has`},
	{"no type, prefixes", base + "[network.out]\nprefixes=['::/0']", `t.toml:14: network.out.type: is missing; add type = "l3", type = "l2" or type = "external"`},
	{"a type that is none, prefixes", base + "[network.out]\ntype='outside'\nprefixes=['::/0']", `t.toml:15: network.out.type: "outside" is no type of network that this version has; write type = "l3", type = "l2" or type = "external"`},
	{"a name that is none", base + "[network.Out]\ntype='external'\nprefixes=['::/0']", `t.toml:14: network.Out: "Out" is no network name`},
	{"id of hosts", change(12, "id = 16777215"), `t.toml:12: network.backend.id: 16777215 is one of the last sixteen numbers, which stand for hosts and for what is outside; choose a number from 1 to 16777199`},
	{"first reserved id", base + "[network.out]\ntype='external'\nid=16777200\nprefixes=['::/0']", `t.toml:16: network.out.id: 16777200 is one of the last sixteen numbers`},
	{"id as a string", base + "[network.out]\ntype='external'\nid='x'\nprefixes=['::/0']", `t.toml:16: network.out.id: is the string "x"; write a number from 1 to 16777199`},

	// its prefixes
	{"host bits", base + "[network.out]\ntype='external'\nprefixes=['::/0',\n'192.0.2.1/24']", `t.toml:17: network.out.prefixes[1]: "192.0.2.1/24" has host bits; write 192.0.2.0/24`},
	{"no length", base + "[network.out]\ntype='external'\nprefixes=['192.0.2.1']", `t.toml:16: network.out.prefixes[0]: "192.0.2.1" is no IP prefix: it has no length; write a list of prefixes`},
	{"multicast", outside("224.0.0.0/4", "ff02::/16"), "t.toml:16: network.out.prefixes[0]: 224.0.0.0/4 is in the multicast range 224.0.0.0/4; leave it out: no packet goes there\nt.toml:16: network.out.prefixes[1]: ff02::/16 is in the multicast range ff00::/8"},
	{"loopback", outside("127.0.0.0/8", "::1/128"), "t.toml:16: network.out.prefixes[0]: 127.0.0.0/8 is in the loopback range 127.0.0.0/8; leave it out: no packet goes there\nt.toml:16: network.out.prefixes[1]: ::1/128 is in the unspecified and loopback range ::/96"},
	{"link-local", outside("fe80::/10"), "t.toml:16: network.out.prefixes[0]: fe80::/10 is in the link-local range fe80::/10"},
	{"mapped", outside("::ffff:192.0.2.0/120"), `t.toml:16: network.out.prefixes[0]: "::ffff:192.0.2.0/120" is an IPv4 prefix in IPv6 clothes; write the IPv4 prefix itself`},
	{"unspecified", outside("0.0.0.0/8"), "0.0.0.0/8 is in the unspecified range 0.0.0.0/8"},
	{"locator block", outside("5f00:1ace::/32"), "t.toml:16: network.out.prefixes[0]: 5f00:1ace::/32 is in the locator block 5f00:1ace::/32; leave it out: what is in it is a SID"},
	{"locator", outside("2001:db8::/32", "5f00:1ace:1::/48"), "t.toml:16: network.out.prefixes[1]: 5f00:1ace:1::/48 is in the locator block"},
	{"prefix twice in one", outside("192.0.2.0/24", "192.0.2.0/24"), "t.toml:16: network.out.prefixes[1]: 192.0.2.0/24 is a prefix of out (line 16) already; leave one out"},
	{"prefix of two", outerNets + "[network.a]\ntype='external'\nprefixes=['198.51.100.0/24', '192.0.2.0/24']", "t.toml:45: network.a.prefixes[1]: 192.0.2.0/24 is a prefix of office (line 36) already; leave one out"},
	{"many prefixes", base + manyPrefixes(5000), "network: 5000 prefixes of external networks; at most 4096 are possible; leave some out, or split the topology"},
	{"many prefixes for many networks", base + networks(20) + manyPrefixes(4000) + numbered("[[peering]]\nfrom='n%d'\nto.a='b'\n", 20), "peering: 80000 prefixes of external networks, counted for each network that is peered with them; at most 65536 are possible"},

	// where networks of containers are meant
	{"router", outerNets + "[node.gw]\nkind='router'\nnetwork='internet'\nunderlay='fd00:a::9'\nlocator='5f00:1ace:9::/48'", "t.toml:45: node.gw.network: internet is an external network, and what is out there comes by no router of the overlay; name an L3 or an L2 network"},
	{"endpoint", outerNets + endpoint("nas", "network='office'\nnode='edge-1'\nmac='52:54:00:00:00:01'"), "t.toml:44: endpoint.nas.network: office is an external network; name an L2 network"},

	// peerings
	{"external with itself", outerNets + outerPeering("'internet'", "'internet'"), "t.toml:45: peering[0].to: joins internet with itself only"},
	{"two external ones", outerNets + outerPeering("'internet'", "'office'"), "t.toml:45: peering[0].to: joins external networks only, and what is between them is no concern of the overlay; name a network of containers on one side"},
	{"external ones by labels", outerNets + outerPeering("{ side = 'out' }", "{ side = 'out' }"), "t.toml:43: peering[0]: joins external networks only"},
	{"masquerade inside, by labels", outerNets + outerPeering("'db'", "{ env = 'prod' }", "masquerade = true"), "t.toml:46: peering[0].masquerade: metrics is no external network; leave it out, or name external networks only in to"},
	{"masquerade inwards", outerNets + outerPeering("'internet'", "'web'", "masquerade = true", "bidirectional = true"), "t.toml:46: peering[0].masquerade: web is no external network"},
	{"egress inwards", outerNets + outerPeering("'internet'", "'web'", "egress = 'edge-1'"), "t.toml:46: peering[0].egress: web is no external network"},
	{"egress unknown", outerNets + outerPeering("'web'", "'internet'", "egress = 'egde-1'"), `t.toml:46: peering[0].egress: no node has the name "egde-1"; did you mean "edge-1"?`},
	{"egress empty", outerNets + outerPeering("'web'", "'internet'", "egress = ''"), "t.toml:46: peering[0].egress: no node is named; there are edge-1, edge-2"},
	{"egress is a number", outerNets + outerPeering("'web'", "'internet'", "egress = 1"), `t.toml:46: peering[0].egress: is the integer 1; write the name of the node that packets leave by, as "edge-1"`},
	{"egress is a router", outerNets + outerPeering("'web'", "'internet'", "egress = 'gw'") + "[node.gw]\nkind='router'\nnetwork='web'\nunderlay='fd00:a::9'\nlocator='5f00:1ace:9::/48'", "t.toml:46: peering[0].egress: gw is a router: Lace does not run there; name a host"},
	{"masquerade is a string", outerNets + outerPeering("'web'", "'internet'", "masquerade = 'yes'"), `t.toml:46: peering[0].masquerade: is the string "yes"; write true or false`},
	{"twice with another masquerade", outerNets + outerPeering("'web'", "'internet'", "masquerade = true") + outerPeering("{ tier = 'web' }", "{ side = 'out' }"),
		"t.toml:47: peering[1]: web to internet is there already (line 43), with masquerade; here it is without masquerade; say the same in both, or leave one out"},
	{"twice with another egress", outerNets + outerPeering("{ env = 'prod' }", "{ side = 'out' }", "egress = 'edge-1'") + outerPeering("'web'", "'office'", "egress = 'edge-2'"),
		"t.toml:47: peering[1]: web to office is there already (line 43), without masquerade, egress = edge-1; here it is without masquerade, egress = edge-2"},
	{"against the direction", outerNets + outerPeering("'web'", "'internet'", "masquerade = true") + outerPeering("'internet'", "{ tier = 'web' }", "bidirectional = true"),
		"t.toml:47: peering[1]: web to internet is there already (line 43), with masquerade; here it is without masquerade"},
	{"twice by name", outerNets + outerPeering("'web'", "'internet'", "masquerade = true") + outerPeering("'web'", "'internet'"), "t.toml:47: peering[1]: web to internet is there already (line 43); leave one out"},
	{"L2 without a gateway", changeOf(segment, 13, `subnets = ["10.50.0.0/24"]`) + "[network.out]\ntype='external'\nprefixes=['0.0.0.0/0']\n" + peering("'storage'", "'out'"),
		`t.toml:10: network.storage.gateway: is peered with out (line 17) and has no IPv4 gateway that leads there; add one, as "10.50.0.1", or leave the peering out`},

	// overlaps
	{"open to one outside", subnetsIn(outerNets, 22, `"10.41.128.0/20"`) + outerPeering("'internet'", "'web'") + outerPeering("'internet'", "'db'"),
		"t.toml:22: network.db.subnets[0]: 10.41.128.0/20 overlaps 10.41.0.0/16 of web (line 17), and both are open to the outside: web to internet (line 43), db to internet (line 47); make them apart, or close one of them"},
	{"open to two", subnetsIn(outerNets, 22, `"10.41.128.0/20"`) + outerPeering("'internet'", "'web'") + outerPeering("'office'", "'db'"),
		"and both are open to the outside: web to internet (line 43), db to office (line 47)"},
	{"shadow", subnetsIn(outerNets, 22, `"10.99.0.0/16"`) + outerPeering("'web'", "'carrier'") + outerPeering("'db'", "'web'"),
		"t.toml:41: network.carrier.prefixes[1]: 10.99.0.0/16 is a subnet of db (line 22) too, and both are peered with web (lines 43 and 47); make them differ, or leave a peering out"},

	// hosts
	{"host is a string", base + "host = 'yes'", `t.toml:14: network.backend.host: is the string "yes"; write true or false`},
	{"host, L2 without a gateway", segment + "host = true\ngateway = ['10.50.0.1']", `t.toml:14: network.storage.host: there is no IPv6 gateway by which containers could answer hosts; add "fd50::1" to gateway, or leave host out`},
	{"hosts reach two", base + "host = true\n[network.b]\ntype='l3'\nid=7\nsubnets=['10.40.128.0/20']\nhost=true\n",
		"t.toml:18: network.b.subnets[0]: 10.40.128.0/20 overlaps 10.40.0.0/16 of backend (line 13), and both are open to the outside: backend to hosts (line 14), b to hosts (line 19); make them apart, or close one of them"},
	{"hosts reach one, the outside another", base + "host = true\n[network.b]\ntype='l3'\nid=7\nsubnets=['10.40.128.0/20']\n[network.out]\ntype='external'\nprefixes=['::/0']\n" + peering("'out'", "'b'"),
		"backend to hosts (line 14), b to out (line 22)"},
	{"hosts reach the underlay", change(13, "subnets = ['fd00:a::/48']\nhost = true"),
		"t.toml:13: network.backend.subnets[0]: fd00:a::/48 holds the underlay address fd00:a::1 of edge-1 (line 5), and hosts would look for it among the containers; choose another range, or leave host out"},

	// masquerade
	{"ports", masqueraded(`"all"`), `t.toml:15: masquerade.ports: "all" is no range of ports; write a range of ports, as "4096-32767"`},
	{"one port", masqueraded(`"10000"`), `"10000" is no range of ports`},
	{"ports without end", masqueraded(`"10000-"`), `"10000-" is no range of ports`},
	{"ports as a number", masqueraded(`10000`), `t.toml:15: masquerade.ports: is the integer 10000; write a range of ports, as "4096-32767"`},
	{"ports too high", masqueraded(`"10000-65536"`), `"10000-65536" is no range of ports`},
	{"ports with a sign", masqueraded(`"+10000-20000"`), `"+10000-20000" is no range of ports`},
	{"ports of services", masqueraded(`"1023-65535"`), `t.toml:15: masquerade.ports: 1023 is a port of services; begin at 1024 or above`},
	{"ports the wrong way", masqueraded(`"32767-10000"`), `t.toml:15: masquerade.ports: 32767-10000 has its ends the wrong way round; write a range of ports`},
	{"few ports", masqueraded(`"10000-10254"`), `t.toml:15: masquerade.ports: 10000-10254 has 255 ports only; make it at least 256`},
	{"masquerade key", base + "[masquerade]\nport = 1", `t.toml:15: masquerade.port: unknown key; did you mean "ports"?`},
}

// outside is base with an external network of these prefixes, on line 16.
func outside(prefixes ...string) string {
	return base + "[network.out]\ntype='external'\nprefixes=['" + strings.Join(prefixes, "', '") + "']\n"
}

func masqueraded(ports string) string { return base + "[masquerade]\nports = " + ports }

func subnetsIn(text string, line int, list string) string {
	return changeOf(text, line, "subnets = ["+list+"]")
}

func manyPrefixes(n int) string {
	var b strings.Builder
	b.WriteString("[network.many]\ntype='external'\nlabels.a='b'\nprefixes=[")
	for i := range n {
		fmt.Fprintf(&b, "'11.%d.%d.0/24',", i/256, i%256)
	}
	b.WriteString("]\n")
	return b.String()
}

func TestOuterErrors(t *testing.T) { checkErrors(t, outerErrors) }

// What is wide, of the host's own link or for later use may be outside; networks that reach the same outside may overlap as long as nobody
// addresses them from there.
func TestOuterAccepted(t *testing.T) {
	same := subnetsIn(outerNets, 22, `"10.41.0.0/16"`) // db has what web has
	for name, text := range map[string]string{
		"everything in halves":         outside("0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"),
		"around the locator block":     outside("5f00::/16"),
		"link-local IPv4":              outside("169.254.169.254/32"),
		"reserved IPv4":                outside("240.0.0.0/4"),
		"one in the other":             outside("192.0.2.0/24", "192.0.2.1/32", "192.0.0.0/16"),
		"overlap, both reach it":       same + outerPeering("'web'", "'internet'", "masquerade = true") + outerPeering("'db'", "'internet'", "masquerade = true"),
		"overlap, one is open":         same + outerPeering("'web'", "'internet'", "bidirectional = true") + outerPeering("'db'", "'internet'"),
		"a prefix as a subnet":         subnetsIn(outerNets, 22, `"10.99.0.0/16"`) + outerPeering("'web'", "'carrier'") + outerPeering("'metrics'", "'db'"),
		"a prefix as one's own subnet": subnetsIn(outerNets, 22, `"10.99.0.0/16"`) + outerPeering("'db'", "'carrier'"),
		"a prefix inside of a subnet":  subnetsIn(outerNets, 22, `"10.96.0.0/14"`) + outerPeering("'web'", "'carrier'") + outerPeering("'db'", "'web'"),
		"hosts reach one of two":       base + "host = true\n[network.b]\ntype='l3'\nid=7\nsubnets=['10.40.128.0/20']\nhost=false\n",
		"hosts reach an L2 network":    segment + "host = true\ngateway = ['10.50.0.1', 'fd50::1']\n",
		"L2 with the one gateway":      segment + "gateway = ['10.50.0.1']\n[network.out]\ntype='external'\nprefixes=['0.0.0.0/0']\n" + peering("'storage'", "'out'"),
		"all ports":                    masqueraded(`"1024-65535"`),
		"few ports":                    masqueraded(`"65280-65535"`),
		"last id":                      change(12, "id = 16777199"),
	} {
		t.Run(name, func(t *testing.T) { roundTrip(t, mustParse(t, text)) })
	}
}

func TestMasquerade(t *testing.T) {
	if m := mustParse(t, base).Masquerade; m != DefaultMasquerade() || m.String() != "4096-32767" {
		t.Errorf("by default %s", m)
	}
	if m := mustParse(t, base+"[masquerade]\n").Masquerade; m != DefaultMasquerade() {
		t.Errorf("of an empty table %s", m)
	}
	if m := mustParse(t, masqueraded(`"1024-65535"`)).Masquerade; m != (Masquerade{1024, 65535}) {
		t.Errorf("as given %s", m)
	}
}

// What changes where packets go changes the hash.
func TestOuterHash(t *testing.T) {
	seen := map[Hash]string{}
	for _, text := range []string{
		outerNets, outerNets + "[masquerade]\nports = '20000-30000'\n", strings.Replace(outerNets, "id = 102", "id = 102\nhost = true", 1),
		outerNets + outerPeering("'web'", "'internet'"), outerNets + outerPeering("'internet'", "'web'"),
		outerNets + outerPeering("'web'", "'internet'", "masquerade = true"), outerNets + outerPeering("'web'", "'internet'", "egress = 'edge-1'"),
		outerNets + outerPeering("'web'", "'internet'", "egress = 'edge-2'"),
		strings.Replace(outerNets, "192.0.2.0/24", "192.0.2.0/25", 1), strings.Replace(outerNets, "id = 900", "id = 901", 1),
	} {
		h := mustParse(t, text).Hash
		if other, is := seen[h]; is {
			t.Errorf("the same hash for\n%s\nand\n%s", text, other)
		}
		seen[h] = text
	}
	if a, b := mustParse(t, outside("192.0.2.0/24", "::/0")), mustParse(t, outside("::/0", "192.0.2.0/24")); a.Hash != b.Hash {
		t.Error("the order of prefixes is in the hash")
	}
}

// As many external networks, prefixes and selectors as fit.
func TestManyOuterPeeringsAreFast(t *testing.T) {
	var b strings.Builder
	b.WriteString(base)
	for i := range 250 {
		fmt.Fprintf(&b, "[network.e%d]\ntype='external'\nprefixes=['11.0.%d.0/24']\nlabels.out='yes'\n", i, i)
		fmt.Fprintf(&b, "[network.i%d]\ntype='l3'\nid=%d\nsubnets=['10.%d.0.0/16']\nlabels.out='no'\n", i, i+1000, i)
	}
	b.WriteString(strings.Repeat("[[peering]]\nfrom.out='no'\nto.out='yes'\nmasquerade=true\n", 10000))
	start := time.Now()
	top := mustParse(t, b.String())
	took := time.Since(start)
	t.Logf("10000 peerings of 250 networks with 250 external ones in %s", took)
	if len(top.Peerings) != 250*250 || took > 20*time.Second {
		t.Errorf("%d pairs in %s", len(top.Peerings), took)
	}
}

// Errors of each pair that differs are bounded as others are.
func TestOuterErrorsBounded(t *testing.T) {
	text := outerNets + outerPeering("'web'", "'internet'") + strings.Repeat(outerPeering("{ tier = 'web' }", "'internet'", "masquerade = true"), maxComplaints+50)
	_, err := Parse("t.toml", []byte(text))
	var errs Errors
	if !errors.As(err, &errs) || len(errs) != maxComplaints+1 {
		t.Fatalf("%d errors, want %d:\n%v", len(errs), maxComplaints+1, err)
	}
}
