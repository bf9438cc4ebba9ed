// SPDX-License-Identifier: Apache-2.0

// Command bench measures Lace against the bare wire, plain routing, VXLAN, the kernel's own SRv6 and
// nftables, on beds of network namespaces. docs/performance.md explains the method.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
)

func main() {
	if err := dispatch(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(exitCode(err))
	}
}

// dispatch runs the bench, or one of the roles that it starts itself in for a namespace.
func dispatch(args []string) error {
	if len(args) > 0 {
		if role, ok := roles[args[0]]; ok {
			return role(args[1:])
		}
	}
	opt, err := parseOptions(args, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("making network namespaces needs root; run it as root")
	}
	if err := pin(opt.cpu); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return bench(ctx, opt, os.Stdout, os.Stderr)
}

// roles are the processes that the bench starts of itself, each in a namespace of a bed.
var roles = map[string]func([]string) error{
	"serve":   func(args []string) error { return runTraffic(args, servers) },
	"send":    func(args []string) error { return runTraffic(args, clients) },
	"isolate": isolate,
	"node":    runNode,
	owned:     runOwned,
}

func exitCode(err error) int {
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}

// bench builds the beds, measures on them and takes them down again, whatever happens.
func bench(ctx context.Context, opt options, stdout, stderr io.Writer) (err error) {
	unlock, err := lock(ctx, stderr)
	if err != nil {
		return err
	}
	defer unlock()
	lab := newLab(opt, stderr)
	defer func() { err = errors.Join(err, lab.close()) }()
	if err := lab.build(ctx); err != nil {
		return err
	}
	rec, err := lab.measure(ctx)
	if err != nil {
		return err
	}
	return rec.publish(opt, stdout)
}

// host names the machine in the report: its kernel and its cores, nothing else.
func host() string {
	var u syscall.Utsname
	if err := syscall.Uname(&u); err != nil {
		return fmt.Sprintf("unknown kernel, %d cores", runtime.NumCPU())
	}
	release := make([]byte, 0, len(u.Release))
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		release = append(release, byte(c))
	}
	return fmt.Sprintf("kernel %s, %s", release, cores())
}
