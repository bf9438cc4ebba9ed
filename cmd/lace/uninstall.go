// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane"
)

// runUninstall takes every kernel object of Lace off the host; files and packages are not its concern.
func runUninstall(_ context.Context, e *env, args []string) error {
	flags := newFlags("uninstall")
	file := flags.String("config", conf.DefaultFile, "settings `FILE`")
	force := flags.Bool("force", false, "also while containers are attached: they lose their network")
	if err := parseFlags(flags, args, 0); err != nil {
		return err
	}
	s, err := agentSettings("uninstall", []string{"--config", *file})
	if err != nil {
		return err
	}
	lock, err := lockAgent(s.HookSocket)
	if err != nil {
		return err
	}
	defer lock.Close()
	log := slog.New(slog.NewTextHandler(e.stderr, &slog.HandlerOptions{Level: s.LogLevel}))
	if !*force {
		n, err := dataplane.CountPorts(log)
		if err != nil {
			return err
		}
		if n > 0 {
			return fmt.Errorf("attached containers would lose their network (%d of them): stop them, or use --force", n)
		}
	}
	if err := dataplane.Remove(s.BPFFS, log); err != nil {
		return fmt.Errorf("take Lace off this host: %w", err)
	}
	fmt.Fprintln(e.stdout, "nothing of Lace is left in the kernel")
	return nil
}
