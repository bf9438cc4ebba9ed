// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/typeurl/v2"

	"github.com/lace-net/lace/plugin/wire"
)

const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 15 * time.Second
	// syncDeadline bounds reading all of containerd's records and wiring what is not wired.
	syncDeadline = 2 * time.Minute
	// eventDeadline bounds the work for one event.
	eventDeadline = 30 * time.Second
)

// backoff grows from firstBackoff to lastBackoff and begins anew after a success.
type backoff struct{ next time.Duration }

func (b *backoff) wait(ctx context.Context) {
	b.next = min(max(2*b.next, firstBackoff), lastBackoff)
	pause(ctx, b.next)
}

func (b *backoff) reset() { b.next = 0 }

// followContainerd synchronises with containerd and follows its events, again after each loss of it.
func (a *Agent) followContainerd(ctx context.Context, client *containerdClient) {
	var b backoff
	for ctx.Err() == nil {
		err := a.session(ctx, client, &b)
		if ctx.Err() != nil {
			return
		}
		a.log.Warn("containerd is not followed; trying again", "socket", a.options.Containerd, "error", err)
		b.wait(ctx)
	}
}

// session lasts as long as one connection to containerd. Events are subscribed to before the listing and handled
// after it, so that none is missed and none is handled too early.
func (a *Agent) session(ctx context.Context, client *containerdClient, b *backoff) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := client.probe(ctx); err != nil {
		return err
	}
	stream, errs := client.subscribe(ctx)
	if err := a.synchronise(ctx); err != nil {
		return err
	}
	b.reset()
	for {
		select {
		case e := <-stream:
			a.event(ctx, e)
		case err := <-errs:
			if err == nil {
				err = errStreamEnded
			}
			return err
		}
	}
}

// synchronise makes the data plane hold what containerd holds: running containers wired, the addresses of
// stopped ones reserved, all others gone. Nothing is taken away unless everything could be listed.
func (a *Agent) synchronise(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, syncDeadline)
	defer cancel()
	start := time.Now()
	a.beginSync()
	defer a.endSync()
	containers, err := a.records.containers(ctx)
	if err != nil {
		return err
	}
	pods, err := a.records.pods(ctx)
	if err != nil {
		return err
	}
	live := a.settleContainers(ctx, containers)
	live = append(live, a.settlePods(ctx, pods)...)
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("synchronise with containerd: %w", err)
	}
	if err := a.retain(ctx, live); err != nil {
		return err
	}
	a.log.Info("synchronised with containerd", "containers", len(containers), "pods", len(pods), "with_lace", len(live),
		"took", time.Since(start).Round(time.Millisecond))
	return nil
}

func (a *Agent) beginSync() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.since = map[string]struct{}{}
}

func (a *Agent) endSync() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.since = nil
}

// retain lets the data plane drop what is neither in live nor was attached since the listing began.
func (a *Agent) retain(ctx context.Context, live []string) error {
	a.gate.Lock()
	defer a.gate.Unlock()
	a.mu.Lock()
	keep := map[string]struct{}{}
	for _, c := range live {
		keep[c] = struct{}{}
	}
	maps.Copy(keep, a.since)
	maps.DeleteFunc(a.known, func(c string, _ uint32) bool { _, ok := keep[c]; return !ok })
	a.mu.Unlock()
	if err := a.dataplane.Retain(ctx, slices.Sorted(maps.Keys(keep))); err != nil {
		return fmt.Errorf("take away what is left of containers that are gone: %w", err)
	}
	return nil
}

// settleContainers returns the keys of those that ask for Lace, after putting each in its state. One that
// fails is logged; it stays in the list, since it exists.
func (a *Agent) settleContainers(ctx context.Context, containers []container) (live []string) {
	for _, c := range containers {
		if c.cri || !c.ownNetwork {
			continue
		}
		r, asks, err := ParseLabels(c.labels, c.annotations)
		if !asks {
			continue
		}
		id := key(c.namespace, c.id)
		live = append(live, id)
		if err == nil {
			err = a.settle(ctx, c, r)
		}
		if err != nil {
			a.log.Error("synchronise a container", "container", id, "running", c.pid != 0, "error", err)
		}
	}
	return live
}

