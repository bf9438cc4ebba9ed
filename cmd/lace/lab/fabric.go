// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/topology"
)

const (
	defaultUplink   = "eth0"
	routerLinkLocal = "fe80::1"
	ipWait          = 30 * time.Second // for one batch of the ip tool
)

// uplinks are the interfaces that a node gets. The first one has its underlay address.
func uplinks(n *topology.Node) []string {
	if len(n.Uplinks) > 0 {
		return n.Uplinks
	}
	return []string{defaultUplink}
}

// checkFabric refuses nodes that the asked kind of underlay cannot join.
func checkFabric(nodes []*topology.Node, routed bool) error {
	if len(nodes) == 0 {
		return fmt.Errorf("the topology has no node of kind \"host\": there is nothing to make")
	}
	if routed {
		return nil
	}
	first := nodes[0]
	link := onLinkPrefix(first.Underlay)
	for _, n := range nodes {
		if n.Via.IsValid() {
			return fmt.Errorf("node %q reaches its peers via %s, but there is no router on a single link; use --routed", n.Name, n.Via)
		}
		if !link.Contains(n.Underlay) {
			return fmt.Errorf("nodes %q and %q have no common /64 in the underlay (%s, %s), so they cannot share a link; use --routed",
				first.Name, n.Name, first.Underlay, n.Underlay)
		}
	}
	return nil
}

func onLinkPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, 64).Masked() }

// batch is the input of `ip -batch -` in a network namespace; without one, in the caller's.
type batch struct {
	netns string
	lines strings.Builder
}

func (b *batch) addf(format string, args ...any) { fmt.Fprintf(&b.lines, format+"\n", args...) }

// fabricBatch makes the middle of the underlay and all links to it.
func fabricBatch(lab string, nodes []*topology.Node, routed bool, mtu int) *batch {
	b := &batch{netns: fabricName(lab)}
	b.addf("link set lo up")
	if !routed {
		switches(b, nodes, mtu)
	}
	port := 0
	for _, n := range nodes {
		for i, uplink := range uplinks(n) {
			name := fmt.Sprintf("p%d", port)
			port++
			b.addf("link add name %s mtu %d type veth peer name %s mtu %d netns %s", name, mtu, uplink, mtu, netnsName(lab, n.Name))
			// The fabric has only the addresses it is given, so that nothing answers that should not.
			b.addf("link set %s addrgenmode none", name)
			if routed {
				b.addf("link set %s up", name)
			} else {
				b.addf("link set %s master sw%d up", name, i)
			}
			if routed && i == 0 {
				routerPort(b, n, name)
			}
		}
	}
	return b
}

// switches makes one bridge for each place in a node's list of uplinks.
func switches(b *batch, nodes []*topology.Node, mtu int) {
	count := 0
	for _, n := range nodes {
		count = max(count, len(uplinks(n)))
	}
	for i := range count {
		// Snooping would hold neighbour discovery back until a querier is heard: there is none.
		b.addf("link add name sw%d mtu %d type bridge stp_state 0 forward_delay 0 mcast_snooping 0", i, mtu)
		b.addf("link set sw%d addrgenmode none", i)
		b.addf("link set sw%d up", i)
	}
}

// routerPort gives the router its addresses on the link of n, and the ways to n and its locator.
func routerPort(b *batch, n *topology.Node, name string) {
	b.addf("address add %s/64 dev %s nodad", routerLinkLocal, name)
	if n.Via.IsValid() {
		b.addf("address add %s/128 dev %s nodad", n.Via, name)
	}
	b.addf("route add %s/128 dev %s", n.Underlay, name)
	b.addf("route add %s via %s dev %s", n.Locator.Prefix, n.Underlay, name)
}

// nodeBatch configures a node's own end.
func nodeBatch(lab string, n *topology.Node, routed bool) *batch {
	b := &batch{netns: netnsName(lab, n.Name)}
	b.addf("link set lo up")
	for _, uplink := range uplinks(n) {
		b.addf("link set %s up", uplink)
	}
	dev := uplinks(n)[0]
	if !routed {
		b.addf("address add %s/64 dev %s nodad", n.Underlay, dev)
		return b
	}
	// With /128 no peer looks as if it were on the link, whatever addresses the file gives.
	b.addf("address add %s/128 dev %s nodad", n.Underlay, dev)
	if !n.Via.IsValid() {
		b.addf("route add default via %s dev %s", routerLinkLocal, dev)
		return b
	}
	b.addf("route add %s/128 dev %s", n.Via, dev)
	b.addf("route add default via %s dev %s", n.Via, dev)
	return b
}

