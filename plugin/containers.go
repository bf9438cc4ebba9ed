// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/plugin/wire"
)

// ifName is the interface of a container's first network.
const ifName = "eth0"

// nerdctlName is the label in which nerdctl keeps the name of a container.
const nerdctlName = "nerdctl/name"

// container is what containerd's record says of a container outside CRI.
type container struct {
	namespace, id string
	labels        map[string]string
	annotations   map[string]string // of its OCI specification
	ownNetwork    bool              // the specification has a fresh network namespace
	cri           bool              // part of a CRI pod, which has records of its own
	pid           uint32            // of its running task; 0: none runs
}

// records is what the agent reads of containerd and writes to it.
type records interface {
	container(ctx context.Context, namespace, id string) (container, error)
	pod(ctx context.Context, id string) (wire.Pod, error)
	// remember sets labels on the record of a container.
	remember(ctx context.Context, namespace, id string, labels map[string]string) error
	containers(ctx context.Context) ([]container, error)
	pods(ctx context.Context) ([]wire.Pod, error)
}

// createRuntime judges a container that runc has made and not yet started.
func (a *Agent) createRuntime(ctx context.Context, namespace string, s wire.State) (*wire.Result, error) {
	switch s.Annotations[wire.KindAnnotation] {
	case wire.KindContainer:
		return nil, nil // its pod has the network
	case wire.KindSandbox:
		return a.createSandbox(ctx, s)
	}
	c, err := a.records.container(ctx, namespace, s.ID)
	if err != nil {
		return nil, undecidedError{fmt.Errorf("read the labels of container %s: %w", key(namespace, s.ID), err)}
	}
	r, asks, err := ParseLabels(c.labels, s.Annotations)
	if !asks || err != nil {
		return nil, err
	}
	if s.Pid <= 0 {
		return nil, fmt.Errorf("hook message %s has pid %d: the OCI state of a created container has its process", wire.CreateRuntime, s.Pid)
	}
	c.pid = uint32(s.Pid)
	res, err := a.attachContainer(ctx, c, r)
	return wireResult(res), err
}

// attachContainer wires a container outside CRI to where its task runs.
func (a *Agent) attachContainer(ctx context.Context, c container, r Request) (*Result, error) {
	r, err := complete(r, c.namespace, c.id, c.labels[nerdctlName])
	if err != nil {
		return nil, err
	}
	r.Netns = fmt.Sprintf("/proc/%d/ns/net", c.pid)
	if host, err := hostNetns(r.Netns); err != nil || host {
		return nil, err
	}
	defer a.one.lock(r.Container)()
	if err := a.checkUnused(r, c.pid); err != nil {
		return nil, err
	}
	res, err := a.attachRemembered(ctx, r, c)
	if err != nil {
		return nil, err
	}
	a.rememberAddresses(ctx, c, res)
	return &res, nil
}

// attachRemembered asks for the addresses on the container's record first. They are no more than a wish: where
// they cannot be had any more, because the block or the owner changed, the container gets others.
func (a *Agent) attachRemembered(ctx context.Context, r Request, c container) (Result, error) {
	wish, remembered := withRecord(r, c.labels)
	if !remembered {
		return a.attach(ctx, r, c.pid)
	}
	res, err := a.attach(ctx, wish, c.pid)
	if err == nil || ctx.Err() != nil {
		return res, err
	}
	res, second := a.attach(ctx, r, c.pid)
	if second != nil {
		return res, second
	}
	a.log.Warn("a container could not keep its addresses and got new ones", "container", r.Container,
		"kept", c.labels[RecordAddress], "now", addressRecord(res)[RecordAddress], "reason", err)
	return res, nil
}

// rememberAddresses writes what a container got to its record. It runs wired all the same when that fails; it may then
// get other addresses at its next start.
func (a *Agent) rememberAddresses(ctx context.Context, c container, res Result) {
	record := addressRecord(res)
	if c.labels[RecordAddress] == record[RecordAddress] && c.labels[RecordMAC] == record[RecordMAC] {
		return
	}
	if err := a.records.remember(ctx, c.namespace, c.id, record); err != nil {
		a.log.Warn("keep the addresses of a container on its record", "container", key(c.namespace, c.id), "error", err)
	}
}

// checkUnused finds an interface that something else put where Lace's belongs, while the text can still say what to do.
func (a *Agent) checkUnused(r Request, pid uint32) error {
	if _, ok := a.dataplane.Attached(r.Container); ok {
		return nil
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return fmt.Errorf("look for interfaces of container %s: %w; did it end already?", r.Container, err)
	}
	for line := range strings.Lines(string(b)) {
		if name, _, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == r.IfName {
			return fmt.Errorf("container asks for network %q, but has an interface %s of another network already; start it without one (nerdctl: --net none)",
				r.Network, r.IfName)
		}
	}
	return nil
}

// createSandbox judges the own container of a CRI pod. Where CNI or NRI wired the pod it finds that done; with
// neither, it is the one that does it.
func (a *Agent) createSandbox(ctx context.Context, s wire.State) (*wire.Result, error) {
	p, err := a.records.pod(ctx, s.ID)
	if err != nil {
		return nil, undecidedError{fmt.Errorf("read the labels of pod %s: %w", s.ID, err)}
	}
	res, err := a.attachPod(ctx, p, p.Netns)
	return wireResult(res), err
}

