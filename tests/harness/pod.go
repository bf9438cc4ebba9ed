// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// Pod is what a CRI client asks for.
type Pod struct {
	Name        string
	Labels      map[string]string
	Annotations map[string]string
	HostNetwork bool
}

type object = map[string]any

// PodFile writes the pod's configuration for crictl and returns the file.
func (c *Containerd) PodFile(p Pod) string {
	c.t.Helper()
	network := 0
	if p.HostNetwork {
		network = 2
	}
	return c.writeJSON("pod-"+p.Name+".json", object{
		"metadata":      object{"name": p.Name, "namespace": "lace", "attempt": 1, "uid": p.Name},
		"labels":        p.Labels,
		"annotations":   p.Annotations,
		"log_directory": c.Dir + "/logs",
		"linux":         object{"cgroup_parent": "/lace-test", "security_context": object{"namespace_options": object{"network": network}}},
	})
}

// ContainerFile writes the configuration of a container inside the pod for crictl and returns the file.
func (c *Containerd) ContainerFile(p Pod, name string, command ...string) string {
	c.t.Helper()
	return c.writeJSON(fmt.Sprintf("container-%s-%s.json", p.Name, name), object{
		"metadata": object{"name": name, "attempt": 1},
		"image":    object{"image": Busybox},
		"command":  command,
		"log_path": p.Name + "-" + name + ".log",
		"linux":    object{},
	})
}

// RunPod starts a pod, which has to succeed, and returns its id.
func (c *Containerd) RunPod(p Pod) string { c.t.Helper(); return c.Crictl("runp", c.PodFile(p)) }

// RunIn starts a container in the pod and returns its id.
func (c *Containerd) RunIn(p Pod, pod, name string, command ...string) string {
	c.t.Helper()
	id := c.Crictl("create", pod, c.ContainerFile(p, name, command...), c.PodFile(p))
	c.Crictl("start", id)
	return id
}

// PodIP is the address that CRI reports for a pod.
func (c *Containerd) PodIP(pod string) string {
	c.t.Helper()
	var status struct {
		Status struct{ Network struct{ IP string } }
	}
	out := c.Crictl("inspectp", pod)
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		c.t.Fatalf("crictl inspectp: %v\n%s", err, out)
	}
	return status.Status.Network.IP
}

func (c *Containerd) writeJSON(name string, v any) string {
	c.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		c.t.Fatal(err)
	}
	path := filepath.Join(c.Dir, name)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		c.t.Fatal(err)
	}
	return path
}
