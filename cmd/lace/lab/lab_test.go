// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/topology"
)

func TestCheckName(t *testing.T) {
	for name, good := range map[string]bool{
		"lab": true, "Lab_2": true, "x": true, strings.Repeat("a", 16): true,
		"": false, "a-b": false, "../etc": false, ".": false, "a b": false, strings.Repeat("a", 17): false,
	} {
		if err := CheckName(name); (err == nil) != good {
			t.Errorf("CheckName(%q) = %v", name, err)
		}
	}
}

func TestHostsLeavesRoutersOut(t *testing.T) {
	router := host("r", "fd00:a::9", "5f00:1ace:9::/48")
	router.Kind = topology.KindRouter
	edge := host("edge-1", "fd00:a::1", "5f00:1ace:1::/48")
	got := hosts(&topology.Topology{Nodes: []*topology.Node{edge, router}})
	if len(got) != 1 || got[0] != edge {
		t.Errorf("got %d nodes", len(got))
	}
}

func TestParseStartTime(t *testing.T) {
	stat := "42 (a (b) c) S 1 42 42 0 -1 4194560 10 0 0 0 1 2 3 4 20 0 1 0 987654 1000 50 18446744073709551615"
	got, err := parseStartTime([]byte(stat))
	if err != nil || got != 987654 {
		t.Errorf("got %d, %v", got, err)
	}
	if _, err := parseStartTime([]byte("42 (a) S 1")); err == nil {
		t.Error("a short line was taken")
	}
}

func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

