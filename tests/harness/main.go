// SPDX-License-Identifier: Apache-2.0

// Package harness runs tests against a real containerd of their own. Main puts the test binary into new PID,
// mount and network namespaces with /run and the state of CNI in memory, so that a
// test can neither touch the host's containerd nor leave a process, mount or interface behind.
package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// stageEnv tells a re-executed test binary what it is: "init" or "tests". Without it, it is what go test started.
const stageEnv = "LACE_HARNESS_STAGE"

// private are the directories that tests see empty. All others are the host's, and are written to only below
// the tests' own temporary directory.
var private = []string{"/run", "/var/lib/cni"}

// Main is to be called by TestMain, and does not return.
func Main(m *testing.M) {
	switch os.Getenv(stageEnv) {
	case "init":
		os.Exit(initProcess())
	case "tests":
		os.Exit(m.Run())
	}
	if os.Getuid() != 0 {
		os.Exit(m.Run()) // each test says why it is skipped, see Need
	}
	os.Exit(enter())
}

// Need skips the test where it cannot run.
func Need(t *testing.T) {
	t.Helper()
	if os.Getenv(stageEnv) != "tests" {
		t.Skip("needs root, for namespaces of its own; run it as root")
	}
	if os.Getenv(toolsEnv) == "" || os.Getenv(imageEnv) == "" {
		t.Skipf("%s or %s is not set; `make test` sets them after `make tools`", toolsEnv, imageEnv)
	}
}

// enter runs this binary again in new namespaces and returns its status.
func enter() int {
	cmd := again("init")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET,
		Pdeathsig:  unix.SIGKILL, // the namespace ends with its first process, and all in it
	}
	if err := cmd.Run(); err != nil {
		return failed("enter the namespaces of the tests", err)
	}
	return 0
}

func again(stage string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageEnv+"="+stage)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd
}

func failed(what string, err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode()
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
	return 1
}

// initProcess is process 1: it prepares the namespaces, starts the tests, and reaps what is orphaned to it.
func initProcess() int {
	if err := prepare(); err != nil {
		return failed("prepare the namespaces of the tests", err)
	}
	before := cgroups()
	defer func() { removeCgroups(before) }()
	tests := again("tests")
	if err := tests.Start(); err != nil {
		return failed("start the tests", err)
	}
	return reap(tests.Process.Pid)
}

// reap waits for all children and returns the status of the one with this pid when that ends.
func reap(tests int) int {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return failed("wait for the tests", err)
		case pid == tests && status.Exited():
			return status.ExitStatus()
		case pid == tests && status.Signaled():
			return 128 + int(status.Signal())
		}
	}
}

// cgroups returns the parents that clients make for the containers of tests and leave behind. Cgroups are the one thing
// that is not a namespace's own here.
func cgroups() map[string]bool {
	found := map[string]bool{}
	for _, pattern := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/"} {
		for _, name := range []string{"default", "lace-test"} {
			paths, _ := filepath.Glob(pattern + name) // the pattern is well formed
			for _, path := range paths {
				found[path] = true
			}
		}
	}
	return found
}

// removeCgroups removes those that were not there before. One that is in use stays: rmdir refuses it.
func removeCgroups(before map[string]bool) {
	for path := range cgroups() {
		if !before[path] {
			_ = unix.Rmdir(path)
		}
	}
}

func prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, dir := range private {
		if err := hide(dir); err != nil {
			return err
		}
	}
	out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	return nil
}

// hide mounts an empty directory over dir. One that the host does not have is made first, and stays as an empty
// directory: nothing else keeps containerd from making and filling it.
func hide(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make %s to hide it: %w", dir, err)
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount an empty %s: %w", dir, err)
	}
	return nil
}
