// SPDX-License-Identifier: Apache-2.0

// Package plugin holds what containerd says: the NRI plugin, the receiver of the OCI hook and
// the way from labels to a Request. It knows no netlink and no eBPF; it meets the data plane only through
// the Dataplane interface below, which cmd fills in.
package plugin

import (
	"context"
	"net"
	"net/netip"
)

// Request is what one container asks for, read from its labels and checked for form. Whether
// the network exists and an address is free is the data plane's to say.
type Request struct {
	Container string           // containerd namespace + "/" + container id
	Name      string           // lace.name, else the client's own name for it; may be empty
	Network   string           // lace.network
	IPs       []netip.Addr     // lace.ip: at most one a family; empty: the data plane chooses
	MAC       net.HardwareAddr // lace.mac; nil: the data plane chooses
	Sticky    bool             // lace.sticky: keep the addresses for the name after removal
	Netns     string           // path of the network namespace to wire
	IfName    string           // interface inside the container, "eth0"
}

// Result is what a container got.
type Result struct {
	IfName             string
	V4, V6             netip.Prefix // as they stand on the interface; invalid where the network has no such family
	Gateway4, Gateway6 netip.Addr
	MAC                net.HardwareAddr
	MTU                int
}

// Dataplane wires containers. All methods are idempotent and safe for concurrent use. The agent's
// dataplane implements it; the tests of this package have a fake.
type Dataplane interface {
	// Attach wires the container or finds it wired as asked. A container that was wired before gets the
	// same addresses again unless it asks for others.
	Attach(ctx context.Context, r Request) (Result, error)
	// Attached returns how a container is wired now.
	Attached(container string) (Result, bool)
	// Detach takes the wiring away; the addresses stay reserved for the container until Release.
	Detach(ctx context.Context, container string) error
	// Reserve holds the addresses of a container that exists but does not run.
	Reserve(ctx context.Context, r Request) error
	// Release gives the addresses of a removed container back, after detaching it.
	Release(ctx context.Context, container string) error
	// Retain detaches and releases every container that is not in live, once containerd's state is known.
	Retain(ctx context.Context, live []string) error
}
