// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// machine plays the virtual machine of a node: a namespace with one interface, whose other end is a device of the node.
type machine struct {
	*node
	device string
}

// machine makes one that has a MAC and no address yet.
func (n *node) machine(device, mac string) *machine {
	n.t.Helper()
	n.sh(`ip netns add %[1]s && ip link add %[1]s type veth peer name eth0 netns %[1]s address %[2]s
		ip link set %[1]s up && ip -n %[1]s link set eth0 up && ip -n %[1]s link set lo up`, device, mac)
	return &machine{n, device}
}

// in runs a line of shell in the machine.
func (m *machine) in(format string, args ...any) string {
	m.t.Helper()
	return m.must("ip", "netns", "exec", m.device, "sh", "-c", fmt.Sprintf(format, args...))
}

// look is all that the node tells of the machine's device, but for what counts and ages.
func (m *machine) look() string {
	m.t.Helper()
	return m.sh(`ip -o link show %[1]s | sed 's/ state .*qlen/ qlen/'; cat /proc/sys/net/ipv6/conf/%[1]s/disable_ipv6`, m.device)
}

// TestMachine has devices of a node join the segment, as those of virtual machines do.
func TestMachine(t *testing.T) {
	s := upSegment(t)
	n := s.node("edge-1")
	nas := n.machine("tap0", nasMAC)
	before := nas.look()
	s.in("refusals", func(s *segment) { s.deviceRefusals() })
	out := n.must("lace", "attach", "--netdev", "tap0", "--network", "storage", "--name", "nas-1")
	for _, want := range []string{"interface  tap0, in network storage", "MAC        " + nasMAC, "address    " + nasAddress + "/24", "gateway    10.50.0.1", "MTU        1442"} {
		contains(t, out, want)
	}
	s.in("lease", func(s *segment) { s.leaseOf(nas.of(s)) })
	s.in("traffic", func(s *segment) { s.trafficOf(nas.of(s)) })
	s.in("shown", func(s *segment) { s.shown(nas.of(s)) })
	s.in("a restart of the agent", func(s *segment) {
		nas, n := nas.of(s), s.node("edge-1")
		stop := s.three.stream(netip.MustParseAddr(nasAddress))
		n.killAgent()
		nas.in("ping -q -c 1 -W 5 %s", s.two.v4)
		n.start()
		stop()
		nas.in("ping -q -c 1 -W 5 %s", s.two.v4)
		contains(s.t, n.must("lace", "status"), "\nnas-1 ")
	})
	s.in("one from the pool", (*segment).pooled)
	contains(t, n.must("lace", "detach", "--netdev", "tap0"), "tap0 is in no network of Lace")
	if after := nas.look(); after != before {
		t.Errorf("the device was\n%s\nand is\n%s", before, after)
	}
	said := s.two.try(s.two.asMachine("arping", "-c", "1", "-w", "1", "-I", "eth0", nasAddress)...)
	contains(t, said.out, "Received 0 response(s)")
	absent(t, n.must("lace", "fdb"), nasMAC+"  port")
}

func (m *machine) of(s *segment) *machine { return &machine{s.node(m.host), m.device} }

// deviceRefusals wants the reason where the command was typed.
func (s *segment) deviceRefusals() {
	n := s.node("edge-1")
	for words, want := range map[string]string{
		"--netdev tap0 --network web":                          "attach device tap0: network web is routed (l3): devices of the host can join L2 networks only",
		"--netdev tap9 --network storage":                      "there is no such interface in the host's network namespace",
		"--netdev eth0 --network storage":                      "it is an uplink of this node: name another one",
		"--netdev tap0 --network storag":                       `network "storag" is not in the topology`,
		"--netdev tap0 --network storage --ip 10.50.0.50":      "address 10.50.0.50 is outside",
		"--netdev tap0 --network storage --mac " + s.one.mac(): "MAC address " + s.one.mac() + " is taken by container ",
	} {
		n.refused(want, append([]string{"lace", "attach"}, strings.Fields(words)...)...)
	}
	n.must("lace", "detach", "--netdev", "tap0") // what is not attached may be detached
}

