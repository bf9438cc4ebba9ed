// SPDX-License-Identifier: Apache-2.0

// Package hook loads the eBPF programs, attaches them at TC ingress and pins them, so that traffic
// goes on when the agent does not run. A new agent replaces the programs of the old one in one step per interface.
//
// What is pinned, below one directory of a bpffs:
//
//	v<layout>/<map>   the tables, kept over agents of the same layout
//	stages            the tail calls of the programs that are attached
//	links/<ifindex>   TCX links; kernels before 6.6 have clsact filters instead, which need no pin
package hook

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
)

// Layout is the version of the pinned tables: raised when a key or value changes its shape.
const Layout = 1

// PinDir is where the tables of this layout are pinned, below the directory of the data plane.
func PinDir(dir string) string { return filepath.Join(dir, "v"+strconv.Itoa(Layout)) }

// Program is an entry program, by its name in the object.
type Program string

const (
	PodL3     Program = "pod_l3"     // at the host end of a container's veth
	Uplink    Program = "uplink"     // at an interface of the underlay
	UplinkRaw Program = "uplink_raw" // at one without an Ethernet header
)

// Filters attach programs on kernels without TCX; netdev implements it with clsact. Both replace in place.
type Filters interface {
	ReplaceFilter(ifindex int, name string, fd int) error
	DeleteFilter(ifindex int) error // what is not there is fine
}

// Hooks is a loaded data plane.
type Hooks struct {
	dir     string
	log     *slog.Logger
	filters Filters
	coll    *ebpf.Collection
	maps    *maps.Maps
	tcx     bool
	decap   bool
}

// Load loads the programs, keeping the tables that are pinned below dir. Nothing changes for
// attached programs until Attach replaces them and Commit is called. dir must lie on a bpffs.
func Load(dir string, filters Filters, log *slog.Logger) (*Hooks, error) {
	if err := checkBPFFS(dir); err != nil {
		return nil, err
	}
	pins := PinDir(dir)
	for _, d := range []string{pins, filepath.Join(dir, "links")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("make the pin directory: %w", err)
		}
	}
	h := &Hooks{dir: dir, log: log, filters: filters}
	spec, err := bpf.LoadLace()
	if err != nil {
		return nil, fmt.Errorf("read the built-in eBPF object: %w", err)
	}
	if h.decap, err = probeDecap(spec); err != nil {
		return nil, err
	}
	if err := h.load(spec, pins); err != nil {
		return nil, err
	}
	if h.tcx, err = probeTCX(h.coll.Programs["probe_empty"]); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	if err := h.fillStages(); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

func (h *Hooks) load(spec *ebpf.CollectionSpec, pins string) error {
	for _, name := range maps.Pinned {
		spec.Maps[name].Pinning = ebpf.PinByName
	}
	if err := setConstants(spec, h.decap); err != nil {
		return err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: pins}})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return fmt.Errorf("load the eBPF programs: a pin below %s is not a table of this version: %w (remove it, or choose another directory with --bpffs)", pins, err)
	}
	var rejected *ebpf.VerifierError
	if errors.As(err, &rejected) {
		return fmt.Errorf("load the eBPF programs: this kernel's verifier refuses them: %+v", rejected)
	}
	if err != nil {
		return fmt.Errorf("load the eBPF programs: %w (they need root, or CAP_BPF and CAP_NET_ADMIN, and kernel 6.1 or later)", err)
	}
	h.coll = coll
	h.maps, err = maps.New(coll.Maps)
	return err
}

func setConstants(spec *ebpf.CollectionSpec, decapByFlags bool) error {
	value := uint8(0)
	if decapByFlags {
		value = 1
	}
	if err := spec.Variables["decap_by_flags"].Set(value); err != nil {
		return fmt.Errorf("set constant decap_by_flags: %w", err)
	}
	return nil
}

// stagePrograms are the tail calls by their index.
var stagePrograms = map[bpf.LaceStage]string{
	bpf.LaceStageSTAGE_ROUTE:                "stage_route",
	bpf.LaceStageSTAGE_DELIVER:              "stage_deliver",
	bpf.LaceStageSTAGE_DELIVER_DECAPSULATED: "stage_deliver_decapsulated",
	bpf.LaceStageSTAGE_GATEWAY:              "stage_gateway",
	bpf.LaceStageSTAGE_ERROR:                "stage_error",
}

func (h *Hooks) fillStages() error {
	for i, name := range stagePrograms {
		if err := h.coll.Maps["stages"].Put(uint32(i), h.coll.Programs[name]); err != nil {
			return fmt.Errorf("put program %s into map stages: %w", name, err)
		}
	}
	return nil
}

// Maps are the tables of the loaded data plane.
func (h *Hooks) Maps() *maps.Maps { return h.maps }

// Collection gives tests and benchmarks the programs and maps themselves.
func (h *Hooks) Collection() *ebpf.Collection { return h.coll }

