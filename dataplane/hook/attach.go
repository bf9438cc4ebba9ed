// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Attach puts the program at the interface's ingress, in place of an older agent's. Idempotent.
func (h *Hooks) Attach(ifindex int, program Program) error {
	h.behind[ifindex] = true
	if err := h.attach(ifindex, program); err != nil {
		return err
	}
	delete(h.behind, ifindex)
	return nil
}

func (h *Hooks) attach(ifindex int, program Program) error {
	p := h.coll.Programs[string(program)]
	if p == nil {
		return fmt.Errorf("attach to interface %d: there is no program %q", ifindex, program)
	}
	if !h.tcx {
		return h.filters.ReplaceFilter(ifindex, "lace_"+string(program), p.FD())
	}
	pin := h.linkPin(ifindex)
	replaced, err := replaceLink(pin, ifindex, p)
	if err != nil || replaced {
		return err
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	if err != nil {
		return fmt.Errorf("attach program %s to the ingress of interface %d: %w", program, ifindex, err)
	}
	defer l.Close() // the pin keeps it
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin the link of interface %d at %s: %w", ifindex, pin, err)
	}
	return nil
}

// openLink opens a pinned link of ours; nil where there is none. ifindex is where it is attached; 0: the
// interface is gone, and its number may belong to another one by now.
func openLink(pin string) (l link.Link, ifindex int, err error) {
	l, err = link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("open the pinned link %s: %w (%s)", pin, err, notOurs)
	}
	info, err := l.Info()
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("inspect the pinned link %s: %w", pin, err), l.Close())
	}
	tcx := info.TCX()
	if tcx == nil {
		return nil, 0, errors.Join(fmt.Errorf("pinned link %s is no TCX link (%s)", pin, notOurs), l.Close())
	}
	return l, int(tcx.Ifindex), nil
}

const notOurs = "not Lace's? It is left alone: remove it, or choose another directory with --bpffs"

// replaceLink updates a pinned link that is still at its interface, and unpins one that is not.
func replaceLink(pin string, ifindex int, p *ebpf.Program) (bool, error) {
	l, at, err := openLink(pin)
	if l == nil || err != nil {
		return false, err
	}
	defer l.Close()
	if at != ifindex {
		return false, unpin(l, pin)
	}
	if err := l.Update(p); err != nil {
		return false, fmt.Errorf("replace the program of interface %d: %w", ifindex, err)
	}
	return true, nil
}

// Detach takes the program off the interface; what is not there is fine.
func (h *Hooks) Detach(ifindex int) error {
	if !h.tcx {
		return h.filters.DeleteFilter(ifindex)
	}
	return unpinLink(h.linkPin(ifindex))
}

func unpinLink(pin string) error {
	l, _, err := openLink(pin)
	if l == nil || err != nil {
		return err
	}
	defer l.Close()
	return unpin(l, pin)
}

func unpin(l link.Link, pin string) error {
	if err := l.Unpin(); err != nil {
		return fmt.Errorf("unpin %s: %w", pin, err)
	}
	return nil
}
