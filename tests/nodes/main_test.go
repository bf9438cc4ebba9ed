// SPDX-License-Identifier: Apache-2.0

// Package nodes joins several nodes on one machine: each is a network namespace with an agent of its own, a
// process that can be stopped, killed and replaced like the real one. Kernel and packets are real. The tests run in
// mount and network namespaces of their own, so that nothing of theirs can outlive them or meet the host.
package nodes

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/tests/slow"
)

// The test binary runs as three things, told by its environment.
const (
	insideVariable = "LACE_NODES_INSIDE" // the tests, in their own namespaces
	agentVariable  = "LACE_NODES_AGENT"  // an agent: agentSetup as JSON
)

// inVM is set where processors are emulated, 20 to 45 times slower.
var inVM = os.Getenv("LACE_VM") != ""

var takesLong = slow.TakesLong

// patience bounds every wait for a condition.
var patience = func() time.Duration {
	if inVM {
		return 2 * time.Minute
	}
	return 20 * time.Second
}()

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(agentVariable) != "":
		os.Exit(serve(os.Getenv(agentVariable)))
	case os.Getenv(insideVariable) != "":
		os.Exit(inside(m))
	case os.Geteuid() != 0:
		os.Exit(m.Run()) // each test skips and says why
	}
	os.Exit(enter())
}

// enter runs this binary again in new namespaces, and ends as it ends.
func enter() int {
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideVariable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	var ended *exec.ExitError
	if errors.As(err, &ended) && ended.ExitCode() > 0 {
		return ended.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "run the tests in namespaces of their own:", err)
		return 1
	}
	return 0
}

// inside gives the tests a /run/netns and a BPF file system that vanish with them.
func inside(m *testing.M) int {
	err := errors.Join(
		os.MkdirAll("/run/netns", 0o755),
		unix.Mount("tmpfs", "/run/netns", "tmpfs", 0, ""),
		unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, ""))
	if err != nil {
		fmt.Fprintln(os.Stderr, "mount what the tests need:", err)
		return 1
	}
	return m.Run()
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces: run the tests as root")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// until polls for a condition.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain: %s", what)
}
