// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/lace-net/lace/topology"
)

// Where things lie inside a node: the usual places, so that what a user types there is what would be
// typed on a host.
const (
	containerdProgram = "containerd"
	agentProgram      = "agent"
	containerdSocket  = "/run/containerd/containerd.sock"
	agentSocket       = "/run/lace/lace.sock"
	topologyFile      = "/etc/lace/topology.toml"
	containerdConfig  = "/etc/containerd/config.toml"
	crictlConfig      = "/etc/containerd/crictl.yaml"
	nerdctlConfig     = "/etc/nerdctl/nerdctl.toml"
	cniConfDir        = "/etc/cni/net.d"
	cniBinDir         = "/opt/cni/bin"
	optDir            = "/opt/containerd"
)

//go:embed files/containerd.toml
var containerdTOML []byte

//go:embed files/nerdctl.toml
var nerdctlTOML []byte

//go:embed files/crictl.yaml
var crictlYAML []byte

//go:embed files/10-lace.conflist
var conflist []byte

// Stack is the containerd that each node gets an own instance of.
type Stack struct {
	Containerd string // path of the program; its clients lie beside it
	Runtime    string // path of lace-runc, which stands before runc and is the CNI plugin too; empty: neither
	Image      string // archive that each node imports; empty: none
}

// FindStack looks for containerd in the first of these that is given: dir, the directory that
// LACE_TOOLS_BIN names, PATH. A nil Stack without an error: the machine has none.
func FindStack(dir, toolsBin string) (*Stack, error) {
	if dir == "" {
		dir = toolsBin
	}
	if dir == "" {
		path, err := exec.LookPath("containerd")
		if err != nil {
			return nil, nil
		}
		return &Stack{Containerd: path}, nil
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "containerd")
	if _, err := exec.LookPath(path); err != nil {
		return nil, fmt.Errorf("no containerd in %s: %w; scripts/tools makes such a directory", dir, err)
	}
	return &Stack{Containerd: path}, nil
}

// programs are what runs in a node, in the order in which they start.
func (o *Options) programs(n *topology.Node) []Program {
	if o.isInternet(n) {
		return []Program{o.server()}
	}
	var programs []Program
	if o.Stack != nil {
		programs = append(programs, Program{
			Name: containerdProgram, Socket: containerdSocket, Env: o.environ(),
			Args: []string{o.Stack.Containerd, "--config", containerdConfig},
		})
	}
	if o.Agent != nil {
		programs = append(programs, Program{Name: agentProgram, Socket: agentSocket, Env: o.environ(), Args: o.Agent})
	}
	return programs
}

// spec says what one node is made of.
func (o *Options) spec(node *topology.Node, cgroups []string) Spec {
	spec := Spec{
		Hostname: node.Name,
		Dirs:     []string{"/etc/lace"},
		Files:    []File{{Path: topologyFile, Content: o.File}},
		Programs: o.programs(node),
		Sysctls:  quietIPv6(),
	}
	for _, dir := range cgroups {
		spec.Cgroups = append(spec.Cgroups, filepath.Join(dir, node.Name))
	}
	if o.Stack != nil {
		spec.Dirs = append(spec.Dirs, stackDirs...)
		spec.Files = append(spec.Files, o.Stack.files()...)
	}
	return spec
}

// stackDirs are a node's own, so that no two nodes and not the machine's own containerd meet.
var stackDirs = []string{
	"/etc/containerd", "/etc/nerdctl", "/etc/cni", "/etc/nri",
	"/opt/containerd", "/opt/cni", "/opt/nri",
	"/var/lib/containerd", "/var/lib/nerdctl", "/var/lib/cni",
}

func (s *Stack) files() []File {
	files := []File{
		{Path: containerdConfig, Content: containerdTOML},
		{Path: nerdctlConfig, Content: nerdctlTOML},
		{Path: crictlConfig, Content: crictlYAML},
		{Path: cniConfDir + "/10-lace.conflist", Content: conflist},
	}
	if s.Runtime == "" {
		return files
	}
	return append(files,
		File{Path: optDir + "/bin/runc", Link: s.Runtime},
		File{Path: cniBinDir + "/lace-cni", Link: s.Runtime})
}

const systemPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func nodePath(front []string) string {
	return strings.Join(append(append([]string{}, front...), systemPath), ":")
}

// environ is what a program of a node finds: nothing of the caller's.
func (o *Options) environ() []string {
	return append(clientEnv(), "PATH="+nodePath(o.Path), "HOME=/root", "LANG=C.UTF-8")
}

// clientEnv makes the usual clients find the node's own containerd without flags.
func clientEnv() []string {
	return []string{
		"CONTAINERD_ADDRESS=" + containerdSocket,
		"CONTAINER_RUNTIME_ENDPOINT=unix://" + containerdSocket,
		"IMAGE_SERVICE_ENDPOINT=unix://" + containerdSocket,
		"CRI_CONFIG_FILE=" + crictlConfig,
		"NERDCTL_TOML=" + nerdctlConfig,
		"CNI_PATH=" + cniBinDir,
		"NETCONFPATH=" + cniConfDir,
	}
}

// importImage puts the image into both containerd namespaces: nerdctl's and ctr's, and CRI's.
func (s *Stack) importImage(ctx context.Context, lab, node string) error {
	if s.Image == "" {
		return nil
	}
	for _, namespace := range []string{"default", "k8s.io"} {
		cmd := exec.CommandContext(ctx, "/proc/self/exe", "lab", "exec", "--name", lab, node, "--",
			filepath.Join(filepath.Dir(s.Containerd), "ctr"), "-n", namespace, "images", "import", s.Image)
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Run(); err != nil {
			return errors.Join(ctx.Err(), fmt.Errorf("import %s into containerd namespace %s: %w: %s",
				s.Image, namespace, err, bytes.TrimSpace(said.Bytes())))
		}
	}
	return nil
}

// CheckImage refuses an archive that cannot be read, before anything is made.
func CheckImage(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("image archive: %w", err)
	}
	return file.Close()
}
