// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// The file as it is written. What each value may be is said by its type and its tag.
type (
	rawFile struct {
		Version    *int64                 `toml:"version,required" want:"version = 1"`
		Underlay   rawUnderlay            `toml:"underlay,required" want:"[underlay] with a locator-block"`
		Nodes      map[string]rawNode     `toml:"node,required" want:"a table [node.NAME] for each node"`
		Networks   map[string]rawNetwork  `toml:"network" want:"a table [network.NAME] for each network"`
		Endpoints  map[string]rawEndpoint `toml:"endpoint" want:"a table [endpoint.NAME] for each endpoint"`
		Peerings   []rawPeering           `toml:"peering" want:"a table [[peering]] for each peering"`
		Masquerade rawMasquerade          `toml:"masquerade" want:"[masquerade] with ports"`
		Conntrack  rawConntrack           `toml:"conntrack" want:"[conntrack] with max and times"`
	}
	rawUnderlay struct {
		LocatorBlock  locatorBlock  `toml:"locator-block,required" want:"an IPv6 prefix that all locators lie in, as 5f00:1ace::/32"`
		Encapsulation Encapsulation `toml:"encapsulation" want:"\"reduced\" or \"srh\""`
		L2GSO         L2GSO         `toml:"l2-gso" want:"\"shim\" or \"segment\""`
	}
	rawNode struct {
		Underlay underlayAddr      `toml:"underlay,required" want:"the node's IPv6 address in the underlay, as fd00:a::1"`
		Locator  Locator           `toml:"locator,required" want:"an IPv6 prefix in the locator block, as 5f00:1ace:1::/48"`
		Kind     NodeKind          `toml:"kind" want:"\"host\" or \"router\""`
		Uplinks  []string          `toml:"uplinks" want:"a list of interface names, as [\"eth0\"]"`
		Via      underlayAddr      `toml:"via" want:"the IPv6 address of the router to peers that are not on-link, as fd00:a::fe"`
		Labels   map[string]string `toml:"labels" want:"a table of strings, as { zone = \"a\" }"`
		Network  string            `toml:"network" want:"the name of the network that the router serves"`
		SID      rawSIDs           `toml:"sid" want:"{ v4 = \"…\", v6 = \"…\" }, or { l2 = \"…\" } where its network is an L2 one"`
	}
	rawSIDs struct {
		V4 sidAddr `toml:"v4" want:"an IPv6 address in the router's locator"`
		V6 sidAddr `toml:"v6" want:"an IPv6 address in the router's locator"`
		L2 sidAddr `toml:"l2" want:"an IPv6 address in the router's locator"`
	}
	rawNetwork struct {
		Type      NetworkType         `toml:"type,required" want:"type = \"l3\", type = \"l2\" or type = \"external\""`
		ID        *int64              `toml:"id" want:"a number from 1 to 16777199 that no other network has"`
		Subnets   []subnet            `toml:"subnets" want:"a list of prefixes, as [\"10.40.0.0/16\", \"fd40::/48\"]"`
		BlockSize rawBlockSize        `toml:"block-size" want:"{ v4 = 24, v6 = 64 }"`
		Blocks    map[string][]subnet `toml:"blocks" want:"a list of prefixes for each node, as { edge-1 = [\"10.40.7.0/24\"] }"`
		PoolSize  rawPoolSize         `toml:"pool-size" want:"{ v4 = 28, v6 = 112 }"`
		Pools     map[string][]subnet `toml:"pools" want:"a list of prefixes for each node, as { edge-1 = [\"10.50.0.16/28\"] }"`
		Gateway   []hostAddr          `toml:"gateway" want:"a list of addresses, as [\"10.50.0.1\", \"fd50::1\"]"`
		DHCP      bool                `toml:"dhcp" want:"true or false"`
		Flood     *bool               `toml:"flood" want:"true or false"`
		FloodRate *int64              `toml:"flood-rate" want:"a number of frames a second from 1 to 1000000"`
		Host      bool                `toml:"host" want:"true or false"`
		Prefixes  []outerPrefix       `toml:"prefixes" want:"a list of prefixes, as [\"0.0.0.0/0\", \"::/0\"]"`
		Labels    map[string]string   `toml:"labels" want:"a table of strings, as { tier = \"web\" }"`
	}
	rawEndpoint struct {
		Network string     `toml:"network,required" want:"the name of an L2 network"`
		Node    string     `toml:"node,required" want:"the name of the node that it is attached to"`
		MAC     *MAC       `toml:"mac" want:"an Ethernet address, as 52:54:00:00:00:01"`
		Address []hostAddr `toml:"address" want:"a list of addresses, as [\"10.50.0.200\"]"`
	}
	rawPeering struct {
		From          side    `toml:"from,required" want:"the name of a network, or labels, as { tier = \"web\" }"`
		To            side    `toml:"to,required" want:"the name of a network, or labels, as { tier = \"web\" }"`
		Bidirectional bool    `toml:"bidirectional" want:"true or false"`
		Masquerade    bool    `toml:"masquerade" want:"true or false"`
		Egress        *string `toml:"egress" want:"the name of the node that packets leave by, as \"edge-1\""`
	}
	rawMasquerade struct {
		Ports portRange `toml:"ports" want:"a range of ports, as \"4096-32767\""`
	}
	rawConntrack struct {
		Max            *int64 `toml:"max" want:"a number of flows from 1024 to 4194304"`
		TCPOpening     idle   `toml:"tcp-opening" want:"a time from 1s to 168h, as \"4m\""`
		TCPEstablished idle   `toml:"tcp-established" want:"a time from 1s to 168h, as \"2h4m\""`
		TCPClosing     idle   `toml:"tcp-closing" want:"a time from 1s to 168h, as \"4m\""`
		TCPClosed      idle   `toml:"tcp-closed" want:"a time from 1s to 168h, as \"4m\""`
		UDPNew         idle   `toml:"udp-new" want:"a time from 1s to 168h, as \"2m\""`
		UDP            idle   `toml:"udp" want:"a time from 1s to 168h, as \"5m\""`
		ICMP           idle   `toml:"icmp" want:"a time from 1s to 168h, as \"1m\""`
		Other          idle   `toml:"other" want:"a time from 1s to 168h, as \"10m\""`
	}
	rawBlockSize struct {
		V4 *int64 `toml:"v4" want:"a length from 16 to 30"`
		V6 *int64 `toml:"v6" want:"a length from 48 to 126"`
	}
	rawPoolSize struct {
		V4 *int64 `toml:"v4" want:"a length from 16 to 32"`
		V6 *int64 `toml:"v6" want:"a length from 48 to 128"`
	}
)

