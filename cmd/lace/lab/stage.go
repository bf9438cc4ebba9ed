// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	privateDir = "/run/lab"                // inside a node: what backs its own directories
	specPath   = privateDir + "/spec.json" // how the first process finds its spec again when it has executed itself
)

// Stage is the first process of a node. It comes here twice: fresh in new namespaces, where it
// makes the node's view of the machine, and then, having executed itself, to look after the node's
// programs. It returns only if something is wrong.
func Stage(args []string) error {
	if os.Getpid() != 1 || len(args) < 2 {
		return errors.New("this is an internal command of `lace lab up`")
	}
	if len(args) == 3 && args[2] == "run" {
		return supervise()
	}
	runtime.LockOSThread()
	err := enterNode()
	reportStage(err)
	return err
}

// reportStage tells `lace lab up`.
func reportStage(err error) {
	status := os.NewFile(statusFD, "status")
	defer status.Close()
	if err != nil {
		fmt.Fprintln(status, err)
		return
	}
	fmt.Fprintln(status, "ok")
}

func enterNode() error {
	spec, raw, err := receiveSpec()
	if err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := arrangeMounts(spec); err != nil {
		return err
	}
	if err := writeSysctls(spec.Sysctls); err != nil {
		return err
	}
	if err := os.WriteFile(specPath, raw, 0o600); err != nil {
		return err
	}
	return settleCgroups(spec.Cgroups)
}

// receiveSpec waits for the word to go on. No spec means that `lace lab up` is gone.
func receiveSpec() (Spec, []byte, error) {
	const limit = 4 << 20
	pipe := os.NewFile(specFD, "spec")
	defer pipe.Close()
	raw, err := io.ReadAll(io.LimitReader(pipe, limit))
	if err != nil || len(raw) == 0 {
		return Spec{}, nil, errors.New("no spec came: `lace lab up` has ended")
	}
	var spec Spec
	return spec, raw, json.Unmarshal(raw, &spec)
}

