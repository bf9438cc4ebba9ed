// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/topology"
)

// record is what a lab remembers of how it was made.
type record struct {
	Nodes    []nodeRecord // in the order of the topology
	Routed   bool
	Stack    bool // containerd runs in the nodes
	Agent    bool
	Path     []string // in front of the nodes' PATH
	Topology string   // hash
	Cgroups  []string // directories that hold the nodes' cgroups, one a hierarchy
}

type nodeRecord struct {
	Name, Underlay string
	Internet       bool // it stands for external networks: Underlay is an address there
}

// process names a process for as long as the machine runs: a pid alone may be another's by the time
// it is used.
type process struct {
	PID   int
	Start uint64 // clock ticks from boot to the start of the process
	Boot  string // /proc/sys/kernel/random/boot_id
}

func stateDir(lab string) string       { return filepath.Join(stateRoot, lab) }
func nodeDir(lab, node string) string  { return filepath.Join(stateRoot, lab, "nodes", node) }
func recordPath(lab string) string     { return filepath.Join(stateDir(lab), "lab.json") }
func initPath(lab, node string) string { return filepath.Join(nodeDir(lab, node), "init.json") }
func logPath(lab, node, program string) string {
	return filepath.Join(nodeDir(lab, node), program+".log")
}

// createState makes the lab's directory and locks it. That the directory can be made once is what
// keeps a lab from being made twice.
func createState(lab string) (*os.File, error) {
	if left := netnsOf(lab); len(left) > 0 {
		return nil, fmt.Errorf("lab %q is already up, or was left behind: there is %s; take it down: %s",
			lab, filepath.Join(netnsRoot, left[0]), downCommand(lab))
	}
	if err := os.MkdirAll(stateRoot, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of all labs: %w", err)
	}
	err := os.Mkdir(stateDir(lab), 0o700)
	if errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("lab %q is already up, or was left behind: there is %s; take it down: %s",
			lab, stateDir(lab), downCommand(lab))
	}
	if err != nil {
		return nil, fmt.Errorf("make the lab's directory: %w", err)
	}
	return lockState(lab)
}

func downCommand(lab string) string {
	if lab == DefaultName {
		return "lace lab down"
	}
	return "lace lab down --name " + lab
}

// lockWait outlasts a process that is being started: until it runs its own program it shares the
// lock of a `lace lab` that may have been killed meanwhile.
const lockWait = 3 * time.Second

// lockState keeps two commands from making and taking down the same lab at once. The lock goes with
// the process.
func lockState(lab string) (*os.File, error) {
	dir, err := os.Open(stateDir(lab))
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockWait); ; time.Sleep(20 * time.Millisecond) {
		err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			break
		}
	}
	dir.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("lab %q: another `lace lab` is making it or taking it down; wait for that, or interrupt it", lab)
	}
	return nil, fmt.Errorf("lock %s: %w", stateDir(lab), err)
}

func writeRecord(o *Options, nodes []*topology.Node, cgroups []string) error {
	r := record{Routed: o.Routed, Stack: o.Stack != nil, Agent: o.Agent != nil, Path: o.Path,
		Topology: o.Topology.Hash.String(), Cgroups: cgroups}
	for _, n := range nodes {
		r.Nodes = append(r.Nodes, nodeRecord{Name: n.Name, Underlay: n.Underlay.String(), Internet: o.isInternet(n)})
		if err := os.MkdirAll(nodeDir(o.Name, n.Name), 0o700); err != nil {
			return fmt.Errorf("make the directory of node %q: %w", n.Name, err)
		}
	}
	return writeJSON(recordPath(o.Name), r)
}

func readRecord(lab string) (record, error) {
	var r record
	return r, readJSON(recordPath(lab), &r)
}

// writeJSON replaces the file in one step, so that a reader finds the old or the new.
func writeJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	aside := path + ".new"
	if err := os.WriteFile(aside, append(data, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(aside, path)
}

func readJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}

