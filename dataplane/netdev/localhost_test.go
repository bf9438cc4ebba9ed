// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/lace-net/lace/dataplane/plan"
)

// loopbackIs compares the settings of lo: accept_local, then route_localnet.
func loopbackIs(t *testing.T, c *conn, acceptLocal, routeLocalnet int32) {
	t.Helper()
	sysctlIs(t, c, map[string]int32{"ipv4/conf/lo/accept_local": acceptLocal, "ipv4/conf/lo/route_localnet": routeLocalnet})
}

func setLoopback(t *testing.T, c *conn, acceptLocal, routeLocalnet int) {
	t.Helper()
	must(t, c.sysctl("ipv4/conf/lo/accept_local", fmt.Sprint(acceptLocal)))
	must(t, c.sysctl("ipv4/conf/lo/route_localnet", fmt.Sprint(routeLocalnet)))
}

func TestLocalhost(t *testing.T) {
	h, c, _ := hostNode(t)
	p, o := withHost(testPlan()), Options{MTU: uplinkMTU}
	must(t, errorOf(h.Apply(p, o)))
	setLoopback(t, c, 0, 1) // one of them was the administrator's wish
	for range 2 {
		must(t, h.Localhost(true))
		loopbackIs(t, c, 1, 1)
	}
	if alias := mustLink(t, c, plan.HostSide).Attrs().Alias; alias != "lace host accept_local=0 route_localnet=1" {
		t.Errorf("the alias is %q", alias)
	}
	changes, err := h.Apply(p, o)
	noChanges(t, changes, err)
	for range 2 {
		must(t, h.Localhost(false))
		loopbackIs(t, c, 0, 1)
	}
	wantHostPair(t, h, c)
	sysctlIs(t, c, map[string]int32{"ipv4/conf/all/accept_local": 0, "ipv4/conf/all/route_localnet": 0})
}

// Whatever takes the pair away, and whichever agent, lo is afterwards as it was.
func TestLocalhostIsUndone(t *testing.T) {
	o := Options{MTU: uplinkMTU}
	for name, undo := range map[string]func(t *testing.T, h *Handle, c *conn) error{
		"the plan needs no pair any more": func(_ *testing.T, h *Handle, _ *conn) error { return errorOf(h.Apply(testPlan(), o)) },
		"uninstalled":                     func(_ *testing.T, h *Handle, _ *conn) error { return h.Remove() },
		"nothing published any more":      func(_ *testing.T, h *Handle, _ *conn) error { return h.Localhost(false) },
		"somebody removed the pair": func(t *testing.T, h *Handle, c *conn) error {
			must(t, c.LinkDel(mustLink(t, c, plan.HostSide)))
			return h.Remove()
		},
		"the pair was made anew": func(t *testing.T, h *Handle, c *conn) error {
			must(t, c.LinkDel(mustLink(t, c, plan.HostSide)))
			must(t, errorOf(h.Apply(withHost(testPlan()), o)))
			if alias := mustLink(t, c, plan.HostSide).Attrs().Alias; !strings.HasSuffix(alias, "route_localnet=0") {
				t.Errorf("the alias is %q", alias)
			}
			return h.Localhost(false)
		},
		"a peer that was renamed": func(t *testing.T, h *Handle, c *conn) error {
			must(t, c.LinkSetDown(mustLink(t, c, plan.HostPeer))) // else old kernels refuse
			must(t, c.LinkSetName(mustLink(t, c, plan.HostPeer), "x0"))
			must(t, errorOf(h.Apply(withHost(testPlan()), o)))
			return h.Localhost(false)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := newNetns(t)
			h, c := openTest(t, path), dialTest(t, path)
			must(t, errorOf(h.Apply(withHost(testPlan()), o)))
			must(t, h.Localhost(true))
			loopbackIs(t, c, 1, 1)
			if !strings.Contains(name, "somebody") && !strings.Contains(name, "anew") {
				h = openTest(t, path) // an agent that was not there
			}
			must(t, undo(t, h, c))
			loopbackIs(t, c, 0, 0)
		})
	}
}

// What somebody switched off meanwhile, though published ports need it, is switched on again; what he set otherwise is his when we go.
func TestLocalhostLeavesWhatIsNotItsOwn(t *testing.T) {
	h, c, _ := hostNode(t)
	must(t, h.Localhost(true)) // there is no pair: nobody could come in
	loopbackIs(t, c, 0, 0)
	must(t, errorOf(h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})))
	must(t, h.Localhost(true))
	setLoopback(t, c, 0, 1)
	must(t, h.Localhost(true))
	loopbackIs(t, c, 1, 1)
	setLoopback(t, c, 2, 1) // the kernel takes any number
	must(t, h.Localhost(false))
	loopbackIs(t, c, 2, 0)
}

func TestHostAlias(t *testing.T) {
	for alias, want := range map[string]loopbackWas{
		"lace host": nil,
		"lace host accept_local=0 route_localnet=1":   {"accept_local": 0, "route_localnet": 1},
		"lace host route_localnet=-2":                 {"route_localnet": -2},
		"lace host colour=1 accept_local=0":           {"accept_local": 0},
		"lace host accept_local=yes route_localnet=":  nil,
		"lace host accept_local=99999999999999999999": nil,
	} {
		if got := readLoopbackWas(alias); !maps.Equal(got, want) || (got == nil) != (want == nil) {
			t.Errorf("%q says %v, want %v", alias, got, want)
		}
	}
	was := loopbackWas{"route_localnet": 1, "accept_local": 0}
	if got := readLoopbackWas(was.alias()); !maps.Equal(got, was) {
		t.Errorf("%q says %v", was.alias(), got)
	}
}

func TestMissingSysctl(t *testing.T) {
	_, c := host(t)
	if v, ok, err := c.readSysctl("ipv4/conf/lo/no_such_thing"); v != 0 || ok || err != nil {
		t.Errorf("%d, %v, %v", v, ok, err)
	}
	if _, _, err := c.readSysctl("ipv4/conf"); err == nil {
		t.Error("a directory could be read")
	}
}
