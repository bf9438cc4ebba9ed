// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	watchQuiet = 100 * time.Millisecond // no more events for so long: the change is over
	watchLimit = time.Second            // … but a change is reported after this at the latest
	watchRetry = time.Second            // before a broken subscription is made anew
)

// Watch calls changed, one call at a time and coalesced, when the uplinks, next hops, egresses or the host's addresses may have
// become others: links (not our own), addresses, routes and rules (not our own), and the gateways of the last Nexthops. It also calls
// when somebody else forbids lc-host to forward, as who changes the setting of all interfaces does, and
// once when it has begun to listen, and when it may have missed something. It returns when ctx ends, or when it cannot subscribe at all.
func (h *Handle) Watch(ctx context.Context, changed func()) error {
	s, err := h.subscribe()
	if err != nil {
		return err
	}
	dirty := make(chan struct{}, 1)
	mark(dirty)
	done := make(chan struct{})
	go func() {
		defer close(done)
		report(ctx, dirty, changed)
	}()
	defer func() { <-done }()
	for ctx.Err() == nil {
		err := h.listen(ctx, s, dirty)
		if ctx.Err() != nil {
			break
		}
		h.log.Warn("the kernel's notices were interrupted, subscribing again", "err", err)
		mark(dirty)
		s = h.resubscribe(ctx, s)
	}
	return nil
}

var watchGroups = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
}

func (h *Handle) subscribe() (s *nl.NetlinkSocket, err error) {
	err = inNetns(h.host.ns, func() error {
		s, err = nl.SubscribeAt(netns.None(), netns.None(), unix.NETLINK_ROUTE, watchGroups...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("subscribe to the kernel's notices: %w", err)
	}
	return s, nil
}

// resubscribe replaces a broken subscription; between tries it waits.
func (h *Handle) resubscribe(ctx context.Context, old *nl.NetlinkSocket) *nl.NetlinkSocket {
	old.Close()
	for {
		s, err := h.subscribe()
		if err == nil {
			return s
		}
		h.log.Warn("cannot subscribe again", "err", err)
		select {
		case <-ctx.Done():
			return old
		case <-time.After(watchRetry):
		}
	}
}

// listen reads notices until the subscription breaks or ctx ends, and closes it in the latter case.
func (h *Handle) listen(ctx context.Context, s *nl.NetlinkSocket, dirty chan<- struct{}) error {
	stop := context.AfterFunc(ctx, s.Close)
	defer stop()
	for {
		messages, _, err := s.Receive()
		if errors.Is(err, unix.ENOBUFS) { // more came than the socket holds: look at everything
			mark(dirty)
			continue
		}
		if err != nil {
			return err
		}
		for i := range messages {
			if h.matters(&messages[i]) {
				mark(dirty)
			}
		}
	}
}

func mark(dirty chan<- struct{}) {
	select {
	case dirty <- struct{}{}:
	default:
	}
}

// report calls changed after each burst of marks.
func report(ctx context.Context, dirty <-chan struct{}, changed func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-dirty:
		}
		settle(ctx, dirty)
		if ctx.Err() == nil {
			changed()
		}
	}
}

// settle waits for a burst to end.
func settle(ctx context.Context, dirty <-chan struct{}) {
	limit := time.After(watchLimit)
	for {
		select {
		case <-ctx.Done():
			return
		case <-limit:
			return
		case <-dirty:
		case <-time.After(watchQuiet):
			return
		}
	}
}

// matters tells the notices that something to the outside may depend on from the many that a busy
// host makes. One that cannot be read matters.
func (h *Handle) matters(m *syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return linkMatters(m.Data)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return routeMatters(m.Data)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return h.neighbourMatters(m.Header.Type, m.Data)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return true
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return ruleMatters(m.Data)
	case unix.RTM_NEWNETCONF:
		return h.settingMatters(m.Data)
	}
	return false
}

// linkMatters leaves out our own links: each container brings a burst of notices about its port.
func linkMatters(b []byte) bool {
	if len(b) < unix.SizeofIfInfomsg || b[0] == unix.AF_BRIDGE {
		return len(b) < unix.SizeofIfInfomsg
	}
	at, err := parseAttributes(b[unix.SizeofIfInfomsg:])
	return err != nil || roleOf(trimNul(at[unix.IFLA_IFNAME])) == roleNone
}

// routeMatters leaves out our own routes and those of tables that no next hop is looked up in.
func routeMatters(b []byte) bool {
	if len(b) < unix.SizeofRtMsg {
		return true
	}
	table, proto, flags := b[4], b[5], binary.NativeEndian.Uint32(b[8:])
	return proto != protocol && table != unix.RT_TABLE_LOCAL && flags&unix.RTM_F_CLONED == 0
}

// ruleMatters leaves out our own rules.
func ruleMatters(b []byte) bool {
	if len(b) < ruleHeader {
		return true
	}
	at, err := parseAttributes(b[ruleHeader:])
	proto, _ := at.number(fraProtocol)
	return err != nil || proto != protocol
}

// Of linux/netconf.h: a netconfmsg is one byte, the family, and its padding.
const (
	netconfHeader     = 4
	netconfIfindex    = 1
	netconfForwarding = 2
)

// settingMatters is true where lc-host does not forward any more.
func (h *Handle) settingMatters(b []byte) bool {
	if len(b) < netconfHeader {
		return true
	}
	at, err := parseAttributes(b[netconfHeader:])
	index, _ := at.number(netconfIfindex)
	forwarding, told := at.number(netconfForwarding)
	return err != nil || told && forwarding == 0 && int64(index) == h.stack.Load()
}

// neighbourMatters is true where a gateway's MAC became known, another or unknown since Nexthops
// reported it. An entry that goes from reachable to stale and back, as they do all the time, does not matter.
func (h *Handle) neighbourMatters(kind uint16, b []byte) bool {
	k, n, ok := parseNeighbour(b)
	if !ok {
		return false
	}
	if kind == unix.RTM_DELNEIGH {
		n = neighbour{}
	}
	h.gatewaysMu.Lock()
	defer h.gatewaysMu.Unlock()
	last, kept := h.gateways[k]
	return kept && !last.same(n)
}
