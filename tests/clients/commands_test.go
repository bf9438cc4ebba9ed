// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netns"
)

func TestStatus(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	type status struct {
		Node, Topology, Problem string
		Agent                   bool
		Networks                []struct{ Name string }
		Peers                   []struct{ Name, Gateway, MAC, Problem string }
		Ports                   []struct {
			Container, Name, Network, V4, V6, MAC, Interface string
			Up                                               bool
			MTU                                              int
		}
		Counters []struct {
			Reason  string
			Packets uint64
		}
	}
	read := func() (s status) {
		t.Helper()
		out := n.must("lace", "status", "--json")
		if err := json.Unmarshal([]byte(out), &s); err != nil || strings.Contains(out, "null") {
			t.Errorf("%v in\n%s", err, out)
		}
		return s
	}
	if s := read(); !s.Agent || s.Node != "edge-1" || len(s.Networks) != 4 || len(s.Peers) != 2 || len(s.Ports) != 0 {
		t.Errorf("of a fresh node: %+v", s)
	}
	web, far := n.nerdctl("web", backend), b.node("edge-2").nerdctl("far", backend)
	web.ping(far)
	s := read()
	if len(s.Ports) != 1 || len(n.holds().Links) != 1 {
		t.Fatalf("status has %+v", s)
	}
	p := s.Ports[0]
	if p.Container != "default/"+web.id || p.Name != "web" || p.Network != "backend" || p.V4 != web.v4.String() || p.V6 != web.v6.String() ||
		p.Interface != n.holds().Links[0] || !p.Up || p.MTU != 1460 || p.MAC != web.in("cat /sys/class/net/eth0/address") {
		t.Errorf("%v is shown as %+v", web, p)
	}
	if peer := s.Peers[0]; peer.Name != "edge-2" || peer.Gateway != "fd00:a::2" || peer.MAC == "" || peer.Problem != "" {
		t.Errorf("the peer is shown as %+v", peer)
	}
	counted := map[string]uint64{}
	for _, c := range s.Counters {
		counted[c.Reason] = c.Packets
	}
	if counted["encapsulated"] < 2 || counted["decapsulated"] < 2 {
		t.Errorf("counters after two pings: %v", counted)
	}
	n.sh("cp /etc/lace/topology.toml /run/right; echo 'nod = 1' >>/etc/lace/topology.toml")
	if s := read(); s.Topology != "" || !strings.Contains(s.Problem, "network.tiny.nod: unknown key") || len(s.Ports) != 1 {
		t.Errorf("with a broken topology: %+v", s)
	}
	contains(t, n.must("lace", "status"), "topology  /etc/lace/topology.toml:")
}

