// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane"
)

// segments has an L2 network with a gateway on three nodes, one without gateway and replication, which has IPv6 alone, one without
// containers, and a routed one that may open flows to the first.
const segments = `version = 1
[underlay]
locator-block = "5f00:1ace::/32"
[node.edge-1]
underlay = "fd00:a::1"
locator = "5f00:1ace:1::/48"
uplinks = ["up0"]
[node.edge-2]
underlay = "fd00:a::2"
locator = "5f00:1ace:2::/48"
[node.edge-3]
underlay = "fd00:a::3"
locator = "5f00:1ace:3::/48"
[network.storage]
type = "l2"
id = 200
subnets = ["10.50.0.0/24", "fd50::/64"]
gateway = ["10.50.0.1", "fd50::1"]
[network.quiet]
type = "l2"
id = 300
subnets = ["fd60::/64"]
flood = false
[network.web]
type = "l3"
id = 100
subnets = ["10.40.0.0/16", "fd40::/48"]
[endpoint.nas-1]
network = "storage"
node = "edge-1"
mac = "52:54:00:00:00:01"
address = ["10.50.0.200"]
[endpoint.nas-2]
network = "storage"
node = "edge-2"
mac = "52:54:00:00:00:02"
address = ["10.50.0.201"]
[network.loud]
type = "l2"
id = 400
subnets = ["10.60.0.0/24"]
[[peering]]
from = "web"
to = "storage"
bidirectional = true
`

const lineStorage = 14

// segmented is edge-1 of segments: containers in each network, one in two, and the endpoint nas-1 behind vm0.
func segmented(t *testing.T) *edge {
	t.Helper()
	n := newEdge(t, segments).open()
	n.wired("db-1", dataplane.Interface{Network: "storage", IPs: addresses("10.50.0.18", "fd50::1:2"), Gateway: true})
	n.wired("db-2", dataplane.Interface{Network: "storage", IPs: addresses("10.50.0.19", "fd50::1:3"), Gateway: true})
	n.wired("six-1", dataplane.Interface{Network: "quiet", IPs: addresses("fd60::1:2")})
	n.wired("both", dataplane.Interface{Network: "web", IPs: addresses("10.40.1.10"), Gateway: true},
		dataplane.Interface{Network: "storage", IPs: addresses("10.50.0.20")})
	n.in(func() error { return makePair("vm0", "vm0far") })
	n.in(func() error {
		_, err := n.plane.AttachDevice(n.t.Context(), dataplane.DeviceRequest{Device: "vm0", Network: "storage", Name: "nas-1"})
		return err
	})
	return n
}

func addresses(all ...string) (out []netip.Addr) {
	for _, a := range all {
		out = append(out, address(a))
	}
	return out
}

// makePair makes a veth whose first end is as that of a virtual machine.
func makePair(name, peer string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer})
}

