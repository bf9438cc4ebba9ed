// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// hosted is a network that hosts reach, and may open flows to what covers a node's addresses, and one that they do not reach.
const hosted = `
[network.app]
type = "l3"
id = 100
subnets = ["10.40.0.0/16", "fd40::/48"]
host = true
[network.closed]
type = "l3"
id = 101
subnets = ["10.41.0.0/16", "fd41::/48"]
[network.hosts]
type = "external"
prefixes = ["192.0.2.0/24", "fd00:a::/64"]
[[peering]]
from = "app"
to = "hosts"
[[peering]]
from = "closed"
to = "hosts"
`

// household is two nodes, with a container of app on each, and one of closed on the first.
type household struct {
	*internet
	near, far, closed *container
}

func newHousehold(t *testing.T, o bedOptions) *household {
	t.Helper()
	o.nodes = 2
	if o.networks == "" {
		o.networks = hosted
	}
	i := newInternet(t, o)
	h := &household{i, i.nodes[0].run(t, "near", "app"), i.nodes[1].run(t, "far", "app"), nil}
	if strings.Contains(o.networks, "network.closed") {
		h.closed = i.nodes[0].run(t, "closed", "closed")
		settle(t, h.closed)
	}
	settle(t, h.near, h.far)
	return h
}

// checkUse has one side use the other by ping, datagrams and TCP, which sees it as want.
func checkUse(t *testing.T, from, to *namespace, at, want netip.Addr) {
	t.Helper()
	from.reaches(t, at)
	to.sees(t, from, at, want)
	from.transfer(t, to.listenTCP(t, at, digest), transferSize()/4)
	from.echoes(t, to.listenTCP(t, at, func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) }))
	echo := to.echoUDP(t, at, "echo")
	for _, size := range []int{0, 1473, 9000, 60000} {
		payload := pattern(uint64(size), size)
		if got := from.gets(t, echo, payload); !bytes.Equal(got, append([]byte("echo"), payload...)) {
			t.Errorf("%d bytes came back as %d others", size, len(got))
		}
	}
}

// check is what hosts and containers see of each other. ok is for what a firewall of the host may forbid: what containers open.
func (h *household) check(t *testing.T, opens bool) {
	n := h.nodes[0]
	for v, own := range outside(1) {
		t.Run(family(own), func(t *testing.T) {
			checkUse(t, n.namespace, h.near.namespace, h.near.addresses()[v], own)
			checkUse(t, n.namespace, h.far.namespace, h.far.addresses()[v], own)
			if opens {
				checkUse(t, h.near.namespace, n.namespace, own, h.near.addresses()[v])
			}
		})
	}
}

// TestHost is what a host and the containers of a network with host = true see of each other, and what is refused.
func TestHost(t *testing.T) {
	t.Parallel()
	h := newHousehold(t, bedOptions{})
	h.check(t, true)
	n := h.nodes[0]
	for v, own := range outside(1) {
		t.Run(title("closed", family(own)), func(t *testing.T) {
			checkHostClosed(t, h.closed, own, "host_closed")
			if _, err := n.dialTCP(t, h.closed.listenTCP(t, h.closed.addresses()[v], digest), soon); err == nil {
				t.Error("the host connects to a container of a network without host = true")
			}
		})
	}
}

// checkHostClosed holds that a container opens nothing to an address of its node, and is told at once.
func checkHostClosed(t *testing.T, c *container, own netip.Addr, reason string) {
	t.Helper()
	n := c.node
	before := n.counter(reason)
	u := c.dialUDP(t, n.tellUDP(t, netip.AddrPortFrom(own, 0)))
	if _, err := ask(u, []byte("hello"), patience); !errors.Is(err, prohibited(own)) {
		t.Errorf("a datagram to the host: %v, want %v", err, prohibited(own))
	}
	if _, err := c.dialTCP(t, n.listenTCP(t, own, digest), nil); !errors.Is(err, prohibited(own)) {
		t.Errorf("a connection to the host: %v, want %v", err, prohibited(own))
	}
	if err := c.ping(own, 56, onePing/10); err == nil {
		t.Error("the host answers a ping")
	}
	if got := n.counter(reason) - before; got < 3 {
		t.Errorf("%d packets were %s, want 3", got, reason)
	}
}

// TestHostWithoutPeering leaves the host closed to containers that it may reach itself.
func TestHostWithoutPeering(t *testing.T) {
	takesLong(t)
	t.Parallel()
	networks, _, _ := strings.Cut(hosted, "[[peering]]")
	h := newHousehold(t, bedOptions{networks: networks})
	h.check(t, false)
	for _, own := range outside(1) {
		checkHostClosed(t, h.near, own, "no_route")
	}
}

