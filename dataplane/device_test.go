// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
)

// makeTap makes a tap that stays without a virtual machine behind it.
func makeTap(name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP})
}

func (b *bed) attachDevice(r DeviceRequest) (p Port, err error) {
	err = b.in(func() error {
		p, err = b.d.AttachDevice(context.Background(), r)
		return err
	})
	return p, err
}

func (b *bed) mustAttachDevice(r DeviceRequest) Port {
	b.t.Helper()
	p, err := b.attachDevice(r)
	must(b.t, err)
	return p
}

func (b *bed) mustDetachDevice(name string) {
	b.t.Helper()
	must(b.t, b.in(func() error { return b.d.DetachDevice(context.Background(), name) }))
}

// alias reads that of an interface of the node.
func (b *bed) alias(name string) (alias string, master int) {
	b.t.Helper()
	must(b.t, b.in(func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			alias, master = l.Attrs().Alias, l.Attrs().MasterIndex
		}
		return err
	}))
	return alias, master
}

// TestDevices: a tap and a veth end join a network, stay in it over agents, and are given back as they were.
func TestDevices(t *testing.T) {
	b := newBed(t)
	devices := map[string]func() error{"vm0": func() error { return makePair("vm0", "vm0far") }}
	if _, err := os.Stat("/dev/net/tun"); err == nil {
		devices["tap0"] = func() error { return makeTap("tap0") }
	} else {
		t.Logf("no tap is tried: %v", err)
	}
	top := parse(t, lan, machine)
	b.open(top)
	for name, make := range devices {
		t.Run(name, func(t *testing.T) {
			must(t, b.in(make))
			p := b.mustAttachDevice(DeviceRequest{Device: name, Network: "lan", MAC: plan.MAC{0x52, 0x54, 0, 0, 0, 0x77}})
			if p.HostIf != name || p.Device != name || p.Container != "device/"+name || p.MTU != 1500 || !p.V4.IsValid() || p.MAC[5] != 0x77 {
				t.Errorf("the port is %+v", p)
			}
			row, ok := b.stationOf(p)
			if !ok || row.Flags != uint32(bpf.LaceEndpointFlagsENDPOINT_DIRECT) || row.Ifindex != uint32(p.Ifindex) || row.Mtu != 1500 {
				t.Errorf("its station is %+v, %v", row, ok)
			}
			again := b.mustAttachDevice(DeviceRequest{Device: name, Network: "lan", MAC: p.MAC})
			if again.V4 != p.V4 {
				t.Errorf("it had %s, and has %s", p.V4, again.V4)
			}
			b.reopen(top)
			must(t, b.in(func() error { return b.d.Retain(context.Background(), nil) }))
			if ports, _ := b.d.Attached("device/" + name); len(ports) != 1 || ports[0].V4 != p.V4 || ports[0].Device != name || ports[0].MTU != 1500 {
				t.Errorf("the next agent has %+v", ports)
			}
			for range 2 {
				b.mustDetachDevice(name)
				if alias, master := b.alias(name); alias != "" || master != 0 {
					t.Errorf("it is left with alias %q and master %d", alias, master)
				}
			}
			if _, ok := b.stationOf(p); ok || !b.d.pools[500].empty() || len(b.d.ports) != 0 {
				t.Errorf("its station (%v), lease or port is left", ok)
			}
			must(t, b.in(func() error { return removeLink(name) }))
		})
	}
}

// TestDeviceVanishes: it is forgotten, its address is free, and the next one of the name is another device.
func TestDeviceVanishes(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, lan))
	must(t, b.in(func() error { return makePair("vm0", "vm0far") }))
	p := b.mustAttachDevice(DeviceRequest{Device: "vm0", Network: "lan"})
	must(t, b.in(func() error { return removeLink("vm0") }))
	must(t, b.in(func() error { return makePair("vm0", "vm0far") }))
	must(t, b.in(b.d.resync))
	if _, ok := b.d.Attached("device/vm0"); ok || !b.d.pools[500].empty() {
		t.Errorf("it is still attached (%v), or has its lease", ok)
	}
	if _, ok := b.stationOf(p); ok {
		t.Error("its station is left")
	}
	if alias, _ := b.alias("vm0"); alias != "" {
		t.Errorf("another device of its name has the alias %q", alias)
	}
}