func TestExplainL2(t *testing.T) {
	n := segmented(t)
	sid := "SID 5f00:1ace:2:17:0:c800::"
	for _, tt := range []struct {
		name, args, stages, verdict string
		line                        uint32
		want                        []string // in the text
	}{
		{"to a port here", "--from db-1 --to 10.50.0.19:80/tcp", "entry bridge deliver", "passed local", lineStorage,
			[]string{"db-1 (default/db-1), network storage, 10.50.0.18", "container db-2 (default/db-2), interface lace", "MTU 1442"}},
		{"to a device here", "--from db-1 --to 10.50.0.200/icmp", "entry bridge deliver", "passed local", lineStorage,
			[]string{"container nas-1 (device/vm0), interface vm0"}},
		{"from a device", "--from vm0 --to 10.50.0.18:22/tcp", "entry bridge deliver", "passed local", lineStorage,
			[]string{"nas-1 (device/vm0), network storage, 10.50.0.200, interface vm0"}},
		{"to a derived address of another node", "--from db-1 --to 10.50.0.34:80/tcp", "entry bridge deliver", "passed encapsulated", lineStorage,
			[]string{"node edge-2, " + sid + ", outer source 5f00:1ace:1:5ce:0:c800::, path MTU 1442",
				"edge-2 looks for the port that it is for. On edge-2 run: lace explain --from 10.50.0.18 --to 10.50.0.34:80/tcp --network storage"}},
		{"to an endpoint of another node", "--from db-1 --to 10.50.0.201:53/udp", "entry bridge deliver", "passed encapsulated", lineStorage, []string{"node edge-2, " + sid}},
		{"IPv6 beside IPv4, to another node", "--from db-1 --to [fd50::2:5]:80/tcp", "entry bridge deliver", "passed encapsulated", lineStorage,
			[]string{"node edge-2, " + sid, "fd50::2:5 is taken to be at the MAC address of 10.50.0.37"}},
		{"IPv6 alone", "--from six-1 --to [fd60::2:7]:80/tcp", "entry bridge deliver", "passed encapsulated", 0, []string{"node edge-2, SID 5f00:1ace:2:17:1:2c00::"}},
		{"nobody's address", "--from db-1 --to 10.50.0.29:80/tcp", "entry bridge", "refused unknown_mac", 0, nil},
		{"a MAC address there", "--from db-1 --to 02:4c:0a:32:00:22", "entry bridge deliver", "passed encapsulated", 0,
			[]string{"to       02:4c:0a:32:00:22\n", "node edge-2, " + sid + ", outer source 5f00:1ace:1:5ce:0:c800::"}},
		{"a MAC address here", "--from db-1 --to 52:54:00:00:00:01", "entry bridge deliver", "passed local", 0, []string{"container nas-1 (device/vm0)"}},
		{"an unknown MAC address", "--from db-1 --to 52:54:00:00:00:99", "entry bridge", "refused unknown_mac", 0, nil},
		{"broadcast", "--from db-1 --to ff:ff:ff:ff:ff:ff", "entry flood", "passed replicated", 0,
			[]string{"copies to 3 ports (both (default/both), db-2 (default/db-2), nas-1 (device/vm0)) and 2 nodes (edge-2, edge-3)",
				"each of these nodes copies it to its own ports. There run: lace explain --from 10.50.0.18 --to ff:ff:ff:ff:ff:ff --network storage"}},
		{"multicast", "--from db-1 --to 239.1.2.3:5405/udp", "entry flood", "passed replicated", 0, []string{"and 2 nodes (edge-2, edge-3)"}},
		{"broadcast of the subnet", "--from db-1 --to 10.50.0.255:9/udp", "entry flood", "passed replicated", 0, nil},
		{"no replication", "--from six-1 --to ff:ff:ff:ff:ff:ff", "entry flood", "refused flood_off", 0, nil},
		{"ARP about a port here", "--from db-1 --to 10.50.0.19/arp", "entry neighbour", "passed neighbour_answered", 0, []string{"answer   10.50.0.19 is at 02:4c:0a:32:00:13\n"}},
		{"ARP about the gateway", "--from db-1 --to 10.50.0.1/arp", "entry neighbour", "passed gateway_answered", 0, []string{"answer   10.50.0.1 is at 06:00:6c:61:63:65\n"}},
		{"ARP about another node's", "--from db-1 --to 10.50.0.34/arp", "entry neighbour deliver", "passed encapsulated", 0, []string{"node edge-2, SID 5f00:1ace:2:18:0:c800::"}},
		{"ARP about nobody's", "--from db-1 --to 10.50.0.29/arp", "entry neighbour", "refused neighbour_unknown", 0, nil},
		{"neighbour discovery", "--from db-1 --to fd50::1:3/nd", "entry neighbour", "passed neighbour_answered", 0, []string{"answer   fd50::1:3 is at 02:4c:0a:32:00:13\n"}},
		{"to the gateway", "--from db-1 --to 10.50.0.1/icmp", "entry gateway", "passed gateway_answered", 0, nil},
		{"by the gateway", "--from db-1 --to 10.40.1.10:80/tcp", "entry route deliver", "passed local", 0, []string{`[[peering]] from = "web"`, "container both (default/both)"}},
		{"two interfaces, on the segment", "--from both --to 10.50.0.18:80/tcp", "entry bridge deliver", "passed local", lineStorage, []string{"both (default/both), network storage, 10.50.0.20"}},
		{"two interfaces, the default route", "--from both --to 10.40.2.7:80/tcp", "entry route deliver", "passed encapsulated", 0, []string{"both (default/both), network web, 10.40.1.10"}},
		{"two interfaces, a frame", "--from both --to 02:4c:0a:32:00:12", "entry bridge deliver", "passed local", 0, []string{"network storage, 10.50.0.20"}},
		{"from a routed network to the segment", "--from both --network web --to 10.50.0.18:80/tcp", "entry route deliver", "passed local", 0, []string{"container db-1"}},
		{"from another node", "--from 10.50.0.34 --to 10.50.0.18:80/tcp", "entry frame bridge deliver", "passed decapsulated", lineStorage,
			[]string{"10.50.0.34, network storage, on node edge-2", "container db-1", "edge-2 decides first"}},
		{"from an endpoint of another node", "--from 10.50.0.201 --to 52:54:00:00:00:01", "entry frame bridge deliver", "passed decapsulated", 0, []string{"container nas-1 (device/vm0)"}},
		{"from another node, for many", "--from 10.50.0.34 --to ff:ff:ff:ff:ff:ff", "entry frame flood", "passed replicated", 0,
			[]string{"copies to 4 ports (both (default/both), db-1 (default/db-1), db-2 (default/db-2), nas-1 (device/vm0)) and 0 nodes",
				"stage    frame, network storage, SID 5f00:1ace:1:18:0:c800::"}},
		{"ARP from another node", "--from 10.50.0.34 --to 10.50.0.18/arp", "entry frame neighbour", "passed neighbour_answered", 0, []string{"answer   10.50.0.18 is at 02:4c:0a:32:00:12\n"}},
		{"from a routed network of another node", "--from 10.40.2.7 --to 10.50.0.18:80/tcp", "entry route deliver", "passed decapsulated", 0, []string{"container db-1"}},
		{"IPv6 alone, from another node", "--from fd60::2:7 --to fd60::1:2/icmp", "entry frame bridge deliver", "passed decapsulated", 0, []string{"container six-1"}},
	} {
		text, err := n.explain(tt.args)
		must(t, err)
		if got := outline(text); got != tt.stages+": "+tt.verdict {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.stages+": "+tt.verdict)
		}
		if at := fmt.Sprintf("topology.toml:%d: ", tt.line); tt.line != 0 && !strings.Contains(text, at) {
			t.Errorf("%s: want line %d in\n%s", tt.name, tt.line, text)
		}
		for _, want := range tt.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s: want %q in\n%s", tt.name, want, text)
			}
		}
	}
}

