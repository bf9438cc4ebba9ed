// SPDX-License-Identifier: Apache-2.0

package control

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
	maxConversations = 16 // served at once; more wait in the socket's backlog
	// requestDeadline bounds how long a caller may take to send its request, answerDeadline how long to take its
	// answer, which may be a hundred megabytes.
	requestDeadline = 2 * time.Second
	answerDeadline  = 20 * time.Second
	acceptPause     = 100 * time.Millisecond // after a failed accept, such as EMFILE
	maxSocket       = 107                    // sun_path without its last NUL
)

// Handler answers one request. It is called by several callers at once.
type Handler func(context.Context, Request) Answer

// Server takes requests from a unix socket, one a connection.
type Server struct {
	listener *net.UnixListener
	handle   Handler
	log      *slog.Logger
	slots    chan struct{}
}

// Listen makes the socket at path, mode 0600. A socket that nobody listens on is replaced; anything else at path is an error. It
// sets the mask of the process for a moment: call it before anything else makes files.
func Listen(path string, h Handler, log *slog.Logger) (*Server, error) {
	if len(path) > maxSocket {
		return nil, fmt.Errorf("control socket %s: the path has %d bytes, %d is the most: choose a shorter directory for hook-socket", path, len(path), maxSocket)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of control socket %s: %w", path, err)
	}
	if err := clearSocket(path); err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	old := unix.Umask(0o177) // from the first moment, where a chmod would leave a gap
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on control socket %s: %w", path, err)
	}
	return &Server{listener: l, handle: h, log: log, slots: make(chan struct{}, maxConversations)}, nil
}

// clearSocket removes a socket that an agent left when it was killed.
func clearSocket(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("there is a file of another kind (%s) in its place; move it away", st.Mode().Type())
	}
	conn, err := net.DialTimeout("unix", path, requestDeadline)
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

// Close ends a server that does not run. The socket goes with it.
func (s *Server) Close() error { return s.listener.Close() }

// Run serves until ctx ends, and every conversation with it.
func (s *Server) Run(ctx context.Context) error {
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
			s.log.Error("accept on the control socket", "err", err)
			pause(ctx, acceptPause)
			continue
		}
		conversations.Go(func() {
			defer func() { <-s.slots }()
			s.converse(ctx, conn)
		})
	}
}

func (s *Server) converse(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	r, err := receive(conn)
	if errors.Is(err, errEmpty) {
		return // one who looked whether an agent listens
	}
	if err != nil {
		s.log.Warn("control request refused", "err", err)
		err = send(conn, Refuse(err))
	} else {
		err = send(conn, s.handle(ctx, r))
	}
	if err != nil {
		s.log.Warn("answer a control request; the caller may have given up", "err", err)
	}
}

func receive(conn *net.UnixConn) (r Request, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(requestDeadline)); err != nil {
		return r, fmt.Errorf("set the deadline of a control request: %w", err)
	}
	b, err := readAll(conn, maxRequest)
	if err != nil {
		return r, fmt.Errorf("read a control request: %w", err)
	}
	// Only now, since a socket closed with unread bytes takes the answer with it.
	if err := checkPeer(conn); err != nil {
		return r, err
	}
	return parseRequest(b)
}

func send(conn *net.UnixConn, a Answer) error {
	if err := conn.SetWriteDeadline(time.Now().Add(answerDeadline)); err != nil {
		return err
	}
	err := write(conn, a, maxAnswer)
	if errors.Is(err, errTooLarge) {
		err = write(conn, Refuse(err), maxAnswer)
	}
	return err
}

// checkPeer lets root in alone. The mode of the socket says the same; this holds when somebody changed it.
func checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("find out who sent a control request: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("find out who sent a control request: %w", err)
	}
	if cred.Uid != 0 {
		return fmt.Errorf("control request of pid %d with uid %d: only root may send one", cred.Pid, cred.Uid)
	}
	return nil
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
