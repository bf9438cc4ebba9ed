// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/plan"
)

// loopbackSettings are the net.ipv4.conf.lo values that are 1 while a port is published: the host's own packets to such a port leave
// lo and their answers come back by it, from an address of this host's (accept_local) or to 127.0.0.1 (route_localnet).
var loopbackSettings = []string{"accept_local", "route_localnet"}

func loopbackPath(name string) string { return "ipv4/conf/lo/" + name }

// loopbackWas holds what loopbackSettings were before; it lacks those that the kernel lacks.
type loopbackWas map[string]int32

// alias is that of lc-host: "lace host accept_local=0 route_localnet=0", or the first two words where nothing was changed.
func (w loopbackWas) alias() string {
	alias := hostAlias
	for _, name := range loopbackSettings {
		if value, ok := w[name]; ok {
			alias += fmt.Sprintf(" %s=%d", name, value)
		}
	}
	return alias
}

// readLoopbackWas reads an alias, nil where it remembers nothing. Words that this agent does not know are another's.
func readLoopbackWas(alias string) loopbackWas {
	var w loopbackWas
	words := strings.TrimPrefix(alias, hostAlias)
	for _, name := range loopbackSettings {
		for _, word := range strings.Fields(words) {
			value, ok := strings.CutPrefix(word, name+"=")
			n, err := strconv.ParseInt(value, 10, 32)
			if !ok || err != nil {
				continue
			}
			if w == nil {
				w = loopbackWas{}
			}
			w[name] = int32(n)
		}
	}
	return w
}

// Localhost lets the host itself reach published ports by lo, or no more: it sets net.ipv4.conf.lo.accept_local and route_localnet to 1,
// and back to what they were. That is remembered in lc-host's alias. Without lc-host there is nothing that the host may reach, and nothing
// is switched on.
func (h *Handle) Localhost(on bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, _, err := h.host.pair(plan.HostSide, plan.HostPeer)
	switch {
	case err != nil:
		return err
	case !on:
		return h.giveBackLoopback(h.recorder(), l)
	case l == nil:
		return nil
	}
	return h.takeLoopback(h.recorder(), l)
}

// takeLoopback writes down what is there before it changes it, so that a later agent can undo it.
func (h *Handle) takeLoopback(r *recorder, l netlink.Link) error {
	was := h.loopbackWas(l)
	now, err := h.readLoopback()
	if err != nil {
		return err
	}
	if was == nil {
		was = now
	}
	if err := (&device{conn: h.host, recorder: r, Link: l}).alias(was.alias()); err != nil {
		return err
	}
	h.loopback = was
	var errs []error
	for name, value := range now {
		if value != 1 {
			errs = append(errs, h.setLoopback(r, name, 1))
		}
	}
	return errors.Join(errs...)
}

// giveBackLoopback restores what is still as takeLoopback left it, and forgets it when all is restored. l is lc-host, nil where it is gone.
func (h *Handle) giveBackLoopback(r *recorder, l netlink.Link) error {
	was := h.loopbackWas(l)
	if was == nil {
		return nil
	}
	now, err := h.readLoopback()
	if err != nil {
		return err
	}
	var errs []error
	for name, value := range was {
		if now[name] == 1 && value != 1 {
			errs = append(errs, h.setLoopback(r, name, value))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	h.loopback = nil
	if l == nil || !owned(l) {
		return nil
	}
	return (&device{conn: h.host, recorder: r, Link: l}).alias(hostAlias)
}

func (h *Handle) loopbackWas(l netlink.Link) loopbackWas {
	if l != nil && owned(l) {
		if was := readLoopbackWas(l.Attrs().Alias); was != nil {
			return was
		}
	}
	return h.loopback
}

func (h *Handle) readLoopback() (loopbackWas, error) {
	now := loopbackWas{}
	for _, name := range loopbackSettings {
		value, ok, err := h.host.readSysctl(loopbackPath(name))
		if err != nil {
			return nil, err
		}
		if ok {
			now[name] = value
		}
	}
	return now, nil
}

func (h *Handle) setLoopback(r *recorder, name string, value int32) error {
	err := r.do("lo", fmt.Sprintf("set IPv4 %s %d", name, value), func() error { return h.host.sysctl(loopbackPath(name), fmt.Sprint(value)) })
	if err != nil {
		return fmt.Errorf("%w; set it by hand: sysctl -w net.ipv4.conf.lo.%s=%d", err, name, value)
	}
	return nil
}
