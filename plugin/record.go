// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"net"
	"net/netip"
	"slices"
	"strings"
)

// The labels that the agent itself keeps on the record of a container, so that its addresses outlive
// its task. A user's wish stands in the labels above, never here. Of a container in one network they hold the
// value alone: "10.40.1.9,fd40::9". In several, each value follows its network's name: "backend=10.40.1.9,fd40::9;storage=10.50.0.18".
const (
	RecordAddress = "lace/address"
	RecordMAC     = "lace/mac"
)

// addressRecord is what RecordAddress and RecordMAC hold for a container wired as results say.
func addressRecord(results []Result) map[string]string {
	var ips, macs []string
	for _, res := range results {
		name := ""
		if len(results) > 1 {
			name = res.Network + "="
		}
		ips = append(ips, name+addressList(res))
		macs = append(macs, name+res.MAC.String())
	}
	return map[string]string{RecordAddress: strings.Join(ips, ";"), RecordMAC: strings.Join(macs, ";")}
}

func addressList(res Result) string {
	var ips []string
	for _, p := range []netip.Prefix{res.V4, res.V6} {
		if p.IsValid() {
			ips = append(ips, p.Addr().String())
		}
	}
	return strings.Join(ips, ",")
}

// recordOf returns the part of a record that is about a network. One without a name is the first network's.
func recordOf(record, network string, first bool) string {
	for part := range strings.SplitSeq(record, ";") {
		name, value, named := strings.Cut(part, "=")
		switch {
		case named && name == network:
			return value
		case !named && first:
			return part
		}
	}
	return ""
}

// withRecord returns r with the addresses of the record filled in where the labels wish for none of
// that kind, and the places of the interfaces that got some. A record that cannot be read is as good as none.
func withRecord(r Request, labels map[string]string) (Request, []int) {
	var filled []int
	r.Interfaces = slices.Clone(r.Interfaces)
	for n := range r.Interfaces {
		i := &r.Interfaces[n]
		ips, err := parseIPs(recordOf(labels[RecordAddress], i.Network, n == 0))
		if err != nil {
			continue
		}
		mac, err := parseMAC(recordOf(labels[RecordMAC], i.Network, n == 0))
		if err != nil {
			mac = nil
		}
		if i.fill(ips, mac) {
			filled = append(filled, n)
		}
	}
	return r, filled
}

// wishes are what is asked for with a record, the best first: with all that it says, without what it says of one network, for each
// of them, and r as it is.
func wishes(r Request, labels map[string]string) []Request {
	full, filled := withRecord(r, labels)
	var all []Request
	if len(filled) > 0 {
		all = append(all, full)
	}
	if len(filled) > 1 {
		for _, n := range filled {
			less := full
			less.Interfaces = slices.Clone(full.Interfaces)
			less.Interfaces[n] = r.Interfaces[n]
			all = append(all, less)
		}
	}
	return append(all, r)
}

// fill takes over recorded addresses, and reports whether it took any. A MAC address follows from the others, as a rule: it is taken
// only where these are.
func (i *Interface) fill(ips []netip.Addr, mac net.HardwareAddr) (filled bool) {
	same := true
	i.IPs = slices.Clone(i.IPs)
	for _, ip := range ips {
		at := slices.IndexFunc(i.IPs, sameFamily(ip))
		if at < 0 {
			i.IPs, filled = append(i.IPs, ip), true
			continue
		}
		same = same && i.IPs[at] == ip
	}
	if i.MAC == nil && mac != nil && same {
		i.MAC, filled = mac, true
	}
	return filled
}
