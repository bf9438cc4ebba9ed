// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/lace-net/lace/plugin/socket"
	"github.com/lace-net/lace/plugin/wire"
)

const (
	maxConversations = 64 // hooks served at once
	// messageDeadline bounds how long a peer may take to send its message, or to take its answer.
	messageDeadline = 2 * time.Second
)

// handler judges one message.
type handler func(context.Context, wire.Message) wire.Answer

// receiver takes messages of lace-runc from a unix socket, one a connection.
type receiver struct {
	socket *socket.Socket
	handle handler
	log    *slog.Logger
}

// listen makes the socket at path, as socket.Listen does.
func listen(path string, h handler, log *slog.Logger) (*receiver, error) {
	s, err := socket.Listen("hook socket", path, maxConversations, log)
	if err != nil {
		return nil, err
	}
	return &receiver{s, h, log}, nil
}

// run serves until ctx ends and every conversation with it.
func (s *receiver) run(ctx context.Context) error { return s.socket.Run(ctx, s.converse) }

func (s *receiver) converse(ctx context.Context, conn *net.UnixConn) {
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
	if err := socket.CheckPeer(conn, "hook message"); err != nil {
		return m, err
	}
	return m, checkMessage(m)
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