// leaseOf gives the machine its address by DHCP, from a server in a container of another node.
func (s *segment) leaseOf(m *machine) {
	server := s.two.serveDHCP(nasMAC + "," + nasAddress)
	script := m.file("udhcpc", `#!/bin/sh
[ "$1" != bound ] || { ip addr add $ip/$mask dev $interface; ip route add default via $router; }
`)
	contains(s.t, m.in("chmod +x %s && busybox udhcpc -f -q -n -t 3 -T 1 -i eth0 -s %[1]s 2>&1", script), "lease of "+nasAddress+" obtained from "+s.two.v4.String())
	contains(s.t, m.in("ip -o -4 addr show eth0"), nasAddress+"/24")
	server.stop()
}

// trafficOf has the machine speak with containers of its node and others, both ways, and with those of web, which may ask it.
// Its interface is larger than the way takes, so it has to be told.
func (s *segment) trafficOf(m *machine) {
	for _, g := range s.guests() {
		m.in("ping -q -c 1 -W 5 %s", g.v4)
		g.in("ping -q -c 1 -W 5 %s", nasAddress)
	}
	contains(s.t, m.in("cat /sys/class/net/eth0/mtu"), "1500")
	sum := s.three.in("head -c 4194304 /dev/urandom >/www/file && sha256sum </www/file && httpd -p 80 -h /www")
	if got := m.in("timeout 30 busybox wget -q -O - http://%s/file | tee /run/file | sha256sum", s.three.v4); got != sum {
		s.t.Errorf("the machine fetches %s, want %s", got, sum)
	}
	m.in("busybox httpd -p 80 -h /run")
	web := s.node("edge-2").ctr("web", "lace.network=web")
	for _, g := range []*guest{s.near, s.two, web} {
		if got := g.in("timeout 30 wget -q -O - http://%s/file | sha256sum", nasAddress); got != sum {
			s.t.Errorf("%v fetches %s from the machine, want %s", g, got, sum)
		}
	}
	arping := s.two.must(s.two.asMachine("arping", "-f", "-w", "5", "-I", "eth0", nasAddress)...)
	contains(s.t, strings.ToLower(arping), nasMAC)
	m.in("ip addr add 10.50.0.201/24 dev eth0")
	if out := m.in("ping -q -c 1 -W 1 -I 10.50.0.201 %s || :", s.two.v4); !strings.Contains(out, "100% packet loss") {
		s.t.Errorf("the machine speaks for another address: %s", out)
	}
	m.in("ip addr del 10.50.0.201/24 dev eth0")
	web.remove()
}

// shown looks at what the commands tell of the machine, on its node and on another.
func (s *segment) shown(m *machine) {
	type row struct{ Network, MAC, Kind, Name, Node, Interface string }
	for host, want := range map[string]row{
		"edge-1": {Network: "storage", MAC: nasMAC, Kind: "port", Name: "nas-1", Interface: m.device},
		"edge-3": {Network: "storage", MAC: nasMAC, Kind: "endpoint", Name: "nas-1", Node: "edge-1"},
	} {
		var rows []row
		out := s.node(host).must("lace", "fdb", "--json", "--network", "storage")
		if err := json.Unmarshal([]byte(out), &rows); err != nil || !slices.Contains(rows, want) {
			s.t.Errorf("lace fdb on %s: %v, want %+v in\n%s", host, err, want, out)
		}
	}
}

// pooled is a machine that the topology does not declare: it gets an address of the node's pool.
func (s *segment) pooled() {
	n := s.node("edge-3")
	m := n.machine("tap1", "52:54:00:00:00:aa")
	var joined struct {
		Addresses []netip.Prefix
		MAC       string
	}
	out := n.must("lace", "attach", "--json", "--netdev", "tap1", "--network", "storage", "--mac", "52:54:00:00:00:aa")
	if err := json.Unmarshal([]byte(out), &joined); err != nil || len(joined.Addresses) != 2 || joined.MAC != "52:54:00:00:00:aa" {
		s.t.Fatalf("%v: %s", err, out)
	}
	for _, p := range joined.Addresses {
		m.in("ip addr add %s dev eth0 nodad", p)
	}
	for _, p := range joined.Addresses {
		for _, g := range []*guest{s.one, s.three} {
			g.in("ping -q -c 1 -W 5 %s", p.Addr())
			m.in("ping -q -c 1 -W 5 %s", g.at(p.Addr().Is6()))
		}
	}
	n.must("lace", "detach", "--netdev", "tap1")
}
