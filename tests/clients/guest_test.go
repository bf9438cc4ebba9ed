// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// guest is a running container, whichever client started it.
type guest struct {
	*node
	namespace, id string   // containerd's
	prefix        []string // runs a command inside
	v4, v6        netip.Addr
}

const backend = "lace.network=backend"

// labels are flags of nerdctl and ctr.
func labels(pairs ...string) (flags []string) {
	for _, p := range pairs {
		flags = append(flags, "--label", p)
	}
	return flags
}

// nerdctlRun is a command line that starts a container with these flags.
func nerdctlRun(flags []string, words ...string) []string {
	return append(append([]string{"nerdctl", "run", "--net", "none", "--pull", "never"}, flags...), words...)
}

// sleeper is an image with a command that stays and ends at once when it is told to.
var sleeper = []string{image, "sh", "-c", "trap exit TERM; sleep 1d & wait"}

// nerdctl starts a container that stays.
func (n *node) nerdctl(name string, pairs ...string) *guest {
	n.t.Helper()
	id := n.must(append(nerdctlRun(labels(pairs...), "-d", "--name", name), sleeper...)...)
	g := &guest{node: n, namespace: "default", id: id, prefix: []string{"nerdctl", "exec", name}}
	return g.look()
}

var execs int
var execMu sync.Mutex

// nextExec is an id that no other process of ctr's has.
func nextExec() string {
	execMu.Lock()
	defer execMu.Unlock()
	execs++
	return fmt.Sprintf("e%d", execs)
}

// ctr starts a container that stays.
func (n *node) ctr(id string, pairs ...string) *guest {
	n.t.Helper()
	args := append([]string{"ctr", "run", "-d"}, labels(pairs...)...)
	n.must(append(args, image, id, "sleep", "1d")...)
	return (&guest{node: n, namespace: "default", id: id}).look()
}

// pod is what a CRI client asks for.
type pod struct {
	name        string
	labels      map[string]string
	annotations map[string]string
	hostNetwork bool
}

type object = map[string]any

// podFile writes the pod's configuration for crictl.
func (n *node) podFile(p pod) string {
	n.t.Helper()
	network := 0
	if p.hostNetwork {
		network = 2
	}
	return n.json("pod.json", object{
		"metadata": object{"name": p.name, "namespace": "lace", "attempt": 1, "uid": p.name},
		"labels":   p.labels, "annotations": p.annotations, "log_directory": "/run/pods",
		"linux": object{"security_context": object{"namespace_options": object{"network": network}}},
	})
}

func (n *node) json(name string, v any) string {
	n.t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		n.t.Fatal(err)
	}
	return n.file(name, string(data))
}

// cri runs a pod and a container that stays in it.
func (n *node) cri(p pod) *guest {
	n.t.Helper()
	file := n.podFile(p)
	sandbox := n.must("crictl", "runp", file)
	container := n.json("container.json", object{
		"metadata": object{"name": "main", "attempt": 1}, "image": object{"image": image},
		"command": []string{"sleep", "86400"}, "log_path": p.name + ".log", "linux": object{},
	})
	id := n.must("crictl", "create", sandbox, container, file)
	n.must("crictl", "start", id)
	g := &guest{node: n, namespace: "k8s.io", id: sandbox, prefix: []string{"crictl", "exec", id}}
	if p.hostNetwork {
		return g // its addresses are the node's
	}
	return g.look()
}

// podIP is the address that CRI reports for a pod.
func (n *node) podIP(sandbox string) string {
	n.t.Helper()
	return n.must("crictl", "inspectp", "-o", "go-template", "--template", "{{.status.network.ip}}", sandbox)
}

// tryIn runs a line of shell inside.
func (g *guest) tryIn(line string) said {
	g.t.Helper()
	prefix := g.prefix
	if prefix == nil {
		prefix = []string{"ctr", "-n", g.namespace, "tasks", "exec", "--exec-id", nextExec(), g.id}
	}
	return g.try(append(append([]string{}, prefix...), "sh", "-c", line)...)
}

// in runs a line of shell inside, which has to succeed, and returns what it prints.
func (g *guest) in(format string, args ...any) string {
	g.t.Helper()
	line := fmt.Sprintf(format, args...)
	s := g.tryIn(line)
	if s.status != 0 {
		g.t.Fatalf("%s: %s: status %d\n%s\n%s", g.id, line, s.status, s.out, s.err)
	}
	return s.out
}

