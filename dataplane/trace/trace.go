// SPDX-License-Identifier: Apache-2.0

// Package trace reads what the programs tell about refused packets: one event each, at a bounded rate, through
// a pinned ring buffer. It needs no agent.
package trace

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
)

// Event is one refused packet.
type Event struct {
	Time    time.Time
	Reason  bpf.LaceReason
	Ifindex uint32 // where the packet came in
	Length  uint32 // bytes, from the first header on
	Missed  uint32 // events before this one, on its CPU, that the rate limit kept back
	Flow    Flow
}

// The layout of struct event in bpf/lib/types.h: 24 bytes, then the head of the packet.
const (
	offsetReason   = 8
	offsetIfindex  = 12
	offsetLength   = 16
	offsetMissed   = 20
	offsetHeadLen  = 24
	offsetEthernet = 26
	offsetHead     = 28
)

var errShort = errors.New("event is shorter than its header: programs and command are of different versions")

// parse decodes one event. origin is the wall clock at monotonic zero.
func parse(b []byte, origin time.Time) (Event, error) {
	if len(b) < offsetHead {
		return Event{}, errShort
	}
	n := int(binary.NativeEndian.Uint16(b[offsetHeadLen:]))
	head := b[offsetHead:]
	return Event{
		Time:    origin.Add(time.Duration(binary.NativeEndian.Uint64(b))),
		Reason:  bpf.LaceReason(binary.NativeEndian.Uint32(b[offsetReason:])),
		Ifindex: binary.NativeEndian.Uint32(b[offsetIfindex:]),
		Length:  binary.NativeEndian.Uint32(b[offsetLength:]),
		Missed:  binary.NativeEndian.Uint32(b[offsetMissed:]),
		Flow:    ParseFlow(head[:min(n, len(head))], b[offsetEthernet] != 0),
	}, nil
}

// Reader is the one reader of a data plane's events.
type Reader struct {
	ring   *ringbuf.Reader
	events *ebpf.Map
	lock   *os.File
	origin time.Time
	start  time.Time
}

// Open opens the ring buffer that is pinned in dir. A ring has one reader: lock is the path of the file
// that says so. Events from before Open are left out.
func Open(dir, lock string) (*Reader, error) {
	f, err := takeLock(lock)
	if err != nil {
		return nil, err
	}
	r := &Reader{lock: f, start: time.Now()}
	if r.origin, err = origin(); err == nil {
		err = r.open(dir)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Reader) open(dir string) (err error) {
	path := filepath.Join(dir, "events")
	if r.events, err = ebpf.LoadPinnedMap(path, nil); err != nil {
		return fmt.Errorf("open the events %s: %w (has an agent run on this host?)", path, err)
	}
	if r.ring, err = ringbuf.NewReader(r.events); err != nil {
		return fmt.Errorf("read the events %s: %w", path, err)
	}
	return nil
}

func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the trace: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another lace trace holds %s: events have one reader", path)
	}
	return f, nil
}

// origin is the wall clock when the monotonic clock was zero.
func origin() (time.Time, error) {
	var mono unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
		return time.Time{}, fmt.Errorf("read the clock: %w", err)
	}
	return time.Now().Add(-time.Duration(mono.Nano())), nil
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
		e, err := parse(record.RawSample, r.origin)
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
	return errors.Join(append(errs, r.lock.Close())...)
}
