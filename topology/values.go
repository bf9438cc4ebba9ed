// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
)

// Bounds of a topology.
const (
	MaxNodes       = 4096
	MaxNetworks    = 1024
	MaxBlocks      = 1 << 20 // of all networks together, counted by network, node and family
	MaxNodeName    = 63      // bytes, as a label of a host name
	MaxNetworkName = 32      // bytes
	MaxPeerings    = 65536   // pairs of networks that peerings join
	MinLocatorBits = 16
	MaxLocatorBits = 64
	MaxBlockLens   = 4 // distinct block lengths of one family in one network: each costs a look-up
	MaxEndpoints   = 16384
	MaxFloodNodes  = 256     // that have one L2 network which replicates: each gets a copy
	MaxFloodRate   = 1000000 // frames a second
	MaxPrefixes    = 4096    // of all external networks together

	maxSubnets = 64
	maxUplinks = 16
	maxLabels  = 64
)

// bounds of the length of a block.
type bounds struct{ least, usual, most int }

// words are what the file calls a node's own part of a network, and how long that may be.
type words struct {
	one   string // "block"
	given string // key of those that the file gives
	size  string // key of the length of counted ones
	v4    bounds
	v6    bounds
}

func (w *words) bounds(f Family) bounds {
	if f == V6 {
		return w.v6
	}
	return w.v4
}

// The longest block still has room for the gateway and a container. A pool has no gateway of its own, so that it may be one address.
var (
	blockWords = words{"block", "blocks", "block-size", bounds{16, 24, 30}, bounds{48, 64, 126}}
	poolWords  = words{"pool", "pools", "pool-size", bounds{16, 28, 32}, bounds{48, 112, 128}}
)

// bad is an Error that says nothing yet of where: Decode fills that in.
func bad(fix, format string, args ...any) error {
	return Error{Problem: fmt.Sprintf(format, args...), Fix: fix}
}

// UnmarshalText reads "reduced" or "srh".
func (e *Encapsulation) UnmarshalText(text []byte) error {
	switch string(text) {
	case "reduced":
		*e = Reduced
	case "srh":
		*e = SRH
	default:
		return bad("", "%s is no encapsulation", shortQuote(string(text)))
	}
	return nil
}

// MarshalText writes "reduced" or "srh".
func (e Encapsulation) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// UnmarshalText reads "host" or "router".
func (k *NodeKind) UnmarshalText(text []byte) error {
	switch string(text) {
	case "host":
		*k = KindHost
	case "router":
		*k = KindRouter
	default:
		return bad("", "%s is no kind of node", shortQuote(string(text)))
	}
	return nil
}

func (k NodeKind) String() string {
	if k == KindRouter {
		return "router"
	}
	return "host"
}

// MarshalText writes "host" or "router".
func (k NodeKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads "l3", "l2" or "external".
func (t *NetworkType) UnmarshalText(text []byte) error {
	switch string(text) {
	case "l3":
		*t = L3
	case "l2":
		*t = L2
	case "external":
		*t = External
	default:
		return bad("", "%s is no type of network that this version has", shortQuote(string(text)))
	}
	return nil
}

func (t NetworkType) String() string {
	switch t {
	case L2:
		return "l2"
	case External:
		return "external"
	}
	return "l3"
}

// word is the type as sentences have it.
func (t NetworkType) word() string {
	if t == External {
		return t.String()
	}
	return strings.ToUpper(t.String())
}

// MarshalText writes "l3", "l2" or "external".
func (t NetworkType) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText reads "shim" or "segment".
func (g *L2GSO) UnmarshalText(text []byte) error {
	switch string(text) {
	case "shim":
		*g = Shim
	case "segment":
		*g = Segment
	default:
		return bad("", "%s is no way to send frames that are still to be segmented", shortQuote(string(text)))
	}
	return nil
}

func (g L2GSO) String() string {
	if g == Segment {
		return "segment"
	}
	return "shim"
}

// MarshalText writes "shim" or "segment".
func (g L2GSO) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

// MarshalText writes the whole hash in hexadecimal, where String is cut for the eye.
func (h Hash) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%x", h[:]), nil }

// UnmarshalText reads the whole hash in hexadecimal.
func (h *Hash) UnmarshalText(text []byte) error {
	if hex.DecodedLen(len(text)) != len(h) {
		return bad("", "%s is no hash of a topology: it has %d hexadecimal digits", shortQuote(string(text)), hex.EncodedLen(len(h)))
	}
	_, err := hex.Decode(h[:], text)
	return err
}

// UnmarshalText reads an IPv6 prefix of 16 to 64 bits without host bits.
func (l *Locator) UnmarshalText(text []byte) error {
	p, err := parsePrefix6(string(text))
	if err != nil {
		return err
	}
	if p.Bits() < MinLocatorBits || p.Bits() > MaxLocatorBits {
		return bad("", "%s is a /%d; a locator has %d to %d bits", p, p.Bits(), MinLocatorBits, MaxLocatorBits)
	}
	l.Prefix = p
	return nil
}

// locatorBlock is an IPv6 prefix that has room for locators.
type locatorBlock struct{ netip.Prefix }

func (b *locatorBlock) UnmarshalText(text []byte) error {
	p, err := parsePrefix6(string(text))
	if err != nil {
		return err
	}
	if p.Bits() < 8 || p.Bits() > MaxLocatorBits {
		return bad("", "%s is a /%d; a locator block has 8 to %d bits", p, p.Bits(), MaxLocatorBits)
	}
	if r, ok := reserved(p); ok {
		return bad("", "%s overlaps %s", p, r)
	}
	b.Prefix = p
	return nil
}

// underlayAddr is an IPv6 unicast address that routers know.
type underlayAddr struct{ netip.Addr }

func (u *underlayAddr) UnmarshalText(text []byte) error {
	a, err := parseAddr6(string(text))
	if err != nil {
		return err
	}
	if r, ok := reserved(netip.PrefixFrom(a, a.BitLen())); ok {
		return bad("", "%s is in %s", a, r)
	}
	u.Addr = a
	return nil
}

// sidAddr is an address in a locator.
type sidAddr struct{ netip.Addr }

func (s *sidAddr) UnmarshalText(text []byte) error {
	a, err := parseAddr6(string(text))
	s.Addr = a
	return err
}

// subnet is a prefix of either family that containers may have addresses of.
type subnet struct{ netip.Prefix }

func (s *subnet) UnmarshalText(text []byte) error {
	p, err := parsePrefix(string(text))
	if err != nil {
		return err
	}
	if r, ok := reserved(p); ok {
		return bad("write a range that containers may use, as 10.40.0.0/16 or fd40::/48", "%s overlaps %s", p, r)
	}
	s.Prefix = p
	return nil
}

// hostAddr is an address of either family that something in a network has.
type hostAddr struct{ netip.Addr }

func (h *hostAddr) UnmarshalText(text []byte) error {
	a, err := parseAddr(string(text))
	if err == nil && a.Is4In6() {
		return bad("write "+a.Unmap().String(), "%s is an IPv4 address in IPv6 clothes", shortQuote(string(text)))
	}
	h.Addr = a
	return err
}

func parseAddr(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return netip.Addr{}, bad("", "%s is no IP address", shortQuote(text))
	case a.Zone() != "":
		return netip.Addr{}, bad("", "%s has a zone, which means something else on each node", shortQuote(text))
	}
	return a, nil
}

