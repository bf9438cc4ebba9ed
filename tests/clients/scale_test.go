// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	crowd = 100 // containers

	// The aims are a p99 of 50 ms and 40 MB on a machine that does nothing else; these bounds hold on a busy one, where
	// the slowest of a hundred tells of the machine and not of the agent.
	attachBound = 250 * time.Millisecond // p50 of the agent's time for a container
	memoryBound = 60 << 10               // KiB that the agent holds at rest
)

// TestHundredContainers starts them on one node, measures the agent, and takes them away again.
func TestHundredContainers(t *testing.T) {
	need(t)
	config := (&bed{t: t}).file("lace.toml", "log-level = \"debug\"\n")
	b := up(t, threeNodes, "--config", config)
	n := b.node("edge-1")
	t.Logf("the agent without containers: %s", n.memory())
	n.sh("seq %d | xargs -P 4 -I{} ctr run -d --label %s %s c{} sleep 1d", crowd, backend, image)
	n.eventuallyHolds(crowd, 2*crowd)
	took := n.attachTimes()
	if len(took) != crowd {
		t.Fatalf("the log tells of %d containers", len(took))
	}
	p50, p99 := took[crowd/2], took[crowd*99/100-1]
	t.Logf("from hook to wired, the agent's part: p50 %v, p99 %v, longest %v", p50, p99, took[crowd-1])
	if p50 > attachBound {
		t.Errorf("p50 is %v, more than %v", p50, attachBound)
	}
	far := b.node("edge-2").ctr("far", backend)
	for _, id := range []string{"c1", "c50", "c100"} {
		(&guest{node: n, namespace: "default", id: id}).look().ping(far)
	}
	n.settles()
	n.killAgent()
	n.start()
	n.eventuallyHolds(crowd, 2*crowd)
	n.settles()
	n.sh("for i in $(seq %d); do echo $i; done | xargs -P 4 -I{} sh -c 'ctr tasks rm -f c{} && ctr containers rm c{}' >/dev/null", crowd)
	n.eventuallyEmpty()
}

// settles waits until the agent at rest holds less than the bound.
func (n *node) settles() {
	n.t.Helper()
	n.eventually("the agent's memory", func() error {
		if m := n.memory(); m.total > memoryBound {
			return fmt.Errorf("is %s", m)
		}
		return nil
	})
	n.t.Logf("the agent with %d containers: %s", crowd, n.memory())
}

// memory is what of the agent is in memory, in KiB.
type memory struct{ total, own int }

func (m memory) String() string {
	return fmt.Sprintf("%d KiB in memory, %d KiB without the program file", m.total, m.own)
}

func (n *node) memory() (m memory) {
	n.t.Helper()
	status := n.sh("cat /proc/$(cat /run/lab/agent.pid)/status")
	for line := range strings.Lines(status) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		switch f[0] {
		case "VmRSS:":
			m.total, _ = strconv.Atoi(f[1])
		case "RssAnon:":
			m.own, _ = strconv.Atoi(f[1])
		}
	}
	if m.total == 0 {
		n.t.Fatalf("the agent's status has no VmRSS:\n%s", status)
	}
	return m
}

var servedLine = regexp.MustCompile(`msg="hook served" stage=createRuntime .* took=(\S+) wired=true`)

// attachTimes are those of all containers that the agent wired, sorted.
func (n *node) attachTimes() (took []time.Duration) {
	n.t.Helper()
	for _, m := range servedLine.FindAllStringSubmatch(n.agentLog(), -1) {
		d, err := time.ParseDuration(m[1])
		if err != nil {
			n.t.Fatal(err)
		}
		took = append(took, d)
	}
	slices.Sort(took)
	return took
}
