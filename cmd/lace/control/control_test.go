// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/plugin/socket"
	"github.com/lace-net/lace/topology"
)

const patience = 30 * time.Second

// serve runs a server on a fresh socket and returns its path.
func serve(t *testing.T, h Handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "control.sock")
	start(t, path, h)
	return path
}

func start(t *testing.T, path string, h Handler) {
	t.Helper()
	s, err := Listen(path, h, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// echo answers with what was asked.
func echo(_ context.Context, r Request) Answer { return Answer{File: r.Do + " " + r.Topology} }

// mute fails the test when a request comes through.
func mute(t *testing.T) Handler {
	return func(context.Context, Request) Answer {
		t.Error("a bad request reached the handler")
		return Answer{}
	}
}

func ask(t *testing.T, path string, r Request) *Answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	a, err := Ask(ctx, path, r)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAskAndAnswer(t *testing.T) {
	path := serve(t, echo)
	if a := ask(t, path, Request{Do: Apply, Topology: "0123"}); a.File != "apply 0123" || a.Refusal() != nil {
		t.Errorf("got %+v", a)
	}
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

// What a device is to be arrives as it was sent, what it has become as it was answered.
func TestDevicesArriveAsTheyAre(t *testing.T) {
	sent := Device{Device: "tap0", Network: "lan", Name: "vm-1", IPs: []netip.Addr{netip.MustParseAddr("10.50.0.200")}, MAC: plan.MAC{2, 0, 0, 0, 0, 1}}
	got := Joined{Interface: "tap0", Network: "lan", Addresses: []netip.Prefix{netip.MustParsePrefix("10.50.0.200/24")}, Gateways: []netip.Addr{}, MAC: sent.MAC, MTU: 1500, Overhead: 58}
	path := serve(t, func(_ context.Context, r Request) Answer {
		if r.Do != Attach || !reflect.DeepEqual(*r.Device, sent) {
			t.Errorf("got %s %+v", r.Do, r.Device)
		}
		return Answer{Joined: &got}
	})
	if a := ask(t, path, Request{Do: Attach, Device: &sent}); !reflect.DeepEqual(*a.Joined, got) {
		t.Errorf("got %+v", a.Joined)
	}
}

// What is wrong with a file has to arrive as it was found: it decides the exit code.
func TestErrorsOfTheFileStayWhatTheyAre(t *testing.T) {
	wrong := topology.Errors{{File: "topology.toml", Line: 7, Key: "node.a.locater", Problem: "unknown key", Fix: `did you mean "locator"?`}}
	path := serve(t, func(_ context.Context, r Request) Answer {
		if r.Do == Apply {
			return Refuse(wrong)
		}
		return Refuse(errors.New("no room"))
	})
	var got topology.Errors
	if err := ask(t, path, Request{Do: Apply}).Refusal(); !errors.As(err, &got) || got.Error() != wrong.Error() {
		t.Errorf("got %v, want %v", err, wrong)
	}
	if err := ask(t, path, Request{Do: Plan}).Refusal(); err == nil || errors.As(err, &got) || err.Error() != "no room" {
		t.Errorf("got %v", err)
	}
}

func TestNoAgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	if _, err := Ask(t.Context(), path, Request{Do: Plan}); !errors.Is(err, ErrNoAgent) || !strings.Contains(err.Error(), path) {
		t.Errorf("without a socket: %v", err)
	}
	stale(t, path)
	if _, err := Ask(t.Context(), path, Request{Do: Plan}); !errors.Is(err, ErrNoAgent) {
		t.Errorf("with a stale socket: %v", err)
	}
}

// stale leaves a socket as a killed agent does.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestAskGivesUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	l, err := net.Listen("unix", path) // and nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Ask(ctx, path, Request{Do: Apply}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// say writes b as it is, half-closes and returns what comes back.
func say(t *testing.T, path, b string) string {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, b) // the server may hang up in the middle of an oversize request
	conn.(*net.UnixConn).CloseWrite()
	answer, _ := io.ReadAll(conn)
	return string(answer)
}

func TestBadRequestsAreRefused(t *testing.T) {
	path := serve(t, mute(t))
	for _, tt := range []struct{ name, request, want string }{
		{"no JSON", "hello", "invalid character"},
		{"cut short", `{"version":1,"do":"app`, "unexpected end"},
		{"two values", `{}{}`, "after top-level value"},
		{"wrong type", `{"version":"one"}`, "cannot unmarshal"},
		{"other version", `{"version":2,"do":"plan"}`, "version 2, this agent speaks 1"},
		{"unknown", `{"version":1,"do":"stop"}`, "known are plan, apply, attach and detach"},
		{"nothing asked", `{"version":1}`, "known are plan, apply, attach and detach"},
		{"no device", `{"version":1,"do":"attach"}`, "request to attach names no device"},
		{"no device to detach", `{"version":1,"do":"detach"}`, "request to detach names no device"},
		{"no name", `{"version":1,"do":"detach","device":{}}`, "is no name of an interface"},
		{"long name", `{"version":1,"do":"detach","device":{"device":"0123456789abcdef"}}`, "is no name of an interface"},
		{"path", `{"version":1,"do":"attach","device":{"device":"../x","network":"lan"}}`, "is no name of an interface"},
		{"dots", `{"version":1,"do":"attach","device":{"device":"..","network":"lan"}}`, "is no name of an interface"},
		{"no network", `{"version":1,"do":"attach","device":{"device":"tap0"}}`, "is no network name"},
		{"bad network", `{"version":1,"do":"attach","device":{"device":"tap0","network":"l\n"}}`, "is no network name"},
		{"bad name", `{"version":1,"do":"attach","device":{"device":"tap0","network":"lan","name":"a b"}}`, "is no name: one has"},
		{"bad address", `{"version":1,"do":"attach","device":{"device":"tap0","network":"lan","ips":["10.0.0"]}}`, "ParseAddr"},
		{"empty address", `{"version":1,"do":"attach","device":{"device":"tap0","network":"lan","ips":[""]}}`, "is no address of a network"},
		{"zone", `{"version":1,"do":"attach","device":{"device":"tap0","network":"lan","ips":["fe80::1%eth0"]}}`, "is no address of a network"},
		{"two of a family", `{"version":1,"do":"attach","device":{"device":"tap0","network":"lan","ips":["10.0.0.1","10.0.0.2"]}}`, "at most one address of each family"},
		{"bad MAC", `{"version":1,"do":"attach","device":{"device":"tap0","network":"lan","mac":"02:00"}}`, "is no Ethernet address"},
		{"oversize", strings.Repeat(" ", maxRequest+1), "larger than"},
	} {
		if got := say(t, path, tt.request); !strings.Contains(got, tt.want) {
			t.Errorf("%s: answer %q, want %q", tt.name, got, tt.want)
		}
	}
	if got := say(t, path, ""); got != "" {
		t.Errorf("who says nothing gets %q", got)
	}
}

func TestServerOutlivesOversizeRequests(t *testing.T) {
	path := serve(t, echo)
	say(t, path, strings.Repeat("a", 100*maxRequest)) // the answer may be lost to a reset; the agent is not
	if a := ask(t, path, Request{Do: Plan}); a.File != "plan " {
		t.Errorf("got %+v", a)
	}
	if _, err := Ask(t.Context(), path, Request{Do: Plan, Topology: strings.Repeat("a", maxRequest)}); !errors.Is(err, errTooLarge) {
		t.Errorf("the caller's error: %v", err)
	}
}

func TestSlowAndHalfOpenCallersDoNotBlockOthers(t *testing.T) {
	path := serve(t, echo)
	for range maxConversations / 2 {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		io.WriteString(conn, `{"version":`) // and no more, and no end
	}
	if a := ask(t, path, Request{Do: Plan}); a.File != "plan " {
		t.Errorf("got %+v", a)
	}
}

func TestSlowCallerIsGivenUp(t *testing.T) {
	path := serve(t, mute(t))
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
	path := serve(t, func(context.Context, Request) Answer {
		for n := now.Add(1); ; {
			if m := most.Load(); n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		<-release
		now.Add(-1)
		return Answer{}
	})
	var all sync.WaitGroup
	for range maxConversations + 8 {
		all.Go(func() {
			if err := ask(t, path, Request{Do: Plan}).Refusal(); err != nil {
				t.Error(err)
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
	listen := func(path string) error {
		s, err := Listen(path, echo, slog.New(slog.DiscardHandler))
		if err == nil {
			err = s.Close()
		}
		return err
	}
	path := filepath.Join(dir, "control.sock")
	first, err := Listen(path, echo, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := listen(path); err == nil || !strings.Contains(err.Error(), "another agent is listening") {
		t.Fatalf("second agent: %v", err)
	}
	first.Close()
	stale(t, path)
	if err := listen(path); err != nil {
		t.Errorf("after a killed agent: %v", err)
	}
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	os.WriteFile(file, []byte("precious"), 0o644)
	os.Symlink(file, link)
	for _, p := range []string{file, link} {
		if err := listen(p); err == nil || !strings.Contains(err.Error(), "file of another kind") {
			t.Errorf("%s: %v", p, err)
		}
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Errorf("the foreign file holds %q now", b)
	}
	if err := listen(filepath.Join(dir, strings.Repeat("a", socket.MaxPath))); err == nil || !strings.Contains(err.Error(), "shorter directory") {
		t.Errorf("a long path: %v", err)
	}
}

// TestOnlyRootIsHeard opens the socket to all and has a user without rights send a request.
func TestOnlyRootIsHeard(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to send as another user; run it as root")
	}
	dir, err := os.MkdirTemp("/tmp", "lace-control-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "control.sock")
	start(t, path, mute(t))
	os.Chmod(dir, 0o755)
	os.Chmod(path, 0o666)
	binary := filepath.Join(dir, "caller")
	self, _ := os.ReadFile("/proc/self/exe")
	if err := os.WriteFile(binary, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-test.run=^TestCallerProcess$", "-test.v")
	cmd.Env = append(os.Environ(), "LACE_TEST_CALLER="+path)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "with uid 65534: only root may send one") {
		t.Errorf("error %v, output:\n%s", err, out)
	}
}

// TestCallerProcess is the other side of TestOnlyRootIsHeard.
func TestCallerProcess(t *testing.T) {
	path := os.Getenv("LACE_TEST_CALLER")
	if path == "" {
		t.Skip("is a part of TestOnlyRootIsHeard, which runs it")
	}
	t.Log(ask(t, path, Request{Do: Apply}).Error)
}

func FuzzParseRequest(f *testing.F) {
	for _, s := range []string{`{"version":1,"do":"attach","device":{"device":"tap0","network":"lan","ips":["10.0.0.1","fd00::1"],"mac":"02:00:00:00:00:01"}}`, `{"version":1,"do":"detach","device":{"device":"tap0"}}`, `{"version":1,"do":"plan"}`, `{"version":1,"do":"apply","topology":"00ff"}`, `{"version":2}`, `[`, ``} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRequest(b)
		if err != nil {
			return
		}
		device := r.Do == Attach || r.Do == Detach
		if r.Version != Version || r.Do != Plan && r.Do != Apply && !device || device && (r.Device == nil || r.Device.Device == "") {
			t.Errorf("%q was taken as %+v", b, r)
		}
	})
}
