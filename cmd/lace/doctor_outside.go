// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// surroundings are what the doctor looks at of a host that meets the overlay or the outside.
type surroundings struct {
	plan      *plan.Plan
	agent     bool // it runs
	side      netdev.HostSide
	egresses  []netdev.Egress
	detours   []int // priorities of the IPv6 rules that the agent has added
	published bool  // a port of this node is a container's
}

const outsideFound = "host and outside"

// outsideFindings looks for what hosts and external networks need of this host. None of it matters where the topology has neither.
func outsideFindings(e *env, s conf.Settings) []finding {
	name, p, err := filePlan(e, s.Node, s.Topology)
	switch {
	case err != nil:
		return []finding{{outsideFound, true, "not known without a topology"}}
	case len(p.Externals) == 0 && len(p.HostRoutes) == 0:
		return []finding{{outsideFound, true, "no external network, and no network with host = true, on node " + name}}
	}
	around, err := lookAround(p, s)
	if err != nil {
		return []finding{{outsideFound, false, err.Error()}}
	}
	return slices.Concat([]finding{around.pair()}, around.ways(), []finding{reversePath(), around.settings()}, around.rules())
}

func lookAround(p *plan.Plan, s conf.Settings) (*surroundings, error) {
	dev, err := netdev.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	a := &surroundings{plan: p, agent: agentRuns(s.HookSocket), published: publishes(s.BPFFS)}
	o, err := dev.Outlook(p)
	if err != nil {
		return nil, err
	}
	a.side, a.egresses = o.HostSide(), o.Egresses()
	a.detours, err = dev.Detours()
	return a, err
}

// publishes says whether a port is published; without tables none is.
func publishes(bpffs string) bool {
	m, done, err := hook.OpenMaps(bpffs)
	if err != nil {
		return false
	}
	defer done()
	publishers, err := m.Publishers()
	return err == nil && len(publishers) > 0
}

func (a *surroundings) pair() finding {
	switch {
	case a.side.Stack != 0:
		return finding{outsideFound, true, plan.HostSide + " is there: the host meets the overlay by it"}
	case !a.agent:
		return finding{outsideFound, true, "the agent makes " + plan.HostSide + " when it starts"}
	}
	return finding{outsideFound, false, plan.HostSide + " is not there, so nothing gets from the overlay to the host or out of it, nor back: the agent's log says why; it needs CONFIG_VETH, and the name"}
}

// ways are about the interfaces that lead outside, and the ports and addresses that stand for containers there.
func (a *surroundings) ways() []finding {
	if len(a.plan.Externals) == 0 {
		return nil
	}
	if len(a.egresses) == 0 {
		return []finding{{"ways out", false, "no interface is up that a route leaves by: external networks are out of reach (no_egress)"}}
	}
	all := []finding{a.wayOut()}
	for _, f := range []struct {
		family string
		is     func(netip.Addr) bool
		of     func(netdev.Egress) netip.Addr
	}{
		{"IPv4", netip.Addr.Is4, func(e netdev.Egress) netip.Addr { return e.V4 }},
		{"IPv6", netip.Addr.Is6, func(e netdev.Egress) netip.Addr { return e.V6 }},
	} {
		if !a.masquerades(f.is) || slices.ContainsFunc(a.egresses, func(e netdev.Egress) bool { return f.of(e).IsValid() }) {
			continue
		}
		all = append(all, finding{"masquerade", false, fmt.Sprintf("this host has no %s address that could stand for containers (no_host_address): give an interface one, or leave masquerade = true out where the fabric routes the containers' own", f.family)})
	}
	return append(all, portsFinding(a.plan.Masquerade))
}

func (a *surroundings) wayOut() finding {
	var words []string
	for _, e := range a.egresses {
		words = append(words, fmt.Sprintf("%s (as %s, %s)", e.Name, text(e.V4), text(e.V6)))
	}
	return finding{"ways out", true, strings.Join(words, ", ")}
}

// masquerades says whether containers of a family are masqueraded on this node.
func (a *surroundings) masquerades(is func(netip.Addr) bool) bool {
	return slices.ContainsFunc(a.plan.Peerings, func(p plan.Peering) bool { return p.Masquerade && p.Peer == 0 && is(p.Prefix.Addr()) })
}

