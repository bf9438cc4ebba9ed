// SPDX-License-Identifier: Apache-2.0

// Package control is the language between the agent and the commands of its own host: one JSON request, one JSON
// answer, over a unix socket that is root's alone. The agent's topology file is the one truth on a host, so a request never
// carries a topology: it asks what holds, or has the agent read its file again. Devices of the host are given their place in a network, and
// taken out of it, by requests too.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Version is the version of Request and Answer; the agent refuses any other.
const Version = 1

// What a request may ask.
const (
	Plan   = "plan"   // what the agent's node holds
	Apply  = "apply"  // read the topology file again, and make it true
	Attach = "attach" // put a device of the host into an L2 network, or find it there
	Detach = "detach" // … and take it out of its network; one that is in none is fine
)

const (
	maxRequest = 4 << 10
	// maxAnswer takes the plan of the largest topology that there may be: 1,048,576 blocks of 130 bytes.
	maxAnswer = 256 << 20
)

// Request is what a command asks the agent.
type Request struct {
	Version int    `json:"version"`
	Do      string `json:"do"`
	// Topology is the hash of the file that the caller has in mind; an agent that finds another one changes
	// nothing. Empty: whatever is there.
	Topology string  `json:"topology,omitempty"`
	Device   *Device `json:"device,omitempty"` // Attach and Detach only
}

// Answer is what the agent says. The fields of what was not asked are zero.
type Answer struct {
	Error      string          `json:"error,omitempty"`   // why it was not done
	Errors     topology.Errors `json:"errors,omitempty"`  // … when the topology file is wrong
	File       string          `json:"file,omitempty"`    // the agent's topology file
	Plan       *plan.Plan      `json:"plan,omitempty"`    // what the node holds
	Generation uint32          `json:"generation"`        // that is active
	Changed    bool            `json:"changed,omitempty"` // it differs from the one before
	Took       time.Duration   `json:"took,omitempty"`    // ns
	Joined     *Joined         `json:"joined,omitempty"`  // how the device is in its network
}

// Refusal is why the agent did not do what it was asked: of type topology.Errors when its file is wrong, nil when
// it did.
func (a *Answer) Refusal() error {
	switch {
	case len(a.Errors) > 0:
		return a.Errors
	case a.Error != "":
		return errors.New(a.Error)
	}
	return nil
}

// Refuse is the answer to what was not done.
func Refuse(err error) Answer {
	var file topology.Errors
	if errors.As(err, &file) {
		return Answer{Errors: file, Error: "the topology file is wrong"}
	}
	return Answer{Error: err.Error()}
}

// ErrNoAgent is returned when nobody listens at the socket.
var ErrNoAgent = errors.New("no agent runs on this host: start it (systemctl start lace)")

// Ask sends a request to the agent at socket and waits for its answer until ctx ends. An error means that there is no
// answer, ErrNoAgent that there is no agent; what the agent refuses is in the answer.
func Ask(ctx context.Context, socket string, r Request) (*Answer, error) {
	r.Version = Version
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, fmt.Errorf("ask the agent at %s: %w", socket, ErrNoAgent)
	}
	if err != nil {
		return nil, fmt.Errorf("ask the agent: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var a Answer
	err = write(conn, r, maxRequest)
	if err == nil {
		err = conn.(*net.UnixConn).CloseWrite()
	}
	if err == nil {
		err = read(conn, &a, maxAnswer)
	}
	if err = errors.Join(ctx.Err(), err); err != nil {
		return nil, fmt.Errorf("ask the agent at %s to %s: %w (its log says more: journalctl -u lace)", socket, r.Do, err)
	}
	return &a, nil
}

// parseRequest decodes and checks a request.
func parseRequest(b []byte) (r Request, err error) {
	if err := json.Unmarshal(b, &r); err != nil {
		return r, err
	}
	if r.Version != Version {
		return r, fmt.Errorf("request has version %d, this agent speaks %d: use the lace of the agent's release", r.Version, Version)
	}
	switch r.Do {
	case Attach, Detach:
		return r, r.Device.check(r.Do)
	case Plan, Apply:
		return r, nil
	}
	return r, fmt.Errorf("request asks for %.20q; known are %s, %s, %s and %s", r.Do, Plan, Apply, Attach, Detach)
}

// read decodes one JSON value of at most limit bytes from r, which has to end after it.
func read(r io.Reader, v any, limit int) error {
	b, err := readAll(r, limit)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func readAll(r io.Reader, limit int) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) > limit:
		return nil, errTooLarge
	case len(b) == 0:
		return nil, errEmpty
	}
	return b, nil
}

var (
	errEmpty    = errors.New("message is empty")
	errTooLarge = fmt.Errorf("message is larger than the %d bytes of a request, or %d of an answer", maxRequest, maxAnswer)
)

func write(w io.Writer, v any, limit int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > limit {
		return errTooLarge
	}
	_, err = w.Write(b)
	return err
}
