// SPDX-License-Identifier: Apache-2.0

// Package socket is what the agent's unix sockets have in common: root alone talks to them, each conversation has a
// connection of its own, and only so many are held at once.
package socket

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxPath is how many bytes a path may have: sun_path without its last NUL.
	MaxPath = 107

	dialDeadline = 2 * time.Second
	acceptPause  = 100 * time.Millisecond // after a failed accept, such as EMFILE
)

// Socket is one that is listened on.
type Socket struct {
	name     string // "hook socket"
	listener *net.UnixListener
	log      *slog.Logger
	slots    chan struct{}
}

// Listen makes the socket at path, mode 0600, in a directory that is made with mode 0700 when it is missing. A socket
// that nobody listens on is replaced; anything else at path is an error. name is what logs and errors call it, conversations
// how many are held at once: more callers wait in its backlog. It sets the mask of the process for a moment: call it before
// anything else makes files.
func Listen(name, path string, conversations int, log *slog.Logger) (*Socket, error) {
	if len(path) > MaxPath {
		return nil, fmt.Errorf("%s %s: the path has %d bytes, %d is the most: choose a shorter directory for hook-socket", name, path, len(path), MaxPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of %s %s: %w", name, path, err)
	}
	if err := clearStale(path); err != nil {
		return nil, fmt.Errorf("%s %s: %w", name, path, err)
	}
	old := unix.Umask(0o177) // from the first moment, where a chmod would leave a gap
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on %s %s: %w", name, path, err)
	}
	return &Socket{name, l, log, make(chan struct{}, conversations)}, nil
}

// clearStale removes a socket that an agent left when it was killed.
func clearStale(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("there is a file of another kind (%s) in its place; move it away or choose another path", st.Mode().Type())
	}
	conn, err := net.DialTimeout("unix", path, dialDeadline)
	if err == nil {
		conn.Close()
		return errors.New("another agent is listening on it; stop that one first")
	}
	if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("find out whether somebody listens: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("replace the stale one: %w", err)
	}
	return nil
}

// Close ends a socket that is not served. Its file goes with it.
func (s *Socket) Close() error { return s.listener.Close() }

// Run has every conversation until ctx ends, and waits for those that are held then. The connection is closed after each.
func (s *Socket) Run(ctx context.Context, converse func(context.Context, *net.UnixConn)) error {
	stop := context.AfterFunc(ctx, func() { s.listener.Close() })
	defer stop()
	var conversations sync.WaitGroup
	defer conversations.Wait()
	for {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := s.listener.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			<-s.slots
			s.log.Error("accept on the "+s.name, "err", err)
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		conversations.Go(func() {
			defer func() { <-s.slots }()
			defer conn.Close()
			converse(ctx, conn)
		})
	}
}

// CheckPeer lets root in alone. The mode of the socket says the same; this holds when somebody changed it. what is what the
// peer has sent: "hook message". Call it when all of that is read: a socket closed with unread bytes takes the answer with it.
func CheckPeer(conn *net.UnixConn, what string) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("find out who sent a %s: %w", what, err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("find out who sent a %s: %w", what, err)
	}
	if cred.Uid != 0 {
		return fmt.Errorf("%s of pid %d with uid %d: only root may send one", what, cred.Pid, cred.Uid)
	}
	return nil
}
