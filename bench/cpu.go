// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// pinned in the environment says that the process was started on its CPU; the value is the number of
// CPUs that it could have used before.
const pinned = "LACEBENCH_PINNED"

// pin puts this process and all its children on one CPU. Threads that the Go runtime has started by
// now would stay where they are, so the process begins anew. Two CPUs over veth reorder packets.
func pin(cpu int) error {
	if os.Getenv(pinned) != "" {
		return nil
	}
	runtime.LockOSThread()
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return fmt.Errorf("read the CPUs that bench may use: %w", err)
	}
	if cpu < 0 {
		cpu = last(&may)
	}
	if !may.IsSet(cpu) {
		return usagef("--cpu %d is none of the CPUs that bench may use; -1 takes the last of them", cpu)
	}
	n := may.Count()
	may.Zero()
	may.Set(cpu)
	if err := unix.SchedSetaffinity(0, &may); err != nil {
		return fmt.Errorf("move bench to CPU %d: %w", cpu, err)
	}
	env := append(os.Environ(), fmt.Sprintf("%s=%d", pinned, n))
	return fmt.Errorf("start bench anew on CPU %d: %w", cpu, unix.Exec("/proc/self/exe", os.Args, env))
}

func last(set *unix.CPUSet) int {
	highest := 0
	for i := range 8 * len(set) * 8 {
		if set.IsSet(i) {
			highest = i
		}
	}
	return highest
}

// cores says how many CPUs the machine offered before pin took one of them.
func cores() string {
	return strings.TrimSpace(os.Getenv(pinned) + " cores")
}
