// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
)

func TestLoadPinsTables(t *testing.T) {
	b := newBed(t)
	h := b.load(false)
	pins := b.pins()
	for _, name := range maps.Pinned {
		if !slices.Contains(pins, filepath.Base(PinDir(b.dir))+"/"+name) {
			t.Errorf("no pin of map %s: %v", name, pins)
		}
	}
	key := bpf.LacePortKey{Ifindex: 7}
	must(t, h.Maps().Networks.Put(100, bpf.LaceNetwork{Line: 5}))
	must(t, h.Maps().Ports.Put(key, bpf.LacePort{Network: 100}))
	must(t, h.Close())

	again := b.load(false)
	port, ok, err := again.Maps().Ports.Get(key)
	if err != nil || !ok || port.Network != 100 {
		t.Errorf("the port is gone after a restart: %+v, %v, %v", port, ok, err)
	}
	must(t, again.Commit(nil))
	if got := count(b.pins(), "stages/"); got != 1 {
		t.Errorf("%d tables of tail calls after Commit, want the new agent's only", got)
	}
	m, done, err := OpenMaps(b.dir)
	must(t, err)
	defer done()
	if _, ok, err := m.Networks.Get(100); !ok || err != nil {
		t.Errorf("OpenMaps does not see the row: %v, %v", ok, err)
	}
}

func count(pins []string, prefix string) (n int) {
	for _, p := range pins {
		if strings.HasPrefix(p, prefix) {
			n++
		}
	}
	return n
}

func TestOpenMapsWithoutAgent(t *testing.T) {
	b := newBed(t)
	_, _, err := OpenMaps(b.dir)
	wantError(t, err, b.dir, "has an agent of this version run on this host")
}

func TestLoadNotOnBPFFS(t *testing.T) {
	b := newBed(t)
	b.dir = filepath.Join(t.TempDir(), "lace")
	_, err := b.tryLoad(false)
	wantError(t, err, b.dir, "not on a BPF file system", "mount -t bpf")
	if _, err := os.Stat(b.dir); !os.IsNotExist(err) {
		t.Errorf("%s was made all the same: %v", b.dir, err)
	}
}

func TestRemoveNotOnBPFFS(t *testing.T) {
	dir := t.TempDir()
	precious := filepath.Join(dir, "v1", "ports")
	must(t, os.MkdirAll(filepath.Dir(precious), 0o700))
	must(t, os.WriteFile(precious, []byte("a file of somebody"), 0o600))
	wantError(t, Remove(dir), "not on a BPF file system")
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("Remove took a file that is no pin: %v", err)
	}
}

// TestEveryStageHasItsProgram: a tail call that finds nothing drops the packet.
func TestEveryStageHasItsProgram(t *testing.T) {
	b := newBed(t)
	stages := b.load(false).Collection().Maps["stages"]
	if int(stages.MaxEntries()) != int(bpf.LaceStageSTAGE_MAX) {
		t.Errorf("there is room for %d stages, want %d", stages.MaxEntries(), bpf.LaceStageSTAGE_MAX)
	}
	for stage := bpf.LaceStageSTAGE_ENTRY + 1; stage < bpf.LaceStageSTAGE_MAX; stage++ {
		var id uint32
		if err := stages.Lookup(uint32(stage), &id); err != nil {
			t.Errorf("stage %d has no program: %v", stage, err)
			continue
		}
		p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		must(t, err)
		info, err := p.Info()
		must(t, errors.Join(err, p.Close()))
		if want := stagePrograms[stage]; info.Name != want {
			t.Errorf("stage %d is program %s, want %s", stage, info.Name, want)
		}
	}
}

// foreign pins a program or a map of somebody else at a path.
func foreign(t *testing.T, path string, program bool) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o700))
	if program {
		p := passAll(t)
		must(t, p.Pin(path))
		return
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "foreign", Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(t, err)
	t.Cleanup(func() { m.Close() })
	must(t, m.Pin(path))
}

func passAll(t *testing.T) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	must(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

func TestForeignTablePin(t *testing.T) {
	for name, program := range map[string]bool{"map": false, "program": true} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			path := filepath.Join(PinDir(b.dir), "ports")
			foreign(t, path, program)
			_, err := b.tryLoad(false)
			wantError(t, err, "ports", PinDir(b.dir), "--bpffs")
			if _, err := os.Stat(path); err != nil {
				t.Errorf("the foreign pin was removed: %v", err)
			}
		})
	}
}

func TestForeignLinkPin(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	h := b.load(false)
	if !h.TCX() {
		t.Skip("this kernel has no TCX (before 6.6), so no links are pinned: run it on a newer one")
	}
	host, _ := b.veth(ifname(0), newNetns(t))
	ifindex := host.Attrs().Index
	pin := filepath.Join(b.dir, "links", strconv.Itoa(ifindex))

	t.Run("program", func(t *testing.T) {
		foreign(t, pin, true)
		wantError(t, b.attach(h, ifindex, PodL3), pin, "left alone")
		wantError(t, h.Detach(ifindex), pin)
		wantError(t, h.Commit(nil), pin)
		wantError(t, Remove(b.dir), pin)
		must(t, os.Remove(pin)) // it is still there
	})
	t.Run("other link", func(t *testing.T) {
		h := b.load(false) // Remove took the tables
		var l link.Link
		must(t, in(t, b.ns, func() (err error) {
			l, err = link.AttachXDP(link.XDPOptions{Program: xdpPass(t), Interface: ifindex, Flags: link.XDPGenericMode})
			return err
		}))
		defer l.Close()
		must(t, l.Pin(pin))
		wantError(t, b.attach(h, ifindex, PodL3), pin, "left alone")
		wantError(t, h.Detach(ifindex), pin)
		must(t, os.Remove(pin))
	})
}

