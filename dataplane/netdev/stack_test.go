// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// What bpf_fib_lookup answers (linux/bpf.h).
const (
	fibSuccess     = 0
	fibFwdDisabled = 5
	fibNoNeigh     = 7
)

// fibLookup asks as a program does where a packet would go that came in by an interface.
func fibLookup(t *testing.T, c *conn, in int, from, to string) (answer, out int) {
	t.Helper()
	const params, size = -64, 64 // struct bpf_fib_lookup
	family, source, target := unix.AF_INET, netip.MustParseAddr(from).AsSlice(), netip.MustParseAddr(to).AsSlice()
	if len(source) == 16 {
		family = unix.AF_INET6
	}
	code := asm.Instructions{asm.Mov.Imm(asm.R2, 0)}
	for at := int16(params); at < 0; at += 8 {
		code = append(code, asm.StoreMem(asm.RFP, at, asm.R2, asm.DWord))
	}
	code = append(code, asm.StoreImm(asm.RFP, params, int64(family), asm.Byte), asm.StoreImm(asm.RFP, params+8, int64(in), asm.Word))
	for i := range source {
		code = append(code,
			asm.StoreImm(asm.RFP, int16(params+16+i), int64(source[i]), asm.Byte),
			asm.StoreImm(asm.RFP, int16(params+32+i), int64(target[i]), asm.Byte))
	}
	code = append(code,
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, params), asm.Mov.Imm(asm.R3, size), asm.Mov.Imm(asm.R4, 0),
		asm.FnFibLookup.Call(),
		asm.LoadMem(asm.R1, asm.RFP, params+8, asm.Word), asm.LSh.Imm(asm.R1, 8), asm.Or.Reg(asm.R0, asm.R1),
		asm.Return())
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, Instructions: code, License: "GPL"})
	must(t, err)
	defer p.Close()
	var result uint32
	must(t, inNetns(c.ns, func() (err error) {
		result, err = p.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
		return err
	}))
	return int(result & 0xff), int(result >> 8)
}

// The programs learn of lc-host where the host would send a packet, with its rules and tables, while the host itself forwards nothing.
func TestProgramsMayAskForTheHostsRoutes(t *testing.T) {
	h, c, u0 := hostNode(t)
	addRoute(t, c, "::/0", "fd00:a::fe", u0)
	whole := map[string]int32{"ipv4/ip_forward": 0, "ipv4/conf/all/forwarding": 0, "ipv4/conf/default/forwarding": 0, "ipv4/conf/u0/forwarding": 0,
		"ipv6/conf/all/forwarding": 0, "ipv6/conf/default/forwarding": 0, "ipv6/conf/u0/forwarding": 0}
	for path := range whole { // as the kernel of the test is set up does not matter
		must(t, c.sysctl(path, "0"))
	}
	must(t, errorOf(h.Apply(withHost(withExternal(testPlan())), Options{MTU: uplinkMTU})))
	sysctlIs(t, c, whole)
	s := outlook(t, h, testPlan()).HostSide()

	u1 := second(t, c, "u1")
	policy := defaultBy(u1, "192.0.2.254", "")
	policy.gw, policy.table, policy.scope = netip.Addr{}, 700, netlink.SCOPE_LINK
	routeIn(t, c, policy)
	wants := func(in int, from, to string, out int, answers ...int) {
		t.Helper()
		answer, by := fibLookup(t, c, in, from, to)
		for _, a := range answers {
			if answer == a && by == out {
				return
			}
		}
		t.Errorf("to %s: answer %d, interface %d; want %v and %d", to, answer, by, answers, out)
	}
	wants(s.Stack, nodeV4, "203.0.113.5", u0.Attrs().Index, fibSuccess, fibNoNeigh)
	wants(s.Stack, nodeV6, "2001:db8::5", u0.Attrs().Index, fibSuccess, fibNoNeigh)
	wants(u1.Attrs().Index, nodeV4, "203.0.113.5", u1.Attrs().Index, fibFwdDisabled) // what lc-host would be without our setting
	wants(u1.Attrs().Index, nodeV6, "2001:db8::5", u1.Attrs().Index, fibFwdDisabled)
	addRule(t, c, netlink.FAMILY_V4, 700, plan.HostSide)
	wants(s.Stack, nodeV4, "203.0.113.5", u1.Attrs().Index, fibSuccess, fibNoNeigh)
}

