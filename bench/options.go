// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// options is what the command line says.
type options struct {
	beds    []string
	metrics []string
	family  int // 4 or 6: of the packets that are measured
	wire    string
	rounds  int
	sample  time.Duration // length of one traffic sample
	cpu     int           // everything runs on this one; -1: the last
	out     string        // the rows, as JSON
	raw     string        // every sample, as JSON; empty: not written
	doc     string        // Markdown that holds the table between two marks; empty: none

	runs     int           // of each program in a round
	attaches int           // that are timed for each population
	lace     string        // the real agent
	settle   time.Duration // until the agent counts as at rest
	owned    int           // flows that are masqueraded at once
	opening  time.Duration // for which connections are opened
	entries  [2]int        // of the tables of flows of the two nodes; a flow has one for each direction
}

func (o options) wants(metric string) bool { return slices.Contains(o.metrics, metric) }

// traffic are the metrics that are measured by traffic.
func (o options) traffic() []string {
	return slices.DeleteFunc(slices.Clone(o.metrics), func(m string) bool { return !slices.Contains(trafficNames(), m) })
}

// usageError is a mistake on the command line: exit status 2.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func parseOptions(args []string, stderr io.Writer) (options, error) {
	var opt options
	var beds, metrics string
	var smoke bool
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&beds, "beds", strings.Join(bedNames(), ","), "`names` of the beds to build")
	fs.StringVar(&metrics, "metrics", strings.Join(metricNames(), ","), "`names` of what to measure")
	fs.IntVar(&opt.family, "family", 4, "IP `version` of the measured packets: 4 or 6")
	fs.StringVar(&opt.wire, "wire", "sw", "offloads of the wire: "+strings.Join(wireNames(), ", "))
	fs.IntVar(&opt.rounds, "rounds", 12, "`number` of rounds, each measuring every bed once")
	fs.DurationVar(&opt.sample, "sample", 800*time.Millisecond, "`length` of one traffic sample")
	fs.IntVar(&opt.cpu, "cpu", -1, "`number` of the CPU that everything runs on; -1: the last")
	fs.StringVar(&opt.out, "out", "bench/latest.json", "`file` for the rows")
	fs.StringVar(&opt.raw, "raw", "", "`file` for every sample; empty: not written")
	fs.StringVar(&opt.doc, "doc", "", "Markdown `file` whose table is replaced; empty: none")
	fs.StringVar(&opt.lace, "lace", "bin/lace", "`binary` of the agent, whose memory is measured")
	fs.BoolVar(&smoke, "smoke", false, "two short rounds: shows that all of it works, measures nothing")
	if err := fs.Parse(args); err != nil {
		return opt, asUsage(err)
	}
	opt.runs, opt.attaches, opt.settle, opt.entries = 2000, 200, 10*time.Second, [2]int{1_000, 1_000_000}
	opt.owned, opt.opening = 20_000, time.Minute
	if smoke {
		opt.rounds, opt.sample = 2, 100*time.Millisecond
		opt.runs, opt.attaches, opt.settle, opt.entries = 20, 3, 3*time.Second, [2]int{1_000, 10_000}
		opt.owned, opt.opening = 2_000, time.Second
	}
	opt.beds, opt.metrics = strings.Split(beds, ","), strings.Split(metrics, ",")
	return opt, opt.check(fs.Args())
}

func asUsage(err error) error {
	if err == flag.ErrHelp {
		return err
	}
	return usageError{err}
}

func (o options) check(rest []string) error {
	if len(rest) > 0 {
		return usagef("unexpected argument %q; bench takes flags only, see --help", rest[0])
	}
	if err := known("bed", o.beds, bedNames()); err != nil {
		return err
	}
	if err := known("metric", o.metrics, metricNames()); err != nil {
		return err
	}
	if err := known("wire", []string{o.wire}, wireNames()); err != nil {
		return err
	}
	if o.family != 4 && o.family != 6 {
		return usagef("--family %d is no IP version; give 4 or 6", o.family)
	}
	if o.rounds < 1 || o.rounds > 10000 {
		return usagef("--rounds %d is out of range; give 1 to 10000", o.rounds)
	}
	if o.sample < 50*time.Millisecond || o.sample > time.Minute {
		return usagef("--sample %s is out of range; give 50ms to 1m", o.sample)
	}
	timed := func(bed string) bool { return slices.Contains(programBeds(), bed) }
	if len(o.metrics) == 1 && o.wants(metricPrograms) && !slices.ContainsFunc(o.beds, timed) {
		return usagef("%s is measured on %s; add one to --beds", metricPrograms, strings.Join(programBeds(), ", "))
	}
	if o.wants(metricAttach) {
		return executable(o.lace)
	}
	return nil
}

// known refuses a name that is not among the valid ones, and one that is given twice.
func known(what string, names, valid []string) error {
	for i, n := range names {
		if !slices.Contains(valid, n) {
			return usagef("unknown %s %q; there are %s", what, n, strings.Join(valid, ", "))
		}
		if slices.Contains(names[:i], n) {
			return usagef("%s %q is given twice; name it once", what, n)
		}
	}
	return nil
}

func executable(path string) error {
	f, err := os.Stat(path)
	if err == nil && f.Mode().IsRegular() && f.Mode()&0o111 != 0 {
		return nil
	}
	return usagef("--lace %s is no program; build it (make build), or leave %q out of --metrics", path, metricAttach)
}