func parseAddr6(text string) (netip.Addr, error) {
	a, err := parseAddr(text)
	if err == nil && (a.Is4() || a.Is4In6()) {
		return netip.Addr{}, bad("", "%s is an IPv4 address", shortQuote(text))
	}
	return a, err
}

func parsePrefix6(text string) (netip.Prefix, error) {
	p, err := parsePrefix(text)
	if err == nil && p.Addr().Is4() {
		return netip.Prefix{}, bad("", "%s is an IPv4 prefix", shortQuote(text))
	}
	return p, err
}

func parsePrefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil && !strings.Contains(text, "/"):
		return netip.Prefix{}, bad("", "%s is no IP prefix: it has no length", shortQuote(text))
	case err != nil:
		return netip.Prefix{}, bad("", "%s is no IP prefix", shortQuote(text))
	case p.Addr().Is4In6():
		return netip.Prefix{}, bad("write the IPv4 prefix itself", "%s is an IPv4 prefix in IPv6 clothes", shortQuote(text))
	case p != p.Masked():
		return netip.Prefix{}, bad("write "+p.Masked().String(), "%s has host bits", shortQuote(text))
	}
	return p, nil
}

// reservedRanges are no unicast addresses that a router would carry.
var reservedRanges = []struct {
	prefix netip.Prefix
	what   string
	routed bool // something outside of the overlay may be there
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "the unspecified range", false},
	{netip.MustParsePrefix("127.0.0.0/8"), "the loopback range", false},
	{netip.MustParsePrefix("169.254.0.0/16"), "the link-local range", true},
	{netip.MustParsePrefix("224.0.0.0/4"), "the multicast range", false},
	{netip.MustParsePrefix("240.0.0.0/4"), "the reserved range", true},
	{netip.MustParsePrefix("::/96"), "the unspecified and loopback range", false},
	{netip.MustParsePrefix("::ffff:0:0/96"), "the IPv4-mapped range", false},
	{netip.MustParsePrefix("fe80::/10"), "the link-local range", false},
	{netip.MustParsePrefix("ff00::/8"), "the multicast range", false},
}

func reserved(p netip.Prefix) (string, bool) {
	for _, r := range reservedRanges {
		if r.prefix.Overlaps(p) {
			return fmt.Sprintf("%s %s", r.what, r.prefix), true
		}
	}
	return "", false
}

// isHostName takes letters, digits and hyphens in parts separated by dots, at most MaxNodeName
// bytes together.
func isHostName(s string) bool {
	if len(s) > MaxNodeName {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		if !isHostLabel(part) {
			return false
		}
	}
	return true
}

func isHostLabel(s string) bool {
	return s != "" && s[0] != '-' && s[len(s)-1] != '-' && isBare(s) && !strings.Contains(s, "_")
}

// isNetworkName takes what fits a label's key and needs no quotes: [a-z0-9-], at most 32 bytes.
func isNetworkName(s string) bool {
	return len(s) <= MaxNetworkName && isHostLabel(s) && strings.ToLower(s) == s
}

// isInterfaceName takes what the kernel takes (dev_valid_name), and no control characters.
func isInterfaceName(s string) bool {
	if s == "" || len(s) > 15 || s == "." || s == ".." {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == '/' || r == ':' || r >= 0x7f })
}

// isLabel takes up to 63 printable ASCII characters.
func isLabel(s string) bool {
	return len(s) <= MaxNodeName && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r >= 0x7f })
}