// Somebody who makes a host that was a router none any more would stop lc-host too: Watch tells.
func TestWatchTellsOfForwarding(t *testing.T) {
	t.Parallel()
	h, c, u0 := hostNode(t)
	must(t, c.sysctl("ipv4/ip_forward", "1"))
	must(t, c.sysctl("ipv6/conf/all/forwarding", "1"))
	p := withHost(testPlan())
	must(t, errorOf(h.Apply(p, Options{MTU: uplinkMTU})))
	calls := watch(t, h)
	until(t, "Watch listens", func() bool { return calls.Load() > 0 })
	before := settled(t, calls)
	must(t, c.sysctl(fmt.Sprintf("ipv4/conf/%s/forwarding", u0.Attrs().Name), "0")) // another's
	must(t, c.sysctl("ipv4/conf/lc-host/rp_filter", "2"))                           // another setting
	if after := settled(t, calls); after != before {
		t.Errorf("%d calls for settings that do not matter", after-before)
	}
	for _, path := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		before := settled(t, calls)
		must(t, c.sysctl(path, "0"))
		until(t, "a call for "+path, func() bool { return calls.Load() > before })
	}
	before = settled(t, calls)
	must(t, errorOf(h.Apply(p, Options{MTU: uplinkMTU})))
	if after := settled(t, calls); after != before {
		t.Errorf("%d calls for our own correction", after-before)
	}
	wantHostPair(t, h, c)
	sysctlIs(t, c, map[string]int32{"ipv4/ip_forward": 0, "ipv6/conf/all/forwarding": 0})
}

// A packet that a program sends out of lc-host-peer gets to a process of the host, and the answer comes back there, whatever the
// host's filter of reverse paths, and though the host forwards nothing.
func TestHostTalksByThePair(t *testing.T) {
	h, c, _ := hostNode(t)
	must(t, c.sysctl("ipv4/ip_forward", "0"))
	must(t, c.sysctl("ipv4/conf/default/rp_filter", "1")) // what lc-host is made with
	must(t, errorOf(h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})))
	s := outlook(t, h, testPlan()).HostSide()
	peer := packetSocket(t, c, s.Peer)
	must(t, unix.SetsockoptTimeval(peer, unix.SOL_SOCKET, unix.SO_RCVTIMEO, timeval(10*time.Second)))
	for _, filter := range []string{"0", "1", "2"} {
		must(t, c.sysctl("ipv4/conf/all/rp_filter", filter))
		for container, node := range map[string]string{"10.40.2.3": nodeV4, "fd40:0:2::3": nodeV6} {
			t.Run(fmt.Sprintf("rp_filter %s, %s", filter, container), func(t *testing.T) {
				server := listen(t, c, netip.MustParseAddrPort(net.JoinHostPort(node, "7")))
				ask := datagram{netip.AddrPortFrom(netip.MustParseAddr(container), 5000), netip.AddrPortFrom(netip.MustParseAddr(node), 7)}
				_, err := unix.Write(peer, ask.frame(t, s.MAC))
				must(t, err)
				from, err := echo(server)
				must(t, err)
				if from != ask.from {
					t.Errorf("the server was asked by %s", from)
				}
				awaitDatagram(t, peer, datagram{ask.to, ask.from})
			})
		}
	}
}

