// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// nets is base with three more networks from line 14 on, five lines each: web (14), db (19) and metrics (24). A test goes
// on at line 29.
const nets = base + `[network.web]
type = "l3"
id = 101
subnets = ["10.41.0.0/16"]
labels = { tier = "web", env = "prod" }
[network.db]
type = "l3"
id = 102
subnets = ["10.42.0.0/16"]
labels = { tier = "db", env = "test" }
[network.metrics]
type = "l3"
id = 103
subnets = ["10.43.0.0/16"]
labels = { env = "prod" }
`

// subnets is nets with the subnets of a network, which are on a line of nets, written anew.
func subnets(line int, list string) string {
	return changeOf(nets, line, "subnets = ["+list+"]")
}

// joined writes the pairs of a topology, "web>db:29".
func joined(top *Topology) []string {
	pairs := []string{}
	for _, p := range top.Peerings {
		pairs = append(pairs, fmt.Sprintf("%s>%s:%d", p.From, p.To, p.Line))
	}
	return pairs
}

func TestPeerings(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"none", "", []string{}},
		{"by name", "[[peering]]\nfrom = 'web'\nto = 'db'\n", []string{"web>db:29"}},
		{"both ways", "[[peering]]\nfrom = 'web'\nto = 'db'\nbidirectional = true\n", []string{"db>web:29", "web>db:29"}},
		{"one way, said so", "[[peering]]\nfrom = 'web'\nto = 'db'\nbidirectional = false\n", []string{"web>db:29"}},
		{"two ways in two tables", "[[peering]]\nfrom = 'web'\nto = 'db'\n[[peering]]\nfrom = 'db'\nto = 'web'\n", []string{"db>web:32", "web>db:29"}},
		{"selector", "[[peering]]\nfrom = { env = 'prod' }\nto = 'backend'\n", []string{"metrics>backend:29", "web>backend:29"}},
		{"all labels have to match", "[[peering]]\nfrom = { env = 'prod', tier = 'web' }\nto = 'db'\n", []string{"web>db:29"}},
		{"selector to selector", "[[peering]]\nfrom = { env = 'prod' }\nto.tier = 'db'\n", []string{"metrics>db:29", "web>db:29"}},
		{"mesh", "[[peering]]\nfrom = { env = 'prod' }\nto = { env = 'prod' }\n", []string{"metrics>web:29", "web>metrics:29"}},
		{"never itself", "[[peering]]\nfrom = 'web'\nto = { env = 'prod' }\n", []string{"web>metrics:29"}},
		{"first line wins", "[[peering]]\nfrom = { env = 'prod' }\nto = 'db'\n[[peering]]\nfrom = 'web'\nto = 'db'\nbidirectional = true\n", []string{"db>web:32", "metrics>db:29", "web>db:29"}},
		{"selectors may meet", "[[peering]]\nfrom = { env = 'prod' }\nto = 'db'\n[[peering]]\nfrom = { tier = 'web' }\nto = { tier = 'db' }\n", []string{"metrics>db:29", "web>db:29"}},
		{"a table in the table", "[[peering]]\nto = 'db'\n[peering.from]\ntier = 'web'\n", []string{"web>db:29"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			top := mustParse(t, nets+c.text)
			if diff := cmp.Diff(c.want, joined(top)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			roundTrip(t, top)
		})
	}
}

