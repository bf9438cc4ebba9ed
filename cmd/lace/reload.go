// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/mdlayher/sdnotify"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/cmd/lace/control"
	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// plane is what the control socket needs of the data plane.
type plane interface {
	Apply(context.Context, *topology.Topology) (dataplane.Applied, error)
	Plan() *plan.Plan
	devices
}

// devices are what of it concerns devices of the host.
type devices interface {
	AttachDevice(context.Context, dataplane.DeviceRequest) (dataplane.Port, error)
	DetachDevice(ctx context.Context, device string) error
}

// applyDeadline bounds a reload; a topology of a hundred nodes takes less than a second.
const applyDeadline = time.Minute

// reloader has the agent read its topology file again, for a signal or for a command. A file that is wrong changes nothing.
type reloader struct {
	file  string
	plane plane
	log   *slog.Logger
	mu    sync.Mutex
}

// answer is what the agent's control socket says.
func (r *reloader) answer(ctx context.Context, q control.Request) control.Answer {
	switch q.Do {
	case control.Plan:
		return control.Answer{File: r.file, Plan: r.plane.Plan()}
	case control.Attach:
		return attachDevice(ctx, r.plane, *q.Device)
	case control.Detach:
		return detachDevice(ctx, r.plane, q.Device.Device)
	}
	applied, err := r.reload(ctx, q.Topology)
	if err != nil {
		return control.Refuse(err)
	}
	return control.Answer{File: r.file, Generation: applied.Generation, Changed: applied.Changed, Took: applied.Took}
}

// reload makes the file's topology the one that holds. hash is the one that the caller has in mind; empty: any.
func (r *reloader) reload(ctx context.Context, hash string) (dataplane.Applied, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, applyDeadline)
	defer cancel()
	applied, err := r.apply(ctx, hash)
	if err != nil {
		r.log.Error("the topology is not applied, the one before goes on", "file", r.file, "err", err)
	}
	return applied, err // the data plane tells of what it has done
}

func (r *reloader) apply(ctx context.Context, hash string) (applied dataplane.Applied, err error) {
	t, err := topology.Load(r.file)
	if err != nil {
		return applied, err
	}
	if got := t.Hash.String(); hash != "" && hash != got {
		return applied, fmt.Errorf("%s has the topology %s now, not %s: somebody changed it meanwhile; look at it and apply again", r.file, got, hash)
	}
	return r.plane.Apply(ctx, t)
}

// follow reloads at every signal until ctx ends, and tells systemd meanwhile.
func (r *reloader) follow(ctx context.Context, signals <-chan os.Signal) {
	for {
		select {
		case <-signals:
			tell(reloading(), r.log)
			_, _ = r.reload(ctx, "") // it is in the log: nobody else asked
			tell(sdnotify.Ready, r.log)
		case <-ctx.Done():
			return
		}
	}
}

// reloading is what systemd wants to be told first, with the time since 253.
func reloading() string {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return sdnotify.Reloading
	}
	return fmt.Sprintf("%s\nMONOTONIC_USEC=%d", sdnotify.Reloading, now.Nano()/1000)
}
