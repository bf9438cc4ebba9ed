// SPDX-License-Identifier: Apache-2.0

// Package containers tests the way from a client's command line to the data plane, by a real containerd, runc,
// nerdctl, ctr and crictl.
package containers

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/lace-net/lace/plugin"
	"github.com/lace-net/lace/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// bed is a containerd with an agent on a fake data plane.
type bed struct {
	*harness.Containerd
	*fake
	t    *testing.T
	stop func() // ends the agent
}

func newBed(t *testing.T, o harness.Options) *bed {
	t.Helper()
	b := &bed{Containerd: harness.Start(t, o), fake: newFake(), t: t}
	b.startAgent()
	return b
}

// startAgent runs an agent until stop, and returns when it has synchronised.
func (b *bed) startAgent() {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.NewTextHandler(testWriter{b.t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	a := plugin.New(plugin.Options{Socket: b.Agent, Containerd: b.Socket, NRI: b.NRI, Log: log}, b.fake)
	done := make(chan error, 1)
	before := b.syncs()
	go func() { done <- a.Run(ctx) }()
	stopped := false
	b.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("agent: %v", err)
		}
	}
	b.t.Cleanup(b.stop)
	<-a.Ready()
	b.waitSync(before)
}

func (b *bed) waitSync(before int) {
	b.t.Helper()
	b.Eventually("the agent synchronises", func() error {
		if n := b.syncs(); n <= before {
			return fmt.Errorf("%d synchronisations", n)
		}
		return nil
	})
}

// testWriter gives the agent's log to the test.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// refused runs a client that has to fail with all of texts on its terminal.
func (b *bed) refused(texts []string, client string, args ...string) {
	b.t.Helper()
	out, err := b.Try(client, args...)
	if err == nil {
		b.t.Fatalf("%s %s was not refused; it printed:\n%s", client, strings.Join(args, " "), out)
	}
	for _, text := range texts {
		if !strings.Contains(unescape(err.Error()), text) {
			b.t.Errorf("the terminal does not say %q:\n%v", text, err)
		}
	}
}

// unescape undoes the quoting that logging clients put around an error, at any depth.
func unescape(s string) string { return strings.ReplaceAll(s, `\`, "") }

func contains(t *testing.T, out, want string) {
	t.Helper()
	if !strings.Contains(out, want) {
		t.Errorf("want %q in:\n%s", want, out)
	}
}

func absent(t *testing.T, out, not string) {
	t.Helper()
	if strings.Contains(out, not) {
		t.Errorf("want no %q in:\n%s", not, out)
	}
}

// nerdctlRun is the beginning of a nerdctl command line that starts a container of Lace's.
func nerdctlRun(more ...string) []string {
	return append([]string{"run", "--net", "none", "--pull", "never", "--label", "lace.network=backend"}, more...)
}