func (a *Agent) cniAdd(ctx context.Context, c wire.CNI) (*wire.Result, error) {
	p, err := a.records.pod(ctx, c.ContainerID)
	if err != nil {
		return nil, undecidedError{fmt.Errorf("read the labels of pod %s: %w; this CNI plugin serves the pods of CRI in containerd 2 (nerdctl: --net none)",
			c.ContainerID, err)}
	}
	p.Annotations = merged(p.Annotations, c.Annotations)
	if c.IfName != "" && c.IfName != ifName {
		return nil, fmt.Errorf("CNI asks for interface %s; Lace makes %s", quote(c.IfName), ifName)
	}
	res, err := a.attachPod(ctx, p, c.Netns)
	return wireResult(res), err
}

func (a *Agent) cniCheck(ctx context.Context, c wire.CNI) (*wire.Result, error) {
	p, err := a.records.pod(ctx, c.ContainerID)
	if err != nil {
		return nil, undecidedError{fmt.Errorf("read the labels of pod %s: %w", c.ContainerID, err)}
	}
	p.Annotations = merged(p.Annotations, c.Annotations)
	return nil, a.checkPod(p)
}

// checkPod fails for a pod that asks for Lace and is not wired.
func (a *Agent) checkPod(p wire.Pod) error {
	r, asks, err := ParseLabels(p.Labels, p.Annotations)
	if err != nil {
		return err
	}
	if !asks || p.HostNetwork {
		return nil
	}
	if _, ok := a.dataplane.Attached(key(wire.CRINamespace, p.ID)); !ok {
		return fmt.Errorf("pod %s asks for network %q and is not wired; remove the pod and run it again", p.ID, r.Network)
	}
	return nil
}

// attachPod wires a pod that asks and is not wired yet; the Result is nil when it asks for nothing.
func (a *Agent) attachPod(ctx context.Context, p wire.Pod, netns string) (*Result, error) {
	if p.HostNetwork {
		return nil, nil
	}
	r, asks, err := ParseLabels(p.Labels, p.Annotations)
	if !asks || err != nil {
		return nil, err
	}
	if r, err = complete(r, wire.CRINamespace, p.ID, p.Name); err != nil {
		return nil, err
	}
	if netns == "" {
		return nil, fmt.Errorf("pod %s asks for network %q, but has no network namespace yet", p.ID, r.Network)
	}
	r.Netns = netns
	defer a.one.lock(r.Container)()
	if res, ok := a.dataplane.Attached(r.Container); ok {
		a.learn(r.Container, 0)
		return &res, nil
	}
	res, err := a.attach(ctx, r, 0)
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// complete gives r the fields that do not come from labels.
func complete(r Request, namespace, id, name string) (Request, error) {
	r.Container, r.IfName = key(namespace, id), ifName
	if r.Name != "" {
		return r, nil
	}
	r.Name = name
	if name != "" && len(name) <= maxName && nameForm.MatchString(name) {
		return r, nil
	}
	r.Name = id
	if !isRandom(id) {
		return r, nil
	}
	if r.Sticky {
		return r, fmt.Errorf("%s is set, but the container has no name that it could have again; give it one with %s", LabelSticky, LabelName)
	}
	r.Name = id[:12]
	return r, nil
}

// isRandom reports whether id is the kind that clients make up, which the next run will not have.
func isRandom(id string) bool {
	return len(id) == 64 && strings.Trim(id, "0123456789abcdef") == ""
}

// merged returns base with the entries of top in front.
func merged(base, top map[string]string) map[string]string {
	all := maps.Clone(base)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, top)
	return all
}

// netnsID is a network namespace's identity: device and inode.
type netnsID struct{ device, inode uint64 }

// netnsOf returns the identity of the namespace at path, which may be a link of /proc or a bind mount.
func netnsOf(path string) (netnsID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return netnsID{}, fmt.Errorf("stat %s: %w", path, err)
	}
	return netnsID{st.Dev, st.Ino}, nil
}

// hostNetns reports whether path is the agent's own namespace. A container there asks for Lace in vain: it shares the node's
// network, as its client wanted.
func hostNetns(path string) (bool, error) {
	its, err := netnsOf(path)
	if err != nil {
		return false, fmt.Errorf("network namespace of a container: %w; did it end already?", err)
	}
	own, err := netnsOf("/proc/self/ns/net")
	if err != nil {
		return false, fmt.Errorf("network namespace of the agent: %w", err)
	}
	return its == own, nil
}

// sameSocket reports whether two addresses lead to one socket. Either may begin with unix://.
func sameSocket(a, b string) bool {
	a, b = strings.TrimPrefix(a, "unix://"), strings.TrimPrefix(b, "unix://")
	if a == b {
		return true
	}
	sa, errA := os.Stat(a)
	sb, errB := os.Stat(b)
	return errors.Join(errA, errB) == nil && os.SameFile(sa, sb)
}

func wireResult(r *Result) *wire.Result {
	if r == nil {
		return nil
	}
	w := &wire.Result{IfName: r.IfName, MAC: r.MAC.String(), MTU: r.MTU}
	if r.V4.IsValid() {
		w.IPs, w.Gateways = append(w.IPs, r.V4), append(w.Gateways, r.Gateway4)
	}
	if r.V6.IsValid() {
		w.IPs, w.Gateways = append(w.IPs, r.V6), append(w.Gateways, r.Gateway6)
	}
	return w
}
