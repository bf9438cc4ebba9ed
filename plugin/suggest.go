// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"fmt"
	"strconv"
	"strings"
)

const maxQuoted = 64 // bytes of bad input that an error repeats

// didYouMean names the known label that is at most a third of its letters away.
func didYouMean(key string, labels []string) string {
	if len(key) > maxValue {
		return ""
	}
	best, distance := "", len(key)/3+1
	for _, known := range labels {
		if d := editDistance(key, known); d < distance {
			best, distance = known, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %q?)", best)
}

// editDistance counts the bytes to insert, delete or replace to get from a to b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// quote makes foreign text fit for an error: bounded, and with control characters escaped.
func quote(s string) string {
	if len(s) > maxQuoted {
		s = s[:maxQuoted] + "…"
	}
	return strconv.Quote(s)
}

func quoteAll(keys []string) string {
	if len(keys) > 4 {
		keys = append(keys[:4:4], "…")
	}
	for i, k := range keys {
		keys[i] = quote(k)
	}
	return strings.Join(keys, ", ")
}