func (a *Agent) settle(ctx context.Context, c container, r Request) error {
	if c.pid == 0 {
		return a.settleStopped(ctx, c, r)
	}
	r.Container = key(c.namespace, c.id)
	if _, ok := a.wired(r); ok {
		a.learnListed(r.Container, c.pid)
		return nil
	}
	_, err := a.attachContainer(ctx, c, r)
	return err
}

// settleStopped takes away what a task left that ended unseen, and holds the container's addresses. One that
// never ran and wishes for none has none.
func (a *Agent) settleStopped(ctx context.Context, c container, r Request) error {
	r, err := complete(r, c.namespace, c.id, c.labels[nerdctlName])
	if err != nil {
		return err
	}
	defer a.one.lock(r.Container)()
	if !a.learnListed(r.Container, 0) {
		return nil
	}
	if err := a.dataplane.Detach(ctx, r.Container); err != nil {
		return fmt.Errorf("detach stopped container %s: %w", r.Container, err)
	}
	r, _ = withRecord(r, c.labels)
	return a.reserve(ctx, r)
}

// reserve holds the addresses of r network by network, so that one which cannot be had any more costs no other.
func (a *Agent) reserve(ctx context.Context, r Request) error {
	var errs []error
	for _, i := range r.Interfaces {
		if len(i.IPs) == 0 {
			continue
		}
		one := r
		one.Interfaces = []Interface{i}
		if err := a.dataplane.Reserve(ctx, one); err != nil {
			errs = append(errs, fmt.Errorf("reserve the addresses of stopped container %s: %w", r.Container, err))
		}
	}
	return errors.Join(errs...)
}

// learnListed notes a container as it was listed. It reports false for one that was started since: what is known of
// it is newer.
func (a *Agent) learnListed(container string, pid uint32) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, newer := a.since[container]; newer {
		return false
	}
	a.known[container] = pid
	return true
}

// settlePods does for pods what settleContainers does. A pod whose namespace is gone has stopped for good.
func (a *Agent) settlePods(ctx context.Context, pods []wire.Pod) (live []string) {
	for _, p := range pods {
		if p.HostNetwork {
			continue
		}
		if _, asks, _ := ParseLabels(p.Labels, p.Annotations); !asks {
			continue
		}
		live = append(live, key(wire.CRINamespace, p.ID))
		if err := a.settlePod(ctx, p); err != nil {
			a.log.Error("synchronise a pod", "pod", p.ID, "name", p.Name, "error", err)
		}
	}
	return live
}

func (a *Agent) settlePod(ctx context.Context, p wire.Pod) error {
	if p.Netns == "" {
		return nil // it is being made; CNI ADD follows
	}
	if _, err := os.Stat(p.Netns); errors.Is(err, os.ErrNotExist) {
		return a.detach(ctx, key(wire.CRINamespace, p.ID))
	}
	_, err := a.attachPod(ctx, p, p.Netns)
	return err
}

// event handles the end of a task or of a container.
func (a *Agent) event(ctx context.Context, e *events.Envelope) {
	if e == nil || e.Event == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, eventDeadline)
	defer cancel()
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		a.log.Warn("read an event of containerd", "topic", e.Topic, "error", err)
		return
	}
	switch ev := v.(type) {
	case *apievents.TaskExit:
		err = a.taskExited(ctx, e.Namespace, ev)
	case *apievents.ContainerDelete:
		err = a.containerDeleted(ctx, e.Namespace, ev.GetID())
	}
	if err != nil {
		a.log.Error("clean up after a container", "topic", e.Topic, "namespace", e.Namespace, "error", err)
	}
}

// taskExited detaches a container whose first process ended. Ends of exec'd processes, and late news of a task
// that has a successor by now, are none of its business.
func (a *Agent) taskExited(ctx context.Context, namespace string, ev *apievents.TaskExit) error {
	id := key(namespace, ev.GetContainerID())
	pid, asked := a.pidOf(id)
	if !asked || ev.GetID() != ev.GetContainerID() {
		return nil
	}
	if pid != 0 && pid != ev.GetPid() {
		return nil
	}
	return a.detach(ctx, id)
}

func (a *Agent) containerDeleted(ctx context.Context, namespace, id string) error {
	if _, asked := a.pidOf(key(namespace, id)); !asked {
		return nil
	}
	return a.release(ctx, key(namespace, id))
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
