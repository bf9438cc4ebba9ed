// SPDX-License-Identifier: Apache-2.0

package containers

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/lace-net/lace/plugin"
	"github.com/lace-net/lace/tests/harness"
)

// run starts a container of Lace's that stays, and returns the name by which the data plane knows it.
func (b *bed) run(name string, more ...string) string {
	b.t.Helper()
	id := b.Nerdctl(nerdctlRun(append(append([]string{"-d", "--name", name}, more...), harness.Busybox, "sleep", "100000")...)...)
	return "default/" + id
}

func (b *bed) eventuallyDetached(container string) {
	b.t.Helper()
	b.Eventually("the container is detached", func() error {
		if _, ok := b.Attached(container); ok {
			return errors.New("it is attached")
		}
		return nil
	})
}

func (b *bed) eventuallyReleased(container string) {
	b.t.Helper()
	b.Eventually("the addresses are released", func() error {
		if ips := b.reservedFor(container); len(ips) > 0 {
			return fmt.Errorf("%v are held", ips)
		}
		return nil
	})
}

func (b *bed) taskPid(name string) int {
	b.t.Helper()
	pid, err := strconv.Atoi(b.Nerdctl("inspect", "-f", "{{.State.Pid}}", name))
	if err != nil || pid == 0 {
		b.t.Fatalf("container %s has pid %d, %v", name, pid, err)
	}
	return pid
}

// holds fails the test unless the container holds these addresses and no others.
func (b *bed) holds(when, container string, want ...netip.Addr) {
	b.t.Helper()
	if ips := b.reservedFor(container); !slices.Equal(ips, want) {
		b.t.Errorf("%s held are %v, want %v", when, ips, want)
	}
}

func TestAddressesAreKeptOverStopAndStart(t *testing.T) {
	b := newBed(t, harness.Options{})
	c := b.run("kept")
	first, _ := b.first(c)
	b.Nerdctl("stop", "-t", "0", "kept")
	b.eventuallyDetached(c)
	b.holds("after the stop", c, first.V4.Addr())
	b.stop() // the record of containerd outlives the agent's memory
	b.fake = newFake()
	b.fake.reserved[claim{"default/other", "backend"}] = netip.MustParseAddr("10.40.1.99")
	b.startAgent()
	b.holds("after a restart of the agent", c, first.V4.Addr())
	if len(b.reservedFor("default/other")) != 0 {
		t.Error("the address of a container that is gone is held")
	}
	b.Nerdctl("start", "kept")
	if second, ok := b.first(c); !ok || second.V4 != first.V4 || second.MAC.String() != first.MAC.String() {
		t.Errorf("after the start %+v, want %+v", second, first)
	}
	contains(t, b.Nerdctl("exec", "kept", "ip", "-o", "addr"), first.V4.String())
	b.Nerdctl("rm", "-f", "kept")
	b.eventuallyReleased(c)
}

func TestAddressThatCannotBeKeptIsChosenAnew(t *testing.T) {
	b := newBed(t, harness.Options{})
	c := b.run("moved")
	first, _ := b.first(c)
	b.Nerdctl("stop", "-t", "0", "moved")
	b.eventuallyDetached(c)
	b.stop()
	b.fake = newFake()
	b.outside = func(a netip.Addr) bool { return a == first.V4.Addr() }
	b.startAgent()
	b.fake.set(func(f *fake) { clear(f.reserved) })
	b.Nerdctl("start", "moved")
	if second, ok := b.first(c); !ok || second.V4 == first.V4 {
		t.Errorf("after the start %+v, wired %v; want another address than %v", second, ok, first.V4)
	}
}

func TestKilledTaskIsDetached(t *testing.T) {
	b := newBed(t, harness.Options{})
	c := b.run("victim")
	if err := syscall.Kill(b.taskPid("victim"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.eventuallyDetached(c)
	if len(b.reservedFor(c)) == 0 {
		t.Error("the address of a container that still exists is given away")
	}
	b.Nerdctl("rm", "victim")
	b.eventuallyReleased(c)
}

func TestExecThatEndsDetachesNothing(t *testing.T) {
	b := newBed(t, harness.Options{})
	c := b.run("busy")
	b.Nerdctl("exec", "busy", "true")
	other := b.run("marker") // its end comes through the same stream, after that of the exec
	b.Nerdctl("rm", "-f", "marker")
	b.eventuallyReleased(other)
	if _, ok := b.Attached(c); !ok {
		t.Error("the end of an exec detached the container")
	}
}

func TestContainerdRestarts(t *testing.T) {
	for name, end := range map[string]func(*harness.Containerd){"stopped": (*harness.Containerd).Stop, "killed": (*harness.Containerd).Kill} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, harness.Options{})
			stays, dies := b.run("stays"), b.run("dies")
			pid := b.taskPid("dies")
			syncs := b.syncs()
			end(b.Containerd)
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			b.Launch()
			b.waitSync(syncs)
			b.eventuallyDetached(dies)
			if _, ok := b.Attached(stays); !ok {
				t.Error("the running container was detached")
			}
			if b.count("release "+stays)+b.count("detach "+stays) != 0 {
				t.Error("the running container was touched")
			}
			b.Nerdctl("rm", "-f", "stays", "dies")
			b.eventuallyReleased(stays)
			b.eventuallyReleased(dies)
		})
	}
}

func TestAgentWasAway(t *testing.T) {
	b := newBed(t, harness.Options{})
	stays, gone, stopped := b.run("stays"), b.run("gone"), b.run("stopped")
	b.stop()
	b.Nerdctl("rm", "-f", "gone")
	b.Nerdctl("stop", "-t", "0", "stopped")
	b.startAgent()
	for c, want := range map[string]bool{stays: true, gone: false, stopped: false} {
		if _, ok := b.Attached(c); ok != want {
			t.Errorf("%s is attached: %v, want %v", c, ok, want)
		}
	}
	if len(b.reservedFor(stopped)) == 0 {
		t.Error("the stopped container lost its address")
	}
	if len(b.reservedFor(gone)) != 0 {
		t.Error("the removed container has its address")
	}
}

func TestContainerDiesDuringAttach(t *testing.T) {
	b := newBed(t, harness.Options{})
	b.set(func(f *fake) {
		f.during = func(r plugin.Request) {
			pid, _ := strconv.Atoi(strings.Split(r.Netns, "/")[2])
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Errorf("kill the container: %v", err)
			}
			harness.Eventually(t, "its namespace goes", func() error {
				if _, err := os.Stat(r.Netns); err == nil {
					return errors.New("it is there")
				}
				return nil
			})
		}
	})
	if out, err := b.Try("ctr", "run", "--rm", "--label", "lace.network=backend", harness.Busybox, "mortal", "true"); err == nil {
		t.Fatalf("it ran: %s", out)
	}
	b.eventuallyReleased("default/mortal")
	b.set(func(f *fake) { f.during = nil })
	b.Ctr("run", "--rm", "--label", "lace.network=backend", harness.Busybox, "mortal", "true")
}
