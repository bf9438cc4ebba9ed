// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// mount is one line of /proc/self/mountinfo, as far as a lab cares.
type mount struct{ root, point, fstype, options string }

func readMounts() ([]mount, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var mounts []mount
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if m, ok := parseMount(lines.Text()); ok {
			mounts = append(mounts, m)
		}
	}
	return mounts, nil
}

// parseMount reads a line as proc_pid_mountinfo(5) lays it out: six fields, optional ones, a dash, three.
func parseMount(line string) (mount, bool) {
	before, after, found := strings.Cut(line, " - ")
	head, tail := strings.Fields(before), strings.Fields(after)
	if !found || len(head) < 6 || len(tail) < 3 {
		return mount{}, false
	}
	return mount{root: unescape(head[3]), point: unescape(head[4]), fstype: tail[0], options: tail[2]}, true
}

// unescape undoes the octal form in which mountinfo writes blanks and backslashes.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

// cgroupMounts are the hierarchies: one of version 2, or several of version 1 with or without it.
func cgroupMounts() ([]mount, error) {
	mounts, err := readMounts()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(mounts, func(m mount) bool {
		inside := m.point == cgroupRoot || strings.HasPrefix(m.point, cgroupRoot+"/")
		return !inside || m.fstype != "cgroup" && m.fstype != "cgroup2"
	}), nil
}

// labCgroups names the lab's directory in each hierarchy. In version 1 it lies below the caller's
// own, so that the caller's limits hold for the lab; in version 2 processes may not live above a cgroup
// with controllers, so it lies at the top.
func labCgroups(lab string) ([]string, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, fmt.Errorf("find the cgroup hierarchies: %w", err)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("find the own cgroups: %w", err)
	}
	var dirs []string
	for _, m := range mounts {
		dirs = append(dirs, filepath.Join(m.point, ownCgroup(string(own), m), "lace-lab", lab))
	}
	return dirs, nil
}

// ownCgroup finds the hierarchy of m in the text of /proc/self/cgroup: lines id:controllers:path.
func ownCgroup(text string, m mount) string {
	if m.fstype == "cgroup2" {
		return "/"
	}
	for line := range strings.Lines(text) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) == 3 && parts[1] != "" && containsAll(m.options, parts[1]) {
			relative, err := filepath.Rel(m.root, parts[2])
			if err == nil && relative != ".." && !strings.HasPrefix(relative, "../") {
				return relative
			}
		}
	}
	return "/"
}

// containsAll: every one of the comma-separated words is among the options.
func containsAll(options, words string) bool {
	have := strings.Split(options, ",")
	for word := range strings.SplitSeq(words, ",") {
		if !slices.Contains(have, word) {
			return false
		}
	}
	return true
}

// makeCgroup makes a node's directory, those of its lab and of all labs above it. Nodes, and labs, do this side
// by side, and a lab that ends removes what it finds empty: every step may have been done, or undone,
// by another.
func makeCgroup(dir string) error {
	const attempts = 10
	lab := filepath.Dir(dir)
	var err error
	for range attempts {
		err = makeCgroups([]string{filepath.Dir(lab), lab, dir})
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return err
}

// makeCgroups makes directories, each below the one before it. All but the last hand down what they have.
func makeCgroups(dirs []string) error {
	for i, dir := range dirs {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := inheritCpuset(dir); err != nil {
			return err
		}
		if i < len(dirs)-1 {
			handDown(dir)
		}
	}
	return nil
}

// inheritCpuset fills a cpuset of version 1, which takes no process while it is empty.
func inheritCpuset(dir string) error {
	if isVersion2(dir) {
		return nil
	}
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		above, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if errors.Is(err, os.ErrNotExist) {
			return nil // another hierarchy
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), above, 0); err != nil {
			return err
		}
	}
	return nil
}

// handDown lets a cgroup of version 2 give its children all the controllers that it has. What cannot
// be handed down is said in the node's log; only a container that asks for such a limit will miss it.
func handDown(dir string) {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return // version 1
	}
	for controller := range strings.FieldsSeq(string(have)) {
		err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
		if err != nil {
			fmt.Fprintf(os.Stderr, "cgroup controller %s is not handed down: %v\n", controller, err)
		}
	}
}

// isVersion2: only that version has cgroup.controllers.
func isVersion2(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "cgroup.controllers"))
	return err == nil
}

// leafOf is where a node's own processes live. In version 2 a cgroup whose children have controllers
// can have no process itself, so there it is a leaf beside the containers.
func leafOf(dir string) string {
	if isVersion2(dir) {
		return filepath.Join(dir, "node")
	}
	return dir
}

// joinCgroup moves this process.
func joinCgroup(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)
}

// removeCgroups removes what the nodes and their containers left: empty directories by now.
func removeCgroups(lab string, recorded []string) error {
	dirs, err := labCgroups(lab)
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range slices.Compact(slices.Sorted(slices.Values(append(dirs, recorded...)))) {
		if filepath.Base(dir) != lab || filepath.Base(filepath.Dir(dir)) != "lace-lab" || !strings.HasPrefix(dir, cgroupRoot+"/") {
			continue // a record that was tampered with
		}
		errs = append(errs, removeCgroupTree(dir))
		// The directory of all labs goes with the last of them.
		if err := unix.Rmdir(filepath.Dir(dir)); err != nil && !harmlessRmdir(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func harmlessRmdir(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY)
}

// removeCgroupTree removes from the leaves up. A cgroup stays busy for a moment after its last process.
func removeCgroupTree(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil // what is gone already is as good
	})
	if err != nil {
		return err
	}
	slices.Reverse(dirs)
	for _, dir := range dirs {
		if err := rmdirPatiently(dir); err != nil {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
	return nil
}

func rmdirPatiently(dir string) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}
