// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lockWait bounds the wait for another bench to end: a smoke run takes far less.
const lockWait = 5 * time.Minute

// lock keeps a second bench away: two at once would share the namespaces' names and a CPU.
func lock(ctx context.Context, stderr io.Writer) (unlock func(), err error) {
	path := filepath.Join(os.TempDir(), "lacebench.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the bench: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if !told {
			fmt.Fprintln(stderr, "bench: another bench holds", path+"; waiting for it to end")
		}
		if !sleep(ctx, 200*time.Millisecond) {
			f.Close()
			return nil, fmt.Errorf("lock %s: another bench is still running; try again when it has ended", path)
		}
	}
}

// sleep waits for d; it is false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
