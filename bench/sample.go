// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"time"
)

// metric is something that one sample on one bed measures.
type metric struct {
	name string
	unit string
	// rate is the sample's value, from the tallies of both ends.
	rate func(client, server tally) float64
}

// received divides what the server got by the time that the client took.
func received(per float64) func(client, server tally) float64 {
	return func(client, server tally) float64 {
		return tally{server.Count, client.Elapsed}.rate() / per
	}
}

func completed(client, _ tally) float64 { return client.rate() }

var metrics = []metric{
	{"tcp", "Gbit/s", received(1e9 / 8)},
	{"rr", "transactions/s", completed},
	{"udp", "packets/s", received(1)},
	{"crr", "connections/s", completed},
}

// What is measured besides traffic.
const (
	metricPrograms = "ns"         // the programs by BPF_PROG_TEST_RUN
	metricAttach   = "attach"     // time of Attach, and the agent's memory
	metricFlows    = "flows"      // a look-up among many flows, and their collection
	metricApply    = "apply"      // a large topology
	metricFDB      = "fdb"        // a frame to one of many endpoints
	metricFlood    = "flood"      // one more copy of a frame for many
	metricMasq     = "masquerade" // very many flows to one server outside
)

// metricNames are all, those of the traffic first.
func metricNames() []string {
	return append(trafficNames(), metricPrograms, metricAttach, metricFlows, metricApply, metricFDB, metricFlood, metricMasq)
}

func trafficNames() []string {
	var names []string
	for _, m := range metrics {
		names = append(names, m.name)
	}
	return names
}

func metricNamed(name string) metric {
	for _, m := range metrics {
		if m.name == name {
			return m
		}
	}
	panic("no metric " + name) // the options were checked
}

// traffic runs one sample: a server and a client, each a process in its namespace.
func (b *bed) traffic(ctx context.Context, kind string, family int, length time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, length+patience)
	defer cancel()
	args := func(role string, at ns, addr netip.Addr) []string {
		return []string{role, "--netns", string(at), "--metric", kind, "--sample", length.String(), "--addr", addr.String()}
	}
	server, err := startServer(ctx, nil, args("serve", b.server, b.listen[family]))
	if err != nil {
		return 0, err
	}
	sent, sendErr := runClient(ctx, args("send", b.client, b.addr[family]))
	if sendErr != nil {
		cancel() // nothing more will reach the server
	}
	got, err := server.finish()
	if sendErr != nil || err != nil {
		return 0, errors.Join(sendErr, err)
	}
	return metricNamed(kind).rate(sent, got), nil
}

// server is the far end of a sample while it runs.
type server struct {
	cmd *exec.Cmd
	out *bufio.Reader
	err *bytes.Buffer
}

// self makes a command of this very binary, with a Go runtime that keeps out of the way: one thread, no
// collection, no preemption by signals.
func self(ctx context.Context, args []string) (*exec.Cmd, *bytes.Buffer) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "GOGC=off", "GODEBUG=asyncpreemptoff=1")
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	return cmd, stderr
}

// startServer returns when the server listens. in is its input, or nil.
func startServer(ctx context.Context, in *os.File, args []string) (*server, error) {
	cmd, stderr := self(ctx, args)
	if in != nil {
		cmd.Stdin = in
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe to the server: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	s := &server{cmd, bufio.NewReader(out), stderr}
	if _, err := s.out.ReadString('\n'); err != nil {
		_, err = s.finish()
		return nil, errors.Join(errors.New("the server did not get ready"), err)
	}
	return s, nil
}

func (s *server) finish() (tally, error) {
	out, readErr := io.ReadAll(s.out)
	if err := s.cmd.Wait(); err != nil {
		return tally{}, fmt.Errorf("server: %w: %s", err, bytes.TrimSpace(s.err.Bytes()))
	}
	if readErr != nil {
		return tally{}, fmt.Errorf("read the server's tally: %w", readErr)
	}
	return parseTally(out)
}

func runClient(ctx context.Context, args []string) (tally, error) {
	cmd, stderr := self(ctx, args)
	out, err := cmd.Output()
	if err != nil {
		return tally{}, fmt.Errorf("client: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return parseTally(out)
}

func parseTally(out []byte) (tally, error) {
	var t tally
	if err := json.Unmarshal(out, &t); err != nil {
		return t, fmt.Errorf("tally %q: %w", out, err)
	}
	if t.Count == 0 || t.Elapsed <= 0 {
		return t, fmt.Errorf("tally %q: nothing was counted", bytes.TrimSpace(out))
	}
	return t, nil
}
