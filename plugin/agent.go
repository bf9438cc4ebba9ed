// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/lace-net/lace/plugin/wire"
)

// Options say where the agent meets containerd. The zero value is a usual host's.
type Options struct {
	Socket     string       // for hooks; default wire.DefaultSocket
	Containerd string       // containerd's socket; default wire.DefaultContainerd
	NRI        string       // NRI's socket; default /var/run/nri/nri.sock
	NRIIndex   string       // place among the NRI plugins, two digits; default "10"
	Log        *slog.Logger // default slog.Default()
}

func (o Options) withDefaults() Options {
	set := func(s *string, value string) {
		if *s == "" {
			*s = value
		}
	}
	set(&o.Socket, wire.DefaultSocket)
	set(&o.Containerd, wire.DefaultContainerd)
	set(&o.NRI, api.DefaultSocketPath)
	set(&o.NRIIndex, defaultNRIIndex)
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return o
}

// Agent turns what containerd says into calls of a Dataplane: hooks and CNI calls from lace-runc, NRI
// events, and containerd's own list of containers and events about their end.
type Agent struct {
	options   Options
	dataplane Dataplane
	records   records
	log       *slog.Logger
	ready     chan struct{}
	one       keyedMutex // one container is worked on by one goroutine at a time

	// gate is held for reading while a container is attached, for writing while Retain runs, so that
	// a container attached between the listing and Retain is not taken for a leftover.
	gate sync.RWMutex

	mu    sync.Mutex
	known map[string]uint32   // containers that asked for Lace → pid of the task, 0 if there is none
	since map[string]struct{} // attached since the running synchronisation began; nil: none is running
}

// New makes an agent; nothing happens before Run.
func New(o Options, d Dataplane) *Agent {
	o = o.withDefaults()
	return &Agent{options: o, dataplane: d, log: o.Log, ready: make(chan struct{}), known: map[string]uint32{}}
}

// Ready is closed when hooks are heard.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// Run serves until ctx ends. It returns an error only when it cannot begin: the hook socket is taken,
// or containerd's address makes no sense. A containerd or NRI that is not there is waited for.
func (a *Agent) Run(ctx context.Context) error {
	hooks, err := listen(a.options.Socket, a.handle, a.log)
	if err != nil {
		return err
	}
	client, err := dialContainerd(a.options.Containerd)
	if err != nil {
		hooks.socket.Close()
		return err
	}
	defer client.close()
	a.records = client
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var loops sync.WaitGroup
	loops.Go(func() { a.followContainerd(ctx, client) })
	loops.Go(func() { a.followNRI(ctx) })
	close(a.ready)
	a.log.Info("hooks are heard", "socket", a.options.Socket)
	err = hooks.run(ctx)
	cancel()
	loops.Wait()
	return err
}

// handle judges one message of lace-runc.
func (a *Agent) handle(ctx context.Context, m wire.Message) wire.Answer {
	start := time.Now()
	res, err := a.dispatch(ctx, m)
	id := m.Namespace + "/"
	if m.State != nil {
		id += m.State.ID
	} else {
		id += m.CNI.ContainerID
	}
	log := a.log.With("stage", m.Stage, "container", id, "took", time.Since(start).Round(time.Microsecond))
	if err != nil {
		log.Warn("hook refused", "error", err)
		var u undecidedError
		return wire.Answer{Error: err.Error(), Undecided: errors.As(err, &u)}
	}
	log.Debug("hook served", "wired", res != nil)
	return wire.Answer{Result: res}
}

func (a *Agent) dispatch(ctx context.Context, m wire.Message) (*wire.Result, error) {
	if err := a.checkContainerd(m.Containerd); err != nil {
		return nil, err
	}
	switch m.Stage {
	case wire.CreateRuntime:
		return a.createRuntime(ctx, m.Namespace, *m.State)
	case wire.Poststop:
		return nil, a.detach(ctx, key(m.Namespace, m.State.ID))
	case wire.CNIAdd:
		return a.cniAdd(ctx, *m.CNI)
	case wire.CNIDel:
		// A pod whose network is taken away never gets it back: its next start is a new pod.
		return nil, a.release(ctx, key(wire.CRINamespace, m.CNI.ContainerID))
	case wire.CNICheck:
		return a.cniCheck(ctx, *m.CNI)
	}
	return nil, fmt.Errorf("unknown stage %s", quote(m.Stage))
}

// undecidedError says that it is not known whether a container asks for Lace.
type undecidedError struct{ error }

func (e undecidedError) Unwrap() error { return e.error }

// checkContainerd refuses a container of another containerd than the agent's: its labels are there.
func (a *Agent) checkContainerd(address string) error {
	if address == "" || sameSocket(address, a.options.Containerd) {
		return nil
	}
	return undecidedError{fmt.Errorf("container belongs to the containerd at %s, this agent serves the one at %s; name the right one in the agent's settings",
		quote(address), a.options.Containerd)}
}

// key names a container to the data plane.
func key(namespace, id string) string { return namespace + "/" + id }

// attach wires r and keeps its books. netns is checked before and after: what is left of a container
// that died meanwhile is taken away again.
func (a *Agent) attach(ctx context.Context, r Request, pid uint32) ([]Result, error) {
	before, err := netnsOf(r.Netns)
	if err != nil {
		return nil, fmt.Errorf("attach container %s: network namespace: %w; did it end already?", r.Container, err)
	}
	a.gate.RLock()
	defer a.gate.RUnlock()
	a.learn(r.Container, pid)
	res, err := a.dataplane.Attach(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("container asks for network %q: %w", r.networks(), err)
	}
	if after, err := netnsOf(r.Netns); err != nil || after != before {
		a.undo(ctx, r.Container)
		return nil, fmt.Errorf("attach container %s: it ended while it was wired", r.Container)
	}
	return res, nil
}

func (a *Agent) undo(ctx context.Context, container string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), wire.AgentDeadline)
	defer cancel()
	if err := a.dataplane.Detach(ctx, container); err != nil {
		a.log.Error("detach a container that ended while it was wired", "container", container, "error", err)
	}
}

func (a *Agent) detach(ctx context.Context, container string) error {
	defer a.one.lock(container)()
	if err := a.dataplane.Detach(ctx, container); err != nil {
		return fmt.Errorf("detach container %s: %w", container, err)
	}
	return nil
}

func (a *Agent) release(ctx context.Context, container string) error {
	defer a.one.lock(container)()
	a.forget(container)
	if err := a.dataplane.Release(ctx, container); err != nil {
		return fmt.Errorf("release container %s: %w", container, err)
	}
	return nil
}

func (a *Agent) learn(container string, pid uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.known[container] = pid
	if a.since != nil {
		a.since[container] = struct{}{}
	}
}

func (a *Agent) forget(container string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.known, container)
}

// pidOf returns the pid of the container's task, 0 where it is not known, and whether it asked for Lace.
func (a *Agent) pidOf(container string) (uint32, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	pid, ok := a.known[container]
	return pid, ok
}

// keyedMutex is a mutex for each key; it holds only those that are in use.
type keyedMutex struct {
	mu    sync.Mutex
	locks map[string]*keyedLock
}

type keyedLock struct {
	sync.Mutex
	users int
}

// lock waits for the key and returns what frees it.
func (k *keyedMutex) lock(key string) (unlock func()) {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*keyedLock{}
	}
	l := k.locks[key]
	if l == nil {
		l = &keyedLock{}
		k.locks[key] = l
	}
	l.users++
	k.mu.Unlock()
	l.Lock()
	return func() {
		l.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.locks, key)
		}
	}
}
