// SPDX-License-Identifier: Apache-2.0

package topology

// Nearest returns the known word that word was most likely meant to be, or "" where none is near:
// more than a third of its letters, but at least one, may not differ. A letter is a byte here, as
// in all our keys.
func Nearest(word string, known []string) string {
	const longest = 64 // no known word is longer, and the cost is the product of both lengths
	if len(word) > longest {
		return ""
	}
	best, near := max(1, len(word)/3)+1, ""
	for _, k := range known {
		if d := distance(word, k); d < best {
			best, near = d, k
		}
	}
	return near
}

// distance counts the letters to insert, delete, replace or swap with their neighbour to turn a
// into b (optimal string alignment).
func distance(a, b string) int {
	before, last := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
