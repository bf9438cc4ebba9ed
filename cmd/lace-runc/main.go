// SPDX-License-Identifier: Apache-2.0

// Command lace-runc stands between containerd and runc. Called as runc it adds Lace's hooks to the
// configuration of a container that may be Lace's and becomes the real runc; called by those hooks
// ("lace-runc hook STAGE") it asks the agent; called as lace-cni it is a CNI plugin that does the same.
// It uses the standard library alone and starts with every container of the host.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if filepath.Base(os.Args[0]) == "lace-cni" {
		os.Exit(cniMain(os.Stdin, os.Stdout, os.Getenv))
	}
	if len(os.Args) == 3 && os.Args[1] == "hook" {
		os.Exit(hookMain(os.Args[2], os.Stdin, os.Stderr, os.Getenv))
	}
	err := wrap(os.Args[1:])
	fmt.Fprintln(os.Stderr, "lace-runc:", err)
	os.Exit(1)
}
