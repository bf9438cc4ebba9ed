// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/netdev"
)

// site is a program that an interface has.
type site struct {
	program hook.Program
	what    string // the interface, in errors: "uplink eth0"; empty: one that may go at any time, as the watch tells
	port    bool   // it loses its program with the port
}

// portSites are those of the ports, strays among them, by interface: without a program the host would take their packets.
func (w *wiring) portSites() map[int]site {
	sites := map[int]site{}
	for _, s := range w.strays {
		sites[s.ifindex] = site{program: programOf(s.network), port: true}
	}
	for _, c := range w.ports {
		sites[c.ifindex] = site{program: programOf(c.Type), port: true}
	}
	return sites
}

// sites are all interfaces that have a program, by index. An uplink's program serves packets of the outside, too.
func (d *Dataplane) sites(w wiring, uplinks []netdev.Uplink, h hostState) (map[int]site, error) {
	sites := map[int]site{}
	for _, e := range h.egresses {
		sites[e.Index] = site{program: choose(e.Raw, hook.OuterRaw, hook.Outer)}
	}
	for _, u := range uplinks {
		sites[u.Index] = site{program: choose(u.Raw, hook.UplinkRaw, hook.Uplink), what: "uplink " + u.Name}
	}
	if h.side.Stack != 0 {
		sites[h.side.Peer] = site{program: hook.Host, what: "the host's way into the overlay"}
	}
	if w.servesLoopback(h) {
		sites[h.side.Loopback] = site{program: hook.Loopback, what: "the host's way to published ports"}
	}
	_, far, err := d.dev.Segmenter()
	if far != 0 {
		sites[far] = site{program: hook.Segmented, what: "segmenter"}
	}
	for ifindex, s := range w.portSites() {
		sites[ifindex] = s
	}
	return sites, err
}

func choose(raw bool, yes, no hook.Program) hook.Program {
	if raw {
		return yes
	}
	return no
}

// attachAll puts the programs of this agent in place of older ones, everywhere, and tells them what the host is. Where one fails
// the others are committed all the same: Commit keeps the older tail calls of an interface that could not get the new program.
func (d *Dataplane) attachAll() error {
	host, err := d.readHost(d.plan)
	if err != nil {
		host = d.host // as it was
	}
	sites, err2 := d.sites(d.wiring, d.uplinks, host)
	attached, keep, err3 := d.attachTo(sites)
	if err := errors.Join(err, err2); err != nil { // what is not in sites may have to stay
		return errors.Join(err, err3)
	}
	if d.host.addresses == nil {
		d.inherit(host)
	}
	err4 := d.writeHost(host, attached)
	err5 := d.dev.Localhost(d.publishes())
	err6 := d.leave(sites)
	d.host = host
	return errors.Join(err3, err4, err5, err6, d.hooks.Commit(keep))
}

// inherit takes over where an earlier agent may have put programs that are wanted no more. Links are pinned, so that Commit knows them; filters are not.
func (d *Dataplane) inherit(h hostState) {
	if d.hooks.TCX() {
		return
	}
	d.attached[h.side.Loopback] = true
	for _, ifindex := range h.addresses {
		d.attached[ifindex] = true
	}
}

// attachTo puts programs on interfaces. keep are those that are there, attached those of them that have their program.
func (d *Dataplane) attachTo(sites map[int]site) (attached, keep map[int]bool, err error) {
	attached, keep = map[int]bool{}, map[int]bool{}
	var errs []error
	for ifindex, s := range sites {
		err := d.hooks.Attach(ifindex, s.program)
		switch {
		case err == nil:
			attached[ifindex] = true
			if !s.port {
				d.attached[ifindex] = true
			}
		case s.what == "" && (errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOLINK)):
			d.log.Debug("an interface has just gone", "ifindex", ifindex, "err", err)
			continue
		case s.what != "":
			err = fmt.Errorf("%s: %w", s.what, err)
		}
		keep[ifindex] = true
		errs = append(errs, err)
	}
	return attached, keep, errors.Join(errs...)
}

// leave takes the programs off what had one and is to have none any more.
func (d *Dataplane) leave(sites map[int]site) error {
	var errs []error
	for ifindex := range d.attached {
		if _, stays := sites[ifindex]; !stays {
			errs = append(errs, d.hooks.Detach(ifindex))
			delete(d.attached, ifindex)
		}
	}
	return errors.Join(errs...)
}
