// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"time"

	"golang.org/x/sys/unix"
)

// WaitForPackets returns when no packet is inside of a program any more that was inside of one when it was called. What
// those could still use may go then: the tail calls of replaced programs, the rows of a slot that was left. A global
// memory barrier waits for a grace period of RCU, which is what packets run under; where the kernel refuses it
// (nohz_full), a time far above that of a packet does.
func WaitForPackets() {
	const global = 1 // MEMBARRIER_CMD_GLOBAL
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0); errno != 0 {
		time.Sleep(50 * time.Millisecond)
	}
}