// portsFinding says whether the host itself may choose a port that stands for a container, which then would get its answers.
func portsFinding(m topology.Masquerade) finding {
	first, last, err := localPorts()
	if err != nil {
		return finding{"masquerade ports", false, err.Error()}
	}
	if reserved, err := readSetting("net/ipv4/ip_local_reserved_ports"); err == nil && covers(reserved, max(first, m.First), min(last, m.Last)) {
		return finding{"masquerade ports", true, fmt.Sprintf("%s, which the host's own sockets leave free", m)}
	}
	if m.Last < first || last < m.First {
		return finding{"masquerade ports", true, fmt.Sprintf("%s, outside of the host's own %d-%d", m, first, last)}
	}
	return finding{"masquerade ports", false, fmt.Sprintf("%s overlaps the ports %d-%d that the host's own sockets get, so that one may get a container's answers: choose others with ports under [masquerade], or sysctl -w net.ipv4.ip_local_reserved_ports=%[1]s (add those that are in it)", m, first, last)}
}

// localPorts are those that the kernel gives to sockets that ask for none.
func localPorts() (first, last uint16, err error) {
	value, err := readSetting("net/ipv4/ip_local_port_range")
	if err == nil {
		_, err = fmt.Sscan(value, &first, &last)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read which ports the host's own sockets get: %w", err)
	}
	return first, last, nil
}

// covers says whether a list as the kernel writes it, "8080,9000-9999", has all ports of a range. An empty range is not had.
func covers(list string, first, last uint16) bool {
	for _, part := range strings.Split(list, ",") {
		low, high, _ := strings.Cut(part, "-")
		a, err := strconv.ParseUint(low, 10, 16)
		b, err2 := strconv.ParseUint(cmp.Or(high, low), 10, 16)
		if err == nil && err2 == nil && first <= last && uint16(a) <= first && last <= uint16(b) {
			return true
		}
	}
	return false
}

// reversePath only tells: no value of rp_filter is in the way.
func reversePath() finding {
	all, err := readSetting("net/ipv4/conf/all/rp_filter")
	own, err2 := readSetting("net/ipv4/conf/" + plan.HostSide + "/rp_filter")
	if err != nil || err2 != nil {
		return finding{"rp_filter", true, "any value will do: what comes out of lc-host has its route back by it, and answers from outside are taken before the check"}
	}
	return finding{"rp_filter", true, fmt.Sprintf("all %s, lc-host %s, and any value will do: what comes out of lc-host has its route back by it, and answers from outside are taken before the check", all, own)}
}

// setting is a sysctl that the agent sets, below net.
type setting struct {
	name, value string
	needed      bool // now
}

// settings lists what the agent has set, and what somebody has set back.
func (a *surroundings) settings() finding {
	pair := a.side.Stack != 0
	var words, lost []string
	for _, s := range []setting{
		{"ipv4.conf.lc-host.forwarding", "1", pair}, {"ipv6.conf.lc-host.forwarding", "1", pair}, {"ipv6.conf.lc-host.accept_ra", "0", pair},
		{"ipv4.conf.lo.accept_local", "1", pair && a.published}, {"ipv4.conf.lo.route_localnet", "1", pair && a.published},
	} {
		now, err := readSetting("net/" + strings.ReplaceAll(s.name, ".", "/"))
		switch {
		case err != nil || !s.needed: // without IPv6, say
		case now == s.value:
			words = append(words, "net."+s.name+"="+now)
		default:
			lost = append(lost, "net."+s.name+"="+s.value)
		}
	}
	switch {
	case len(lost) > 0:
		return finding{"sysctls", false, "somebody has set back what the agent needs: sysctl -w " + strings.Join(lost, " ")}
	case len(words) == 0:
		return finding{"sysctls", true, "none is set"}
	}
	return finding{"sysctls", true, strings.Join(words, " ") + "; `lace uninstall` undoes them (what those of lo were is in lc-host's alias: ip link show lc-host)"}
}

// rules lists those that the agent has added; most hosts need none.
func (a *surroundings) rules() []finding {
	if len(a.detours) == 0 {
		return nil
	}
	return []finding{{"rules", true, fmt.Sprintf("IPv6 rules %v for iif lc-host, beside the host's own with suppress_prefixlength; `lace uninstall` removes them", a.detours)}}
}

// readSetting reads a file below /proc/sys, of this network namespace.
func readSetting(path string) (string, error) {
	b, err := os.ReadFile(filepath.Join("/proc/sys", path))
	return strings.TrimSpace(string(b)), err
}
