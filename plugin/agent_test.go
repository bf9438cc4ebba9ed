// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	apievents "github.com/containerd/containerd/api/events"

	"github.com/lace-net/lace/plugin/wire"
)

// fakeRecords is containerd's memory.
type fakeRecords struct {
	mu        sync.Mutex
	byKey     map[string]container
	podByID   map[string]wire.Pod
	fail      error // of every read of containers
	failPods  error
	listed    func()
	remembers int
}

func (f *fakeRecords) container(_ context.Context, ns, id string) (container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, ok := f.byKey[key(ns, id)]
	if !ok {
		return c, errors.Join(f.fail, errors.New("not found"))
	}
	return c, f.fail
}

func (f *fakeRecords) pod(_ context.Context, id string) (wire.Pod, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, ok := f.podByID[id]
	if !ok {
		return p, errors.New("not found")
	}
	return p, f.failPods
}

func (f *fakeRecords) remember(_ context.Context, ns, id string, labels map[string]string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.remembers++
	c := f.byKey[key(ns, id)]
	c.labels = merged(c.labels, labels)
	f.byKey[key(ns, id)] = c
	return nil
}

func (f *fakeRecords) containers(context.Context) (all []container, err error) {
	f.mu.Lock()
	for _, c := range f.byKey {
		all = append(all, c)
	}
	f.mu.Unlock()
	if f.listed != nil {
		f.listed()
	}
	return all, f.fail
}

func (f *fakeRecords) pods(context.Context) (all []wire.Pod, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.podByID {
		all = append(all, p)
	}
	return all, f.failPods
}

// fakeDataplane records what it is asked.
type fakeDataplane struct {
	mu       sync.Mutex
	wired    map[string]Request
	reserved map[string]Request
	calls    []string
	refuse   func(Request) error
	live     []string
	working  map[string]bool
}

func (f *fakeDataplane) note(format string, v ...any) {
	f.calls = append(f.calls, fmt.Sprintf(format, v...))
}

func (f *fakeDataplane) Attach(_ context.Context, r Request) ([]Result, error) {
	f.mu.Lock()
	if f.working[r.Container] {
		f.note("overlap")
	}
	f.working[r.Container] = true
	refuse := f.refuse
	f.mu.Unlock()
	var err error
	if refuse != nil {
		err = refuse(r)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.working[r.Container] = false
	f.note("attach %s %s", r.Container, addressesOf(r))
	if err != nil {
		return nil, err
	}
	f.wired[r.Container] = r
	return resultsOf(r), nil
}

// addressesOf lists what is asked for, one network behind the other.
func addressesOf(r Request) string {
	var all []string
	for _, i := range r.Interfaces {
		all = append(all, fmt.Sprint(i.IPs))
	}
	return strings.Join(all, " ")
}

// resultsOf gives the n-th interface 10.40.n+1.2 where nothing is asked for.
func resultsOf(r Request) (all []Result) {
	for n, i := range r.Interfaces {
		ip := netip.AddrFrom4([4]byte{10, 40, byte(n + 1), 2})
		if len(i.IPs) > 0 {
			ip = i.IPs[0]
		}
		all = append(all, Result{Network: i.Network, IfName: i.IfName, V4: netip.PrefixFrom(ip, 24), MAC: []byte{2, 0, 0, 0, 0, byte(n + 1)}, MTU: 1460})
	}
	return all
}

func (f *fakeDataplane) Attached(c string) ([]Result, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.wired[c]
	return resultsOf(r), ok
}

func (f *fakeDataplane) Detach(_ context.Context, c string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("detach %s", c)
	delete(f.wired, c)
	return nil
}

func (f *fakeDataplane) Reserve(_ context.Context, r Request) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("reserve %s %s", r.Container, addressesOf(r))
	f.reserved[r.Container] = r
	return nil
}

func (f *fakeDataplane) Release(_ context.Context, c string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("release %s", c)
	delete(f.wired, c)
	return nil
}

func (f *fakeDataplane) Retain(_ context.Context, live []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("retain")
	f.live = live
	return nil
}

func (f *fakeDataplane) called(call string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.ContainsFunc(f.calls, func(c string) bool { return strings.HasPrefix(c, call) })
}

// agentBed is an agent without sockets.
type agentBed struct {
	*Agent
	records *fakeRecords
	plane   *fakeDataplane
}

func newAgentBed() agentBed {
	b := agentBed{records: &fakeRecords{byKey: map[string]container{}, podByID: map[string]wire.Pod{}},
		plane: &fakeDataplane{wired: map[string]Request{}, reserved: map[string]Request{}, working: map[string]bool{}}}
	b.Agent = New(Options{Log: discard(), Containerd: "/nowhere/c.sock"}, b.plane)
	b.Agent.records = b.records
	return b
}

// process starts one that waits in a network namespace of its own and returns its pid.
func process(t *testing.T) int {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to make a network namespace; run it as root")
	}
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

