// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"net/netip"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/plugin"
)

var exactAddresses = cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}

func TestSeamHandsOverEachInterface(t *testing.T) {
	ip := netip.MustParseAddr("10.50.0.18")
	got := request(plugin.Request{Container: "default/a", Name: "web", Sticky: true, Netns: "/proc/1/ns/net", Interfaces: []plugin.Interface{
		{Network: "backend", IfName: "eth0", Publish: []plugin.Publish{{Protocol: 6, Port: 8080, To: 80}, {Address: ip, Protocol: 17, Port: 53, To: 5353}}},
		{Network: "storage", IfName: "eth1", IPs: []netip.Addr{ip}, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Gateway: true}}})
	want := dataplane.Request{Container: "default/a", Name: "web", Sticky: true, Netns: "/proc/1/ns/net", Interfaces: []dataplane.Interface{
		{Network: "backend", IfName: "eth0", Publish: []plan.Publish{{Protocol: 6, Port: 8080, To: 80}, {Address: ip, Protocol: 17, Port: 53, To: 5353}}},
		{Network: "storage", IfName: "eth1", IPs: []netip.Addr{ip}, MAC: plan.MAC{2, 0, 0, 0, 0, 1}, Gateway: true}}}
	if d := cmp.Diff(want, got, exactAddresses); d != "" {
		t.Error(d)
	}
}

// TestSeamKnowsAllFields fails when either side's words get a field that the seam may have to carry.
func TestSeamKnowsAllFields(t *testing.T) {
	for _, tt := range []struct {
		of     any
		fields int
	}{{plugin.Request{}, 5}, {plugin.Interface{}, 6}, {plugin.Result{}, 8}, {dataplane.Request{}, 5}, {dataplane.Interface{}, 7}} {
		if n := reflect.TypeOf(tt.of).NumField(); n != tt.fields {
			t.Errorf("%T has %d fields, the seam was made for %d", tt.of, n, tt.fields)
		}
	}
}

func TestSeamHandsBackHowEachIsWired(t *testing.T) {
	v4, v6 := netip.MustParsePrefix("10.50.0.18/24"), netip.MustParsePrefix("fd50::18/64")
	ports := []dataplane.Port{
		{MTU: 1442, Port: plan.Port{Prefixes: []netip.Prefix{v4, v6}, Gateway4: v4.Masked().Addr().Next(), Gateway6: v6.Masked().Addr().Next(),
			Attachment: plan.Attachment{Network: "storage", IfName: "eth0", MAC: plan.MAC{2, 0x4c, 10, 50, 0, 18}}}},
		{MTU: 1460, Port: plan.Port{Prefixes: []netip.Prefix{v6}, Attachment: plan.Attachment{Network: "backend", IfName: "eth1", MAC: plan.MAC{2, 0, 0, 0, 0, 1}}}}}
	want := []plugin.Result{
		{Network: "storage", IfName: "eth0", V4: v4, V6: v6, Gateway4: netip.MustParseAddr("10.50.0.1"), Gateway6: netip.MustParseAddr("fd50::1"),
			MAC: net.HardwareAddr{2, 0x4c, 10, 50, 0, 18}, MTU: 1442},
		{Network: "backend", IfName: "eth1", V6: v6, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1460}}
	if d := cmp.Diff(want, results(ports), exactAddresses); d != "" {
		t.Error(d)
	}
	if got := results(nil); got != nil {
		t.Errorf("nothing became %+v", got)
	}
}
