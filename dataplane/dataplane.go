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
	"slices"
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
	topo  *topology.Topology
	node  string
	bpffs string
	log   *slog.Logger
	dev   *netdev.Handle
	hooks *hook.Hooks
	vrf   bool
	vouch atomic.Bool // the nexthops are as they were last read

	mu         sync.Mutex
	plan       *plan.Plan
	podMTU     int
	uplinks    []netdev.Uplink
	pools      map[topology.NetworkID]*pool
	containers map[string]*container
	kept       *maps.Reservations
}

// container is a container that is wired.
type container struct {
	plan.Port
	ifindex int
	lease   *lease
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
	d := &Dataplane{topo: o.Topology, node: o.Node, bpffs: o.BPFFS, log: o.Log, dev: dev,
		pools: map[topology.NetworkID]*pool{}, containers: map[string]*container{}}
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
	for _, n := range d.topo.Networks {
		d.pools[n.ID] = newPool(n.Name, d.node, n.Block(d.node))
	}
	if err := d.adopt(); err != nil {
		return err
	}
	if err := d.keepReservations(); err != nil {
		return err
	}
	if err := d.sync(); err != nil {
		d.log.Error("the kernel does not hold the whole plan yet", "err", err)
	}
	return ctx.Err()
}

// adopt takes over the containers that an earlier agent wired: their veths say who they are.
func (d *Dataplane) adopt() error {
	ports, err := d.dev.Ports()
	if err != nil {
		return err
	}
	for _, p := range ports {
		if err := d.adoptPort(p); err != nil {
			d.log.Warn("a container's network is not as the topology says; it gets no traffic until it is started again",
				"container", p.Attachment.Container, "network", p.Attachment.Network, "err", err)
		}
	}
	return nil
}

func (d *Dataplane) adoptPort(p netdev.Port) error {
	a := p.Attachment
	n, ok := d.topo.Network(a.Network)
	if !ok || n.ID != a.NetworkID {
		return fmt.Errorf("network %s with id %d is not in the topology", a.Network, a.NetworkID)
	}
	if other := d.containers[a.Container]; other != nil {
		return fmt.Errorf("it has %s already", other.HostIf)
	}
	l, _, err := d.lease(n, Request{Container: a.Container, Name: a.Name, IPs: addrs(a.V4, a.V6), Sticky: a.Sticky})
	if err != nil {
		return err
	}
	l.running = true
	d.containers[a.Container] = &container{Port: plan.Port{Attachment: a, HostIf: p.HostIf}, ifindex: p.Index, lease: l}
	return nil
}

// attachments are those of all wired containers.
func (d *Dataplane) attachments() []plan.Attachment {
	out := make([]plan.Attachment, 0, len(d.containers))
	for _, c := range d.containers {
		out = append(out, c.Attachment)
	}
	return out
}

// sync makes plan, links, tables and programs agree. It does all it can and returns what failed.
func (d *Dataplane) sync() error {
	errs := []error{d.forgetGone()}
	p, err := plan.Build(d.topo, d.node, d.attachments())
	if err != nil {
		return err
	}
	d.plan = p
	for _, port := range p.Ports {
		d.containers[port.Container].Port = port
	}
	errs = append(errs, d.findUplinks())
	changes, err := d.dev.Apply(p, netdev.Options{VRF: d.vrf, MTU: d.podMTU})
	for _, c := range changes {
		d.log.Debug("applied", "object", c.Object, "change", c.What)
	}
	errs = append(errs, err, d.syncMaps(), d.attachAll())
	return errors.Join(errs...)
}

// defaultMTU stands in while no uplink is there.
const defaultMTU = 1500

// findUplinks reads the uplinks and what their MTU leaves for containers. While none is there, that stays.
func (d *Dataplane) findUplinks() error {
	uplinks, err := d.dev.Uplinks(d.plan)
	if err != nil {
		return err
	}
	var missing []string
	var present []netdev.Uplink
	mtu := 0
	for _, u := range uplinks {
		if u.Missing {
			missing = append(missing, u.Name)
			continue
		}
		present = append(present, u)
		if mtu == 0 || u.MTU < mtu {
			mtu = u.MTU
		}
	}
	if mtu == 0 && d.podMTU == 0 {
		mtu = defaultMTU
	}
	if mtu > 0 {
		d.podMTU = min(mtu, 65535) - d.plan.Encapsulation.Overhead()
	}
	left := d.leaveUplinks(present)
	d.uplinks = present
	switch {
	case left != nil:
		return left
	case len(missing) > 0:
		return fmt.Errorf("uplink %s of node %s is not there; traffic over it waits until it comes back", strings.Join(missing, ", "), d.node)
	case len(present) == 0:
		return fmt.Errorf("node %s has no uplink: no interface has a default route or the address %s; name it with uplinks in the topology", d.node, d.plan.Underlay)
	}
	return nil
}