var addressLine = regexp.MustCompile(` inet6? ([0-9a-f.:]+)/(\d+) .*scope global`)

// segments are the subnets of L2 networks: an address in one stands on its interface with the subnet's length.
var segments = []netip.Prefix{netip.MustParsePrefix("10.50.0.0/24"), netip.MustParsePrefix("fd50::/64")}

// lengthOf is the prefix length that an address has to have on its interface. Of L3 networks it is alone there.
func lengthOf(a netip.Addr) int {
	for _, s := range segments {
		if s.Contains(a) {
			return s.Bits()
		}
	}
	return a.BitLen()
}

// addressesIn reads what `ip -o addr` prints.
func addressesIn(text string) (v4, v6 netip.Addr, err error) {
	for _, m := range addressLine.FindAllStringSubmatch(text, -1) {
		p, err := netip.ParsePrefix(m[1] + "/" + m[2])
		if err != nil || p.Bits() != lengthOf(p.Addr()) {
			return v4, v6, fmt.Errorf("%s has not the length that its network gives it: %v", m[0], err)
		}
		if p.Addr().Is4() {
			v4 = p.Addr()
		} else {
			v6 = p.Addr()
		}
	}
	return v4, v6, nil
}

// linesOf keeps of what `ip -o addr` prints what is about one device. There may be none: a pod without a network has lo only.
func linesOf(device, text string) string {
	lines := strings.SplitAfter(text, "\n")
	return strings.Join(slices.DeleteFunc(lines, func(l string) bool { return !strings.Contains(l, ": "+device+" ") }), "")
}

// look reads the addresses of the guest's first interface.
func (g *guest) look() *guest { g.t.Helper(); return g.lookAt("eth0") }

func (g *guest) lookAt(device string) *guest {
	g.t.Helper()
	var err error
	if g.v4, g.v6, err = addressesIn(linesOf(device, g.in("ip -o addr"))); err != nil {
		g.t.Fatal(err)
	}
	return g
}

// addresses are those of both families that the guest has.
func (g *guest) addresses() (all []netip.Addr) {
	for _, a := range []netip.Addr{g.v4, g.v6} {
		if a.IsValid() {
			all = append(all, a)
		}
	}
	return all
}

func (g *guest) String() string {
	return fmt.Sprintf("%s on %s (%v, %v)", g.id, g.host, g.v4, g.v6)
}

// rebind gives guests to the part of a test that the lab is seen from.
func (b *bed) rebind(guests ...**guest) {
	for _, g := range guests {
		seen := **g
		seen.node = b.node(seen.host)
		*g = &seen
	}
}

// pid is the guest's first process, as the node knows it.
func (g *guest) pid() string {
	g.t.Helper()
	for line := range strings.Lines(g.must("ctr", "-n", g.namespace, "tasks", "ls")) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == g.id {
			return f[1]
		}
	}
	g.t.Fatalf("%v has no task", g)
	return ""
}

// direct lets the guest's commands enter it without a client, which is quicker. It holds until the guest is started again.
func (g *guest) direct() *guest {
	g.t.Helper()
	g.prefix = []string{"nsenter", "-t", g.pid(), "-m", "-u", "-i", "-n", "-p"}
	return g
}

// ping sends an echo request each to all addresses.
func (g *guest) ping(to ...*guest) {
	g.t.Helper()
	line := "true"
	for _, other := range to {
		for _, a := range other.addresses() {
			line += fmt.Sprintf(" && ping -q -c 1 -W 5 %s", a)
		}
	}
	if s := g.tryIn(line); s.status != 0 {
		g.t.Errorf("ping from %v to %v: status %d\n%s\n%s", g, to, s.status, s.out, s.err)
	}
}

// remove takes the guest away.
func (g *guest) remove() {
	g.t.Helper()
	switch {
	case g.namespace == "k8s.io":
		g.must("crictl", "rmp", "-f", g.id)
	case g.prefix != nil:
		g.must("nerdctl", "rm", "-f", g.id)
	default:
		g.must("ctr", "tasks", "rm", "-f", g.id)
		g.must("ctr", "containers", "rm", g.id)
	}
}
