// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestMain lets the test binary be lace-runc, so that tests can run it as a process.
func TestMain(m *testing.M) {
	if os.Getenv("LACE_TEST_BE_RUNC") != "" {
		main()
	}
	os.Exit(m.Run())
}

// wrapperIn copies the wrapper to dir/runc.
func wrapperIn(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "runc")
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func runcIn(t *testing.T, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "runc"), []byte("#!/bin/sh\necho real \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func call(t *testing.T, path, searchPath string, args ...string) string {
	t.Helper()
	cmd := exec.Command(path, args...)
	cmd.Env = []string{"LACE_TEST_BE_RUNC=1", "PATH=" + searchPath}
	out, _ := cmd.CombinedOutput() // the output tells success from failure
	return string(out)
}

func TestWrapperBecomesTheRealRunc(t *testing.T) {
	a, b, real := t.TempDir(), t.TempDir(), t.TempDir()
	first := wrapperIn(t, a)
	wrapperIn(t, b) // a second copy, that the first must not take for runc for ever
	runcIn(t, real)
	path := strings.Join([]string{a, b, real, "/bin"}, ":")
	if got := call(t, first, path, "--root", "/r", "state", "c1"); got != "real --root /r state c1\n" {
		t.Errorf("output %q", got)
	}
	link := filepath.Join(t.TempDir(), "runc")
	if err := os.Symlink(first, link); err != nil {
		t.Fatal(err)
	}
	if got := call(t, link, filepath.Dir(link)+":"+path, "state"); got != "real state\n" {
		t.Errorf("through a link: %q", got)
	}
}

func TestWrapperPreparesTheBundle(t *testing.T) {
	dir, real, bundle := t.TempDir(), t.TempDir(), t.TempDir()
	wrapper := wrapperIn(t, dir)
	runcIn(t, real)
	config := filepath.Join(bundle, "config.json")
	os.WriteFile(config, []byte(ownNetwork), 0o600)
	if got := call(t, wrapper, real, "create", "--bundle", bundle, "c1"); !strings.HasPrefix(got, "real create") {
		t.Errorf("output %q", got)
	}
	if b, _ := os.ReadFile(config); !strings.Contains(string(b), `"path":"`+wrapper+`"`) {
		t.Errorf("no hook in %s", b)
	}
	if got := call(t, wrapper, real, "create", "--bundle", "/nonexistent", "c1"); !strings.Contains(got, "real create") {
		t.Errorf("runc does not get to complain of a missing bundle: %q", got)
	}
}

func TestReadSetting(t *testing.T) {
	file := filepath.Join(t.TempDir(), "runc")
	if path, err := readSetting(file); path != "" || err != nil {
		t.Errorf("without a file: %q, %v", path, err)
	}
	write := func(text string, mode os.FileMode) {
		os.Remove(file)
		os.WriteFile(file, []byte(text), mode)
		os.Chmod(file, mode)
	}
	write("/usr/sbin/runc\n", 0o644)
	if path, err := readSetting(file); os.Getuid() == 0 && (path != "/usr/sbin/runc" || err != nil) {
		t.Errorf("%q, %v", path, err)
	}
	for text, mode := range map[string]os.FileMode{"/usr/sbin/runc": 0o666, "runc": 0o644, "": 0o644, strings.Repeat("/", maxSetting+1): 0o644} {
		write(text, mode)
		if path, err := readSetting(file); err == nil {
			t.Errorf("%.20q with mode %o gives %q", text, mode, path)
		}
	}
}
