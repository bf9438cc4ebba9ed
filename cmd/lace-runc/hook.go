// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/lace-net/lace/plugin/wire"
)

const (
	poststopDeadline = 3 * time.Second
	decideDeadline   = 1500 * time.Millisecond // what HookDeadline leaves after AskDeadline
)

// hookMain is an OCI hook: the state of the container on stdin, the verdict as exit status, the reason on stderr.
func hookMain(stage string, stdin io.Reader, stderr io.Writer, getenv func(string) string) int {
	var s wire.State
	err := wire.Read(stdin, &s)
	switch {
	case stage == wire.Poststop:
		if err == nil {
			err = tell(s, getenv)
		}
		if err != nil {
			fmt.Fprintln(stderr, "lace: warning: the agent was not told that the container ended; it will find out by itself:", err)
		}
		return 0 // a container can always end
	case stage != wire.CreateRuntime:
		fmt.Fprintf(stderr, "lace: unknown hook stage %q; known are %s and %s\n", stage, wire.CreateRuntime, wire.Poststop)
		return 1
	case err != nil:
		fmt.Fprintln(stderr, "lace: read the OCI state from stdin:", err)
		return 1
	}
	warning, err := createRuntime(s, getenv)
	if err != nil {
		fmt.Fprintln(stderr, "lace:", err)
		return 1
	}
	if warning != "" {
		fmt.Fprintln(stderr, "lace: warning:", warning)
	}
	return 0
}

func tell(s wire.State, getenv func(string) string) error {
	ctx, cancel := context.WithTimeout(context.Background(), poststopDeadline)
	defer cancel()
	a, err := wire.Ask(ctx, socketPath(getenv), message(wire.Poststop, s, getenv))
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	return err
}

// createRuntime asks the agent. Where that gives no verdict it looks itself whether the container asks for Lace at all:
// one that does is refused, one that does not runs as if there were no Lace.
func createRuntime(s wire.State, getenv func(string) string) (warning string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), wire.AskDeadline)
	defer cancel()
	a, err := wire.Ask(ctx, socketPath(getenv), message(wire.CreateRuntime, s, getenv))
	if err == nil && (a.Error == "" || !a.Undecided) {
		return "", verdict(a)
	}
	cause := noVerdict(a, err)
	network, asks, err := asksForLace(s, getenv)
	if err != nil && !errors.Is(err, errNotFound) {
		// Nobody can know. containerd made this container a moment ago; if it does not answer now, the container
		// is more likely not containerd's than Lace's: such ones ask by annotation alone, which was looked at.
		return fmt.Sprintf("%v; nor could be found out whether the container asks for Lace: %v; it starts without", cause, err), nil
	}
	if !asks {
		return "", nil
	}
	return "", fmt.Errorf("container asks for network %q, but %w", network, cause)
}

func verdict(a wire.Answer) error {
	if a.Error == "" {
		return nil
	}
	return errors.New(a.Error)
}

// noVerdict says why the agent did not judge.
func noVerdict(a wire.Answer, err error) error {
	switch {
	case err == nil:
		return fmt.Errorf("the Lace agent could not judge it: %s", a.Error)
	case errors.Is(err, context.DeadlineExceeded) || isTimeout(err):
		return fmt.Errorf("the Lace agent did not answer in time (%w); look at it: journalctl -u lace", err)
	default:
		return fmt.Errorf("the Lace agent is not running (%w); start it: systemctl start lace", err)
	}
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// asksForLace looks at the annotations, which the hook has, and else at the labels, which containerd has.
func asksForLace(s wire.State, getenv func(string) string) (network string, asks bool, err error) {
	if network, asks = wire.Asks(nil, s.Annotations); asks {
		return network, true, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), decideDeadline)
	defer cancel()
	c := newContainerd(getenv("GRPC_ADDRESS"))
	if s.Annotations[wire.KindAnnotation] == wire.KindSandbox {
		p, err := c.pod(ctx, s.ID)
		network, asks = wire.Asks(p.Labels, p.Annotations)
		return network, asks && !p.HostNetwork, err
	}
	labels, err := c.labels(ctx, namespaceOf(s, getenv), s.ID)
	network, asks = wire.Asks(labels, nil)
	return network, asks, err
}

func message(stage string, s wire.State, getenv func(string) string) wire.Message {
	return wire.Message{Stage: stage, Namespace: namespaceOf(s, getenv), Containerd: getenv("GRPC_ADDRESS"), State: &s}
}

// namespaceOf is containerd's namespace of the container: as the shim says, else as the path of the bundle does
// (…/io.containerd.runtime.v2.task/NAMESPACE/ID).
func namespaceOf(s wire.State, getenv func(string) string) string {
	if ns := getenv("NAMESPACE"); ns != "" {
		return ns
	}
	return filepath.Base(filepath.Dir(filepath.Clean(s.Bundle)))
}

func socketPath(getenv func(string) string) string {
	if path := getenv(wire.SocketEnv); path != "" {
		return path
	}
	return wire.DefaultSocket
}
