// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"crypto/sha256"
	"fmt"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// macOf derives a container's MAC from its address: 02:4c and the IPv4 address, else four bytes for the IPv6 address. The
// same address always has the same MAC, so neighbour entries stay right. In an L2 network every node can tell the address from it.
func macOf(n *topology.Network, l *lease) plan.MAC {
	if n.Type == topology.L2 {
		return n.DerivedMAC(l.v4, l.v6)
	}
	m := plan.MAC{0x02, 0x4c}
	if l.v4.IsValid() {
		b := l.v4.As4()
		copy(m[2:], b[:])
		return m
	}
	b := l.v6.As16()
	sum := sha256.Sum256(b[:])
	copy(m[2:], sum[:4])
	return m
}

// checkMAC refuses a MAC address that is known to be another's of the network: nobody could tell them apart.
func (w *wiring) checkMAC(c claim, a plan.Attachment) error {
	for at, other := range w.ports {
		if at.container != a.Container && other.NetworkID == a.NetworkID && other.MAC == a.MAC {
			return fmt.Errorf("MAC address %s is taken by %s: ask for another one, or none", a.MAC, whoIs(other.Container))
		}
	}
	if c.network.Type != topology.L2 {
		return nil
	}
	for _, e := range c.network.Endpoints() {
		if e.MAC == a.MAC && (c.endpoint == nil || e.Name != c.endpoint.Name) {
			return fmt.Errorf("MAC address %s is that of endpoint %s at node %s: ask for another one, or none", a.MAC, e.Name, e.Node)
		}
	}
	return checkDerived(c, a)
}

// checkDerived refuses a MAC address that says that it belongs to another address: other nodes would look for it there.
func checkDerived(c claim, a plan.Attachment) error {
	addr, derived := c.network.AddressOf(a.MAC)
	if !derived || c.endpoint != nil || addr == a.V4 || addr == a.V6 {
		return nil
	}
	whose := "that no node owns"
	if node, ok := c.network.Owner(addr); ok {
		whose = "of node " + node
	}
	return fmt.Errorf("MAC address %s belongs to address %s %s: MACs that begin with 02:4c follow from addresses in an L2 network; ask for another one, or none",
		a.MAC, addr, whose)
}
