// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"slices"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
)

// byTraffic are the reasons that BPF_PROG_TEST_RUN cannot bring about, and the tests that do.
var byTraffic = map[bpf.LaceReason]string{
	bpf.LaceReasonREASON_ENCAP_NESTED: "TestReenter",
}

// byLife are those of the packets that go on over the underlay: TestLife has no rows with a reason each.
var byLife = []bpf.LaceReason{bpf.LaceReasonREASON_ENCAPSULATED, bpf.LaceReasonREASON_DECAPSULATED}

// TestEveryReasonHasARow fails when a reason is added that no packet table shows.
func TestEveryReasonHasARow(t *testing.T) {
	shown := map[bpf.LaceReason]bool{}
	for _, rows := range append(segmentTables(), podRows(), uplinkRows(), errorRows(), gatewayRows(), limitedRows(), ecnRows(), unknownRows(), outerRows()) {
		for _, r := range rows {
			shown[r.reason] = true
			for _, also := range r.also {
				shown[also] = true
			}
		}
	}
	for r := bpf.LaceReasonREASON_NONE + 1; r < bpf.LaceReasonREASON_MAX; r++ {
		if !shown[r] && byTraffic[r] == "" && !slices.Contains(byLife, r) {
			t.Errorf("no row shows a packet with reason %s", maps.ReasonName(r))
		}
	}
}

// TestRowNames: two rows of a table with one name hide each other in the output.
func TestRowNames(t *testing.T) {
	for _, rows := range append(segmentTables(), podRows(), uplinkRows(), errorRows(), gatewayRows(), ecnRows(), unknownRows(), unrelatedRows(), strangerFragmentRows(), outerRows()) {
		seen := map[string]bool{}
		for _, r := range rows {
			if seen[r.name] {
				t.Errorf("two rows are called %q", r.name)
			}
			seen[r.name] = true
		}
	}
}
