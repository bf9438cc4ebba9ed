// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// A crowd is so many containers that use one port of the server at once, each with so many connections.
const crowd, connections = 20, 200

// TestCrowd has many containers use one port of the server at once, while the host itself uses it too, from ports that containers are masqueraded
// with: everybody has a port of his own there, and gets his own answers.
func TestCrowd(t *testing.T) {
	takesLong(t)
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork + masqueraded})
	n := i.nodes[0]
	top, err := topology.Parse("topology.toml", []byte(i.topology))
	must(t, err)
	ports := top.Masquerade
	for v, server := range serverAddresses {
		t.Run(family(server), func(t *testing.T) {
			at := i.server.tellTCP(t, netip.AddrPortFrom(server, 0))
			seen := &census{ends: map[netip.AddrPort]string{}}
			host := netip.AddrPortFrom(outside(1)[v], 0)
			var own []net.Conn
			for k := range 50 { // spread over the range that containers are masqueraded with
				own = append(own, n.dialOwn(t, at, netip.AddrPortFrom(host.Addr(), uint16(10007+k*400))))
			}
			var all sync.WaitGroup
			for k := range crowd {
				c := n.run(t, fmt.Sprint(family(server), k), "app")
				settle(t, c)
				all.Go(func() { seen.enter(t, c, at, connections) })
			}
			all.Wait()
			for _, c := range own {
				if got := askWho(t, c); got.String() != c.LocalAddr().String() {
					t.Errorf("the host's own connection from %s is %s there", c.LocalAddr(), got)
				}
				seen.note(t, netip.MustParseAddrPort(c.LocalAddr().String()), "the host")
			}
			if want := crowd*connections + len(own); len(seen.ends) != want {
				t.Errorf("%d ends at once, want %d", len(seen.ends), want)
			}
			for end := range seen.ends {
				if end.Addr() != host.Addr() || end.Port() < ports.First || end.Port() > ports.Last {
					t.Fatalf("the server sees %s of %s", end, seen.ends[end])
				}
			}
		})
	}
}

// census is who has which end at the server.
type census struct {
	mu   sync.Mutex
	ends map[netip.AddrPort]string
}

func (s *census) note(t *testing.T, end netip.AddrPort, who string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if other, ok := s.ends[end]; ok {
		t.Errorf("%s is %s, and %s", end, other, who)
	}
	s.ends[end] = who
}

// enter opens connections from a container, which stay until the end of the test.
func (s *census) enter(t *testing.T, c *container, at netip.AddrPort, count int) {
	for k := range count {
		conn, err := c.dialTCP(t, at, nil)
		if err != nil {
			t.Errorf("connection %d of %s: %v", k, c.name, err)
			return
		}
		t.Cleanup(func() { conn.Close() })
		end, err := who(conn)
		if err != nil {
			t.Errorf("connection %d of %s: %v", k, c.name, err)
			return
		}
		s.note(t, end, c.name)
	}
}

// dialOwn connects from an end of one's own choice; the connection lasts as long as the test.
func (n *namespace) dialOwn(t *testing.T, to, from netip.AddrPort) net.Conn {
	t.Helper()
	d := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(from)}
	var c net.Conn
	must(t, n.do(func() (err error) {
		c, err = d.Dial("tcp", to.String())
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

// TestPortsOfTheHost gives containers few ports, of which the host's processes have every second one: theirs are never taken, and when none is left
// a flow is refused by name.
func TestPortsOfTheHost(t *testing.T) {
	takesLong(t)
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork + masqueraded, more: "[masquerade]\nports = \"20000-20255\"\n"})
	n := i.nodes[0]
	c := n.run(t, "c", "app")
	settle(t, c)
	server := serverAddresses[0]
	for port := uint16(20000); port < 20256; port += 2 {
		n.listenUDP(t, netip.AddrPortFrom(netip.IPv4Unspecified(), port))
		n.serveTCP(t, netip.AddrPortFrom(outside(1)[0], port), digest)
	}
	tcp, udp := i.server.tellTCP(t, netip.AddrPortFrom(server, 0)), i.server.tellUDP(t, netip.AddrPortFrom(server, 0))
	checkOdd := func(end netip.AddrPort) {
		t.Helper()
		if end.Port() < 20000 || end.Port() > 20255 || end.Port()%2 == 0 {
			t.Errorf("a container has the end %s", end)
		}
	}
	for range 60 {
		checkOdd(c.seenUDP(t, udp))
		checkOdd(c.seenTCP(t, tcp))
	}
	checkExhausted(t, c, server)
	checkOdd(c.seenUDP(t, i.server.tellUDP(t, netip.AddrPortFrom(server, 0)))) // to another end all are free
}

// checkExhausted opens more flows to one end than there are ports.
func checkExhausted(t *testing.T, c *container, server netip.Addr) {
	t.Helper()
	before := c.node.counter("ports_exhausted")
	out, mac := c.sender(t, "eth0"), c.mac(t, "eth0")
	for port := uint16(1000); port < 1400; port++ {
		src, dst := netip.AddrPortFrom(c.port.V4, port), netip.AddrPortFrom(server, 7)
		out.send(t, ethernet(plan.GatewayMAC, mac, typeIPv4, ipv4(src.Addr(), dst.Addr(), protoUDP, 64, udp(src, dst, []byte("one more")))))
	}
	until(t, "flows are refused for want of ports", func() bool { return c.node.counter("ports_exhausted") > before })
	until(t, "a socket is told", func() bool {
		_, err := ask(c.dialUDP(t, netip.AddrPortFrom(server, 7)), []byte("me too"), onePing)
		return errors.Is(err, prohibited(server))
	})
}

// TestPortsComeFree has one container open and close connections to one server, more than there are ports, not faster than closed ones make place.
func TestPortsComeFree(t *testing.T) {
	takesLong(t)
	t.Parallel()
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork + masqueraded, more: "[masquerade]\nports = \"20000-20299\"\n"})
	c := i.nodes[0].run(t, "c", "app")
	settle(t, c)
	at := i.server.listenTCP(t, serverAddresses[0], func(c *net.TCPConn) { io.WriteString(c, "bye"); c.Close() })
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for k := range 600 {
		<-tick.C
		conn, err := c.dialTCP(t, at, nil)
		if err != nil {
			t.Fatalf("connection %d: %v", k, err)
		}
		if _, err := io.ReadAll(conn); err != nil {
			t.Fatalf("connection %d: %v", k, err)
		}
		conn.Close()
	}
}