// The filter does its work on lc-host: what is of no network that hosts talk with is not heard.
func TestHostDoesNotHearOthersByThePair(t *testing.T) {
	h, c, _ := hostNode(t)
	must(t, errorOf(h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})))
	s := outlook(t, h, testPlan()).HostSide()
	must(t, c.sysctl("ipv4/conf/all/rp_filter", "1"))
	peer := packetSocket(t, c, s.Peer)
	node := netip.MustParseAddrPort(nodeV4 + ":7")
	server := listen(t, c, node)
	for _, from := range []string{"203.0.113.66:5000", "10.40.2.3:5000"} {
		_, err := unix.Write(peer, datagram{netip.MustParseAddrPort(from), node}.frame(t, s.MAC))
		must(t, err)
	}
	if from, err := echo(server); err != nil || from.Addr() != netip.MustParseAddr("10.40.2.3") {
		t.Errorf("the server was asked by %s, %v", from, err)
	}
}

func listen(t *testing.T, c *conn, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	var server *net.UDPConn
	must(t, inNetns(c.ns, func() (err error) {
		server, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	}))
	t.Cleanup(func() { server.Close() })
	must(t, server.SetDeadline(time.Now().Add(30*time.Second)))
	return server
}

// echo answers one datagram.
func echo(server *net.UDPConn) (from netip.AddrPort, err error) {
	b := make([]byte, 2048)
	n, from, err := server.ReadFromUDPAddrPort(b)
	if err == nil {
		_, err = server.WriteToUDPAddrPort(b[:n], from)
	}
	return netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), err
}

// datagram is one of UDP.
type datagram struct{ from, to netip.AddrPort }

// frame is the datagram as it goes to a MAC address.
func (d datagram) frame(t *testing.T, to plan.MAC) []byte {
	t.Helper()
	ether := &layers.Ethernet{SrcMAC: hostPeerMAC[:], DstMAC: to[:], EthernetType: layers.EthernetTypeIPv4}
	udp := &layers.UDP{SrcPort: layers.UDPPort(d.from.Port()), DstPort: layers.UDPPort(d.to.Port())}
	var ip gopacket.SerializableLayer
	if d.from.Addr().Is4() {
		l := &layers.IPv4{Version: 4, TTL: 63, Protocol: layers.IPProtocolUDP, SrcIP: d.from.Addr().AsSlice(), DstIP: d.to.Addr().AsSlice()}
		must(t, udp.SetNetworkLayerForChecksum(l))
		ip = l
	} else {
		l := &layers.IPv6{Version: 6, HopLimit: 63, NextHeader: layers.IPProtocolUDP, SrcIP: d.from.Addr().AsSlice(), DstIP: d.to.Addr().AsSlice()}
		must(t, udp.SetNetworkLayerForChecksum(l))
		ip, ether.EthernetType = l, layers.EthernetTypeIPv6
	}
	b := gopacket.NewSerializeBuffer()
	must(t, gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ether, ip, udp, gopacket.Payload("lace")))
	return b.Bytes()
}

// awaitDatagram reads frames until the wanted one comes in.
func awaitDatagram(t *testing.T, socket int, want datagram) {
	t.Helper()
	b := make([]byte, 2048)
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		n, err := unix.Read(socket, b)
		must(t, err)
		if got, ok := readDatagram(b[:n]); ok && got == want {
			return
		}
	}
	t.Errorf("no datagram from %s to %s", want.from, want.to)
}

func readDatagram(frame []byte) (d datagram, ok bool) {
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.NoCopy)
	udp, ok := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
	if !ok {
		return d, false
	}
	from, _ := netip.AddrFromSlice(p.NetworkLayer().NetworkFlow().Src().Raw())
	to, _ := netip.AddrFromSlice(p.NetworkLayer().NetworkFlow().Dst().Raw())
	return datagram{netip.AddrPortFrom(from, uint16(udp.SrcPort)), netip.AddrPortFrom(to, uint16(udp.DstPort))}, true
}
