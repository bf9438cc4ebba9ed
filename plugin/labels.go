// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/lace-net/lace/plugin/wire"
)

// The labels and annotations by which a container asks for Lace.
const (
	LabelNetwork = wire.LabelNetwork
	LabelIP      = "lace.ip"
	LabelMAC     = "lace.mac"
	LabelName    = "lace.name"
	LabelSticky  = "lace.sticky"
)

// The labels that the agent itself keeps on the record of a container, so that its addresses outlive
// its task. A user's wish stands in the labels above, never here.
const (
	RecordAddress = "lace/address" // the addresses, comma separated
	RecordMAC     = "lace/mac"
)

const (
	maxValue   = 256 // bytes of any lace. value
	maxName    = 253 // bytes; the longest name of a CRI pod
	maxNetwork = 63  // bytes
	maxQuoted  = 64  // bytes of bad input that an error repeats
)

// GatewayMAC is the gateway's on every node and in every network; no container may have it.
var GatewayMAC = net.HardwareAddr{0x06, 0x00, 0x6c, 0x61, 0x63, 0x65}

var (
	userLabels = []string{LabelNetwork, LabelIP, LabelMAC, LabelName, LabelSticky}
	nameForm   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)
)

// ParseLabels reads what a container asks for. Annotations win over labels, key by key. asks is false
// when it wants nothing of Lace. The Request has neither Container nor Netns, and Name only from
// lace.name; all errors of the labels are reported at once.
func ParseLabels(labels, annotations map[string]string) (r Request, asks bool, err error) {
	own := ownKeys(labels, annotations)
	if len(own) == 0 {
		return Request{}, false, nil
	}
	errs := unknownKeys(own)
	if _, ok := own[LabelNetwork]; !ok {
		errs = append(errs, fmt.Errorf("%s is set, but %s is not: name the network that the container is to join",
			quoteAll(slices.Sorted(maps.Keys(own))), LabelNetwork))
	}
	for _, key := range userLabels {
		value, ok := own[key]
		if !ok {
			continue
		}
		if err := setLabel(&r, key, value); err != nil {
			errs = append(errs, fmt.Errorf("%s = %s: %w", key, quote(value), err))
		}
	}
	return r, true, errors.Join(errs...)
}

func ownKeys(labels, annotations map[string]string) map[string]string {
	own := map[string]string{}
	for _, m := range []map[string]string{labels, annotations} {
		for k, v := range m {
			if strings.HasPrefix(k, wire.LabelPrefix) {
				own[k] = v
			}
		}
	}
	return own
}

func unknownKeys(own map[string]string) (errs []error) {
	for _, key := range slices.Sorted(maps.Keys(own)) {
		if slices.Contains(userLabels, key) {
			continue
		}
		errs = append(errs, fmt.Errorf("unknown label %s%s; Lace knows %s",
			quote(key), didYouMean(key), strings.Join(userLabels, ", ")))
		if len(errs) == 8 { // enough to mend them; the text stays bounded
			break
		}
	}
	return errs
}

func setLabel(r *Request, key, value string) (err error) {
	if len(value) > maxValue {
		return fmt.Errorf("is %d bytes long; at most %d are taken", len(value), maxValue)
	}
	switch key {
	case LabelNetwork:
		r.Network, err = parseNetwork(value)
	case LabelIP:
		r.IPs, err = parseIPs(value)
	case LabelMAC:
		r.MAC, err = parseMAC(value)
	case LabelName:
		r.Name, err = parseName(value)
	case LabelSticky:
		r.Sticky, err = parseBool(value)
	}
	return err
}

func parseNetwork(value string) (string, error) {
	value = strings.TrimSpace(value)
	switch {
	case value == "":
		return "", errors.New("names no network; give one of the topology file's")
	case strings.Contains(value, ","):
		return "", errors.New("names several networks; this release joins a container to one")
	case len(value) > maxNetwork:
		return "", fmt.Errorf("is longer than %d bytes, which no network name is", maxNetwork)
	case !nameForm.MatchString(value):
		return "", errors.New("is no network name; one has letters, digits, '.', '_' and '-'")
	}
	return value, nil
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
		if slices.ContainsFunc(ips, func(o netip.Addr) bool { return o.Is4() == ip.Is4() }) {
			return nil, fmt.Errorf("has two addresses of %s; give at most one", family(ip))
		}
		ips = append(ips, ip)
	}
	return ips, nil
}

func checkIP(ip netip.Addr) error {
	switch {
	case ip.Zone() != "":
		return fmt.Errorf("%s has a zone; leave %%%s away", quote(ip.String()), quote(ip.Zone()))
	case ip.Is4In6():
		return fmt.Errorf("%s is IPv4 written as IPv6; write %s", ip, ip.Unmap())
	case ip.IsUnspecified(), ip.IsLoopback(), ip.IsMulticast(), ip.IsLinkLocalUnicast():
		return fmt.Errorf("%s is no unicast address that a network can have; give one of the network's block on this node", ip)
	}
	return nil
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

// didYouMean names the known label that is at most a third of its letters away.
func didYouMean(key string) string {
	if len(key) > maxValue {
		return ""
	}
	best, distance := "", len(key)/3+1
	for _, known := range userLabels {
		if d := editDistance(key, known); d < distance {
			best, distance = known, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %q?)", best)
}

// editDistance counts the bytes to insert, delete or replace to get from a to b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// quote makes foreign text fit for an error: bounded, and with control characters escaped.
func quote(s string) string {
	if len(s) > maxQuoted {
		s = s[:maxQuoted] + "…"
	}
	return strconv.Quote(s)
}

func quoteAll(keys []string) string {
	if len(keys) > 4 {
		keys = append(keys[:4:4], "…")
	}
	for i, k := range keys {
		keys[i] = quote(k)
	}
	return strings.Join(keys, ", ")
}

// addressRecord is what RecordAddress and RecordMAC hold for a container wired as res says.
func addressRecord(res Result) map[string]string {
	var ips []string
	for _, p := range []netip.Prefix{res.V4, res.V6} {
		if p.IsValid() {
			ips = append(ips, p.Addr().String())
		}
	}
	return map[string]string{RecordAddress: strings.Join(ips, ","), RecordMAC: res.MAC.String()}
}

// withRecord returns r with the addresses of the record filled in where the labels wish for none of
// that kind, and whether there were any. A record that cannot be read is as good as none.
func withRecord(r Request, labels map[string]string) (Request, bool) {
	filled := false
	r.IPs = slices.Clone(r.IPs)
	if ips, err := parseIPs(labels[RecordAddress]); err == nil {
		for _, ip := range ips {
			if slices.ContainsFunc(r.IPs, func(o netip.Addr) bool { return o.Is4() == ip.Is4() }) {
				continue
			}
			r.IPs, filled = append(r.IPs, ip), true
		}
	}
	if r.MAC == nil {
		if mac, err := parseMAC(labels[RecordMAC]); err == nil {
			r.MAC, filled = mac, true
		}
	}
	return r, filled
}
