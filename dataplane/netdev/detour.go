// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// The kernel's bpf_fib_lookup does not heed "suppress_prefixlength" in IPv6 rules, by which VPNs (wg-quick) have the default route of a
// table count for nothing: packets of containers would leave beside the tunnel. For what comes in at lc-host, which is what the programs ask about,
// each such rule has two of ours before it: one looks into a copy of its table that lacks the short routes, and one goes on behind it.
const (
	detourTable = 0x4d000001 // of the first; above those of all networks and of ProbeVRF's
	detours     = 8          // such rules that are heeded
	detourLimit = 4096       // routes that are copied of one
)

// detour is what stands for one rule.
type detour struct {
	of    netlink.Rule
	table int
	next  int // priority of the rule behind it
}

// findDetours finds the rules that need one, by priority.
func findDetours(rules []netlink.Rule) []detour {
	var all []detour
	for i, r := range rules {
		if r.SuppressPrefixlen < 0 || r.Protocol == protocol || r.IifName != "" || r.Priority == 0 || len(all) == detours {
			continue
		}
		behind := slices.IndexFunc(rules[i:], func(n netlink.Rule) bool { return n.Priority > r.Priority && n.Protocol != protocol })
		if behind < 0 {
			continue // nothing is left to ask, so that its default route is as good as none
		}
		all = append(all, detour{r, detourTable + len(all), rules[i+behind].Priority})
	}
	return all
}

// rules are those that stand before it.
func (d detour) rules() []netlink.Rule {
	look := d.of
	look.Priority--
	look.IifName, look.Protocol, look.SuppressPrefixlen, look.Table = plan.HostSide, protocol, -1, d.table
	goOn := look
	goOn.Table, goOn.Goto = 0, d.next
	return []netlink.Rule{look, goOn}
}

// detours are those of the host now, as far as the plan lets packets leave; and the rules of ours that there are.
func (a *applier) detours(p *plan.Plan) (all []detour, ours []netlink.Rule, err error) {
	rules, err := list(func() ([]netlink.Rule, error) { return a.host.RuleList(netlink.FAMILY_V6) })
	if err != nil {
		return nil, nil, fmt.Errorf("list the IPv6 rules: %w", err)
	}
	slices.SortStableFunc(rules, func(a, b netlink.Rule) int { return a.Priority - b.Priority })
	for _, r := range rules {
		if r.Protocol == protocol && r.IifName == plan.HostSide {
			ours = append(ours, r)
		}
	}
	if a.stack == nil || len(p.Externals) == 0 {
		return nil, ours, nil
	}
	return findDetours(rules), ours, nil
}

// detourRoutes copy the tables.
func (a *applier) detourRoutes(all []detour) ([]route, error) {
	var rs []route
	for _, d := range all {
		rows, err := list(func() ([]netlink.Route, error) {
			return a.host.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: d.of.Table}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, fmt.Errorf("list the routes of table %d: %w", d.of.Table, err)
		}
		if len(rows) > detourLimit {
			return nil, fmt.Errorf("IPv6 rule %d has the default route of table %d count for nothing, which has %d routes: more than the %d that can be copied for containers; let the rule name a smaller table",
				d.of.Priority, d.of.Table, len(rows), detourLimit)
		}
		for _, row := range rows {
			rs = d.copyRoute(rs, row)
		}
	}
	return rs, nil
}

func (d detour) copyRoute(rs []route, row netlink.Route) []route {
	r := fromNetlink(row)
	r.table = d.table
	takesPart := row.Protocol != protocol && r.dst.IsValid() && r.dst.Bits() > d.of.SuppressPrefixlen &&
		!r.dst.Addr().IsMulticast() && !r.dst.Addr().IsLinkLocalUnicast() && row.Type <= unix.RTN_PROHIBIT
	if !takesPart || slices.ContainsFunc(rs, r.same) {
		return rs
	}
	return append(rs, r)
}

// syncDetours makes the rules of ours those of the detours, whose tables are written.
func (a *applier) syncDetours(all []detour, ours []netlink.Rule) error {
	var want []netlink.Rule
	for _, d := range all {
		want = append(want, d.rules()...)
	}
	if slices.EqualFunc(want, ours, sameRule) {
		return nil
	}
	errs := []error{a.host.removeRules(ours)}
	for i := range want {
		r := &want[i]
		what := fmt.Sprintf("IPv6 rule %d from all iif %s, before one with suppress_prefixlength", r.Priority, r.IifName)
		errs = append(errs, a.do(what, "add", func() error { return a.host.RuleAdd(r) }))
	}
	return errors.Join(errs...)
}

func sameRule(a, b netlink.Rule) bool {
	return a.Priority == b.Priority && a.Table == b.Table && a.Goto == b.Goto && a.Mark == b.Mark && a.Invert == b.Invert &&
		a.Src.String() == b.Src.String() && a.Dst.String() == b.Dst.String()
}

func (c *conn) removeRules(all []netlink.Rule) error {
	var errs []error
	for i := range all {
		err := c.RuleDel(&all[i])
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove IPv6 rule %d: %w", all[i].Priority, err))
		}
	}
	return errors.Join(errs...)
}

// removeDetours takes the rules of ours away, as their routes go with all others.
func (h *Handle) removeDetours() error {
	_, ours, err := (&applier{Handle: h}).detours(&plan.Plan{})
	return errors.Join(err, h.host.removeRules(ours))
}
