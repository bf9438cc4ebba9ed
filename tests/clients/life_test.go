// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// kept fails unless the guest has the addresses that it had before.
func (g *guest) kept(before *guest) {
	g.t.Helper()
	if g.v4 != before.v4 || g.v6 != before.v6 {
		g.t.Errorf("%s had %v, %v and now has %v, %v", g.id, before.v4, before.v6, g.v4, g.v6)
	}
}

// again is the guest as it is now.
func (g *guest) again() *guest { g.t.Helper(); c := *g; return c.look() }

func TestAddressesAreKept(t *testing.T) {
	b := up(t, threeNodes)
	peer := b.node("edge-2").nerdctl("peer", backend)
	b.sub("over stop and start", func(b *bed) {
		n := b.node("edge-1")
		g := n.nerdctl("stopped", backend)
		n.must("nerdctl", "stop", "-t", "1", "stopped")
		n.eventuallyEmpty()
		n.refused(fmt.Sprintf("address %s is taken by container stopped (default/%s)", g.v4, g.id),
			nerdctlRun(labels(backend, "lace.ip="+g.v4.String()), "--rm", image, "true")...)
		n.must("nerdctl", "start", "stopped")
		g.again().kept(g)
		n.must("nerdctl", "restart", "-t", "1", "stopped")
		g.again().kept(g)
		g.ping(peer)
		g.remove()
	})
	b.sub("over a restart of the agent while stopped", func(b *bed) {
		n := b.node("edge-1")
		// Its name alone would lead the first container elsewhere: the second had that place first.
		second := n.nerdctl("second", backend, "lace.name=same")
		first := n.nerdctl("first", backend, "lace.name=same")
		if first.v4 == second.v4 {
			b.t.Fatalf("%v and %v have one address", first, second)
		}
		n.must("nerdctl", "stop", "-t", "1", "first", "second")
		second.remove()
		n.killAgent()
		n.start()
		n.refused(fmt.Sprintf("address %s is taken by container same (default/%s)", first.v4, first.id),
			nerdctlRun(labels(backend, "lace.ip="+first.v4.String()), "--rm", image, "true")...)
		n.must("nerdctl", "start", "first")
		first.again().kept(first)
		first.ping(peer)
		first.remove()
	})
	b.sub("over a restart of containerd", func(b *bed) {
		n := b.node("edge-1")
		g, stopped := n.nerdctl("runs", backend), n.nerdctl("stands", backend)
		n.must("nerdctl", "stop", "-t", "1", "stands")
		stop := g.stream(peer.v4)
		if s := n.lace("lab", "kill", "--name", n.name, n.host, "containerd"); s.status != 0 {
			b.t.Fatal(s.err)
		}
		n.start()
		stop()
		n.eventuallyHolds(1, 2)
		n.must("nerdctl", "start", "stands")
		stopped.again().kept(stopped)
		n.must("nerdctl", "restart", "-t", "1", "runs")
		g.again().kept(g)
		g.remove()
		stopped.remove()
	})
	b.sub("by name over rm and run", func(b *bed) {
		n := b.node("edge-1")
		one := n.nerdctl("named", backend)
		one.remove()
		two := n.nerdctl("named", backend)
		two.kept(one)
		two.remove()
	})
	b.sub("sticky over rm and a restart of the agent", func(b *bed) {
		n := b.node("edge-1")
		g := n.nerdctl("sticky", backend, "lace.sticky=true")
		g.remove()
		n.eventuallyEmpty()
		n.killAgent()
		n.start()
		for _, a := range g.addresses() {
			n.refused(fmt.Sprintf(`address %s is taken by the sticky reservation of "sticky"`, a),
				nerdctlRun(labels(backend, "lace.ip="+a.String()), "--rm", image, "true")...)
		}
		again := n.nerdctl("sticky", backend, "lace.sticky=true")
		again.kept(g)
		again.ping(peer)
		again.remove()
	})
	b.node("edge-1").eventuallyEmpty()
}

func TestManyAtOnce(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	b.sub("one address for two", func(b *bed) {
		var mu sync.Mutex
		won := 0
		inParallel(4, 4, func(i int) {
			s := n.with(b.t).node("edge-1").try("ctr", "run", "-d", "--label", backend, "--label", "lace.ip=10.40.1.9", image, fmt.Sprintf("r%d", i), "sleep", "1d")
			mu.Lock()
			defer mu.Unlock()
			if s.status == 0 {
				won++
			} else {
				contains(b.t, s.err, "address 10.40.1.9 is taken by container")
			}
		})
		if won != 1 {
			b.t.Errorf("%d containers have the address", won)
		}
		n.eventuallyHolds(1, 2)
	})
	b.sub("thirty", func(b *bed) {
		n := b.node("edge-1")
		n.sh("seq 30 | xargs -P 6 -I{} ctr run -d --label %s %s m{} sleep 1d", backend, image)
		n.eventuallyHolds(31, 62)
		seen := n.sh("for p in $(ctr tasks ls | awk '/^m/ {print $2}'); do nsenter -t $p -n ip -o addr show eth0; done")
		distinct := map[string]bool{}
		for _, m := range addressLine.FindAllStringSubmatch(seen, -1) {
			distinct[m[1]] = true
		}
		if len(distinct) != 60 {
			b.t.Errorf("thirty containers have %d addresses:\n%s", len(distinct), seen)
		}
	})
}