var outlined = regexp.MustCompile(`(?m)^(stage|verdict) +(\w+)(?:, (\w+): .+)?`)

// outline is "entry bridge deliver: passed local", of a printed explanation.
func outline(text string) string {
	var stages []string
	verdict := ""
	for _, m := range outlined.FindAllStringSubmatch(text, -1) {
		if m[1] == "stage" {
			stages = append(stages, m[2])
		} else {
			verdict = m[2] + " " + m[3]
		}
	}
	return strings.Join(stages, " ") + ": " + verdict
}

func TestExplainL2SaysWhatMakesNoSense(t *testing.T) {
	n := segmented(t)
	for args, want := range map[string]string{
		"--from six-1 --to [fd50::1:2]:80/tcp":           "nothing leads from network quiet to fd50::1:2: it is outside of the network's subnets, and no gateway is declared",
		"--from db-1 --to fd50::9:0:5/icmp":              "the MAC address of fd50::9:0:5 is not known: it follows from the IPv4 address of whoever has it",
		"--from 10.50.0.1 --to 10.50.0.18/icmp":          "it is the gateway, in network storage",
		"--from 10.50.0.255 --to 10.50.0.18/icmp":        "it is the broadcast address of 10.50.0.0/24, in network storage",
		"--from 10.50.0.29 --to 10.50.0.18/icmp":         "in this node's block 10.50.0.16/28 of network storage, and no container has it",
		"--from db-1 --to 10.50.0.18/nd":                 "neighbour discovery asks for IPv6 addresses: write 10.50.0.18/arp",
		"--from db-1 --to fd50::1:3/arp":                 "ARP asks for IPv4 addresses: write fd50::1:3/nd",
		"--from 10.40.2.7 --to ff:ff:ff:ff:ff:ff":        "nothing but IP packets comes from node edge-2 in network web",
		"--from 10.50.0.34 --to 10.50.0.35/arp":          "does not come to this node",
		"--from db-1 --to 02:4c:0a:32:00":                "names no protocol",
		"--from six-1 --network storage --to fd50::9/nd": "container six-1 is in network quiet, not in storage",
	} {
		if _, err := n.explain(args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", args, err, want)
		}
	}
}

// TestExplainedCopiesAreNotSent: the kernel sends what a program clones, also in a trial run.
func TestExplainedCopiesAreNotSent(t *testing.T) {
	n := segmented(t)
	fd := n.listen("vm0far", experimental)
	for _, from := range []string{"db-1", "10.50.0.34"} {
		if x := n.explained("--from " + from + " --to ff:ff:ff:ff:ff:ff"); x.Reason != "replicated" {
			t.Errorf("from %s: %+v", from, x)
		}
	}
	// What is sent now comes behind a copy, had there been one.
	n.in(func() error {
		return sendFrame("vm0", append(append([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5}, "mark"...), make([]byte, 42)...))
	})
	b := make([]byte, 128)
	k, err := unix.Read(fd, b)
	must(t, err)
	if got := string(b[14:min(k, 18)]); got != "mark" {
		t.Errorf("a copy has come: % x", b[:k])
	}
}

// listen opens a socket for frames of an EtherType that come in at an interface of the node.
func (n *edge) listen(link string, etherType uint16) (fd int) {
	n.t.Helper()
	n.in(func() error {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		big := etherType<<8 | etherType>>8
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(big)); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(30 * time.Second))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: big, Ifindex: l.Attrs().Index})
	})
	n.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// sendFrame sends a frame out of an interface of this namespace.
func sendFrame(link string, frame []byte) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index}); err != nil {
		return fmt.Errorf("send a frame out of %s: %w", link, err)
	}
	return nil
}
