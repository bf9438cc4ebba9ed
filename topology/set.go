// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"iter"
	"math/bits"
	"slices"
)

// set holds small numbers, one bit each. Sets that meet are made for the same count.
type set []uint64

func newSet(count int) set { return make(set, (count+63)/64) }

func (s set) add(i int) { s[i/64] |= 1 << (i % 64) }

func (s set) has(i int) bool { return s[i/64]&(1<<(i%64)) != 0 }

func (s set) empty() bool { return !slices.ContainsFunc(s, func(w uint64) bool { return w != 0 }) }

// keep drops what is not in o.
func (s set) keep(o set) {
	for i := range s {
		s[i] &= o[i]
	}
}

func (s set) count() int {
	sum := 0
	for _, w := range s {
		sum += bits.OnesCount64(w)
	}
	return sum
}

// common is the first that is in both.
func (s set) common(o set) (int, bool) {
	for i, w := range s {
		if both := w & o[i]; both != 0 {
			return i*64 + bits.TrailingZeros64(both), true
		}
	}
	return 0, false
}

// beyond is the first that is in s and not in o, which may be nil: that holds nothing.
func (s set) beyond(o set) (int, bool) {
	for i, w := range s {
		if o != nil {
			w &^= o[i]
		}
		if w != 0 {
			return i*64 + bits.TrailingZeros64(w), true
		}
	}
	return 0, false
}

// all goes through the set in order.
func (s set) all() iter.Seq[int] { return s.without(make(set, len(s))) }

// without goes through what is in s but not in o, in order. Adding to o what was seen is no harm.
func (s set) without(o set) iter.Seq[int] {
	return func(yield func(int) bool) {
		for i, w := range s {
			for rest := w &^ o[i]; rest != 0; rest &= rest - 1 {
				if !yield(i*64 + bits.TrailingZeros64(rest)) {
					return
				}
			}
		}
	}
}
