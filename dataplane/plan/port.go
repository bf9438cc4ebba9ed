// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"

	"github.com/lace-net/lace/topology"
)

// NewPort plans one attachment of a node by itself, as Build does for all of them: a container that
// comes must not wait for the whole plan.
func NewPort(t *topology.Topology, node string, a Attachment) (Port, error) {
	self, ok := t.Node(node)
	if !ok {
		return Port{}, fmt.Errorf("the topology has no node %q; %s", node, nodesOf(t, node))
	}
	n, ok := t.Network(a.Network)
	if !ok {
		return Port{}, fmt.Errorf("container %s: the topology has no network %q; %s", a.Container, a.Network, networksOf(t, a.Network))
	}
	return port(a, n, self), nil
}