// Load reads a topology file. What is wrong with its text is of type Errors.
func Load(path string) (*Topology, error) {
	data, err := ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the topology: %w", err)
	}
	return Parse(path, data)
}

// Parse makes a Topology of the text of a file. The name only serves the errors, which are of
// type Errors and all that there are.
func Parse(name string, data []byte) (*Topology, error) {
	var raw rawFile
	lines, err := Decode(name, data, &raw)
	b := builder{file: name, lines: lines, topology: &Topology{}, byName: map[string]*Node{}, byNetwork: map[string]*Network{}}
	if err != nil && !errors.As(err, &b.errs) {
		return nil, err
	}
	if lines == nil {
		return nil, b.errs
	}
	b.build(&raw)
	if len(b.errs) > 0 {
		return nil, b.errs.Sorted()
	}
	b.topology.Hash = sha256.Sum256([]byte(b.topology.Canonical()))
	return b.topology, nil
}

// builder checks what the parts of a file say about each other. A part that did not parse is zero
// and already reported, so that every check passes over what is not there.
type builder struct {
	file      string
	lines     Lines
	errs      Errors
	topology  *Topology
	byName    map[string]*Node
	byNumber  []*Node // those whose number is known
	byNetwork map[string]*Network
	outer     []outer // prefixes of external networks, in the order of their lines once all are known
}

func (b *builder) fail(key, fix, format string, args ...any) {
	b.errs = append(b.errs, Error{File: b.file, Line: b.lines.Of(key), Key: key, Problem: fmt.Sprintf(format, args...), Fix: fix})
}

// at names another line of the file.
func (b *builder) at(key string) string { return fmt.Sprintf("line %d", b.lines.Of(key)) }

func (b *builder) build(raw *rawFile) {
	if raw.Version != nil && *raw.Version != 1 {
		b.fail("version", "write version = 1", "version %d is not known", *raw.Version)
	}
	b.topology.Underlay = Underlay{LocatorBlock: raw.Underlay.LocatorBlock.Prefix, Encapsulation: raw.Underlay.Encapsulation, L2GSO: raw.Underlay.L2GSO}
	b.limit("node", len(raw.Nodes), MaxNodes, "nodes")
	b.limit("network", len(raw.Networks), MaxNetworks, "networks")
	if raw.Nodes != nil && len(raw.Nodes) == 0 {
		b.fail("node", "add a table [node.NAME] for each node", "no node")
	}
	for _, name := range sortedKeys(raw.Nodes) {
		b.node(name, raw.Nodes[name], raw.Networks)
	}
	b.distinctNodes()
	slices.SortFunc(b.byNumber, func(x, y *Node) int { return cmp.Compare(x.Number, y.Number) })
	for _, name := range sortedKeys(raw.Networks) {
		b.network(name, raw.Networks[name])
	}
	b.distinctIDs()
	b.endpoints(raw.Endpoints)
	b.allBlocks()
	b.segments()
	b.allPrefixes()
	b.hostRoutes()
	b.peerings(raw.Peerings)
	b.topology.Masquerade = cmp.Or(raw.Masquerade.Ports.Masquerade, DefaultMasquerade())
	b.conntrack(&raw.Conntrack)
}

