// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Command is one to run in a node.
type Command struct {
	Args                  []string
	Env                   []string // the caller's; PATH and where containerd is are the node's
	Stdin, Stdout, Stderr *os.File
}

// Exec runs a command in the node's namespaces, as if typed on that host, and returns its exit
// status: 128 + n where signal n ended it, 127 where there is no such program.
func Exec(lab, node string, c Command) (status int, err error) {
	first, record, err := findNode(lab, node)
	if err != nil {
		return 0, err
	}
	type result struct {
		status int
		err    error
	}
	done := make(chan result, 1)
	go func() {
		// Never unlocked: the thread is in the node for good, and ends with this goroutine.
		runtime.LockOSThread()
		status, err := runInside(first, nodeCgroups(record, node), record.Path, c)
		done <- result{status, err}
	}()
	r := <-done
	return r.status, r.err
}

// findNode returns the first process of a node that is up.
func findNode(lab, node string) (process, record, error) {
	if err := CheckName(lab); err != nil {
		return process{}, record{}, err
	}
	r, err := readRecord(lab)
	if errors.Is(err, os.ErrNotExist) {
		return process{}, r, notUp(lab)
	}
	if err != nil {
		return process{}, r, fmt.Errorf("lab %q: %w", lab, err)
	}
	known := slices.ContainsFunc(r.Nodes, func(n nodeRecord) bool { return n.Name == node })
	if !known {
		return process{}, r, fmt.Errorf("lab %q has no node %q; it has %s", lab, node, r.nodeNames())
	}
	var first process
	err = readJSON(initPath(lab, node), &first)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return first, r, err
	}
	if !first.alive() {
		return first, r, fmt.Errorf("node %q of lab %q is not running; `%s`, then up again", node, lab, downCommand(lab))
	}
	return first, r, nil
}

func (r record) nodeNames() string {
	var names []string
	for _, n := range r.Nodes {
		names = append(names, n.Name)
	}
	return strings.Join(names, ", ")
}

func notUp(lab string) error {
	others := Names()
	if len(others) == 0 {
		return fmt.Errorf("lab %q is not up; `lace lab up TOPOLOGY` makes it", lab)
	}
	return fmt.Errorf("lab %q is not up; these are: %s (choose with --name)", lab, strings.Join(others, ", "))
}

func nodeCgroups(r record, node string) []string {
	var dirs []string
	for _, dir := range r.Cgroups {
		dirs = append(dirs, leafOf(filepath.Join(dir, node)))
	}
	return dirs
}

// runInside moves the calling thread into the node and starts the command from there. The PID
// namespace holds only for what the thread starts, so this process waits outside.
func runInside(first process, cgroups, path []string, c Command) (int, error) {
	cwd, err := os.Getwd()
	if err != nil {
		cwd = "/"
	}
	if err := joinNode(first, cgroups); err != nil {
		return 0, err
	}
	cmd, err := prepare(c, path, cwd)
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		fmt.Fprintf(c.Stderr, "lace: %s: no such program in the node\n", c.Args[0])
		return 127, nil
	}
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start %s in the node: %w", c.Args[0], err)
	}
	stop := forwardSignals(cmd.Process, isTerminal(c.Stdin))
	defer stop()
	return exitStatus(cmd.Wait())
}

// joinNode enters all namespaces of the node. The mount namespace comes last: what names the others
// is found in the caller's /proc.
func joinNode(first process, cgroups []string) error {
	kinds := []struct {
		name string
		flag int
	}{
		{"cgroup", unix.CLONE_NEWCGROUP}, {"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS},
		{"net", unix.CLONE_NEWNET}, {"pid", unix.CLONE_NEWPID}, {"mnt", unix.CLONE_NEWNS},
	}
	for _, dir := range cgroups {
		if err := joinCgroup(dir); err != nil {
			return fmt.Errorf("join the node's cgroup: %w", err)
		}
	}
	// A thread that shares its root directory with others may not change its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("part from the other threads: %w", err)
	}
	for _, kind := range kinds {
		file, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", first.PID, kind.name))
		if err != nil {
			return fmt.Errorf("find the node's %s namespace: %w", kind.name, err)
		}
		err = unix.Setns(int(file.Fd()), kind.flag)
		file.Close()
		if err != nil {
			return fmt.Errorf("enter the node's %s namespace: %w", kind.name, err)
		}
	}
	return nil
}

func prepare(c Command, path []string, cwd string) (*exec.Cmd, error) {
	program, err := lookPath(c.Args[0], nodePath(path))
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: append([]string{"lace", "lab", ExecCommand, program}, c.Args...),
		Env:   append(append(slices.Clone(c.Env), clientEnv()...), "PATH="+nodePath(path)),
		Stdin: c.Stdin, Stdout: c.Stdout, Stderr: c.Stderr,
		Dir: "/",
	}
	if stat, err := os.Stat(cwd); err == nil && stat.IsDir() {
		cmd.Dir = cwd
	}
	return cmd, nil
}

// ExecCommand is the word behind `lace lab` by which the binary becomes a command in a node.
const ExecCommand = "__exec"

// Become executes a program (args: its path, then its arguments from the zeroth on) so that it ends
// when whoever waits for it outside does, however roughly. Go's own field for that takes a parent in another
// PID namespace for a dead one.
func Become(args []string) error {
	if len(args) < 2 {
		return errors.New("this is an internal command of `lace lab exec`")
	}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("tie the command to its parent: %w", err)
	}
	err := syscall.Exec(args[0], args[1:], os.Environ())
	return fmt.Errorf("start %s in the node: %w", args[0], err)
}

// lookPath finds a program as the node sees it; exec.LookPath would use the caller's PATH.
func lookPath(name, path string) (string, error) {
	if strings.Contains(name, "/") {
		return exec.LookPath(name)
	}
	for dir := range strings.SplitSeq(path, ":") {
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return found, nil
		}
	}
	return "", exec.ErrNotFound
}

// forwardSignals passes on what is meant for the command. An interrupt from a terminal reaches it by
// itself, as one of the terminal's foreground processes, and would come twice.
func forwardSignals(p *os.Process, terminal bool) (stop func()) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case sig := <-signals:
				if terminal && (sig == unix.SIGINT || sig == unix.SIGQUIT) {
					continue
				}
				_ = p.Signal(sig) // it may have ended already
			case <-done:
				return
			}
		}
	}()
	return func() { signal.Stop(signals); close(done) }
}

func isTerminal(f *os.File) bool {
	if f == nil {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func exitStatus(err error) (int, error) {
	var exit *exec.ExitError
	if err == nil {
		return 0, nil
	}
	if !errors.As(err, &exit) {
		return 0, err
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return exit.ExitCode(), nil
}
