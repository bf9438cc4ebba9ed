// SPDX-License-Identifier: Apache-2.0

// Package dataplane is what the kernel should hold, and holds: it makes a Plan true by netlink and
// eBPF maps, and attaches and detaches containers. What it made goes on without it.
package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Options say which node this is and where its state lives.
type Options struct {
	Topology *topology.Topology
	Node     string
	BPFFS    string // directory for pins on a bpffs, "/sys/fs/bpf/lace"
	Log      *slog.Logger
}

// Dataplane is one node's data plane in the network namespace where it was opened. Its methods are
// safe for concurrent use; those that change something run one after the other.
type Dataplane struct {
	bpffs string
	log   *slog.Logger
	dev   *netdev.Handle
	hooks *hook.Hooks
	vrf   bool
	vouch atomic.Bool // the nexthops are as they were last read

	collector collector

	mu sync.Mutex
	wiring
	uplinkState
	plan     *plan.Plan
	kept     *maps.Reservations
	host     hostState
	attached map[int]bool // interfaces that have programs and are no ports
}

// uplinkState is what the uplinks are now, and leave for containers.
type uplinkState struct {
	uplinks   []netdev.Uplink
	uplinkMTU int   // the smallest of theirs
	problem   error // what is not as the topology says; it waits until it is
}

// Open loads the programs, finds what an earlier agent left and makes the plan true. An error of one
// network or uplink is logged and tried again by Run; only what nothing works without fails.
func Open(ctx context.Context, o Options) (*Dataplane, error) {
	if _, err := plan.Build(o.Topology, o.Node, nil); err != nil {
		return nil, err
	}
	dev, err := netdev.Open(o.Log)
	if err != nil {
		return nil, err
	}
	d := &Dataplane{bpffs: o.BPFFS, log: o.Log, dev: dev, wiring: wiring{topo: o.Topology, node: o.Node}, attached: map[int]bool{},
		collector: collector{gone: map[whose]struct{}{}, wake: make(chan struct{}, 1)}}
	if err := d.open(ctx); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Dataplane) open(ctx context.Context) (err error) {
	if d.vrf, err = d.dev.ProbeVRF(); err != nil {
		return err
	}
	if d.hooks, err = hook.Load(d.bpffs, d.dev, d.log); err != nil {
		return err
	}
	if d.kept, err = maps.OpenReservations(hook.PinDir(d.bpffs)); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.wiring, err = d.rewire(d.topo); err != nil {
		return err
	}
	if err := d.sync(); err != nil {
		d.log.Error("the kernel does not hold the whole plan yet", "err", err)
	}
	return ctx.Err()
}

// sync makes plan, links, tables and programs agree. It does all it can and returns what failed.
func (d *Dataplane) sync() error {
	errs := []error{d.forgetGone()}
	p, err := d.build()
	if err != nil {
		return err
	}
	first := d.plan == nil
	d.plan = p
	errs = append(errs, d.findUplinks())
	if first { // an agent with another topology may have gone before: its links stay until the tables are ours
		_, err := d.dev.Prepare(p, d.links())
		errs = append(errs, err)
	}
	_, err = d.resizeFlows(p.Conntrack.Max)
	errs = append(errs, err, d.syncMaps())
	changes, err := d.dev.Apply(p, d.links())
	for _, c := range changes {
		d.log.Debug("applied", "object", c.Object, "change", c.What)
	}
	errs = append(errs, err, d.attachAll())
	return errors.Join(errs...)
}

func (d *Dataplane) links() netdev.Options { return netdev.Options{VRF: d.vrf, MTU: d.uplinkMTU} }

const (
	defaultMTU = 1500  // while no uplink is there
	maxMTU     = 65535 // of an interface that containers have
)

// findUplinks takes over what the uplinks are now.
func (d *Dataplane) findUplinks() error {
	now, err := d.readUplinks(d.plan)
	if err != nil {
		return err
	}
	d.uplinkState = now
	return now.problem
}

// readUplinks reads the uplinks and the smallest MTU of them. While none is there, that stays.
func (d *Dataplane) readUplinks(p *plan.Plan) (now uplinkState, err error) {
	uplinks, err := d.dev.Uplinks(p)
	if err != nil {
		return uplinkState{}, err
	}
	var missing []string
	mtu := 0
	for _, u := range uplinks {
		if u.Missing {
			missing = append(missing, u.Name)
			continue
		}
		now.uplinks = append(now.uplinks, u)
		if mtu == 0 || u.MTU < mtu {
			mtu = u.MTU
		}
	}
	switch {
	case mtu > 0:
		now.uplinkMTU = min(mtu, maxMTU)
	case d.uplinkMTU > 0:
		now.uplinkMTU = d.uplinkMTU
	default:
		now.uplinkMTU = defaultMTU
	}
	switch {
	case len(missing) > 0:
		now.problem = fmt.Errorf("uplink %s of node %s is not there; traffic over it waits until it comes back", strings.Join(missing, ", "), d.node)
	case len(now.uplinks) == 0:
		now.problem = fmt.Errorf("node %s has no uplink: no interface has a default route or the address %s; name it with uplinks in the topology", d.node, p.Underlay)
	}
	return now, nil
}

func (d *Dataplane) syncMaps() error {
	d.vouch.Store(false)
	hops, err := d.nexthops(d.plan)
	if err != nil {
		return err
	}
	devices, err := d.devices(d.wiring, d.uplinkMTU)
	if err != nil {
		return err
	}
	done, err := d.hooks.Maps().Sync(d.plan, d.vrf, devices, hops)
	d.log.Debug("tables written", "put", done.Put, "deleted", done.Deleted, "generation", done.Generation, "switched", done.Switched)
	if err != nil {
		return err
	}
	d.vouch.Store(true)
	return d.beat()
}

