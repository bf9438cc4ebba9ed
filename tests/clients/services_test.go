// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// TestSegmentCarriesWhatNeedsOne runs protocols between containers of three nodes that no routed network carries.
func TestSegmentCarriesWhatNeedsOne(t *testing.T) {
	s := upSegment(t)
	s.in("DHCP", (*segment).leases)
	s.in("VRRP", (*segment).virtualRouter)
	s.in("multicast", (*segment).multicast)
}

// serveDHCP runs a DHCP server in a container, which gives each MAC the address that Lace gave it.
func (g *guest) serveDHCP(hosts ...string) *daemon {
	g.t.Helper()
	words := []string{"dnsmasq", "-k", "-C", "/dev/null", "-p", "0", "-u", "root", "-i", "eth0", "-z", "--no-ping", "--dhcp-authoritative", "--leasefile-ro",
		"--log-dhcp", "--log-facility=-", "-x", "/run/dnsmasq.pid", "--dhcp-range=10.50.0.0,static,255.255.255.0", "--dhcp-option=option:router,10.50.0.1"}
	for _, h := range hosts {
		words = append(words, "--dhcp-host="+h)
	}
	d := g.daemon(words...)
	d.says("sockets bound exclusively to interface eth0")
	return d
}

const asksDHCP = "udhcpc -f -q -n -t 3 -T 1 -i eth0 -s /bin/true 2>&1"

// leases lets containers ask one on another node for their addresses, and takes that from the network for a while.
func (s *segment) leases() {
	clients := []*guest{s.near, s.two, s.three}
	var hosts []string
	for _, c := range clients {
		hosts = append(hosts, c.mac()+","+c.v4.String())
	}
	server := s.one.serveDHCP(hosts...)
	leased := func() {
		s.t.Helper()
		for _, c := range clients {
			contains(s.t, c.in(asksDHCP), fmt.Sprintf("lease of %s obtained from %s", c.v4, s.one.v4))
		}
	}
	leased()
	s.applies(strings.Replace(s.text, "dhcp = true", "dhcp = false", 1))
	before := s.node("edge-3").traffic()["storage spoofed_address"]
	if said := s.three.tryIn("udhcpc -f -q -n -t 2 -T 1 -i eth0 -s /bin/true 2>&1"); said.status == 0 || !strings.Contains(said.out, "no lease, failing") {
		s.t.Errorf("with dhcp = false: status %d, %s", said.status, said.out)
	}
	if got := s.node("edge-3").traffic()["storage spoofed_address"] - before; got != 2 {
		s.t.Errorf("with dhcp = false, two questions for an address count %d times as refused", got)
	}
	s.applies(s.text)
	leased()
	server.stop()
}

// applies makes a text the topology of all nodes.
func (s *segment) applies(text string) {
	s.t.Helper()
	file := s.file("topology.toml", text)
	for _, host := range []string{"edge-1", "edge-2", "edge-3"} {
		s.node(host).must("lace", "apply", file)
	}
}

const virtual = "10.50.0.100"

// keepalived runs a VRRP router that would have the virtual address.
func (g *guest) keepalived(priority int) *daemon {
	g.t.Helper()
	file := g.file("keepalived.conf", fmt.Sprintf(`vrrp_instance storage {
	state BACKUP
	interface eth0
	virtual_router_id 51
	priority %d
	advert_int 0.2
	version 3
	virtual_ipaddress {
		%s/24
	}
}
`, priority, virtual))
	d := g.daemon("keepalived", "-n", "-P", "-l", "-D", "-f", file, "-p", "/run/keepalived.pid", "-r", "/run/vrrp.pid")
	d.says("Entering BACKUP STATE")
	return d
}

// virtualRouter lets containers of three nodes elect a VRRP master, and another one when it is killed. Who is master speaks
// for an address that Lace gave nobody, so it is not heard.
func (s *segment) virtualRouter() {
	routers := []*daemon{s.one.keepalived(150), s.two.keepalived(100), s.three.keepalived(50)}
	s.leads(routers, s.one)
	s.silent(s.one)
	s.node("edge-1").sh("kill -9 $(cat /run/keepalived.pid /run/vrrp.pid)")
	s.one.must(s.one.asMachine("ip", "addr", "del", virtual+"/24", "dev", "eth0")...)
	s.leads(routers[1:], s.two)
	if seen := strings.Count(routers[2].String(), "Entering MASTER STATE"); seen != 0 {
		s.t.Errorf("the third router became master %d times, want never:\n%s", seen, routers[2])
	}
	again := s.one.keepalived(150)
	s.leads([]*daemon{again, routers[1], routers[2]}, s.one)
	for _, r := range append(routers, again) {
		r.stop()
	}
}

