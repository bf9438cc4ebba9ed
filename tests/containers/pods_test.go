// SPDX-License-Identifier: Apache-2.0

package containers

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/lace-net/lace/tests/harness"
)

var labelled = map[string]string{"lace.network": "backend", "lace.ip": "10.40.1.77"}

// logOf returns what a pod's container printed.
func (b *bed) logOf(p harness.Pod, name string) string {
	b.t.Helper()
	var out []byte
	b.Eventually("the container prints something", func() (err error) {
		out, err = os.ReadFile(fmt.Sprintf("%s/logs/%s-%s.log", b.Dir, p.Name, name))
		if err == nil && len(out) == 0 {
			err = errors.New("its log is empty")
		}
		return err
	})
	return string(out)
}

func TestPodIsWired(t *testing.T) {
	for name, nri := range map[string]bool{"with NRI": true, "without NRI": false} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, harness.Options{NRI: nri})
			p := harness.Pod{Name: "p1", Labels: labelled}
			id := b.RunPod(p)
			if ip := b.PodIP(id); ip != "10.40.1.77" {
				t.Errorf("CRI reports %q", ip)
			}
			b.RunIn(p, id, "c1", "sh", "-c", "ip -o addr; sleep 1000")
			contains(t, b.logOf(p, "c1"), "eth0    inet 10.40.1.77/24")
			b.Crictl("stopp", id)
			b.eventuallyDetached("k8s.io/" + id)
			b.Crictl("rmp", id)
			b.eventuallyReleased("k8s.io/" + id)
		})
	}
}

func TestPodAsksByAnnotation(t *testing.T) {
	b := newBed(t, harness.Options{NRI: true})
	id := b.RunPod(harness.Pod{Name: "p1", Labels: map[string]string{"lace.network": "other"}, Annotations: labelled})
	if ip := b.PodIP(id); ip != "10.40.1.77" {
		t.Errorf("CRI reports %q", ip)
	}
}

func TestPodsOfOthers(t *testing.T) {
	b := newBed(t, harness.Options{NRI: true})
	plain := b.RunPod(harness.Pod{Name: "plain", Labels: map[string]string{"app": "web"}})
	if ip := b.PodIP(plain); ip != "127.0.0.1" {
		t.Errorf("CRI reports %q for a pod that Lace does not wire", ip)
	}
	host := harness.Pod{Name: "host", Labels: labelled, HostNetwork: true}
	id := b.RunPod(host)
	b.RunIn(host, id, "c1", "sh", "-c", "echo alive")
	contains(t, b.logOf(host, "c1"), "alive")
	if n := b.count("attach"); n != 0 {
		t.Errorf("%d pods were attached", n)
	}
	b.stop()
	b.RunPod(harness.Pod{Name: "without-agent"})
	b.RunPod(harness.Pod{Name: "host-without-agent", Labels: labelled, HostNetwork: true})
}

func TestPodIsRefused(t *testing.T) {
	b := newBed(t, harness.Options{NRI: true})
	b.set(func(f *fake) { f.refuse = errors.New("the block of this node is full") })
	b.refused([]string{`container asks for network "backend": the block of this node is full`}, "crictl", "runp", b.PodFile(harness.Pod{Name: "p1", Labels: labelled}))
	b.refused([]string{`unknown label "lace.foo"`}, "crictl", "runp", b.PodFile(harness.Pod{Name: "p2", Labels: map[string]string{"lace.foo": "x"}}))
	b.stop()
	b.refused([]string{`pod asks for network "backend", but the Lace agent is not running`}, "crictl", "runp", b.PodFile(harness.Pod{Name: "p3", Labels: labelled}))
	b.refused([]string{`pod asks for network "backend", but the Lace agent is not running`}, "crictl", "runp", b.PodFile(harness.Pod{Name: "p4", Annotations: labelled}))
	if pods := b.Crictl("pods", "-q"); pods != "" {
		t.Errorf("pods are left: %s", pods)
	}
}

// otherCNI is another network's plugin, which knows nothing of Lace.
const otherCNI = `#!/bin/sh
cat >/dev/null
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"1.0.0","ips":[{"address":"192.0.2.1/24"}]}' ;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}' ;;
esac
`

// TestHookAndNRIHoldWithoutLacesCNI puts another network's plugin in the place of lace-cni.
func TestHookAndNRIHoldWithoutLacesCNI(t *testing.T) {
	for name, nri := range map[string]bool{"with NRI": true, "without NRI": false} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, harness.Options{NRI: nri})
			cni := b.Dir + "/cni/bin/lace-cni"
			if err := errors.Join(os.Remove(cni), os.WriteFile(cni, []byte(otherCNI), 0o755)); err != nil {
				t.Fatal(err)
			}
			p := harness.Pod{Name: "p1", Labels: labelled}
			id := b.RunPod(p)
			b.RunIn(p, id, "c1", "sh", "-c", "ip -o addr; sleep 1000")
			contains(t, b.logOf(p, "c1"), "eth0    inet 10.40.1.77/24")
			b.stop()
			b.refused([]string{`container asks for network "backend", but the Lace agent is not running`},
				"crictl", "runp", b.PodFile(harness.Pod{Name: "p2", Labels: labelled}))
			b.refused([]string{`container asks for network "backend", but the Lace agent is not running`},
				"crictl", "runp", b.PodFile(harness.Pod{Name: "p3", Annotations: labelled}))
		})
	}
}

// TestNRILooksAgainBeforeAContainerStarts takes a pod's wiring away behind the agent's back.
func TestNRILooksAgainBeforeAContainerStarts(t *testing.T) {
	b := newBed(t, harness.Options{NRI: true})
	p := harness.Pod{Name: "p1", Labels: labelled}
	id := b.RunPod(p)
	c := b.Crictl("create", id, b.ContainerFile(p, "c1", "sleep", "1000"), b.PodFile(p))
	if err := b.Detach(t.Context(), "k8s.io/"+id); err != nil {
		t.Fatal(err)
	}
	b.Eventually("NRI has the agent", func() error {
		_, err := b.Try("crictl", "start", c)
		if err == nil {
			return errors.New("the container started")
		}
		if !strings.Contains(unescape(err.Error()), `asks for network "backend" and is not wired`) {
			return err
		}
		return nil
	})
}

// TestPodsOutliveContainerdAndAgent restarts both, and removes a pod while the agent is away.
func TestPodsOutliveContainerdAndAgent(t *testing.T) {
	b := newBed(t, harness.Options{NRI: true})
	stays := b.RunPod(harness.Pod{Name: "stays", Labels: labelled})
	gone := b.RunPod(harness.Pod{Name: "gone", Labels: map[string]string{"lace.network": "backend"}})
	syncs := b.syncs()
	b.Kill()
	b.Launch()
	b.waitSync(syncs)
	b.stop()
	b.Crictl("stopp", gone)
	b.Crictl("rmp", gone)
	b.startAgent()
	if _, ok := b.Attached("k8s.io/" + stays); !ok {
		t.Error("the running pod was detached")
	}
	b.eventuallyReleased("k8s.io/" + gone)
}
