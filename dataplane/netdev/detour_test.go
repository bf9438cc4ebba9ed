// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/plan"
)

func rule(priority, suppress int, change func(*netlink.Rule)) netlink.Rule {
	r := *netlink.NewRule()
	r.Priority, r.SuppressPrefixlen, r.Table = priority, suppress, 254
	if change != nil {
		change(&r)
	}
	return r
}

// TestFindDetours: rules that have a table's short routes count for nothing are gone round, and no others.
func TestFindDetours(t *testing.T) {
	local, main := rule(0, -1, nil), rule(32766, -1, nil)
	many := []netlink.Rule{local}
	for i := range detours + 3 {
		many = append(many, rule(100+10*i, 0, nil))
	}
	for name, c := range map[string]struct {
		rules []netlink.Rule
		want  string // priority of the rule > that of the one behind it, and table
	}{
		"none":              {[]netlink.Rule{local, main}, ""},
		"wg-quick":          {[]netlink.Rule{local, rule(32764, 0, nil), rule(32765, -1, nil), main}, "32764>32765 4d000001 "},
		"two of one rank":   {[]netlink.Rule{local, rule(500, 0, nil), rule(500, 8, nil), main}, "500>32766 4d000001 500>32766 4d000002 "},
		"nothing is behind": {[]netlink.Rule{local, main, rule(40000, 0, nil)}, ""},
		"of one interface":  {[]netlink.Rule{local, rule(500, 0, func(r *netlink.Rule) { r.IifName = "eth7" }), main}, ""},
		"ours":              {[]netlink.Rule{local, rule(500, 0, func(r *netlink.Rule) { r.Protocol = protocol }), main}, ""},
		"only ours behind":  {[]netlink.Rule{local, rule(500, 0, nil), rule(600, -1, func(r *netlink.Rule) { r.Protocol = protocol }), main}, "500>32766 4d000001 "},
		"before all":        {[]netlink.Rule{rule(0, 0, nil), main}, ""},
		"more than heeded":  {append(many, main), "100>110 4d000001 110>120 4d000002 120>130 4d000003 130>140 4d000004 140>150 4d000005 150>160 4d000006 160>170 4d000007 170>180 4d000008 "},
	} {
		t.Run(name, func(t *testing.T) {
			got := ""
			for _, d := range findDetours(c.rules) {
				got += fmt.Sprintf("%d>%d %x ", d.of.Priority, d.next, d.table)
			}
			if got != c.want {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

// TestDetourRules: first the copy is asked, then what is behind; only of what comes in at lc-host, and with the rule's own conditions.
func TestDetourRules(t *testing.T) {
	of := rule(500, 0, func(r *netlink.Rule) { r.Mark, r.Invert = 51820, true })
	rules := detour{of, detourTable, 600}.rules()
	if len(rules) != 2 {
		t.Fatalf("%d rules", len(rules))
	}
	for _, r := range rules {
		if r.Priority != 499 || r.IifName != plan.HostSide || r.Protocol != protocol || r.Mark != 51820 || !r.Invert || r.SuppressPrefixlen != -1 {
			t.Errorf("rule %+v", r)
		}
	}
	if rules[0].Table != detourTable || rules[1].Table != 0 || rules[1].Goto != 600 {
		t.Errorf("they lead to table %x, and to %d by table %x", rules[0].Table, rules[1].Goto, rules[1].Table)
	}
}