// An array written in one line is an array of tables too. It has to stand before the first table.
func TestInlinePeering(t *testing.T) {
	top := mustParse(t, "peering = [{ from = 'web', to = 'db' },\n{ from.env = 'prod', to = 'backend' }]\n"+nets)
	if diff := cmp.Diff([]string{"metrics>backend:2", "web>backend:2", "web>db:1"}, joined(top)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func peering(from, to string) string { return "[[peering]]\nfrom = " + from + "\nto = " + to + "\n" }

// peeringErrors are as errorCases.
var peeringErrors = []errorCase{
	{"no ends", nets + "[[peering]]", "t.toml:29: peering[0].from: is missing; add the name of a network, or labels, as { tier = \"web\" }\nt.toml:29: peering[0].to: is missing; add the name of a network, or labels, as { tier = \"web\" }"},
	{"a table, not an array", nets + "[peering]\nfrom = 'web'\nto = 'db'", `t.toml:29: peering: is a table; write a table [[peering]] for each peering`},
	{"wrong end", nets + peering("5", "'db'"), `t.toml:30: peering[0].from: is the integer 5; write the name of a network, or labels, as { tier = "web" }`},
	{"list of names", nets + peering("['web']", "'db'"), `t.toml:30: peering[0].from: is an array; write the name of a network, or labels, as { tier = "web" }`},
	{"wrong label", nets + peering("{ tier = 1 }", "'db'"), `t.toml:30: peering[0].from.tier: is the integer 1; write the name of a network, or labels, as { tier = "web" }`},
	{"wrong flag", nets + peering("'web'", "'db'") + "bidirectional = 'yes'", `t.toml:32: peering[0].bidirectional: is the string "yes"; write true or false`},
	{"masquerade inside", nets + peering("'web'", "'db'") + "masquerade = true", `t.toml:32: peering[0].masquerade: db is no external network; leave it out, or name external networks only in to`},
	{"egress inside", nets + peering("'web'", "'db'") + "egress = 'edge-1'", `t.toml:32: peering[0].egress: db is no external network; leave it out, or name external networks only in to`},
	{"misspelled flag", nets + peering("'web'", "'db'") + "bidirektional = true", `t.toml:32: peering[0].bidirektional: unknown key; did you mean "bidirectional"?`},

	{"unknown name", nets + peering("'web'", "'dbs'"), `t.toml:31: peering[0].to: no network has the name "dbs"; did you mean "db"?`},
	{"quite another name", nets + peering("'frontend-of-all'", "'db'"), `t.toml:30: peering[0].from: no network has the name "frontend-of-all"; there are backend, db, metrics, web`},
	{"empty name", nets + peering("''", "'db'"), `t.toml:30: peering[0].from: no network is named; there are backend, db, metrics, web`},
	{"no networks", base[:strings.Index(base, "[network")] + peering("'web'", "{ a = 'b' }"), "t.toml:11: peering[0].from: no network has the name \"web\"; the file has no network\nt.toml:12: peering[0].to: no network has a label \"a\"; the file has no network with labels"},
	{"itself", nets + peering("'web'", "'web'"), `t.toml:31: peering[0].to: joins web with itself only; choose another: inside a network nothing is in the way`},
	{"itself by label", nets + peering("'web'", "{ tier = 'web' }"), `t.toml:29: peering[0]: joins web with itself only; choose another`},
	{"mesh of one", nets + peering("{ tier = 'web' }", "{ tier = 'web' }"), `t.toml:29: peering[0]: joins web with itself only; choose another`},
	{"twice", nets + peering("'web'", "'db'") + peering("'web'", "'db'"), `t.toml:32: peering[1]: web to db is there already (line 29); leave one out`},
	{"twice, one both ways", nets + peering("'web'", "'db'") + "bidirectional = true\n" + peering("'db'", "'web'"), `t.toml:33: peering[1]: db to web is there already (line 29); leave one out`},
	{"twice, the later both ways", nets + peering("'web'", "'db'") + peering("'db'", "'web'") + "bidirectional = true\n", `t.toml:32: peering[1]: web to db is there already (line 29); leave one out`},

	{"no selector", nets + peering("{}", "'db'"), `t.toml:30: peering[0].from: selects by no label; write at least one label, as { tier = "web" }, or a name`},
	{"many labels", nets + peering("{"+strings.TrimSuffix(numbered("k%d='x',", 65), ",")+"}", "'db'"), `t.toml:30: peering[0].from: 65 labels; a network has at most 64; leave some out`},
	{"unknown key of a label", nets + peering("{ teir = 'web' }", "'db'"), `t.toml:30: peering[0].from: no network has a label "teir"; did you mean "tier"?`},
	{"quite another key", nets + peering("{ zone = 'a' }", "'db'"), `t.toml:30: peering[0].from: no network has a label "zone"; there are env, tier`},
	{"unknown value", nets + peering("{ tier = 'wbe' }", "'db'"), `t.toml:30: peering[0].from: no network has the label tier = "wbe"; did you mean "web"?`},
	{"quite another value", nets + peering("{ tier = 'cache' }", "'db'"), `t.toml:30: peering[0].from: no network has the label tier = "cache"; there are db, web`},
	{"labels never together", nets + peering("'web'", "{ tier = 'db', env = 'prod' }"), `t.toml:31: peering[0].to: no network has all of { env = "prod", tier = "db" }; leave a label out, or give one network all of them`},

	{"label of a network", change(13, "subnets = ['10.40.0.0/16']\nlabels = { a = 1 }"), `t.toml:14: network.backend.labels.a: is the integer 1; write a table of strings, as { tier = "web" }`},
	{"label text of a network", change(13, "subnets = ['10.40.0.0/16']\nlabels = { a = \"\\n\" }"), `t.toml:14: network.backend.labels.a: is no label; write printable ASCII, at most 63 bytes each`},
	{"many labels of a network", change(13, "subnets = ['10.40.0.0/16']\nlabels = {"+strings.TrimSuffix(numbered("k%d='x',", 65), ",")+"}"), `t.toml:14: network.backend.labels: 65 labels; at most 64 are possible`},

	{"overlap", subnets(22, `"10.41.128.0/20"`) + peering("'web'", "'db'"), `t.toml:22: network.db.subnets[0]: 10.41.128.0/20 overlaps 10.41.0.0/16 of web (line 17), with which it is peered (line 29); make them apart, or leave the peering out`},
	{"overlap against the direction", subnets(22, `"10.41.128.0/20"`) + peering("'db'", "'web'"), `t.toml:22: network.db.subnets[0]: 10.41.128.0/20 overlaps 10.41.0.0/16 of web (line 17), with which it is peered (line 29)`},
	{"overlap both ways", subnets(22, `"10.41.128.0/20"`) + peering("'web'", "'db'") + peering("'db'", "'web'"), `t.toml:22: network.db.subnets[0]: 10.41.128.0/20 overlaps 10.41.0.0/16 of web (line 17), with which it is peered (line 29)`},
	{"overlap by selector", subnets(22, `"10.41.0.0/16"`) + peering("{ env = 'prod' }", "{ env = 'test' }"), `t.toml:22: network.db.subnets[0]: 10.41.0.0/16 overlaps 10.41.0.0/16 of web (line 17), with which it is peered (line 29)`},
	{"overlap of the wider, later one", subnets(22, `"10.40.0.0/15"`) + peering("'web'", "'db'"), `t.toml:22: network.db.subnets[0]: 10.40.0.0/15 overlaps 10.41.0.0/16 of web (line 17), with which it is peered (line 29)`},
	{"overlap of the second subnet", subnets(22, `"10.42.0.0/16",`+"\n"+`"fd40:0:0:8000::/49"`) + peering("'db'", "'backend'"), `t.toml:23: network.db.subnets[1]: fd40:0:0:8000::/49 overlaps fd40::/48 of backend (line 13), with which it is peered (line 30)`},
	{"each pair once", subnets(22, `"10.41.0.0/20", "10.41.16.0/20", "10.41.32.0/20"`) + peering("'web'", "'db'") + "bidirectional = true", `t.toml:22: network.db.subnets[0]: 10.41.0.0/20 overlaps 10.41.0.0/16 of web (line 17), with which it is peered (line 29)`},
	{"overlap for a third", subnets(22, `"10.41.128.0/20"`) + peering("'web'", "'metrics'") + peering("'db'", "'metrics'"), `t.toml:22: network.db.subnets[0]: 10.41.128.0/20 overlaps 10.41.0.0/16 of web (line 17), and both are peered with metrics (lines 29 and 32); make them apart, or leave a peering out`},
	{"overlap for a third, by other directions", subnets(22, `"10.41.128.0/20"`) + peering("'metrics'", "'web'") + peering("'db'", "'metrics'"), `t.toml:22: network.db.subnets[0]: 10.41.128.0/20 overlaps 10.41.0.0/16 of web (line 17), and both are peered with metrics (lines 29 and 32)`},
	{"overlap behind a narrow one", subnets(22, `"10.41.4.0/22", "10.41.0.0/22"`) + peering("'web'", "'db'"), `t.toml:22: network.db.subnets[1]: 10.41.0.0/22 overlaps 10.41.0.0/16 of web (line 17), with which it is peered (line 29)`},

	{"too many pairs", meshed(300), "peering: more than 65536 pairs of networks; leave some out, or split the topology"},
}

// meshed is networks that are all peered with each other.
func meshed(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "[network.m%d]\nid=%d\ntype='l3'\nsubnets=['10.%d.%d.0/20']\nblock-size.v4=28\nlabels.mesh='all'\n", i, i+1000, 64+i/16, i%16*16)
	}
	return base + b.String() + peering("{ mesh = 'all' }", "{ mesh = 'all' }")
}

