// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	toolsEnv = "LACE_TOOLS_BIN"
	imageEnv = "LACE_IMAGE"

	// Busybox and Pause are the images of LACE_IMAGE.
	Busybox = "lace.test/busybox:latest"
	Pause   = "lace.test/pause:latest"

	// Patience bounds every wait for something that should happen soon.
	Patience = 60 * time.Second
)

// Containerd is a real containerd with root, state and sockets of its own, whose runc is lace-runc.
type Containerd struct {
	Dir    string // holds all of it
	Socket string // containerd's
	NRI    string // NRI's socket; there only with Options.NRI
	Agent  string // where lace-runc looks for the agent

	t       *testing.T
	options Options
	process *exec.Cmd
}

// Options change what Start makes.
type Options struct {
	NRI bool // let containerd offer NRI
}

// Start makes a containerd below a directory of the test's, with the images of LACE_IMAGE, and takes it down with
// all its containers at the test's end.
func Start(t *testing.T, o Options) *Containerd {
	t.Helper()
	Need(t)
	dir, err := os.MkdirTemp("", "lace-ctd-") // short: sockets below it
	if err != nil {
		t.Fatal(err)
	}
	c := &Containerd{Dir: dir, t: t, options: o, Socket: dir + "/c.sock", NRI: dir + "/nri.sock", Agent: dir + "/lace/lace.sock"}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("the test left something mounted: %v", err)
		}
	})
	c.install()
	c.write("config.toml", c.config())
	c.write("crictl.yaml", fmt.Sprintf("runtime-endpoint: unix://%s\nimage-endpoint: unix://%s\ntimeout: 30\n", c.Socket, c.Socket))
	c.write("cni/conf/10-lace.conflist", fmt.Sprintf(`{"cniVersion":"1.0.0","name":"lace","plugins":[
{"type":"lace-cni","socket":%q,"containerd":%q,"capabilities":{"io.kubernetes.cri.pod-annotations":true}}]}`, c.Agent, c.Socket))
	t.Cleanup(c.takeDown)
	c.Launch()
	c.Ctr("-n", "default", "images", "import", os.Getenv(imageEnv))
	c.Ctr("-n", "k8s.io", "images", "import", os.Getenv(imageEnv))
	return c
}

// laceRunc builds the wrapper.
func laceRunc(dir string) error {
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "lace-runc"), "github.com/lace-net/lace/cmd/lace-runc")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build lace-runc: %w\n%s", err, out)
	}
	return nil
}

// install puts lace-runc where containerd and CRI find it, as on a real host.
func (c *Containerd) install() {
	c.t.Helper()
	for _, d := range []string{"opt/bin", "cni/bin", "cni/conf", "nri-plugins", "nri-conf", "logs"} {
		if err := os.MkdirAll(filepath.Join(c.Dir, d), 0o755); err != nil {
			c.t.Fatal(err)
		}
	}
	if err := laceRunc(filepath.Join(c.Dir, "opt/bin")); err != nil {
		c.t.Fatal(err)
	}
	for _, link := range []string{"opt/bin/runc", "cni/bin/lace-cni"} {
		if err := os.Link(filepath.Join(c.Dir, "opt/bin/lace-runc"), filepath.Join(c.Dir, link)); err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c *Containerd) write(name, text string) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(c.Dir, name), []byte(text), 0o644); err != nil {
		c.t.Fatal(err)
	}
}

func (c *Containerd) config() string {
	return strings.NewReplacer("DIR", c.Dir, "NRIOFF", fmt.Sprint(!c.options.NRI), "PAUSE", Pause).Replace(`version = 3
root = "DIR/root"
state = "DIR/state"
disabled_plugins = ["io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "DIR/c.sock"
[ttrpc]
  address = "DIR/c.sock.ttrpc"
[plugins."io.containerd.nri.v1.nri"]
  disable = NRIOFF
  plugin_config_path = "DIR/nri-conf"
  plugin_path = "DIR/nri-plugins"
  socket_path = "DIR/nri.sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "PAUSE"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["DIR/cni/bin"]
  conf_dir = "DIR/cni/conf"
  use_internal_loopback = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
    SystemdCgroup = false
[plugins."io.containerd.internal.v1.opt"]
  path = "DIR/opt"
`)
}

