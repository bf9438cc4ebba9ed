// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/lace-net/lace/cmd/lace/lab"
	"github.com/lace-net/lace/topology"
)

const labArgs = `up TOPOLOGY [--name NAME] [--routed] [--mtu BYTES] [--tools DIR] [--image TAR] [--no-containerd] [--no-agent] [--config FILE] [--wait]
       lace lab exec [--name NAME] NODE -- COMMAND [ARGUMENT...]
       lace lab status [--name NAME]
       lace lab logs [--name NAME] NODE [agent|containerd|server|node]
       lace lab kill [--name NAME] NODE agent|containerd
       lace lab start [--name NAME] NODE
       lace lab down [--name NAME]`

// labVerbs are the words behind `lace lab`.
var labVerbs = map[string]func(ctx context.Context, e *env, args []string) error{
	"up":     runLabUp,
	"exec":   runLabExec,
	"status": runLabStatus,
	"logs":   runLabLogs,
	"kill":   runLabKill,
	"start":  runLabStart,
	"down":   runLabDown,
}

func runLab(ctx context.Context, e *env, args []string) error {
	if len(args) == 0 {
		return usagef(nil, "what to do is missing")
	}
	switch args[0] {
	case lab.StageCommand:
		return lab.Stage(args[1:])
	case lab.ExecCommand:
		return lab.Become(args[1:])
	case lab.ServeCommand:
		return lab.Serve()
	}
	if run, ok := labVerbs[args[0]]; ok {
		return run(ctx, e, args[1:])
	}
	if strings.HasPrefix(args[0], "-") {
		return parseFlags(newFlags("lab"), args, 0)
	}
	var words []string
	for word := range labVerbs {
		words = append(words, word)
	}
	if near := topology.Nearest(args[0], words); near != "" {
		return usagef(nil, "unknown word %q; did you mean %q?", args[0], near)
	}
	return usagef(nil, "unknown word %q", args[0])
}

// labFlags starts the flags of one verb, all of which take the lab's name.
func labFlags(verb string) (*flag.FlagSet, *string) {
	fs := newFlags("lab " + verb)
	return fs, fs.String("name", lab.DefaultName, "the lab's `name`, where there are several")
}

// parseMixed takes flags behind arguments too: `lace lab up FILE --routed` reads naturally.
// Arguments from the word "--" on are left alone. A max below 0 takes any number of words.
func parseMixed(fs *flag.FlagSet, args []string, max int) ([]string, error) {
	var words []string
	for len(args) > 0 {
		if args[0] == "--" {
			return append(words, args...), nil
		}
		if !strings.HasPrefix(args[0], "-") {
			words, args = append(words, args[0]), args[1:]
			continue
		}
		flags := args
		for i, a := range args {
			if a == "--" {
				flags = args[:i]
				break
			}
		}
		if err := parseFlags(fs, flags, -1); err != nil {
			return nil, err
		}
		args = args[len(flags)-fs.NArg():]
	}
	if max >= 0 && len(words) > max {
		return nil, usagef(fs, "unexpected argument %q", words[max])
	}
	return words, nil
}

// upFlags are the flags of `lace lab up` as they were given.
type upFlags struct {
	name, tools, image, config           *string
	mtu                                  *int
	routed, noContainerd, noAgent, stays *bool
}

func newUpFlags() (*flag.FlagSet, upFlags) {
	fs, name := labFlags("up")
	return fs, upFlags{
		name:         name,
		tools:        fs.String("tools", "", "the `directory` of containerd and its clients (default: $LACE_TOOLS_BIN, else found by PATH)"),
		image:        fs.String("image", "", "an image `archive` to import into each containerd (default: $LACE_IMAGE)"),
		config:       fs.String("config", "", "the agent's settings `file`"),
		mtu:          fs.Int("mtu", lab.DefaultMTU, "MTU of the underlay in `bytes`"),
		routed:       fs.Bool("routed", false, "a router between the nodes, instead of one link"),
		noContainerd: fs.Bool("no-containerd", false, "nodes without containerd"),
		noAgent:      fs.Bool("no-agent", false, "nodes without the agent"),
		stays:        fs.Bool("wait", false, "stay until interrupted, then take the lab down"),
	}
}

func runLabUp(ctx context.Context, e *env, args []string) error {
	fs, given := newUpFlags()
	words, err := parseMixed(fs, args, 1)
	if err != nil {
		return err
	}
	if len(words) != 1 {
		return usagef(fs, "the topology file is missing")
	}
	options, err := given.options(e, words[0])
	if err != nil {
		return err
	}
	if err := lab.Up(ctx, options); err != nil {
		return err
	}
	if !*given.stays {
		return nil
	}
	fmt.Fprintln(e.stderr, "interrupt to take it down")
	<-ctx.Done()
	_, err = lab.Down(options.Name, e.stderr)
	return err
}

