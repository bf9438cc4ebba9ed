// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/lace-net/lace/plugin/wire"
)

const (
	// settingFile holds the path of the real runc, where the search does not find the right one.
	settingFile = "/etc/lace/runc"
	// realEnv names the real runc too; it wins over settingFile.
	realEnv = "LACE_RUNC"
	// visitedEnv lists the wrappers that this call went through, so that two copies of lace-runc in PATH
	// do not call each other for ever.
	visitedEnv = "LACE_RUNC_VISITED"
	maxSetting = 4096 // bytes
)

var standardDirs = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// wrap prepares the container if args make one, and becomes the real runc. It returns only with an error.
func wrap(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the path of this program: %w", err)
	}
	if bundle, create := bundleOf(args); create {
		if err := prepareOrRefuse(bundle, self, os.Getenv); err != nil {
			return err
		}
	}
	visited := append(filepath.SplitList(os.Getenv(visitedEnv)), self)
	real, err := findRunc(visited)
	if err != nil {
		return err
	}
	if err := os.Setenv(visitedEnv, strings.Join(visited, string(filepath.ListSeparator))); err != nil {
		return fmt.Errorf("set %s: %w", visitedEnv, err)
	}
	err = syscall.Exec(real, append([]string{"runc"}, args...), os.Environ())
	return fmt.Errorf("execute %s: %w", real, err)
}

// prepareOrRefuse fails only for a container that asks for Lace and cannot get its hooks. A configuration that makes no
// sense is runc's to complain about, and a container that is not Lace's shall not suffer.
func prepareOrRefuse(bundle, self string, getenv func(string) string) error {
	err := prepare(bundle, self, getenv)
	if err == nil {
		return nil
	}
	fmt.Fprintln(os.Stderr, "lace-runc: warning: hooks were not added:", err)
	var u unwritableError
	if !errors.As(err, &u) {
		return nil
	}
	s := wire.State{ID: filepath.Base(bundle), Bundle: bundle, Annotations: u.annotations}
	if network, asks, _ := asksForLace(s, getenv); asks {
		return fmt.Errorf("container asks for network %q, but its hooks cannot be added: %w", network, err)
	}
	return nil
}

// findRunc returns the real runc: the one set, else the first in PATH and then in the standard directories that is none
// of the visited.
func findRunc(visited []string) (string, error) {
	set, err := setRunc()
	if set != "" || err != nil {
		return set, err
	}
	var not []os.FileInfo
	for _, v := range visited {
		if st, err := os.Stat(v); err == nil {
			not = append(not, st)
		}
	}
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), standardDirs...) {
		path := filepath.Join(dir, "runc")
		if filepath.IsAbs(path) && isOther(path, not) {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no runc beside this wrapper in PATH or %s; install runc, or write its path to %s",
		strings.Join(standardDirs, ", "), settingFile)
}

func isOther(path string, not []os.FileInfo) bool {
	st, err := os.Stat(path)
	if err != nil || !st.Mode().IsRegular() || st.Mode().Perm()&0o111 == 0 {
		return false
	}
	for _, n := range not {
		if os.SameFile(st, n) {
			return false
		}
	}
	return true
}

func setRunc() (string, error) {
	if path := os.Getenv(realEnv); path != "" {
		return path, nil
	}
	return readSetting(settingFile)
}

// readSetting reads the path of the real runc from file. Only root may have written it.
func readSetting(file string) (string, error) {
	st, err := os.Lstat(file)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read the path of runc: %w", err)
	}
	owner, ok := st.Sys().(*syscall.Stat_t)
	if !st.Mode().IsRegular() || !ok || owner.Uid != 0 || st.Mode().Perm()&0o022 != 0 || st.Size() > maxSetting {
		return "", fmt.Errorf("%s has to be a regular file of at most %d bytes that root owns and nobody else may write", file, maxSetting)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read the path of runc: %w", err)
	}
	path := strings.TrimSpace(string(b))
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("%s holds %q; it has to hold the absolute path of runc alone", file, path)
	}
	return path, nil
}