// TestReversePathFilter has all settings of rp_filter, and a host that forwards nothing, as that is what machines come with.
func TestReversePathFilter(t *testing.T) {
	takesLong(t)
	for _, filter := range []string{"0", "1", "2"} {
		t.Run("rp_filter "+filter, func(t *testing.T) {
			t.Parallel()
			h := newHousehold(t, bedOptions{networks: hosted + masqueradedHosts, prepare: func(b *bed) {
				for _, n := range b.nodes {
					n.sysctl(t, "ipv4/conf/all/rp_filter", filter)
					n.sysctl(t, "ipv4/conf/default/rp_filter", filter)
					n.sysctl(t, "ipv4/conf/"+uplink+"/rp_filter", filter)
					n.sysctl(t, "ipv4/ip_forward", "0")
					n.sysctl(t, "ipv6/conf/all/forwarding", "0")
				}
			}})
			h.check(t, true)
			h.checkShop(t)
		})
	}
}

// masqueradedHosts lets app out, and everybody in to it.
const masqueradedHosts = `
[network.world]
type = "external"
prefixes = ["0.0.0.0/0", "::/0"]
[[peering]]
from = "app"
to = "world"
masquerade = true
[[peering]]
from = "world"
to = "app"
[[peering]]
from = "hosts"
to = "app"
`

// checkShop holds that masquerade and published ports work, also from the host itself.
func (h *household) checkShop(t *testing.T) {
	t.Helper()
	n := h.nodes[0]
	web := n.run(t, "web", "app", publish("8080:80/tcp", "8080:80/udp"))
	settle(t, web)
	for _, a := range web.addresses() {
		web.tellTCP(t, netip.AddrPortFrom(a, 80))
		web.tellUDP(t, netip.AddrPortFrom(a, 80))
	}
	s := &shopFront{h.internet, web}
	for v, server := range serverAddresses {
		own := outside(1)[v]
		h.server.sees(t, web.namespace, server, own)
		s.sold(t, h.server, own, server)
		s.sold(t, n.namespace, own, own)
		s.sold(t, n.namespace, []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}[v], own)
	}
}

// firewalls are what distributions ship: all that comes to the host and was not asked for is dropped, but ICMP and SSH, and so is all
// that it would forward.
var firewalls = map[string]string{
	"nftables of Debian": `
table inet filter {
	chain input {
		type filter hook input priority filter; policy drop;
		ct state { established, related } accept
		ct state invalid drop
		iif lo accept
		ip6 nexthdr icmpv6 accept
		ip protocol icmp accept
		tcp dport 22 accept
	}
	chain forward { type filter hook forward priority filter; policy drop; }
	chain output { type filter hook output priority filter; policy accept; }
}`,
	"ufw": `
table ip filter {
	chain ufw-before-input {
		iifname "lo" accept
		ct state related,established accept
		ct state invalid drop
		icmp type { destination-unreachable, time-exceeded, parameter-problem, echo-request } accept
		udp sport 67 udp dport 68 accept
		fib daddr type local return
		fib daddr type { multicast, broadcast } return
		drop
	}
	chain INPUT { type filter hook input priority filter; policy drop; jump ufw-before-input; }
	chain FORWARD { type filter hook forward priority filter; policy drop; ct state related,established accept; }
	chain OUTPUT { type filter hook output priority filter; policy accept; ct state related,established accept; ct state new accept; }
}
table ip6 filter {
	chain ufw6-before-input {
		iifname "lo" accept
		rt type 0 drop
		ct state related,established accept
		icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem, echo-request, echo-reply, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } accept
		ct state invalid drop
	}
	chain INPUT { type filter hook input priority filter; policy drop; jump ufw6-before-input; }
	chain FORWARD { type filter hook forward priority filter; policy drop; }
}`,
	"firewalld": `
table inet firewalld {
	chain mangle_PREROUTING {
		type filter hook prerouting priority mangle + 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
		meta nfproto ipv6 fib saddr . mark . iif oif missing drop
	}
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		tcp dport 22 ct state new accept
		icmp type echo-request accept
		icmpv6 type echo-request accept
		ip6 nexthdr icmpv6 accept
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		reject with icmpx admin-prohibited
	}
}`,
}

// TestFirewall has the rules that distributions ship on the nodes: what the host opens to containers works, and so do masquerade and
// published ports, which are none of the host's stack. What containers open to the host is for the firewall to decide.
func TestFirewall(t *testing.T) {
	takesLong(t)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft to write a firewall's rules: scripts/setup test installs it")
	}
	for name, rules := range firewalls {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHousehold(t, bedOptions{networks: hosted + masqueradedHosts, prepare: func(b *bed) {
				for _, n := range b.nodes {
					n.nft(t, rules)
				}
			}})
			h.check(t, false)
			h.checkShop(t)
			n := h.nodes[0]
			for _, own := range outside(1) {
				h.near.reaches(t, own) // pings pass, in the rules of all three
				if c, err := h.near.dialTCP(t, n.listenTCP(t, own, digest), soon); err == nil {
					c.Close()
					t.Errorf("the firewall of the host lets TCP to %s pass", own)
				}
			}
		})
	}
}

// nft loads a ruleset into the namespace.
func (n *namespace) nft(t *testing.T, rules string) {
	t.Helper()
	must(t, n.do(func() error {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin, cmd.Stderr = strings.NewReader(rules), os.Stderr
		return cmd.Run()
	}))
}
