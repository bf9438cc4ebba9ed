// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"testing"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		name    string
		samples []float64
		want    spread
	}{
		{"one", []float64{3}, spread{3, 3, 3}},
		{"two interpolate", []float64{1, 2}, spread{1.5, 1.25, 1.75}},
		{"unsorted", []float64{5, 1, 4, 2, 3}, spread{3, 2, 4}},
		{"an outlier moves nothing", []float64{1, 2, 3, 4, 1000}, spread{3, 2, 4}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := spreadOf(c.samples); got != c.want {
				t.Errorf("spreadOf(%v) = %v, want %v", c.samples, got, c.want)
			}
		})
	}
	if got := spreadOf(nil).Median; !math.IsNaN(got) {
		t.Errorf("median of nothing = %v, want NaN", got)
	}
}

func TestPairedCancelsADisturbedRound(t *testing.T) {
	a, b := []float64{20, 2, 20}, []float64{10, 1, 10} // something else ran in the second round
	for i, r := range paired(a, b) {
		if r != 2 {
			t.Errorf("round %d: ratio %v, want 2", i, r)
		}
	}
}
