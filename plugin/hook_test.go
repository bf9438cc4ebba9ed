// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lace-net/lace/plugin/wire"
)

const patience = 20 * time.Second

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// serve runs a receiver on a fresh socket and returns its path.
func serve(t *testing.T, h handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "lace.sock")
	l, err := listen(path, h, discard())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- l.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

func ok(context.Context, wire.Message) wire.Answer { return wire.Answer{} }

func createMessage(id string) wire.Message {
	return wire.Message{Version: wire.Version, Stage: wire.CreateRuntime, Namespace: "default", State: &wire.State{ID: id}}
}

func ask(t *testing.T, path string, m wire.Message) wire.Answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	a, err := wire.Ask(ctx, path, m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestReceiverAnswers(t *testing.T) {
	path := serve(t, func(_ context.Context, m wire.Message) wire.Answer {
		return wire.Answer{Error: "no room for " + m.State.ID}
	})
	if a := ask(t, path, createMessage("c1")); a.Error != "no room for c1" {
		t.Errorf("answer %+v", a)
	}
}

func TestSocketIsForRootAlone(t *testing.T) {
	path := serve(t, ok)
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if got := st.Mode().Perm(); got != want {
			t.Errorf("%s has mode %o, want %o", p, got, want)
		}
	}
}

// send writes b as it is, half-closes and returns what comes back.
func send(t *testing.T, path string, b string) string {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, b) // the receiver may hang up in the middle of an oversize message
	conn.(*net.UnixConn).CloseWrite()
	answer, _ := io.ReadAll(conn)
	return string(answer)
}

func TestReceiverRefusesBadMessages(t *testing.T) {
	path := serve(t, func(context.Context, wire.Message) wire.Answer {
		t.Error("a bad message reached the handler")
		return wire.Answer{}
	})
	tests := []struct{ name, message, want string }{
		{"empty", "", "message is empty"},
		{"no JSON", "hello", "invalid character"},
		{"cut short", `{"version":2,"stage":"createRun`, "unexpected end"},
		{"two values", `{}{}`, "after top-level value"},
		{"wrong type", `{"version":"one"}`, "cannot unmarshal"},
		{"other version", `{"version":1,"stage":"createRuntime"}`, "version 1, this agent speaks 2"},
		{"unknown stage", `{"version":2,"stage":"prestart"}`, `unknown stage \"prestart\"`},
		{"no state", `{"version":2,"stage":"createRuntime","namespace":"default"}`, "needs an OCI state"},
		{"no CNI part", `{"version":2,"stage":"cniAdd","namespace":"k8s.io","state":{"id":"a"}}`, "needs a CNI part"},
		{"path as id", `{"version":2,"stage":"poststop","namespace":"default","state":{"id":"../a"}}`, "is no container id"},
		{"path as namespace", `{"version":2,"stage":"poststop","namespace":"a/b","state":{"id":"a"}}`, "is no containerd namespace"},
		{"long id", `{"version":2,"stage":"poststop","namespace":"a","state":{"id":"` + strings.Repeat("a", 200) + `"}}`, "is no container id"},
		{"deep nesting", strings.Repeat("[", 60<<10), "exceeded max depth"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := send(t, path, tt.message); !strings.Contains(got, tt.want) {
				t.Errorf("answer %q, want %q", got, tt.want)
			}
		})
	}
}

func TestReceiverOutlivesOversizeMessages(t *testing.T) {
	path := serve(t, ok)
	send(t, path, strings.Repeat("a", wire.MaxMessage+1)) // the answer may be lost to a reset; the agent is not
	if a := ask(t, path, createMessage("c1")); a.Error != "" {
		t.Errorf("answer %+v", a)
	}
	big := createMessage("c1")
	big.State.Annotations = map[string]string{"a": strings.Repeat("a", wire.MaxMessage)}
	if _, err := wire.Ask(context.Background(), path, big); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("sender's error %v", err)
	}
}

