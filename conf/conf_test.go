// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/topology"
)

// The reference file says the defaults, so that the two cannot drift apart.
func TestReferenceSettings(t *testing.T) {
	got, err := Load("lace.toml")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got); diff != "" {
		t.Errorf("lace.toml differs from the defaults (-default +file):\n%s", diff)
	}
	text, err := os.ReadFile("lace.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"node", "topology", "containerd", "nri-socket", "nri-index", "hook-socket", "bpffs", "log-level"} {
		if !strings.Contains(string(text), "\n"+key+" = ") && !strings.Contains(string(text), "\n#"+key+" = ") {
			t.Errorf("lace.toml does not show %s", key)
		}
	}
}

func TestReferenceTopology(t *testing.T) {
	got, err := topology.Load("topology.toml")
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Nodes) != 4 || len(got.Networks) != 5 || len(got.Endpoints) != 1 {
		t.Errorf("%d nodes, %d networks and %d endpoints, want 4, 5 and 1", len(got.Nodes), len(got.Networks), len(got.Endpoints))
	}
	// What stands behind the hash signs has to be right too.
	text, err := os.ReadFile("topology.toml")
	if err != nil {
		t.Fatal(err)
	}
	shown := strings.NewReplacer("\n#uplinks", "\nuplinks", "\n#via", "\nvia", "\n#id", "\nid", "\n#egress", "\negress").Replace(string(text))
	all, err := topology.Parse("topology.toml", []byte(shown))
	if err != nil {
		t.Fatal(err)
	}
	derived, _ := got.Network("internet")
	if said, _ := all.Network("internet"); said.ID != derived.ID {
		t.Errorf("the file shows id %d of internet, and %d is the default", said.ID, derived.ID)
	}
}

func TestParse(t *testing.T) {
	got, err := Parse("lace.toml", []byte("node = 'n1'\nlog-level = \"debug\"\nnri-index = \"07\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Node, want.LogLevel, want.NRIIndex = "n1", slog.LevelDebug, "07"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseErrors(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", "\ntoplogy = '/x'", `lace.toml:2: toplogy: unknown key; did you mean "topology"?`},
		{"wrong type", "node = 3", `lace.toml:1: node: is the integer 3; write the node's name in the topology`},
		{"index", "nri-index = '1'", `lace.toml:1: nri-index: "1" is no NRI index; write two digits, as "10"`},
		{"level", "log-level = 'loud'", `lace.toml:1: log-level: slog: level string "loud": unknown name; write "debug", "info", "warn" or "error"`},
		{"relative", "bpffs = 'lace'", `lace.toml:1: bpffs: "lace" is no absolute path; write an absolute path, as /sys/fs/bpf/lace`},
		{"long socket", "hook-socket = '/" + strings.Repeat("x", 107) + "'", "is longer than the 107 bytes of a socket's path"},
		{"syntax", "node = ", "lace.toml:1: node: "},
		{"two at once", "nod = 1\nbpffs = ''", "lace.toml:1: nod: unknown key; did you mean \"node\"?\nlace.toml:2: bpffs: \"\" is no absolute path"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("lace.toml", []byte(c.text))
			var errs topology.Errors
			if !errors.As(err, &errs) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

func TestLoadMissing(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "none.toml"))
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want fs.ErrNotExist", err)
	}
}

func TestConflist(t *testing.T) {
	text, err := os.ReadFile("10-lace.conflist")
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		CNIVersion string
		Plugins    []struct{ Type string }
	}
	if err := json.Unmarshal(text, &list); err != nil {
		t.Fatal(err)
	}
	if list.CNIVersion != "1.0.0" || len(list.Plugins) != 1 || list.Plugins[0].Type != "lace-cni" {
		t.Errorf("got %+v", list)
	}
}

// The settings that containerd and the agent have to agree on.
func TestContainerdDropIn(t *testing.T) {
	var dropIn struct {
		Version int64 `toml:"version,required"`
		Plugins map[string]struct {
			Disable bool   `toml:"disable"`
			Socket  string `toml:"socket_path"`
			Reg     string `toml:"plugin_registration_timeout"`
			Request string `toml:"plugin_request_timeout"`
		} `toml:"plugins"`
	}
	text, err := os.ReadFile("containerd-nri.toml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := topology.Decode("containerd-nri.toml", text, &dropIn); err != nil {
		t.Fatal(err)
	}
	nri, ok := dropIn.Plugins["io.containerd.nri.v1.nri"]
	if !ok || nri.Disable || nri.Socket != Default().NRISocket {
		t.Errorf("got %+v, want NRI enabled at %s", nri, Default().NRISocket)
	}
}

func TestControlSocketIsBesideTheHookSocket(t *testing.T) {
	s := Default()
	if got := s.ControlSocket(); got != "/run/lace/control.sock" {
		t.Errorf("by default %s", got)
	}
	s.HookSocket = "/run/other/hook"
	if got := s.ControlSocket(); got != "/run/other/control.sock" {
		t.Errorf("of %s: %s", s.HookSocket, got)
	}
}

func TestServiceUnit(t *testing.T) {
	text, err := os.ReadFile("lace.service")
	if err != nil {
		t.Fatal(err)
	}
	unit := string(text)
	for _, line := range []string{"Type=notify", "Restart=always", "ExecStart=/usr/local/bin/lace agent",
		"ExecReload=/usr/local/bin/lace apply", "RuntimeDirectory=lace"} {
		if !strings.Contains(unit, "\n"+line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
	for _, harmful := range []string{"\nKillMode=", "\nPrivateNetwork=", "\nPrivateMounts=", "\nProtectKernelTunables=", "\nProtectControlGroups=", "\nPrivateTmp=", "\nProtectSystem="} {
		if strings.Contains(unit, harmful) {
			t.Errorf("%q would take from the agent what it needs", harmful[1:])
		}
	}
}
