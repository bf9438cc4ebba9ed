// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	maxPublished = 256  // ports of one container, ranges counted port by port
	maxPublish   = 4096 // bytes of a value that lists them; containerd takes no longer label
	publishForm  = "write [ADDRESS:]PORT[-PORT]:PORT[-PORT][/tcp|/udp], as in 8080:80 or [2001:db8::1]:53:5353/udp"
)

// String gives the node's side as it stands in a label: 8080/tcp, 192.0.2.1:8080/tcp, [2001:db8::1]:53/udp.
func (p Publish) String() string {
	at, protocol := strconv.Itoa(int(p.Port)), "tcp"
	if p.Address.IsValid() {
		at = netip.AddrPortFrom(p.Address, p.Port).String()
	}
	if p.Protocol == unix.IPPROTO_UDP {
		protocol = "udp"
	}
	return at + "/" + protocol
}

// overlaps reports whether a packet could be meant for both.
func (p Publish) overlaps(q Publish) bool {
	return p.Protocol == q.Protocol && p.Port == q.Port &&
		(p.Address == q.Address || !p.Address.IsValid() || !q.Address.IsValid())
}

// firstOverlap finds the first of b that overlaps one of a.
func firstOverlap(a, b []Publish) (p, q Publish, found bool) {
	for _, q := range b {
		if at := slices.IndexFunc(a, q.overlaps); at >= 0 {
			return a[at], q, true
		}
	}
	return p, q, false
}

// parsePublish reads a list of ports. A range becomes one Publish for each of its ports.
func parsePublish(value string) (all []Publish, err error) {
	for entry := range strings.SplitSeq(value, ",") {
		entry = strings.TrimSpace(entry)
		some, err := parseMapping(entry)
		if err != nil && entry != value {
			err = fmt.Errorf("%s: %w", quote(entry), err)
		}
		if err != nil {
			return nil, err
		}
		if n := len(all) + len(some); n > maxPublished {
			return nil, tooManyPublished(n)
		}
		if p, q, found := firstOverlap(all, some); found {
			return nil, publishedTwice(p, q)
		}
		all = append(all, some...)
	}
	return all, nil
}

func tooManyPublished(n int) error {
	return fmt.Errorf("publishes %d ports; a container has at most %d", n, maxPublished)
}

func publishedTwice(p, q Publish) error {
	if p.Address == q.Address {
		return fmt.Errorf("publishes %s twice; a port of the node leads to one port of a container", p)
	}
	return fmt.Errorf("publishes %s and %s, but a port without an address is that of every address; leave one of them away", p, q)
}

// parseMapping reads one element of a list.
func parseMapping(entry string) ([]Publish, error) {
	if entry == "" {
		return nil, errors.New("names no port; " + publishForm)
	}
	protocol, err := protocolOf(entry)
	if err != nil {
		return nil, err
	}
	at, _, _ := strings.Cut(entry, "/")
	fields := strings.Split(at, ":") // told apart from behind, since an address may have colons too
	last := len(fields) - 1
	if last == 0 || isAddress(strings.Join(fields[:last], ":")) {
		return nil, onePort(at, fields[last])
	}
	p := Publish{Protocol: protocol}
	if last > 1 {
		if p.Address, err = parseNodeAddress(strings.Join(fields[:last-1], ":")); err != nil {
			return nil, err
		}
	}
	return p.expand(fields[last-1], fields[last])
}

// protocolOf reads what stands behind the slash: TCP where nothing does.
func protocolOf(entry string) (uint8, error) {
	_, name, said := strings.Cut(entry, "/")
	switch {
	case !said, name == "tcp":
		return unix.IPPROTO_TCP, nil
	case name == "udp":
		return unix.IPPROTO_UDP, nil
	}
	return 0, fmt.Errorf("has the protocol %s; ports of tcp and udp can be published", quote(name))
}

