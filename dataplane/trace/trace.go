// SPDX-License-Identifier: Apache-2.0

// Package trace reads what the programs tell about new flows and refused packets: one event each, at a bounded
// rate, through a pinned ring buffer. It needs no agent.
package trace

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// Reader is the one reader of a data plane's events.
type Reader struct {
	ring   *ringbuf.Reader
	events *ebpf.Map
	lock   *os.File
	origin time.Time // the wall clock when the monotonic clock was zero
	start  time.Time // of Open
}

// Open opens the ring buffer that is pinned in dir. A ring has one reader: lock is the path of the file
// that says so. Events from before Open are left out. Where no agent has pinned events since the host
// started, the error is fs.ErrNotExist and says so.
func Open(dir, lock string) (*Reader, error) {
	r := &Reader{}
	if err := r.open(dir, lock); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Reader) open(dir, lock string) (err error) {
	if r.events, err = openEvents(filepath.Join(dir, "events")); err != nil {
		return err
	}
	if r.lock, err = takeLock(lock); err != nil {
		return err
	}
	if r.origin, r.start, err = clocks(); err != nil {
		return err
	}
	if r.ring, err = ringbuf.NewReader(r.events); err != nil {
		return fmt.Errorf("read the events of %s: %w", dir, err)
	}
	return nil
}

func openEvents(path string) (*ebpf.Map, error) {
	events, err := ebpf.LoadPinnedMap(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open the events %s: no agent of this version has run since this host started, so nothing is there to tell: start it (systemctl start lace): %w", path, fs.ErrNotExist)
	}
	if err != nil {
		return nil, fmt.Errorf("open the events %s: %w", path, err)
	}
	return events, nil
}

// takeLock makes the lock's directory too: systemd removes the agent's when that stops.
func takeLock(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of the trace's lock: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the trace: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("another lace trace holds %s: events have one reader", path)
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}

// clocks are the wall clock when the monotonic clock, by which events are timed, was zero, and now. However long it takes from one
// reading to the other, what was timed before now is before it by this origin.
func clocks() (origin, now time.Time, err error) {
	var mono unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
		return origin, now, fmt.Errorf("read the clock: %w", err)
	}
	now = time.Now()
	return now.Add(-time.Duration(mono.Nano())), now, nil
}

// Each calls f for every event until ctx ends or f fails.
func (r *Reader) Each(ctx context.Context, f func(Event) error) error {
	stop := context.AfterFunc(ctx, func() { r.ring.Close() })
	defer stop()
	for {
		record, err := r.ring.Read()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read an event: %w", err)
		}
		e, err := Decode(record.RawSample, r.origin)
		if err != nil {
			return err
		}
		if e.Time.Before(r.start) {
			continue
		}
		if err := f(e); err != nil {
			return err
		}
	}
}

// Close gives ring, map and lock back.
func (r *Reader) Close() error {
	var errs []error
	if r.ring != nil {
		errs = append(errs, r.ring.Close())
	}
	if r.events != nil {
		errs = append(errs, r.events.Close())
	}
	if r.lock != nil {
		errs = append(errs, r.lock.Close())
	}
	return errors.Join(errs...)
}