func (b agentBed) add(id string, labels labelMap, pid int) {
	b.records.byKey[key("default", id)] = container{namespace: "default", id: id, labels: labels, ownNetwork: true, pid: uint32(pid)}
}

func (b agentBed) create(id string, pid int) wire.Answer {
	return b.handle(context.Background(), wire.Message{Stage: wire.CreateRuntime, Namespace: "default", State: &wire.State{ID: id, Pid: pid}})
}

// nri is the agent's side of NRI, in front of a containerd that waits long.
func (b agentBed) nri() *nriPlugin {
	return &nriPlugin{agent: b.Agent, timeout: func() time.Duration { return patience }}
}

var backend = labelMap{LabelNetwork: "backend"}

func TestAnswersOfCreateRuntime(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.add("plain", labelMap{"app": "web"}, 0)
	b.add("wrong", labelMap{LabelIP: "10.40.1.7"}, 0)
	b.add("asks", backend, 0)
	if a := b.create("plain", pid); a.Error != "" || a.Result != nil {
		t.Errorf("plain: %+v", a)
	}
	if a := b.create("wrong", pid); !strings.Contains(a.Error, "lace.network is not") || a.Undecided {
		t.Errorf("wrong: %+v", a)
	}
	if a := b.create("unknown", pid); a.Error == "" || !a.Undecided {
		t.Errorf("unknown: %+v", a)
	}
	if a := b.create("asks", 0); !strings.Contains(a.Error, "has pid 0") {
		t.Errorf("without a process: %+v", a)
	}
	if a := b.create("asks", os.Getpid()); a.Error != "" || a.Result != nil {
		t.Errorf("on the node's own network: %+v", a)
	}
	if b.plane.called("attach") {
		t.Errorf("calls %v", b.plane.calls)
	}
	if a := b.create("asks", pid); a.Error != "" || a.Result == nil || a.Result.Interfaces[0].IPs[0].String() != "10.40.1.2/24" {
		t.Errorf("asks: %+v", a)
	}
	if got := b.records.byKey["default/asks"].labels[RecordAddress]; got != "10.40.1.2" {
		t.Errorf("record %q", got)
	}
	b.create("asks", pid)
	if b.records.remembers != 1 {
		t.Errorf("an unchanged record was written %d times", b.records.remembers)
	}
	other := wire.Message{Stage: wire.CreateRuntime, Namespace: "default", Containerd: "/other.sock", State: &wire.State{ID: "asks", Pid: pid}}
	if a := b.handle(context.Background(), other); !a.Undecided || !strings.Contains(a.Error, "another") && !strings.Contains(a.Error, "/other.sock") {
		t.Errorf("of another containerd: %+v", a)
	}
}

func TestInterfaceOfAnotherNetwork(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.add("c1", backend, 0)
	netns := fmt.Sprintf("/proc/%d/ns/net", pid)
	if out, err := exec.Command("nsenter", "--net="+netns, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if a := b.create("c1", pid); !strings.Contains(a.Error, "--net none") || a.Undecided {
		t.Errorf("%+v", a)
	}
}

func TestContainerThatEndsDuringAttachIsUndone(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.add("c1", backend, 0)
	b.plane.refuse = func(Request) error {
		p, _ := os.FindProcess(pid)
		p.Kill()
		for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil || time.Now().After(deadline) {
				return nil
			}
		}
	}
	if a := b.create("c1", pid); !strings.Contains(a.Error, "ended while it was wired") {
		t.Errorf("%+v", a)
	}
	if !b.plane.called("detach default/c1") {
		t.Errorf("calls %v", b.plane.calls)
	}
}

func TestAttachesOfOneContainerDoNotOverlap(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.add("c1", backend, 0)
	b.plane.refuse = func(Request) error { time.Sleep(time.Millisecond); return nil }
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			if a := b.create("c1", pid); a.Error != "" {
				t.Errorf("%+v", a)
			}
		})
	}
	all.Wait()
	if b.plane.called("overlap") {
		t.Error("two worked on one container at once")
	}
	if len(b.one.locks) != 0 {
		t.Errorf("%d locks are left", len(b.one.locks))
	}
}

func exit(id, process string, pid int) *apievents.TaskExit {
	return &apievents.TaskExit{ContainerID: id, ID: process, Pid: uint32(pid)}
}

func TestOnlyTheEndOfTheTaskDetaches(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.add("c1", backend, 0)
	b.create("c1", pid)
	for what, ev := range map[string]*apievents.TaskExit{
		"an exec's end": exit("c1", "exec-1", pid), "an earlier task's end": exit("c1", "c1", pid+1), "another's end": exit("c2", "c2", pid)} {
		if err := b.taskExited(t.Context(), "default", ev); err != nil || b.plane.called("detach") {
			t.Errorf("%s: error %v, calls %v", what, err, b.plane.calls)
		}
	}
	if err := b.taskExited(t.Context(), "default", exit("c1", "c1", pid)); err != nil || !b.plane.called("detach default/c1") {
		t.Errorf("error %v, calls %v", err, b.plane.calls)
	}
	if err := b.containerDeleted(t.Context(), "default", "c1"); err != nil || !b.plane.called("release default/c1") || len(b.known) != 0 {
		t.Errorf("error %v, calls %v, known %v", err, b.plane.calls, b.known)
	}
}

