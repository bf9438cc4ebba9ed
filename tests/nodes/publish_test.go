// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// otherNetworks are one that may open flows to app, one that may to the internet only, and one that may nothing.
const otherNetworks = `
[network.friend]
type = "l3"
id = 101
subnets = ["10.41.0.0/16", "fd41::/48"]
[network.surfer]
type = "l3"
id = 102
subnets = ["10.42.0.0/16", "fd42::/48"]
[network.hermit]
type = "l3"
id = 103
subnets = ["10.43.0.0/16", "fd43::/48"]
[[peering]]
from = "friend"
to = "app"
[[peering]]
from = "surfer"
to = "internet"
masquerade = true
`

// shopFront is two nodes, with a container on the first whose ports are published.
type shopFront struct {
	*internet
	web *container
}

// The published ports: at the first two, TCP and UDP, the container tells who asks, and at the others it takes transfers, sends TCP
// streams back, and datagrams.
const (
	publishedPort = 8080
	transferPort  = 8081
	echoPort      = 8082
)

var publishedPorts = []string{"8080:80/tcp", "8080:80/udp", "8081:81/tcp", "8082:82/tcp", "8082:82/udp"}

func newShopFront(t *testing.T, tables string, ports ...string) *shopFront {
	t.Helper()
	i := newInternet(t, bedOptions{nodes: 2, networks: appNetwork + otherNetworks + tables})
	s := &shopFront{i, i.nodes[0].run(t, "web", "app", publish(append(ports, publishedPorts...)...))}
	settle(t, s.web)
	s.serve(t)
	return s
}

// serve has the container listen at all that is published.
func (s *shopFront) serve(t *testing.T) {
	t.Helper()
	for _, a := range s.web.addresses() {
		s.web.tellTCP(t, netip.AddrPortFrom(a, 80))
		s.web.tellUDP(t, netip.AddrPortFrom(a, 80))
		s.web.serveTCP(t, netip.AddrPortFrom(a, 81), digest)
		s.web.serveTCP(t, netip.AddrPortFrom(a, 82), func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) })
		s.web.echoUDPAt(t, netip.AddrPortFrom(a, 82), "echo")
	}
}

// sold holds that who asks an address for the published ports gets to the container, which sees that as the sender.
func (s *shopFront) sold(t *testing.T, to *namespace, at, want netip.Addr) {
	t.Helper()
	server := netip.AddrPortFrom(at, publishedPort)
	if got := to.seenUDP(t, server).Addr(); got != want {
		t.Errorf("a datagram of %s to %s comes from %s, want %s", to.name, server, got, want)
	}
	if got := to.seenTCP(t, server).Addr(); got != want {
		t.Errorf("a connection of %s to %s comes from %s, want %s", to.name, server, got, want)
	}
}

// sells is sold, with data of all sizes.
func (s *shopFront) sells(t *testing.T, to *namespace, at, want netip.Addr) {
	t.Helper()
	s.sold(t, to, at, want)
	to.transfer(t, netip.AddrPortFrom(at, transferPort), transferSize())
	to.echoes(t, netip.AddrPortFrom(at, echoPort))
	for _, size := range []int{0, 1400, 1472, 9000, 60000} {
		payload := pattern(uint64(size), size)
		if got := to.gets(t, netip.AddrPortFrom(at, echoPort), payload); !bytes.Equal(got, append([]byte("echo"), payload...)) {
			t.Errorf("%d bytes of %s to %s came back as %d others", size, to.name, at, len(got))
		}
	}
}

// shut holds that nothing comes from who asks an address for the published ports to the container.
func (s *shopFront) shut(t *testing.T, to *namespace, at netip.Addr) {
	t.Helper()
	seen := s.web.capture(t, "eth0")
	server := netip.AddrPortFrom(at, publishedPort)
	marker := []byte("nothing for " + to.name + " at " + at.String())
	u := to.dialUDP(t, server)
	if _, err := ask(u, marker, onePing); err == nil {
		t.Errorf("%s gets an answer from %s", to.name, server)
	}
	if c, err := to.dialTCP(t, server, soon); err == nil {
		c.Close()
		t.Errorf("%s connects to %s", to.name, server)
	}
	if n := seen.count(containing(marker)) + seen.count(isBareSYN); n > 0 {
		t.Errorf("%d packets came to the container", n)
	}
}

