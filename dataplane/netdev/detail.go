// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"encoding/binary"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Attributes and indexes of linux/if_link.h and linux/ipv6.h that the libraries do not name.
const (
	inet6Conf        = 2 // IFLA_INET6_CONF: an array of 32-bit values …
	inet6AddrGenMode = 8

	confForwarding  = 0 // … in which these have these places (DEVCONF_*)
	confAcceptRA    = 3
	confDisableIPv6 = 26
	confAcceptDAD   = 27
)

// attributes are the payloads of a netlink message or of a nested attribute, by type.
type attributes map[uint16][]byte

func parseAttributes(b []byte) (attributes, error) {
	all, err := nl.ParseRouteAttr(b)
	if err != nil {
		return nil, err
	}
	byType := make(attributes, len(all))
	for _, a := range all {
		byType[a.Attr.Type&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = a.Value
	}
	return byType, nil
}

// nested parses the attribute of that type; it is empty where there is none.
func (a attributes) nested(kind uint16) (attributes, error) { return parseAttributes(a[kind]) }

// number reads an attribute of one, two, four or eight bytes.
func (a attributes) number(kind uint16) (uint64, bool) {
	switch b := a[kind]; len(b) {
	case 1:
		return uint64(b[0]), true
	case 2:
		return uint64(binary.NativeEndian.Uint16(b)), true
	case 4:
		return uint64(binary.NativeEndian.Uint32(b)), true
	case 8:
		return binary.NativeEndian.Uint64(b), true
	}
	return 0, false
}

// detail is what the library leaves out of a link.
type detail struct {
	info  attributes // IFLA_INFO_DATA: settings of its kind
	slave attributes // IFLA_INFO_SLAVE_DATA: settings as a port of its master
	inet6 attributes // the IPv6 side; empty where the device has none
}

func (c *conn) detail(index int) (detail, error) {
	var d detail
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	rows, err := c.request(unix.RTM_GETLINK, 0, msg).Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return d, err
	}
	if len(rows) != 1 || len(rows[0]) < unix.SizeofIfInfomsg {
		return d, fmt.Errorf("the kernel answered with %d links", len(rows))
	}
	return parseDetail(rows[0][unix.SizeofIfInfomsg:])
}

func parseDetail(b []byte) (d detail, err error) {
	top, err := parseAttributes(b)
	if err != nil {
		return d, err
	}
	info, err := top.nested(unix.IFLA_LINKINFO)
	if err != nil {
		return d, err
	}
	if d.info, err = info.nested(nl.IFLA_INFO_DATA); err != nil {
		return d, err
	}
	if d.slave, err = info.nested(nl.IFLA_INFO_SLAVE_DATA); err != nil {
		return d, err
	}
	families, err := top.nested(unix.IFLA_AF_SPEC)
	if err != nil {
		return d, err
	}
	d.inet6, err = families.nested(unix.AF_INET6)
	return d, err
}

// inet6Setting reads one of the device's net.ipv6.conf values.
func (d detail) inet6Setting(place int) (int32, bool) {
	b := d.inet6[inet6Conf]
	if len(b) < 4*place+4 {
		return 0, false
	}
	return int32(binary.NativeEndian.Uint32(b[4*place:])), true
}

// setting is one number in a link's info data, of size bytes.
type setting struct {
	kind  uint16
	size  int
	value uint64
	name  string
}

func (s setting) attr() *nl.RtAttr {
	b := binary.NativeEndian.AppendUint64(nil, s.value)
	if s.size == 4 {
		b = nl.Uint32Attr(uint32(s.value))
	}
	return nl.NewRtAttr(int(s.kind), b[:s.size])
}

// differing returns the settings that the kernel knows and holds otherwise; one that it does not
// show is compiled out.
func differing(have attributes, want []setting) []setting {
	var diff []setting
	for _, s := range want {
		if v, ok := have.number(s.kind); ok && v != s.value {
			diff = append(diff, s)
		}
	}
	return diff
}

// setInfo writes settings into IFLA_INFO_DATA (a link's own) or IFLA_INFO_SLAVE_DATA (as a port).
func (c *conn) setInfo(l netlink.Link, kindAttr, dataAttr int, kind string, settings []setting) error {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(l.Attrs().Index)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(kindAttr, nl.NonZeroTerminated(kind))
	data := info.AddRtAttr(dataAttr, nil)
	for _, s := range settings {
		data.AddChild(s.attr())
	}
	_, err := c.request(unix.RTM_NEWLINK, unix.NLM_F_ACK, msg, info).Execute(unix.NETLINK_ROUTE, 0)
	return err
}
