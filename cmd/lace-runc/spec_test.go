// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const ownNetwork = `{"ociVersion":"1.2.0","x":{"<&>": 1.50e1},"linux":{"namespaces":[{"type":"pid"},{"type":"network"}]}}`

func TestAddHooks(t *testing.T) {
	b, err := addHooks([]byte(ownNetwork), "/opt/runc", []string{"NAMESPACE=default"})
	if err != nil {
		t.Fatal(err)
	}
	var spec struct{ Hooks map[string][]hook }
	if err := json.Unmarshal(b, &spec); err != nil {
		t.Fatal(err)
	}
	for _, stage := range []string{"createRuntime", "poststop"} {
		h := spec.Hooks[stage]
		if len(h) != 1 || h[0].Path != "/opt/runc" || strings.Join(h[0].Args, " ") != "lace-runc hook "+stage || h[0].Timeout != 10 || h[0].Env[0] != "NAMESPACE=default" {
			t.Errorf("%s: %+v", stage, h)
		}
	}
	if !bytes.HasSuffix(b, []byte(ownNetwork[1:])) {
		t.Errorf("the rest of the file is not what it was:\n%s", b)
	}
	again, err := addHooks(b, "/opt/runc", nil)
	if err != nil || !bytes.Equal(again, b) {
		t.Errorf("a second time changed it, error %v:\n%s", err, again)
	}
}

func TestAddHooksKeepsThoseOfOthers(t *testing.T) {
	const others = `{ "hooks" : {"prestart":[{"path":"/a"}], "createRuntime": [ {"path":"/b","x":"y"} ] , "poststop":[]},
 "linux":{"namespaces":[{"type":"network"}]}, "after": [1 , 2]}`
	b, err := addHooks([]byte(others), "/opt/runc", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`{ "hooks" : {"prestart":[{"path":"/a"}], "createRuntime": [ {"path":"/b","x":"y"},{"path":"/opt/runc"`, `"poststop":[{"path":"/opt/runc"`, `"after": [1 , 2]}`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("want %s in:\n%s", want, b)
		}
	}
	if !json.Valid(b) {
		t.Errorf("no JSON:\n%s", b)
	}
}

func TestAddHooksSkips(t *testing.T) {
	for name, spec := range map[string]string{
		"host network":           `{"linux":{"namespaces":[{"type":"pid"}]}}`,
		"no linux":               `{}`,
		"network of another":     `{"linux":{"namespaces":[{"type":"network","path":"/proc/1/ns/net"}]}}`,
		"container inside a pod": `{"annotations":{"io.kubernetes.cri.container-type":"container"},"linux":{"namespaces":[{"type":"network","path":"/n"}]}}`,
		"fresh network in a pod": `{"annotations":{"io.kubernetes.cri.container-type":"container"},"linux":{"namespaces":[{"type":"network"}]}}`,
		"pod on the host":        `{"annotations":{"io.kubernetes.cri.container-type":"sandbox"},"linux":{"namespaces":[]}}`,
	} {
		if b, err := addHooks([]byte(spec), "/opt/runc", nil); err != nil || string(b) != spec {
			t.Errorf("%s: error %v, %s", name, err, b)
		}
	}
	sandbox := `{"annotations":{"io.kubernetes.cri.container-type":"sandbox"},"linux":{"namespaces":[{"type":"network","path":"/n"}]}}`
	if b, err := addHooks([]byte(sandbox), "/opt/runc", nil); err != nil || !strings.Contains(string(b), "createRuntime") {
		t.Errorf("a pod's own container got no hook: error %v, %s", err, b)
	}
}

func TestAddHooksTakesNull(t *testing.T) {
	for _, hooks := range []string{"null", "{}", `{"createRuntime":null}`, `{"poststop":[ ]}`} {
		b, err := addHooks([]byte(`{"hooks":`+hooks+`,"linux":{"namespaces":[{"type":"network"}]}}`), "/opt/runc", nil)
		if err != nil || !json.Valid(b) || strings.Count(string(b), "/opt/runc") != 2 {
			t.Errorf("hooks %s: error %v, %s", hooks, err, b)
		}
	}
}

func TestPrepareLeavesOddFilesAlone(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	none := func(string) string { return "" }
	if err := prepare(dir, "/opt/runc", none); err == nil {
		t.Error("no error without a file")
	}
	for _, odd := range []string{"", "{", "[]", `{"hooks":[],"linux":{"namespaces":[{"type":"network"}]}}`, `{"hooks":{"poststop":{}},"linux":{"namespaces":[{"type":"network"}]}}`} {
		os.WriteFile(path, []byte(odd), 0o600)
		if err := prepareOrRefuse(dir, "/opt/runc", none); err != nil {
			t.Errorf("%q: %v: runc does not get to complain", odd, err)
		}
		if b, _ := os.ReadFile(path); string(b) != odd {
			t.Errorf("%q became %q", odd, b)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("files are left: %v", left)
	}
}

func TestPrepareKeepsTheMode(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	os.WriteFile(path, []byte(ownNetwork), 0o640)
	if err := prepare(dir, "/opt/runc", func(n string) string { return map[string]string{"GRPC_ADDRESS": "/c.sock"}[n] }); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(path)
	st, _ := os.Stat(path)
	if !strings.Contains(string(b), `"env":["GRPC_ADDRESS=/c.sock"]`) || st.Mode().Perm() != 0o640 {
		t.Errorf("mode %v:\n%s", st.Mode(), b)
	}
}

// FuzzAddHooks: what was JSON stays JSON, grows by hooks alone, and a second pass changes nothing.
func FuzzAddHooks(f *testing.F) {
	f.Add([]byte(ownNetwork))
	f.Add([]byte(`{"hooks":{"createRuntime":[{"path":"/a"}]},"linux":{"namespaces":[{"type":"network"}]}}`))
	f.Add([]byte(`{"Hooks":null,"hooks":{},"linux":{"namespaces":[{"type":"network"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		once, err := addHooks(b, "/opt/runc", nil)
		if err != nil {
			return
		}
		if !json.Valid(once) {
			t.Fatalf("no JSON: %q from %q", once, b)
		}
		twice, err := addHooks(once, "/opt/runc", nil)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("not idempotent: error %v, %q then %q", err, once, twice)
		}
	})
}
