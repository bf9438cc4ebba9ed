// SPDX-License-Identifier: Apache-2.0

package containers

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/lace-net/lace/plugin"
	"github.com/lace-net/lace/tests/harness"
)

// published collects what the fake is asked to publish, as "network port container's-port".
type published struct {
	mu  sync.Mutex
	all []string
}

func (p *published) note(r plugin.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, i := range r.Interfaces {
		for _, one := range i.Publish {
			p.all = append(p.all, fmt.Sprint(i.Network, " ", one, " ", one.To))
		}
	}
}

// since returns what was asked for after the last call.
func (p *published) since() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.all
	p.all = nil
	return all
}

func TestPortsAreAskedForByEachClient(t *testing.T) {
	b := newBed(t, harness.Options{NRI: true})
	var seen published
	b.set(func(f *fake) { f.during = seen.note })
	wants := func(client string, want ...string) {
		t.Helper()
		if got := seen.since(); !slices.Equal(slices.Compact(got), want) {
			t.Errorf("%s asked for %q, want %q", client, got, want)
		}
	}
	b.Nerdctl(nerdctlRun("--rm", "--label", "lace.publish=8080:80,53:53/udp", harness.Busybox, "true")...)
	wants("nerdctl", "backend 8080/tcp 80", "backend 53/udp 53")
	b.Nerdctl(nerdctlRun("--rm", "--label", "lace.publish=8080:80", "--annotation", "lace.publish=[2001:db8::1]:8081:81", harness.Busybox, "true")...)
	wants("nerdctl with an annotation", "backend [2001:db8::1]:8081/tcp 81")
	b.Ctr(inBoth([]string{"run", "--rm"}, "--label", "lace.net.storage.publish=192.0.2.1:2049:2049", harness.Busybox, "c1", "true")...)
	wants("ctr", "storage 192.0.2.1:2049/tcp 2049")
	b.RunPod(harness.Pod{Name: "p1", Labels: map[string]string{"lace.network": "backend"}, Annotations: map[string]string{"lace.publish": "8080-8081:80-81"}})
	wants("a pod", "backend 8080/tcp 80", "backend 8081/tcp 81")
}

func TestBadPortIsOnTheTerminal(t *testing.T) {
	b := newBed(t, harness.Options{})
	slip := []string{`lace.publish = "8080": names one port; write the node's and the container's, as in "8080:8080"`}
	b.refused(slip, "nerdctl", nerdctlRun("--label", "lace.publish=8080", harness.Busybox, "true")...)
	b.refused(slip, "ctr", "run", "--rm", "--label", "lace.network=backend", "--label", "lace.publish=8080", harness.Busybox, "c1", "true")
	pod := harness.Pod{Name: "p1", Labels: map[string]string{"lace.network": "backend"}, Annotations: map[string]string{"lace.publish": "8080"}}
	b.refused([]string{`names one port; write the node's and the container's, as in`}, "crictl", "runp", b.PodFile(pod))
	many := "lace.publish=" + strings.Repeat("[2001:db8::1]:8080:80,", 40) + "80:80/sctp" // longer than what a client shows at once
	b.refused([]string{`publishes [2001:db8::1]:8080/tcp twice`}, "nerdctl", nerdctlRun("--label", many, harness.Busybox, "true")...)
	if n := b.count("attach"); n != 0 {
		t.Errorf("%d containers were attached", n)
	}
}
