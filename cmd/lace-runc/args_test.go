// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestBundleOf(t *testing.T) {
	tests := []struct {
		args, bundle string
		create       bool
	}{
		{"--root /run/r --log /b/log.json --log-format json create --bundle /b --pid-file /b/init.pid c1", "/b", true},
		{"--root /run/r --systemd-cgroup create --bundle=/b c1", "/b", true},
		{"-root /r create -b /b c1", "/b", true},
		{"run c1", ".", true},
		{"--debug run -d --bundle /b c1", "/b", true},
		{"run c1 --bundle /b", "/b", true},
		{"--root create state c1", ".", false},
		{"--log run delete c1", ".", false},
		{"create --pid-file --bundle --bundle /b c1", "/b", true},
		{"exec --pid-file p c1 create --bundle /x", "/x", false},
		{"delete --force create", ".", false},
		{"--newoption value create --bundle /b c1", "/b", true},
		{"--version", ".", false},
		{"", ".", false},
		{"create --bundle", ".", true},
		{"create -b /b -- --bundle /x", "/b", true},
	}
	for _, tt := range tests {
		bundle, create := bundleOf(strings.Fields(tt.args))
		if create != tt.create || (create && bundle != tt.bundle) {
			t.Errorf("runc %s: create %v, bundle %q; want %v, %q", tt.args, create, bundle, tt.create, tt.bundle)
		}
	}
}