func xdpPass(t *testing.T) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	must(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

func TestAttachUnknown(t *testing.T) {
	b := newBed(t)
	h := b.load(false)
	wantError(t, b.attach(h, 1, "no_such"), `no program "no_such"`, "interface 1")
	wantError(t, b.attach(h, 4711, PodL3), "interface 4711")
}

// TestLinkOfGoneInterface: the number of an interface that is gone may be another one's by now.
func TestLinkOfGoneInterface(t *testing.T) {
	b := newBed(t)
	h := b.load(false)
	if !h.TCX() {
		t.Skip("this kernel has no TCX (before 6.6), so no links are pinned: run it on a newer one")
	}
	far := newNetns(t)
	host, _ := b.veth(ifname(0), far)
	ifindex := host.Attrs().Index
	must(t, b.attach(h, ifindex, PodL3))
	b.unlinked(host)

	reused, _ := b.vethAt(ifname(1), ifindex)
	if reused.Attrs().Index != ifindex {
		t.Fatalf("the new interface has index %d, want %d", reused.Attrs().Index, ifindex)
	}
	must(t, b.attach(h, ifindex, PodL3))
	if id := b.attached(ifindex); id != programID(t, h, PodL3) {
		t.Errorf("program %d is at the new interface, want %d", id, programID(t, h, PodL3))
	}
	must(t, h.Detach(ifindex))
	must(t, h.Detach(ifindex))
	if id := b.attached(ifindex); id != 0 {
		t.Errorf("program %d is still there after Detach", id)
	}
}

func TestAttachIsIdempotent(t *testing.T) {
	ways(t, func(t *testing.T, b *bed, clsact bool) {
		h := b.load(clsact)
		host, _ := b.veth(ifname(0), newNetns(t))
		ifindex := host.Attrs().Index
		for range 3 {
			must(t, b.attach(h, ifindex, PodL3))
		}
		if n := b.programs(ifindex); n != 1 {
			t.Errorf("%d programs at the interface, want 1", n)
		}
		for _, other := range []Program{Uplink, UplinkRaw, PodL2, Segmented, Host, Outer, OuterRaw, Loopback} {
			must(t, b.attach(h, ifindex, other))
			if n := b.programs(ifindex); n != 1 {
				t.Errorf("%d programs after %s took its place, want 1", n, other)
			}
		}
		must(t, h.Detach(ifindex))
		must(t, h.Detach(ifindex))
		if n := b.programs(ifindex); n != 0 {
			t.Errorf("%d programs after Detach", n)
		}
	})
}

func TestCommitDropsLinks(t *testing.T) {
	b := newBed(t)
	h := b.load(false)
	if !h.TCX() {
		t.Skip("this kernel has no TCX (before 6.6), so no links are pinned: run it on a newer one")
	}
	one, _ := b.veth(ifname(0), newNetns(t))
	two, _ := b.veth(ifname(1), newNetns(t))
	must(t, b.attach(h, one.Attrs().Index, PodL3))
	must(t, b.attach(h, two.Attrs().Index, PodL3))
	must(t, h.Commit(map[int]bool{two.Attrs().Index: true}))
	if b.attached(one.Attrs().Index) != 0 || b.attached(two.Attrs().Index) == 0 {
		t.Errorf("after Commit only the second interface should have a program")
	}
}

func TestCommitDropsOldLayouts(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	older := []string{filepath.Join(b.dir, "v1", "ports"), filepath.Join(b.dir, "v2", "ports")}
	kept := filepath.Join(b.dir, "v1-of-somebody", "ports")
	for _, path := range append(older, kept) {
		foreign(t, path, false)
	}
	must(t, b.load(false).Commit(nil))
	for _, path := range older {
		if _, err := os.Stat(filepath.Dir(path)); !os.IsNotExist(err) {
			t.Errorf("the older layout is still there: %v", err)
		}
	}
	if _, err := os.Stat(kept); err != nil {
		t.Errorf("a directory that is not Lace's was taken: %v", err)
	}
}

func TestRemoveLeavesNothing(t *testing.T) {
	ways(t, func(t *testing.T, b *bed, clsact bool) {
		h := b.load(clsact)
		host, _ := b.veth(ifname(0), newNetns(t))
		must(t, b.attach(h, host.Attrs().Index, PodL3))
		must(t, h.Commit(map[int]bool{host.Attrs().Index: true}))
		must(t, h.Close())
		must(t, Remove(b.dir))
		if _, err := os.Stat(b.dir); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v, %v", b.dir, err, b.pins())
		}
		if !clsact && b.attached(host.Attrs().Index) != 0 {
			t.Error("the program is still attached")
		}
		must(t, Remove(b.dir))
	})
}

func TestRemoveLeavesForeign(t *testing.T) {
	b := newBed(t)
	must(t, b.load(false).Close())
	kept := filepath.Join(b.dir, "of-somebody")
	foreign(t, kept, false)
	must(t, Remove(b.dir))
	if pins := b.pins(); len(pins) != 1 || pins[0] != "of-somebody" {
		t.Errorf("left: %v; want the foreign pin only", pins)
	}
}

// TestDecapProbe: what the probe finds is what the kernel does.
func TestDecapProbe(t *testing.T) {
	b := newBed(t)
	h := b.load(false)
	rc, err := h.Collection().Programs["probe_decap"].Run(&ebpf.RunOptions{Data: probePacket(), DataOut: make([]byte, 256)})
	must(t, err)
	if (rc == 0) != h.DecapByFlags() {
		t.Errorf("probe_decap returns %d, DecapByFlags says %v", rc, h.DecapByFlags())
	}
}
