// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/lace-net/lace/plugin/wire"
)

// maxConfig bounds config.json, in bytes; CRI's and nerdctl's have some 20 KiB.
const maxConfig = 16 << 20

// hookEnv are the variables that containerd's shim sets and that a hook needs.
var hookEnv = []string{"NAMESPACE", "GRPC_ADDRESS", wire.SocketEnv}

// hook is a hook of the OCI runtime specification.
type hook struct {
	Path    string   `json:"path"`
	Args    []string `json:"args"`
	Env     []string `json:"env,omitempty"`
	Timeout int      `json:"timeout"` // seconds
}

// config is the part of config.json that decides whether a container may be Lace's.
type config struct {
	Annotations map[string]string
	Hooks       map[string]json.RawMessage
	Linux       struct {
		Namespaces []struct{ Type, Path string }
	}
}

// prepare adds Lace's hooks to config.json in bundle, if the container may be Lace's. Everything else in the
// file stays as it is, byte for byte. The file is replaced in one step.
func prepare(bundle, self string, getenv func(string) string) error {
	path := filepath.Join(bundle, "config.json")
	b, mode, err := readConfig(path)
	if err != nil {
		return err
	}
	edited, err := addHooks(b, self, environment(getenv))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if bytes.Equal(edited, b) {
		return nil
	}
	if err := replaceFile(path, edited, mode); err != nil {
		return unwritableError{err, annotationsOf(b)}
	}
	return nil
}

// unwritableError says that the configuration is sound and hooks belong into it, but cannot be written.
type unwritableError struct {
	error
	annotations map[string]string
}

func (e unwritableError) Unwrap() error { return e.error }

// annotationsOf reads a configuration that was read before.
func annotationsOf(b []byte) map[string]string {
	var c config
	if json.Unmarshal(b, &c) != nil {
		return nil
	}
	return c.Annotations
}

func readConfig(path string) ([]byte, os.FileMode, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxConfig {
		return nil, 0, fmt.Errorf("%s: is no regular file of at most %d bytes", path, maxConfig)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxConfig))
	return b, st.Mode().Perm(), err
}

// replaceFile writes b beside path and renames it, so that path is never half written.
func replaceFile(path string, b []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".config.json-lace-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

func environment(getenv func(string) string) (env []string) {
	for _, name := range hookEnv {
		if v := getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// addHooks returns b with the hooks of Lace, or b itself where none belong or all are there.
func addHooks(b []byte, self string, env []string) ([]byte, error) {
	var c config
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	if !mayBeLaces(c) {
		return b, nil
	}
	hooks, err := member(b, "hooks")
	if err != nil {
		return nil, err
	}
	value := []byte("{}")
	if hooks.found && !isNull(b[hooks.start:hooks.end]) {
		value = b[hooks.start:hooks.end]
	}
	for _, stage := range []string{wire.CreateRuntime, wire.Poststop} {
		if value, err = addHook(value, stage, self, env); err != nil {
			return nil, fmt.Errorf("hooks: %w", err)
		}
	}
	return hooks.replace(b, "hooks", value), nil
}

// mayBeLaces decides by what config.json alone can tell. Not Lace's are: containers of the host's network, those that
// join the network namespace of another (outside CRI, which makes the pod's namespace itself), and the
// containers inside a CRI pod.
func mayBeLaces(c config) bool {
	kind := c.Annotations[wire.KindAnnotation]
	for _, ns := range c.Linux.Namespaces {
		if ns.Type == "network" {
			return kind != wire.KindContainer && (ns.Path == "" || kind == wire.KindSandbox)
		}
	}
	return false
}

// addHook appends the hook of a stage to its list in the JSON object hooks, unless it is there.
func addHook(hooks []byte, stage, self string, env []string) ([]byte, error) {
	list, err := member(hooks, stage)
	if err != nil {
		return nil, err
	}
	entry, err := json.Marshal(hook{Path: self, Args: []string{"lace-runc", "hook", stage}, Env: env, Timeout: int(wire.HookDeadline.Seconds())})
	if err != nil {
		return nil, err
	}
	if !list.found || isNull(hooks[list.start:list.end]) {
		return list.replace(hooks, stage, []byte("["+string(entry)+"]")), nil
	}
	old := hooks[list.start:list.end]
	var present []hook
	if err := json.Unmarshal(old, &present); err != nil {
		return nil, fmt.Errorf("%s: %w", stage, err)
	}
	for _, h := range present {
		if h.Path == self && len(h.Args) == 3 && h.Args[1] == "hook" && h.Args[2] == stage {
			return hooks, nil
		}
	}
	comma := ","
	if len(present) == 0 {
		comma = ""
	}
	open := bytes.TrimRight(bytes.TrimSuffix(old, []byte("]")), " \t\r\n")
	return list.replace(hooks, stage, []byte(string(open)+comma+string(entry)+"]")), nil
}

func isNull(b []byte) bool { return string(b) == "null" }

// place is where the value of a member stands in a JSON object.
type place struct {
	found      bool
	start, end int // of the value
	insert     int // behind the opening brace
	empty      bool
}

// member finds the last member of a JSON object with this name, as encoding/json does, without regard to case.
func member(b []byte, name string) (p place, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	open, err := d.Token()
	if err != nil {
		return p, err
	}
	if open != json.Delim('{') {
		return p, errors.New("is no JSON object")
	}
	p.insert, p.empty = int(d.InputOffset()), true
	for d.More() {
		p.empty = false
		key, err := d.Token()
		if err != nil {
			return p, err
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return p, err
		}
		if strings.EqualFold(fmt.Sprint(key), name) {
			p.found, p.end = true, int(d.InputOffset())
			p.start = p.end - len(value)
		}
	}
	return p, nil
}

// replace puts value in the place, or the member as a new one in front of the others.
func (p place) replace(b []byte, name string, value []byte) []byte {
	if p.found {
		return splice(b, p.start, p.end, value)
	}
	entry := fmt.Sprintf("%q:%s", name, value)
	if !p.empty {
		entry += ","
	}
	return splice(b, p.insert, p.insert, []byte(entry))
}

func splice(b []byte, start, end int, middle []byte) []byte {
	out := make([]byte, 0, len(b)-(end-start)+len(middle))
	out = append(out, b[:start]...)
	out = append(out, middle...)
	return append(out, b[end:]...)
}
