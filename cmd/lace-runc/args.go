// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
)

// runcCommands are the subcommands of runc, so that the value of an option that is not known here is not taken
// for one.
var runcCommands = []string{"checkpoint", "create", "delete", "events", "exec", "features", "help", "init", "kill", "list",
	"pause", "ps", "restore", "resume", "run", "spec", "start", "state", "update"}

// valueOptions are the options of runc and of its create and run that take a value of their own.
var valueOptions = []string{"log", "log-format", "root", "rootless", "criu",
	"bundle", "b", "console-socket", "pid-file", "pidfd-socket", "preserve-fds"}

// bundleOf reads the arguments of runc. create tells whether they make a container; bundle is then its directory.
func bundleOf(args []string) (bundle string, create bool) {
	bundle = "."
	command := ""
	for i := 0; i < len(args) && args[i] != "--"; i++ {
		name, value, hasValue, isOption := option(args[i])
		if !isOption {
			if command == "" && slices.Contains(runcCommands, args[i]) {
				command = args[i]
			}
			continue
		}
		if !hasValue && slices.Contains(valueOptions, name) && i+1 < len(args) {
			i++
			value = args[i]
		}
		if command != "" && value != "" && (name == "bundle" || name == "b") {
			bundle = value
		}
	}
	return bundle, command == "create" || command == "run"
}

// option splits -name, --name and both with =value.
func option(arg string) (name, value string, hasValue, isOption bool) {
	if len(arg) < 2 || arg[0] != '-' {
		return "", "", false, false
	}
	name, value, hasValue = strings.Cut(strings.TrimPrefix(arg[1:], "-"), "=")
	return name, value, hasValue, true
}
