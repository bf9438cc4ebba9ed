// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

const (
	netnsDir    = "/run/netns"
	netnsPrefix = "lacebench-" // of every namespace the bench makes
)

// commandPatience bounds one call of ip or ethtool.
const commandPatience = 20 * time.Second

// ns is a network namespace of a bed.
type ns string

// addNetns makes the namespace, with what every bed wants: addresses usable at once and room for many
// short connections.
func addNetns(ctx context.Context, n ns) error {
	if err := addEmptyNetns(ctx, n); err != nil {
		return err
	}
	if err := n.ip(ctx, "link set lo up"); err != nil {
		return err
	}
	return n.sysctl(ctx,
		"net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0",
		"net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0",
		"net.ipv4.tcp_tw_reuse=1", "net.ipv4.ip_local_port_range=10000 65000")
}

func addEmptyNetns(ctx context.Context, n ns) error {
	return command(ctx, "", "ip", "netns", "add", string(n))
}

// removeNetns takes away every namespace of a bench, also those that a killed one left.
func removeNetns(ctx context.Context) error {
	paths, err := filepath.Glob(filepath.Join(netnsDir, netnsPrefix+"*"))
	if err != nil {
		return err
	}
	for _, p := range paths {
		err = errors.Join(err, command(ctx, "", "ip", "netns", "delete", filepath.Base(p)))
	}
	return err
}

// ip runs lines of the ip command in the namespace.
func (n ns) ip(ctx context.Context, lines ...string) error {
	return command(ctx, strings.Join(lines, "\n")+"\n", "ip", "-n", string(n), "-batch", "-")
}

func (n ns) sysctl(ctx context.Context, settings ...string) error {
	return n.exec(ctx, append([]string{"sysctl", "-qw"}, settings...)...)
}

func (n ns) offloads(ctx context.Context, dev string, settings ...string) error {
	return n.exec(ctx, append([]string{"ethtool", "-K", dev}, settings...)...)
}

func (n ns) exec(ctx context.Context, args ...string) error {
	return command(ctx, "", "ip", append([]string{"netns", "exec", string(n)}, args...)...)
}

// command runs one command; its error holds the command and what it said.
func command(ctx context.Context, stdin, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, commandPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%s is not installed; run: scripts/setup bench", name)
	}
	said := strings.TrimSpace(string(out))
	if stdin != "" {
		said += "; its input was:\n" + stdin
	}
	return fmt.Errorf("run %s %s: %w: %s", name, strings.Join(args, " "), err, said)
}

// path is what other programs are given to find the namespace.
func (n ns) path() string { return filepath.Join(netnsDir, string(n)) }