// TestDeviceIsEndpoint: by name, MAC or address a device is the one that the topology declares.
func TestDeviceIsEndpoint(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	top := parse(t, lan, web, machine, mute, afar)
	b.open(top)
	must(t, b.in(func() error { return makePair("vm0", "vm0far") }))
	address, mac := ips("10.70.0.200"), plan.MAC{0x52, 0x54, 0, 0, 0, 1}
	for name, r := range map[string]DeviceRequest{
		"by name": {Name: "machine"}, "by MAC": {MAC: mac}, "by address": {IPs: address}, "by all": {Name: "machine", MAC: mac, IPs: address},
	} {
		r.Device, r.Network = "vm0", "lan"
		p := b.mustAttachDevice(r)
		if p.V4 != address[0] || p.MAC != mac {
			t.Errorf("%s: it has %s and %s", name, p.V4, p.MAC)
		}
		b.reopen(top)
		if ports, _ := b.d.Attached("device/vm0"); len(ports) != 1 || ports[0].V4 != address[0] {
			t.Errorf("%s: the next agent has %+v", name, ports)
		}
		b.mustApply(parse(t, lan, web, machine, mute, afar, another))
		b.mustApply(top)
		if ports, _ := b.d.Attached("device/vm0"); len(ports) != 1 || len(b.d.pools[500].leases) != 1 || len(b.d.pools[500].away) != 0 {
			t.Errorf("%s: after other topologies it has %+v, and the pool %d leases and %d away", name, ports, len(b.d.pools[500].leases), len(b.d.pools[500].away))
		}
		b.mustDetachDevice("vm0")
	}
	for range 2 { // the topology has no address for the first one
		p := b.mustAttachDevice(DeviceRequest{Device: "vm0", Network: "lan", Name: "mute"})
		if pool := netip.MustParsePrefix("10.70.0.16/28"); !pool.Contains(p.V4) || p.MAC[5] != 2 {
			t.Errorf("an endpoint without address has %s and %s", p.V4, p.MAC)
		}
		p = b.mustAttachDevice(DeviceRequest{Device: "vm0", Network: "lan", Name: "machine"})
		if p.V4 != address[0] || len(b.d.pools[500].leases) != 1 {
			t.Errorf("the device is another endpoint now, and has %s and %d leases", p.V4, len(b.d.pools[500].leases))
		}
	}
	c := b.bare("default/one")
	wantError(t, "a container wants its address", c.request(Interface{Network: "lan", IPs: address}), "is the address of endpoint machine")
	wantError(t, "a container wants its MAC", c.request(Interface{Network: "lan", MAC: mac}), "52:54:00:00:00:01 is taken by device vm0")

	moved := parse(t, lan, web, mute, afar, "[endpoint.machine]\nnetwork = \"lan\"\nnode = \"two\"\nmac = \"52:54:00:00:00:01\"\naddress = [\"10.70.0.200\"]\n")
	b.mustApply(moved)
	if _, ok := b.d.Attached("device/vm0"); ok {
		t.Error("the endpoint is declared at another node, and the device is attached here")
	}
	b.mustDetachDevice("vm0")
	if alias, _ := b.alias("vm0"); alias != "" {
		t.Errorf("a device without traffic is left with the alias %q", alias)
	}
}

func TestRefusedDevices(t *testing.T) {
	takesLong(t)
	b := newBed(t)
	b.open(parse(t, lan, web, machine, mute, afar))
	must(t, b.in(func() error { return makePair("vm0", "vm0far") }))
	for _, test := range []struct {
		r    DeviceRequest
		says string
	}{
		{DeviceRequest{Network: "lan"}, "it has no name"},
		{DeviceRequest{Device: "vm0", Network: "web"}, "network web is routed (l3)"},
		{DeviceRequest{Device: "vm0", Network: "lam"}, `network "lam" is not in the topology`},
		{DeviceRequest{Device: "vm9", Network: "lan"}, "attach device vm9 to network lan"},
		{DeviceRequest{Device: "up0", Network: "lan"}, "up0"},
		{DeviceRequest{Device: "vm0", Network: "lan", Name: "afar"}, "endpoint afar is declared at node two, not here (one)"},
		{DeviceRequest{Device: "vm0", Network: "lan", Name: "machine", MAC: plan.MAC{0x52, 0x54, 0, 0, 0, 9}}, "endpoint machine has MAC address 52:54:00:00:00:01 in the topology"},
		{DeviceRequest{Device: "vm0", Network: "lan", Name: "machine", IPs: ips("10.70.0.20")}, "endpoint machine has the addresses [10.70.0.200] in the topology"},
		{DeviceRequest{Device: "vm0", Network: "lan", Name: "machine", MAC: plan.MAC{0x52, 0x54, 0, 0, 0, 2}}, "could be endpoint machine or mute"},
		{DeviceRequest{Device: "vm0", Network: "lan", IPs: ips("10.70.0.99")}, "outside 10.70.0.16/28"},
	} {
		_, err := b.attachDevice(test.r)
		wantError(t, test.says, err, test.says)
	}
	for _, name := range []string{"vm0", "up0"} {
		if alias, master := b.alias(name); alias != "" || master != 0 {
			t.Errorf("%s is left with alias %q and master %d", name, alias, master)
		}
	}
	if !b.d.pools[500].empty() || !slices.Equal(b.d.of("device/vm0"), nil) {
		t.Error("a lease or a port is left")
	}
}
