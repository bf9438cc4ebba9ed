// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"fmt"
	"strconv"
	"strings"
)

// Lines says on which line of a file a key is. Keys are whole paths as errors print them:
// node.edge-1.locator, network.backend.subnets[1].
type Lines map[string]int

// Of is the line of a key, or that of the closest table around it where the key is not there.
func (l Lines) Of(key string) int {
	for key != "" {
		if n, ok := l[key]; ok {
			return n
		}
		key = key[:max(0, strings.LastIndexAny(key, ".["))]
	}
	return 0
}

// Has says whether the key is in the file.
func (l Lines) Has(key string) bool {
	_, ok := l[key]
	return ok
}

// at is the innermost key that starts on a line, "" where none does.
func (l Lines) at(line int) string {
	at := ""
	for key, n := range l {
		if n == line && (len(key) > len(at) || len(key) == len(at) && key < at) {
			at = key
		}
	}
	return at
}

// joinKey makes a path longer by a key, quoted where TOML would want that.
func joinKey(path, key string) string {
	if !isBare(key) {
		key = shortQuote(key)
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

// tableKey is a key, or a key in a key, of the table that a name has among those of a kind.
func tableKey(kind, name string, key []string) string {
	path := joinKey(kind, name)
	for _, k := range key {
		path = joinKey(path, k)
	}
	return path
}

func indexKey(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

func isBare(key string) bool {
	for i := range len(key) {
		if !isBareByte(key[i]) {
			return false
		}
	}
	return key != ""
}

func isBareByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_'
}

// Bounds of what may nest: our files need a depth of 5. A decoder that recurses, and an index that
// holds whole paths, would else let a small file cost much.
const (
	maxDepth = 16
	maxPath  = 256 // bytes of a key's path
)

// scanner finds the line of every key. The TOML library does not tell them, and does the real
// reading: what is no TOML only has to be survived here.
type scanner struct {
	file   string
	src    string
	pos    int
	line   int
	lines  Lines
	tables map[string]int // arrays of tables: how many elements so far
	err    error          // nested too deep, or too long a key
}

func scanLines(file, src string) (Lines, error) {
	s := scanner{file: file, src: strings.TrimPrefix(src, "\ufeff"), line: 1, lines: Lines{}, tables: map[string]int{}}
	table, depth := "", 0
	for s.skipBlank(true); s.pos < len(s.src) && s.err == nil; s.skipBlank(true) {
		before := s.pos
		if s.peek() == '[' {
			table, depth = s.header()
		} else {
			s.pair(table, depth)
		}
		if s.pos == before {
			s.pos++ // no TOML
		}
	}
	return s.lines, s.err
}

func (s *scanner) peek() byte {
	if s.pos < len(s.src) {
		return s.src[s.pos]
	}
	return 0
}

func (s *scanner) next() byte {
	c := s.peek()
	if c == '\n' {
		s.line++
	}
	s.pos++
	return c
}

func (s *scanner) note(path string) {
	if _, ok := s.lines[path]; !ok {
		s.lines[path] = s.line
	}
}

// enter says whether another level may be read.
func (s *scanner) enter(path string, depth int) bool {
	switch {
	case s.err != nil:
	case depth > maxDepth:
		s.refuse(fmt.Sprintf("nested more than %d deep", maxDepth))
	case len(path) > maxPath:
		s.refuse(fmt.Sprintf("key longer than %d bytes", maxPath))
	}
	return s.err == nil
}

func (s *scanner) refuse(problem string) {
	s.err = Errors{{File: s.file, Line: s.line, Problem: problem, Fix: "is it the right file?"}}
}

// skipBlank passes over white space and comments, and over the ends of lines where they mean nothing.
func (s *scanner) skipBlank(newlines bool) {
	for s.pos < len(s.src) {
		switch c := s.peek(); {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n' && newlines:
			s.next()
		case c == '#':
			s.skipTo("\n")
		default:
			return
		}
	}
}

// skipTo stops in front of the first of the bytes.
func (s *scanner) skipTo(stop string) {
	for s.pos < len(s.src) && strings.IndexByte(stop, s.peek()) < 0 {
		s.next()
	}
}

// header reads [table] or [[array of tables]] and returns its path and depth.
func (s *scanner) header() (string, int) {
	s.next()
	array := s.peek() == '['
	if array {
		s.next()
	}
	path, depth := s.key("", 0)
	if array {
		n := s.tables[path]
		s.tables[path] = n + 1
		path = indexKey(path, n)
		s.note(path)
	}
	s.skipTo("\n#")
	return path, depth
}

// key reads a key, dotted or not, below path.
func (s *scanner) key(path string, depth int) (string, int) {
	for {
		if n := s.tables[path]; n > 0 {
			path = indexKey(path, n-1)
		}
		s.skipBlank(false)
		word := s.word()
		path, depth = joinKey(path, word), depth+1
		if !s.enter(path+word, depth) {
			return path, depth
		}
		s.note(path)
		s.skipBlank(false)
		if s.peek() != '.' {
			return path, depth
		}
		s.next()
	}
}

// word reads one part of a key.
func (s *scanner) word() string {
	start := s.pos
	if c := s.peek(); c == '"' || c == '\'' {
		s.skipString()
		return unquote(s.src[start:min(s.pos, len(s.src))])
	}
	for s.pos < len(s.src) && isBareByte(s.peek()) {
		s.next()
	}
	return s.src[start:s.pos]
}

// unquote takes the quotes off a key. TOML's escapes are those of Go, but for \e and \/.
func unquote(s string) string {
	if s[0] == '"' {
		if u, err := strconv.Unquote(s); err == nil {
			return u
		}
	}
	return strings.Trim(s, s[:1])
}

// skipString passes over any of the four kinds of string.
func (s *scanner) skipString() {
	quote := s.src[s.pos : s.pos+1]
	if triple := strings.Repeat(quote, 3); strings.HasPrefix(s.src[s.pos:], triple) {
		s.pos += 3
		s.skipBehind(triple)
		for strings.HasPrefix(s.src[s.pos:], quote) { // up to two quotes may stand before the end
			s.pos++
		}
		return
	}
	s.pos++
	for c := s.peek(); s.pos < len(s.src) && c != '\n' && c != quote[0]; c = s.peek() {
		s.skipLetter(quote)
	}
	if s.peek() == quote[0] {
		s.pos++
	}
}

func (s *scanner) skipBehind(end string) {
	for s.pos < len(s.src) && !strings.HasPrefix(s.src[s.pos:], end) {
		s.skipLetter(end)
	}
	s.pos = min(s.pos+len(end), len(s.src))
}

// skipLetter passes over one letter, or over a backslash and what it protects.
func (s *scanner) skipLetter(quote string) {
	if s.next() == '\\' && quote[0] == '"' && s.pos < len(s.src) && s.peek() != '\n' {
		s.next()
	}
}

// pair reads key = value.
func (s *scanner) pair(table string, depth int) {
	path, depth := s.key(table, depth)
	s.skipBlank(false)
	if s.peek() == '=' {
		s.next()
		s.skipBlank(false)
		s.value(path, depth)
	}
}

func (s *scanner) value(path string, depth int) {
	if !s.enter(path, depth) {
		return
	}
	switch s.peek() {
	case '"', '\'':
		s.skipString()
	case '[':
		s.items(']', func(i int) {
			s.note(indexKey(path, i))
			s.value(indexKey(path, i), depth+1)
		})
	case '{':
		s.items('}', func(int) { s.pair(path, depth) })
	default:
		s.skipTo(",]}#\n")
	}
}

// items reads what stands between brackets, separated by commas.
func (s *scanner) items(end byte, item func(i int)) {
	s.next()
	for i := 0; s.err == nil; i++ {
		s.skipBlank(true)
		if s.pos >= len(s.src) || s.peek() == end {
			break
		}
		before := s.pos
		item(i)
		s.skipBlank(true)
		if s.peek() == ',' || s.pos == before {
			s.next()
		}
	}
	s.next()
}
