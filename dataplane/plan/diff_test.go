// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/topology"
)

// built is a plan of the peered topology, with changes to its text, and of containers.
func built(t *testing.T, attachments []Attachment, changes ...string) *Plan {
	t.Helper()
	text := strings.NewReplacer(changes...).Replace(load(t, "peered").Canonical())
	top, err := topology.Parse("changed.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	p, err := Build(top, "edge-1", attachments)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var webContainer = Attachment{Container: "default/w", Name: "w", Network: "web", IfName: "eth0", V4: netip.MustParseAddr("10.41.1.2"), MAC: MAC{2, 0, 0, 0, 0, 1}}

const (
	webPeering = "[[peering]]\nfrom = \"web\"\nto = \"db\"\n"
	edge3      = "[node.edge-3]\nunderlay = 'fd00:a::3'\nlocator = '5f00:1ace:3::/48'\n"
	gw         = "[node.gw]\nkind='router'\nnetwork='web'\nunderlay='fd00:a::9'\nlocator='5f00:1ace:9::/48'\n"
	aDb        = "[network.cache]\ntype='l3'\nid=500\nsubnets=['10.45.0.0/16']\n"
)

func TestDiff(t *testing.T) {
	moved := webContainer
	moved.V4, moved.Sticky = netip.MustParseAddr("10.41.1.3"), true
	before := built(t, []Attachment{webContainer})
	for _, c := range []struct {
		name string
		next *Plan
		want string
	}{
		{"nothing", built(t, []Attachment{webContainer}), ""},
		{"lines only", built(t, []Attachment{webContainer}, "version = 1", "\n\n# words\nversion = 1"), ""},
		{"a label only", built(t, []Attachment{webContainer}, `watched = "yes" }`, `watched = "no" }`), ""},
		{"underlay", built(t, []Attachment{webContainer}, "fd00:a::1", "fd00:b::1", "reduced", "srh", "kind = \"host\"\nunderlay = \"fd00:a::2\"", "underlay = 'fd00:b::2'"), `
~ node: underlay fd00:b::1, was fd00:a::1; encapsulation srh, was reduced
~ peer edge-2: underlay fd00:b::2, was fd00:a::2`},
		{"via", built(t, []Attachment{webContainer}, "underlay = \"fd00:a::1\"", "underlay = \"fd00:a::1\"\nvia = 'fd00:a::fe'\nuplinks = ['eth0', 'eth1']"), `
~ node: uplinks eth0 eth1, was none; via fd00:a::fe, was none`},
		{"a node more, in front", built(t, []Attachment{webContainer}, "[node.edge-2]", "[node.edge-0]\nunderlay='fd00:a::3'\nlocator='5f00:1ace::/48'\n[node.edge-2]"), `
+ peer edge-0: host, underlay fd00:a::3, locator 5f00:1ace::/48
+ block db 10.42.64.0/24: on edge-0, SID 5f00:1ace:0:14:0:6400::
+ block metrics 10.43.0.0/24: on edge-0, SID 5f00:1ace:0:14:0:c800::
+ block web 10.41.0.0/24: on edge-0, SID 5f00:1ace:0:14:1:2c00::
+ block web fd41::/64: on edge-0, SID 5f00:1ace:0:14:1:2c00::
+ block apart 10.41.0.0/24: on edge-0, SID 5f00:1ace:0:14:1:9000::`},
		{"a router", built(t, []Attachment{webContainer}, "[node.edge-2]", gw+"[node.edge-2]"), `
+ peer gw: router, underlay fd00:a::9, locator 5f00:1ace:9::/48, network web
+ block web 10.41.9.0/24: on gw, SID 5f00:1ace:9:14:1:2c00::
+ block web fd41:0:0:9::/64: on gw, SID 5f00:1ace:9:14:1:2c00::`},
		{"a peering less", built(t, []Attachment{webContainer}, webPeering, ""), `
- peering web > db 10.42.0.0/20: ids 300 > 100
- peering web > db 10.42.64.0/20: ids 300 > 100`},
		{"a peering more", built(t, []Attachment{webContainer}, webPeering, webPeering+strings.NewReplacer("web", "db", "db", "web").Replace(webPeering)), `
+ peering db > web 10.41.0.0/16: ids 100 > 300
+ peering db > web fd41::/48: ids 100 > 300`},
		{"conntrack", built(t, []Attachment{webContainer}, "max = 262144", "max = 1024", `icmp = "1m0s"`, `icmp = "1s"`), `
~ conntrack: max 1024, was 262144; icmp 1s, was 1m0s`},
		{"an id", built(t, nil, "id = 400", "id = 401"), `
~ network apart: id 401, was 400; SID 5f00:1ace:1:14:1:9100::, was 5f00:1ace:1:14:1:9000::
~ block apart 10.41.2.0/24: SID 5f00:1ace:2:14:1:9100::, was 5f00:1ace:2:14:1:9000::
- port lacea6fe2e07605: container default/w, name w, network web, id 300, l3, interface eth0, addresses 10.41.1.2/32, mac 02:00:00:00:00:01, gateways 10.41.1.1 fd41:0:0:1::1, routes 10.41.0.0/16, source 5f00:1ace:1:5ce:1:2c00::`},
		{"a port", built(t, []Attachment{moved}), `
~ port lacea6fe2e07605: addresses 10.41.1.3/32, was 10.41.1.2/32; sticky yes, was none`},
		{"a network more", built(t, []Attachment{webContainer}, "[network.db]", aDb+"[network.db]"), `
+ network cache: id 500, l3, gateways 10.45.1.1/24, SID 5f00:1ace:1:14:1:f400::
+ block cache 10.45.1.0/24: here
+ block cache 10.45.2.0/24: on edge-2, SID 5f00:1ace:2:14:1:f400::`},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkChanges(t, before, c.next, c.want)
		})
	}
}

