// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/safchain/ethtool"
)

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFlagsComeBeforeTheFile(t *testing.T) {
	file := writeFile(t, "lace.toml", "node = \"of-file\"\nbpffs = \"/of/file\"\nlog-level = \"warn\"\n")
	s, err := agentSettings("agent", []string{"--bpffs", "/of/flag", "--config", file, "--log-level", "debug"})
	if err != nil {
		t.Fatal(err)
	}
	if s.Node != "of-file" || s.BPFFS != "/of/flag" || s.LogLevel != slog.LevelDebug || s.HookSocket != "/run/lace/lace.sock" {
		t.Errorf("got %+v", s)
	}
	for args, want := range map[string]string{
		"--config /nowhere/lace.toml": "no such file",
		"--log-level loud":            "invalid value",
		"now":                         "unexpected argument",
		"--nod x":                     "not defined",
	} {
		if _, err := agentSettings("agent", strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", args, err, want)
		}
	}
}

func TestOneAgentHoldsTheLock(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "lace.sock")
	if agentRuns(socket) {
		t.Error("an agent runs before there is a lock")
	}
	lock, err := lockAgent(socket)
	if err != nil {
		t.Fatal(err)
	}
	if !agentRuns(socket) {
		t.Error("the agent that holds the lock does not run")
	}
	if _, err := lockAgent(socket); err == nil || !strings.Contains(err.Error(), "an agent runs already, it holds "+socket+".lock") {
		t.Errorf("the second agent gets %v", err)
	}
	lock.Close()
	if agentRuns(socket) {
		t.Error("an agent runs after the end of the only one")
	}
}

// Whoever looks whether an agent runs must not be taken for one.
func TestLooksDoNotKeepAnAgentFromStarting(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "lace.sock")
	ctx, cancel := context.WithCancel(t.Context())
	var lookers sync.WaitGroup
	for range 4 {
		lookers.Go(func() {
			for ctx.Err() == nil {
				agentRuns(socket)
			}
		})
	}
	for range 200 {
		lock, err := lockAgent(socket)
		if err != nil {
			t.Error(err)
			break
		}
		lock.Close()
	}
	cancel()
	lookers.Wait()
}

func TestLockIsNoLink(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(writeFile(t, "precious", "x"), filepath.Join(dir, "lace.sock.lock")); err != nil {
		t.Fatal(err)
	}
	if _, err := lockAgent(filepath.Join(dir, "lace.sock")); err == nil || !strings.Contains(err.Error(), "open the agent's lock") {
		t.Errorf("got %v", err)
	}
}

func TestOnlyTheEndIsNoError(t *testing.T) {
	failed := errors.New("failed")
	for _, tt := range []struct{ err, want error }{
		{nil, nil}, {context.Canceled, nil}, {fmt.Errorf("watch: %w", context.Canceled), nil}, {failed, failed},
	} {
		if got := unlessCancelled(tt.err); got != tt.want {
			t.Errorf("%v becomes %v", tt.err, got)
		}
	}
}

func TestDoctorFollowsTheLinkOfRunc(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for name, mode := range map[string]os.FileMode{"lace-runc": 0o755, "other": 0o755} {
		if err := os.WriteFile(path(name), []byte("#!/bin/sh\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(path("plain"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path("plain/lace-runc"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"right": "lace-runc", "twice": "right", "foreign": "other", "dangling": "nothing", "unfit": "plain/lace-runc"} {
		if err := os.Symlink(path(target), path(name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"right": "leads to", "twice": "leads to", "foreign": "is not a link to lace-runc", "other": "is not a link to lace-runc",
		"dangling": "is a link to nothing", "absent": "is not there", "unfit": "cannot be executed",
	} {
		f := wrapperFinding(path(name))
		if !strings.Contains(f.text, want) || f.ok != (want == "leads to") {
			t.Errorf("%s: %+v, want %q", name, f, want)
		}
	}
}

// TestDoctorLooksAtTheSegmenter: its near end may not take more than one packet at a time.
func TestDoctorLooksAtTheSegmenter(t *testing.T) {
	n := newEdge(t, segments)
	find := func(settings string) (f finding) {
		t.Helper()
		s, err := agentSettings("doctor", []string{"--config", n.path(settings)})
		must(t, err)
		n.in(func() error { f = segmenterFinding(hostEnv(), s); return nil })
		return f
	}
	if f := find("lace.toml"); !f.ok || !strings.Contains(f.text, "the agent makes the segmenter") {
		t.Errorf("without an agent: %+v", f)
	}
	n.start()
	if f := find("lace.toml"); !f.ok || !strings.Contains(f.text, "laces0 cuts frames") {
		t.Errorf("with an agent: %+v", f)
	}
	n.in(func() error {
		e, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer e.Close()
		return e.Change("laces0", map[string]bool{"tx-tcp-segmentation": true})
	})
	if f := find("lace.toml"); f.ok || !strings.Contains(f.text, "laces0 has tx-tcp-segmentation on") || !strings.Contains(f.text, "ethtool -K laces0 tx-tcp-segmentation off;") {
		t.Errorf("with segmentation on: %+v", f)
	}
	routed := n.path("routed.toml")
	n.write("routed.toml", peeredNetworks)
	n.write("other.toml", fmt.Sprintf("node = \"edge-1\"\ntopology = %q\nhook-socket = %q\nbpffs = %q\n", routed, n.path("lace.sock"), n.bpffs))
	if f := find("other.toml"); !f.ok || f.text != "none on node edge-1" {
		t.Errorf("without an L2 network: %+v", f)
	}
}