// isAddress reports whether s is an address in the form that it has before a port.
func isAddress(s string) bool {
	ip, bracketed, err := readAddress(s)
	return err == nil && bracketed == ip.Is6()
}

func readAddress(s string) (ip netip.Addr, bracketed bool, err error) {
	if inside, ok := strings.CutPrefix(s, "["); ok && strings.HasSuffix(inside, "]") {
		s, bracketed = strings.TrimSuffix(inside, "]"), true
	}
	ip, err = netip.ParseAddr(s)
	return ip, bracketed, err
}

// onePort refuses what names a single port, as clients that choose the other themselves take it.
func onePort(at, port string) error {
	if _, err := parsePorts("node", port); err != nil {
		return errors.New("is no published port; " + publishForm)
	}
	return fmt.Errorf("names one port; write the node's and the container's, as in %s", quote(at+":"+port))
}

// parseNodeAddress reads the address of the node at which alone a port is published.
func parseNodeAddress(s string) (netip.Addr, error) {
	ip, bracketed, err := readAddress(s)
	switch {
	case s == "":
		return ip, errors.New("has an empty address; leave its colon away to publish at every address of the node")
	case err != nil:
		return ip, fmt.Errorf("has %s where an IP address belongs; %s", quote(s), publishForm)
	case ip.Is6() && !bracketed:
		return ip, fmt.Errorf("has an IPv6 address without brackets; write %s", quote("["+s+"]"))
	case ip.Is4() && bracketed:
		return ip, fmt.Errorf("has an IPv4 address in brackets; write %s without them", ip)
	}
	return ip, checkNodeAddress(ip)
}

func checkNodeAddress(ip netip.Addr) error {
	const mend = "leave the address away to publish at every address of the node, or name one of them"
	if err := checkForm(ip); err != nil {
		return err
	}
	switch {
	case ip.IsUnspecified():
		return fmt.Errorf("%s means every address of %s alone, which cannot be published at; %s", ip, family(ip), mend)
	case ip.IsLoopback():
		return fmt.Errorf("%s is a loopback address, which cannot be published at alone; %s", ip, mend)
	case !ip.IsGlobalUnicast():
		return fmt.Errorf("%s is no global unicast address, as others reach the node by; %s", ip, mend)
	}
	return nil
}

// portRange is a range of ports, both ends included.
type portRange struct{ first, last uint16 }

func (r portRange) size() int { return int(r.last) - int(r.first) + 1 }

// parsePorts reads PORT or PORT-PORT.
func parsePorts(whose, s string) (r portRange, err error) {
	first, last, isRange := strings.Cut(s, "-")
	if s == "" {
		return r, fmt.Errorf("has no port of the %s; %s", whose, publishForm)
	}
	if r.first, err = parsePort(whose, first); err != nil || !isRange {
		return portRange{r.first, r.first}, err
	}
	if r.last, err = parsePort(whose, last); err != nil {
		return r, err
	}
	if r.last < r.first {
		return r, fmt.Errorf("has the range %s, which ends before it begins; write %d-%d", quote(s), r.last, r.first)
	}
	return r, nil
}

func parsePort(whose, s string) (uint16, error) {
	port, err := strconv.ParseUint(s, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("has %s where a port of the %s belongs, which is a number from 1 to 65535", quote(s), whose)
	}
	return uint16(port), nil
}

// expand gives p each port of the node, with the container's in the same place of the other range.
func (p Publish) expand(node, container string) ([]Publish, error) {
	from, err := parsePorts("node", node)
	if err != nil {
		return nil, err
	}
	to, err := parsePorts("container", container)
	if err != nil {
		return nil, err
	}
	if n, m := from.size(), to.size(); n != m {
		return nil, fmt.Errorf("has ports of the node and of the container in different number, %d and %d; give ranges of one length", n, m)
	}
	all := make([]Publish, from.size())
	for i := range all {
		all[i] = p
		all[i].Port, all[i].To = from.first+uint16(i), to.first+uint16(i)
	}
	return all, nil
}
