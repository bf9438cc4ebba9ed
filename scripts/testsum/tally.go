// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// counts are tests, subtests included.
type counts struct{ Passed, Failed, Skipped int }

func (c *counts) add(other counts) {
	c.Passed += other.Passed
	c.Failed += other.Failed
	c.Skipped += other.Skipped
}

func (c counts) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", c.Passed, c.Failed, c.Skipped)
}

// addTo adds the counts to those in the file, which is made where it is missing. No name, no file.
func (c counts) addTo(file string) error {
	if file == "" {
		return nil
	}
	lock, err := os.OpenFile(file+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close() // and with it the lock: several may run side by side
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	sum, err := readCounts(file)
	if err != nil {
		return err
	}
	sum.add(c)
	content, err := json.Marshal(sum)
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(content, '\n'), 0o644)
}

func readCounts(file string) (counts, error) {
	var c counts
	content, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(content) == 0 {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(content, &c); err != nil {
		return c, fmt.Errorf("read the counts in %s: %w; remove the file", file, err)
	}
	return c, nil
}

func printTotal(out io.Writer, file string) error {
	c, err := readCounts(file)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, c)
	return nil
}
