// SPDX-License-Identifier: Apache-2.0

// Package plugin holds what containerd says: the NRI plugin, the receiver of the OCI hook and
// the way from labels to a Request. It knows no netlink and no eBPF; it meets the data plane only through
// the Dataplane interface below, which cmd fills in.
package plugin

import (
	"context"
	"net"
	"net/netip"
	"strings"
)

// Request is what one container asks for, read from its labels and checked for form. Whether
// the networks exist and an address is free is the data plane's to say.
type Request struct {
	Container  string      // containerd namespace + "/" + container id
	Name       string      // lace.name, else the client's own name for it; may be empty
	Sticky     bool        // lace.sticky: keep the addresses for the name after removal
	Netns      string      // path of the network namespace to wire
	Interfaces []Interface // one for each network of lace.network, in that order; names and networks are distinct
}

// Interface is one interface that a container asks for.
type Interface struct {
	Network string
	IPs     []netip.Addr     // at most one a family; empty: the data plane chooses
	MAC     net.HardwareAddr // nil: the data plane chooses
	IfName  string           // inside the container: "eth0" for the first network, "eth1" for the next, unless the labels say otherwise
	Gateway bool             // the default route leads into this network; true for one of a container at most
	Publish []Publish        // no two of a container overlap
}

// Publish says that a port of this node is the container's, at its addresses in the interface's network.
type Publish struct {
	Address  netip.Addr // of this node; invalid: every one, of the families that the container has
	Protocol uint8      // 6: TCP, 17: UDP
	Port     uint16     // of the node
	To       uint16     // that the container listens at
}

// networks names what r asks for as lace.network does.
func (r Request) networks() string { return strings.Join(networkNames(r.Interfaces), ",") }

// Result is how one interface of a container is wired.
type Result struct {
	Network            string
	IfName             string
	V4, V6             netip.Prefix // as they stand on the interface; invalid where the network has no such family
	Gateway4, Gateway6 netip.Addr   // the network's; invalid where it has none
	MAC                net.HardwareAddr
	MTU                int
}

// Dataplane wires containers. All methods are idempotent and safe for concurrent use. The agent's
// dataplane implements it; the tests of this package have a fake.
type Dataplane interface {
	// Attach wires the container or finds it wired as asked: all of its interfaces, or none. A container that was
	// wired before gets the same addresses again unless it asks for others. Results are in the order of the request.
	Attach(ctx context.Context, r Request) ([]Result, error)
	// Attached returns the interfaces of a container that are wired now, in any order; false when there is none.
	Attached(container string) ([]Result, bool)
	// Detach takes the wiring away; the addresses stay reserved for the container until Release.
	Detach(ctx context.Context, container string) error
	// Reserve holds the addresses of a container that exists but does not run, for the interfaces in r.
	Reserve(ctx context.Context, r Request) error
	// Release gives the addresses of a removed container back, after detaching it.
	Release(ctx context.Context, container string) error
	// Retain detaches and releases every container that is not in live, once containerd's state is known.
	Retain(ctx context.Context, live []string) error
}
