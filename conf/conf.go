// SPDX-License-Identifier: Apache-2.0

// Package conf holds the agent's own settings: what differs from host to host and is no part of
// the topology. Its folder has the reference files too.
package conf

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/lace-net/lace/topology"
)

// DefaultFile is where the agent looks for its settings. It need not be there.
const DefaultFile = "/etc/lace/lace.toml"

// Settings are the agent's own. Every one has a default.
type Settings struct {
	Node       string     `toml:"node" want:"the node's name in the topology"` // empty: the host name
	Topology   string     `toml:"topology" want:"the absolute path of the topology file"`
	Containerd string     `toml:"containerd" want:"the absolute path of containerd's socket"`
	NRISocket  string     `toml:"nri-socket" want:"the absolute path of containerd's NRI socket"`
	NRIIndex   NRIIndex   `toml:"nri-index" want:"two digits, as \"10\""`
	HookSocket string     `toml:"hook-socket" want:"the absolute path where lace-runc finds the agent"`
	BPFFS      string     `toml:"bpffs" want:"the absolute path of a directory in a BPF file system"`
	LogLevel   slog.Level `toml:"log-level" want:"\"debug\", \"info\", \"warn\" or \"error\""`
}

// NRIIndex is the plugin's place among other NRI plugins: two digits, lower ones are called first.
type NRIIndex string

// UnmarshalText takes two digits.
func (x *NRIIndex) UnmarshalText(text []byte) error {
	if len(text) != 2 || !isDigit(text[0]) || !isDigit(text[1]) {
		return fmt.Errorf("%.20q is no NRI index", text)
	}
	*x = NRIIndex(text)
	return nil
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// Default is what holds without a file.
func Default() Settings {
	return Settings{
		Topology:   "/etc/lace/topology.toml",
		Containerd: "/run/containerd/containerd.sock",
		NRISocket:  "/var/run/nri/nri.sock",
		NRIIndex:   "10",
		HookSocket: "/run/lace/lace.sock",
		BPFFS:      "/sys/fs/bpf/lace",
		LogLevel:   slog.LevelInfo,
	}
}

// ControlSocket is where commands reach the agent: beside the socket of the hooks, so that agents with runtime directories of
// their own do not meet.
func (s Settings) ControlSocket() string {
	return filepath.Join(filepath.Dir(s.HookSocket), "control.sock")
}

// Load reads a settings file over the defaults. What is wrong with its text is of type
// topology.Errors; a file that is not there is fs.ErrNotExist.
func Load(path string) (Settings, error) {
	data, err := topology.ReadFile(path)
	if err != nil {
		return Settings{}, fmt.Errorf("read the settings: %w", err)
	}
	return Parse(path, data)
}

// Parse reads the text of a settings file over the defaults. The name only serves the errors.
func Parse(name string, data []byte) (Settings, error) {
	s := Default()
	lines, err := topology.Decode(name, data, &s)
	var errs topology.Errors
	if err != nil && (!errors.As(err, &errs) || lines == nil) {
		return Settings{}, err
	}
	for _, p := range s.paths() {
		if problem := p.problem(); problem != "" {
			errs = append(errs, topology.Error{
				File: name, Line: lines.Of(p.key), Key: p.key,
				Problem: fmt.Sprintf("%.120q %s", p.value, problem), Fix: "write an absolute path, as " + p.usual,
			})
		}
	}
	if len(errs) > 0 {
		return Settings{}, errs.Sorted()
	}
	return s, nil
}

// path is one of the settings that are paths.
type path struct {
	key, value, usual string
	socket            bool
}

func (s Settings) paths() []path {
	d := Default()
	return []path{
		{"topology", s.Topology, d.Topology, false},
		{"containerd", s.Containerd, d.Containerd, true},
		{"nri-socket", s.NRISocket, d.NRISocket, true},
		{"hook-socket", s.HookSocket, d.HookSocket, true},
		{"bpffs", s.BPFFS, d.BPFFS, false},
	}
}

// maxSocket is the longest path of a Unix socket: sun_path without its last NUL.
const maxSocket = 107

func (p path) problem() string {
	switch {
	case !filepath.IsAbs(p.value):
		return "is no absolute path"
	case p.socket && len(p.value) > maxSocket:
		return fmt.Sprintf("is longer than the %d bytes of a socket's path", maxSocket)
	}
	return ""
}
