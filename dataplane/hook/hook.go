// SPDX-License-Identifier: Apache-2.0

// Package hook loads the eBPF programs, attaches them at TC ingress and pins them, so that traffic
// goes on when the agent does not run. A new agent replaces the programs of the old one in one step per interface.
//
// What is pinned, below one directory of a bpffs:
//
//	v<layout>/<map>   the tables, kept over agents of the same layout
//	stages/<map id>   the tail calls of attached programs: without a pin the kernel would empty
//	                  them with the last descriptor, and the programs drop everything
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
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
)

// Layout is the version of the pinned tables: raised when a key or value changes its shape.
const Layout = 4

// PinDir is where the tables of this layout are pinned, below the directory of the data plane.
func PinDir(dir string) string { return filepath.Join(dir, "v"+strconv.Itoa(Layout)) }

// Program is an entry program, by its name in the object.
type Program string

const (
	PodL3     Program = "pod_l3"     // at the host end of a container's veth, in a routed network
	PodL2     Program = "pod_l2"     // … in an Ethernet segment, and at a device of the host that joined one
	Segmented Program = "segmented"  // at the far end of the segmenter
	Uplink    Program = "uplink"     // at an interface of the underlay
	UplinkRaw Program = "uplink_raw" // at one without an Ethernet header
	Host      Program = "host"       // at lc-host-peer: what the host's own stack sends into the overlay
	Outer     Program = "outer"      // at an interface of the host that packets may leave by, and that is no uplink
	OuterRaw  Program = "outer_raw"  // at one without an Ethernet header
	Loopback  Program = "loopback"   // at lo, while ports are published: what the host sends to itself
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
	behind  map[int]bool // interfaces that could not be given the new program
}

// Load loads the programs, keeping the tables that are pinned below dir. Nothing changes for
// attached programs until Attach replaces them and Commit is called. dir must lie on a bpffs.
func Load(dir string, filters Filters, log *slog.Logger) (*Hooks, error) {
	return loadWith(dir, filters, log, probeTCX)
}

// loadWith lets tests say that there is no TCX.
func loadWith(dir string, filters Filters, log *slog.Logger, probeTCX func(*ebpf.Program) (bool, error)) (*Hooks, error) {
	if err := checkBPFFS(dir); err != nil {
		return nil, err
	}
	h := &Hooks{dir: dir, log: log, filters: filters, behind: map[int]bool{}}
	if err := h.makeDirs(); err != nil {
		return nil, err
	}
	spec, err := bpf.LoadLace()
	if err != nil {
		return nil, fmt.Errorf("read the built-in eBPF object: %w", err)
	}
	if h.decap, err = probeDecap(spec); err != nil {
		return nil, err
	}
	if err := h.load(spec, PinDir(dir)); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	if h.tcx, err = probeTCX(h.coll.Programs["probe_empty"]); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	if err := h.fillStages(); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

func (h *Hooks) makeDirs() error {
	for _, d := range []string{PinDir(h.dir), h.stagesDir(), h.linksDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("make the pin directory: %w", err)
		}
	}
	return nil
}

func (h *Hooks) load(spec *ebpf.CollectionSpec, pins string) error {
	for _, name := range maps.Pinned {
		spec.Maps[name].Pinning = ebpf.PinByName
	}
	keepFlows(spec)
	if err := setConstants(spec, h.decap); err != nil {
		return err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: pins}})
	if err != nil {
		return explainLoad(err, pins)
	}
	h.coll = coll
	if h.maps, err = maps.New(coll.Maps); err != nil {
		return err
	}
	return h.maps.InitFlows()
}

// keepFlows takes the small table that the object comes with out of it: it would be put in the place of the pinned one, and
// every flow would be forgotten.
func keepFlows(spec *ebpf.CollectionSpec) {
	spec.Maps["flows"].Contents = nil
	delete(spec.Maps, "flows_initial")
}

