// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/topology"
)

// StageCommand is the word behind `lace lab` by which the binary starts itself as a node.
const StageCommand = "__node"

// Descriptors of the first process of a node, behind the three usual ones.
const (
	specFD   = 3 // it reads its spec here, and ends where there is none
	statusFD = 4 // it writes here what went wrong, or "ok"
	logsFD   = 5 // and one log for each of spec.Programs from here on
)

const (
	stageWait = 90 * time.Second // for a node's mounts and the start of its programs
	readyWait = 60 * time.Second // for a program to make its socket
)

// Spec is all that a node has to know of itself.
type Spec struct {
	Hostname string
	Cgroups  []string // the node's own directories, one a hierarchy
	Dirs     []string // directories that the node has for itself, empty at first
	Files    []File
	Programs []Program
	Sysctls  map[string]string // "net/ipv6/…" → value
}

// File is one that a node finds: with a content, or as a link to a file of the machine.
type File struct {
	Path    string
	Content []byte
	Link    string
}

// Program runs for as long as the node does.
type Program struct {
	Name   string // of its log
	Args   []string
	Env    []string
	Socket string // it is ready when this is there; the next program waits for that
}

// nodeInit is the first process of a node, seen from outside.
type nodeInit struct {
	lab    string
	node   *topology.Node
	cmd    *exec.Cmd
	spec   *os.File // write end
	status *os.File // read end
}

func (n *nodeInit) close() {
	n.spec.Close()
	n.status.Close()
}

func closeAll(inits []*nodeInit) {
	for _, n := range inits {
		n.close()
	}
}

// eachNode runs f for all nodes side by side and returns all that went wrong.
func eachNode(inits []*nodeInit, f func(*nodeInit) error) error {
	results := make(chan error, len(inits))
	for _, n := range inits {
		go func() {
			err := f(n)
			if err != nil {
				err = fmt.Errorf("node %q: %w", n.node.Name, err)
			}
			results <- err
		}()
	}
	var errs []error
	for range inits {
		errs = append(errs, <-results)
	}
	return errors.Join(errs...)
}

// startNodes starts the first processes. Each is recorded before it gets its spec and does anything;
// if this process dies in between, the spec's pipe closes and the node ends by itself.
func startNodes(o *Options, nodes []*topology.Node) ([]*nodeInit, error) {
	var inits []*nodeInit
	for _, node := range nodes {
		n, err := startNode(o, node)
		if err != nil {
			closeAll(inits)
			return nil, fmt.Errorf("start node %q: %w", node.Name, err)
		}
		inits = append(inits, n)
	}
	return inits, nil
}

func startNode(o *Options, node *topology.Node) (*nodeInit, error) {
	logs, err := openLogs(o, node)
	if err != nil {
		return nil, err
	}
	defer closeFiles(logs)
	specRead, specWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer specRead.Close()
	statusRead, statusWrite, err := os.Pipe()
	if err != nil {
		specWrite.Close()
		return nil, err
	}
	defer statusWrite.Close()
	cmd := exec.Command("/proc/self/exe", "lab", StageCommand, o.Name, node.Name)
	cmd.Args[0] = "lace"
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = logs[0], logs[0]
	cmd.ExtraFiles = append([]*os.File{specRead, statusWrite}, logs[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS |
			unix.CLONE_NEWIPC | unix.CLONE_NEWPID,
	}
	n := &nodeInit{lab: o.Name, node: node, cmd: cmd, spec: specWrite, status: statusRead}
	if err := cmd.Start(); err != nil {
		n.close()
		return nil, fmt.Errorf("make its namespaces: %w", err)
	}
	if err := n.record(); err != nil {
		n.close()
		return nil, err
	}
	go cmd.Wait() // should it end while we are here, it does not stay as a zombie
	return n, nil
}

func (n *nodeInit) record() error {
	first, err := identify(n.cmd.Process.Pid)
	if err != nil {
		return err
	}
	return writeJSON(initPath(n.lab, n.node.Name), first)
}

func openLogs(o *Options, node *topology.Node) ([]*os.File, error) {
	var logs []*os.File
	names := []string{"node"}
	for _, p := range o.programs(node) {
		names = append(names, p.Name)
	}
	for _, name := range names {
		file, err := os.OpenFile(logPath(o.Name, node.Name, name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			closeFiles(logs)
			return nil, err
		}
		logs = append(logs, file)
	}
	return logs, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// bringUp hands the node its spec and returns when its programs are ready and have their image.
func (n *nodeInit) bringUp(ctx context.Context, o *Options, cgroups []string) error {
	if err := n.send(o.spec(n.node, cgroups)); err != nil {
		return err
	}
	programs := o.programs(n.node)
	for _, p := range programs {
		if err := n.awaitSocket(ctx, p); err != nil {
			return err
		}
		if p.Name == containerdProgram {
			if err := o.Stack.importImage(ctx, n.lab, n.node.Name); err != nil {
				return err
			}
		}
	}
	o.logf("node %s: %s", n.node.Name, describe(programs))
	return nil
}

func describe(programs []Program) string {
	var names []string
	for _, p := range programs {
		names = append(names, p.Name)
	}
	if len(names) == 0 {
		return "ready"
	}
	return "ready, with " + strings.Join(names, " and ")
}

func (n *nodeInit) send(spec Spec) error {
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if _, err := n.spec.Write(data); err != nil {
		return fmt.Errorf("hand the node its spec: %w", err)
	}
	n.spec.Close()
	if err := n.status.SetReadDeadline(time.Now().Add(stageWait)); err != nil {
		return err
	}
	answer, err := io.ReadAll(io.LimitReader(n.status, 64<<10))
	if err != nil {
		return fmt.Errorf("wait for its mounts: %w; see `lace lab logs`", err)
	}
	switch said := strings.TrimSpace(string(answer)); said {
	case "ok":
		return nil
	case "":
		return fmt.Errorf("its first process has ended%s", tail(logPath(n.lab, n.node.Name, "node")))
	default:
		return errors.New(said)
	}
}

// awaitSocket polls a program's socket through the node's own root.
func (n *nodeInit) awaitSocket(ctx context.Context, p Program) error {
	path := filepath.Join(fmt.Sprintf("/proc/%d/root", n.cmd.Process.Pid), p.Socket)
	exit := filepath.Join(fmt.Sprintf("/proc/%d/root", n.cmd.Process.Pid), exitPath(p.Name))
	for deadline := time.Now().Add(readyWait); ; {
		if isSocket(path) {
			return nil
		}
		if how, err := os.ReadFile(exit); err == nil {
			return fmt.Errorf("%s has ended: %s%s", p.Name, bytes.TrimSpace(how), tail(logPath(n.lab, n.node.Name, p.Name)))
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %s is not there after %v%s", p.Name, p.Socket, readyWait, tail(logPath(n.lab, n.node.Name, p.Name)))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", p.Name, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// isSocket: a program makes its socket when it is ready, and one left by a predecessor is removed
// before it starts. Calling there would put a caller without a message into its log.
func isSocket(path string) bool {
	stat, err := os.Stat(path)
	return err == nil && stat.Mode().Type() == os.ModeSocket
}

// tail is the end of a log, ready to stand behind an error; empty where the log is.
func tail(path string) string {
	const lines = 12
	data, err := os.ReadFile(path)
	text := strings.TrimSpace(string(data))
	if err != nil || text == "" {
		return ""
	}
	all := strings.Split(text, "\n")
	return "; the end of its log:\n    " + strings.Join(all[max(0, len(all)-lines):], "\n    ")
}
