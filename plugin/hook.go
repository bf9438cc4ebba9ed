// SPDX-License-Identifier: Apache-2.0

package plugin

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

	"github.com/lace-net/lace/plugin/wire"
)

const (
	maxConversations = 64 // hooks served at once; more wait in the socket's backlog
	// messageDeadline bounds how long a peer may take to send its message, or to take its answer.
	messageDeadline = 2 * time.Second
	acceptPause     = 100 * time.Millisecond // after a failed accept, such as EMFILE
)

// handler judges one message.
type handler func(context.Context, wire.Message) wire.Answer

// receiver takes messages of lace-runc from a unix socket, one a connection.
type receiver struct {
	listener *net.UnixListener
	handle   handler
	log      *slog.Logger
	slots    chan struct{}
}

// listen makes the socket at path, mode 0600, in a directory that is made with mode 0700 when it is
// missing. A socket that nobody listens on is replaced; anything else at path is an error.
func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of hook socket %s: %w", path, err)
	}
	if err := clearSocket(path); err != nil {
		return nil, err
	}
	// The mask holds from the first moment, where a chmod would leave a gap. It is the process's, so
	// listen is called before anything else that makes files.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on hook socket %s: %w", path, err)
	}
	return l, nil
}

func clearSocket(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("look at hook socket %s: %w", path, err)
	case st.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("hook socket %s: there is a file of another kind (%s) in its place; move it away or choose another path", path, st.Mode().Type())
	}
	conn, err := net.DialTimeout("unix", path, messageDeadline)
	if err == nil {
		conn.Close()
		return fmt.Errorf("hook socket %s: another agent is listening on it; stop that one first", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("hook socket %s: find out whether somebody listens: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("replace stale hook socket %s: %w", path, err)
	}
	return nil
}

func newReceiver(l *net.UnixListener, h handler, log *slog.Logger) *receiver {
	return &receiver{listener: l, handle: h, log: log, slots: make(chan struct{}, maxConversations)}
}

// run serves until ctx ends and every conversation with it.
func (s *receiver) run(ctx context.Context) error {
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
			s.log.Error("accept on the hook socket", "error", err)
			pause(ctx, acceptPause)
			continue
		}
		conversations.Go(func() {
			defer func() { <-s.slots }()
			s.converse(ctx, conn)
		})
	}
}

func (s *receiver) converse(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	m, err := receive(conn)
	if errors.Is(err, wire.ErrEmpty) {
		s.log.Debug("a caller of the hook socket said nothing")
		_ = wire.Write(conn, wire.Answer{Error: err.Error(), Undecided: true}) // it has hung up, as a rule
		return
	}
	if err != nil {
		s.log.Warn("hook message refused", "error", err)
		s.answer(conn, wire.Answer{Error: err.Error(), Undecided: true})
		return
	}
	ctx, cancel := context.WithTimeout(ctx, wire.AgentDeadline)
	defer cancel()
	s.answer(conn, s.handle(ctx, m))
}

func (s *receiver) answer(conn *net.UnixConn, a wire.Answer) {
	if err := conn.SetWriteDeadline(time.Now().Add(messageDeadline)); err != nil {
		s.log.Warn("answer a hook", "error", err)
		return
	}
	if len(a.Error) > wire.MaxMessage/8 { // JSON may make six bytes of one
		a.Error = a.Error[:wire.MaxMessage/8] + "…"
	}
	if err := wire.Write(conn, a); err != nil {
		s.log.Warn("answer a hook; it may have given up", "error", err)
	}
}

func receive(conn *net.UnixConn) (m wire.Message, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(messageDeadline)); err != nil {
		return m, fmt.Errorf("set the deadline of a hook message: %w", err)
	}
	if err := wire.Read(conn, &m); err != nil {
		return m, fmt.Errorf("read a hook message: %w", err)
	}
	// Last, since a socket closed with unread bytes takes the answer with it.
	if err := checkPeer(conn); err != nil {
		return m, err
	}
	return m, checkMessage(m)
}

// checkPeer lets root in alone. The mode of the socket says the same; this holds when somebody changed it.
func checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("find out who sent a hook message: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("find out who sent a hook message: %w", err)
	}
	if cred.Uid != 0 {
		return fmt.Errorf("hook message of pid %d with uid %d: only root may send one", cred.Pid, cred.Uid)
	}
	return nil
}

func checkMessage(m wire.Message) error {
	if m.Version != wire.Version {
		return fmt.Errorf("hook message has version %d, this agent speaks %d: install lace and lace-runc of one release", m.Version, wire.Version)
	}
	switch m.Stage {
	case wire.CreateRuntime, wire.Poststop:
		if m.State == nil || m.CNI != nil {
			return fmt.Errorf("hook message %s needs an OCI state and no CNI part", m.Stage)
		}
		return checkIDs(m.Namespace, m.State.ID)
	case wire.CNIAdd, wire.CNIDel, wire.CNICheck:
		if m.CNI == nil || m.State != nil {
			return fmt.Errorf("hook message %s needs a CNI part and no OCI state", m.Stage)
		}
		return checkIDs(m.Namespace, m.CNI.ContainerID)
	}
	return fmt.Errorf("hook message has the unknown stage %s; known are %s, %s, %s, %s, %s", quote(m.Stage),
		wire.CreateRuntime, wire.Poststop, wire.CNIAdd, wire.CNIDel, wire.CNICheck)
}

// maxID bounds the identifiers of containerd, which are 76 bytes at most.
const maxID = 128

func checkIDs(namespace, id string) error {
	for _, part := range []struct{ what, value string }{{"containerd namespace", namespace}, {"container id", id}} {
		if len(part.value) > maxID || !nameForm.MatchString(part.value) {
			return fmt.Errorf("hook message: %s is no %s", quote(part.value), part.what)
		}
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