func TestSlowAndHalfOpenPeersDoNotBlockOthers(t *testing.T) {
	path := serve(t, ok)
	for range maxConversations / 2 {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		io.WriteString(conn, `{"version":`) // and no more, and no end
	}
	if a := ask(t, path, createMessage("c1")); a.Error != "" {
		t.Errorf("answer %+v", a)
	}
}

func TestSlowPeerIsGivenUp(t *testing.T) {
	path := serve(t, ok)
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, `{"version":`)
	conn.SetReadDeadline(time.Now().Add(patience))
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(answer), "i/o timeout") {
		t.Errorf("answer %q, error %v", answer, err)
	}
}

func TestConversationsAreBounded(t *testing.T) {
	var now, most atomic.Int32
	release := make(chan struct{})
	path := serve(t, func(context.Context, wire.Message) wire.Answer {
		for n := now.Add(1); ; {
			if m := most.Load(); n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		<-release
		now.Add(-1)
		return wire.Answer{}
	})
	var all sync.WaitGroup
	for range maxConversations + 16 {
		all.Go(func() {
			if a := ask(t, path, createMessage("c1")); a.Error != "" {
				t.Errorf("answer %+v", a)
			}
		})
	}
	for deadline := time.Now().Add(patience); now.Load() < maxConversations; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d conversations, want %d", now.Load(), maxConversations)
		}
	}
	close(release)
	all.Wait()
	if most.Load() > maxConversations {
		t.Errorf("%d conversations at once, want at most %d", most.Load(), maxConversations)
	}
}

func TestListenReplacesOnlyWhatIsStale(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "lace.sock")
	listen := func(path string) error {
		l, err := listen(path, nil, discard())
		if err == nil {
			l.socket.Close()
		}
		return err
	}
	first, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	first.SetUnlinkOnClose(false)
	if err := listen(path); err == nil || !strings.Contains(err.Error(), "another agent is listening") {
		t.Fatalf("second agent: %v", err)
	}
	first.Close() // as a killed agent leaves it
	if err := listen(path); err != nil {
		t.Fatalf("after a killed agent: %v", err)
	}

	file := filepath.Join(dir, "file")
	os.WriteFile(file, []byte("precious"), 0o644)
	if err := listen(file); err == nil || !strings.Contains(err.Error(), "file of another kind") {
		t.Errorf("foreign file: %v", err)
	}
	link := filepath.Join(dir, "link")
	os.Symlink(file, link)
	if err := listen(link); err == nil || !strings.Contains(err.Error(), "file of another kind") {
		t.Errorf("foreign link: %v", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Errorf("the foreign file holds %q now", b)
	}
}

// TestOnlyRootIsHeard opens the socket to all and has a user without rights send a message.
func TestOnlyRootIsHeard(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to send as another user; run it as root")
	}
	dir, err := os.MkdirTemp("/tmp", "lace-peer-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "lace.sock")
	refuse := func(context.Context, wire.Message) wire.Answer { return wire.Answer{Error: "heard"} }
	l, err := listen(path, refuse, discard())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- l.run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	os.Chmod(dir, 0o755)
	os.Chmod(path, 0o666)
	binary := filepath.Join(dir, "peer")
	self, _ := os.ReadFile("/proc/self/exe")
	if err := os.WriteFile(binary, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-test.run=^TestPeerProcess$", "-test.v")
	cmd.Env = append(os.Environ(), "LACE_TEST_PEER="+path)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "with uid 65534: only root may send one") {
		t.Errorf("error %v, output:\n%s", err, out)
	}
}

// TestPeerProcess is the other side of TestOnlyRootIsHeard.
func TestPeerProcess(t *testing.T) {
	path := os.Getenv("LACE_TEST_PEER")
	if path == "" {
		t.Skip("is a part of TestOnlyRootIsHeard, which runs it")
	}
	t.Log(ask(t, path, createMessage("c1")).Error)
}
