// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/mdlayher/sdnotify"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/cmd/lace/control"
	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/plugin"
	"github.com/lace-net/lace/topology"
)

// agentFlags puts the settings on the command line, over those of the file.
func agentFlags(fs *flag.FlagSet, s *conf.Settings) *string {
	file := fs.String("config", conf.DefaultFile, "settings `FILE`; flags come before it")
	fs.StringVar(&s.Node, "node", s.Node, "name of this node in the topology (default: the host name)")
	fs.StringVar(&s.Topology, "topology", s.Topology, "topology `FILE`")
	fs.StringVar(&s.Containerd, "containerd", s.Containerd, "`PATH` of containerd's socket")
	fs.StringVar(&s.NRISocket, "nri-socket", s.NRISocket, "`PATH` of containerd's NRI socket")
	fs.StringVar(&s.HookSocket, "hook-socket", s.HookSocket, "`PATH` where lace-runc finds this agent")
	fs.StringVar(&s.BPFFS, "bpffs", s.BPFFS, "`DIRECTORY` on a BPF file system for pins")
	fs.TextVar(&s.LogLevel, "log-level", s.LogLevel, "debug, info, warn or error")
	return file
}

// agentSettings reads flags and file: the file over the defaults, the flags over both.
func agentSettings(name string, args []string) (conf.Settings, error) {
	first := conf.Default()
	flags := newFlags(name)
	file := agentFlags(flags, &first)
	if err := parseFlags(flags, args, 0); err != nil {
		return first, err
	}
	s, err := conf.Load(*file)
	if errors.Is(err, fs.ErrNotExist) && *file == conf.DefaultFile {
		s, err = conf.Default(), nil
	}
	if err != nil {
		return s, err
	}
	flags = newFlags(name)
	agentFlags(flags, &s)
	return s, parseFlags(flags, args, 0)
}

func runAgent(ctx context.Context, e *env, args []string) error {
	hangups := make(chan os.Signal, 1) // from now on they do not end the process
	signal.Notify(hangups, unix.SIGHUP)
	defer signal.Stop(hangups)
	s, err := agentSettings("agent", args)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(e.stderr, &slog.HandlerOptions{Level: s.LogLevel}))
	t, err := topology.Load(s.Topology)
	if err != nil {
		return err
	}
	node, err := nodeName(e, s.Node)
	if err != nil {
		return err
	}
	lock, err := lockAgent(s.HookSocket)
	if err != nil {
		return err
	}
	defer lock.Close()
	d, err := dataplane.Open(ctx, dataplane.Options{Topology: t, Node: node, BPFFS: s.BPFFS, Log: log})
	if err != nil {
		return fmt.Errorf("start the data plane of node %s: %w", node, err)
	}
	defer d.Close()
	f := d.Features()
	log.Info("data plane is up", "node", node, "topology", t.Hash.String(), "vrf", f.VRF, "tcx", f.TCX, "decap_by_flags", f.DecapByFlags)
	a := plugin.New(plugin.Options{Socket: s.HookSocket, Containerd: s.Containerd, NRI: s.NRISocket, NRIIndex: string(s.NRIIndex), Log: log}, seam{d})
	r := &reloader{file: s.Topology, plane: d, log: log}
	server, err := control.Listen(s.ControlSocket(), r.answer, log)
	if err != nil {
		return err
	}
	go func() {
		select {
		case <-a.Ready():
			tell(sdnotify.Ready, log)
			r.follow(ctx, hangups)
		case <-ctx.Done():
		}
	}()
	return runAll(ctx, log, d.Run, a.Run, server.Run)
}

// runAll runs the parts of the agent until ctx ends or one of them does. What the kernel holds stays.
func runAll(ctx context.Context, log *slog.Logger, parts ...func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, len(parts))
	for _, run := range parts {
		go func() { done <- run(ctx) }()
	}
	errs := []error{unlessCancelled(<-done)}
	tell(sdnotify.Stopping, log)
	cancel()
	for range len(parts) - 1 {
		errs = append(errs, unlessCancelled(<-done))
	}
	return errors.Join(errs...)
}

// unlessCancelled drops what only says that the agent was told to stop.
func unlessCancelled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// tell informs systemd, where it is the parent.
func tell(state string, log *slog.Logger) {
	n, err := sdnotify.New()
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err == nil {
		err = n.Notify(state)
		n.Close()
	}
	if err != nil {
		log.Warn("systemd cannot be told", "state", state, "err", err)
	}
}

// lockAgent makes sure that one agent runs: two would undo each other's work. The lock is of the kind that
// agentRuns can look at without taking it, and goes with the process, however that ends.
func lockAgent(socket string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return nil, fmt.Errorf("make the socket's directory: %w", err)
	}
	path := socket + ".lock"
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the agent's lock: %w", err)
	}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return nil, fmt.Errorf("an agent runs already, it holds %s: stop it first (systemctl stop lace)", path)
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}

// agentRuns tells by the lock, without a word to the agent and without being in the way of one that starts.
func agentRuns(socket string) bool {
	f, err := os.Open(socket + ".lock")
	if err != nil {
		return false
	}
	defer f.Close()
	held := unix.Flock_t{Type: unix.F_WRLCK}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &held)
	return err == nil && held.Type != unix.F_UNLCK
}
