// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// lockName is an abstract socket: it goes with the process that holds it and leaves no file.
const lockName = "@lacebench"

// lockWait bounds the wait for another bench to end: a smoke run takes far less.
const lockWait = 5 * time.Minute

// lock keeps a second bench away: two at once would share the namespaces' names and a CPU.
func lock(ctx context.Context, stderr io.Writer) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for told := false; ; told = true {
		l, err := net.Listen("unix", lockName)
		if err == nil {
			return func() { l.Close() }, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("take the lock of the bench: %w", err)
		}
		if !told {
			fmt.Fprintln(stderr, "bench: another bench is running; waiting for it to end")
		}
		if !sleep(ctx, 200*time.Millisecond) {
			return nil, errors.New("another bench is still running; try again when it has ended")
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
