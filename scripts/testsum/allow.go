// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
)

// An allowList holds the skips that are expected. A nil list expects every skip.
type allowList []*regexp.Regexp

func (l allowList) expects(skip string) bool {
	if l == nil {
		return true
	}
	for _, pattern := range l {
		if pattern.MatchString(skip) {
			return true
		}
	}
	return false
}

// readAllowed reads lines of "PATTERN -- WHY". PATTERN is a regular expression that matches somewhere in
// "PACKAGE TEST: REASON"; WHY is for the reader and must be there. Empty lines and lines that begin with # do not
// count. No file name gives the nil list.
func readAllowed(file string) (allowList, error) {
	if file == "" {
		return nil, nil
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	list := allowList{}
	for i, line := range strings.Split(string(content), "\n") {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		pattern, err := parseAllowed(line)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, i+1, err)
		}
		list = append(list, pattern)
	}
	return list, nil
}

func parseAllowed(line string) (*regexp.Regexp, error) {
	pattern, why, _ := strings.Cut(line, " -- ")
	if strings.TrimSpace(why) == "" {
		return nil, fmt.Errorf("%q says no why; write PATTERN -- WHY", line)
	}
	return regexp.Compile(strings.TrimSpace(pattern))
}