func TestPeeringErrors(t *testing.T) { checkErrors(t, peeringErrors) }

// What is wrong with many peerings is said of the first, and counted.
func TestPeeringErrorsBounded(t *testing.T) {
	text := nets + strings.Repeat(peering("'wbe'", "'db'"), maxComplaints+50)
	_, err := Parse("t.toml", []byte(text))
	var errs Errors
	if !errors.As(err, &errs) || len(errs) != maxComplaints+1 {
		t.Fatalf("%d errors, want %d:\n%v", len(errs), maxComplaints+1, err)
	}
	want := Error{"t.toml", 29, "peering", "50 more errors are not shown", "mend these first"}
	if errs[0] != want {
		t.Errorf("first %+v, want %+v", errs[0], want)
	}
}

// Tables are counted before any is looked at, in a file of which each is the least there can be.
func TestTooManyTables(t *testing.T) {
	b := &builder{file: "t.toml", topology: &Topology{}}
	tables, none := make([]rawPeering, MaxPeerings+1), ""
	for i := range tables {
		tables[i].From.name, tables[i].To.name = &none, &none // wrong as well, if it were looked at
	}
	b.peerings(tables)
	want := "t.toml: peering: 65537 peerings; at most 65536 are possible; leave some out, or split the topology"
	if got := b.errs.Error(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// Networks that do not meet may overlap.
func TestOverlapAccepted(t *testing.T) {
	overlap := subnets(22, `"10.41.0.0/16"`) // db has what web has
	for name, text := range map[string]string{
		"without peerings": overlap,
		"one peered":       overlap + peering("'web'", "'metrics'"),
		"two steps apart":  overlap + peering("'web'", "'metrics'") + peering("'metrics'", "'backend'") + peering("'backend'", "'db'"),
		"other pairs":      overlap + "[network.more]\ntype='l3'\nid=7\nsubnets=['10.44.0.0/16']\n" + peering("'web'", "'metrics'") + peering("'db'", "'more'"),
	} {
		t.Run(name, func(t *testing.T) { roundTrip(t, mustParse(t, text)) })
	}
}

// The pairs of networks that are refused are those that a search without any cleverness finds.
func TestOverlapsAgainstSearch(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	found := 0
	for round := range 200 {
		b := randomPeered(r, 12)
		want := b.searched()
		b.overlaps(b.neighbours())
		got := map[string]bool{}
		for _, e := range b.errs {
			_, rest, _ := strings.Cut(e.Problem, " of ")
			other, _, _ := strings.Cut(rest, " (")
			names := []string{strings.Split(e.Key, ".")[1], other}
			slices.Sort(names)
			got[strings.Join(names, " ")] = true
		}
		if diff := cmp.Diff(want, got); diff != "" || len(got) != len(b.errs) {
			t.Fatalf("round %d, %d errors (-want +got):\n%s", round, len(b.errs), diff)
		}
		found += len(got)
	}
	if found < 100 {
		t.Errorf("only %d overlaps in all: the test does not try much", found)
	}
}

// randomPeered is networks with random subnets, apart within each, and a few random peerings.
func randomPeered(r *rand.Rand, n int) *resolver {
	b := &builder{topology: &Topology{}}
	for i := range n {
		network := &Network{Name: fmt.Sprintf("n%d", i), Type: L3, Host: r.IntN(10) == 0}
		if r.IntN(4) == 0 {
			network.Type, network.Host = External, false
			b.topology.Networks = append(b.topology.Networks, network)
			continue
		}
		for range 1 + r.IntN(3) {
			a := netip.AddrFrom4([4]byte{10, byte(r.IntN(16)) << 4, byte(r.IntN(4)) << 6, 0})
			if r.IntN(4) == 0 {
				a = join(0xfd<<56|uint64(r.IntN(16))<<40, 0)
			}
			p := netip.PrefixFrom(a, 12+r.IntN(8)).Masked()
			if !slices.ContainsFunc(network.Subnets, p.Overlaps) {
				network.Subnets = append(network.Subnets, p)
			}
		}
		b.topology.Networks = append(b.topology.Networks, network)
	}
	res := newResolver(b)
	for range r.IntN(n) {
		if from, to := r.IntN(n), r.IntN(n); from != to && !(res.external.has(from) && res.external.has(to)) {
			res.joins[pair{from, to}] = 1
		}
	}
	return res
}

func (r *resolver) meet(i, j int) bool {
	_, there := r.joins[pair{i, j}]
	_, back := r.joins[pair{j, i}]
	return there || back
}

// addressed says whether hosts or an external network may open flows to a network.
func (r *resolver) addressed(i int) bool {
	is := r.networks[i].Host
	for p := range r.joins {
		is = is || p.to == i && r.networks[p.from].Type == External
	}
	return is
}

func (r *resolver) searched() map[string]bool {
	found := map[string]bool{}
	for i := range r.networks {
		for j := range i {
			near := r.meet(i, j)
			for k, n := range r.networks {
				near = near || n.Type != External && r.meet(i, k) && r.meet(j, k)
			}
			near = near || r.addressed(i) && r.addressed(j)
			for _, x := range r.networks[i].Subnets {
				if near && slices.ContainsFunc(r.networks[j].Subnets, x.Overlaps) {
					names := []string{r.networks[i].Name, r.networks[j].Name}
					slices.Sort(names)
					found[strings.Join(names, " ")] = true
				}
			}
		}
	}
	return found
}

// Lines and spelling are no part of the meaning of a peering; its pairs are.
func TestPeeringHash(t *testing.T) {
	h := mustParse(t, nets+peering("{ env = 'prod' }", "'db'")).Hash
	for _, text := range []string{
		nets + peering("'metrics'", "'db'") + "# twice\n" + peering("'web'", "'db'"),
		nets + peering("{ tier = 'web' }", "{ tier = 'db' }") + peering("{ env = 'prod' }", "'db'"),
	} {
		if got := mustParse(t, text).Hash; got != h {
			t.Errorf("hash %s, want %s, of\n%s", got, h, text)
		}
	}
	for _, text := range []string{nets, nets + peering("'web'", "'db'"), nets + peering("'db'", "{ env = 'prod' }")} {
		if got := mustParse(t, text).Hash; got == h {
			t.Errorf("the same hash for\n%s", text)
		}
	}
}

// 64 networks that are all peered with each other, and 100 nodes.
func TestManyPeeringsAreFast(t *testing.T) {
	text := meshed(64) + nodes(98)
	start := time.Now()
	top := mustParse(t, text)
	took := time.Since(start)
	t.Logf("%d pairs of 64 networks in %s", len(top.Peerings), took)
	if len(top.Peerings) != 64*63 || took > 2*time.Second {
		t.Errorf("%d pairs in %s", len(top.Peerings), took)
	}
}

// Every network has the same subnets, so that there is an overlap wherever two meet.
func TestManyOverlapsAreFast(t *testing.T) {
	text := base + strings.ReplaceAll(networks(1000), "\n[", "\nlabels.mesh='all'\n[") + peering("{ mesh = 'all' }", "'n999'")
	start := time.Now()
	_, err := Parse("t.toml", []byte(text))
	took := time.Since(start)
	t.Logf("1000 networks that overlap in %s", took)
	var errs Errors
	if !errors.As(err, &errs) || len(errs) != maxComplaints+1 || took > 10*time.Second {
		t.Errorf("%d errors in %s: %v", len(errs), took, errs[:min(2, len(errs))])
	}
}

// The files that come with Lace are right, and the reference file says the defaults of conntrack.
func TestFilesOfConf(t *testing.T) {
	reference, err := Load("../conf/topology.toml")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(DefaultConntrack(), reference.Conntrack); diff != "" {
		t.Errorf("conntrack of conf/topology.toml (-default +file):\n%s", diff)
	}
	if reference.Masquerade != DefaultMasquerade() {
		t.Errorf("masquerade of conf/topology.toml is %s", reference.Masquerade)
	}
	for _, key := range DefaultConntrack().keys() {
		if text, err := ReadFile("../conf/topology.toml"); err != nil || !strings.Contains(string(text), "\n"+key+" = ") {
			t.Errorf("conf/topology.toml does not show %s (%v)", key, err)
		}
	}
	for file, want := range map[string][]string{
		"two-nodes": {}, "three-racks": {}, "mixed": {"web>storage:40"},
		"peering": {"db>metrics:39", "metrics>db:39", "web>db:35"},
	} {
		top, err := Load("../conf/lab/" + file + ".toml")
		if err != nil {
			t.Error(err)
		} else if diff := cmp.Diff(want, joined(top)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", file, diff)
		}
	}
}

func (c Conntrack) keys() []string {
	keys := []string{"max"}
	for _, t := range c.times() {
		keys = append(keys, t.key)
	}
	return keys
}
