// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestListReadsAnInterruptedTableAgain(t *testing.T) {
	calls := 0
	rows, err := list(func() ([]int, error) {
		calls++
		if calls < 3 {
			return []int{1}, fmt.Errorf("dump: %w", netlink.ErrDumpInterrupted)
		}
		return []int{1, 2}, nil
	})
	if err != nil || len(rows) != 2 || calls != 3 {
		t.Errorf("list = %v, %v after %d calls", rows, err, calls)
	}
}

func TestListGivesUp(t *testing.T) {
	calls := 0
	_, err := list(func() ([]int, error) { calls++; return nil, netlink.ErrDumpInterrupted })
	if !errors.Is(err, netlink.ErrDumpInterrupted) || calls != dumpTries {
		t.Errorf("%v after %d calls", err, calls)
	}
}

func TestRoles(t *testing.T) {
	for name, want := range map[string]role{
		"lacev100": roleVRF, "laceb16777215": roleBridge, "lacer1": roleHeadroom, "lace0123456789a": rolePort,
		"laceb0123456789": rolePort, "lace0": roleNone, "lacev": roleNone, "xlacev1": roleNone, "lace0123456789A": roleNone, "lacebx": roleNone,
		"lc-host": roleHost, "lc-host-peer": roleHost, "lc-host-2": roleNone,
	} {
		if got := roleOf(name); got != want {
			t.Errorf("roleOf(%q) = %d, want %d", name, got, want)
		}
	}
}
