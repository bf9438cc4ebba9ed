// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/plan"
)

// Remove takes every object of ours away: ports, bridges, VRFs, the segmenter, lc-host, routes, kept neighbours and rules. Devices that
// were given by name are released, and lo is given back as Localhost found it.
// It goes on past failures and returns them all.
//
// One trace stays where VRFs were used: the kernel's rule 1000, "from all lookup
// [l3mdev-table]", of protocol kernel. It belongs to the kernel, which adds it with the first VRF of a network
// namespace and never again: it matches nothing where there is no VRF, and removing it would break every VRF that the
// host makes later. It is gone with the next boot.
func (h *Handle) Remove() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return errors.Join(h.removeLinks(), h.removeRoutes(), h.removeNeighbours(), h.removeVRFRules(), h.removeDetours())
}

func (h *Handle) removeLinks() error {
	links, err := h.host.links()
	if err != nil {
		return err
	}
	var doomed []netlink.Link
	errs := []error{h.giveBackLoopback(h.recorder(), links[plan.HostSide])}
	for _, name := range slices.Sorted(maps.Keys(links)) {
		l := links[name]
		if owned(l) {
			doomed = append(doomed, l)
		}
		if lb, ok := adopted(l); ok {
			errs = append(errs, h.releaseDevice(l, lb))
		}
	}
	return errors.Join(append(errs, h.host.removeLinks(doomed, links))...)
}

func (h *Handle) removeRoutes() error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		errs = append(errs, h.host.syncRoutes(h.recorder(), family, anyDevice, nil))
	}
	return errors.Join(errs...)
}

func (h *Handle) removeNeighbours() error {
	table, err := h.host.neighbours()
	if err != nil {
		return err
	}
	var errs []error
	for k, n := range table {
		if !n.ours {
			continue
		}
		if err := h.host.forget(k); err != nil {
			errs = append(errs, fmt.Errorf("remove neighbour %s: %w", k.addr, err))
		}
	}
	return errors.Join(errs...)
}