func (b *builder) limit(key string, n, most int, what string) {
	if n > most {
		b.fail(key, "leave some out, or split the topology", "%d %s; at most %d are possible", n, what, most)
	}
}

// --- nodes ---

func nodeKey(name string, key ...string) string { return tableKey("node", name, key) }

func (b *builder) node(name string, raw rawNode, networks map[string]rawNetwork) {
	n := &Node{
		Name: name, Kind: raw.Kind, Underlay: raw.Underlay.Addr, Locator: raw.Locator, Via: raw.Via.Addr,
		Uplinks: raw.Uplinks, Labels: raw.Labels, Network: raw.Network, Line: b.lines.Of(nodeKey(name)),
	}
	if !isHostName(name) {
		b.fail(nodeKey(name), fmt.Sprintf("a name has letters, digits, hyphens and dots, at most %d", MaxNodeName), "%s is no host name", shortQuote(name))
	}
	b.locator(n)
	b.underlay(n)
	b.labels(nodeKey(name, "labels"), n.Labels)
	if n.Kind == KindRouter {
		b.router(n, raw, networks)
	} else {
		b.host(n)
	}
	b.topology.Nodes = append(b.topology.Nodes, n)
	b.byName[name] = n
}

// locator checks the node's locator against the block and takes the number out of it.
func (b *builder) locator(n *Node) {
	block := b.topology.Underlay.LocatorBlock
	if !n.Locator.IsValid() || !block.IsValid() {
		return
	}
	if !within(n.Locator.Prefix, block) {
		b.fail(nodeKey(n.Name, "locator"), "choose a prefix in the block, or make the block wider",
			"%s is not in the locator block %s of %s", n.Locator, block, b.at("underlay.locator-block"))
		n.Locator = Locator{} // nothing more to say of it
		return
	}
	n.Number = offset(block, n.Locator.Addr(), n.Locator.Bits())
	b.byNumber = append(b.byNumber, n)
}

func (b *builder) underlay(n *Node) {
	b.outsideBlock(nodeKey(n.Name, "underlay"), n.Underlay)
	b.outsideBlock(nodeKey(n.Name, "via"), n.Via)
	if n.Via.IsValid() && n.Via == n.Underlay {
		b.fail(nodeKey(n.Name, "via"), "name the router, or leave it out", "%s is the node itself", n.Via)
	}
}

// outsideBlock refuses an underlay address that would be taken for a SID.
func (b *builder) outsideBlock(key string, a netip.Addr) {
	block := b.topology.Underlay.LocatorBlock
	if a.IsValid() && block.Contains(a) {
		b.fail(key, "choose an address outside the block: what is in it is a SID", "%s is in the locator block %s", a, block)
	}
}

func (b *builder) labels(key string, labels map[string]string) {
	b.limit(key, len(labels), maxLabels, "labels")
	for _, name := range sortedKeys(labels) {
		if name == "" || !isLabel(name) || !isLabel(labels[name]) {
			b.fail(joinKey(key, name), "write printable ASCII, at most 63 bytes each", "is no label")
		}
	}
}

func (b *builder) host(n *Node) {
	for _, key := range []string{"network", "sid"} {
		if b.lines.Has(nodeKey(n.Name, key)) {
			b.fail(nodeKey(n.Name, key), `leave it out, or write kind = "router"`, "only a router has one")
		}
	}
	key := nodeKey(n.Name, "uplinks")
	b.limit(key, len(n.Uplinks), maxUplinks, "uplinks")
	for i, u := range n.Uplinks {
		switch {
		case !isInterfaceName(u):
			b.fail(indexKey(key, i), "write 1 to 15 bytes without spaces and slashes, as eth0", "%s is no interface name", shortQuote(u))
		case slices.Contains(n.Uplinks[:i], u):
			b.fail(indexKey(key, i), "name each uplink once", "%s is named twice", u)
		}
	}
}

