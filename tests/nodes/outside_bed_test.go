// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// appNetwork is a routed network, and everything outside.
const appNetwork = `
[network.app]
type = "l3"
id = 100
subnets = ["10.40.0.0/16", "fd40::/48"]
[network.internet]
type = "external"
prefixes = ["0.0.0.0/0", "::/0"]
`

// Peerings of app with everything outside.
const (
	masqueraded = `
[[peering]]
from = "app"
to = "internet"
masquerade = true
`
	routed = `
[[peering]]
from = "app"
to = "internet"
`
	entered = `
[[peering]]
from = "internet"
to = "app"
`
)

// internet is a bed whose nodes have a router on the switch, 192.0.2.254 and fd00:a::fe, by which everything goes that is not on-link: a
// server is behind it. Node N is 192.0.2.N and fd00:a::N there.
type internet struct {
	*bed
	router, server *namespace
}

var serverAddresses = []netip.Addr{netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8:51::2")}

// newInternet makes the bed and starts its agents.
func newInternet(t *testing.T, o bedOptions) *internet {
	t.Helper()
	needRoot(t)
	i := &internet{router: newNamespace(t, "router"), server: newNamespace(t, "server")}
	prepare := o.prepare
	o.prepare = func(b *bed) {
		i.bed = b
		i.connect(t)
		if prepare != nil {
			prepare(b)
		}
	}
	newBed(t, o)
	return i
}

func (i *internet) connect(t *testing.T) {
	t.Helper()
	i.router.sysctl(t, "ipv4/ip_forward", "1")
	i.router.sysctl(t, "ipv6/conf/all/forwarding", "1")
	i.router.tellAll(t)
	i.server.tellAll(t)
	i.plug(i.router, "eth0", "router")
	i.router.give(t, "eth0", "192.0.2.254/24", "fd00:a::fe/64")
	joinNamespaces(t, i.router, "lan0", i.server, "eth0")
	i.router.give(t, "lan0", "198.51.100.1/24", "2001:db8:51::1/64")
	i.server.give(t, "eth0", "198.51.100.2/24", "2001:db8:51::2/64")
	i.server.route(t, "0.0.0.0/0", "198.51.100.1", "eth0")
	i.server.route(t, "::/0", "2001:db8:51::1", "eth0")
	for at, n := range i.nodes {
		n.give(t, uplink, fmt.Sprintf("192.0.2.%d/24", at+1))
		n.route(t, "0.0.0.0/0", "192.0.2.254", uplink)
		n.route(t, "::/0", "fd00:a::fe", uplink)
	}
}

// tellAll has the namespace's kernel tell every sender of what went wrong, not only some of them.
func (n *namespace) tellAll(t *testing.T) {
	t.Helper()
	n.sysctl(t, "ipv4/icmp_ratelimit", "0")
	n.sysctl(t, "ipv6/icmp/ratelimit", "0")
}

// outside are the addresses of node N, IPv4 first.
func outside(node int) []netip.Addr {
	return []netip.Addr{netip.MustParseAddr(fmt.Sprint("192.0.2.", node)), netip.MustParseAddr(fmt.Sprint("fd00:a::", node))}
}

// tellUDP answers every datagram with whom it comes from.
func (n *namespace) tellUDP(t testing.TB, at netip.AddrPort) netip.AddrPort {
	t.Helper()
	c := n.listenUDP(t, at)
	go func() {
		b := make([]byte, 65536)
		for {
			_, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort([]byte(from.String()), from)
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// tellTCP answers every line on a connection with whom it comes from.
func (n *namespace) tellTCP(t testing.TB, at netip.AddrPort) netip.AddrPort {
	t.Helper()
	return n.serveTCP(t, at, func(c *net.TCPConn) {
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		for {
			if _, err := c.Read(make([]byte, 100)); err != nil {
				return
			}
			io.WriteString(c, c.RemoteAddr().String())
		}
	})
}

// seenUDP is whom a server that tells sees in a datagram.
func (n *namespace) seenUDP(t testing.TB, to netip.AddrPort) netip.AddrPort {
	t.Helper()
	return netip.MustParseAddrPort(string(n.gets(t, to, []byte("who am I?"))))
}

// seenTCP is whom a server that tells sees in a connection.
func (n *namespace) seenTCP(t testing.TB, to netip.AddrPort) netip.AddrPort {
	t.Helper()
	c, err := n.dialTCP(t, to, nil)
	must(t, err)
	defer c.Close()
	return askWho(t, c)
}

// askWho asks a server that tells.
func askWho(t testing.TB, c net.Conn) netip.AddrPort {
	t.Helper()
	got, err := who(c)
	must(t, err)
	return got
}

func who(c net.Conn) (netip.AddrPort, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return netip.AddrPort{}, err
	}
	if _, err := io.WriteString(c, "who am I?\n"); err != nil {
		return netip.AddrPort{}, err
	}
	b := make([]byte, 100)
	size, err := c.Read(b)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.ParseAddrPort(string(b[:size]))
}

// sees holds that a server sees an address as the sender of datagrams and connections.
func (n *namespace) sees(t *testing.T, from *namespace, server, want netip.Addr) {
	t.Helper()
	at := netip.AddrPortFrom(server, 0)
	if got := from.seenUDP(t, n.tellUDP(t, at)).Addr(); got != want {
		t.Errorf("a datagram of %s to %s comes from %s, want %s", from.name, server, got, want)
	}
	if got := from.seenTCP(t, n.tellTCP(t, at)).Addr(); got != want {
		t.Errorf("a connection of %s to %s comes from %s, want %s", from.name, server, got, want)
	}
}

// serveHTTP serves content of a size at the path that names it.
func (n *namespace) serveHTTP(t testing.TB, a netip.Addr, size int) string {
	t.Helper()
	var l net.Listener
	must(t, n.do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(a, 0).String())
		return err
	}))
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(pattern(3, size)) })}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return "http://" + l.Addr().String() + "/"
}

