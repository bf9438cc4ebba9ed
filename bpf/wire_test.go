// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// side is a node with one container, podA, as real interfaces.
type side struct {
	*node
	pod    *bed
	link   netlink.Link // host end of the container's veth
	eth0   netlink.Link // the container's end
	uplink netlink.Link
	socket int // at the container's end
}

// wire is two nodes and what joins their uplinks: a veth, or two tunnels without Ethernet headers
// with the test between them. Programs are attached by clsact, which every kernel has.
type wire struct {
	t   *testing.T
	raw bool
	one *side
	two *side
}

func newWire(t *testing.T, o options, raw bool) *wire {
	t.Helper()
	w := &wire{t: t, raw: raw}
	hosts := []*bed{newSpace(t), newSpace(t)}
	uplinks := w.uplinks(hosts)
	w.one, w.two = w.side(1, hosts[0], uplinks[0], o), w.side(2, hosts[1], uplinks[1], o)
	return w
}

func (w *wire) uplinks(hosts []*bed) [2]netlink.Link {
	if w.raw {
		return w.tunnels(hosts)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = "up0", nexthopDst[:]
	far := handle(w.t, hosts[1])
	must(w.t, hosts[0].in(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "up0", PeerHardwareAddr: nexthopDst[:], PeerNamespace: netlink.NsFd(far)})
	}))
	return [2]netlink.Link{raise(w.t, hosts[0], "up0"), raise(w.t, hosts[1], "up0")}
}

func handle(t testing.TB, b *bed) (ns netns.NsHandle) {
	t.Helper()
	must(t, b.in(func() (err error) { ns, err = netns.Get(); return err }))
	t.Cleanup(func() { ns.Close() })
	return ns
}

// raise sets an interface up, without the chatter of IPv6.
func raise(t testing.TB, b *bed, name string) (l netlink.Link) {
	t.Helper()
	must(t, b.in(func() (err error) {
		if l, err = netlink.LinkByName(name); err != nil {
			return err
		}
		if err := netlink.LinkSetIP6AddrGenMode(l, 1); err != nil { // none
			return err
		}
		return netlink.LinkSetUp(l)
	}))
	return l
}

// tunnels carries packets between two TUN interfaces.
func (w *wire) tunnels(hosts []*bed) (links [2]netlink.Link) {
	w.t.Helper()
	makeTunNode(w.t)
	var files [2]*os.File
	for i, host := range hosts {
		tun := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "up0"}, Mode: netlink.TUNTAP_MODE_TUN, NonPersist: true, Queues: 1,
			Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE}
		err := host.in(func() error { return netlink.LinkAdd(tun) })
		if errors.Is(err, os.ErrNotExist) {
			w.t.Skip("there is no /dev/net/tun: load the module tun (the VM has it)")
		}
		must(w.t, err)
		files[i] = tun.Fds[0]
		w.t.Cleanup(func() { files[i].Close() })
		links[i] = raise(w.t, host, "up0")
	}
	carry := func(from, to *os.File) {
		b := make([]byte, 65536)
		for {
			n, err := from.Read(b)
			if err != nil {
				return // closed at the end of the test
			}
			to.Write(b[:n]) // what the other kernel refuses is lost, as on a wire
		}
	}
	go carry(files[0], files[1])
	go carry(files[1], files[0])
	return links
}

// makeTunNode makes the device that brings the module in, in the VM, which has no udev.
func makeTunNode(t *testing.T) {
	t.Helper()
	if os.Getenv("LACE_VM") == "" {
		return
	}
	must(t, os.MkdirAll("/dev/net", 0o755))
	if err := unix.Mknod("/dev/net/tun", unix.S_IFCHR|0o600, int(unix.Mkdev(10, 200))); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatalf("make /dev/net/tun: %v", err)
	}
}