func TestKillSparesAReusedPID(t *testing.T) {
	cmd := sleeper(t)
	real, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for name, stale := range map[string]process{
		"other start": {PID: real.PID, Start: real.Start - 1, Boot: real.Boot},
		"other boot":  {PID: real.PID, Start: real.Start, Boot: "2d7f…"},
		"no pid":      {},
	} {
		if err := stale.kill(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if stale.alive() {
			t.Errorf("%s: counts as alive", name)
		}
	}
	if !real.alive() {
		t.Fatal("a process that was not meant was ended")
	}
	if err := real.kill(); err != nil {
		t.Fatal(err)
	}
	if real.alive() {
		t.Error("still alive after kill")
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("ended with %v", err)
	}
	if err := real.kill(); err != nil {
		t.Errorf("ending it twice: %v", err)
	}
}

func TestParseMount(t *testing.T) {
	got, ok := parseMount(`36 35 98:0 /sub /mnt/a\040b rw,noatime master:1 - cgroup cgroup rw,cpu,cpuacct`)
	want := mount{root: "/sub", point: "/mnt/a b", fstype: "cgroup", options: "rw,cpu,cpuacct"}
	if !ok || got != want {
		t.Errorf("got %+v, %v", got, ok)
	}
	for _, bad := range []string{"", "36 35", "36 35 98:0 / /mnt rw - ext4"} {
		if _, ok := parseMount(bad); ok {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestOwnCgroup(t *testing.T) {
	const text = "4:memory:/session/a\n1:cpu,cpuacct:/\n9:name=systemd:/user\n0::/unified\n"
	for _, tt := range []struct {
		m    mount
		want string
	}{
		{mount{root: "/", fstype: "cgroup", options: "rw,memory"}, "session/a"},
		{mount{root: "/session", fstype: "cgroup", options: "rw,memory"}, "a"},
		{mount{root: "/other", fstype: "cgroup", options: "rw,memory"}, "/"},
		{mount{root: "/", fstype: "cgroup", options: "rw,cpu,cpuacct"}, "."},
		{mount{root: "/", fstype: "cgroup", options: "rw,name=systemd"}, "user"},
		{mount{root: "/", fstype: "cgroup2", options: "rw"}, "/"},
	} {
		if got := ownCgroup(text, tt.m); got != tt.want {
			t.Errorf("%+v: got %q, want %q", tt.m, got, tt.want)
		}
	}
}

func TestMountPointOf(t *testing.T) {
	mounts := []mount{{point: "/sys/fs/cgroup"}, {point: "/sys/fs/cgroup/cpu"}, {point: "/sys/fs/cgroup/cpuset"}}
	if got := mountPointOf("/sys/fs/cgroup/cpuset/lace-lab/lab/edge-1", mounts); got != "/sys/fs/cgroup/cpuset" {
		t.Errorf("got %q", got)
	}
}

func TestRemoveCgroupsSparesOthers(t *testing.T) {
	foreign := t.TempDir()
	if err := removeCgroups("lacetest", []string{foreign, filepath.Join(foreign, "lace-lab", "lacetest")}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Errorf("a directory outside the cgroups was removed: %v", err)
	}
}

// A node's conflist is the one that a host installs.
func TestConflistIsTheShippedOne(t *testing.T) {
	shipped, err := os.ReadFile("../../../conf/10-lace.conflist")
	if err != nil {
		t.Fatal(err)
	}
	if string(shipped) != string(conflist) {
		t.Error("files/10-lace.conflist and conf/10-lace.conflist differ; make them the same")
	}
}

func TestFindStack(t *testing.T) {
	tools := t.TempDir()
	if err := os.WriteFile(filepath.Join(tools, "containerd"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	got, err := FindStack(tools, "/elsewhere")
	if err != nil || got == nil || got.Containerd != filepath.Join(tools, "containerd") {
		t.Errorf("by directory: %+v, %v", got, err)
	}
	if got, err = FindStack("", tools); err != nil || got == nil {
		t.Errorf("by LACE_TOOLS_BIN: %+v, %v", got, err)
	}
	if _, err = FindStack(t.TempDir(), ""); err == nil {
		t.Error("an empty directory was taken")
	}
	t.Setenv("PATH", tools)
	if got, err = FindStack("", ""); err != nil || got == nil {
		t.Errorf("by PATH: %+v, %v", got, err)
	}
	t.Setenv("PATH", t.TempDir())
	if got, err = FindStack("", ""); err != nil || got != nil {
		t.Errorf("with none on the machine: %+v, %v", got, err)
	}
}

func TestSpecOfANode(t *testing.T) {
	o := &Options{Name: "lab", File: []byte("version = 1\n"), Agent: []string{"/bin/lace", "agent"},
		Stack: &Stack{Containerd: "/tools/containerd", Runtime: "/bin/lace-runc"}, Path: []string{"/tools"}}
	spec := o.spec(host("edge-1", "fd00:a::1", "5f00:1ace:1::/48"), []string{"/sys/fs/cgroup/lace-lab/lab"})
	if spec.Hostname != "edge-1" || !slices.Equal(spec.Cgroups, []string{"/sys/fs/cgroup/lace-lab/lab/edge-1"}) {
		t.Errorf("got host name %q, cgroups %q", spec.Hostname, spec.Cgroups)
	}
	for path, link := range map[string]string{
		"/etc/lace/topology.toml": "", "/etc/containerd/config.toml": "",
		"/opt/containerd/bin/runc": "/bin/lace-runc", "/opt/cni/bin/lace-cni": "/bin/lace-runc",
	} {
		i := slices.IndexFunc(spec.Files, func(f File) bool { return f.Path == path })
		if i < 0 || spec.Files[i].Link != link {
			t.Errorf("%s: index %d in %+v", path, i, spec.Files)
		}
	}
	if len(spec.Programs) != 2 || spec.Programs[0].Name != containerdProgram || spec.Programs[1].Name != agentProgram {
		t.Errorf("programs: %+v", spec.Programs)
	}
	o.Stack, o.Agent = nil, nil
	if bare := o.spec(host("edge-1", "fd00:a::1", "5f00:1ace:1::/48"), nil); len(bare.Programs) != 0 || len(bare.Files) != 1 {
		t.Errorf("a bare node has %+v", bare)
	}
}

func TestHowEnded(t *testing.T) {
	if got := howEnded(unix.WaitStatus(3 << 8)); got != "status 3" {
		t.Errorf("got %q", got)
	}
	if got := howEnded(unix.WaitStatus(unix.SIGKILL)); got != "signal SIGKILL" {
		t.Errorf("got %q", got)
	}
}

func TestLookPath(t *testing.T) {
	if got, err := lookPath("sh", "/nowhere:/bin"); err != nil || got != "/bin/sh" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := lookPath("sh", "/nowhere"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

func TestExitStatus(t *testing.T) {
	for command, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -TERM $$": 143} {
		got, err := exitStatus(exec.Command("/bin/sh", "-c", command).Run())
		if err != nil || got != want {
			t.Errorf("%s: got %d, %v, want %d", command, got, err, want)
		}
	}
	if _, err := exitStatus(errors.New("no child")); err == nil {
		t.Error("an error that is no exit status was taken for one")
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if got := tail(path); got != "" {
		t.Errorf("no file: got %q", got)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("old\n", 50)+"last\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := tail(path)
	if !strings.HasSuffix(got, "    last") || strings.Count(got, "old") != 11 {
		t.Errorf("got %q", got)
	}
}

func TestBadOptionsMakeNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: who is not root is refused before anything else is looked at; run as root")
	}
	nodes := &topology.Topology{Nodes: []*topology.Node{host("edge-1", "fd00:a::1", "5f00:1ace:1::/48")}}
	for name, o := range map[string]Options{
		"name": {Name: "a-b", MTU: DefaultMTU, Topology: nodes},
		"mtu":  {Name: "lacetest", MTU: 1280, Topology: nodes},
		"host": {Name: "lacetest", MTU: DefaultMTU, Topology: &topology.Topology{}},
	} {
		if err := Up(t.Context(), o); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("bad %s: %v", name, err)
		}
	}
	if _, err := os.Stat(stateDir("lacetest")); err == nil {
		t.Error("a refused lab left its directory")
	}
}