func TestPlanAndDoctor(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	b.sub("plan", func(b *bed) {
		here := b.lace("plan", "--node", "edge-1", "--topology", b.topology)
		if here.status != 0 {
			b.t.Fatal(here.err)
		}
		if there := b.node("edge-1").must("lace", "plan"); there != here.out {
			b.t.Errorf("the node plans\n%s\nthis machine plans\n%s", there, here.out)
		}
		contains(b.t, here.out, "5f00:1ace:1:14:0:6400::")
		if out := b.node("edge-1").must("lace", "plan", "--json"); !json.Valid([]byte(out)) {
			b.t.Errorf("no JSON: %s", out)
		}
	})
	b.sub("doctor finds nothing", func(b *bed) {
		before := n.sh("find /sys/fs/bpf; ip -o link")
		out := b.node("edge-1").must("lace", "doctor")
		absent(b.t, out, "MISSING")
		for _, what := range []string{"kernel ", "VRF", "TCX", "decapsulation flags", "topology", "containerd", "NRI", "agent", "lace-runc"} {
			contains(b.t, "\n"+out, "\n"+what)
		}
		if after := n.sh("find /sys/fs/bpf; ip -o link"); after != before {
			b.t.Errorf("the doctor changed\n%s\nto\n%s", before, after)
		}
		if log := n.agentLog(); strings.Contains(log, "level=WARN") || strings.Contains(log, "level=ERROR") {
			b.t.Errorf("the agent was disturbed:\n%s", log)
		}
	})
	b.sub("doctor finds everything", func(b *bed) {
		n := b.node("edge-1")
		n.killAgent()
		n.sh("rm /opt/containerd/bin/runc; echo 'nod = 1' >>/etc/lace/topology.toml")
		if s := n.lace("lab", "kill", "--name", n.name, n.host, "containerd"); s.status != 0 {
			b.t.Fatal(s.err)
		}
		s := n.try("lace", "doctor")
		if s.status != 1 || !strings.Contains(s.err, "lace: something above is missing") {
			b.t.Errorf("status %d, %s", s.status, s.err)
		}
		for _, want := range []string{"network.tiny.nod: unknown key", "start containerd, or name its socket", "not running, so containers that ask for Lace are refused: systemctl start lace",
			"/opt/containerd/bin/runc is not there, so nerdctl and ctr do not reach Lace: ln -s /usr/local/bin/lace-runc /opt/containerd/bin/runc"} {
			contains(b.t, s.out, want)
		}
	})
}

// tracing starts lace trace and waits until it listens. The result is what it has said in the end.
func (n *node) tracing(args ...string) (end func() said) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	n.t.Cleanup(cancel)
	cmd := command(ctx, n.exec(append([]string{"lace", "trace"}, args...)...)...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	line, err := bufio.NewReader(stderr).ReadString('\n')
	if err != nil || !strings.Contains(line, "refused packets, as they come") {
		n.t.Errorf("lace trace says %q, %v", line, err)
	}
	return func() said {
		n.t.Helper()
		if err := cmd.Wait(); err != nil {
			n.t.Errorf("lace trace: %v", err)
		}
		return said{out: strings.TrimSpace(out.String())}
	}
}

func TestTrace(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	web, other := n.nerdctl("web", backend), n.nerdctl("other", backend)
	b.sub("JSON", func(b *bed) {
		end := n.with(b.t).node("edge-1").tracing("--count", "1", "--json", "--container", "web", "--reason", "no_route")
		other.tryIn("ping -q -c 1 -W 1 10.99.0.1")
		web.tryIn("ping -q -c 1 -W 1 10.40.1.222") // no_endpoint
		web.tryIn("ping -q -c 1 -W 1 10.99.0.2")
		var event struct {
			Reason, Container, Name, Network string
			Length                           int
			Flow                             struct{ Protocol, Src, Dst string }
		}
		out := end().out
		if err := json.Unmarshal([]byte(out), &event); err != nil {
			b.t.Fatalf("%v: %s", err, out)
		}
		if event.Reason != "no_route" || event.Container != "default/"+web.id || event.Name != "web" || event.Network != "backend" ||
			event.Flow.Protocol != "icmp" || event.Flow.Src != web.v4.String() || event.Flow.Dst != "10.99.0.2" {
			b.t.Errorf("got %s", out)
		}
	})
	b.sub("text", func(b *bed) {
		end := n.with(b.t).node("edge-1").tracing("--count", "1", "--address", "10.40.1.222")
		web.tryIn("ping -q -c 1 -W 1 10.99.0.1")
		other.tryIn("ping -q -c 1 -W 1 10.40.1.222")
		out := end().out
		for _, want := range []string{"no_endpoint", "other (backend)", other.v4.String(), "10.40.1.222"} {
			contains(b.t, out, want)
		}
	})
	b.sub("refusals", func(b *bed) {
		n := b.node("edge-1")
		end := n.tracing("--count", "1", "--address", "10.99.0.9")
		n.refused("another lace trace holds /run/lace/trace.lock: events have one reader", "lace", "trace")
		web.tryIn("ping -q -c 1 -W 1 10.99.0.9")
		end()
		for args, want := range map[string]string{
			"--reason no_rout":    `there is no reason "no_rout"; docs/reasons.md lists them`,
			"--port 65536":        "there is no port 65536",
			"--count -1":          "-1 events cannot be shown",
			"--address backend":   "invalid value",
			"--network backend x": `unexpected argument "x"`,
		} {
			s := n.try(append([]string{"lace", "trace"}, strings.Fields(args)...)...)
			if s.status != 2 || !strings.Contains(s.err, want) {
				b.t.Errorf("lace trace %s: status %d, %s", args, s.status, s.err)
			}
		}
	})
}

