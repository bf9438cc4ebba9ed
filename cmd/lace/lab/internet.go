// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/lace-net/lace/topology"
)

// Where the topology has external networks, the lab has something to stand for them: a server behind a router, which is the
// fabric's namespace, with two addresses of each family. All are from ranges for documentation (RFC 5737, RFC 3849).
const (
	internetName  = "internet" // of its namespaces, as if it was a node
	serverProgram = "server"
	serverSocket  = "/run/server.sock"

	routerV4        = "192.0.2.254"    // on the link of the nodes, which have 192.0.2.1 and so on
	internetPort    = "inet"           // of the router
	routerInetV4    = "198.51.100.254" // there
	routerInetV6    = "2001:db8:100::fe"
	internetV4      = "198.51.100.1"
	internetV6      = "2001:db8:100::1"
	furtherV4       = "203.0.113.1" // one server may be in another external network than the other
	furtherV6       = "2001:db8:200::1"
	maxNodesOutside = 253 // nodes that 192.0.2.0/24 has addresses for beside the router
)

const serverAddresses = internetV4 + ", " + furtherV4 + ", [" + internetV6 + "] and [" + furtherV6 + "]"

// ServeCommand is the word behind `lace lab` by which the binary is the server on the internet.
const ServeCommand = "__serve"

// internetRanges are those that the lab gives to the nodes and to the internet, which no network may take from them.
var internetRanges = []netip.Prefix{
	netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("2001:db8:100::/64"), netip.MustParsePrefix("2001:db8:200::/64"),
}

// routerIPv4 makes a router of the fabric. A node may send what another one owns, so that the way back is another.
var routerIPv4 = map[string]string{
	"net/ipv4/ip_forward":             "1",
	"net/ipv4/conf/all/rp_filter":     "0",
	"net/ipv4/conf/default/rp_filter": "0",
}

func hasOutside(t *topology.Topology) bool {
	return slices.ContainsFunc(t.Networks, func(n *topology.Network) bool { return n.Type == topology.External })
}

// checkInternet refuses topologies whose outside the lab cannot play.
func checkInternet(t *topology.Topology) error {
	if !hasOutside(t) {
		return nil
	}
	if n := len(hosts(t)); n > maxNodesOutside {
		return fmt.Errorf("the topology has external networks and %d nodes; the lab has addresses on the internet for %d", n, maxNodesOutside)
	}
	if _, taken := t.Node(internetName); taken {
		return fmt.Errorf("node %q: the lab needs that name for what stands for the external networks; give the node another one", internetName)
	}
	for _, n := range t.Networks {
		for _, subnet := range n.Subnets {
			if at := slices.IndexFunc(internetRanges, subnet.Overlaps); at >= 0 {
				return fmt.Errorf("network %q has subnet %s, but the lab's nodes and its internet have %s; take other subnets",
					n.Name, subnet, internetRanges[at])
			}
		}
	}
	return nil
}

// withInternet adds to the nodes what stands for the external networks, in namespaces as a node has them.
func withInternet(t *topology.Topology, nodes []*topology.Node) []*topology.Node {
	if !hasOutside(t) {
		return nodes
	}
	return append(nodes, &topology.Node{Name: internetName, Underlay: netip.MustParseAddr(internetV6)})
}

func (o *Options) isInternet(n *topology.Node) bool {
	return n.Name == internetName && hasOutside(o.Topology)
}

// outsideV4 is the IPv4 address of the i-th node, where there is an outside to talk with.
func outsideV4(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}) }

// joinInternet makes the fabric the router between the nodes and the server.
func joinInternet(lab string, nodes []*topology.Node, routed bool, mtu int) *batch {
	b := &batch{netns: fabricName(lab)}
	b.internetPort(lab, mtu)
	if !routed {
		b.routerOnLink(nodes[0].Underlay)
		return b
	}
	port := 0
	for i, n := range nodes {
		b.addf("address add %s/32 dev p%d", routerV4, port)
		b.addf("route add %s/32 dev p%[2]d", outsideV4(i), port)
		port += len(uplinks(n))
	}
	return b
}

// internetPort is the router's end of the link to the server.
func (b *batch) internetPort(lab string, mtu int) {
	b.addf("link add name %s mtu %d type veth peer name eth0 mtu %d netns %s", internetPort, mtu, mtu, netnsName(lab, internetName))
	b.addf("link set %s addrgenmode none", internetPort)
	b.addf("link set %s up", internetPort)
	b.addf("address add %s/64 dev %s nodad", routerLinkLocal, internetPort)
	b.addf("address add %s/24 dev %s", routerInetV4, internetPort)
	b.addf("address add %s/64 dev %s nodad", routerInetV6, internetPort)
	b.addf("route add %s/32 via %s", furtherV4, internetV4)
	b.addf("route add %s/128 via %s", furtherV6, internetV6)
}

// routerOnLink makes the router one more neighbour of the nodes' link.
func (b *batch) routerOnLink(underlay netip.Addr) {
	b.addf("address add %s/64 dev sw0 nodad", routerLinkLocal)
	b.addf("address add %s/24 dev sw0", routerV4)
	b.addf("route add %s dev sw0", onLinkPrefix(underlay))
}

// outsideOfNode gives a node an IPv4 address and default routes; routed, it has that of IPv6 already.
func outsideOfNode(lab string, n *topology.Node, v4 netip.Addr, routed bool) *batch {
	b, dev := &batch{netns: netnsName(lab, n.Name)}, uplinks(n)[0]
	if routed {
		b.addf("address add %s/32 dev %s", v4, dev)
		b.addf("route add default via %s dev %s onlink", routerV4, dev)
		return b
	}
	b.addf("address add %s/24 dev %s", v4, dev)
	b.addf("route add default via %s dev %s", routerV4, dev)
	b.addf("route add default via %s dev %s", routerLinkLocal, dev)
	return b
}

// internetBatch configures the server's end.
func internetBatch(lab string) *batch {
	b := &batch{netns: netnsName(lab, internetName)}
	b.addf("link set lo up")
	b.addf("link set eth0 up")
	b.addf("address add %s/24 dev eth0", internetV4)
	b.addf("address add %s/64 dev eth0 nodad", internetV6)
	b.addf("address add %s/32 dev lo", furtherV4)
	b.addf("address add %s/128 dev lo nodad", furtherV6)
	b.addf("route add default via %s dev eth0", routerInetV4)
	b.addf("route add default via %s dev eth0", routerInetV6)
	return b
}

// server is what runs on the internet.
func (o *Options) server() Program {
	return Program{Name: serverProgram, Args: []string{o.Self, "lab", ServeCommand}, Env: o.environ(), Socket: serverSocket}
}

// Serve answers HTTP requests at port 80 with the address and port that they came from. It returns only if something is wrong.
func Serve() error {
	if os.Getppid() != 1 {
		return errors.New("this is an internal command of `lace lab up`")
	}
	web, err := net.Listen("tcp", ":80")
	if err != nil {
		return fmt.Errorf("serve HTTP: %w", err)
	}
	ready, err := net.Listen("unix", serverSocket)
	if err != nil {
		return fmt.Errorf("say that the server is ready: %w", err)
	}
	defer ready.Close()
	const patience = 10 * time.Second
	s := http.Server{Handler: http.HandlerFunc(tellClient), ReadTimeout: patience, WriteTimeout: patience}
	return s.Serve(web)
}

// tellClient writes one line.
func tellClient(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, r.RemoteAddr) }
