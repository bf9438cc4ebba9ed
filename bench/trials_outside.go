// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/plan"
)

// wireFrame is an IP packet that the far end of the wire sends to the first node.
func wireFrame(packet []byte) ([]byte, error) {
	here, err := parseMAC(wireMAC[0])
	if err != nil {
		return nil, err
	}
	there, err := parseMAC(wireMAC[1])
	return ethernet(here, there, packet), err
}

func parseMAC(s string) (mac plan.MAC, err error) {
	b, err := net.ParseMAC(s)
	if err != nil {
		return mac, fmt.Errorf("read the MAC address of the wire: %w", err)
	}
	copy(mac[:], b)
	return mac, nil
}

// fromWire is a program at the node's end of the wire with a packet that came in there.
func (n *node) fromWire(name string, p hook.Program, packet []byte, answer int) (trial, error) {
	up, err := net.InterfaceByName("up0")
	if err != nil {
		return trial{}, fmt.Errorf("look for the wire: %w", err)
	}
	f, err := wireFrame(packet)
	return trial{name: name, program: n.entry(p), packet: f, ifindex: up.Index, answer: answer}, err
}

// hostTrials are packets for the host itself, of which Lace knows nothing: what a host pays for the programs at its interfaces.
func (n *node) hostTrials(programs ...hook.Program) ([]trial, error) {
	var trials []trial
	for _, p := range programs {
		packet := datagram(netip.AddrPortFrom(netip.MustParseAddr(wire4[1]), 40000), netip.AddrPortFrom(netip.MustParseAddr(wire4[0]), 22))
		t, err := n.fromWire(string(p)+"-host", p, packet, actUnspec)
		if err != nil {
			return nil, err
		}
		trials = append(trials, t)
	}
	return trials, nil
}

// masqueradeTrials are packets of flows that leave the overlay, and their answers.
func (n *node) masqueradeTrials(e ends) ([]trial, error) {
	var trials []trial
	for _, v := range []struct {
		suffix   string
		src, dst netip.Addr
	}{{"", e.port.V4, e.far}, {"-v6", e.port.V6, e.far6}} {
		out := trial{name: "pod_l3-masquerade" + v.suffix, program: n.entry(hook.PodL3), ifindex: e.port.Ifindex, answer: actRedirect,
			packet: ethernet(plan.GatewayMAC, e.port.MAC, udp(v.src, v.dst))}
		sent, err := out.become()
		if err != nil {
			return nil, err
		}
		back, err := n.fromWire("uplink-masquerade"+v.suffix, hook.Uplink, turned(sent), actRedirect)
		if err != nil {
			return nil, err
		}
		trials = append(trials, out, back)
	}
	host, err := n.hostTrials(hook.Uplink, hook.Outer)
	return append(trials, host...), err
}

// publishTrials are packets to a published port, and the container's answers.
func (n *node) publishTrials(e ends) ([]trial, error) {
	var trials []trial
	for _, v := range []struct {
		suffix   string
		src, dst string
	}{{"", wire4[1], wire4[0]}, {"-v6", wire6[1], wire6[0]}} {
		in, err := n.fromWire("uplink-publish"+v.suffix, hook.Uplink, udp(netip.MustParseAddr(v.src), netip.MustParseAddr(v.dst)), actRedirect)
		if err != nil {
			return nil, err
		}
		got, err := in.become()
		if err != nil {
			return nil, err
		}
		trials = append(trials, in, trial{name: "pod_l3-publish" + v.suffix, program: n.entry(hook.PodL3), ifindex: e.port.Ifindex,
			answer: actRedirect, packet: ethernet(plan.GatewayMAC, e.port.MAC, turned(got))})
	}
	return trials, nil
}