// devices are the interfaces of what is wired, by their name, and the one that cuts GSO frames.
func (d *Dataplane) devices(w wiring, uplinkMTU int) (map[string]maps.Device, error) {
	near, _, err := d.dev.Segmenter()
	if err != nil {
		return nil, err
	}
	devices := map[string]maps.Device{maps.Segmenter: {Index: uint32(near)}}
	for _, c := range w.ports {
		devices[c.HostIf] = c.device(uplinkMTU)
	}
	return devices, nil
}

// nexthops resolves the ways to the peers of a plan.
func (d *Dataplane) nexthops(p *plan.Plan) ([]maps.Nexthop, error) {
	hops, err := d.dev.Nexthops(p)
	if err != nil {
		return nil, err
	}
	rows := make([]maps.Nexthop, 0, len(hops))
	for _, h := range hops {
		if h.Ifindex == 0 {
			d.log.Debug("no way to a peer", "peer", h.Peer, "why", h.Problem)
		}
		rows = append(rows, maps.Nexthop{Peer: h.Peer, Ifindex: uint32(h.Ifindex), MTU: uint16(min(h.MTU, 65535)),
			Raw: h.Raw, Known: h.Known && !h.Raw, Dst: h.DstMAC, Src: h.SrcMAC})
	}
	return rows, nil
}

// beat vouches for the nexthops, unless the last attempt to write them failed.
func (d *Dataplane) beat() error {
	if !d.vouch.Load() {
		return nil
	}
	return d.hooks.Maps().Beat()
}

const (
	beatEvery = 10 * time.Second // the programs trust the tables' MAC addresses for 120 s
	syncEvery = time.Minute      // what no notice tells of is mended after so long
)

// Run keeps the kernel at the plan until ctx ends: it follows uplinks, routes and neighbours, vouches
// for the nexthops, and collects idle flows.
func (d *Dataplane) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	changed := make(chan struct{}, 1)
	watched := make(chan error, 1)
	go func() {
		watched <- d.dev.Watch(ctx, func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		})
	}()
	var collecting sync.WaitGroup
	defer collecting.Wait()
	defer cancel()
	collecting.Go(func() { d.collectFlows(ctx) })
	beat, again := time.NewTicker(beatEvery), time.NewTicker(syncEvery)
	defer beat.Stop()
	defer again.Stop()
	for {
		select {
		case err := <-watched:
			return err
		case <-beat.C:
			d.report(d.beat())
		case <-changed:
			d.report(d.resync())
		case <-again.C:
			d.report(d.resync())
		}
	}
}

func (d *Dataplane) report(err error) {
	if err != nil {
		d.log.Error("the kernel does not hold the whole plan", "err", err)
	}
}

func (d *Dataplane) resync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sync()
}

// Plan is what the node should hold now, with the containers of this moment.
func (d *Dataplane) Plan() *plan.Plan {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, err := d.build()
	if err != nil {
		return d.plan // the last one that could be made
	}
	return p
}

// Features says how this kernel is used.
type Features struct {
	VRF          bool // gateways live on bridges in VRFs; otherwise the programs answer for them
	TCX          bool // programs are attached by TCX links; otherwise by clsact filters
	DecapByFlags bool // inner IPv4 is taken out by adjust_room; otherwise by change_proto
}

// Features of this kernel, as found at Open.
func (d *Dataplane) Features() Features {
	return Features{VRF: d.vrf, TCX: d.hooks.TCX(), DecapByFlags: d.hooks.DecapByFlags()}
}

// Hooks gives tests and benchmarks the loaded programs.
func (d *Dataplane) Hooks() *hook.Hooks { return d.hooks }

// Close gives sockets and descriptors back. What the kernel holds stays and goes on.
func (d *Dataplane) Close() error {
	if d.hooks != nil {
		d.hooks.Close()
	}
	if d.kept != nil {
		d.kept.Close()
	}
	d.dev.Close()
	return nil
}

// Remove takes every object of Lace off this network namespace and bpffs, as `lace uninstall` does.
func Remove(bpffs string, log *slog.Logger) error {
	dev, err := netdev.Open(log)
	if err != nil {
		return err
	}
	defer dev.Close()
	return errors.Join(dev.RemoveFilters(), dev.Remove(), hook.Remove(bpffs))
}

// CountPorts says how many interfaces of containers and devices are attached in this network namespace.
func CountPorts(log *slog.Logger) (int, error) {
	dev, err := netdev.Open(log)
	if err != nil {
		return 0, err
	}
	defer dev.Close()
	ports, err := dev.Ports()
	return len(ports), err
}

// Probe says how this kernel would be used. It loads the programs aside, below a directory of its own
// under dir, which must lie on a bpffs, and leaves nothing.
func Probe(dir string, log *slog.Logger) (f Features, err error) {
	dev, err := netdev.Open(log)
	if err != nil {
		return f, err
	}
	defer dev.Close()
	if f.VRF, err = dev.ProbeVRF(); err != nil {
		return f, err
	}
	aside := filepath.Join(dir, fmt.Sprintf("lace_probe_%d", os.Getpid()))
	hooks, err := hook.Load(aside, dev, log)
	if err != nil {
		return f, errors.Join(err, hook.Remove(aside))
	}
	f.TCX, f.DecapByFlags = hooks.TCX(), hooks.DecapByFlags()
	return f, errors.Join(hooks.Close(), hook.Remove(aside))
}
