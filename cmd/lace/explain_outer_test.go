// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/plan"
)

// openNetworks: hosts and the office come in to web, which goes out by its own node; db goes out by edge-2, and backup by edge-1.
const openNetworks = `version = 1
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
host = true
[network.db]
type = "l3"
id = 200
subnets = ["10.50.0.0/16", "fd50::/48"]
[network.backup]
type = "l3"
id = 300
subnets = ["10.60.0.0/16"]
[network.internet]
type = "external"
prefixes = ["0.0.0.0/0"]
[network.office]
type = "external"
prefixes = ["203.0.113.0/24"]
[[peering]]
from = "web"
to = "internet"
masquerade = true
[[peering]]
from = "office"
to = "web"
[[peering]]
from = "db"
to = "internet"
masquerade = true
egress = "edge-2"
[[peering]]
from = "backup"
to = "internet"
egress = "edge-1"
`

// Lines of openNetworks.
const (
	lineOpenWeb    = 11
	lineToInternet = 30
	lineFromOffice = 34
	lineDBOut      = 37
	lineBackupOut  = 42
)

// opened is edge-1 of openNetworks: web-1 publishes port 80 as 8080, and out0 leads outside.
func opened(t *testing.T) *edge {
	t.Helper()
	n := newEdge(t, openNetworks)
	n.in(makeWayOut)
	n.open()
	n.wired("web-1", dataplane.Interface{Network: "web", IPs: []netip.Addr{address("10.40.1.10")}, Gateway: true,
		Publish: []plan.Publish{{Protocol: unix.IPPROTO_TCP, Port: 8080, To: 80}}})
	n.container("web-2", "web", "10.40.1.11")
	n.container("db-1", "db", "10.50.1.10")
	return n
}

// makeWayOut makes out0, with an address and a default route by it, and brings lo up.
func makeWayOut() error {
	const gateway = "192.0.2.254"
	out, err := makeLink("out0", "world0", "192.0.2.1/24", gateway)
	if err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(lo), netlink.RouteAdd(&netlink.Route{LinkIndex: out.Attrs().Index, Gw: net.ParseIP(gateway)}))
}