// soon has a socket give up to connect after a second.
func soon(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 300) }

// TestPublish asks for published ports from everywhere.
func TestPublish(t *testing.T) {
	s := newShopFront(t, masqueraded+entered+"\n[[peering]]\nfrom = \"internet\"\nto = \"friend\"\n")
	n, other := s.nodes[0], s.nodes[1]
	friend, far := n.run(t, "friend", "friend"), other.run(t, "far", "friend")
	surfer, surfing := n.run(t, "surfer", "surfer"), other.run(t, "surfing", "surfer")
	hermit, same, sameFar := n.run(t, "hermit", "hermit"), n.run(t, "same", "app"), other.run(t, "sameFar", "app")
	settle(t, friend, far, surfer, surfing, hermit, same, sameFar)
	for v, a := range outside(1) {
		t.Run(title("outside", family(a)), func(t *testing.T) { s.sells(t, s.server, a, serverAddresses[v]) })
		t.Run(title("other node", family(a)), func(t *testing.T) { s.sells(t, other.namespace, a, outside(2)[v]) })
		t.Run(title("peered", family(a)), func(t *testing.T) { s.sells(t, friend.namespace, a, friend.addresses()[v]) })
		t.Run(title("same network", family(a)), func(t *testing.T) { s.sells(t, same.namespace, a, same.addresses()[v]) })
		t.Run(title("itself", family(a)), func(t *testing.T) { s.sells(t, s.web.namespace, a, a) })
		t.Run(title("by masquerade", family(a)), func(t *testing.T) { s.sells(t, surfer.namespace, a, a) })
		t.Run(title("masqueraded by its node", family(a)), func(t *testing.T) { s.sells(t, surfing.namespace, a, outside(2)[v]) })
		t.Run(title("same network elsewhere", family(a)), func(t *testing.T) { s.sells(t, sameFar.namespace, a, outside(2)[v]) })
		t.Run(title("nobody", family(a)), func(t *testing.T) { s.shut(t, hermit.namespace, a) })
		t.Run(title("host", family(a)), func(t *testing.T) { s.sells(t, n.namespace, a, a) })
		t.Run(title("localhost", family(a)), func(t *testing.T) {
			s.sells(t, n.namespace, []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}[v], a)
		})
	}
}

// TestPublishedPortsStay stops, kills and replaces the agent while ports are in use, and takes the container away at last.
func TestPublishedPortsStay(t *testing.T) {
	takesLong(t)
	s := newShopFront(t, entered)
	n := s.nodes[0]
	pins := n.pins()
	a := outside(1)
	streams := []*stream{startStreamTo(t, s.server, netip.AddrPortFrom(a[0], echoPort)), startStreamTo(t, n.namespace, netip.AddrPortFrom(a[1], echoPort)),
		startStreamTo(t, s.nodes[1].namespace, netip.AddrPortFrom(a[1], echoPort))}
	known := s.server.dialUDP(t, netip.AddrPortFrom(a[0], publishedPort))
	first, err := ask(known, []byte("hello"), patience)
	must(t, err)
	for range 2 {
		n.stop()
		s.sold(t, s.server, a[0], serverAddresses[0]) // without any agent
		s.sold(t, n.namespace, netip.IPv6Loopback(), a[1])
		n.start()
		n.agent.kill()
		n.start()
		s.sold(t, s.server, a[1], serverAddresses[1])
		s.sold(t, n.namespace, a[0], a[0])
	}
	for _, stream := range streams {
		stream.check(t)
	}
	if again, err := ask(known, []byte("hello"), patience); err != nil || !bytes.Equal(again, first) {
		t.Errorf("after agents came and went: %q, %v; before: %q", again, err, first)
	}
	if got := n.pins(); !slices.Equal(got, pins) {
		t.Errorf("before:\n%q\nafter:\n%q", pins, got)
	}
	s.web.order(t, "release")
	s.web.remove()
	if _, err := n.dialTCP(t, netip.AddrPortFrom(a[0], publishedPort), nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the port is nobody's: %v", err)
	}
	if c, err := s.server.dialTCP(t, n.listenTCP(t, a[0], digest), nil); err != nil { // the host's own ports work as before
		t.Error(err)
	} else {
		c.Close()
	}
}