// TestAgentRefusesToStart gives the agent what it cannot work with, while containers talk.
func TestAgentRefusesToStart(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	web, far := n.nerdctl("web", backend), b.node("edge-2").nerdctl("far", backend)
	refused := func(status int, want string, args ...string) {
		t.Helper()
		s := n.try(append([]string{"lace", "agent"}, args...)...)
		if s.status != status || !strings.Contains(s.err, want) {
			t.Errorf("lace agent %v: status %d, want %d and %q:\n%s", args, s.status, status, want, s.err)
		}
		web.ping(far)
	}
	refused(1, "an agent runs already, it holds /run/lace/lace.sock.lock: stop it first (systemctl stop lace)")
	n.killAgent()
	n.sh("cp /etc/lace/topology.toml /run/right; sed -i 's/^id = 200/id = 100/; s/^locator = .5f00:1ace:3/locater = \"x/' /etc/lace/topology.toml")
	s := n.try("lace", "agent")
	for _, want := range []string{`unknown key; did you mean "locator"?`, "/etc/lace/topology.toml:"} {
		contains(t, s.err, want)
	}
	refused(2, "/etc/lace/topology.toml:")
	n.sh("cp /run/right /etc/lace/topology.toml")
	config := b.file("lace.toml", "nod = \"edge-1\"\nbpffs = \"here\"\n")
	refused(2, config+`:1: nod: unknown key; did you mean "node"?`, "--config", config)
	refused(2, config+`:2: bpffs: "here" is no absolute path; write an absolute path, as /sys/fs/bpf/lace`, "--config", config)
	refused(1, "no such file", "--config", "/run/none.toml")
	refused(2, "flag provided but not defined: -nod", "--nod", "edge-1")
	refused(1, `edge-9`, "--node", "edge-9")
	refused(1, "/run/elsewhere is not on a BPF file system", "--bpffs", "/run/elsewhere")
	n.start()
	web.ping(far)
	n.nerdctl("more", backend).ping(web)
}

// probed waits until no address is tentative: a link-local one that is still being probed would be another one afterwards.
func (n *node) probed() {
	n.t.Helper()
	n.sh("for i in $(seq 300); do ip -6 addr show tentative | grep -q inet6 || exit 0; sleep 0.1; done; exit 1")
}

// kernelState is all that an agent could change on a node. The neighbours are those that do not come and go by themselves.
func (n *node) kernelState() string {
	n.t.Helper()
	return n.sh(`ip -o link | sed 's/ state .*//'; ip -o addr
		for f in 4 6; do ip -$f route show table all | sed 's/ expires [0-9]*sec//'; ip -$f rule; done
		ip neigh show nud permanent; ip neigh show proto 76; ip -d neigh show | grep -E 'managed|extern_learn' || :
		find /sys/fs/bpf; tc qdisc; tc filter show dev eth0 ingress; sysctl -a 2>/dev/null | grep -E '^net.(ipv4|ipv6).(conf|neigh)' | grep -v stable_secret`) +
		fmt.Sprintf("\nprograms at the uplink: %d", n.programsAt("eth0"))
}