func TestExplainOfWhatIsOutside(t *testing.T) {
	n := opened(t)
	for _, tt := range []struct {
		name, args, stages, verdict string
		line                        int
		want                        []string // in the text
	}{
		{"masqueraded", "--from web-1 --to 198.51.100.7:443/tcp", "entry route exit masquerade deliver", "passed egress", lineToInternet,
			[]string{"way      out of the overlay by interface out0, next hop 192.0.2.254, path MTU 1500, becomes 192.0.2.1:", " > 198.51.100.7:443 (the port is another for each flow)",
				`[[peering]] from = "web" to = "internet" masquerade = true`, "next     the host's own routes decide: ip route get 198.51.100.7 from 10.40.1.10 iif lc-host"}},
		{"a masqueraded echo", "--from web-1 --to 198.51.100.7/icmp", "entry route exit masquerade deliver", "passed egress", lineToInternet, []string{"becomes 192.0.2.1 > 198.51.100.7 id "}},
		{"on the link", "--from web-1 --to 192.0.2.9:53/udp", "entry route exit masquerade deliver", "passed egress", lineToInternet, []string{"interface out0, next hop 192.0.2.9, "}},
		{"no route of that family", "--from web-1 --to [2001:db8::7]:443/tcp", "entry route error", "refused no_route", 0, nil},
		{"by another node", "--from db-1 --to 198.51.100.7:443/tcp", "entry route exit deliver", "passed encapsulated", lineDBOut,
			[]string{"node edge-2, SID 5f00:1ace:2:14:e", "edge-2 has it leave the overlay by its own routes. On edge-2 run: lace explain --from 10.50.1.10 --to 198.51.100.7:443/tcp --network db\n"}},
		{"of another node, by this one", "--from 10.60.2.9 --to 198.51.100.7:443/tcp", "entry route exit deliver", "passed egress", lineBackupOut,
			[]string{"out of the overlay by interface out0, next hop 192.0.2.254, path MTU 1500\n", "edge-2 decides first"}},
		{"to a container", "--from 203.0.113.9 --to 10.40.1.11:80/tcp", "entry enter deliver", "passed ingress", lineFromOffice,
			[]string{"from     203.0.113.9, external network office, interface out0\n", "container web-2 (default/web-2)"}},
		{"to a container of another node", "--from 203.0.113.9 --to 10.40.2.9:80/tcp", "entry enter deliver", "passed encapsulated", lineFromOffice,
			[]string{"On edge-2 run: lace explain --from 203.0.113.9 --to 10.40.2.9:80/tcp --network office --via edge-1\n"}},
		{"that another node carries here", "--from 203.0.113.9 --via edge-2 --to 10.40.1.11:80/tcp", "entry route deliver", "passed decapsulated", lineFromOffice,
			[]string{"203.0.113.9, external network office, by node edge-2\n", "On edge-2 run: lace explain --from 203.0.113.9 --to 10.40.1.11:80/tcp --network office\n"}},
		{"to a published port", "--from 203.0.113.9 --to 192.0.2.1:8080/tcp", "entry enter deliver", "passed ingress", lineFromOffice,
			[]string{"container web-1 (default/web-1), interface lace", "becomes 203.0.113.9:49152 > 10.40.1.10:80\n"}},
		{"to a published port that is closed", "--from 198.51.100.9 --to 192.0.2.1:8080/tcp", "entry enter", "refused no_peering", 0, nil},
		{"to a port of the host", "--from 203.0.113.9 --to 192.0.2.1:22/tcp", "entry", "none", 0, []string{"the host's own stack gets it"}},
		{"from the host", "--from host --to 10.40.1.10:80/tcp", "entry enter deliver", "passed from_host", lineOpenWeb, []string{"from     this host, 192.0.2.1, interface lc-host\n", "container web-1"}},
		{"from the host, by its address", "--from fd00:a::1 --to [fd40:0:0:1::a]:80/tcp", "entry enter deliver", "passed from_host", lineOpenWeb, []string{"this host, fd00:a::1, interface lc-host\n", "container web-1"}},
		{"from the host to another node", "--from host --to 10.40.2.9:80/tcp", "entry enter deliver", "passed encapsulated", lineOpenWeb,
			[]string{"On edge-2 run: lace explain --from 192.0.2.1 --to 10.40.2.9:80/tcp --network hosts --via edge-1\n"}},
		{"from the host to a network that is closed to it", "--from host --to 10.50.1.10:80/tcp", "", "none", 0, []string{"no network with host = true has the address"}},
		{"from the host to a published port", "--from host --to 192.0.2.1:8080/tcp", "entry enter deliver", "passed from_host", lineOpenWeb, []string{"this host, 192.0.2.1, interface lo\n", "becomes 192.0.2.1:49152 > 10.40.1.10:80\n"}},
		{"from localhost", "--from host --to 127.0.0.1:8080/tcp", "entry enter masquerade deliver", "passed from_host", lineOpenWeb, []string{"this host, 127.0.0.1, interface lo\n", " > 10.40.1.10:80 (the port is another for each flow)\n"}},
		{"from the host of another node", "--from fd00:a::2 --to [fd40:0:0:1::a]:80/tcp", "entry route deliver", "passed decapsulated", lineOpenWeb, []string{"fd00:a::2, the host of node edge-2\n"}},
		{"from another address of it", "--from 192.0.2.2 --via edge-2 --network hosts --to 10.40.1.10:80/tcp", "entry route deliver", "passed decapsulated", lineOpenWeb, []string{"192.0.2.2, the host of node edge-2\n"}},
		{"to the host", "--from web-1 --to 192.0.2.1:22/tcp", "entry route exit deliver", "passed to_host", lineToInternet, []string{"way      this host itself\n"}},
		{"to the host, from a network without it", "--from db-1 --to 192.0.2.1:22/tcp", "entry route exit error", "refused host_closed", lineDBOut, nil},
		{"to a published port of the same network", "--from web-2 --to 192.0.2.1:8080/tcp", "entry route exit deliver", "passed local", lineOpenWeb, []string{"container web-1", "becomes 10.40.1.11:49152 > 10.40.1.10:80\n"}},
		{"to its own published port", "--from web-1 --to 192.0.2.1:8080/tcp", "entry route exit masquerade deliver", "passed local", lineOpenWeb, []string{"becomes 192.0.2.1:"}},
	} {
		text, err := n.explain(tt.args)
		must(t, err)
		if got := strings.Join(found(text, `(?m)^stage +(\w+)`), " "); got != tt.stages {
			t.Errorf("%s: came to stages %q, want %q", tt.name, got, tt.stages)
		}
		if got := strings.Join(found(text, `(?m)^verdict +(\w+)(?:, (\w+))?: `), " "); got != tt.verdict {
			t.Errorf("%s: %q, want %q in\n%s", tt.name, got, tt.verdict, text)
		}
		if got := strings.Join(found(text, `(?m)^line +[^ ]*:(\d+): `), " "); tt.line != 0 && got != strconv.Itoa(tt.line) {
			t.Errorf("%s: line %s, want %d", tt.name, got, tt.line)
		}
		for _, want := range tt.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s: want %q in\n%s", tt.name, want, text)
			}
		}
	}
}

