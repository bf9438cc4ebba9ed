// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
)

// rawWay is a container of a node whose way to a part of internet is a tunnel without Ethernet headers, both with real packets.
type rawWay struct {
	*node
	socket  int // at the container's end
	tunnel  *os.File
	packets chan []byte // out of the tunnel
}

func newRawWay(t *testing.T) *rawWay {
	t.Helper()
	makeTunNode(t)
	b := newBed(t)
	b.needOutside(t)
	tun := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "lacetun"}, Mode: netlink.TUNTAP_MODE_TUN, NonPersist: true, Queues: 1,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE}
	err := b.in(func() error { return netlink.LinkAdd(tun) })
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("there is no /dev/net/tun: load the module tun (the VM has it)")
	}
	must(t, err)
	r := &rawWay{tunnel: tun.Fds[0], packets: make(chan []byte, 64)}
	t.Cleanup(func() { r.tunnel.Close() })
	link := raise(t, b, "lacetun")
	must(t, b.in(func() error {
		return errors.Join(throughTunnel("198.51.100.224/27", link), throughTunnel("2001:db8:100:224::/64", link))
	}))
	r.node = newNode(t, b, options{number: 1, outside: true})
	must(t, r.maps.SyncEgresses([]maps.Egress{{Index: uint32(link.Attrs().Index), Raw: true, V4: worlds[false].own, V6: worlds[true].own}}))
	attach(t, b, link, r.coll.Programs["outer_raw"])
	attach(t, b, raise(t, b, fmt.Sprintf("lacebpf%d", podA)), r.coll.Programs["pod_l3"])
	r.socket = containerSocket(t, b, podA)
	go r.read()
	return r
}

// containerSocket moves the other end of an interface into a namespace of its own, as packets are handed over to no other, and listens there.
func containerSocket(t *testing.T, b *bed, dev int) int {
	t.Helper()
	pod, name := newSpace(t), fmt.Sprintf("lacebpf%dp", dev)
	into := handle(t, pod)
	must(t, b.in(func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(l, int(into))
	}))
	return packetSocket(t, pod, raise(t, pod, name))
}

func throughTunnel(prefix string, link netlink.Link) error {
	return netlink.RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParsePrefix(prefix)), LinkIndex: link.Attrs().Index})
}

func (r *rawWay) read() {
	for {
		b := make([]byte, 65536)
		n, err := r.tunnel.Read(b)
		if err != nil {
			return // closed at the end of the test
		}
		r.packets <- b[:n]
	}
}

// sent waits for a packet from an address out of the tunnel.
func (r *rawWay) sent(to netip.Addr) []byte {
	r.t.Helper()
	for {
		select {
		case packet := <-r.packets:
			if destination(append(make([]byte, 14), packet...)) == to {
				return packet
			}
		case <-time.After(10 * time.Second):
			r.t.Fatalf("nothing for %s left by the tunnel; counted: %v", to, r.counters())
		}
	}
}

// TestRawOutside: by an interface without Ethernet header real packets leave masqueraded, and their answers come in there.
func TestRawOutside(t *testing.T) {
	r := newRawWay(t)
	s := &side{node: r.node, socket: r.socket}
	for name, to := range map[string]netip.Addr{"IPv4": ipOf("198.51.100.230"), "IPv6": ipOf("2001:db8:100:224::1")} {
		t.Run(name, func(t *testing.T) {
			r.node.t, s.node.t = t, t
			w := worlds[to.Is6()]
			for _, speech := range ordinary {
				from, server := at(w.a, 40000), at(to, 80)
				s.send(fromA(speech.ask(from, server)))
				packet := r.sent(to)
				seen := at(w.own, portIn(speech, append(make([]byte, 14), packet...)))
				if want := afterHop(speech.ask(seen, server)); !bytes.Equal(packet, want) {
					wantFrame(t, packet, want)
				}
				_, err := r.tunnel.Write(speech.reply(server, seen).bytes())
				must(t, err)
				s.receives(ethIP(macA, plan.GatewayMAC, afterHop(speech.reply(server, from))))
			}
		})
	}
}
