// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"strings"
)

// Error is one thing that is wrong with a file.
type Error struct {
	File    string
	Line    int    // 1 is the first; 0 where the file as a whole is meant
	Key     string // path of the key, "network.backend.subnets[1]"; empty for the file as a whole
	Problem string // what is wrong
	Fix     string // what would be right
}

// Error is "file:line: key: what is wrong; what would be right".
func (e Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d", e.Line)
	}
	b.WriteString(": ")
	if e.Key != "" {
		b.WriteString(e.Key + ": ")
	}
	b.WriteString(e.Problem)
	if e.Fix != "" {
		b.WriteString("; " + e.Fix)
	}
	return b.String()
}

// Errors is all that is wrong with a file, sorted by line.
type Errors []Error

// Error has one line an error.
func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Sorted orders by line, then key, so that the same file always gives the same text.
func (es Errors) Sorted() Errors {
	slices.SortStableFunc(es, func(a, b Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Key, b.Key))
	})
	return es
}

// complaints reports what is wrong with one kind of table up to a bound: one slip shows many times.
type complaints struct {
	*builder
	of    string // key of the tables
	wrong int
}

const maxComplaints = 100

// complain reports what is wrong, up to the bound; tellRest counts what is above it.
func (c *complaints) complain(key, fix, format string, args ...any) {
	if c.wrong++; c.wrong <= maxComplaints {
		c.fail(key, fix, format, args...)
	}
}

func (c *complaints) full() bool { return c.wrong >= maxComplaints }

// unknownName says which of the names may have been meant: finding the nearest costs, and is left out where it is not shown.
func (c *complaints) unknownName(key, what, name string, names iter.Seq[string]) {
	fix := ""
	if !c.full() {
		fix = among(name, slices.Sorted(names), what)
	}
	c.complain(key, fix, "%s", unknown(what, name))
}

func (c *complaints) tellRest() {
	if c.wrong > maxComplaints {
		c.fail(c.of, "mend these first", "%d more errors are not shown", c.wrong-maxComplaints)
	}
}
