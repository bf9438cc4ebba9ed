// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/json"
	"fmt"
)

// SandboxMetadata is the key of the extension under which containerd's CRI plugin keeps a pod's own
// configuration in the sandbox store (containerd 2.x, namespace CRINamespace).
const SandboxMetadata = "metadata"

// Pod is a CRI pod as containerd's sandbox store has it.
type Pod struct {
	ID          string
	Name        string // as the client gave it
	Namespace   string // the pod's, not containerd's
	Labels      map[string]string
	Annotations map[string]string
	Netns       string // path of its network namespace; empty before that is made
	HostNetwork bool   // the pod shares the node's network
}

// nodeNetwork is NamespaceMode NODE of the CRI API.
const nodeNetwork = 2

// sandboxRecord is the part that Lace reads of what CRI stores: JSON in a versioned wrapper.
type sandboxRecord struct {
	Version  string
	Metadata struct {
		ID        string
		NetNSPath string
		Config    struct {
			Metadata    struct{ Name, Namespace string }
			Labels      map[string]string
			Annotations map[string]string
			Linux       struct {
				SecurityContext struct {
					NamespaceOptions struct{ Network int } `json:"namespace_options"`
				} `json:"security_context"`
			}
		}
	}
}

// ParsePod reads the SandboxMetadata extension of a sandbox. It is an error when CRI has changed the
// version of that record, so that a pod is refused rather than misread.
func ParsePod(b []byte) (Pod, error) {
	var r sandboxRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return Pod{}, fmt.Errorf("read CRI's record of a pod: %w", err)
	}
	if r.Version != "v1" {
		return Pod{}, fmt.Errorf("read CRI's record of a pod: it has version %q, only v1 is known; a newer Lace may know more", r.Version)
	}
	m := r.Metadata
	return Pod{ID: m.ID, Name: m.Config.Metadata.Name, Namespace: m.Config.Metadata.Namespace,
		Labels: m.Config.Labels, Annotations: m.Config.Annotations, Netns: m.NetNSPath,
		HostNetwork: m.Config.Linux.SecurityContext.NamespaceOptions.Network == nodeNetwork}, nil
}