// identify gives a running process its lasting name.
func identify(pid int) (process, error) {
	boot, err := bootID()
	if err != nil {
		return process{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	start, err := startTime(pid)
	return process{PID: pid, Start: start, Boot: boot}, err
}

func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStartTime(stat)
}

// parseStartTime reads field 22 of proc_pid_stat(5). Field 2, the program's name, may hold spaces and
// parentheses: what follows counts from the last one.
func parseStartTime(stat []byte) (uint64, error) {
	const afterName = 22 - 3
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) <= afterName {
		return 0, fmt.Errorf("read the start time of a process: %d fields in its stat, more than %d expected", len(fields), afterName)
	}
	return strconv.ParseUint(string(fields[afterName]), 10, 64)
}

// open returns a pidfd of the process, nil where it is gone. The descriptor is opened before the
// start time is compared, so that what is compared is what a signal will reach.
func (p process) open() (*os.File, error) {
	if p.PID <= 0 {
		return nil, nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", p.PID, err)
	}
	file := os.NewFile(uintptr(fd), "pidfd")
	now, err := identify(p.PID)
	if err != nil || now != p {
		file.Close()
		return nil, nil
	}
	return file, nil
}

func (p process) alive() bool {
	file, err := p.open()
	if err != nil || file == nil {
		return false
	}
	defer file.Close()
	return !exited(file, 0)
}

// exited waits for the end of the process behind a pidfd.
func exited(pidfd *os.File, wait time.Duration) bool {
	deadline := time.Now().Add(wait)
	for {
		left := max(0, time.Until(deadline))
		fds := []unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(left.Milliseconds()))
		if n > 0 {
			return true
		}
		if !errors.Is(err, unix.EINTR) && left == 0 {
			return false
		}
	}
}

// kill ends the process and waits for its end.
func (p process) kill() error {
	file, err := p.open()
	if err != nil || file == nil {
		return err
	}
	defer file.Close()
	err = unix.PidfdSendSignal(int(file.Fd()), unix.SIGKILL, nil, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end process %d: %w", p.PID, err)
	}
	if !exited(file, killWait) {
		return fmt.Errorf("process %d has not ended %v after SIGKILL", p.PID, killWait)
	}
	return nil
}

// killWait is generous: the first process of a node ends only when all others of the node have.
const killWait = 30 * time.Second

// nodesOf lists the nodes that have a directory, whether or not the record is whole.
func nodesOf(lab string) []string {
	entries, err := os.ReadDir(filepath.Join(stateDir(lab), "nodes"))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// endNodes ends the first process of each node. It is the first of a PID namespace, so the kernel
// ends all others of the node with it, containers and their shims too, and their mounts go as well.
func endNodes(lab string) error {
	nodes := nodesOf(lab)
	results := make(chan error, len(nodes))
	for _, node := range nodes {
		go func() { results <- endNode(lab, node) }()
	}
	var errs []error
	for range nodes {
		errs = append(errs, <-results)
	}
	return errors.Join(errs...)
}

func endNode(lab, node string) error {
	var first process
	err := readJSON(initPath(lab, node), &first)
	if errors.Is(err, os.ErrNotExist) {
		return nil // never started: a start is recorded before the node is told to go on
	}
	if err != nil {
		return fmt.Errorf("node %q: %w", node, err)
	}
	if err := first.kill(); err != nil {
		return fmt.Errorf("node %q: %w", node, err)
	}
	return nil
}

// removeState removes the lab's directory. Nothing is mounted there by a lab; if somebody else did,
// removing would reach into it.
func removeState(lab string) error {
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.point, stateDir(lab)+"/") {
			return fmt.Errorf("remove %s: something is mounted on %s; unmount it and repeat", stateDir(lab), m.point)
		}
	}
	if err := os.RemoveAll(stateDir(lab)); err != nil {
		return err
	}
	err = os.Remove(stateRoot)
	if err == nil || errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, os.ErrExist) {
		return nil // other labs live there
	}
	return err
}

// unmountAndRemove takes a name of a namespace away; after a reboot it is a plain file.
func unmountAndRemove(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	err = os.Remove(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Names lists the labs that there are on this machine.
func Names() []string {
	entries, err := os.ReadDir(stateRoot)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names
}