func (b *builder) router(n *Node, raw rawNode, networks map[string]rawNetwork) {
	for _, key := range []string{"uplinks", "via"} {
		if b.lines.Has(nodeKey(n.Name, key)) {
			b.fail(nodeKey(n.Name, key), "leave it out: Lace does not run on a router", "only a host has one")
		}
	}
	key := nodeKey(n.Name, "network")
	if _, ok := networks[n.Network]; !ok {
		b.fail(key, among(n.Network, sortedKeys(networks), "network"), "%s", unknown("network", n.Network))
	}
	n.SID4, n.SID6, n.SIDL2 = raw.SID.V4.Addr, raw.SID.V6.Addr, raw.SID.L2.Addr
	for _, sid := range n.sids() {
		if sid.IsValid() && n.Locator.IsValid() && !n.Locator.Contains(sid.Addr) {
			b.fail(nodeKey(n.Name, "sid", sid.key), "choose an address in it", "%s is not in the locator %s of %s", sid, n.Locator, n.Name)
		}
	}
	network := networks[n.Network]
	if network.Type == External {
		b.fail(key, "name an L3 or an L2 network", "%s is an external network, and what is out there comes by no router of the overlay", n.Network)
	}
	if network.Type == L3 && b.lines.Has(nodeKey(n.Name, "sid", "l2")) {
		b.fail(nodeKey(n.Name, "sid", "l2"), "leave it out", "its network %s is an L3 network, which has no frames", n.Network)
	}
	if id := network.ID; n.Locator.IsValid() && id != nil && validID(*id) {
		n.composeSIDs(network.Type, NetworkID(*id))
	}
}

// keyedSID is a SID of a router under its key in the file.
type keyedSID struct {
	key string
	netip.Addr
}

func (n *Node) sids() []keyedSID { return []keyedSID{{"v4", n.SID4}, {"v6", n.SID6}, {"l2", n.SIDL2}} }

// composeSIDs is what holds where the file says nothing. That a router of an L2 network takes packets too, the file has to say.
func (n *Node) composeSIDs(service NetworkType, id NetworkID) {
	if service == L2 {
		n.SIDL2 = cmp.Or(n.SIDL2, n.Locator.SID(EndDT2U, id).Addr)
		return
	}
	composed := n.Locator.SID(EndDT46, id).Addr
	n.SID4, n.SID6 = cmp.Or(n.SID4, composed), cmp.Or(n.SID6, composed)
}

func unknown(what, name string) string {
	if name == "" {
		return "no " + what + " is named"
	}
	return fmt.Sprintf("no %s has the name %s", what, shortQuote(name))
}

// among says which name may have been meant, of few names all.
func among(name string, names []string, what string) string {
	if near := Nearest(name, names); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	if len(names) == 0 {
		return fmt.Sprintf("the file has no %s", what)
	}
	const few = 10
	if len(names) > few {
		return fmt.Sprintf("there are %s and %d more", strings.Join(names[:few], ", "), len(names)-few)
	}
	return "there are " + strings.Join(names, ", ")
}

// distinctNodes refuses locators and underlay addresses that are there twice, and locators of
// different lengths. A number would then mean two things, so that no block is counted.
func (b *builder) distinctNodes() {
	before := len(b.errs)
	locators, underlays := map[netip.Prefix]*Node{}, map[netip.Addr]*Node{}
	var first *Node
	for _, n := range b.byLine() {
		if n.Locator.IsValid() {
			if first == nil {
				first = n
			}
			b.sameLength(n, first)
			b.distinct("locator", n, locators[n.Locator.Prefix])
			locators[n.Locator.Prefix] = n
		}
		if n.Underlay.IsValid() {
			b.distinct("underlay", n, underlays[n.Underlay])
			underlays[n.Underlay] = n
		}
	}
	if len(b.errs) > before {
		b.byNumber = nil
	}
}

func (b *builder) sameLength(n, first *Node) {
	if n.Locator.Bits() != first.Locator.Bits() {
		b.fail(nodeKey(n.Name, "locator"), fmt.Sprintf("write a /%d here too", first.Locator.Bits()),
			"is a /%d, that of %s (%s) a /%d", n.Locator.Bits(), first.Name, b.at(nodeKey(first.Name, "locator")), first.Locator.Bits())
	}
}

func (b *builder) distinct(key string, n, other *Node) {
	if other != nil {
		b.fail(nodeKey(n.Name, key), "choose another", "is that of %s (%s) too", other.Name, b.at(nodeKey(other.Name, key)))
	}
}

// byLine orders the nodes as the file does, so that of two that clash the later one is at fault.
func (b *builder) byLine() []*Node {
	return slices.SortedStableFunc(slices.Values(b.topology.Nodes), func(x, y *Node) int { return cmp.Compare(x.Line, y.Line) })
}
