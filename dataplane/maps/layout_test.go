// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"reflect"
	"testing"

	"github.com/cilium/ebpf/btf"

	"github.com/lace-net/lace/bpf"
)

// TestLayout compares the Go types with the C ones in BTF: size, and every member's offset and size.
func TestLayout(t *testing.T) {
	for name, v := range map[string]any{
		"port_key": bpf.LacePortKey{}, "port": bpf.LacePort{}, "endpoint_key": bpf.LaceEndpointKey{}, "endpoint": bpf.LaceEndpoint{},
		"network": bpf.LaceNetwork{}, "block_key": bpf.LaceBlockKey{}, "block": bpf.LaceBlock{}, "peering_key": bpf.LacePeeringKey{},
		"peering": bpf.LacePeering{}, "peer_key": bpf.LacePeerKey{}, "peer": bpf.LacePeer{}, "nexthop": bpf.LaceNexthop{},
		"config": bpf.LaceConfig{}, "timeouts": bpf.LaceTimeouts{}, "flow_key": bpf.LaceFlowKey{}, "flow": bpf.LaceFlow{},
		"fragment_key": bpf.LaceFragmentKey{}, "fragment": bpf.LaceFragment{}, "collection": bpf.LaceCollection{},
		"refusal_key": bpf.LaceRefusalKey{}, "event": bpf.LaceEvent{}, "counter": bpf.LaceCounter{}, "budget": bpf.LaceBudget{},
		"budget_key": bpf.LaceBudgetKey{}, "context": bpf.LaceContext{}, "fdb_key": bpf.LaceFdbKey{}, "station": bpf.LaceStation{},
		"sighting_key": bpf.LaceSightingKey{}, "sighting": bpf.LaceSighting{}, "group": bpf.LaceGroup{},
		"member_key": bpf.LaceMemberKey{}, "member": bpf.LaceMember{}, "external_key": bpf.LaceExternalKey{}, "external": bpf.LaceExternal{},
		"publication_key": bpf.LacePublicationKey{}, "publication": bpf.LacePublication{}, "egress": bpf.LaceEgress{}, "host": bpf.LaceHost{},
	} {
		t.Run(name, func(t *testing.T) { sameLayout(t, structOf(t, name), reflect.TypeOf(v)) })
	}
}

func structOf(t *testing.T, name string) *btf.Struct {
	t.Helper()
	spec, err := bpf.LoadLace()
	must(t, err)
	var s *btf.Struct
	must(t, spec.Types.TypeByName(name, &s))
	return s
}

func sameLayout(t *testing.T, c *btf.Struct, g reflect.Type) {
	t.Helper()
	if uintptr(c.Size) != g.Size() {
		t.Errorf("%d bytes in C, %d in Go", c.Size, g.Size())
	}
	var fields []reflect.StructField
	for f := range g.NumField() {
		if g.Field(f).Name != "_" {
			fields = append(fields, g.Field(f))
		}
	}
	if len(fields) != len(c.Members) {
		t.Fatalf("%d members in C, %d in Go", len(c.Members), len(fields))
	}
	for i, m := range c.Members {
		size, err := btf.Sizeof(m.Type)
		must(t, err)
		if f := fields[i]; uintptr(m.Offset.Bytes()) != f.Offset || uintptr(size) != f.Type.Size() {
			t.Errorf("%s: at %d, %d bytes in C; at %d, %d bytes in Go", m.Name, m.Offset.Bytes(), size, f.Offset, f.Type.Size())
		}
	}
}

// TestMapsHoldTheirTypes: every pinned map has keys and values of the size of its Go types.
func TestMapsHoldTheirTypes(t *testing.T) {
	spec, err := bpf.LoadLace()
	must(t, err)
	types := map[string][2]any{
		"generation": {uint32(0), uint32(0)}, "node_config": {uint32(0), bpf.LaceConfig{}}, "heartbeat": {uint32(0), uint64(0)},
		"ports": {bpf.LacePortKey{}, bpf.LacePort{}}, "endpoints": {bpf.LaceEndpointKey{}, bpf.LaceEndpoint{}},
		"fdb": {bpf.LaceFdbKey{}, bpf.LaceStation{}}, "learned": {bpf.LaceSightingKey{}, bpf.LaceSighting{}},
		"groups": {uint32(0), bpf.LaceGroup{}}, "members": {bpf.LaceMemberKey{}, bpf.LaceMember{}},
		"networks": {uint32(0), bpf.LaceNetwork{}}, "blocks": {bpf.LaceBlockKey{}, bpf.LaceBlock{}},
		"peerings": {bpf.LacePeeringKey{}, bpf.LacePeering{}}, "peers": {bpf.LacePeerKey{}, bpf.LacePeer{}},
		"externals": {bpf.LaceExternalKey{}, bpf.LaceExternal{}}, "published": {bpf.LacePublicationKey{}, bpf.LacePublication{}},
		"this_host": {uint32(0), bpf.LaceHost{}}, "addresses": {bpf.LaceAddr{}, uint32(0)}, "egresses": {uint32(0), bpf.LaceEgress{}},
		"nexthops": {uint32(0), bpf.LaceNexthop{}}, "flows": {uint32(0), uint32(0)}, "fragments": {bpf.LaceFragmentKey{}, bpf.LaceFragment{}},
		"traffic": {uint32(0), bpf.LaceCounter{}}, "refusals": {bpf.LaceRefusalKey{}, bpf.LaceCounter{}},
		"counters": {uint32(0), bpf.LaceCounter{}}, "budgets": {bpf.LaceBudgetKey{}, bpf.LaceBudget{}},
	}
	for _, name := range Pinned {
		m, want := spec.Maps[name], types[name]
		if m == nil || want[0] == nil {
			if name != "events" { // a ring buffer has neither
				t.Errorf("map %s is not in the object, or not in this test", name)
			}
			continue
		}
		if key, value := reflect.TypeOf(want[0]).Size(), reflect.TypeOf(want[1]).Size(); uintptr(m.KeySize) != key || uintptr(m.ValueSize) != value {
			t.Errorf("map %s has keys of %d and values of %d bytes, its Go types %d and %d", name, m.KeySize, m.ValueSize, key, value)
		}
	}
}
