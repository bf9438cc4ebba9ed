// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/plugin/wire"
)

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
func (a *Agent) attachContainer(ctx context.Context, c container, r Request) ([]Result, error) {
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
	return res, nil
}

// attachRemembered asks for the addresses on the container's record first. They are no more than a wish: where
// they cannot be had any more, because the block or the owner changed, the container gets others, in that network if it is one
// alone, else in all.
func (a *Agent) attachRemembered(ctx context.Context, r Request, c container) (res []Result, err error) {
	var reason error
	for _, wish := range wishes(r, c.labels) {
		if res, err = a.attach(ctx, wish, c.pid); err == nil || ctx.Err() != nil {
			break
		}
		if reason == nil {
			reason = err
		}
	}
	if err == nil && reason != nil {
		a.log.Warn("a container could not keep its addresses and got new ones", "container", r.Container,
			"kept", c.labels[RecordAddress], "now", addressRecord(res)[RecordAddress], "reason", reason)
	}
	return res, err
}

// rememberAddresses writes what a container got to its record. It runs wired all the same when that fails; it may then
// get other addresses at its next start.
func (a *Agent) rememberAddresses(ctx context.Context, c container, res []Result) {
	record := addressRecord(res)
	if c.labels[RecordAddress] == record[RecordAddress] && c.labels[RecordMAC] == record[RecordMAC] {
		return
	}
	if err := a.records.remember(ctx, c.namespace, c.id, record); err != nil {
		a.log.Warn("keep the addresses of a container on its record", "container", key(c.namespace, c.id), "error", err)
	}
}

// checkUnused finds an interface that something else put where one of Lace's belongs, while the text can still say what to do.
func (a *Agent) checkUnused(r Request, pid uint32) error {
	attached, _ := a.dataplane.Attached(r.Container)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return fmt.Errorf("look for interfaces of container %s: %w; did it end already?", r.Container, err)
	}
	for line := range strings.Lines(string(b)) {
		name, _, ok := strings.Cut(line, ":")
		name = strings.TrimSpace(name)
		if !ok || !slices.ContainsFunc(r.Interfaces, func(i Interface) bool { return i.IfName == name }) {
			continue
		}
		if !slices.ContainsFunc(attached, func(res Result) bool { return res.IfName == name }) {
			return fmt.Errorf("container asks for network %q, but has an interface %s of another network already; start it without one (nerdctl: --net none)",
				r.networks(), name)
		}
	}
	return nil
}

// wired returns how the container is wired, interface by interface as r has them, and whether none of them is missing.
func (a *Agent) wired(r Request) ([]Result, bool) {
	attached, _ := a.dataplane.Attached(r.Container)
	var results []Result
	for _, i := range r.Interfaces {
		at := slices.IndexFunc(attached, func(res Result) bool { return res.IfName == i.IfName })
		if at < 0 {
			return nil, false
		}
		results = append(results, attached[at])
	}
	return results, true
}

// complete gives r the fields that do not come from labels.
func complete(r Request, namespace, id, name string) (Request, error) {
	r.Container = key(namespace, id)
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

func wireResult(results []Result) *wire.Result {
	if len(results) == 0 {
		return nil
	}
	w := &wire.Result{}
	for _, r := range results {
		w.Interfaces = append(w.Interfaces, wireInterface(r))
	}
	return w
}

func wireInterface(r Result) wire.Interface {
	i := wire.Interface{Network: r.Network, Name: r.IfName, MAC: r.MAC.String(), MTU: r.MTU}
	if r.V4.IsValid() {
		i.IPs, i.Gateways = append(i.IPs, r.V4), append(i.Gateways, r.Gateway4)
	}
	if r.V6.IsValid() {
		i.IPs, i.Gateways = append(i.IPs, r.V6), append(i.Gateways, r.Gateway6)
	}
	return i
}