// leads waits until one of the routers has the virtual address, and no other has.
func (s *segment) leads(routers []*daemon, leader *guest) {
	s.t.Helper()
	s.eventually(fmt.Sprintf("%v alone is master", leader), func() error {
		for _, r := range routers {
			if has := strings.Contains(r.in("ip -o addr show eth0"), virtual); has != (r.guest.id == leader.id) {
				return fmt.Errorf("%v is master: %v\n%s", r.guest, has, r)
			}
		}
		return nil
	})
}

// silent wants that a master's claim to the virtual address is refused, and that nobody answers for it.
func (s *segment) silent(master *guest) {
	s.t.Helper()
	s.eventually("the claim of the virtual address is counted", func() error {
		if s.node(master.host).traffic()["storage spoofed_address"] == 0 {
			return errors.New("it is not")
		}
		return nil
	})
	said := s.three.try(s.three.asMachine("arping", "-c", "1", "-w", "1", "-I", "eth0", virtual)...)
	contains(s.t, said.out, "Received 0 response(s)")
}

const messages = 50 // of each member of a group

// multicast is what cluster software does: each member sends to a group, and each is to hear all the others, each message once.
func (s *segment) multicast() {
	for _, group := range []string{"239.192.7.1", "ff15::7:1%eth0"} {
		conns := map[*guest]*net.UDPConn{}
		for _, g := range s.guests() {
			conns[g] = g.joins(netip.AddrPortFrom(netip.MustParseAddr(group), 5405))
		}
		var all sync.WaitGroup
		for _, g := range s.guests() {
			all.Go(func() { g.hears(conns[g], s.guests()) })
			all.Go(func() { g.tells(netip.AddrPortFrom(netip.MustParseAddr(group), 5405)) })
		}
		all.Wait()
	}
}

// inNetwork runs f in the guest's network. The thread ends with it.
func (g *guest) inNetwork(f func() error) {
	g.t.Helper()
	ns, err := netns.GetFromPath(fmt.Sprintf("%s/proc/%s/ns/net", g.root(), g.pid()))
	if err != nil {
		g.t.Fatal(err)
	}
	defer ns.Close()
	if err := within(ns, f); err != nil {
		g.t.Fatalf("in the network of %v: %v", g, err)
	}
}

// joins listens to a group.
func (g *guest) joins(group netip.AddrPort) (conn *net.UDPConn) {
	g.t.Helper()
	g.inNetwork(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err == nil {
			conn, err = net.ListenMulticastUDP("udp", eth0, net.UDPAddrFromAddrPort(group))
		}
		return err
	})
	g.t.Cleanup(func() { conn.Close() })
	return conn
}

// tells sends its messages, some milliseconds apart, as the rate of the network allows.
func (g *guest) tells(group netip.AddrPort) {
	var conn *net.UDPConn
	g.inNetwork(func() (err error) {
		conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(group))
		return err
	})
	defer conn.Close()
	for i := range messages {
		if _, err := fmt.Fprintf(conn, "%s %d", g.id, i); err != nil {
			g.t.Errorf("%v sends to %s: %v", g, group, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// hears reads until all messages of all others are there, and then for a moment more. Its own come back to it inside.
func (g *guest) hears(conn *net.UDPConn, all []*guest) {
	heard, others := map[string]int{}, 0
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	for buffer := make([]byte, 128); ; {
		n, err := conn.Read(buffer)
		if err != nil {
			break
		}
		message := string(buffer[:n])
		heard[message]++
		if !strings.HasPrefix(message, g.id) {
			others++
		}
		if others == (len(all)-1)*messages {
			_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		}
	}
	for _, other := range all {
		once := 0
		for i := range messages {
			if heard[fmt.Sprintf("%s %d", other.id, i)] == 1 {
				once++
			}
		}
		if once != messages {
			g.t.Errorf("%v hears %d of %d messages of %v once", g, once, messages, other)
		}
	}
}
