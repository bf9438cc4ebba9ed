// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// Status prints the nodes of a lab and how their programs are.
func Status(lab string, w io.Writer) error {
	if err := CheckName(lab); err != nil {
		return err
	}
	r, err := readRecord(lab)
	if errors.Is(err, os.ErrNotExist) {
		return notUp(lab)
	}
	if err != nil {
		return fmt.Errorf("lab %q: %w", lab, err)
	}
	underlay := "one link"
	if r.Routed {
		underlay = "routed"
	}
	fmt.Fprintf(w, "lab %s: topology %s, underlay %s\n", lab, r.Topology, underlay)
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tSTATE\tPID\tUNDERLAY\tNETNS\tCONTAINERD\tAGENT")
	for _, n := range r.Nodes {
		fmt.Fprintln(t, nodeStatus(lab, r, n))
	}
	if err := t.Flush(); err != nil || !slices.ContainsFunc(r.Nodes, func(n nodeRecord) bool { return n.Internet }) {
		return err
	}
	_, err = fmt.Fprintf(w, "internet: a web server at %s\n", serverAddresses)
	return err
}

func nodeStatus(lab string, r record, n nodeRecord) string {
	var first process
	if err := readJSON(initPath(lab, n.Name), &first); err != nil || !first.alive() {
		return fmt.Sprintf("%s\tended\t-\t%s\t%s\t-\t-", n.Name, n.Underlay, netnsName(lab, n.Name))
	}
	return fmt.Sprintf("%s\tup\t%d\t%s\t%s\t%s\t%s", n.Name, first.PID, n.Underlay, netnsName(lab, n.Name),
		programStatus(first, containerdProgram, containerdSocket, r.Stack && !n.Internet),
		programStatus(first, agentProgram, agentSocket, r.Agent && !n.Internet))
}

func programStatus(first process, name, socket string, wanted bool) string {
	root := fmt.Sprintf("/proc/%d/root", first.PID)
	if !wanted {
		return "none"
	}
	if how, err := os.ReadFile(filepath.Join(root, exitPath(name))); err == nil {
		return "ended (" + string(bytes.TrimSpace(how)) + ")"
	}
	if !isSocket(filepath.Join(root, socket)) {
		return "starting"
	}
	return "up"
}

// Start starts the programs of a node that have ended.
func Start(lab, node string) error {
	first, _, err := findNode(lab, node)
	if err != nil {
		return err
	}
	pidfd, err := first.open()
	if err != nil || pidfd == nil {
		return errors.Join(err, fmt.Errorf("node %q has just ended", node))
	}
	defer pidfd.Close()
	return unix.PidfdSendSignal(int(pidfd.Fd()), unix.SIGHUP, nil, 0)
}

// Kill ends a program of a node the hard way, for a test of what happens then. The pid in the node's
// file is one of the node's own PID namespace and means another process outside, so it is read and
// used inside. Kill returns when the node's first process has seen the end, so that Start finds it.
func Kill(lab, node, program string) error {
	if known := []string{agentProgram, containerdProgram}; !slices.Contains(known, program) {
		return fmt.Errorf("no program %q to end; there are %q", program, known)
	}
	status, err := Exec(lab, node, Command{
		Args:   []string{"/bin/sh", "-c", killScript, "sh", pidPath(program)},
		Stdout: os.Stdout, Stderr: os.Stderr,
	})
	switch {
	case err != nil:
		return err
	case status == killTooSlow:
		return fmt.Errorf("%s of node %q has not ended %v after SIGKILL", program, node, killWait)
	case status != 0:
		return fmt.Errorf("%s of node %q does not run: nothing to end", program, node)
	}
	return nil
}

// killScript ends the process whose pid is in the file $1, and waits for killWait until it is that no longer.
var killScript = fmt.Sprintf(`pid=$(cat "$1") && kill -KILL "$pid" || exit 1
tries=%d
while [ "$(cat "$1" 2>/dev/null)" = "$pid" ]; do
	[ $((tries -= 1)) -gt 0 ] || exit %d
	sleep 0.02
done`, killWait/(20*time.Millisecond), killTooSlow)

const killTooSlow = 3

// Logs copies the log of a program of a node: "agent", "containerd", or "node" for its first process.
func Logs(lab, node, program string, w io.Writer) error {
	if err := CheckName(lab); err != nil {
		return err
	}
	if nodes := nodesOf(lab); !slices.Contains(nodes, node) {
		if len(nodes) == 0 {
			return notUp(lab)
		}
		return fmt.Errorf("lab %q has no node %q; it has %q", lab, node, nodes)
	}
	if known := []string{agentProgram, containerdProgram, serverProgram, "node"}; !slices.Contains(known, program) {
		return fmt.Errorf("no program %q; logs are of %q", program, known)
	}
	file, err := os.Open(logPath(lab, node, program))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s does not run in node %q of lab %q, so it has no log", program, node, lab)
	}
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = io.Copy(w, file)
	return err
}
