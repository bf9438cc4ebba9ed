// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// maxAlias is the kernel's limit (IFALIASZ - 1).
const maxAlias = 255

const hexDigits = "0123456789ABCDEF"

// label is what the alias of a port's host end says.
type label struct {
	plan.Attachment
	hadIPv6 bool // a device given by name had IPv6 switched on before: its release does so again
}

// encodeAlias writes an attachment as the alias of its host interface, from which a fresh agent
// learns it again. One line of words in a fixed order, absent ones left out:
//
//	lace port=1 c=default/4f1c net=100/backend if=eth0 v4=10.40.1.2 v6=fd40:0:1::2 mac=064c0a280102 sticky name=web
//	lace port=1 c=device/tap0 net=200/storage if=tap0 dev=tap0 v4=10.50.0.200 mac=525400000001 nogw ip6 name=vm
//
// nogw says that the container's default route leads elsewhere: the agents that had no word for it gave one to every port.
// Bytes outside printable ASCII, spaces and % stand as %XX. The name comes last and loses its end
// where the whole would pass 255 bytes; it fails when even the rest does not fit.
func encodeAlias(a label) (string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "%s1 c=%s net=%d/%s if=%s", portAlias, escape(a.Container), a.NetworkID, escape(a.Network), escape(a.IfName))
	if a.Device != "" {
		b.WriteString(" dev=" + escape(a.Device))
	}
	if a.V4.IsValid() {
		b.WriteString(" v4=" + a.V4.String())
	}
	if a.V6.IsValid() {
		b.WriteString(" v6=" + a.V6.String())
	}
	b.WriteString(" mac=" + hex.EncodeToString(a.MAC[:]))
	for _, flag := range []struct {
		word string
		set  bool
	}{{"sticky", a.Sticky}, {"nogw", !a.Gateway}, {"ip6", a.hadIPv6}} {
		if flag.set {
			b.WriteString(" " + flag.word)
		}
	}
	if b.Len() > maxAlias {
		return "", fmt.Errorf("describe container %s in network %s: %d bytes do not fit the %d of an interface alias; a shorter container id, namespace or network name does",
			a.Container, a.Network, b.Len(), maxAlias)
	}
	if name := escapeWithin(a.Name, maxAlias-b.Len()-len(" name=")); name != "" {
		b.WriteString(" name=" + name)
	}
	return b.String(), nil
}

// decodeAlias reads what encodeAlias wrote, and nothing else: any other spelling is refused.
func decodeAlias(s string) (label, error) {
	version, rest, _ := strings.Cut(strings.TrimPrefix(s, portAlias), " ")
	if !strings.HasPrefix(s, portAlias) {
		return label{}, fmt.Errorf("alias %q is not that of a Lace port", s)
	}
	if version != "1" {
		return label{}, fmt.Errorf("alias %q has version %q, this agent reads version 1: run the agent that wrote it, or remove the container", s, version)
	}
	a := label{Attachment: plan.Attachment{Gateway: true}}
	for _, word := range strings.Split(rest, " ") {
		key, value, _ := strings.Cut(word, "=")
		if err := decodeWord(&a, key, value); err != nil {
			return label{}, fmt.Errorf("alias %q: %w", s, err)
		}
	}
	if again, err := encodeAlias(a); err != nil || again != s {
		return label{}, fmt.Errorf("alias %q is not in the form that Lace writes", s)
	}
	return a, nil
}

func decodeWord(a *label, key, value string) (err error) {
	switch key {
	case "c":
		a.Container, err = unescape(value)
	case "net":
		id, name, _ := strings.Cut(value, "/")
		a.NetworkID, err = parseNetworkID(id)
		if err == nil {
			a.Network, err = unescape(name)
		}
	case "if":
		a.IfName, err = unescape(value)
	case "dev":
		a.Device, err = unescape(value)
	case "v4":
		a.V4, err = parseFamily(value, netip.Addr.Is4)
	case "v6":
		a.V6, err = parseFamily(value, netip.Addr.Is6)
	case "mac":
		err = decodeMAC(&a.MAC, value)
	case "sticky":
		a.Sticky = true
	case "nogw":
		a.Gateway = false
	case "ip6":
		a.hadIPv6 = true
	case "name":
		a.Name, err = unescape(value)
	default:
		err = fmt.Errorf("unknown word %q", key)
	}
	return err
}

func parseNetworkID(s string) (topology.NetworkID, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || topology.NetworkID(n) > topology.MaxNetworkID {
		return 0, fmt.Errorf("%q is no network id", s)
	}
	return topology.NetworkID(n), nil
}

func parseFamily(s string, is func(netip.Addr) bool) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err == nil && !is(a) {
		err = fmt.Errorf("%q is of the other family", s)
	}
	return a, err
}

func decodeMAC(m *plan.MAC, s string) error {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(m) {
		return fmt.Errorf("%q is no MAC address of 12 hexadecimal digits", s)
	}
	copy(m[:], b)
	return nil
}

func plain(c byte) bool { return c > ' ' && c < 0x7f && c != '%' }

func escape(s string) string { return escapeWithin(s, len(s)*3) }

// escapeWithin escapes as much of s as fits limit bytes, cutting between characters.
func escapeWithin(s string, limit int) string {
	var b strings.Builder
	for len(s) > 0 {
		_, n := utf8.DecodeRuneInString(s)
		word := escapeBytes(s[:n])
		if b.Len()+len(word) > limit {
			break
		}
		b.WriteString(word)
		s = s[n:]
	}
	return b.String()
}

func escapeBytes(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if plain(s[i]) {
			b.WriteByte(s[i])
			continue
		}
		b.Write([]byte{'%', hexDigits[s[i]>>4], hexDigits[s[i]&15]})
	}
	return b.String()
}

func unescape(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b.WriteByte(s[i])
			continue
		}
		if i+2 >= len(s) {
			return "", errors.New("a % without two hexadecimal digits")
		}
		c, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
		if err != nil {
			return "", fmt.Errorf("%q is not two hexadecimal digits", s[i+1:i+3])
		}
		b.WriteByte(byte(c))
		i += 2
	}
	return b.String(), nil
}
