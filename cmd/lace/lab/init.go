// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Inside a node, for each program: its pid while it runs, and how it ended.
func pidPath(program string) string  { return filepath.Join(privateDir, program+".pid") }
func exitPath(program string) string { return filepath.Join(privateDir, program+".exit") }

// supervisor looks after the programs of a node. It does not start anew what ends by itself: a test that
// ends a program wants to see what happens then.
type supervisor struct {
	programs []Program
	logs     []*os.File
	running  map[int]int // pid → index of the program
}

// supervise is the life of the first process of a node, once its view is made.
func supervise() error {
	spec, err := loadSpec()
	if err == nil {
		err = settleInLeaf()
	}
	reportStage(err)
	if err != nil {
		return err
	}
	s := newSupervisor(spec.Programs)
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGCHLD, unix.SIGHUP)
	s.startMissing()
	for sig := range signals {
		s.reap()
		if sig == unix.SIGHUP {
			s.startMissing()
		}
	}
	return nil
}

// settleInLeaf moves this process, and with it all it starts, out of the way of controllers.
func settleInLeaf() error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.fstype != "cgroup2" {
			continue
		}
		leaf := leafOf(m.point)
		if err := os.MkdirAll(leaf, 0o755); err != nil {
			return fmt.Errorf("make the node's own cgroup: %w", err)
		}
		if err := joinCgroup(leaf); err != nil {
			return fmt.Errorf("join the node's own cgroup: %w", err)
		}
		handDown(m.point)
	}
	return nil
}

func newSupervisor(programs []Program) *supervisor {
	s := &supervisor{programs: programs, running: map[int]int{}}
	for i, p := range programs {
		unix.CloseOnExec(logsFD + i)
		s.logs = append(s.logs, os.NewFile(uintptr(logsFD+i), p.Name))
	}
	return s
}

// startMissing starts what does not run, in order: each one finds the socket of the one before it.
func (s *supervisor) startMissing() {
	for i, p := range s.programs {
		if s.runs(i) {
			continue
		}
		if err := s.start(i); err != nil {
			s.ended(i, fmt.Sprintf("could not be started: %v", err))
			continue
		}
		s.await(i, p.Socket)
	}
}

func (s *supervisor) runs(index int) bool {
	for _, i := range s.running {
		if i == index {
			return true
		}
	}
	return false
}

func (s *supervisor) start(i int) error {
	p := s.programs[i]
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	// A socket left by a killed predecessor would be taken for a sign of life.
	if err := os.Remove(p.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	proc, err := os.StartProcess(p.Args[0], p.Args, &os.ProcAttr{
		Dir: "/", Env: p.Env,
		Files: []*os.File{null, s.logs[i], s.logs[i]},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return err
	}
	s.running[proc.Pid] = i
	_ = os.Remove(exitPath(p.Name))
	err = os.WriteFile(pidPath(p.Name), []byte(strconv.Itoa(proc.Pid)+"\n"), 0o644)
	return errors.Join(err, proc.Release()) // reap waits for all children at once
}

// await waits for the program's socket for as long as the program lives, and not for ever: the
// next one is then started all the same and says what it misses.
func (s *supervisor) await(i int, socket string) {
	for deadline := time.Now().Add(readyWait); s.runs(i) && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if isSocket(socket) {
			return
		}
		s.reap()
	}
}

// reap collects the ended: programs, and whatever was orphaned in the node.
func (s *supervisor) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if i, ours := s.running[pid]; ours {
			delete(s.running, pid)
			s.ended(i, howEnded(status))
		}
	}
}

func howEnded(status unix.WaitStatus) string {
	if status.Signaled() {
		return "signal " + unix.SignalName(status.Signal())
	}
	return fmt.Sprintf("status %d", status.ExitStatus())
}

func (s *supervisor) ended(i int, how string) {
	name := s.programs[i].Name
	fmt.Fprintf(os.Stderr, "%s has ended: %s\n", name, how)
	_ = os.Remove(pidPath(name))
	if err := os.WriteFile(exitPath(name), []byte(how+"\n"), 0o644); err != nil {
		fmt.Fprintf(os.Stderr, "note the end of %s: %v\n", name, err)
	}
}