// TCX says how programs are attached: by TCX links, or by clsact filters.
func (h *Hooks) TCX() bool { return h.tcx }

// DecapByFlags says how inner IPv4 packets are taken out: by adjust_room's flags (6.3), or by change_proto.
func (h *Hooks) DecapByFlags() bool { return h.decap }

// Attach puts the program at the interface's ingress, in place of an older agent's. Idempotent.
func (h *Hooks) Attach(ifindex int, program Program) error {
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

// replaceLink updates a pinned link that is still at its interface. A link whose interface is gone
// is unpinned: the number may belong to another interface by now.
func replaceLink(pin string, ifindex int, p *ebpf.Program) (bool, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open the pinned link %s: %w (not Lace's? remove it)", pin, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return false, fmt.Errorf("inspect the pinned link %s: %w", pin, err)
	}
	if tcx := info.TCX(); tcx == nil || int(tcx.Ifindex) != ifindex {
		return false, l.Unpin()
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
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the pinned link %s: %w", pin, err)
	}
	defer l.Close()
	if err := l.Unpin(); err != nil {
		return fmt.Errorf("unpin %s: %w", pin, err)
	}
	return nil
}

// Commit makes the loaded programs the ones that stay: their tail calls take the place of the older
// agent's, links of interfaces that are not in keep go, and so do tables of older layouts. Call it when every interface has its new program.
func (h *Hooks) Commit(keep map[int]bool) error {
	next := filepath.Join(h.dir, "stages_next")
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a half-made pin: %w", err)
	}
	// The library follows a map's pin, and would take a second Pin for a move. A clone has no pin.
	stages, err := h.coll.Maps["stages"].Clone()
	if err != nil {
		return fmt.Errorf("clone the map of tail calls: %w", err)
	}
	defer stages.Close()
	if err := stages.Pin(next); err != nil {
		return fmt.Errorf("pin the tail calls at %s: %w", next, err)
	}
	if err := os.Rename(next, filepath.Join(h.dir, "stages")); err != nil {
		return fmt.Errorf("put the new tail calls in place: %w", err)
	}
	return errors.Join(h.dropLinks(keep), h.dropOldLayouts())
}

func (h *Hooks) dropLinks(keep map[int]bool) error {
	entries, err := os.ReadDir(filepath.Join(h.dir, "links"))
	if err != nil {
		return fmt.Errorf("list the pinned links: %w", err)
	}
	var errs []error
	for _, e := range entries {
		ifindex, err := strconv.Atoi(e.Name())
		if err == nil && !keep[ifindex] {
			errs = append(errs, unpinLink(h.linkPin(ifindex)))
		}
	}
	return errors.Join(errs...)
}

func (h *Hooks) dropOldLayouts() error {
	old, err := filepath.Glob(filepath.Join(h.dir, "v[0-9]*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range old {
		if d != PinDir(h.dir) {
			h.log.Info("remove the tables of an older layout", "dir", d)
			errs = append(errs, os.RemoveAll(d))
		}
	}
	return errors.Join(errs...)
}

// Close gives the descriptors back; what is attached and pinned stays.
func (h *Hooks) Close() error {
	if h.coll != nil {
		h.coll.Close()
	}
	return nil
}

func (h *Hooks) linkPin(ifindex int) string {
	return filepath.Join(h.dir, "links", strconv.Itoa(ifindex))
}

// OpenMaps opens the pinned tables without loading anything: for commands beside the agent, or
// when there is none.
func OpenMaps(dir string) (*maps.Maps, func(), error) {
	pins := PinDir(dir)
	opened := map[string]*ebpf.Map{}
	closeAll := func() {
		for _, m := range opened {
			m.Close()
		}
	}
	for _, name := range maps.Pinned {
		m, err := ebpf.LoadPinnedMap(filepath.Join(pins, name), nil)
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("open table %s: %w (has an agent run on this host with --bpffs %s?)", name, err, dir)
		}
		opened[name] = m
	}
	m, err := maps.New(opened)
	if err != nil {
		closeAll()
		return nil, nil, err
	}
	return m, closeAll, nil
}

// Remove takes away everything that is pinned below dir. TCX programs leave their interfaces with their pins.
func Remove(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the pins: %w", err)
	}
	return nil
}

const bpffsMagic = 0xcafe4a11

// checkBPFFS looks at the nearest directory that exists, as dir itself may have to be made.
func checkBPFFS(dir string) error {
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		var s unix.Statfs_t
		err := unix.Statfs(d, &s)
		if errors.Is(err, unix.ENOENT) && d != "/" {
			continue
		}
		if err != nil {
			return fmt.Errorf("look at %s: %w", d, err)
		}
		if uint32(s.Type) != bpffsMagic {
			return fmt.Errorf("%s is not on a BPF file system: mount one (mount -t bpf bpf /sys/fs/bpf), or choose another directory with --bpffs", dir)
		}
		return nil
	}
}