var pingCount = regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`)

// stream pings at 1 kHz until it is stopped, and wants an answer to each packet.
func (g *guest) stream(to netip.Addr) (stop func()) {
	g.t.Helper()
	line := []string{"nsenter", "-t", g.pid(), "-n", "ping", "-q", "-n", "-i", "0.001", "-c", "1000", "-W", "5", to.String()}
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			s := g.try(line...)
			if m := pingCount.FindStringSubmatch(s.out); m == nil || m[1] != "1000" || m[2] != "1000" {
				g.t.Errorf("ping from %v to %v: %s\n%s", g, to, s.out, s.err)
				return
			}
			select {
			case <-end:
				return
			default:
			}
		}
	}()
	var once sync.Once
	stop = func() {
		once.Do(func() { close(end); <-done })
	}
	g.t.Cleanup(stop)
	return stop
}

// TestTrafficGoesOnWithoutTheAgent kills the agent and starts it again under traffic, and wants every packet.
func TestTrafficGoesOnWithoutTheAgent(t *testing.T) {
	b := up(t, threeNodes)
	n, far := b.node("edge-1"), b.node("edge-2").nerdctl("far", backend)
	one, two := n.nerdctl("one", backend), n.nerdctl("two", backend)
	stops := []func(){one.stream(far.v4), two.stream(far.v6), two.stream(one.v4)}
	for range 2 {
		n.killAgent()
		one.ping(far, two)
		n.start()
	}
	for _, stop := range stops {
		stop()
	}
	n.eventuallyHolds(2, 4)
}

// TestAgentIsAway ends the agent without a word and looks at who starts then, who does not, and what is
// found when it is back.
func TestAgentIsAway(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	stays, killed, stopped := n.nerdctl("stays", backend), n.nerdctl("killed", backend), n.nerdctl("stopped", backend)
	n.nerdctl("removed", backend)
	sandbox := n.cri(pod{name: "pod", labels: map[string]string{"lace.network": "backend"}})
	n.eventuallyHolds(5, 10)
	n.must("kill", "-9", n.sh("cat /run/lab/agent.pid"))
	n.eventually("status tells", func() error {
		if out := n.must("lace", "status"); !strings.Contains(out, "agent     not running: traffic goes on, containers that ask for Lace are refused") {
			return errors.New(out)
		}
		return nil
	})
	away := `lace: %s asks for network "backend", but the Lace agent is not running (socket /run/lace/lace.sock: connection refused); start it: systemctl start lace`
	for _, flags := range [][]string{labels(backend), {"--annotation", backend}} {
		n.refused(fmt.Sprintf(away, "container"), nerdctlRun(flags, "--rm", image, "true")...)
		n.refused(fmt.Sprintf(away, "container"), append(append([]string{"ctr", "run", "--rm"}, flags...), image, "refused", "true")...)
	}
	asked := map[string]string{"lace.network": "backend"}
	n.refused(fmt.Sprintf(away, "pod"), "crictl", "runp", n.podFile(pod{name: "p1", labels: asked}))
	n.refused(fmt.Sprintf(away, "pod"), "crictl", "runp", n.podFile(pod{name: "p2", annotations: asked}))
	othersStart(n)
	n.must("kill", "-9", killed.pid())
	n.must("nerdctl", "rm", "-f", "removed")
	n.must("nerdctl", "stop", "-t", "1", "stopped")
	n.must("crictl", "stopp", sandbox.id)
	n.start()
	n.eventuallyHolds(1, 2)
	contains(t, n.must("lace", "status"), "agent     running")
	n.nerdctl("again", backend).ping(stays)
	n.must("nerdctl", "start", "stopped", "killed")
	stopped.again().kept(stopped)
	killed.again().kept(killed)
}

// othersStart runs containers that do not ask, and looks for any trace of Lace in them.
func othersStart(n *node) {
	n.t.Helper()
	for _, line := range [][]string{
		nerdctlRun(labels("app=web"), "--rm", image, "sh", "-c", "ip -o link; echo alive"),
		{"ctr", "run", "--rm", image, "plain", "sh", "-c", "ip -o link; echo alive"},
	} {
		out := n.must(line...)
		contains(n.t, out, "alive")
		absent(n.t, out, "eth0")
		absent(n.t, out, "lace")
	}
	plain := n.must("crictl", "runp", n.podFile(pod{name: "plain"}))
	n.must("crictl", "rmp", "-f", plain)
}

// TestNothingIsLeft ends containers in every way there is.
func TestNothingIsLeft(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	b.sub("removed", func(b *bed) {
		n := b.node("edge-1")
		all := []*guest{n.nerdctl("web", backend), n.ctr("task", backend), n.cri(pod{name: "pod", labels: map[string]string{"lace.network": "backend"}})}
		n.eventuallyHolds(3, 6)
		for _, g := range all {
			g.remove()
		}
		n.eventuallyEmpty()
	})
	b.sub("killed from outside", func(b *bed) {
		n := b.node("edge-1")
		all := []*guest{n.nerdctl("web", backend), n.ctr("task", backend), n.cri(pod{name: "pod", labels: map[string]string{"lace.network": "backend"}})}
		for _, g := range all {
			n.must("kill", "-9", g.pid())
		}
		n.eventuallyEmpty()
		b.eventually("CRI knows that the container has ended, and removes the pod", func() error {
			if s := n.try("crictl", "rmp", all[2].id); s.status != 0 {
				return errors.New(s.err)
			}
			return nil
		})
		n.must("nerdctl", "rm", "web")
		n.must("ctr", "tasks", "rm", "task")
		n.must("ctr", "containers", "rm", "task")
	})
	b.sub("short-lived", func(b *bed) {
		inParallel(20, 4, func(i int) {
			line := nerdctlRun(labels(backend), "--rm", image, "true")
			if i%2 == 0 {
				line = []string{"ctr", "run", "--rm", "--label", backend, image, fmt.Sprintf("s%d", i), "true"}
			}
			if s := n.with(b.t).node("edge-1").try(line...); s.status != 0 {
				b.t.Errorf("container %d: %s", i, s.err)
			}
		})
		b.node("edge-1").eventuallyEmpty()
	})
	b.sub("its shim killed", func(b *bed) {
		n := b.node("edge-1")
		g := n.ctr("orphan", backend)
		n.sh("kill -9 $(ps -o ppid= -p %[1]s) %[1]s", g.pid())
		n.eventuallyEmpty()
	})
	if got := strings.Count(n.agentLog(), "level=ERROR"); got != 0 {
		t.Errorf("the agent logged %d errors", got)
	}
}

func TestPods(t *testing.T) {
	b := up(t, threeNodes)
	asked := map[string]string{"lace.network": "backend"}
	far := b.node("edge-2").nerdctl("far", backend)
	for name, p := range map[string]pod{
		"label":      {name: "by-label", labels: map[string]string{"lace.network": "backend", "lace.ip": "10.40.1.77"}},
		"annotation": {name: "by-annotation", labels: map[string]string{"lace.network": "staging"}, annotations: map[string]string{"lace.network": "backend", "lace.ip": "10.40.1.77"}},
	} {
		b.sub(name, func(b *bed) {
			n := b.node("edge-1")
			g := n.cri(p)
			if ip := n.podIP(g.id); ip != "10.40.1.77" || g.v4.String() != ip {
				b.t.Errorf("CRI reports %q, the pod has %v", ip, g)
			}
			g.ping(far)
			n.must("crictl", "stopp", g.id)
			n.eventuallyEmpty()
			n.must("crictl", "rmp", g.id)
		})
	}
	b.sub("without a label", func(b *bed) {
		n := b.node("edge-1")
		g := n.cri(pod{name: "plain"})
		if ip := n.podIP(g.id); ip != "127.0.0.1" {
			b.t.Errorf("CRI reports %q", ip)
		}
		absent(b.t, g.in("ip -o link"), "eth0")
		g.remove()
	})
	b.sub("of the host's network", func(b *bed) {
		n := b.node("edge-1")
		g := n.cri(pod{name: "host", labels: asked, hostNetwork: true})
		contains(b.t, g.in("ip -o addr"), "fd00:a::1/64")
		n.eventuallyEmpty()
		g.remove()
	})
	b.sub("stopped after a restart of the agent", func(b *bed) {
		n := b.node("edge-1")
		g := n.cri(pod{name: "outlives", labels: asked})
		n.killAgent()
		n.start()
		n.eventuallyHolds(1, 2)
		g.ping(far)
		n.eventually("the agent is registered with NRI", func() error {
			if log := n.agentLog(); strings.Count(log, "registered with NRI") < strings.Count(log, "data plane is up") {
				return errors.New("its log does not say so")
			}
			return nil
		})
		n.must("crictl", "stopp", g.id)
		n.eventuallyEmpty()
		n.must("crictl", "rmp", g.id)
	})
	b.sub("sticky, over rmp and runp", func(b *bed) {
		n := b.node("edge-1")
		p := pod{name: "db", labels: map[string]string{"lace.network": "backend", "lace.sticky": "true"}}
		one := n.cri(p)
		one.remove()
		n.cri(p).kept(one)
	})
}