// found are the words that a form has in a text, in their order.
func found(text, form string) (words []string) {
	for _, m := range regexp.MustCompile(form).FindAllStringSubmatch(text, -1) {
		words = append(words, strings.TrimSpace(strings.Join(m[1:], " ")))
	}
	return words
}

func TestExplainSaysWhatIsNotOutside(t *testing.T) {
	n := opened(t)
	for args, want := range map[string]string{
		"--from 10.40.1.99 --to 192.0.2.1:8080/tcp":                    "in this node's block 10.40.1.0/24 of network web, and no container has it",
		"--from 5f00:1ace:2:14:: --to fd40::9/icmp":                    "in the locator block",
		"--from 203.0.113.9 --to 10.40.1.10:80/tcp --network internet": "203.0.113.9 is in network office, not in internet",
		"--from host --via edge-2 --to 10.40.1.10:80/tcp":              "does not come by node edge-2",
		"--from 203.0.113.9 --via edge-9 --to 10.40.1.10:80/tcp":       "no other host node of that name",
		"--from 2001:db8::9 --via edge-2 --to fd40::9/icmp":            "is in no external network, so node edge-2 brings no flow of it",
		"--from 10.50.2.9 --to 198.51.100.7:443/tcp":                   "does not leave the overlay here but at node edge-2, as line 37 of the topology says",
		"--from host --to 10.40.1.10/arp":                              "nothing but IP packets",
		"--from 203.0.113.9 --to fd40::9/icmp":                         "of different families",
	} {
		if _, err := n.explain(args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", args, err, want)
		}
	}
}

// TestExplainOfAHostWithoutRoutes: what the host does not know the way to is refused, and its routes can be asked.
func TestExplainOfAHostWithoutRoutes(t *testing.T) {
	n := opened(t)
	n.in(func() error {
		return netlink.RouteDel(&netlink.Route{Gw: net.ParseIP("192.0.2.254")})
	})
	x := n.explained("--from web-1 --to 198.51.100.7:443/tcp")
	if want := "the host's own routes decide: ip route get 198.51.100.7 from 10.40.1.10 iif lc-host"; x.Reason != "no_egress" || x.Next != want {
		t.Errorf("%s %s, next %q", x.Verdict, x.Reason, x.Next)
	}
}

// TestExplainReservesNoPort: what is asked aside takes no port, and leaves no flow and no count behind.
func TestExplainReservesNoPort(t *testing.T) {
	n := opened(t)
	before := n.footprints()
	for _, args := range []string{"--from web-1 --to 198.51.100.7:443/tcp", "--from host --to 127.0.0.1:8080/tcp", "--from 203.0.113.9 --to 192.0.2.1:8080/tcp",
		"--from web-1 --to 192.0.2.1:8080/tcp", "--from 10.60.2.9 --to 198.51.100.7:443/tcp"} {
		if x := n.explained(args); x.Verdict != "passed" {
			t.Errorf("%s: %s %s", args, x.Verdict, x.Reason)
		}
	}
	if after := n.footprints(); after != before {
		t.Errorf("before %s\nafter  %s", before, after)
	}
	m, done, err := hook.OpenMaps(n.bpffs)
	must(t, err)
	defer done()
	publishers, err := m.Publishers()
	must(t, err)
	if len(publishers) == 0 {
		t.Error("nothing is published, so nothing was shown")
	}
}
