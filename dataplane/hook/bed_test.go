// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/tests/slow"
)

// bed is a network namespace with a bpffs of its own: a node, as far as programs and pins go.
type bed struct {
	t   *testing.T
	ns  netns.NsHandle
	dir string // on the bpffs; does not exist yet
	log *slog.Logger
}

var takesLong = slow.TakesLong

func newBed(t *testing.T) *bed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces and to load programs: run the tests as root")
	}
	b := &bed{t: t, log: slog.New(slog.NewTextHandler(t.Output(), nil)), ns: newNetns(t)}
	b.dir = filepath.Join(mountBPFFS(t), "lace")
	return b
}

// newNetns makes a namespace without a name: it is gone with its last handle.
func newNetns(t *testing.T) netns.NsHandle {
	t.Helper()
	var ns netns.NsHandle
	onThread(t, func() {
		must(t, unix.Unshare(unix.CLONE_NEWNET))
		var err error
		ns, err = netns.Get()
		must(t, err)
	})
	t.Cleanup(func() { ns.Close() })
	return ns
}

// onThread calls f on a thread that is thrown away after it.
func onThread(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer close(done)
		f()
	}()
	<-done
}

// in calls f in a namespace.
func in(t *testing.T, ns netns.NsHandle, f func() error) error {
	t.Helper()
	var err error
	onThread(t, func() {
		if err = netns.Set(ns); err == nil {
			err = f()
		}
	})
	return err
}

func mountBPFFS(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("lacehook", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mount a bpffs at %s: %v", dir, err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	return dir
}

// load is an agent that starts; without TCX where asked, or where the kernel has none.
func (b *bed) load(forceClsact bool) *Hooks {
	b.t.Helper()
	h, err := b.tryLoad(forceClsact)
	must(b.t, err)
	b.t.Cleanup(func() { h.Close() })
	return h
}

func (b *bed) tryLoad(forceClsact bool) (h *Hooks, err error) {
	b.t.Helper()
	probe := probeTCX
	if forceClsact {
		probe = func(*ebpf.Program) (bool, error) { return false, nil }
	}
	err = in(b.t, b.ns, func() (err error) {
		h, err = loadWith(b.dir, clsact{b}, b.log, probe)
		return err
	})
	return h, err
}

func (b *bed) attach(h *Hooks, ifindex int, p Program) error {
	b.t.Helper()
	return in(b.t, b.ns, func() error { return h.Attach(ifindex, p) })
}

// clsact is a Filters of the tests' own.
type clsact struct{ *bed }

func (c clsact) filter(ifindex int, name string, fd int) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          fd, Name: name, DirectAction: true,
	}
}

func (c clsact) ReplaceFilter(ifindex int, name string, fd int) error {
	return in(c.t, c.ns, func() error {
		q := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
		if err := netlink.QdiscAdd(q); err != nil && err != unix.EEXIST {
			return fmt.Errorf("attach to interface %d: %w", ifindex, err)
		}
		if err := netlink.FilterReplace(c.filter(ifindex, name, fd)); err != nil {
			return fmt.Errorf("attach to interface %d: %w", ifindex, err)
		}
		return nil
	})
}

func (c clsact) DeleteFilter(ifindex int) error {
	return in(c.t, c.ns, func() error {
		err := netlink.FilterDel(c.filter(ifindex, "", -1))
		if err == unix.ENOENT || err == unix.EINVAL || err == unix.ENODEV {
			return nil
		}
		return err
	})
}

// veth makes a pair with one end in the bed and one in a namespace of its own, both up, without the
// chatter of IPv6. The MAC addresses end in the index of the pair.
func (b *bed) veth(name string, peer netns.NsHandle) (host, far netlink.Link) {
	b.t.Helper()
	quiet := netlink.NewLinkAttrs()
	quiet.Name = name
	must(b.t, in(b.t, b.ns, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: quiet, PeerName: "eth0", PeerNamespace: netlink.NsFd(peer)}); err != nil {
			return err
		}
		return up(name, &host)
	}))
	must(b.t, in(b.t, peer, func() error { return up("eth0", &far) }))
	return host, far
}

func up(name string, l *netlink.Link) error {
	found, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	*l = found
	if err := netlink.LinkSetIP6AddrGenMode(found, 1); err != nil { // none
		return err
	}
	return netlink.LinkSetUp(found)
}

// unlinked deletes an interface of the bed.
func (b *bed) unlinked(l netlink.Link) {
	b.t.Helper()
	must(b.t, in(b.t, b.ns, func() error { return netlink.LinkDel(l) }))
}

// pins lists what is pinned, relative to the bed's directory.
func (b *bed) pins() []string {
	b.t.Helper()
	var out []string
	filepath.WalkDir(b.dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, strings.TrimPrefix(path, b.dir+"/"))
		}
		return nil
	})
	return out
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

// until polls for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain: %s", what)
}

// ways runs a test with TCX links, where the kernel has them, and with clsact filters.
func ways(t *testing.T, f func(t *testing.T, b *bed, clsact bool)) {
	t.Run("tcx", func(t *testing.T) {
		b := newBed(t)
		if !b.load(false).TCX() {
			t.Skip("this kernel has no TCX (before 6.6): the other half of this test covers it, and newer kernels this one")
		}
		f(t, newBed(t), false)
	})
	t.Run("clsact", func(t *testing.T) { f(t, newBed(t), true) })
}

func ifname(i int) string { return fmt.Sprintf("lacehk%d", i) }

// vethAt makes a pair whose host end has the index.
func (b *bed) vethAt(name string, index int) (host, far netlink.Link) {
	b.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = name, index
	must(b.t, in(b.t, b.ns, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "p"})
	}))
	must(b.t, in(b.t, b.ns, func() error {
		if err := up(name+"p", &far); err != nil {
			return err
		}
		return up(name, &host)
	}))
	return host, far
}

func programID(t *testing.T, h *Hooks, p Program) ebpf.ProgramID {
	t.Helper()
	info, err := h.Collection().Programs[string(p)].Info()
	must(t, err)
	id, _ := info.ID()
	return id
}

// attached is the program at an interface's TCX ingress; 0: none.
func (b *bed) attached(ifindex int) ebpf.ProgramID {
	b.t.Helper()
	var ids []ebpf.ProgramID
	must(b.t, in(b.t, b.ns, func() error {
		res, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return err
		}
		for _, p := range res.Programs {
			ids = append(ids, p.ID)
		}
		return nil
	}))
	if len(ids) == 0 {
		return 0
	}
	return ids[0]
}

// programs counts what is attached to an interface's ingress, in either way.
func (b *bed) programs(ifindex int) (n int) {
	b.t.Helper()
	must(b.t, in(b.t, b.ns, func() error {
		if res, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress}); err == nil {
			n += len(res.Programs)
		}
		l, err := netlink.LinkByIndex(ifindex)
		if err != nil {
			return err
		}
		filters, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
		n += len(filters)
		return err
	}))
	return n
}
