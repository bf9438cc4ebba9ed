// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lace-net/lace/plugin/wire"
)

// agentThat listens as the agent and answers everything with a.
func agentThat(t *testing.T, a wire.Answer) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lace.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			var m wire.Message
			if wire.Read(conn, &m) == nil {
				wire.Write(conn, a)
			}
			conn.Close()
		}
	}()
	return path
}

// containerdWith answers the two calls over HTTP/2 without TLS, as gRPC does. status is gRPC's.
func containerdWith(t *testing.T, status string, reply []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		w.Write(reply)
		w.Header().Set("Grpc-Status", status)
	})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return path
}

func framed(b []byte) []byte { return append([]byte{0, 0, 0, byte(len(b) >> 8), byte(len(b))}, b...) }

func TestCreateRuntimeHook(t *testing.T) {
	asks := containerdWith(t, "0", framed(containerReply(t, map[string]string{wire.LabelNetwork: "backend"})))
	plain := containerdWith(t, "0", framed(containerReply(t, map[string]string{"app": "web"})))
	unknown := containerdWith(t, "5", nil)
	broken := containerdWith(t, "0", []byte("nonsense"))
	gone := filepath.Join(t.TempDir(), "gone.sock")
	undecided := wire.Answer{Error: "containerd is slow", Undecided: true}
	tests := []struct {
		name, agent, containerd string
		annotations             map[string]string
		status                  int
		stderr                  string // empty: nothing is said
	}{
		{"agent agrees", agentThat(t, wire.Answer{}), gone, nil, 0, ""},
		{"agent refuses", agentThat(t, wire.Answer{Error: "block full"}), plain, nil, 1, "lace: block full"},
		{"agent is undecided, container asks", agentThat(t, undecided), asks, nil, 1, `asks for network "backend", but the Lace agent could not judge it: containerd is slow`},
		{"agent is undecided, container does not ask", agentThat(t, undecided), plain, nil, 0, ""},
		{"no agent, container asks by label", gone, asks, nil, 1, `lace: container asks for network "backend", but the Lace agent is not running (socket ` + gone + `: no such file or directory); start it: systemctl start lace`},
		{"no agent, container asks by annotation", gone, gone, map[string]string{wire.LabelNetwork: "backend"}, 1, "is not running"},
		{"no agent, a wrong label", gone, gone, map[string]string{"lace.ip": "x"}, 1, "is not running"},
		{"no agent, container does not ask", gone, plain, nil, 0, ""},
		{"no agent, no such container", gone, unknown, nil, 0, ""},
		{"nobody knows", gone, gone, nil, 0, "lace: warning: "},
		{"containerd speaks nonsense", gone, broken, nil, 0, "no single gRPC message"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			state, _ := json.Marshal(wire.State{ID: "c1", Pid: 1, Bundle: "/run/containerd/io.containerd.runtime.v2.task/default/c1", Annotations: tt.annotations})
			env := map[string]string{wire.SocketEnv: tt.agent, "GRPC_ADDRESS": tt.containerd}
			var stderr bytes.Buffer
			status := hookMain(wire.CreateRuntime, bytes.NewReader(state), &stderr, func(n string) string { return env[n] })
			if status != tt.status || !strings.Contains(stderr.String(), tt.stderr) || (tt.stderr == "") != (stderr.Len() == 0) {
				t.Errorf("status %d, stderr %q", status, &stderr)
			}
		})
	}
}

func TestPoststopNeverFails(t *testing.T) {
	gone := filepath.Join(t.TempDir(), "gone.sock")
	for _, state := range []string{`{"id":"c1","bundle":"/t/default/c1"}`, "", "{", strings.Repeat("a", wire.MaxMessage+1)} {
		var stderr bytes.Buffer
		if status := hookMain(wire.Poststop, strings.NewReader(state), &stderr, func(string) string { return gone }); status != 0 || stderr.Len() == 0 {
			t.Errorf("state %.20q: status %d, stderr %q", state, status, &stderr)
		}
	}
}

func TestHookRefusesBadInput(t *testing.T) {
	for _, tt := range []struct{ stage, state, want string }{
		{"prestart", "{}", `unknown hook stage "prestart"`},
		{wire.CreateRuntime, "", "message is empty"},
		{wire.CreateRuntime, "{", "unexpected end"},
		{wire.CreateRuntime, strings.Repeat("a", wire.MaxMessage+1), "larger than"},
	} {
		var stderr bytes.Buffer
		if status := hookMain(tt.stage, strings.NewReader(tt.state), &stderr, func(string) string { return "" }); status != 1 || !strings.Contains(stderr.String(), tt.want) {
			t.Errorf("%s %.20q: status %d, stderr %q", tt.stage, tt.state, status, &stderr)
		}
	}
}

func TestNamespaceOf(t *testing.T) {
	s := wire.State{Bundle: "/run/containerd/io.containerd.runtime.v2.task/moby/abc/"}
	if ns := namespaceOf(s, func(string) string { return "" }); ns != "moby" {
		t.Errorf("namespace %q", ns)
	}
	if ns := namespaceOf(s, func(string) string { return "said" }); ns != "said" {
		t.Errorf("namespace %q", ns)
	}
}

func TestNotFoundIsKnown(t *testing.T) {
	c := newContainerd("unix://" + containerdWith(t, "5", nil))
	if _, err := c.labels(context.Background(), "default", "c1"); !errors.Is(err, errNotFound) {
		t.Errorf("error %v", err)
	}
}