// arrangeMounts makes the node's own view. Nothing of it is seen outside, and all of it goes with the
// last process of the node.
func arrangeMounts(spec Spec) error {
	before, err := readMounts()
	if err != nil {
		return err
	}
	hierarchies, err := makeNodeCgroups(spec.Cgroups)
	if err != nil {
		return err
	}
	links := cgroupLinks()
	steps := []func() error{
		func() error { return mountAt("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return releaseRun(before) },
		func() error { return mountAt("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755") },
		func() error { return os.MkdirAll(privateDir, 0o755) },
		func() error { return holdCgroups(hierarchies) },
		func() error { return mountAt("proc", "/proc", "proc", pseudoFlags, "") },
		func() error { return mountAt("sysfs", "/sys", "sysfs", pseudoFlags, "") },
		func() error { return showCgroups(hierarchies, links) },
		func() error { return mountAt("bpf", "/sys/fs/bpf", "bpf", pseudoFlags, "mode=700") },
		func() error { return mountSecurity(before) },
		func() error { return ownDirs(spec.Dirs) },
		func() error { return writeFiles(spec.Files) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

const pseudoFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

func mountAt(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s%s on %s: %w", source, fstype, target, err)
	}
	return nil
}

// releaseRun lets go of what is mounted below the machine's /run: names of network namespaces are,
// and a copy of such a mount here would keep another lab's namespace alive.
func releaseRun(before []mount) error {
	for _, m := range slices.Backward(before) {
		if !strings.HasPrefix(m.point, "/run/") {
			continue
		}
		err := unix.Unmount(m.point, unix.MNT_DETACH)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("let go of %s: %w", m.point, err)
		}
	}
	return nil
}

// hierarchy is a cgroup hierarchy of the machine: where it is mounted, the node's own directory in it,
// and where the node keeps hold of that while /sys changes.
type hierarchy struct{ point, own, held string }

// makeNodeCgroups makes the node's directories and joins them: this process is then the one from whose
// place the cgroup namespace is cut.
func makeNodeCgroups(dirs []string) ([]hierarchy, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	var found []hierarchy
	for _, dir := range dirs {
		if err := makeCgroup(dir); err != nil {
			return nil, fmt.Errorf("make cgroup %s: %w", dir, err)
		}
		if err := joinCgroup(dir); err != nil {
			return nil, fmt.Errorf("join cgroup %s: %w", dir, err)
		}
		point := mountPointOf(dir, mounts)
		held := filepath.Join(privateDir, "cgroup", strings.TrimPrefix(point, cgroupRoot))
		found = append(found, hierarchy{point: point, own: dir, held: held})
	}
	return found, nil
}

// mountPointOf finds the innermost mount that dir lies in.
func mountPointOf(dir string, mounts []mount) string {
	best := ""
	for _, m := range mounts {
		if strings.HasPrefix(dir, m.point+"/") && len(m.point) > len(best) {
			best = m.point
		}
	}
	return best
}

func holdCgroups(hierarchies []hierarchy) error {
	for _, h := range hierarchies {
		if err := bindDir(h.own, h.held); err != nil {
			return err
		}
	}
	return nil
}

// showCgroups puts the node's own directories where the hierarchies are expected, so that whatever
// a container runtime makes there lies below the node's.
func showCgroups(hierarchies []hierarchy, links map[string]string) error {
	if len(hierarchies) == 0 {
		return nil
	}
	if hierarchies[0].point == cgroupRoot {
		return moveDir(hierarchies[0].held, cgroupRoot)
	}
	if err := mountAt("tmpfs", cgroupRoot, "tmpfs", pseudoFlags, "mode=755"); err != nil {
		return err
	}
	for _, h := range hierarchies {
		if err := moveDir(h.held, h.point); err != nil {
			return err
		}
	}
	for path, target := range links {
		if err := os.Symlink(target, path); err != nil {
			return err
		}
	}
	return nil
}

// cgroupLinks are the second names of hierarchies, as cpu is of cpu,cpuacct.
func cgroupLinks() map[string]string {
	links := map[string]string{}
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return links
	}
	for _, e := range entries {
		path := filepath.Join(cgroupRoot, e.Name())
		if target, err := os.Readlink(path); err == nil {
			links[path] = target
		}
	}
	return links
}

func bindDir(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	return mountAt(from, to, "", unix.MS_BIND, "")
}

// moveDir moves a mount, so that a runtime that looks for the hierarchies finds each of them once.
func moveDir(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	return mountAt(from, to, "", unix.MS_MOVE, "")
}

// mountSecurity brings back what AppArmor's tools look at, where the machine has it.
func mountSecurity(before []mount) error {
	const point = "/sys/kernel/security"
	if !slices.ContainsFunc(before, func(m mount) bool { return m.point == point && m.fstype == "securityfs" }) {
		return nil
	}
	return mountAt("securityfs", point, "securityfs", pseudoFlags, "")
}

// ownDirs gives the node an empty directory in each of these places.
func ownDirs(dirs []string) error {
	for _, dir := range dirs {
		if err := makePoint(dir); err != nil {
			return err
		}
		if err := bindDir(makeOwn(dir), dir); err != nil {
			return err
		}
	}
	return nil
}

func makeOwn(dir string) string {
	own := filepath.Join(privateDir, "dirs", dir)
	// An error shows when it is mounted.
	_ = os.MkdirAll(own, 0o755)
	return own
}

// makePoint makes a place to mount on without touching the machine's own directories: where there is
// none, an overlay goes over the directory that is to hold it.
func makePoint(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	parent := filepath.Dir(dir)
	for _, err := os.Stat(parent); err != nil && parent != "/"; _, err = os.Stat(parent) {
		parent = filepath.Dir(parent)
	}
	if parent == "/" {
		return fmt.Errorf("the node needs %s, but the machine has no %s to put it in; make that directory", dir, filepath.Dir(dir))
	}
	if !overlaid(parent) {
		if err := overlay(parent); err != nil {
			return err
		}
	}
	return os.MkdirAll(dir, 0o755)
}

func overlayDir(dir, part string) string { return filepath.Join(privateDir, "overlay", part, dir) }

// overlaid: below a directory that has got its overlay already, plain directories do no harm.
func overlaid(dir string) bool {
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(overlayDir(dir, "done")); err == nil {
			return true
		}
	}
	return false
}

func overlay(dir string) error {
	upper, work := overlayDir(dir, "upper"), overlayDir(dir, "work")
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	options := "lowerdir=" + dir + ",upperdir=" + upper + ",workdir=" + work
	if err := mountAt("overlay", dir, "overlay", 0, options); err != nil {
		return err
	}
	return os.MkdirAll(overlayDir(dir, "done"), 0o755)
}

func writeFiles(files []File) error {
	for _, f := range files {
		if err := os.MkdirAll(filepath.Dir(f.Path), 0o755); err != nil {
			return err
		}
		if err := f.write(); err != nil {
			return fmt.Errorf("write %s: %w", f.Path, err)
		}
	}
	return nil
}

func (f File) write() error {
	if f.Link != "" {
		return os.Symlink(f.Link, f.Path)
	}
	return os.WriteFile(f.Path, f.Content, 0o644)
}

// settleCgroups cuts the cgroup namespace here and executes this program again: a namespace is a
// thread's own, and only an exec leaves all threads in the same.
func settleCgroups(dirs []string) error {
	if len(dirs) > 0 {
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return fmt.Errorf("make a cgroup namespace: %w", err)
		}
	}
	args := append(slices.Clone(os.Args[:1]), "lab", StageCommand, os.Args[3], os.Args[4], "run")
	return fmt.Errorf("execute itself: %w", syscall.Exec("/proc/self/exe", args, os.Environ()))
}

func loadSpec() (Spec, error) {
	var spec Spec
	raw, err := os.ReadFile(specPath)
	if err != nil {
		return spec, err
	}
	return spec, json.NewDecoder(bytes.NewReader(raw)).Decode(&spec)
}
