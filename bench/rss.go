// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// agent hands the node over to the real agent, waits until that is at rest and weighs it. The node takes
// no further orders on containers.
func (n *node) agent(ctx context.Context, o order) (report, error) {
	if err := n.stop(); err != nil {
		return report{}, err
	}
	cmd := exec.CommandContext(ctx, o.Lace, "agent", "--config", o.Settings)
	cmd.WaitDelay = 5 * time.Second
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	log := new(bytes.Buffer)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return report{}, fmt.Errorf("start the agent: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		return report{}, fmt.Errorf("the agent ended: %w: %s", err, log)
	case <-time.After(o.Settle):
	}
	rss, err := rssOf(cmd.Process.Pid)
	err = errors.Join(err, cmd.Process.Signal(unix.SIGTERM))
	<-ended
	if err == nil && !strings.Contains(log.String(), "data plane is up") {
		err = fmt.Errorf("the agent's data plane did not come up in %s: %s", o.Settle, log)
	}
	return report{RSS: rss}, err
}

// rssOf reads VmRSS, in kB.
func rssOf(pid int) (int, error) {
	path := fmt.Sprintf("/proc/%d/status", pid)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("weigh the agent: %w", err)
	}
	_, rest, ok := strings.Cut(string(b), "VmRSS:")
	if fields := strings.Fields(rest); ok && len(fields) > 0 {
		return strconv.Atoi(fields[0])
	}
	return 0, fmt.Errorf("weigh the agent: %s has no line VmRSS", path)
}
