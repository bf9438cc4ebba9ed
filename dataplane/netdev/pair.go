// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// pair finds a veth pair of ours, both ends of which are on the host: nil, nil where it is not whole.
func (c *conn) pair(near, far string) (n, f netlink.Link, err error) {
	n, err = c.link(near)
	if n == nil || err != nil || !owned(n) {
		return nil, nil, err
	}
	f, err = c.link(far)
	if f == nil || err != nil || !pair(n, f) {
		return nil, nil, err
	}
	return n, f, nil
}

func pair(near, far netlink.Link) bool {
	return near.Attrs().ParentIndex == far.Attrs().Index && far.Attrs().ParentIndex == near.Attrs().Index
}

// pair makes a veth pair of ours on the host; its ends are still to be given their aliases.
func (a *applier) pair(near, far string) (n, f *device, err error) {
	if err := a.clearFarEnd(near, far); err != nil {
		return nil, nil, err
	}
	n, err = a.ensureLink(&netlink.Veth{LinkAttrs: attrs(near), PeerName: far}, func(l netlink.Link) bool {
		return a.links[far] != nil && pair(l, a.links[far])
	})
	if err != nil {
		return nil, nil, err
	}
	l, err := a.host.LinkByName(far)
	if err != nil {
		return nil, nil, fmt.Errorf("read veth %s after making it: %w", far, err)
	}
	a.links[far] = l
	f, err = a.host.read(a.recorder, l)
	return n, f, err
}

// clearFarEnd sees to it that nothing has the far end's name but the far end.
func (a *applier) clearFarEnd(near, far string) error {
	n, f := a.links[near], a.links[far]
	if f == nil || n != nil && owned(n) && pair(n, f) {
		return nil
	}
	if !owned(f) {
		return foreign(f)
	}
	return a.remove(f)
}