func (w *wire) side(number int, host *bed, up netlink.Link, o options) *side {
	w.t.Helper()
	s := &side{pod: newSpace(w.t), uplink: up}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "pod0"
	mac, entry := macOf(number, podA), "pod_l3"
	if o.l2 {
		mac, entry = stationMAC(number, podA), "pod_l2"
	}
	inside := handle(w.t, s.pod)
	must(w.t, host.in(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: mac[:], PeerNamespace: netlink.NsFd(inside)})
	}))
	s.link, s.eth0 = raise(w.t, host, "pod0"), raise(w.t, s.pod, "eth0")
	for dev := range host.index {
		host.index[dev] = 1000 + dev // there are none
	}
	host.index[podA], host.index[uplink] = s.link.Attrs().Index, up.Attrs().Index
	var far netlink.Link
	if o.l2 {
		host.index[cutter], far = segmenter(w.t, host)
	}
	o.number = number
	s.node = newNode(w.t, host, o)
	s.nexthops(nexthop{known: !w.raw, raw: w.raw})
	s.socket = packetSocket(w.t, s.pod, s.eth0)
	attach(w.t, host, s.link, s.coll.Programs[entry])
	if o.l2 {
		attach(w.t, host, far, s.coll.Programs["segmented"])
	}
	name := "uplink"
	if w.raw {
		name = "uplink_raw"
	}
	attach(w.t, host, up, s.coll.Programs[name])
	return s
}

// segmenter is the index of the near end of what GSO frames are cut by, and the far end.
func segmenter(t testing.TB, host *bed) (int, netlink.Link) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "cut0"
	must(t, host.in(func() error { return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "cut1"}) }))
	return raise(t, host, "cut0").Attrs().Index, raise(t, host, "cut1")
}

func attach(t testing.TB, b *bed, l netlink.Link, p *ebpf.Program) {
	t.Helper()
	must(t, b.in(func() error {
		qdisc := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
		if err := netlink.QdiscAdd(qdisc); err != nil {
			return err
		}
		return netlink.FilterAdd(&netlink.BpfFilter{Fd: p.FD(), Name: "test", DirectAction: true, FilterAttrs: netlink.FilterAttrs{
			LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1}})
	}))
}

func packetSocket(t testing.TB, b *bed, l netlink.Link) (fd int) {
	t.Helper()
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8
	must(t, b.in(func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, all); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Attrs().Index})
	}))
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
	must(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1))
	must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}))
	return fd
}

// readFrame reads a frame that is there, or comes soon. A tag that the kernel has taken off is put back.
func readFrame(socket int) ([]byte, error) {
	b, control := make([]byte, 65536), make([]byte, 128)
	n, c, _, _, err := unix.Recvmsg(socket, b, control, 0)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:c])
	for _, m := range messages {
		const statusVLAN, status, tci, tpid = 1 << 4, 0, 16, 18 // struct tpacket_auxdata
		if m.Header.Type == unix.PACKET_AUXDATA && binary.NativeEndian.Uint32(m.Data[status:])&statusVLAN != 0 {
			return tagged(b[:n], vlan{binary.NativeEndian.Uint16(m.Data[tpid:]), binary.NativeEndian.Uint16(m.Data[tci:])}), err
		}
	}
	return b[:n], err
}

func (s *side) send(frame []byte) {
	s.t.Helper()
	if _, err := unix.Write(s.socket, frame); err != nil {
		s.t.Fatalf("send %s: %v", spaced(frame), err)
	}
}

// receives waits for a frame at the container; what else comes is left out.
func (s *side) receives(want []byte) {
	s.t.Helper()
	var seen [][]byte
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		frame, err := readFrame(s.socket)
		if err != nil {
			continue
		}
		if bytes.Equal(frame, want) {
			return
		}
		seen = append(seen, frame)
	}
	s.t.Errorf("node %d: the container got %d other frames, not %s; counted: %v", s.opts.number, len(seen), spaced(want), s.counters())
	for _, f := range seen {
		s.t.Logf("got %s", spaced(f))
	}
}

// counts waits until a reason was counted that often since before.
func (s *side) counts(before uint64, reason bpf.LaceReason, times uint64) {
	s.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if s.counters()[reason]-before >= times {
			return
		}
	}
	s.t.Errorf("node %d: %s was counted %d times, want %d: %v", s.opts.number, words([]bpf.LaceReason{reason}), s.counters()[reason]-before, times, s.counters())
}

