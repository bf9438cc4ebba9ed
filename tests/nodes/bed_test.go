// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane"
)

// uplink is the interface of a node to the underlay; its other end in the namespace wire is called after the node.
const uplink = "up0"

// twoNetworks have the same subnets, so that all their addresses are the same.
const twoNetworks = `
[network.backend]
type = "l3"
id = 100
subnets = ["10.40.0.0/16", "fd40::/48"]
[network.other]
type = "l3"
id = 200
subnets = ["10.40.0.0/16", "fd40::/48"]
`

// bed is nodes n1, n2 … of one topology, joined by a switch: addresses fd00:a::N, locators 5f00:1ace:N::/48.
type bed struct {
	*fabric
	wire  *namespace
	nodes []*node
}

// fabric is what the nodes of a test have in common.
type fabric struct {
	t        testing.TB
	topology string
}

// node is a host: a namespace, and the agent that runs there now.
type node struct {
	*namespace
	*fabric
	host  string
	bpffs string
	agent *agent
	log   lockedBuffer
}

// bedOptions change the topology.
type bedOptions struct {
	nodes    int
	srh      bool
	underlay string // keys of [underlay] to add
	networks string // instead of twoNetworks
	more     string // tables to add
	perNode  string // keys for every node
	prepare  func(b *bed)
}

// newBed makes the nodes and starts their agents.
func newBed(t *testing.T, o bedOptions) *bed {
	t.Helper()
	needRoot(t)
	b := &bed{fabric: &fabric{t: t, topology: o.topology()}, wire: newNamespace(t, "wire")}
	must(t, b.wire.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("switch")}))
	must(t, b.wire.LinkSetUp(b.wire.link(t, "switch")))
	for i := range o.nodes {
		n := b.newNode(fmt.Sprintf("n%d", i+1))
		b.nodes = append(b.nodes, n)
		b.plug(n.namespace, uplink, n.host)
		n.give(t, uplink, fmt.Sprintf("fd00:a::%d/64", i+1))
		n.doubtNeighbours(t)
	}
	if o.prepare != nil {
		o.prepare(b)
	}
	b.startAll(b.nodes...)
	return b
}

func (o bedOptions) topology() string {
	var text strings.Builder
	text.WriteString("version = 1\n[underlay]\nlocator-block = \"5f00:1ace::/32\"\n")
	if o.srh {
		text.WriteString("encapsulation = \"srh\"\n")
	}
	text.WriteString(o.underlay + "\n")
	for i := range o.nodes {
		fmt.Fprintf(&text, "[node.n%d]\nunderlay = \"fd00:a::%[1]d\"\nlocator = \"5f00:1ace:%[1]d::/48\"\n", i+1)
		text.WriteString(o.perNode + "\n")
	}
	if o.networks == "" {
		o.networks = twoNetworks
	}
	return text.String() + o.networks + o.more
}

// doubtNeighbours has the kernel ask after seconds whether a neighbour is still there, instead of half a minute.
func (n *node) doubtNeighbours(t testing.TB) {
	t.Helper()
	n.sysctl(t, "ipv6/neigh/"+uplink+"/base_reachable_time_ms", "2000")
	n.sysctl(t, "ipv6/neigh/"+uplink+"/delay_first_probe_time", "1")
}

// plug joins an interface to the switch.
func (b *bed) plug(n *namespace, link, port string) {
	b.t.Helper()
	joinNamespaces(b.t, n, link, b.wire, port)
	must(b.t, b.wire.LinkSetMaster(b.wire.link(b.t, port), b.wire.link(b.t, "switch")))
}

// newNode makes a node without an agent. When a test failed, what its agents said is shown.
func (f *fabric) newNode(host string) *node {
	f.t.Helper()
	n := &node{namespace: newNamespace(f.t, host), fabric: f, host: host}
	n.bpffs = fmt.Sprintf("/sys/fs/bpf/%s", n.name)
	f.t.Cleanup(func() {
		if n.agent != nil {
			n.agent.kill()
		}
		os.RemoveAll(n.bpffs)
		if f.t.Failed() {
			f.t.Logf("agent of %s:\n%s", host, n.log.String())
		}
	})
	return n
}

func (f *fabric) startAll(nodes ...*node) {
	f.t.Helper()
	for _, n := range nodes {
		n.launch()
	}
	for _, n := range nodes {
		n.awaitReady()
	}
}

// launch starts the node's agent and does not wait for it.
func (n *node) launch() {
	n.t.Helper()
	var err error
	n.agent, err = startAgent(n.namespace, agentSetup{Topology: n.topology, Node: n.host, BPFFS: n.bpffs}, &n.log)
	must(n.t, err)
}

func (n *node) awaitReady() {
	n.t.Helper()
	if err := n.agent.awaitReady(); err != nil {
		n.t.Fatalf("the agent of %s: %v\n%s", n.host, err, n.log.String())
	}
}

func (n *node) start() {
	n.t.Helper()
	n.launch()
	n.awaitReady()
}

// stop ends the agent; what the kernel holds stays.
func (n *node) stop() {
	n.agent.stop()
	n.agent = nil
}

