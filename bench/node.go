// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// nodeBPFFS is where a node pins, in a mount namespace of its own.
const nodeBPFFS = "/sys/fs/bpf/lace"

// isolate is a role of this binary: it moves into a node's network namespace and a mount namespace of its
// own, and becomes the node there. It begins anew, as the threads of the runtime cannot be moved.
func isolate(args []string) error {
	if len(args) == 0 {
		return usagef("isolate wants the name of a network namespace")
	}
	runtime.LockOSThread()
	if err := enter(args[0]); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := mountOwn(); err != nil {
		return err
	}
	argv := append([]string{os.Args[0], "node"}, args[1:]...)
	return fmt.Errorf("start the node: %w", unix.Exec("/proc/self/exe", argv, os.Environ()))
}

// mountOwn gives the node the sysfs of its network namespace and a bpffs. Mounts of the host still come
// in, so that namespaces made later are seen; none goes out.
func mountOwn() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts from the host: %w", err)
	}
	for _, m := range []struct{ kind, at string }{{"sysfs", "/sys"}, {"bpf", "/sys/fs/bpf"}} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.kind, m.at, err)
		}
	}
	return nil
}

// order is what a node is told to do, one JSON object a line; report is its answer.
type order struct {
	Do        string // "attach", "detach", "programs", "agent", "fill", "look", "collect", "apply", "ready", "fdb", "flood" or "open"
	Container string
	Network   string         // attach
	Netns     string         // attach
	IfName    string         // attach: in the container; empty: eth0
	Gateway   bool           // attach: the container's default route leads there
	Publish   []plan.Publish // attach: ports of the node
	Trials    string         // programs: of trialsOf
	Far, Far6 string         // programs: addresses that the bed's client asks
	Runs      int            // programs, look, fdb, flood: in this round
	Lace      string         // agent: the binary
	Settings  string         // agent: its file
	Settle    time.Duration  // agent: until it counts as at rest
	Entries   int            // fill: entries that the table of flows is to have
	Topology  string         // apply: a file
	Length    time.Duration  // open
}

type report struct {
	Error    string             `json:",omitempty"`
	V4, V6   string             `json:",omitempty"`
	Took     time.Duration      `json:",omitempty"` // attach, collect, apply
	Changed  bool               `json:",omitempty"` // apply
	Programs map[string]float64 `json:",omitempty"` // ns a run
	RSS      int                `json:",omitempty"` // agent: kB
	Ready    bool               `json:",omitempty"` // ready
	Opened   int                `json:",omitempty"` // open
	Refused  int                `json:",omitempty"` // open
	Reasons  map[string]uint64  `json:",omitempty"` // open, where something was refused: packets, by reason
}

// node is the role that runs a node's data plane as the agent does, and takes orders.
type node struct {
	d    *dataplane.Dataplane
	topo *topology.Topology
	name string
	stop func() error // idempotent

	crowd  *flowCrowd // of fill
	opener *opener    // of open
}

func runNode(args []string) error {
	fs := flag.NewFlagSet("node", flag.ContinueOnError)
	name := fs.String("name", "", "in the topology")
	file := fs.String("topology", "", "file")
	if err := fs.Parse(args); err != nil {
		return asUsage(err)
	}
	n, err := openNode(*name, *file)
	if err != nil {
		return err
	}
	return errors.Join(n.serve(os.Stdin, os.Stdout), n.stop())
}

func openNode(name, file string) (*node, error) {
	t, err := topology.Load(file)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	d, err := dataplane.Open(ctx, dataplane.Options{Topology: t, Node: name, BPFFS: nodeBPFFS, Log: log})
	if err != nil {
		cancel()
		return nil, fmt.Errorf("open the data plane of node %s: %w", name, err)
	}
	ran := make(chan error, 1)
	go func() { ran <- d.Run(ctx) }()
	stopped := false
	stop := func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		if err := <-ran; err != nil && !errors.Is(err, context.Canceled) {
			return errors.Join(err, d.Close())
		}
		return d.Close()
	}
	return &node{d: d, topo: t, name: name, stop: stop}, nil
}

// serve answers orders until there are no more.
func (n *node) serve(in io.Reader, out io.Writer) error {
	orders, reports := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var o order
		err := orders.Decode(&o)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read an order: %w", err)
		}
		r, err := n.obey(o)
		if err != nil {
			r.Error = err.Error()
		}
		if err := reports.Encode(r); err != nil {
			return fmt.Errorf("answer an order: %w", err)
		}
	}
}

func (n *node) obey(o order) (report, error) {
	ctx, cancel := context.WithTimeout(context.Background(), orderPatience)
	defer cancel()
	switch o.Do {
	case "attach":
		return n.attach(ctx, o)
	case "detach":
		return report{}, n.d.Release(ctx, o.Container)
	case "programs":
		return n.programs(o)
	case "agent":
		return n.agent(ctx, o)
	case "fill":
		return report{}, n.fill(o)
	case "look":
		return n.look(o)
	case "collect":
		return n.collect()
	case "apply":
		return n.apply(ctx, o)
	case "ready":
		return n.ready()
	case "fdb":
		return n.fdb(o)
	case "flood":
		return n.flood(o)
	case "open":
		return n.open(o)
	}
	return report{}, fmt.Errorf("unknown order %q", o.Do)
}

func (n *node) attach(ctx context.Context, o order) (report, error) {
	began := time.Now()
	ports, err := n.d.Attach(ctx, dataplane.Request{Container: o.Container, Netns: o.Netns,
		Interfaces: []dataplane.Interface{{Network: o.Network, IfName: o.IfName, Gateway: o.Gateway, Publish: o.Publish}}})
	took := time.Since(began)
	if err != nil {
		return report{}, err
	}
	return report{V4: ports[0].V4.String(), V6: ports[0].V6.String(), Took: took}, nil
}

// port is the one interface of a container.
func (n *node) port(container string) (dataplane.Port, error) {
	ports, ok := n.d.Attached(container)
	if !ok {
		return dataplane.Port{}, fmt.Errorf("container %s is not attached", container)
	}
	return ports[0], nil
}