// Launch starts containerd and waits until it answers. After Stop or Kill it starts it again, with what it had.
func (c *Containerd) Launch() {
	c.t.Helper()
	log, err := os.OpenFile(c.Dir+"/containerd.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	c.process = exec.Command(c.tool("containerd"), "--config", c.Dir+"/config.toml")
	c.process.Env = c.env()
	c.process.Stdout, c.process.Stderr = log, log
	if err := c.process.Start(); err != nil {
		c.t.Fatal(err)
	}
	// ready as soon as CRI is, which is the last
	c.Eventually("containerd answers", func() error {
		_, err := c.Try("crictl", "info")
		return err
	})
}

// Stop ends containerd as systemd does; containers run on.
func (c *Containerd) Stop() { c.end(syscall.SIGTERM) }

// Kill ends containerd without a word.
func (c *Containerd) Kill() { c.end(syscall.SIGKILL) }

func (c *Containerd) end(signal os.Signal) {
	if c.process == nil {
		return
	}
	if err := c.process.Process.Signal(signal); err != nil {
		c.t.Errorf("end containerd: %v", err)
	}
	_ = c.process.Wait() // its status is the signal
	c.process = nil
}

// takeDown removes all containers, then containerd: a shim without containerd would stay.
func (c *Containerd) takeDown() {
	if c.t.Failed() {
		c.dumpLog()
	}
	if c.process == nil {
		c.Launch()
	}
	if _, err := c.Try("crictl", "rmp", "-a", "-f"); err != nil {
		c.t.Errorf("take down: %v", err)
	}
	namespaces, _ := c.Try("ctr", "namespaces", "ls", "-q")
	for ns := range strings.FieldsSeq(namespaces) {
		c.removeAll(ns)
	}
	c.Stop()
}

func (c *Containerd) removeAll(ns string) {
	ids, _ := c.Try("ctr", "-n", ns, "containers", "ls", "-q")
	for id := range strings.FieldsSeq(ids) {
		_, _ = c.Try("ctr", "-n", ns, "tasks", "rm", "-f", id) // there may be none
		if _, err := c.Try("ctr", "-n", ns, "containers", "rm", id); err != nil {
			c.t.Errorf("take down: %v", err)
		}
	}
}

func (c *Containerd) dumpLog() {
	b, err := os.ReadFile(c.Dir + "/containerd.log")
	if err != nil {
		return
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	c.t.Logf("the end of containerd's log:\n%s", strings.Join(lines[max(0, len(lines)-25):], "\n"))
}

func (c *Containerd) tool(name string) string { return filepath.Join(os.Getenv(toolsEnv), name) }

// env is that of a host: the tools in PATH, and the test's socket in place of the agent's usual one.
func (c *Containerd) env() []string {
	return append(os.Environ(),
		"PATH="+os.Getenv(toolsEnv)+":"+os.Getenv("PATH"),
		"LACE_SOCKET="+c.Agent,
		"CONTAINERD_ADDRESS="+c.Socket,
		"CRI_CONFIG_FILE="+c.Dir+"/crictl.yaml",
		"NERDCTL_TOML="+c.Dir+"/nerdctl.toml")
}

var globalFlags = map[string]func(c *Containerd) []string{
	"ctr":    func(c *Containerd) []string { return []string{"--address", c.Socket} },
	"crictl": func(c *Containerd) []string { return []string{"--config", c.Dir + "/crictl.yaml"} },
	"nerdctl": func(c *Containerd) []string {
		return []string{"--address", c.Socket, "--data-root", c.Dir + "/nerdctl", "--cgroup-manager", "cgroupfs",
			"--cni-path", c.Dir + "/cni/bin", "--cni-netconfpath", c.Dir + "/nerdctl-cni"}
	},
}

// Try runs ctr, crictl or nerdctl against this containerd and returns its output. The error holds what the
// client wrote to its terminal.
func (c *Containerd) Try(client string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.tool(client), append(globalFlags[client](c), args...)...)
	cmd.Env = c.env()
	cmd.WaitDelay = 5 * time.Second
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w\n%s%s", client, strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out), nil
}

func (c *Containerd) must(client string, args ...string) string {
	c.t.Helper()
	out, err := c.Try(client, args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// Nerdctl runs nerdctl, which has to succeed, and returns what it prints.
func (c *Containerd) Nerdctl(args ...string) string { c.t.Helper(); return c.must("nerdctl", args...) }

// Ctr runs ctr, which has to succeed, and returns what it prints.
func (c *Containerd) Ctr(args ...string) string { c.t.Helper(); return c.must("ctr", args...) }

// Crictl runs crictl, which has to succeed, and returns what it prints.
func (c *Containerd) Crictl(args ...string) string { c.t.Helper(); return c.must("crictl", args...) }

// Eventually polls until check gives no error, and fails the test after Patience.
func (c *Containerd) Eventually(what string, check func() error) {
	c.t.Helper()
	Eventually(c.t, what, check)
}

// Eventually polls until check gives no error, and fails the test after Patience.
func Eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(Patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, Patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