// uninstall takes everything of Lace off the node.
func (n *node) uninstall() {
	n.t.Helper()
	a, err := startAgent(n.namespace, agentSetup{BPFFS: n.bpffs, Remove: true}, &n.log)
	must(n.t, err)
	if err := a.awaitReady(); !errors.Is(err, errEnded) {
		n.t.Fatalf("remove Lace from %s: %v", n.host, err)
	}
}

func (n *node) status() status {
	n.t.Helper()
	got, err := n.agent.call(order{Do: "status"})
	must(n.t, err)
	return got.Status
}

// apply brings another topology into force, without a restart.
func (n *node) apply(topology string) dataplane.Applied {
	n.t.Helper()
	got, err := n.agent.call(order{Do: "apply", Topology: topology})
	must(n.t, err)
	return got.Applied
}

// flows are those that the node knows from one end to the other, in the direction in which they were opened. Zero ends
// mean any, maxFlows of them at most.
func (n *node) flows(src, dst netip.AddrPort) []flow {
	n.t.Helper()
	got, err := n.agent.call(order{Do: "flows", Ends: [2]netip.AddrPort{src, dst}})
	must(n.t, err)
	return got.Flows
}

// flowOf is the flow of a connected socket, if the node knows it.
func (n *node) flowOf(c net.Conn) (flow, bool) {
	n.t.Helper()
	all := n.flows(netip.MustParseAddrPort(c.LocalAddr().String()), netip.MustParseAddrPort(c.RemoteAddr().String()))
	if len(all) == 0 {
		return flow{}, false
	}
	return all[0], true
}

// counter is how many packets had a reason so far.
func (n *node) counter(reason string) uint64 {
	n.t.Helper()
	return n.status().Counters[reason]
}

// generation is the one pin that is another with every agent.
var generation = regexp.MustCompile(`^stages/[0-9]+$`)

// pins lists what the agent has below its directory, in order.
func (n *node) pins() []string {
	n.t.Helper()
	var all []string
	err := filepath.WalkDir(n.bpffs, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			all = append(all, generation.ReplaceAllString(strings.TrimPrefix(path, n.bpffs+"/"), "stages/N"))
		}
		return err
	})
	must(n.t, err)
	return all
}

// linkPins are the pins of programs at interfaces.
func (n *node) linkPins() []string {
	n.t.Helper()
	return slices.DeleteFunc(n.pins(), func(p string) bool { return !strings.HasPrefix(p, "links/") })
}

// portLinks are the host ends of containers' veths.
func (n *node) portLinks(t testing.TB) []string {
	t.Helper()
	return slices.DeleteFunc(n.laceLinks(t), func(name string) bool { return len(name) != 15 })
}

// holdings is all that a node's kernel holds for containers: what an attach makes and a detach takes away.
func (n *node) holdings() []string {
	n.t.Helper()
	s := n.status()
	all := append(n.laceLinks(n.t), n.pins()...)
	all = append(all, s.Endpoints...)
	for _, p := range s.Ports {
		all = append(all, fmt.Sprint("port ", p))
	}
	slices.Sort(all)
	return all
}

// container is a network namespace that is, or was, attached.
type container struct {
	*namespace
	node    *node
	id      string
	network string
	port    port
	more    []port // in other networks
}

// newContainer makes a container's namespace and does not attach it.
func (n *node) newContainer(t testing.TB, name string) *container {
	t.Helper()
	return &container{namespace: newNamespace(t, name), node: n, id: "default/" + n.host + "-" + name}
}

// request asks for a network for a container, by its name.
func (c *container) request(network string, change ...func(*wish)) wish {
	r := wish{Container: c.id, Netns: c.path, Interface: dataplane.Interface{Network: network, Gateway: true}}
	for _, f := range change {
		f(&r)
	}
	return r
}

func withIPs(all ...string) func(*wish) {
	return func(r *wish) {
		for _, s := range all {
			r.IPs = append(r.IPs, netip.MustParseAddr(s))
		}
	}
}

// attach attaches the container.
func (c *container) attach(t testing.TB, network string, change ...func(*wish)) *container {
	t.Helper()
	got, err := c.node.agent.call(order{Do: "attach", Request: c.request(network, change...)})
	must(t, err)
	c.network, c.port, c.more = network, got.Port, got.Ports[1:]
	return c
}

// run makes a container and attaches it.
func (n *node) run(t testing.TB, name, network string, change ...func(*wish)) *container {
	t.Helper()
	return n.newContainer(t, name).attach(t, network, change...)
}

// do gives an order about the container.
func (c *container) order(t testing.TB, what string) {
	t.Helper()
	_, err := c.node.agent.call(order{Do: what, Request: wish{Container: c.id}})
	must(t, err)
}

// addresses are the container's, IPv4 first.
func (c *container) addresses() []netip.Addr { return []netip.Addr{c.port.V4, c.port.V6} }

// like is c's address of the same family as a.
func (c *container) like(a netip.Addr) netip.Addr {
	if a.Is4() {
		return c.port.V4
	}
	return c.port.V6
}
