// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/vishvananda/netlink"
)

const (
	// protocol marks routes, neighbours and rules as ours (rtm_protocol, NDA_PROTOCOL,
	// FRA_PROTOCOL). The number is in no rt_protos file; its letter is L.
	protocol = 0x4c

	// group marks our links from the instant of their creation. The alias, which tells whose they
	// are, can only be set by a second request: a link with our name and group and without an
	// alias was being made when the agent died.
	group = 0x4c616365

	// leaving marks links that go together, by one request.
	leaving = group + 1

	networkAlias   = "lace network="
	portAlias      = "lace port="
	segmenterAlias = "lace segmenter"
	hostAlias      = "lace host" // that of lc-host goes on with what Localhost changed
)

// role is what a link of ours is for, told by its name.
type role int

const (
	roleNone role = iota
	roleVRF
	roleBridge
	roleHeadroom
	rolePort
	roleSegmenter
	roleHost
)

// names holds, per role, the form of the name, the kernel's kind of link and the start of the alias.
var names = map[role]struct {
	form  *regexp.Regexp
	kind  string
	alias string
}{
	roleVRF:       {regexp.MustCompile(`^lacev([0-9]{1,8}|probe)$`), "vrf", networkAlias},
	roleBridge:    {regexp.MustCompile(`^laceb[0-9]{1,8}$`), "bridge", networkAlias},
	roleHeadroom:  {regexp.MustCompile(`^lacer[0-9]{1,8}$`), "vxlan", networkAlias},
	rolePort:      {regexp.MustCompile(`^lace[0-9a-f]{11}$`), "veth", portAlias},
	roleSegmenter: {regexp.MustCompile(`^laces[01]$`), "veth", segmenterAlias},
	roleHost:      {regexp.MustCompile(`^lc-host(-peer)?$`), "veth", hostAlias},
}

func roleOf(name string) role {
	for r, n := range names {
		if n.form.MatchString(name) {
			return r
		}
	}
	return roleNone
}

// owned reports whether a link is ours: the name, the kind and the alias all say so.
func owned(l netlink.Link) bool {
	n, ok := names[roleOf(l.Attrs().Name)]
	return ok && l.Type() == n.kind && (strings.HasPrefix(l.Attrs().Alias, n.alias) || halfMade(l))
}

// halfMade reports a link of ours that did not live to get its alias.
func halfMade(l netlink.Link) bool {
	return l.Attrs().Alias == "" && l.Attrs().Group == group
}

// adopted reads the alias of a device that was given by name: somebody else's, which we only borrow. ok is false for any
// other link; one with an alias that this agent cannot read is not ours to change.
func adopted(l netlink.Link) (lb label, ok bool) {
	if roleOf(l.Attrs().Name) != roleNone {
		return label{}, false
	}
	lb, err := decodeAlias(l.Attrs().Alias)
	return lb, err == nil && lb.Device != ""
}

// ForeignError is an object that has a name of ours but is not ours. It is never touched.
type ForeignError struct {
	Object string // "interface laceb100"
	Why    string // "a dummy without Lace's alias"
	Fix    string
}

func (e *ForeignError) Error() string {
	return fmt.Sprintf("%s is in the way: it is %s, so it is not Lace's; %s", e.Object, e.Why, e.Fix)
}

// foreign is the error about a link with our name that owned does not accept.
func foreign(l netlink.Link) error {
	a := l.Attrs()
	why := fmt.Sprintf("a %s without Lace's alias", l.Type())
	if a.Alias != "" {
		why = fmt.Sprintf("a %s with alias %q", l.Type(), a.Alias)
	}
	return &ForeignError{
		Object: "interface " + a.Name,
		Why:    why,
		Fix:    fmt.Sprintf("rename or remove it (ip link del %s)", a.Name),
	}
}