func (g upFlags) options(e *env, file string) (lab.Options, error) {
	data, err := topology.ReadFile(file)
	if err != nil {
		return lab.Options{}, err
	}
	t, err := topology.Parse(file, data)
	if err != nil {
		return lab.Options{}, err
	}
	self, err := os.Executable()
	if err != nil {
		return lab.Options{}, fmt.Errorf("find the lace program: %w", err)
	}
	o := lab.Options{Name: *g.name, Topology: t, File: data, Routed: *g.routed, MTU: *g.mtu, Self: self, Log: e.stderr}
	if !*g.noAgent {
		o.Agent, err = g.agent(self)
	}
	if err == nil && !*g.noContainerd {
		o.Stack, err = g.stack(e, self)
	}
	if o.Stack != nil {
		o.Path = append(o.Path, filepath.Dir(o.Stack.Containerd))
	}
	o.Path = append(o.Path, filepath.Dir(self))
	return o, err
}

func (g upFlags) agent(self string) ([]string, error) {
	args := []string{self, "agent", "--topology", defaultTopology}
	if *g.config == "" {
		return args, nil
	}
	config, err := filepath.Abs(*g.config)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(config); err != nil {
		return nil, fmt.Errorf("the agent's settings: %w", err)
	}
	return append(args, "--config", config), nil
}

func (g upFlags) stack(e *env, self string) (*lab.Stack, error) {
	stack, err := lab.FindStack(*g.tools, e.getenv("LACE_TOOLS_BIN"))
	if err != nil || stack == nil {
		if err == nil {
			fmt.Fprintln(e.stderr, "no containerd found: nodes without one (scripts/tools brings it)")
		}
		return nil, err
	}
	wrapper := filepath.Join(filepath.Dir(self), "lace-runc")
	if _, err := os.Stat(wrapper); err == nil {
		stack.Runtime = wrapper
	} else if !*g.noAgent {
		return nil, fmt.Errorf("lace-runc is expected beside %s: %w; `make build` makes both", self, err)
	}
	stack.Image, err = g.archive(e)
	return stack, err
}

// archive is the image's absolute path: it is read from inside the nodes.
func (g upFlags) archive(e *env) (string, error) {
	path := *g.image
	if path == "" {
		path = e.getenv("LACE_IMAGE")
	}
	if path == "" {
		return "", nil
	}
	if err := lab.CheckImage(path); err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

func runLabDown(_ context.Context, e *env, args []string) error {
	fs, name := labFlags("down")
	if err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	found, err := lab.Down(*name, e.stderr)
	if err != nil {
		return err
	}
	if !found {
		_, err = fmt.Fprintf(e.stderr, "lab %q is not there: nothing to take down\n", *name)
		return err
	}
	_, err = fmt.Fprintf(e.stderr, "lab %q is down\n", *name)
	return err
}

func runLabExec(_ context.Context, e *env, args []string) error {
	fs, name := labFlags("exec")
	words, err := parseMixed(fs, args, -1)
	if err != nil {
		return err
	}
	if len(words) < 3 || words[1] != "--" {
		return usagef(fs, "expected NODE -- COMMAND")
	}
	c := lab.Command{Args: words[2:], Env: os.Environ(), Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	status, err := lab.Exec(*name, words[0], c)
	if err != nil {
		return err
	}
	if status != exitOK {
		os.Exit(status) // the command's own, which is not one of ours
	}
	return nil
}

func runLabStatus(_ context.Context, e *env, args []string) error {
	fs, name := labFlags("status")
	if err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	return lab.Status(*name, e.stdout)
}

func runLabLogs(_ context.Context, e *env, args []string) error {
	fs, name := labFlags("logs")
	words, err := parseMixed(fs, args, 2)
	if err != nil {
		return err
	}
	switch len(words) {
	case 1:
		return lab.Logs(*name, words[0], "agent", e.stdout)
	case 2:
		return lab.Logs(*name, words[0], words[1], e.stdout)
	}
	return usagef(fs, "the node is missing")
}

func runLabStart(_ context.Context, _ *env, args []string) error {
	fs, name := labFlags("start")
	words, err := parseMixed(fs, args, 1)
	if err != nil {
		return err
	}
	if len(words) != 1 {
		return usagef(fs, "the node is missing")
	}
	return lab.Start(*name, words[0])
}

func runLabKill(_ context.Context, _ *env, args []string) error {
	fs, name := labFlags("kill")
	words, err := parseMixed(fs, args, 2)
	if err != nil {
		return err
	}
	if len(words) != 2 {
		return usagef(fs, "expected NODE and agent or containerd")
	}
	return lab.Kill(*name, words[0], words[1])
}
