// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/lace-net/lace/plugin/socket"
)

const (
	maxConversations = 16 // served at once
	// requestDeadline bounds how long a caller may take to send its request, answerDeadline how long to take its
	// answer, which may be a hundred megabytes.
	requestDeadline = 2 * time.Second
	answerDeadline  = 20 * time.Second
)

// Handler answers one request. It is called by several callers at once.
type Handler func(context.Context, Request) Answer

// Server takes requests from a unix socket, one a connection.
type Server struct {
	socket *socket.Socket
	handle Handler
	log    *slog.Logger
}

// Listen makes the socket at path, as socket.Listen does.
func Listen(path string, h Handler, log *slog.Logger) (*Server, error) {
	s, err := socket.Listen("control socket", path, maxConversations, log)
	if err != nil {
		return nil, err
	}
	return &Server{s, h, log}, nil
}

// Close ends a server that does not run. The socket goes with it.
func (s *Server) Close() error { return s.socket.Close() }

// Run serves until ctx ends, and every conversation with it.
func (s *Server) Run(ctx context.Context) error { return s.socket.Run(ctx, s.converse) }

func (s *Server) converse(ctx context.Context, conn *net.UnixConn) {
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
	if err := socket.CheckPeer(conn, "control request"); err != nil {
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
