// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestParseMixed(t *testing.T) {
	for _, tt := range []struct {
		args    string
		max     int
		words   string
		name    string
		refused string
	}{
		{"edge-1 --name two", 1, "edge-1", "two", ""},
		{"--name two edge-1", 1, "edge-1", "two", ""},
		{"edge-1 -- ls --name", -1, "edge-1 -- ls --name", "lab", ""},
		{"--name two edge-1 -- ls --name x", -1, "edge-1 -- ls --name x", "two", ""},
		{"edge-1 --name=two -- --name", -1, "edge-1 -- --name", "two", ""},
		{"edge-1 edge-2", 1, "", "", `unexpected argument "edge-2"`},
		{"--nome two", 1, "", "", "nome"},
		{"edge-1 --name", 1, "", "", "needs an argument"},
	} {
		fs, name := labFlags("test")
		words, err := parseMixed(fs, strings.Fields(tt.args), tt.max)
		if tt.refused != "" {
			var usage *usageError
			if !errors.As(err, &usage) || !strings.Contains(usage.problem, tt.refused) {
				t.Errorf("%q: got %v, want a refusal with %q", tt.args, err, tt.refused)
			}
			continue
		}
		if err != nil || !slices.Equal(words, strings.Fields(tt.words)) || *name != tt.name {
			t.Errorf("%q: got %q, name %q, %v", tt.args, words, *name, err)
		}
	}
}

func TestLabRefusesWords(t *testing.T) {
	for args, want := range map[string]string{
		"":                     "what to do is missing",
		"ups":                  `did you mean "up"`,
		"up":                   "the topology file is missing",
		"exec edge-1 ls":       "expected NODE -- COMMAND",
		"exec edge-1 --":       "expected NODE -- COMMAND",
		"logs":                 "the node is missing",
		"kill edge-1":          "expected NODE and agent or containerd",
		"down --name a-b":      "must be 1 to 16 letters",
		"down now":             "unexpected argument",
		"__node":               "internal command",
		"__exec":               "internal command",
		"__serve":              "internal command",
		"kill edge-1 sshd":     `no program "sshd"`,
		"status --name lacetx": "is not up",
	} {
		err := runLab(t.Context(), hostEnv(), strings.Fields(args))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("lace lab %s: got %v, want %q", args, err, want)
		}
	}
}
