// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"os"
	"strings"
	"testing"
)

func needTools(t *testing.T) {
	t.Helper()
	needLab(t)
	for _, name := range []string{"LACE_TOOLS_BIN", "LACE_IMAGE"} {
		if os.Getenv(name) == "" {
			t.Skipf("%s is not set: run by scripts/test nodes, or set it to what scripts/tools prints", name)
		}
	}
}

// upWithContainerd brings a lab up whose nodes have containerd, but no agent.
func upWithContainerd(t *testing.T, name string) {
	t.Helper()
	t.Cleanup(func() {
		if output, err := runLace("lab", "down", "--name", name); err != nil {
			t.Errorf("clean up: %v\n%s", err, output)
		}
	})
	mustRun(t, "lab", "up", topologyFile(t, oneLink), "--name", name, "--no-agent")
}

const image = "lace.test/busybox:latest"

func TestContainerdOfEachNode(t *testing.T) {
	needTools(t)
	name := labName("q")
	upWithContainerd(t, name)
	in(t, name, "edge-1", "nerdctl run -d --net none --name web "+image+" sleep 3600")
	in(t, name, "edge-2", "ctr run -d "+image+" web sleep 3600")
	if got := in(t, name, "edge-1", "nerdctl ps --format '{{.Names}}'"); got != "web" {
		t.Errorf("edge-1 runs %q", got)
	}
	if got := in(t, name, "edge-3", "nerdctl ps --all --quiet; crictl pods --quiet"); got != "" {
		t.Errorf("edge-3 runs what the others do: %q", got)
	}
	for _, node := range []string{"edge-1", "edge-2", "edge-3"} {
		if got := in(t, name, node, "crictl images"); !strings.Contains(got, "lace.test/pause") {
			t.Errorf("CRI of %s has no pause image: %s", node, got)
		}
	}
	if got := in(t, name, "edge-1", "ls /etc/cni/net.d"); got != "10-lace.conflist" {
		t.Errorf("edge-1 has no CNI configuration: %s", got)
	}
	mustRun(t, "lab", "down", "--name", name) // with its containers running
	wantNothing(t, name)
}

func TestContainersOutliveContainerd(t *testing.T) {
	needTools(t)
	name := labName("r")
	upWithContainerd(t, name)
	in(t, name, "edge-1", "nerdctl run -d --net none --name web "+image+" sleep 3600")
	status := func(want string) func() bool {
		return func() bool { return strings.Contains(mustRun(t, "lab", "status", "--name", name), want) }
	}
	mustRun(t, "lab", "kill", "--name", name, "edge-1", "containerd")
	poll(t, "status tells of the end", status("ended (signal SIGKILL)"))
	if output, err := runLace("lab", "kill", "--name", name, "edge-1", "containerd"); err == nil || !strings.Contains(output, "does not run") {
		t.Errorf("killed twice: %v, %s", err, output)
	}
	mustRun(t, "lab", "start", "--name", name, "edge-1")
	poll(t, "containerd is back", func() bool { return !status("ended")() && !status("starting")() })
	if got := in(t, name, "edge-1", "nerdctl exec web echo alive"); got != "alive" {
		t.Errorf("the container says %q", got)
	}
}