func checkChanges(t *testing.T, before, next *Plan, want string) {
	t.Helper()
	if diff := cmp.Diff(strings.TrimPrefix(want, "\n"), text(Diff(before, next))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	mirrored(t, before, next)
}

func text(changes []Change) string {
	lines := make([]string, len(changes))
	for i, c := range changes {
		lines[i] = c.String()
	}
	return strings.Join(lines, "\n")
}

// mirrored holds that the way back takes what the way there brings.
func mirrored(t *testing.T, a, b *Plan) {
	t.Helper()
	turn := map[string]string{"+": "-", "-": "+", "~": "~"}
	there, back := map[string]string{}, map[string]string{}
	for _, c := range Diff(a, b) {
		there[c.Object] = c.Op
	}
	for _, c := range Diff(b, a) {
		back[c.Object] = turn[c.Op]
	}
	if diff := cmp.Diff(there, back); diff != "" {
		t.Errorf("there and back (-there +back):\n%s", diff)
	}
}

// What a node sees of a network that is no longer its own.
func TestDiffForeign(t *testing.T) {
	both, err := Build(withForeign(t, "db", "metrics"), "edge-3", nil)
	if err != nil {
		t.Fatal(err)
	}
	one, err := Build(withForeign(t, "db"), "edge-3", nil)
	if err != nil {
		t.Fatal(err)
	}
	got := text(Diff(both, one))
	for _, line := range []string{
		"- network metrics: id 200, l3, gateways 10.43.3.1/24, SID 5f00:1ace:3:14:0:c800::", "+ foreign network metrics: id 200",
		"- block metrics 10.43.3.0/24: here", "- peering metrics > web 10.41.0.0/16: ids 200 > 300",
	} {
		if !strings.Contains(got+"\n", line+"\n") {
			t.Errorf("no line %q in\n%s", line, got)
		}
	}
	mirrored(t, both, one)
}

// The agent hands its plan over a socket: what arrives is what was sent.
func TestPlanSurvivesJSON(t *testing.T) {
	for _, c := range goldens {
		p, err := Build(load(t, c.topology), c.node, c.attachments)
		if err != nil {
			t.Fatal(err)
		}
		survives(t, p)
	}
	p, err := Build(withForeign(t, "db"), "edge-3", []Attachment{{Container: "default/x", Network: "db", IfName: "eth0", MAC: GatewayMAC, Sticky: true}})
	if err != nil {
		t.Fatal(err)
	}
	survives(t, p)
}

func survives(t *testing.T, p *Plan) {
	t.Helper()
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var got Plan
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if !reflect.DeepEqual(*p, got) {
		t.Errorf("sent\n%s\narrived\n%s\n%s", p, &got, text)
	}
	if changes := Diff(p, &got); len(changes) != 0 {
		t.Errorf("the plan that arrived differs: %v", changes)
	}
}

// Every field of a plan arrives, also those that no topology fills in.
func TestFilledPlanSurvivesJSON(t *testing.T) {
	var p Plan
	fill(t, reflect.ValueOf(&p).Elem())
	survives(t, &p)
}

// fill gives each field a value that is not its zero.
func fill(t *testing.T, v reflect.Value) {
	t.Helper()
	switch x := v.Addr().Interface().(type) {
	case *netip.Addr:
		*x = netip.MustParseAddr("fd00::7")
		return
	case *netip.Prefix:
		*x = netip.MustParsePrefix("fd00:7::/48")
		return
	case *topology.Encapsulation:
		*x = topology.SRH
		return
	case *topology.NodeKind:
		*x = topology.KindRouter
		return
	case *topology.NetworkType:
		*x = topology.L2
		return
	case *topology.L2GSO:
		*x = topology.Segment
		return
	case *time.Duration:
		*x = 7 * time.Second
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fallthrough
	case reflect.Array:
		for i := range v.Len() {
			fill(t, v.Index(i))
		}
	case reflect.String:
		v.SetString("seven")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int:
		v.SetInt(7)
	case reflect.Uint8, reflect.Uint16, reflect.Uint32:
		v.SetUint(7)
	default:
		t.Fatalf("no value for a %s", v.Type())
	}
}

func TestBadJSON(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{`{"ports":[{"mac":"02:00"}]}`, `"02:00" is no Ethernet address`},
		{`{"ports":[{"mac":"02:00:00:00:00:00:00:01"}]}`, "write 6 bytes in hexadecimal"},
		{`{"networks":[{"blockBits4":[129]}]}`, "129 is no length of a prefix; write 0 to 128"},
		{`{"networks":[{"blockBits4":"GA=="}]}`, "cannot unmarshal string"},
		{`{"topology":"abcd"}`, `"abcd" is no hash of a topology: it has 64 hexadecimal digits`},
		{`{"topology":"` + strings.Repeat("xy", 32) + `"}`, "invalid byte: U+0078 'x'"},
		{`{"conntrack":{"max":1}}`, "conntrack tcp-opening: "},
	} {
		var p Plan
		if err := json.Unmarshal([]byte(c.text), &p); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %s", c.text, err, c.want)
		}
	}
}

