// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What pin leaves in the environment for the process that it starts anew.
const (
	pinnedOf = "LACEBENCH_PINNED_OF" // the number of CPUs there were to choose from
	sinkCPU  = "LACEBENCH_SINK_CPU"  // where the receiver of packets runs
)

// pin puts this process and all its children on one CPU: two of them over veth reorder packets. Threads that the Go
// runtime has started by now would stay where they are, so the process begins anew.
func pin(cpu int) error {
	if os.Getenv(pinnedOf) != "" {
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
	if err := moveTo(cpu); err != nil {
		return err
	}
	env := append(os.Environ(), fmt.Sprintf("%s=%d", pinnedOf, may.Count()), fmt.Sprintf("%s=%d", sinkCPU, otherThan(cpu, may)))
	return fmt.Errorf("start bench anew on CPU %d: %w", cpu, unix.Exec("/proc/self/exe", os.Args, env))
}

// moveTo moves the calling thread.
func moveTo(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("move to CPU %d: %w", cpu, err)
	}
	return nil
}

// moveToSink moves the calling thread to the CPU that pin has chosen for the receiver of packets.
func moveToSink() error {
	cpu, err := strconv.Atoi(os.Getenv(sinkCPU))
	if err != nil {
		return fmt.Errorf("%s does not name a CPU: %w", sinkCPU, err)
	}
	return moveTo(cpu)
}

// otherThan is one more CPU, or the same where it is the only one.
func otherThan(cpu int, may unix.CPUSet) int {
	may.Clear(cpu)
	if may.Count() == 0 {
		return cpu
	}
	return last(&may)
}

func last(set *unix.CPUSet) int {
	highest := 0
	for i := range len(set) * 64 {
		if set.IsSet(i) {
			highest = i
		}
	}
	return highest
}

// cores says how many CPUs the machine offered before pin took one of them.
func cores() string {
	return strings.TrimSpace(os.Getenv(pinnedOf) + " cores")
}

// load is what else the machine does: its load average over the last minute.
func load() (float64, error) {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0, fmt.Errorf("read how busy the machine is: %w", err)
	}
	first, _, _ := strings.Cut(string(b), " ")
	return strconv.ParseFloat(first, 64)
}
