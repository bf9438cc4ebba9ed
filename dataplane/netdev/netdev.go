// SPDX-License-Identifier: Apache-2.0

// Package netdev makes the links, addresses and routes of a Plan true in the network namespace
// that it was opened in, and wires containers to them. It reads what the kernel holds, compares and applies
// the small difference, so that applying twice changes nothing. It is the only importer of netlink.
//
// What is ours is told by name and alias together (own.go); anything else is never touched.
package netdev

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/lace-net/lace/dataplane/plan"
)

// Handle works on one network namespace. Its methods are safe for concurrent use; those that
// change something run one after the other.
type Handle struct {
	host *conn
	log  *slog.Logger
	mu   sync.Mutex // serialises every read–compare–apply

	loopback loopbackWas  // as Localhost found it: lc-host's alias says so too, but somebody may remove lc-host
	stack    atomic.Int64 // index of lc-host, for Watch

	gatewaysMu sync.Mutex
	gateways   map[neighbourKey]neighbour // as Nexthops last reported them: Watch compares
}

// Options say how the plan is to be realised on this kernel.
type Options struct {
	VRF bool // one VRF per network, the bridge holding the gateway; otherwise bridges without any address
	MTU int  // the smallest of the uplinks: each bridge gets what Network.Overhead leaves of it; 0 leaves what the kernel chose
}

// Change is one thing that was done to the kernel.
type Change struct {
	Object string // "bridge laceb100"
	What   string // "set MTU 1460"
}

func (c Change) String() string { return c.Object + ": " + c.What }

// Open returns a Handle on the network namespace of the calling thread.
func Open(log *slog.Logger) (*Handle, error) {
	ns, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("open the current network namespace: %w (is /proc mounted?)", err)
	}
	c, err := dial(ns)
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return &Handle{host: c, log: log, gateways: map[neighbourKey]neighbour{}}, nil
}

// Close gives the sockets back. The kernel's objects stay.
func (h *Handle) Close() { h.host.close() }

// recorder collects what was done.
type recorder struct {
	log     *slog.Logger
	changes []Change
}

func (h *Handle) recorder() *recorder { return &recorder{log: h.log} }

// do runs one change and records it when it succeeded.
func (r *recorder) do(object, what string, change func() error) error {
	if err := change(); err != nil {
		return fmt.Errorf("%s: %s: %w", object, what, err)
	}
	r.done(object, what)
	return nil
}

func (r *recorder) done(object, what string) {
	r.log.Debug("changed", "object", object, "what", what)
	r.changes = append(r.changes, Change{object, what})
}

// dumpTries bounds the repetitions of a dump that the kernel's tables changed under.
const dumpTries = 20

// list reads a kernel table, again where it changed while it was read.
func list[T any](dump func() ([]T, error)) ([]T, error) {
	for range dumpTries {
		rows, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return rows, err
		}
	}
	return nil, fmt.Errorf("the table changed under each of %d reads: %w", dumpTries, netlink.ErrDumpInterrupted)
}

// Apply makes the plan's VRFs, bridges, gateways, segmenter, lc-host, host and locator routes true and removes those of
// ours that it does not have. It does all it can: what failed is in the error, what changed in the list.
// Containers' ports are made and removed elsewhere (CreatePort, DeletePort), but for half-made ones that a crash left; those of
// the plan are put back into their bridge where they are not.
func (h *Handle) Apply(p *plan.Plan, o Options) ([]Change, error) { return h.apply(p, o, false) }

// Prepare makes what the plan has and removes nothing: what packets still go by stays until Apply.
func (h *Handle) Prepare(p *plan.Plan, o Options) ([]Change, error) { return h.apply(p, o, true) }

func (h *Handle) apply(p *plan.Plan, o Options, keep bool) ([]Change, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.recorder()
	links, err := h.host.links()
	if err != nil {
		return nil, err
	}
	a := &applier{Handle: h, recorder: r, o: o, keep: keep, links: links}
	var errs []error
	if o.VRF && len(p.Networks) > 0 {
		errs = append(errs, h.ensureVRFRules(r))
	}
	for i := range p.Networks {
		errs = append(errs, a.network(&p.Networks[i]))
	}
	if needsSegmenter(p) {
		errs = append(errs, a.segmenter())
	}
	if needsHostPair(p) {
		errs = append(errs, a.hostPair(p))
	}
	errs = append(errs, a.ports(p))
	if !keep {
		errs = append(errs, a.removeStale(p))
	}
	errs = append(errs, a.routes(p))
	return r.changes, errors.Join(errs...)
}
