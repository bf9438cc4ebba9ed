// SPDX-License-Identifier: Apache-2.0

// Package slow is for tests that also run where processors are emulated, 20 to 45 times slower.
package slow

import "testing"

// TakesLong skips, with -short, what takes minutes there and is not decided by a kernel, or is shown there by smaller tests.
func TakesLong(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("takes minutes where processors are emulated: run it without -short")
	}
}
