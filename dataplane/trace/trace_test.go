// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
)

// plane loads the programs and pins the events below a BPF file system of the test's own.
func plane(t *testing.T) (*ebpf.Collection, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loading eBPF programs needs root; run as root")
	}
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mount a BPF file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	spec, err := bpf.LoadLace()
	if err != nil {
		t.Fatal(err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(coll.Close)
	if err := coll.Maps["events"].Pin(filepath.Join(dir, "events")); err != nil {
		t.Fatal(err)
	}
	return coll, dir
}

// refuse sends a packet from an interface that is in no table.
func refuse(t *testing.T, coll *ebpf.Collection, packet []byte, times uint32) {
	t.Helper()
	_, err := coll.Programs["pod_l3"].Run(&ebpf.RunOptions{Data: packet, DataOut: make([]byte, 1600), Repeat: times})
	if err != nil {
		t.Fatal(err)
	}
}

var errGotIt = errors.New("got it")

func TestRefusedPacketIsTold(t *testing.T) {
	coll, dir := plane(t)
	lock := filepath.Join(t.TempDir(), "lock")
	refuse(t, coll, udp4(), 1) // from before Open: left out
	r, err := Open(dir, lock)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := Open(dir, lock); err == nil || !strings.Contains(err.Error(), "another lace trace") {
		t.Errorf("a second reader: got %v", err)
	}
	long := append(udp4(), make([]byte, 1200)...)
	refuse(t, coll, long, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var got Event
	err = r.Each(ctx, func(e Event) error { got = e; return errGotIt })
	if !errors.Is(err, errGotIt) {
		t.Fatalf("no event: %v", err)
	}
	if got.Verdict != bpf.LaceVerdictVERDICT_REFUSED || got.Stage != bpf.LaceStageSTAGE_ENTRY || got.SID.IsValid() {
		t.Errorf("got %s at %s with SID %v", VerdictName(got.Verdict), StageName(got.Stage), got.SID)
	}
	if got.Reason != bpf.LaceReasonREASON_NO_PORT || int(got.Length) != len(long) {
		t.Errorf("got reason %d and %d bytes, want no_port and %d", got.Reason, got.Length, len(long))
	}
	if want := "10.40.1.5:4242 > 10.40.2.7:53 udp"; got.Flow.String() != want {
		t.Errorf("got flow %q, want %q", got.Flow, want)
	}
	if age := time.Since(got.Time); age < 0 || age > time.Minute {
		t.Errorf("the event is %v old", age)
	}
}

// A flood is told in part, and how much was left out is told with it.
func TestFloodIsCounted(t *testing.T) {
	coll, dir := plane(t)
	r, err := Open(dir, filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	const flood = 200_000
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			refuse(t, coll, udp4(), flood)
		}
	}()
	told, missed := 0, 0
	err = r.Each(ctx, func(e Event) error {
		told++
		if missed += int(e.Missed); missed > 0 && told > 1 {
			return errGotIt
		}
		return nil
	})
	cancel()
	if !errors.Is(err, errGotIt) {
		t.Fatalf("%d events told, %d missed: %v", told, missed, err)
	}
}

// TestOpenWithoutPins: a host on which no agent has run since it started has neither pins nor a directory for the lock.
func TestOpenWithoutPins(t *testing.T) {
	lock := filepath.Join(t.TempDir(), "run", "lock")
	_, err := Open(t.TempDir(), lock)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "no agent of this version has run since this host started") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(filepath.Dir(lock)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a trace of nothing made the lock's directory: %v", err)
	}
}

// TestLockNeedsNoAgent: systemd removes the agent's directory with the agent, the events stay.
func TestLockNeedsNoAgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "lace", "lock")
	lock, err := takeLock(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := takeLock(path); err == nil || !strings.Contains(err.Error(), "another lace trace holds "+path) {
		t.Errorf("a second lock: %v", err)
	}
	lock.Close()
	lock, err = takeLock(path)
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
}