// wires runs a test over Ethernet and over tunnels, in all forms of encapsulation and decapsulation.
func wires(t *testing.T, f func(t *testing.T, w *wire)) { allWires(t, false, f) }

func allWires(t *testing.T, l2 bool, f func(t *testing.T, w *wire)) {
	for name, o := range map[string]options{"reduced": {}, "srh": {srh: true}, "change_proto": {changeProto: true}, "srh change_proto": {srh: true, changeProto: true}} {
		o.l2 = l2
		t.Run("ethernet "+name, func(t *testing.T) { f(t, newWire(t, o, false)) })
		t.Run("tunnel "+name, func(t *testing.T) { f(t, newWire(t, o, true)) })
	}
}

// TestWire sends real packets both ways, and what comes out is byte for byte what went in, one hop later.
func TestWire(t *testing.T) {
	wires(t, func(t *testing.T, w *wire) {
		for name, p := range map[string]ip{
			"v4": udp(a4, far4, 1, 2, 33), "v4 empty": udp(a4, far4, 1, 2, 0), "v4 bare": {src: a4, dst: far4, proto: 253},
			"v4 full": udp(a4, far4, 1, 2, podMTU-24-28), "v6": udp(a6, far6, 1, 2, 33), "v6 bare": {src: a6, dst: far6, proto: extNone},
			"v6 full": udp(a6, far6, 1, 2, podMTU-24-48), "v4 TCP": tcp(a4, far4, 0),
		} {
			t.Run(name, func(t *testing.T) {
				w.one.t, w.two.t = t, t
				w.one.send(toGateway(1, podA, p))
				w.two.receives(ethIP(macOf(2, podA), plan.GatewayMAC, afterHop(p)))
				p.src, p.dst = p.dst, p.src
				w.two.send(toGateway(2, podA, p))
				w.one.receives(ethIP(macOf(1, podA), plan.GatewayMAC, afterHop(p)))
			})
		}
		w.one.t, w.two.t = t, t
	})
}

// TestAnswersOnTheWire: errors and gateway answers reach the container.
func TestAnswersOnTheWire(t *testing.T) {
	w := newWire(t, options{}, false)
	p := hops(udp(a4, far4, 1, 2, 900), 1)
	w.one.send(fromA(p))
	w.one.receives(errorAbout(w.one.node, podA, p.bytes(), 11, 0, 0))
	q := hops(udp(a6, far6, 1, 2, 1300), 1)
	w.one.send(fromA(q))
	w.one.receives(errorAbout(w.one.node, podA, q.bytes(), 3, 0, 0))
	w.one.send(eth(broadcastMAC, macA, typeARP, arp(1, macA, a4, plan.MAC{}, gw4)))
	w.one.receives(eth(macA, plan.GatewayMAC, typeARP, arp(2, plan.GatewayMAC, gw4, macA, a4)))
}

// TestShortFrames sends what BPF_PROG_TEST_RUN does not take: frames of all lengths.
func TestShortFrames(t *testing.T) {
	w := newWire(t, options{}, false)
	before := w.one.counters()[bpf.LaceReasonREASON_MALFORMED]
	whole := fromA(udp(a6, far6, 1, 2, 0))
	for length := 14; length < len(whole); length++ {
		w.one.send(whole[:length])
	}
	w.one.counts(before, bpf.LaceReasonREASON_MALFORMED, uint64(len(whole)-14))
	w.one.send(whole)
	w.two.receives(ethIP(macOf(2, podA), plan.GatewayMAC, afterHop(udp(a6, far6, 1, 2, 0))))
}