// TestPublishedPortsAreTaken has two containers, and a process of the host, want the same port.
func TestPublishedPortsAreTaken(t *testing.T) {
	takesLong(t)
	t.Parallel()
	s := newShopFront(t, entered, "192.0.2.1@9000:90/tcp")
	n := s.nodes[0]
	refused(t, n, n.newContainer(t, "twin"), "app", "publish port 0.0.0.0:8080/tcp: container default/n1-web has it on this node", publish("8080:80/tcp"))
	refused(t, n, n.newContainer(t, "twin"), "app", "has it on this node", publish("192.0.2.1@8080:80/tcp"))
	refused(t, n, n.newContainer(t, "twin"), "app", "has it on this node", publish("9000:90/tcp"))
	n.run(t, "udp", "app", publish("9000:90/udp", "fd00:a::1@9000:90/tcp")).order(t, "release")
	port := n.listenTCP(t, netip.IPv4Unspecified(), digest).Port()
	refused(t, n, n.newContainer(t, "late"), "app", "a process of this host has it", publish(fmt.Sprintf("%d:80/tcp", port)))
	for _, at := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.1"), netip.IPv6Unspecified()} {
		port := n.listenUDP(t, netip.AddrPortFrom(at, 0)).LocalAddr().(*net.UDPAddr).Port
		refused(t, n, n.newContainer(t, "late"), "app", "a process of this host has it", publish(fmt.Sprintf("%d:80/udp", port)))
	}
	for _, a := range outside(1) { // what was refused has taken nothing away
		s.sold(t, s.server, a, s.serverLike(a))
	}
}

// serverLike is the server's address of the same family.
func (i *internet) serverLike(a netip.Addr) netip.Addr {
	if a.Is4() {
		return serverAddresses[0]
	}
	return serverAddresses[1]
}

// TestPublishedPortsAreClosed has no peering that lets anybody in, and says so where the container is attached.
func TestPublishedPortsAreClosed(t *testing.T) {
	takesLong(t)
	t.Parallel()
	s := newShopFront(t, masqueraded)
	n := s.nodes[0]
	for _, a := range outside(1) {
		s.shut(t, s.server, a)
		s.shut(t, s.nodes[1].namespace, a)
		s.shut(t, n.namespace, a)
	}
	if n.counter("no_peering") == 0 {
		t.Error("nothing was counted as no_peering")
	}
	if !strings.Contains(n.log.String(), "nobody outside of the overlay may come in") {
		t.Error("the agent does not say that the ports are closed")
	}
	open := s.topology + entered
	for _, n := range s.nodes {
		n.apply(open)
	}
	s.sold(t, s.server, outside(1)[0], serverAddresses[0])
	n.apply(s.topology)
	s.shut(t, s.server, outside(1)[0])
}

// TestPublishedAtOneAddress leaves the node's other addresses to the host.
func TestPublishedAtOneAddress(t *testing.T) {
	takesLong(t)
	t.Parallel()
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork + entered, prepare: func(b *bed) {
		b.nodes[0].give(t, uplink, "192.0.2.101/24")
	}})
	n := i.nodes[0]
	c := n.run(t, "c", "app", publish("192.0.2.101@7000:70/tcp"))
	settle(t, c)
	c.tellTCP(t, netip.AddrPortFrom(c.port.V4, 70))
	second := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.101"), 7000)
	if got := i.server.seenTCP(t, second).Addr(); got != serverAddresses[0] {
		t.Errorf("a connection comes from %s", got)
	}
	n.serveTCP(t, netip.MustParseAddrPort("192.0.2.1:7000"), func(c *net.TCPConn) { io.WriteString(c, "203.0.113.9:1"); c.Close() })
	if got := i.server.seenTCP(t, netip.MustParseAddrPort("192.0.2.1:7000")); got.Addr() != netip.MustParseAddr("203.0.113.9") {
		t.Errorf("the host's own port answers %s", got)
	}
	if got := n.seenTCP(t, second).Addr(); got != outside(1)[0] { // the source that the kernel prefers
		t.Errorf("the host's connection comes from %s", got)
	}
}