// run applies the batch: one process for all its lines, which ends at the first that fails.
func (b *batch) run() error {
	ctx, cancel := context.WithTimeout(context.Background(), ipWait)
	defer cancel()
	args := []string{"-batch", "-"}
	if b.netns != "" {
		args = append([]string{"-n", b.netns}, args...)
	}
	cmd := exec.CommandContext(ctx, "ip", args...)
	cmd.Stdin = strings.NewReader(b.lines.String())
	return explainIP(cmd, b.netns, b.lines.String())
}

// explainIP names the line that failed, where the tool says which one.
func explainIP(cmd *exec.Cmd, netns, lines string) error {
	output, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	said := string(bytes.TrimSpace(output))
	var number int
	if _, scanErr := fmt.Sscanf(said[max(0, strings.Index(said, "Command failed -:")):], "Command failed -:%d", &number); scanErr == nil {
		if all := strings.Split(lines, "\n"); number > 0 && number <= len(all) {
			said += ": ip " + all[number-1]
		}
	}
	return fmt.Errorf("set up the underlay: ip -n %q: %w: %s (the ip tool is in the package iproute2)", netns, err, said)
}

// connect joins the nodes, whose network namespaces are there and empty.
func connect(o *Options, inits []*nodeInit) error {
	if err := nameNamespaces(o.Name, inits).run(); err != nil {
		return err
	}
	if err := settleFabric(o); err != nil {
		return err
	}
	nodes := hosts(o.Topology)
	if err := fabricBatch(o.Name, nodes, o.Routed, o.MTU).run(); err != nil {
		return err
	}
	if hasOutside(o.Topology) {
		if err := joinInternet(o.Name, nodes, o.Routed, o.MTU).run(); err != nil {
			return err
		}
	}
	return eachNode(inits, func(n *nodeInit) error { return connectNode(o, n.node, slices.Index(nodes, n.node)) })
}

// connectNode configures the end of the i-th node, or of the internet.
func connectNode(o *Options, n *topology.Node, i int) error {
	if o.isInternet(n) {
		return internetBatch(o.Name).run()
	}
	if err := nodeBatch(o.Name, n, o.Routed).run(); err != nil || !hasOutside(o.Topology) {
		return err
	}
	return outsideOfNode(o.Name, n, outsideV4(i), o.Routed).run()
}

// nameNamespaces makes the namespace in the middle, which needs no process, and names the nodes'.
func nameNamespaces(lab string, inits []*nodeInit) *batch {
	b := &batch{}
	b.addf("netns add %s", fabricName(lab))
	for _, n := range inits {
		b.addf("netns attach %s %d", netnsName(lab, n.node.Name), n.cmd.Process.Pid)
	}
	return b
}

// settleFabric comes before any interface: what an interface starts with is decided when it is made.
func settleFabric(o *Options) error {
	settings := quietIPv6()
	if o.Routed || hasOutside(o.Topology) {
		settings["net/ipv6/conf/all/forwarding"] = "1"
	}
	if hasOutside(o.Topology) {
		maps.Copy(settings, routerIPv4)
	}
	return inNetns(filepath.Join(netnsRoot, fabricName(o.Name)), func() error { return writeSysctls(settings) })
}

// quietIPv6 makes addresses usable at once: on links that nobody else is on there is no duplicate to find,
// and no router to listen to.
func quietIPv6() map[string]string {
	settings := map[string]string{}
	for _, which := range []string{"all", "default"} {
		settings["net/ipv6/conf/"+which+"/accept_dad"] = "0"
		settings["net/ipv6/conf/"+which+"/accept_ra"] = "0"
	}
	return settings
}

func writeSysctls(settings map[string]string) error {
	for key, value := range settings {
		if err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0); err != nil {
			return fmt.Errorf("set %s to %s: %w", key, value, err)
		}
	}
	return nil
}

// inNetns runs f on a thread of its own in the network namespace. The thread ends with f: it is never
// unlocked, so no other goroutine runs in the wrong place.
func inNetns(path string, f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- enterNetns(path, f)
	}()
	return <-result
}

func enterNetns(path string, f func() error) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", path, err)
	}
	return f()
}
