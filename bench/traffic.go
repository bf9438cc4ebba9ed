// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// trafficPort is where the servers listen; each bed has namespaces of its own.
const trafficPort = 7000

// patience is how much longer than its length a sample may take before it counts as failed, and how
// long a node may take to end.
const patience = 5 * time.Second

// tally is what one end counted: bytes, packets or transactions.
type tally struct {
	Count   uint64        `json:"count"`
	Elapsed time.Duration `json:"elapsed"`
}

func (t tally) rate() float64 { return float64(t.Count) / t.Elapsed.Seconds() }

// end is one side of a kind of traffic. A server calls ready once it listens.
type end func(addr netip.AddrPort, length time.Duration, ready func()) (tally, error)

var servers = map[string]end{"tcp": serveStream, "rr": serveEcho, "crr": serveConnections, "udp": servePackets, owned: serveOwned}
var clients = map[string]end{"tcp": sendStream, "rr": sendEcho, "crr": sendConnections, "udp": sendPackets}

// runTraffic is a role of this binary: one end of one sample, in the network namespace given. Its
// output is a line "ready" from a server, then the tally. The sockets are plain blocking ones on one locked thread: the
// runtime's poller and scheduler would cost more than what is measured.
func runTraffic(args []string, ends map[string]end) error {
	fs := flag.NewFlagSet("traffic", flag.ContinueOnError)
	netns := fs.String("netns", "", "`name` of the network namespace")
	metric := fs.String("metric", "", "`kind` of traffic")
	length := fs.Duration("sample", time.Second, "`length`")
	addr := fs.String("addr", "", "`address` of the server")
	if err := fs.Parse(args); err != nil {
		return asUsage(err)
	}
	to, err := netip.ParseAddr(*addr)
	if err != nil {
		return usageError{err}
	}
	runtime.LockOSThread()
	if err := enter(*netns); err != nil {
		return err
	}
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, -19); err != nil {
		return fmt.Errorf("raise the priority of the traffic: %w", err)
	}
	t, err := ends[*metric](netip.AddrPortFrom(to, trafficPort), *length, func() { fmt.Println("ready") })
	if err != nil {
		return fmt.Errorf("%s in %s at %s: %w", *metric, *netns, to, err)
	}
	return json.NewEncoder(os.Stdout).Encode(t)
}

// enter moves the calling thread, which must be locked, into a named network namespace.
func enter(netns string) error {
	path := filepath.Join(netnsDir, netns)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return nil
}