// programsAt counts the TCX programs at the ingress of an interface.
func (n *node) programsAt(device string) (programs int) {
	n.t.Helper()
	ns, err := netns.GetFromName("lace-" + n.name + "-" + n.host)
	if err != nil {
		n.t.Fatal(err)
	}
	defer ns.Close()
	var index int
	if _, err := fmt.Sscan(n.sh("cat /sys/class/net/%s/ifindex", device), &index); err != nil {
		n.t.Fatal(err)
	}
	err = within(ns, func() error {
		result, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXIngress})
		if errors.Is(err, ebpf.ErrNotSupported) {
			return nil // clsact, which tc shows
		}
		if err == nil {
			programs = len(result.Programs)
		}
		return err
	})
	if err != nil {
		n.t.Fatalf("programs at %s: %v", device, err)
	}
	return programs
}

// within runs f in a network namespace, on a thread that ends with it.
func within(ns netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		err := netns.Set(ns)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// agent runs an agent by hand, until the returned function ends it as systemd does.
func (n *node) agent() (stop func()) {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	n.t.Cleanup(cancel)
	cmd := command(ctx, n.exec("lace", "agent")...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	lines := bufio.NewScanner(stderr)
	var log strings.Builder
	for lines.Scan() {
		fmt.Fprintln(&log, lines.Text())
		if strings.Contains(lines.Text(), synchronised) {
			break
		}
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for lines.Scan() {
		}
	}()
	if !strings.Contains(log.String(), synchronised) {
		n.t.Fatalf("the agent does not come up:\n%s", log.String())
	}
	return func() {
		n.t.Helper()
		cancel()
		<-drained
		if err := cmd.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			n.t.Errorf("the agent ends with %v", err)
		}
	}
}

// TestUninstallLeavesTheHostAsItWas compares all that the kernel tells of a node before the first agent and after the last.
func TestUninstallLeavesTheHostAsItWas(t *testing.T) {
	b := up(t, threeNodes, "--no-agent")
	n := b.node("edge-1")
	n.sh("ping -6 -q -c 1 -W 5 fd00:a::2; ping -6 -q -c 1 -W 5 fd00:a::3; nerdctl run --rm --net none --pull never %s true", image)
	n.probed()
	before := n.kernelState()
	stopped := n.must("lace", "uninstall")
	contains(t, stopped, "nothing of Lace is left in the kernel") // where it never was
	stop := n.agent()
	n.refused("an agent runs already, it holds /run/lace/lace.sock.lock: stop it first", "lace", "uninstall", "--force")
	web := n.nerdctl("web", backend)
	n.nerdctl("sticky", backend, "lace.sticky=true").remove()
	n.sh("nsenter -t %s -n ping -q -c 1 -W 5 10.40.1.1", web.pid())
	stop()
	during := n.kernelState()
	if during == before {
		t.Error("nothing tells that an agent ran")
	}
	n.refused("attached containers would lose their network (1 of them): stop them, or use --force", "lace", "uninstall")
	if now := n.kernelState(); now != during {
		t.Errorf("a refused uninstall changed\n%s\nto\n%s", during, now)
	}
	contains(t, n.must("lace", "uninstall", "--force"), "nothing of Lace is left in the kernel")
	same(t, before, n.kernelState())
	absent(t, web.in("ip -o link"), "eth0")
	n.agent()
	n.must("nerdctl", "restart", "-t", "1", "web") // and all can begin anew
	web.again().kept(web)
}

// same compares two states line by line, but for VRF's rule, which the kernel keeps.
func same(t *testing.T, before, after string) {
	t.Helper()
	was, is := map[string]bool{}, map[string]bool{}
	for l := range strings.Lines(before) {
		was[l] = true
	}
	for l := range strings.Lines(after) {
		is[l] = true
		if !was[l] && !strings.Contains(l, "l3mdev") {
			t.Errorf("left behind: %s", l)
		}
	}
	for l := range was {
		if !is[l] {
			t.Errorf("taken away: %s", l)
		}
	}
}
