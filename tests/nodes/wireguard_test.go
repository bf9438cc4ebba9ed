// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Numbers of linux/wireguard.h.
const (
	wgSetDevice = 1

	wgDeviceIfindex    = 1
	wgDevicePrivateKey = 3
	wgDeviceListenPort = 6
	wgDevicePeers      = 8

	wgPeerPublicKey  = 1
	wgPeerEndpoint   = 4
	wgPeerAllowedIPs = 9

	wgAllowedFamily = 1
	wgAllowedAddr   = 2
	wgAllowedBits   = 3

	wgPort = 51820
)

// TestWireGuardUplink joins two nodes by a tunnel that has no Ethernet header.
func TestWireGuardUplink(t *testing.T) {
	needRoot(t)
	b := newBed(t, bedOptions{nodes: 2, perNode: "uplinks = [\"wg0\"]", prepare: func(b *bed) { joinByWireGuard(t, b) }})
	x, y := b.nodes[0].run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	if x.port.MTU != 1420-40 {
		t.Errorf("MTU %d, want 1380", x.port.MTU)
	}
	checkPings(t, x, y)
	wire := b.wire.capture(t, "n1")
	for at := range 2 {
		x.transfer(t, y.listenTCP(t, y.addresses()[at], digest), transferSize()/2)
		y.transfer(t, x.listenTCP(t, x.addresses()[at], digest), transferSize()/2)
	}
	checkNothingBare(t, wire)
	if wire.count(func(f []byte) bool { return isFrom(f, "5f00:1ace::/32") }) > 0 {
		t.Error("SRv6 beside the tunnel")
	}
}

// TestSegmentOverWireGuard has a segment over such a tunnel.
func TestSegmentOverWireGuard(t *testing.T) {
	needRoot(t)
	b := newBed(t, bedOptions{nodes: 2, networks: segments, perNode: "uplinks = [\"wg0\"]", prepare: func(b *bed) { joinByWireGuard(t, b) }})
	x, y := b.nodes[0].run(t, "x", "seg"), b.nodes[1].run(t, "y", "seg")
	if x.port.MTU != 1420-58 {
		t.Errorf("MTU %d, want 1362", x.port.MTU)
	}
	wire := b.wire.capture(t, "n1")
	checkSegmentPair(t, x, y)
	checkNothingBare(t, wire)
	if wire.count(func(f []byte) bool { return isFrom(f, "5f00:1ace::/32") }) > 0 {
		t.Error("SRv6 beside the tunnel")
	}
}

// joinByWireGuard gives up0 other addresses and puts the underlay's on wg0.
func joinByWireGuard(t *testing.T, b *bed) {
	keys := make([]*ecdh.PrivateKey, len(b.nodes))
	for i, n := range b.nodes {
		err := n.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs("wg0")})
		if errors.Is(err, unix.EOPNOTSUPP) {
			t.Skip("this kernel has no WireGuard (CONFIG_WIREGUARD): run this test binary in a VM with scripts/run-in-vm")
		}
		must(t, err)
		keys[i], err = ecdh.X25519().GenerateKey(rand.Reader)
		must(t, err)
		must(t, n.AddrDel(n.link(t, uplink), &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(fmt.Sprintf("fd00:a::%d/64", i+1)))}))
		n.give(t, uplink, fmt.Sprintf("fd00:c::%d/64", i+1))
	}
	for i, n := range b.nodes {
		peer := 2 - i
		must(t, n.do(func() error {
			return setWireGuard(n.link(t, "wg0").Attrs().Index, keys[i], keys[1-i].PublicKey(), netip.MustParseAddr(fmt.Sprintf("fd00:c::%d", peer)),
				netip.MustParsePrefix(fmt.Sprintf("fd00:a::%d/128", peer)), netip.MustParsePrefix(fmt.Sprintf("5f00:1ace:%d::/48", peer)))
		}))
		must(t, n.LinkSetUp(n.link(t, "wg0")))
		n.give(t, "wg0", fmt.Sprintf("fd00:a::%d/64", i+1))
	}
}

// setWireGuard configures a device in the namespace of the calling thread with one peer.
func setWireGuard(index int, key *ecdh.PrivateKey, peerKey *ecdh.PublicKey, endpoint netip.Addr, allowed ...netip.Prefix) error {
	family, err := netlink.GenlFamilyGet("wireguard")
	if err != nil {
		return fmt.Errorf("find WireGuard's netlink family: %w", err)
	}
	peers := nl.NewRtAttr(wgDevicePeers|unix.NLA_F_NESTED, nil)
	peer := peers.AddRtAttr(unix.NLA_F_NESTED, nil)
	peer.AddRtAttr(wgPeerPublicKey, peerKey.Bytes())
	peer.AddRtAttr(wgPeerEndpoint, sockaddr(endpoint, wgPort))
	ips := peer.AddRtAttr(wgPeerAllowedIPs|unix.NLA_F_NESTED, nil)
	for _, p := range allowed {
		one := ips.AddRtAttr(unix.NLA_F_NESTED, nil)
		one.AddRtAttr(wgAllowedFamily, nl.Uint16Attr(unix.AF_INET6))
		one.AddRtAttr(wgAllowedAddr, p.Addr().AsSlice())
		one.AddRtAttr(wgAllowedBits, []byte{byte(p.Bits())})
	}
	r := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	r.AddData(&nl.Genlmsg{Command: wgSetDevice, Version: 1})
	r.AddData(nl.NewRtAttr(wgDeviceIfindex, nl.Uint32Attr(uint32(index))))
	r.AddData(nl.NewRtAttr(wgDevicePrivateKey, key.Bytes()))
	r.AddData(nl.NewRtAttr(wgDeviceListenPort, nl.Uint16Attr(wgPort)))
	r.AddData(peers)
	if _, err := r.Execute(unix.NETLINK_GENERIC, 0); err != nil {
		return fmt.Errorf("configure WireGuard: %w", err)
	}
	return nil
}

// sockaddr is a struct sockaddr_in6.
func sockaddr(a netip.Addr, port uint16) []byte {
	return join(binary.NativeEndian.AppendUint16(nil, unix.AF_INET6), be16(int(port)), make([]byte, 4), a.AsSlice(), make([]byte, 4))
}
