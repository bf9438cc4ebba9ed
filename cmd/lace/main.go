// SPDX-License-Identifier: Apache-2.0

// Command lace is the agent and the command line of Lace for containerd.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/lace-net/lace/topology"
)

// command is one word of the command line. args is its synopsis as the usage prints it.
type command struct {
	name    string
	args    string
	summary string
	run     func(ctx context.Context, e *env, args []string) error
}

var commands = []command{
	{"agent", "[--config FILE] [FLAG...]", "run the agent of this node", runAgent},
	{"apply", "[--config FILE] [--dry-run] [FILE]", "make a new topology the one that holds, without a restart", runApply},
	{"attach", attachArgs, "put a device of this host, as of a virtual machine, into an L2 network", runAttach},
	{"check", "[FILE]", "say whether a topology file is right", runCheck},
	{"conntrack", "[list|count|delete] [--json] [--network NAME] [--container NAME] [--address ADDRESS] [--port PORT] [--proto WORD] [--state WORD] [--all]", "list, count or delete the flows that this node knows", runConntrack},
	{"detach", "[--config FILE] --netdev NAME", "take such a device out of its network", runDetach},
	{"doctor", "[--config FILE]", "say what this host has and lacks", runDoctor},
	{"explain", "[--config FILE] [--json] --from CONTAINER|ADDRESS|host --to ADDRESS:PORT/PROTO|MAC [--network NAME] [--via NODE]", "say what would become of a flow or a frame, by the programs themselves", runExplain},
	{"fdb", "[--config FILE] [--json] [--network NAME]", "list the MAC addresses of L2 networks that this node knows, and where they are", runFDB},
	{"plan", "[--node NAME] [--topology FILE] [--from FILE] [--json]", "print what a node will hold", runPlan},
	{"lab", labArgs, "make the nodes of a topology file on this machine", runLab},
	{"status", "[--config FILE] [--json]", "show what this node holds: networks, peers, containers, ways out, published ports, counters", runStatus},
	{"trace", "[--json] [--network NAME] [--container NAME] [--address ADDRESS] [--port PORT] [--reason WORD] [--verdict WORD] [--count N]", "show new flows and refused packets as they come", runTrace},
	{"uninstall", "[--config FILE] [--force]", "take every kernel object of Lace off this host", runUninstall},
	{"version", "", "print the version", runVersion},
}

// Exit codes. Bad words on the command line and bad files are the caller's to mend, anything else
// is a failure of the work.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends what does not heed the first
	code := dispatch(ctx, hostEnv(), os.Args[1:])
	stop()
	os.Exit(code)
}

// dispatch finds the command, runs it and turns its error into an exit code.
func dispatch(ctx context.Context, e *env, args []string) int {
	if len(args) == 0 {
		printUsage(e.stderr)
		return exitUsage
	}
	if slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]) {
		printUsage(e.stdout)
		return exitOK
	}
	for _, c := range commands {
		if c.name == args[0] {
			return report(e, c, c.run(ctx, e, args[1:]))
		}
	}
	fmt.Fprintf(e.stderr, "lace: unknown command %q%s; `lace help` lists them\n", args[0], didYouMean(args[0]))
	return exitUsage
}

// report prints what went wrong in the form that its kind of error asks for.
func report(e *env, c command, err error) int {
	var usage *usageError
	var file topology.Errors
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage) && usage.problem == "":
		printCommand(e.stdout, c, usage)
		return exitOK
	case errors.As(err, &usage):
		fmt.Fprintf(e.stderr, "lace: %s: %s\n", c.name, usage.problem)
		printCommand(e.stderr, c, usage)
		return exitUsage
	case errors.As(err, &file):
		fmt.Fprintln(e.stderr, file)
		return exitUsage
	}
	fmt.Fprintf(e.stderr, "lace: %v\n", err)
	return exitFailure
}

func printUsage(w io.Writer) {
	fmt.Fprint(w, "Lace gives containers on containerd hosts isolated networks that span hosts.\n\nusage: lace COMMAND [ARGUMENT...]\n\n")
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, c := range commands {
		fmt.Fprintf(t, "  %s\t%s\n", c.name, c.summary)
	}
	t.Flush()
	fmt.Fprint(w, "\n`lace COMMAND --help` says more.\n")
}

func printCommand(w io.Writer, c command, u *usageError) {
	fmt.Fprintf(w, "usage: lace %s\n", strings.TrimSpace(c.name+" "+c.args))
	if u.flags == nil {
		return
	}
	u.flags.SetOutput(w)
	u.flags.PrintDefaults()
}

func didYouMean(word string) string {
	var names []string
	for _, c := range commands {
		names = append(names, c.name)
	}
	if near := topology.Nearest(word, names); near != "" {
		return fmt.Sprintf("; did you mean %q?", near)
	}
	return ""
}
