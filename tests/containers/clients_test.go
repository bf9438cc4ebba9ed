// SPDX-License-Identifier: Apache-2.0

package containers

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/lace-net/lace/tests/harness"
)

// showNetwork is a first instruction that prints what network there is.
var showNetwork = []string{"ip", "-o", "addr"}

func TestWiredBeforeTheFirstInstruction(t *testing.T) {
	b := newBed(t, harness.Options{})
	for i := range 5 {
		ip := fmt.Sprintf("10.40.1.%d", 20+i)
		out := b.Nerdctl(append(nerdctlRun("--rm", "--label", "lace.ip="+ip, harness.Busybox), showNetwork...)...)
		contains(t, out, "eth0    inet "+ip+"/24")
		out = b.Ctr(append([]string{"run", "--rm", "--label", "lace.network=backend", "--label", "lace.ip=" + ip, harness.Busybox,
			fmt.Sprintf("c%d", i)}, showNetwork...)...)
		contains(t, out, "eth0    inet "+ip+"/24")
	}
	out := b.Nerdctl(append([]string{"run", "--rm", "--net", "none", "--pull", "never", "--annotation", "lace.network=backend", harness.Busybox}, showNetwork...)...)
	contains(t, out, "eth0    inet 10.40.1.")
}

func TestOthersAreLeftAlone(t *testing.T) {
	b := newBed(t, harness.Options{})
	out := b.Nerdctl(append([]string{"run", "--rm", "--net", "none", "--pull", "never", "--label", "app=web", harness.Busybox}, showNetwork...)...)
	absent(t, out, "eth0")
	out = b.Nerdctl(append([]string{"run", "--rm", "--net", "host", "--pull", "never", "--label", "lace.network=backend", harness.Busybox}, showNetwork...)...)
	absent(t, out, "eth0")
	b.Nerdctl(nerdctlRun("-d", "--name", "first", harness.Busybox, "sleep", "1000")...)
	out = b.Nerdctl(append([]string{"run", "--rm", "--net", "container:first", "--pull", "never", "--label", "lace.network=backend", harness.Busybox}, showNetwork...)...)
	contains(t, out, "eth0    inet 10.40.1.")
	b.Ctr(append([]string{"run", "--rm", harness.Busybox, "plain"}, showNetwork...)...)
	if n := b.count("attach"); n != 1 {
		t.Errorf("%d containers were attached, want the one that asked and has a network of its own", n)
	}
}

func TestRefusalIsOnTheTerminal(t *testing.T) {
	b := newBed(t, harness.Options{})
	b.set(func(f *fake) { f.refuse = errors.New("the block 10.40.1.0/24 of this node is full") })
	full := []string{`lace: container asks for network "backend": the block 10.40.1.0/24 of this node is full`}
	b.refused(full, "nerdctl", nerdctlRun(harness.Busybox, "true")...)
	b.refused(full, "ctr", "run", "--rm", "--label", "lace.network=backend", harness.Busybox, "c1", "true")
	b.refused([]string{`lace: unknown label "lace.netwrok" (did you mean "lace.network"?)`},
		"nerdctl", "run", "--net", "none", "--pull", "never", "--label", "lace.netwrok=backend", harness.Busybox, "true")
	b.refused([]string{`names network "a" twice`, `lace.net.b.mac = "x": is no MAC address`},
		"nerdctl", "run", "--net", "none", "--pull", "never", "--label", "lace.network=a,a", "--label", "lace.net.b.mac=x", harness.Busybox, "true")
	b.Nerdctl("run", "--rm", "--net", "none", "--pull", "never", harness.Busybox, "true")
	if tasks := b.Ctr("-n", "default", "tasks", "ls", "-q"); tasks != "" {
		t.Errorf("tasks are left: %s", tasks)
	}
}

func TestAgentIsDown(t *testing.T) {
	b := newBed(t, harness.Options{})
	b.stop()
	down := []string{`container asks for network "backend", but the Lace agent is not running (socket ` + b.Agent, "start it: systemctl start lace"}
	b.refused(down, "nerdctl", nerdctlRun(harness.Busybox, "true")...)
	b.refused(down, "nerdctl", "run", "--net", "none", "--pull", "never", "--annotation", "lace.network=backend", harness.Busybox, "true")
	b.refused(down, "ctr", "run", "--rm", "--label", "lace.network=backend", harness.Busybox, "c1", "true")
	out, err := b.Try("nerdctl", "run", "--rm", "--net", "none", "--pull", "never", harness.Busybox, "echo", "alive")
	if err != nil || strings.TrimSpace(out) != "alive" {
		t.Errorf("a container without labels: %q, %v", out, err)
	}
	b.Ctr("run", "--rm", harness.Busybox, "c2", "true")
}

func TestManyAtOnce(t *testing.T) {
	b := newBed(t, harness.Options{})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			out, err := b.Try("ctr", append([]string{"run", "--rm", "--label", "lace.network=backend", harness.Busybox, fmt.Sprintf("m%d", i)}, showNetwork...)...)
			if err != nil || !strings.Contains(out, "eth0    inet 10.40.1.") {
				t.Errorf("container %d: %v\n%s", i, err, out)
			}
		})
	}
	all.Wait()
	b.Eventually("all addresses are given back", func() error {
		b.fake.mu.Lock()
		defer b.fake.mu.Unlock()
		if n := len(b.reserved); n != 0 {
			return fmt.Errorf("%d are held", n)
		}
		return nil
	})
}
