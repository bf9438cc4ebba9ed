// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/maps"
)

// Commit makes the loaded programs the ones that stay: the tail calls of older agents go, links of
// interfaces that are not in keep, and tables of older layouts. Call it when every interface has its new program;
// while one of keep could not be given it, its old program keeps its tail calls.
func (h *Hooks) Commit(keep map[int]bool) error {
	return errors.Join(h.dropLinks(keep), h.dropOldStages(keep), h.dropOldLayouts())
}

func (h *Hooks) dropOldStages(keep map[int]bool) error {
	for ifindex := range keep {
		if h.behind[ifindex] {
			h.log.Warn("the tail calls of an older agent stay: an interface still has its program", "ifindex", ifindex)
			return nil
		}
	}
	ours, err := h.stagesPin()
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(h.stagesDir())
	if err != nil {
		return fmt.Errorf("list the pinned tail calls: %w", err)
	}
	entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return e.Name() == filepath.Base(ours) })
	if len(entries) == 0 {
		return nil
	}
	maps.WaitForPackets() // the next tail call of one that is inside would find nothing
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.Remove(filepath.Join(h.stagesDir(), e.Name())))
	}
	return errors.Join(errs...)
}

func (h *Hooks) dropLinks(keep map[int]bool) error {
	return eachLink(h.dir, func(ifindex int, pin string) error {
		if keep[ifindex] {
			return nil
		}
		return unpinLink(pin)
	})
}

// eachLink calls f for every pinned link of an interface, and goes on where it fails.
func eachLink(dir string, f func(ifindex int, pin string) error) error {
	entries, err := os.ReadDir(filepath.Join(dir, "links"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list the pinned links: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if ifindex, err := strconv.Atoi(e.Name()); err == nil {
			errs = append(errs, f(ifindex, filepath.Join(dir, "links", e.Name())))
		}
	}
	return errors.Join(errs...)
}

// layouts are the directories of tables, of this layout and of others.
func layouts(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list the pinned tables: %w", err)
	}
	var out []string
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), "v")
		if _, err := strconv.Atoi(number); ok && err == nil && e.IsDir() {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	return out, nil
}

func (h *Hooks) dropOldLayouts() error {
	dirs, err := layouts(h.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range dirs {
		if d != PinDir(h.dir) {
			h.log.Info("remove the tables of an older layout", "dir", d)
			errs = append(errs, os.RemoveAll(d))
		}
	}
	return errors.Join(errs...)
}

// Remove takes away all that Lace pinned below dir; TCX programs leave their interfaces with their pins.
// What others put there stays, and so does dir then.
func Remove(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := checkBPFFS(dir); err != nil {
		return fmt.Errorf("remove the pins: %w", err)
	}
	tables, err := layouts(dir)
	errs := []error{err, eachLink(dir, func(_ int, pin string) error { return unpinLink(pin) })}
	for _, d := range append(tables, filepath.Join(dir, "stages")) {
		errs = append(errs, os.RemoveAll(d))
	}
	for _, d := range []string{filepath.Join(dir, "links"), dir} {
		errs = append(errs, removeEmpty(d))
	}
	return errors.Join(errs...)
}

// removeEmpty removes a directory that is empty, and no mount point.
func removeEmpty(dir string) error {
	err := os.Remove(dir)
	for _, fine := range []error{fs.ErrNotExist, unix.ENOTEMPTY, unix.EBUSY} {
		if errors.Is(err, fine) {
			return nil
		}
	}
	return err
}