// unseen are the fields that Diff passes over: what is numbered, derived from others, or says where the file says it.
var unseen = map[string]bool{
	"Hash": true, "Line": true, "Index": true, "Table": true, "VRF": true, "Bridge": true, "BlockBits4": true, "BlockBits6": true,
	"Overhead": true,             // follows from encapsulation and type
	"V4":       true, "V6": true, // seen in the prefixes
	"Peer": true, // the filled block is a local one
}

// No field is forgotten: another value of any of them is a change.
func TestDiffSeesEveryField(t *testing.T) {
	var p Plan
	fill(t, reflect.ValueOf(&p).Elem())
	seen := 0
	leaves(reflect.ValueOf(&p).Elem(), "Plan", func(path string, v reflect.Value) {
		before := p.copy(t)
		was := reflect.New(v.Type()).Elem()
		was.Set(v)
		another(t, v)
		changes := Diff(before, &p)
		v.Set(was)
		if name := path[strings.LastIndex(path, ".")+1:]; !unseen[name] && len(changes) == 0 {
			t.Errorf("no change for another %s", path)
		}
		seen++
	})
	if seen < 50 {
		t.Errorf("only %d fields tried", seen)
	}
}

func (p *Plan) copy(t *testing.T) *Plan {
	t.Helper()
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var c Plan
	if err := json.Unmarshal(text, &c); err != nil {
		t.Fatal(err)
	}
	return &c
}

// leaves calls with every single value of a plan.
func leaves(v reflect.Value, path string, call func(path string, v reflect.Value)) {
	switch v.Addr().Interface().(type) {
	case *netip.Addr, *netip.Prefix, *MAC, *topology.Hash, *Lengths:
		call(path, v)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for field, value := range v.Fields() {
			leaves(value, path+"."+field.Name, call)
		}
	case reflect.Slice:
		for i := range min(v.Len(), 1) {
			v.SetLen(1) // all elements of a filled list have the same name
			leaves(v.Index(i), path, call)
		}
	default:
		call(path, v)
	}
}

// another gives a filled value another one.
func another(t *testing.T, v reflect.Value) {
	t.Helper()
	switch x := v.Addr().Interface().(type) {
	case *netip.Addr:
		*x = netip.MustParseAddr("fd00::8")
	case *netip.Prefix:
		*x = netip.MustParsePrefix("fd00:8::/48")
	case *MAC:
		*x = GatewayMAC
	case *topology.Hash:
		*x = topology.Hash{8}
	case *Lengths:
		*x = Lengths{8}
	default:
		switch v.Kind() {
		case reflect.String:
			v.SetString("eight")
		case reflect.Bool:
			v.SetBool(false)
		case reflect.Int, reflect.Int64:
			v.SetInt(int64(8 * time.Second))
		default:
			v.SetUint(0)
		}
	}
}
