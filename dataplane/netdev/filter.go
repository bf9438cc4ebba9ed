// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A filter of ours is told from others by its priority, handle and name together. Fixed numbers
// make the kernel replace a program in place, between two packets.
const (
	filterPriority = 0x4c
	filterHandle   = 1
	filterPrefix   = "lace_"
)

// ReplaceFilter puts a program at the interface's ingress by a clsact filter, for kernels without TCX
// (before 6.6), in place of an older one of ours. The filter keeps the program; fd may be closed.
func (h *Handle) ReplaceFilter(ifindex int, name string, fd int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := h.host.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add the clsact qdisc of interface %d: %w", ifindex, err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex,
			Parent:    netlink.HANDLE_MIN_INGRESS,
			Handle:    filterHandle,
			Protocol:  unix.ETH_P_ALL,
			Priority:  filterPriority,
		},
		Fd:           fd,
		Name:         name,
		DirectAction: true,
	}
	if err := h.host.FilterReplace(filter); err != nil {
		return fmt.Errorf("attach program %s to the ingress of interface %d by clsact: %w", name, ifindex, err)
	}
	return nil
}

// DeleteFilter takes our filter off the interface. Neither an interface nor a filter that is gone is an
// error. The clsact qdisc stays: it costs nothing, and others may use it.
func (h *Handle) DeleteFilter(ifindex int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	link, err := h.host.LinkByIndex(ifindex)
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find interface %d: %w", ifindex, err)
	}
	return h.deleteFilters(link)
}

// deleteFilters removes every ingress filter of ours from link.
func (h *Handle) deleteFilters(link netlink.Link) error {
	name := link.Attrs().Name
	filters, err := list(func() ([]netlink.Filter, error) {
		return h.host.FilterList(link, netlink.HANDLE_MIN_INGRESS)
	})
	if err != nil {
		return fmt.Errorf("list the ingress filters of %s: %w", name, err)
	}
	var errs []error
	for _, f := range filters {
		b, ok := f.(*netlink.BpfFilter)
		if !ok || f.Attrs().Priority != filterPriority || !strings.HasPrefix(b.Name, filterPrefix) {
			continue
		}
		if err := h.host.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove filter %s of %s: %w", b.Name, name, err))
		}
	}
	return errors.Join(errs...)
}

// RemoveFilters takes our filters off every interface of the namespace.
func (h *Handle) RemoveFilters() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	links, err := h.host.links()
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range links {
		errs = append(errs, h.deleteFilters(l))
	}
	return errors.Join(errs...)
}
