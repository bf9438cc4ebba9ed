// SPDX-License-Identifier: Apache-2.0

// Package wire is the language between lace-runc and the agent: one JSON message from a hook or a
// CNI call, one JSON answer back, over a unix socket. It stands on the standard library alone, because
// lace-runc starts with every container of the host.
package wire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
)

const (
	// Version is the version of Message and Answer; the agent refuses any other.
	Version = 2
	// DefaultSocket is where the agent listens.
	DefaultSocket = "/run/lace/lace.sock"
	// DefaultContainerd is where containerd listens.
	DefaultContainerd = "/run/containerd/containerd.sock"
	// SocketEnv names the environment variable that moves the agent's socket.
	SocketEnv = "LACE_SOCKET"
	// MaxMessage bounds a Message and an Answer, in bytes.
	MaxMessage = 64 << 10
	// LabelNetwork is the label or annotation by which a container asks for Lace.
	LabelNetwork = "lace.network"
	// LabelPrefix is common to all that a user may ask for. Keys under "lace/" are Lace's own records.
	LabelPrefix = "lace."
	// CRINamespace is the containerd namespace of all CRI pods.
	CRINamespace = "k8s.io"
	// KindAnnotation says what CRI makes of an OCI container: KindSandbox or KindContainer. It is
	// missing outside CRI.
	KindAnnotation = "io.kubernetes.cri.container-type"
	// KindSandbox is a pod's own container, which holds the network namespace.
	KindSandbox = "sandbox"
	// KindContainer is a container inside a pod, which shares the pod's network.
	KindContainer = "container"
)

// The stages of a container's life that the agent is told of.
const (
	CreateRuntime = "createRuntime"
	Poststop      = "poststop"
	CNIAdd        = "cniAdd"
	CNIDel        = "cniDel"
	CNICheck      = "cniCheck"
)

// Message is what lace-runc tells the agent. Exactly one of State (hook stages) and CNI (cni stages)
// is set.
type Message struct {
	Version    int    `json:"version"`
	Stage      string `json:"stage"`
	Namespace  string `json:"namespace,omitempty"`  // containerd namespace
	Containerd string `json:"containerd,omitempty"` // containerd's socket; empty: not known
	State      *State `json:"state,omitempty"`
	CNI        *CNI   `json:"cni,omitempty"`
}

// State is the part of the OCI state that Lace reads (runtime-spec, "State").
type State struct {
	ID          string            `json:"id"`
	Status      string            `json:"status,omitempty"`
	Pid         int               `json:"pid,omitempty"`
	Bundle      string            `json:"bundle,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// CNI is what a CNI call says of a pod.
type CNI struct {
	ContainerID  string            `json:"containerId"` // the sandbox's id
	Netns        string            `json:"netns,omitempty"`
	IfName       string            `json:"ifname,omitempty"`
	PodNamespace string            `json:"podNamespace,omitempty"`
	PodName      string            `json:"podName,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
}

// Answer is the agent's verdict. Error is empty when the container may start.
type Answer struct {
	Error string `json:"error,omitempty"`
	// Undecided is set when the agent could not find out whether the container asks for Lace at all;
	// lace-runc then finds out by itself, so that a container without labels is not refused.
	Undecided bool    `json:"undecided,omitempty"`
	Result    *Result `json:"result,omitempty"` // nil: the container did not ask for Lace
}

// Result is how a container was wired: its interfaces, in the order of the networks that it asks for.
type Result struct {
	Interfaces []Interface `json:"interfaces"`
}

// Interface is one interface of a container.
type Interface struct {
	Network string         `json:"network"`
	Name    string         `json:"name"`
	IPs     []netip.Prefix `json:"ips"`
	// Gateways has one entry for each of IPs; the zero Addr where there is none.
	Gateways []netip.Addr `json:"gateways"`
	MAC      string       `json:"mac"`
	MTU      int          `json:"mtu"` // bytes
}

// ErrTooLarge is returned for a message of more than MaxMessage bytes.
var ErrTooLarge = fmt.Errorf("message is larger than %d bytes", MaxMessage)

// ErrEmpty is returned where the peer said nothing at all.
var ErrEmpty = errors.New("message is empty")

// Read decodes one JSON value of at most MaxMessage bytes from r, which has to end after it.
func Read(r io.Reader, v any) error {
	b, err := io.ReadAll(io.LimitReader(r, MaxMessage+1))
	switch {
	case err != nil:
		return err
	case len(b) > MaxMessage:
		return ErrTooLarge
	case len(b) == 0:
		return ErrEmpty
	}
	return json.Unmarshal(b, v)
}

// Write encodes v and writes it at once; ErrTooLarge when it is larger than MaxMessage bytes.
func Write(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > MaxMessage {
		return ErrTooLarge
	}
	_, err = w.Write(b)
	return err
}

// Ask sends m to the agent at socket and waits for its answer until ctx ends. An error means that
// there is no answer, not that the answer is no.
func Ask(ctx context.Context, socket string, m Message) (Answer, error) {
	m.Version = Version
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return Answer{}, fmt.Errorf("socket %s: %w", socket, reason(err))
	}
	defer conn.Close()
	if err := converse(ctx, conn.(*net.UnixConn), m); err != nil {
		return Answer{}, fmt.Errorf("socket %s: send %s: %w", socket, m.Stage, reason(err))
	}
	var a Answer
	if err := Read(conn, &a); err != nil {
		return Answer{}, fmt.Errorf("socket %s: read the answer to %s: %w", socket, m.Stage, reason(err))
	}
	return a, nil
}

// converse sends m and half-closes, which tells the agent that the message is complete.
func converse(ctx context.Context, conn *net.UnixConn, m Message) error {
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	if err := Write(conn, m); err != nil {
		return err
	}
	return conn.CloseWrite()
}

// reason takes the address out of a network error: the caller names the socket.
func reason(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var sys *os.SyscallError
	if errors.As(err, &sys) {
		err = sys.Err
	}
	return err
}

// Asks returns the network that a container asks for. Annotations win over labels. A container that
// carries any other key of Lace's asks too, wrongly, and gets its error from the agent.
func Asks(labels, annotations map[string]string) (network string, asks bool) {
	for _, m := range []map[string]string{annotations, labels} {
		if v, ok := m[LabelNetwork]; ok {
			return v, true
		}
	}
	for _, m := range []map[string]string{annotations, labels} {
		for k := range m {
			if strings.HasPrefix(k, LabelPrefix) {
				return "", true
			}
		}
	}
	return "", false
}

// Deadlines, each inside the next: the agent's work, the wait of lace-runc, the timeout of the OCI hook.
const (
	AgentDeadline = 7 * time.Second
	AskDeadline   = 8 * time.Second
	HookDeadline  = 10 * time.Second
)