// TestVLAN: tags are taken off before the programs run, and known by vlan_present only.
func TestVLAN(t *testing.T) {
	w := newWire(t, options{}, false)
	tag := func(frame []byte) []byte {
		return append(frame[:12:12], append([]byte{0x81, 0, 0, 5}, frame[12:]...)...)
	}
	before := w.one.counters()[bpf.LaceReasonREASON_NOT_IP]
	p := udp(a4, far4, 1, 2, 30)
	w.one.send(tag(fromA(p)))
	w.one.counts(before, bpf.LaceReasonREASON_NOT_IP, 1)

	up := packetSocket(t, w.one.bed, w.one.uplink)
	overlay := overlay(in4)
	overlay.src, overlay.dst = locatorOf(1, 48).Source(backend, 0), locatorOf(2, 48).SID(20, backend).Addr
	overlay.body = p.bytes()
	frame := ethIP(nexthopDst, nexthopSrc, overlay.bytes())
	counted := w.two.counters()
	for _, f := range [][]byte{tag(frame), frame} { // the second one is the proof that the first has passed
		_, err := unix.Write(up, f)
		must(t, err)
	}
	w.two.counts(counted[bpf.LaceReasonREASON_DECAPSULATED], bpf.LaceReasonREASON_DECAPSULATED, 1)
	if n := w.two.counters()[bpf.LaceReasonREASON_DECAPSULATED] - counted[bpf.LaceReasonREASON_DECAPSULATED]; n != 1 {
		t.Errorf("%d packets were decapsulated, want the untagged one", n)
	}
}

// reflector sends every packet of one version back where it came from, as a container that forwards
// into the overlay does: without leaving the socket buffer that came out of it.
func reflector(t testing.TB, mac plan.MAC, at, size int32) *ebpf.Program {
	t.Helper()
	store := func(to, from, size int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, to), asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, from),
			asm.Mov.Imm(asm.R4, size), asm.Mov.Imm(asm.R5, 0), asm.FnSkbStoreBytes.Call(),
		}
	}
	insns := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Mov.Imm(asm.R2, at), asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, -2*size), asm.Mov.Imm(asm.R4, 2*size), asm.FnSkbLoadBytes.Call(),
		asm.JEq.Imm(asm.R0, 0, "loaded"), asm.Mov.Imm(asm.R0, shot), asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("loaded"),
	}
	insns = append(insns, store(at, -size, size)...)
	insns = append(insns, store(at+size, -2*size, size)...)
	macs := append(append([]byte{}, plan.GatewayMAC[:]...), mac[:]...)
	for i := int16(0); i < 12; i += 4 {
		insns = append(insns, asm.StoreImm(asm.RFP, -48+i, int64(int32(binary.NativeEndian.Uint32(macs[i:]))), asm.Word))
	}
	insns = append(insns, store(0, -48, 12)...)
	insns = append(insns, asm.LoadMem(asm.R1, asm.R6, 40, asm.Word), asm.Mov.Imm(asm.R2, 0), asm.FnRedirect.Call(), asm.Return())
	return newProgram(t, "reflector", insns)
}