func TestSynchroniseSettlesEach(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.add("runs", backend, pid)
	b.add("wired", backend, pid)
	b.plane.wired["default/wired"] = Request{Interfaces: []Interface{{Network: "backend", IfName: "eth0"}}}
	b.add("stopped", labelMap{LabelNetwork: "backend", RecordAddress: "10.40.1.9"}, 0)
	b.add("never-ran", backend, 0)
	b.add("wrong", labelMap{LabelNetwork: "a,a"}, pid)
	b.add("plain", labelMap{"app": "web"}, pid)
	b.records.byKey["k8s.io/p1"] = container{namespace: "k8s.io", id: "p1", labels: backend, cri: true, ownNetwork: true}
	b.records.byKey["default/host"] = container{namespace: "default", id: "host", labels: backend}
	b.records.podByID["p1"] = wire.Pod{ID: "p1", Name: "p", Labels: backend, Netns: fmt.Sprintf("/proc/%d/ns/net", pid)}
	b.records.podByID["p2"] = wire.Pod{ID: "p2", Name: "p", Labels: backend, Netns: filepath.Join(t.TempDir(), "gone")}
	b.records.podByID["p3"] = wire.Pod{ID: "p3", Name: "p", Labels: backend, HostNetwork: true}
	if err := b.synchronise(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []string{"default/never-ran", "default/runs", "default/stopped", "default/wired", "default/wrong", "k8s.io/p1", "k8s.io/p2"}
	if !slices.Equal(b.plane.live, want) {
		t.Errorf("live\n%v, want\n%v", b.plane.live, want)
	}
	for call, made := range map[string]bool{"attach default/runs": true, "attach default/wired": false, "reserve default/stopped [10.40.1.9]": true,
		"detach default/stopped": true, "reserve default/never-ran": false, "attach k8s.io/p1": true, "detach k8s.io/p2": true, "attach default/wrong": false} {
		if b.plane.called(call) != made {
			t.Errorf("%s: %v, want %v; calls %v", call, !made, made, b.plane.calls)
		}
	}
}

func TestNothingIsTakenAwayBeforeAllIsKnown(t *testing.T) {
	starting := errors.New("containerd is starting")
	for what, fail := range map[string]func(*fakeRecords){
		"containers": func(r *fakeRecords) { r.fail = starting }, "pods": func(r *fakeRecords) { r.failPods = starting }} {
		b := newAgentBed()
		fail(b.records)
		if err := b.synchronise(t.Context()); !errors.Is(err, starting) || b.plane.called("retain") {
			t.Errorf("%s: error %v, calls %v", what, err, b.plane.calls)
		}
	}
}

func TestContainerMadeDuringSynchronisationIsKept(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.records.listed = func() {
		b.records.mu.Lock()
		b.add("late", backend, 0)
		b.records.mu.Unlock()
		if a := b.create("late", pid); a.Error != "" {
			t.Errorf("%+v", a)
		}
	}
	if err := b.synchronise(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(b.plane.live, "default/late") {
		t.Errorf("live %v", b.plane.live)
	}
}

func TestNames(t *testing.T) {
	random := strings.Repeat("ab", 32)
	for _, tt := range []struct{ id, name, want string }{{random, "db", "db"}, {random, "", random[:12]}, {"mine", "", "mine"}, {"mine", "-odd name-", "mine"}} {
		if r, err := complete(Request{}, "default", tt.id, tt.name); err != nil || r.Name != tt.want {
			t.Errorf("id %s, name %q: %q, %v", tt.id, tt.name, r.Name, err)
		}
	}
	if _, err := complete(Request{Sticky: true}, "default", random, ""); err == nil || !strings.Contains(err.Error(), "lace.name") {
		t.Errorf("sticky without a name: %v", err)
	}
}

func TestRunRefusesATakenSocket(t *testing.T) {
	path := serve(t, ok)
	if err := New(Options{Socket: path, Log: discard()}, newAgentBed().plane).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("error %v", err)
	}
}

// TestRunWaitsForContainerd hears hooks while neither containerd nor NRI is there.
func TestRunWaitsForContainerd(t *testing.T) {
	dir := t.TempDir()
	b := newAgentBed()
	a := New(Options{Socket: dir + "/lace.sock", Containerd: dir + "/c.sock", NRI: dir + "/nri.sock", Log: discard()}, b.plane)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- a.Run(ctx) }()
	<-a.Ready()
	if answer := ask(t, dir+"/lace.sock", wire.Message{Stage: wire.Poststop, Namespace: "default", State: &wire.State{ID: "c1"}}); answer.Error != "" {
		t.Errorf("%+v", answer)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if b.plane.called("retain") {
		t.Error("something was taken away without containerd")
	}
}
