// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/cmd/lace/control"
	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// lookDeadline bounds the question what the agent holds, applyDeadline and a little more the wait for a reload.
const (
	lookDeadline = 30 * time.Second
	waitDeadline = applyDeadline + 10*time.Second
)

// candidate is a topology that is to become the one of this node.
type candidate struct {
	file string
	data []byte
	topo *topology.Topology
}

func readCandidate(file string) (c candidate, err error) {
	data, err := topology.ReadFile(file)
	if err != nil {
		return c, fmt.Errorf("read the topology: %w", err)
	}
	t, err := topology.Parse(file, data)
	return candidate{file, data, t}, err
}

func runApply(ctx context.Context, e *env, args []string) error {
	flags := newFlags("apply")
	file := flags.String("config", conf.DefaultFile, "settings `FILE`")
	dry := flags.Bool("dry-run", false, "print what would change, and change nothing")
	if err := parseFlags(flags, args, 1); err != nil {
		return err
	}
	s, err := agentSettings("apply", []string{"--config", *file})
	if err != nil {
		return err
	}
	a := &application{env: e, socket: s.ControlSocket(), dry: *dry}
	if flags.NArg() == 1 {
		if a.next, err = readCandidate(flags.Arg(0)); err != nil {
			return err // before anybody is asked: it is wrong whatever holds
		}
	}
	if a.dry {
		return a.look(ctx, s.Topology)
	}
	lock, err := lockApply(a.socket)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := a.compare(ctx); err != nil {
		return err
	}
	return a.do(ctx)
}

// application is one run of `lace apply`.
type application struct {
	*env
	socket string
	dry    bool
	next   candidate       // without a topology: the file of the agent
	now    *control.Answer // what the agent holds
}

// look only compares. Without an agent it says that there is none, and whether the file is right; usual is where it is then.
func (a *application) look(ctx context.Context, usual string) error {
	err := a.compare(ctx)
	if !errors.Is(err, control.ErrNoAgent) {
		return err
	}
	if a.next.topo == nil {
		if a.next, err = readCandidate(usual); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(a.stdout, "%s: ok, topology %s; no agent runs, so there is nothing to compare it with: `lace plan` shows what a node will hold\n",
		a.next.file, a.next.topo.Hash)
	return err
}

// compare asks the agent what holds, and prints the difference.
func (a *application) compare(ctx context.Context) (err error) {
	if a.now, err = askAgent(ctx, a.socket, control.Request{Do: control.Plan}, lookDeadline); err != nil {
		return err
	}
	if a.next.topo == nil {
		if a.next, err = readCandidate(a.now.File); err != nil {
			return err
		}
	}
	changes, err := a.changes()
	if err != nil {
		return err
	}
	return a.print(changes)
}

// changes are those of this node's plan. The containers are those that run now; one whose network goes keeps
// its interface, and has no part in the new plan.
func (a *application) changes() ([]plan.Change, error) {
	var stay []plan.Attachment
	for _, p := range a.now.Plan.Ports {
		if stays(a.next.topo, p.Attachment) {
			stay = append(stay, p.Attachment)
		}
	}
	next, err := plan.Build(a.next.topo, a.now.Plan.Node, stay)
	if err != nil {
		return nil, fmt.Errorf("plan node %s of %s: %w", a.now.Plan.Node, a.next.file, err)
	}
	return plan.Diff(a.now.Plan, next), nil
}

// stays says whether the network of a container is in a topology.
func stays(t *topology.Topology, a plan.Attachment) bool {
	n, ok := t.Network(a.Network)
	return ok && n.ID == a.NetworkID
}

func (a *application) print(changes []plan.Change) error {
	for _, c := range changes {
		if _, err := fmt.Fprintln(a.stdout, c); err != nil {
			return err
		}
	}
	if len(changes) > 0 || !a.dry {
		return nil
	}
	_, err := fmt.Fprintln(a.stdout, "nothing would change")
	return err
}

// do puts the file in its place and has the agent read it. Where that fails, the old file comes back.
func (a *application) do(ctx context.Context) error {
	restore, err := install(a.next, a.now.File)
	if err != nil {
		return err
	}
	done, err := askAgent(ctx, a.socket, control.Request{Do: control.Apply, Topology: a.next.topo.Hash.String()}, waitDeadline)
	if err != nil {
		if failed := restore(); failed != nil {
			return errors.Join(err, fmt.Errorf("put the old topology back: %w", failed))
		}
		return err
	}
	if !done.Changed {
		_, err = fmt.Fprintln(a.stdout, "nothing changes")
		return err
	}
	_, err = fmt.Fprintf(a.stdout, "generation %d is active, took %v\n", done.Generation, done.Took.Round(time.Millisecond))
	return err
}

// install makes the candidate the content of the file at path, which is the old or the new one at every moment, and
// keeps its mode and owner. restore brings the old content back.
func install(c candidate, path string) (restore func() error, err error) {
	nothing := func() error { return nil }
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real // a link stays one
	}
	old, err := topology.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return func() error { return os.Remove(path) }, replace(path, c.data)
	case err != nil:
		return nothing, fmt.Errorf("read the topology that holds: %w", err)
	case bytes.Equal(old, c.data):
		return nothing, nil
	}
	return func() error { return replace(path, old) }, replace(path, c.data)
}

// replace writes beside the file and renames, so that whoever reads meets one or the other, also after a loss of power.
func replace(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("install the topology at %s: %w", path, err)
	}
	defer os.Remove(f.Name()) // does nothing once it is renamed
	_, err = f.Write(data)
	err = errors.Join(err, likeOld(f, path), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("install the topology at %s: %w", path, err)
	}
	return nil
}

// likeOld gives the new file the mode and the owner of the one that it replaces.
func likeOld(f *os.File, path string) error {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return f.Chmod(0o644)
	}
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		err = f.Chown(int(sys.Uid), int(sys.Gid))
	}
	return errors.Join(err, f.Chmod(st.Mode().Perm()))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lockApply keeps two applications apart: each may put an old file back.
func lockApply(socket string) (*os.File, error) {
	path := socket + ".lock"
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no directory %s: %w", filepath.Dir(path), control.ErrNoAgent)
	}
	if err != nil {
		return nil, fmt.Errorf("open the lock of lace apply: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another lace apply holds %s: wait for its end", path)
	}
	return f, nil
}
