// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"runtime"
)

// version is set by the linker: -ldflags "-X main.version=v1.2.3".
var version = "dev"

func runVersion(_ context.Context, e *env, args []string) error {
	if err := parseFlags(newFlags("version"), args, 0); err != nil {
		return err
	}
	_, err := fmt.Fprintf(e.stdout, "lace %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
