// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	vrfRulePriority = 1000 // as the kernel numbers its own
	ruleHeader      = 12   // struct fib_rule_hdr
	frActToTable    = 1
	fraL3mdev       = 19
	fraProtocol     = 21
)

// vrfRule is a rule that looks a packet of a VRF up in the VRF's table.
type vrfRule struct {
	family   int
	priority uint64
	ours     bool
}

// vrfRules lists the l3mdev rules of one family.
func (c *conn) vrfRules(family int) ([]vrfRule, error) {
	rows, err := list(func() ([][]byte, error) {
		return c.request(unix.RTM_GETRULE, unix.NLM_F_DUMP, &nl.RtMsg{RtMsg: unix.RtMsg{Family: uint8(family)}}).
			Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
	})
	if err != nil {
		return nil, fmt.Errorf("list the rules: %w", err)
	}
	var rules []vrfRule
	for _, row := range rows {
		if len(row) < ruleHeader {
			continue
		}
		at, err := parseAttributes(row[ruleHeader:])
		if on, _ := at.number(fraL3mdev); err != nil || on == 0 {
			continue
		}
		proto, _ := at.number(fraProtocol)
		priority, _ := at.number(nl.FRA_PRIORITY)
		rules = append(rules, vrfRule{family, priority, proto == protocol})
	}
	return rules, nil
}

// ensureVRFRules adds the rules without which a VRF's table is not looked at. The kernel adds
// them itself with the first VRF of a network namespace, and never again when somebody removed them.
func (h *Handle) ensureVRFRules(r *recorder) error {
	return each(
		func() error { return h.ensureVRFRule(r, unix.AF_INET) },
		func() error { return h.ensureVRFRule(r, unix.AF_INET6) },
	)
}

func (h *Handle) ensureVRFRule(r *recorder, family int) error {
	rules, err := h.host.vrfRules(family)
	if err != nil || len(rules) > 0 {
		return err
	}
	what := fmt.Sprintf("rule %d from all lookup [l3mdev-table], family %d", vrfRulePriority, family)
	return r.do(what, "add", func() error {
		return h.host.changeVRFRule(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, family, vrfRulePriority)
	})
}

// removeVRFRules removes those that ensureVRFRules added.
func (h *Handle) removeVRFRules() error {
	var errs []error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := h.host.vrfRules(family)
		errs = append(errs, err)
		for _, r := range rules {
			if r.ours {
				errs = append(errs, h.host.changeVRFRule(unix.RTM_DELRULE, 0, family, r.priority))
			}
		}
	}
	return errors.Join(errs...)
}

func (c *conn) changeVRFRule(kind, flags, family int, priority uint64) error {
	msg := &nl.RtMsg{RtMsg: unix.RtMsg{Family: uint8(family), Type: frActToTable}}
	_, err := c.request(kind, flags|unix.NLM_F_ACK, msg,
		nl.NewRtAttr(nl.FRA_PRIORITY, nl.Uint32Attr(uint32(priority))),
		nl.NewRtAttr(fraL3mdev, []byte{1}),
		nl.NewRtAttr(fraProtocol, []byte{protocol}),
	).Execute(unix.NETLINK_ROUTE, 0)
	return err
}