// leaveUplinks takes the programs off what is an uplink no longer.
func (d *Dataplane) leaveUplinks(now []netdev.Uplink) error {
	var errs []error
	for _, u := range d.uplinks {
		if slices.ContainsFunc(now, func(n netdev.Uplink) bool { return n.Index == u.Index }) {
			continue
		}
		errs = append(errs, d.hooks.Detach(u.Index))
	}
	return errors.Join(errs...)
}

func (d *Dataplane) syncMaps() error {
	m := d.hooks.Maps()
	devices := map[string]maps.Device{}
	for _, c := range d.containers {
		devices[c.HostIf] = d.device(c.ifindex)
	}
	if err := m.WriteConfig(d.plan, d.vrf); err != nil {
		return err
	}
	changes, err := m.Sync(d.plan, devices)
	d.log.Debug("tables written", "put", changes.Put, "deleted", changes.Deleted)
	return errors.Join(err, d.syncNexthops())
}

func (d *Dataplane) device(ifindex int) maps.Device {
	return maps.Device{Index: uint32(ifindex), MTU: uint16(d.podMTU)}
}

func (d *Dataplane) syncNexthops() error {
	d.vouch.Store(false)
	hops, err := d.dev.Nexthops(d.plan)
	if err != nil {
		return err
	}
	rows := make([]maps.Nexthop, 0, len(hops))
	for _, h := range hops {
		if h.Ifindex == 0 {
			d.log.Debug("no way to a peer", "peer", h.Peer, "why", h.Problem)
		}
		rows = append(rows, maps.Nexthop{Peer: h.Peer, Ifindex: uint32(h.Ifindex), MTU: uint16(min(h.MTU, 65535)),
			Raw: h.Raw, Known: h.Known && !h.Raw, Dst: h.DstMAC, Src: h.SrcMAC})
	}
	if err := d.hooks.Maps().SyncNexthops(rows); err != nil {
		return err
	}
	d.vouch.Store(true)
	return d.beat()
}

// beat vouches for the nexthops, unless the last attempt to write them failed.
func (d *Dataplane) beat() error {
	if !d.vouch.Load() {
		return nil
	}
	return d.hooks.Maps().Beat()
}

// attachAll puts the programs of this agent in place of older ones, everywhere. Where one fails the others are
// committed all the same: Commit keeps the older tail calls of an interface that could not get the new program.
func (d *Dataplane) attachAll() error {
	keep := map[int]bool{}
	var errs []error
	for _, c := range d.containers {
		keep[c.ifindex] = true
		errs = append(errs, d.hooks.Attach(c.ifindex, hook.PodL3))
	}
	for _, u := range d.uplinks {
		keep[u.Index] = true
		program := hook.Uplink
		if u.Raw {
			program = hook.UplinkRaw
		}
		if err := d.hooks.Attach(u.Index, program); err != nil {
			errs = append(errs, fmt.Errorf("uplink %s: %w", u.Name, err))
		}
	}
	return errors.Join(append(errs, d.hooks.Commit(keep))...)
}

const (
	beatEvery = 10 * time.Second // the programs trust the tables' MAC addresses for 120 s
	syncEvery = time.Minute      // what no notice tells of is mended after so long
)

// Run keeps the kernel at the plan until ctx ends: it follows uplinks, routes and neighbours, and vouches
// for the nexthops.
func (d *Dataplane) Run(ctx context.Context) error {
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

// Plan is what the node should hold now.
func (d *Dataplane) Plan() *plan.Plan {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.plan
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

func (d *Dataplane) network(name string) (*topology.Network, error) {
	n, ok := d.topo.Network(name)
	if ok {
		return n, nil
	}
	var names []string
	for _, n := range d.topo.Networks {
		names = append(names, n.Name)
	}
	slices.Sort(names)
	return nil, fmt.Errorf("network %q is not in the topology; there are: %s", name, strings.Join(names, ", "))
}

// CountPorts says how many containers are attached in this network namespace.
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
