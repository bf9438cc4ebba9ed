// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
)

// kind is a way for packets to get from one end to the other. A new bed is a file with a kind and a row
// in kinds.
type kind struct {
	name     string
	overhead int      // bytes of the wire's MTU that its headers take from the pods'
	kin      string   // the bed that it differs least from, and is compared with too; empty: none
	outside  bool     // one end is in no pod: the references, which join two, say nothing of it
	metrics  []string // what traffic is measured on it; nil: all
	trials   string   // packets that its entry programs are timed with, of trialsOf; empty: none
	build    func(context.Context, *bed) error
}

// kinds is in the order of the report.
var kinds = []kind{bare, routed, vxlan, seg6, laceL3, laceL3SRH, laceL2, laceL2Segment, nftMasq, laceMasq, nftDNAT, lacePublish}

// bed is podA – nodeA – wire – nodeB – podB, all of them network namespaces. The traffic goes
// from client to server. Of an outside bed nodeB is a host that knows of no pod, and podB is empty.
type bed struct {
	kind
	wire   string
	pod    [2]ns
	node   [2]ns
	client ns
	server ns
	addr   map[int]netip.Addr // that the client asks, by IP version
	listen map[int]netip.Addr // of the server; differs where a port is published
	dir    string             // of a Lace bed: its files
	flows  int                // of a Lace bed: room for so many; 0: what the topology's default is
	agents [2]*nodeProcess    // of a Lace bed
	onStop []func() error     // last made, first undone
}

func bedNames() []string { return namesOf(func(kind) bool { return true }) }

// programBeds are those whose entry programs are timed.
func programBeds() []string { return namesOf(func(k kind) bool { return k.trials != "" }) }

func namesOf(which func(kind) bool) []string {
	var names []string
	for _, k := range kinds {
		if which(k) {
			names = append(names, k.name)
		}
	}
	return names
}

// carries says whether the traffic of a metric is measured on such a bed.
func (k kind) carries(metric string) bool {
	return k.metrics == nil || slices.Contains(k.metrics, metric)
}

func kindNamed(name string) kind { return kinds[slices.Index(bedNames(), name)] }

func newBed(k kind, wire string) *bed {
	at := func(role string) ns { return ns(netnsPrefix + k.name + "-" + role) }
	b := &bed{kind: k, wire: wire,
		pod: [2]ns{at("pa"), at("pb")}, node: [2]ns{at("na"), at("nb")}}
	b.client, b.server = b.pod[0], b.pod[1]
	return b
}

// mtu of the wire; a pod's is smaller by the overhead of its bed.
const mtu = 1500

// Addresses of the sides, which are numbered 0 and 1.
var (
	wire4      = [2]string{"192.168.9.1", "192.168.9.2"}
	wire6      = [2]string{"fd10::a", "fd10::b"}
	wireMAC    = [2]string{"02:aa:00:00:00:0a", "02:aa:00:00:00:0b"}
	podMAC     = [2]string{"02:bb:00:00:00:0a", "02:bb:00:00:00:0b"}
	portMAC    = [2]string{"02:cc:00:00:00:0a", "02:cc:00:00:00:0b"}
	podNet4    = [2]string{"10.60.1", "10.60.2"}
	podNet6    = [2]string{"fd60:1:", "fd60:2:"}
	locators   = [2]string{"fc00:0:0:a::", "fc00:0:0:b::"}
	podOnLAN4  = [2]string{"10.60.9.1", "10.60.9.2"}
	podOnLAN6  = [2]string{"fd60:9::1", "fd60:9::2"}
	lanLength4 = 24
	lanLength6 = 64
)

// construct makes the namespaces and the wire, then what is special to the kind.
func (b *bed) construct(ctx context.Context) error {
	for _, n := range slices.Concat(b.pod[:], b.node[:]) {
		if err := addNetns(ctx, n); err != nil {
			return err
		}
	}
	if err := b.layWire(ctx); err != nil {
		return err
	}
	return b.build(ctx, b)
}

// layWire joins the nodes and lets them forward.
func (b *bed) layWire(ctx context.Context) error {
	err := b.node[0].ip(ctx, fmt.Sprintf("link add up0 type veth peer name up0 netns %s", b.node[1]))
	if err != nil {
		return err
	}
	for i, n := range b.node {
		err := n.ip(ctx,
			fmt.Sprintf("link set up0 address %s mtu %d up", wireMAC[i], mtu),
			fmt.Sprintf("addr add %s/24 dev up0", wire4[i]),
			fmt.Sprintf("addr add %s/64 dev up0 nodad", wire6[i]))
		if err != nil {
			return err
		}
		if err := n.sysctl(ctx, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"); err != nil {
			return err
		}
		if err := n.offloads(ctx, "up0", wires[b.wire]...); err != nil {
			return err
		}
	}
	return nil
}

// addPods makes each side's pod.
func (b *bed) addPods(ctx context.Context) error {
	for i := range b.node {
		if err := b.addPod(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// addPod makes a side's pod with its veth, pod0 being the node's end.
func (b *bed) addPod(ctx context.Context, side int) error {
	size := mtu - b.overhead
	err := b.node[side].ip(ctx,
		fmt.Sprintf("link add pod0 type veth peer name eth0 netns %s", b.pod[side]),
		fmt.Sprintf("link set pod0 address %s mtu %d up", portMAC[side], size))
	if err != nil {
		return err
	}
	return b.pod[side].ip(ctx, fmt.Sprintf("link set eth0 address %s mtu %d up", podMAC[side], size))
}

// routePods gives each pod a subnet of its own with the node as its gateway.
func (b *bed) routePods(ctx context.Context) error {
	for i := range b.node {
		if err := b.routePod(ctx, i, "pod0"); err != nil {
			return err
		}
	}
	b.serverAt(podAddr4(1), podAddr6(1))
	return nil
}

// routePod gives a side's pod a subnet of its own, with the node as its gateway at a device.
func (b *bed) routePod(ctx context.Context, side int, dev string) error {
	err := b.node[side].ip(ctx,
		fmt.Sprintf("addr add %s.1/24 dev %s", podNet4[side], dev),
		fmt.Sprintf("addr add %s:1/64 dev %s nodad", podNet6[side], dev))
	if err != nil {
		return err
	}
	return b.pod[side].ip(ctx,
		fmt.Sprintf("addr add %s/24 dev eth0", podAddr4(side)),
		fmt.Sprintf("addr add %s/64 dev eth0 nodad", podAddr6(side)),
		fmt.Sprintf("route add default via %s.1", podNet4[side]),
		fmt.Sprintf("route add ::/0 via %s:1", podNet6[side]))
}

// podAddr4 and podAddr6 are a routed pod's own.
func podAddr4(side int) string { return podNet4[side] + ".2" }
func podAddr6(side int) string { return podNet6[side] + ":2" }

// serverAt says where the server is.
func (b *bed) serverAt(v4, v6 string) {
	b.listen = map[int]netip.Addr{4: netip.MustParseAddr(v4), 6: netip.MustParseAddr(v6)}
	b.addr = b.listen
}

// publishAt says that the client asks another address than the server's.
func (b *bed) publishAt(v4, v6 string) {
	b.addr = map[int]netip.Addr{4: netip.MustParseAddr(v4), 6: netip.MustParseAddr(v6)}
}