// TestReenter: what came out of the overlay goes into it again, in all forms. The kernel marks it as encapsulated still.
func TestReenter(t *testing.T) {
	wires(t, func(t *testing.T, w *wire) {
		p := udp(a4, far4, 1, 2, 33)
		attach(t, w.two.pod, w.two.eth0, reflector(t, macOf(2, podA), 26, 4))
		w.one.send(fromA(p))
		p.src, p.dst, p.hops = p.dst, p.src, 62
		w.one.receives(ethIP(macA, plan.GatewayMAC, p.bytes()))
	})
	t.Run("IPv6", func(t *testing.T) {
		w := newWire(t, options{}, false)
		p := udp(a6, far6, 1, 2, 33)
		attach(t, w.two.pod, w.two.eth0, reflector(t, macOf(2, podA), 22, 16))
		w.one.send(fromA(p))
		p.src, p.dst, p.hops = p.dst, p.src, 62
		w.one.receives(ethIP(macA, plan.GatewayMAC, p.bytes()))
	})
	t.Run("by the kernel's neighbour", func(t *testing.T) {
		w := newWire(t, options{}, false)
		w.two.asksKernel(w.one)
		p := udp(a4, far4, 1, 2, 33)
		attach(t, w.two.pod, w.two.eth0, reflector(t, macOf(2, podA), 26, 4))
		w.one.send(fromA(p))
		p.src, p.dst, p.hops = p.dst, p.src, 62
		w.one.receives(ethIP(macA, plan.GatewayMAC, p.bytes()))
	})
	t.Run("GSO", func(t *testing.T) {
		w := newWire(t, options{}, false)
		attach(t, w.two.pod, w.two.eth0, reflector(t, macOf(2, podA), 26, 4))
		before := w.two.counters()[bpf.LaceReasonREASON_ENCAP_NESTED]
		must(t, unix.SetsockoptInt(w.one.socket, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
		w.one.send(append(segmented(54, 1000), fromA(tcp(a4, far4, 4000))...))
		w.two.counts(before, bpf.LaceReasonREASON_ENCAP_NESTED, 1)
	})
}

// asksKernel makes the node look in the kernel's tables for the way to the other one, as it does when
// the agent has not vouched for its own.
func (s *side) asksKernel(other *side) {
	s.t.Helper()
	s.nexthops(nexthop{known: false})
	up := s.uplink.Attrs().Index
	locator := other.locator()
	must(s.t, s.bed.in(func() error {
		dst := &net.IPNet{IP: locator.Addr().AsSlice(), Mask: net.CIDRMask(locator.Bits(), 128)}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: up, Dst: dst}); err != nil {
			return err
		}
		return netlink.NeighAdd(&netlink.Neigh{LinkIndex: up, IP: locator.SID(topology.EndDT46, backend).AsSlice(),
			HardwareAddr: nexthopDst[:], State: netlink.NUD_PERMANENT, Family: unix.AF_INET6})
	}))
}

// TestNeighbour sends by the kernel's own tables.
func TestNeighbour(t *testing.T) {
	w := newWire(t, options{}, false)
	w.one.asksKernel(w.two)
	for _, p := range []ip{udp(a4, far4, 1, 2, 33), udp(a6, far6, 1, 2, 33)} {
		w.one.send(fromA(p))
		w.two.receives(ethIP(macOf(2, podA), plan.GatewayMAC, afterHop(p)))
	}
}

// segmented is a struct virtio_net_hdr: TCP over IPv4, to be cut to size, checksum still to be made.
func segmented(header, size uint16) []byte {
	b := []byte{1, 1}
	for _, v := range []uint16{header, size, 34, 16} {
		b = binary.NativeEndian.AppendUint16(b, v)
	}
	return b
}

// TestLittleLinear: a container can send packets whose headers are not in the linear part; the guards
// see them all the same.
func TestLittleLinear(t *testing.T) {
	w := newWire(t, options{}, false)
	must(t, unix.SetsockoptInt(w.one.socket, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	options := udp(a4, far4, 67, 68, 3000)
	options.options = make([]byte, 40)
	for name, c := range map[string]struct {
		p      ip
		reason bpf.LaceReason
	}{
		"DHCP server behind options": {options, bpf.LaceReasonREASON_DHCP_SERVER},
		"DHCP server":                {udp(a4, far4, 67, 68, 6000), bpf.LaceReasonREASON_DHCP_SERVER},
		"foreign address":            {udp(b4, far4, 1, 2, 6000), bpf.LaceReasonREASON_SPOOFED_ADDRESS},
		"out of hops":                {hops(udp(a6, far6, 1, 2, 6000), 1), bpf.LaceReasonREASON_HOP_LIMIT},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, w.one.bed.in(func() error { return netlink.LinkSetMTU(w.one.link, 9000) }))
			must(t, w.one.pod.in(func() error { return netlink.LinkSetMTU(w.one.eth0, 9000) }))
			w.one.t = t
			before := w.one.counters()[c.reason]
			header := make([]byte, 10) // no segmentation; 14 bytes are linear
			binary.NativeEndian.PutUint16(header[2:], 14)
			w.one.send(append(header, fromA(c.p)...))
			w.one.counts(before, c.reason, 1)
			w.one.t = w.t
		})
	}
}