// downloads gets a page of a size by HTTP.
func (n *namespace) downloads(t testing.TB, url string, size int) {
	t.Helper()
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, _, to string) (net.Conn, error) {
		return n.dialTCP(t, netip.MustParseAddrPort(to), nil)
	}}}
	got, err := client.Get(url)
	must(t, err)
	defer got.Body.Close()
	content, err := io.ReadAll(got.Body)
	must(t, err)
	if !bytes.Equal(content, pattern(3, size)) {
		t.Errorf("%d bytes of %s are not the %d that were sent", len(content), url, size)
	}
}

// publish has ports of the node lead to the container: "8080:80/tcp", as in the label, for any address of the node or one.
func publish(all ...string) func(*wish) {
	return func(w *wish) {
		for _, s := range all {
			w.Publish = append(w.Publish, parsePublish(s))
		}
	}
}

func parsePublish(s string) (p plan.Publish) {
	s, protocol, _ := strings.Cut(s, "/")
	if address, ports, ok := strings.Cut(s, "@"); ok {
		p.Address, s = netip.MustParseAddr(address), ports
	}
	fmt.Sscanf(s, "%d:%d", &p.Port, &p.To)
	if p.Protocol = unix.IPPROTO_TCP; protocol == "udp" {
		p.Protocol = unix.IPPROTO_UDP
	}
	return p
}

// overlayAddresses are all that containers have.
var overlayAddresses = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd40::/10")}

// checkNoContainers holds that no packet out there has an address of the overlay.
func checkNoContainers(t *testing.T, wire *capture) {
	t.Helper()
	for _, f := range wire.all() {
		if len(f) < 34 {
			continue
		}
		p, ok := parseIP(f[14:])
		for _, overlay := range overlayAddresses {
			if ok && (overlay.Contains(p.src) || overlay.Contains(p.dst)) {
				t.Fatalf("a container's address in a packet outside: %x", f)
			}
		}
	}
}

// countFrom matches IP packets by their sender.
func sentBy(a netip.Addr) func([]byte) bool {
	return func(f []byte) bool {
		if len(f) < 34 {
			return false
		}
		p, ok := parseIP(f[14:])
		return ok && p.src == a
	}
}
