// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

const (
	maxValue   = 256 // bytes of any lace. value but lists of networks and ports
	maxName    = 253 // bytes; the longest name of a CRI pod
	maxNetwork = 63  // bytes of one name
	maxIfName  = 15  // bytes; IFNAMSIZ of the kernel, less the zero behind it
)

// GatewayMAC is the gateway's on every node and in every network; no container may have it.
var GatewayMAC = net.HardwareAddr{0x06, 0x00, 0x6c, 0x61, 0x63, 0x65}

// parseNetworks reads a list of names. Their order is that of the interfaces.
func parseNetworks(value string) ([]string, error) {
	if strings.TrimSpace(value) == "" {
		return nil, errors.New("names no network; give one of the topology file's")
	}
	names := strings.Split(value, ",")
	if len(names) > maxNetworks {
		return nil, fmt.Errorf("names %d networks; a container joins at most %d", len(names), maxNetworks)
	}
	for i, name := range names {
		names[i] = strings.TrimSpace(name)
		if err := checkNetwork(names[i]); err != nil {
			return nil, err
		}
		if slices.Contains(names[:i], names[i]) {
			return nil, fmt.Errorf("names network %s twice; a container has one interface in each", quote(names[i]))
		}
	}
	return names, nil
}

func checkNetwork(name string) error {
	switch {
	case name == "":
		return errors.New("has a comma with no network before or behind it")
	case len(name) > maxNetwork:
		return fmt.Errorf("%s is longer than %d bytes, which no network name is", quote(name), maxNetwork)
	case !nameForm.MatchString(name):
		return fmt.Errorf("%s is no network name; one has letters, digits, '.', '_' and '-'", quote(name))
	}
	return nil
}

func parseIPs(value string) ([]netip.Addr, error) {
	var ips []netip.Addr
	for field := range strings.SplitSeq(value, ",") {
		ip, err := netip.ParseAddr(strings.TrimSpace(field))
		if err != nil {
			return nil, fmt.Errorf("%s is no IP address; give one IPv4 and/or one IPv6 address, without prefix length, separated by a comma",
				quote(strings.TrimSpace(field)))
		}
		if err := checkIP(ip); err != nil {
			return nil, err
		}
		if slices.ContainsFunc(ips, sameFamily(ip)) {
			return nil, fmt.Errorf("has two addresses of %s; give at most one", family(ip))
		}
		ips = append(ips, ip)
	}
	return ips, nil
}

func checkIP(ip netip.Addr) error {
	if err := checkForm(ip); err != nil {
		return err
	}
	if ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() || ip.IsLinkLocalUnicast() {
		return fmt.Errorf("%s is no unicast address that a network can have; give one of the network's block on this node", ip)
	}
	return nil
}

// checkForm refuses an address that has a plainer form.
func checkForm(ip netip.Addr) error {
	switch {
	case ip.Zone() != "":
		return fmt.Errorf("%s has a zone; leave %%%s away", quote(ip.String()), quote(ip.Zone()))
	case ip.Is4In6():
		return fmt.Errorf("%s is IPv4 written as IPv6; write %s", ip, ip.Unmap())
	}
	return nil
}

func sameFamily(ip netip.Addr) func(netip.Addr) bool {
	return func(other netip.Addr) bool { return other.Is4() == ip.Is4() }
}

func family(ip netip.Addr) string {
	if ip.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

func parseMAC(value string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(strings.TrimSpace(value))
	switch {
	case err != nil || len(mac) != 6:
		return nil, errors.New("is no MAC address; write it as 02:00:00:00:00:01")
	case mac[0]&1 != 0:
		return nil, errors.New("is a group address; a container needs a unicast one, whose first byte is even")
	case bytes.Equal(mac, make([]byte, 6)):
		return nil, errors.New("is no address of any interface; leave the label away to get one chosen")
	case bytes.Equal(mac, GatewayMAC):
		return nil, errors.New("is the gateway's, on every node; choose another")
	}
	return mac, nil
}

func parseName(value string) (string, error) {
	if len(value) > maxName {
		return "", fmt.Errorf("is %d bytes long; at most %d are taken", len(value), maxName)
	}
	if !nameForm.MatchString(value) {
		return "", errors.New("is no name; it begins with a letter or digit and goes on with those, '.', '_' and '-'")
	}
	return value, nil
}

func parseBool(value string) (bool, error) {
	b, err := strconv.ParseBool(strings.TrimSpace(value))
	if err != nil {
		return false, errors.New("is neither true nor false")
	}
	return b, nil
}

// noInterface are names that the kernel has a use of its own for: the loopback, the settings of all interfaces and of those to
// come, and directories.
var noInterface = []string{"lo", "all", "default", ".", ".."}

// parseIfName takes what the kernel takes, less what only looks like a name there: '%' is a pattern to it.
func parseIfName(value string) (string, error) {
	odd := func(r rune) bool { return strings.ContainsRune("/:%", r) || r <= ' ' || r > unicode.MaxASCII-1 }
	switch {
	case value == "":
		return "", errors.New("is empty; leave the label away to get eth0, eth1 and so on, in the order of the networks")
	case len(value) > maxIfName:
		return "", fmt.Errorf("is %d bytes long; the name of an interface has at most %d", len(value), maxIfName)
	case strings.ContainsFunc(value, odd):
		return "", errors.New("is no name of an interface; one has no '/', ':', '%', blanks or control characters")
	case slices.Contains(noInterface, value):
		return "", errors.New("is no name that an interface of a network can have; choose another")
	}
	return value, nil
}