func explainLoad(err error, pins string) error {
	var rejected *ebpf.VerifierError
	switch {
	case errors.As(err, &rejected):
		return fmt.Errorf("load the eBPF programs: this kernel's verifier refuses them: %+v", rejected)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("load the eBPF programs: %w (they need root, or CAP_BPF and CAP_NET_ADMIN, and kernel 6.1 or later)", err)
	}
	return fmt.Errorf("load the eBPF programs with the tables below %s: %w (a pin that is not a table of this version is left alone: remove it, or choose another directory with --bpffs)", pins, err)
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

// stagePrograms are the tail calls by their index. The entry is a stage of events only; outer and outer_raw are entry programs
// too, which uplinks hand on to.
var stagePrograms = map[bpf.LaceStage]string{
	bpf.LaceStageSTAGE_ROUTE:      "stage_route",
	bpf.LaceStageSTAGE_DELIVER:    "stage_deliver",
	bpf.LaceStageSTAGE_GATEWAY:    "stage_gateway",
	bpf.LaceStageSTAGE_ERROR:      "stage_error",
	bpf.LaceStageSTAGE_BRIDGE:     "stage_bridge",
	bpf.LaceStageSTAGE_NEIGHBOUR:  "stage_neighbour",
	bpf.LaceStageSTAGE_FLOOD:      "stage_flood",
	bpf.LaceStageSTAGE_FRAME:      "stage_frame",
	bpf.LaceStageSTAGE_OUTER:      string(Outer),
	bpf.LaceStageSTAGE_OUTER_RAW:  string(OuterRaw),
	bpf.LaceStageSTAGE_ENTER:      "stage_enter",
	bpf.LaceStageSTAGE_EXIT:       "stage_exit",
	bpf.LaceStageSTAGE_MASQUERADE: "stage_masquerade",
	bpf.LaceStageSTAGE_EGRESS:     "stage_egress",
	bpf.LaceStageSTAGE_RELATED:    "stage_related",
}

// fillStages fills and pins the tail calls before a program that needs them is attached, so that the
// agent may be killed at any time. The name is the map's id: those of an older agent stay beside it until Commit.
func (h *Hooks) fillStages() error {
	if err := putStages(h.coll); err != nil {
		return err
	}
	pin, err := h.stagesPin()
	if err != nil {
		return err
	}
	if err := h.coll.Maps["stages"].Pin(pin); err != nil {
		return fmt.Errorf("pin the tail calls at %s: %w", pin, err)
	}
	return nil
}

func putStages(coll *ebpf.Collection) error {
	for i, name := range stagePrograms {
		if err := coll.Maps["stages"].Put(uint32(i), coll.Programs[name]); err != nil {
			return fmt.Errorf("put program %s into map stages: %w", name, err)
		}
	}
	return nil
}

func (h *Hooks) stagesPin() (string, error) {
	info, err := h.coll.Maps["stages"].Info()
	if err != nil {
		return "", fmt.Errorf("inspect map stages: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return "", errors.New("inspect map stages: this kernel gives maps no ids; Lace needs 6.1 or later")
	}
	return filepath.Join(h.stagesDir(), strconv.FormatUint(uint64(id), 10)), nil
}

// Maps are the tables of the loaded data plane.
func (h *Hooks) Maps() *maps.Maps { return h.maps }

// Collect runs the collector: see maps.Collect.
func (h *Hooks) Collect(c maps.Collection) (maps.Collected, error) {
	return h.maps.Collect(h.coll.Programs["collect"], c)
}

// Collection gives tests and benchmarks the programs and maps themselves.
func (h *Hooks) Collection() *ebpf.Collection { return h.coll }

// TCX says how programs are attached: by TCX links, or by clsact filters.
func (h *Hooks) TCX() bool { return h.tcx }

// DecapByFlags says how inner IPv4 packets are taken out: by adjust_room's flags (6.3), or by change_proto.
func (h *Hooks) DecapByFlags() bool { return h.decap }

// Close gives the descriptors back; what is attached and pinned stays.
func (h *Hooks) Close() error {
	if h.coll != nil {
		h.coll.Close()
	}
	return nil
}

func (h *Hooks) linkPin(ifindex int) string {
	return filepath.Join(h.linksDir(), strconv.Itoa(ifindex))
}

func (h *Hooks) linksDir() string { return filepath.Join(h.dir, "links") }

func (h *Hooks) stagesDir() string { return filepath.Join(h.dir, "stages") }

// OpenMaps opens the pinned tables without loading anything: for commands beside the agent, or
// when there is none.
func OpenMaps(dir string) (*maps.Maps, func(), error) {
	opened, closeAll, err := openPinned(dir, maps.Pinned)
	if err != nil {
		return nil, nil, err
	}
	m, err := maps.New(opened)
	if err != nil {
		closeAll()
		return nil, nil, err
	}
	return m, closeAll, nil
}

// openPinned opens tables by their names.
func openPinned(dir string, names []string) (map[string]*ebpf.Map, func(), error) {
	opened := map[string]*ebpf.Map{}
	closeAll := func() {
		for _, m := range opened {
			m.Close()
		}
	}
	for _, name := range names {
		m, err := ebpf.LoadPinnedMap(filepath.Join(PinDir(dir), name), nil)
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("open table %s: %w (has an agent of this version run on this host with --bpffs %s?)", name, err, dir)
		}
		opened[name] = m
	}
	return opened, closeAll, nil
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
