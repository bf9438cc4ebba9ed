// SPDX-License-Identifier: Apache-2.0

package containers

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lace-net/lace/tests/harness"
)

// twice are the labels of a container in two networks, with an address of its own in the second.
var twice = map[string]string{"lace.network": "backend, storage", "lace.net.storage.ip": "10.50.0.77"}

// flagsOf gives a client's run command labels.
func flagsOf(labels map[string]string) (flags []string) {
	for k, v := range labels {
		flags = append(flags, "--label", k+"="+v)
	}
	return flags
}

// inBoth is a client's command line that runs a container in two networks.
func inBoth(start []string, more ...string) []string {
	return slices.Concat(start, flagsOf(twice), more)
}

var nerdctlAlone = []string{"run", "--net", "none", "--pull", "never"}

// holdsBoth fails the test unless both interfaces are in what "ip -o addr" printed.
func holdsBoth(t *testing.T, out string) {
	t.Helper()
	contains(t, out, "eth0    inet 10.40.1.")
	contains(t, out, "eth1    inet 10.50.0.77/24")
}

func TestTwoNetworksBeforeTheFirstInstruction(t *testing.T) {
	b := newBed(t, harness.Options{})
	show := []string{"sh", "-c", "ip -o addr; ip route"}
	out := b.Nerdctl(inBoth(nerdctlAlone, append([]string{"--rm", harness.Busybox}, show...)...)...)
	holdsBoth(t, out)
	contains(t, out, "default via 10.40.1.1 dev eth0")
	out = b.Ctr(inBoth([]string{"run", "--rm"}, append([]string{"--label", "lace.net.storage.gateway=true", "--label", "lace.net.backend.ifname=front",
		harness.Busybox, "c1"}, show...)...)...)
	contains(t, out, "front    inet 10.40.1.")
	contains(t, out, "eth1    inet 10.50.0.77/24")
	contains(t, out, "default via 10.50.0.1 dev eth1")
	b.refused([]string{`lace.ip and lace.net.backend.ip are both set`, `"lace.net.web.ip" is about network "web", which lace.network does not name; it names "backend", "storage"`},
		"nerdctl", inBoth(nerdctlAlone, "--label", "lace.ip=10.40.1.7", "--label", "lace.net.backend.ip=10.40.1.7", "--label", "lace.net.web.ip=10.40.1.7", harness.Busybox, "true")...)
}

// label returns a label of a container as containerd has it.
func (b *bed) label(id, name string) string {
	b.t.Helper()
	return b.Nerdctl("inspect", "-f", fmt.Sprintf("{{index .Config.Labels %q}}", name), id)
}

func TestBothAddressesAreKept(t *testing.T) {
	b := newBed(t, harness.Options{})
	c := "default/" + b.Nerdctl(inBoth(nerdctlAlone, "-d", "--name", "kept", harness.Busybox, "sleep", "100000")...)
	first, _ := b.first(c)
	front, back := first.V4.Addr(), netip.MustParseAddr("10.50.0.77")
	if got, want := b.label("kept", "lace/address"), fmt.Sprintf("backend=%s;storage=%s", front, back); got != want {
		t.Errorf("the record is %q, want %q", got, want)
	}
	b.Nerdctl("stop", "-t", "0", "kept")
	b.eventuallyDetached(c)
	b.stop() // the record of containerd outlives the agent's memory
	b.fake = newFake()
	b.startAgent()
	b.holds("after a restart of the agent", c, front, back)
	b.Nerdctl("start", "kept")
	if out := b.Nerdctl("exec", "kept", "ip", "-o", "addr"); !strings.Contains(out, front.String()+"/24") || !strings.Contains(out, back.String()+"/24") {
		t.Errorf("want %s and %s in:\n%s", front, back, out)
	}
	b.Nerdctl("rm", "-f", "kept")
	b.eventuallyReleased(c)
}

// TestOneNetworkIsWiredAgain loses the second interface of a running container while the agent is away.
func TestOneNetworkIsWiredAgain(t *testing.T) {
	b := newBed(t, harness.Options{})
	c := "default/" + b.Nerdctl(inBoth(nerdctlAlone, "-d", "--name", "half", harness.Busybox, "sleep", "100000")...)
	b.stop()
	b.Nerdctl("exec", "--privileged", "half", "ip", "link", "del", "eth0")
	b.Nerdctl("exec", "--privileged", "half", "ip", "link", "del", "eth1")
	b.fake.set(func(f *fake) { f.wired[c] = f.wired[c][:1] })
	b.startAgent()
	if res, _ := b.Attached(c); len(res) != 2 {
		t.Errorf("wired is %+v, want two interfaces", res)
	}
	holdsBoth(t, b.Nerdctl("exec", "half", "ip", "-o", "addr"))
}

func TestPodInTwoNetworks(t *testing.T) {
	b := newBed(t, harness.Options{NRI: true})
	p := harness.Pod{Name: "p1", Labels: twice}
	id := b.RunPod(p)
	if ip := b.PodIP(id); !strings.HasPrefix(ip, "10.40.1.") {
		t.Errorf("CRI reports %q, which is not the address of eth0", ip)
	}
	b.RunIn(p, id, "c1", "sh", "-c", "ip -o addr; sleep 1000")
	holdsBoth(t, b.logOf(p, "c1"))
	swapped := harness.Pod{Name: "p2", Labels: map[string]string{"lace.network": "backend,storage", "lace.net.backend.ifname": "eth1", "lace.net.storage.ifname": "eth0"}}
	if ip := b.PodIP(b.RunPod(swapped)); !strings.HasPrefix(ip, "10.50.0.") {
		t.Errorf("CRI reports %q, which is not the address of eth0", ip)
	}
	renamed := harness.Pod{Name: "p3", Labels: map[string]string{"lace.network": "backend", "lace.net.backend.ifname": "front"}}
	b.refused([]string{`CNI asks for interface "eth0"; Lace makes front for the first network, "backend"`}, "crictl", "runp", b.PodFile(renamed))
	b.Crictl("stopp", id)
	b.eventuallyDetached("k8s.io/" + id)
	b.Crictl("rmp", id)
	b.eventuallyReleased("k8s.io/" + id)
}
