// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// row is one line of the report: how bed compares with another on one metric, or an absolute figure
// where nothing is compared.
type row struct {
	Bed     string `json:"bed"`
	Metric  string `json:"metric"`
	Against string `json:"against"` // "": an absolute figure, with its unit
	Unit    string `json:"unit,omitempty"`
	spread
	Rounds int `json:"rounds"`
}

// references are the beds that others are compared with, nearest relative first.
var references = []string{"vxlan", "seg6", "routed", "bare"}

// rows are all lines of the report.
func (r *record) rows() []row {
	return slices.Concat(r.trafficRows(), r.programRows(), r.attachRows(), r.flowRows(), r.applyRows(), r.fdbRows(), r.floodRows(), r.masqueradeRows())
}

// trafficRows compares every bed with every reference, a reference only with those after it, and then each with its kin.
func (r *record) trafficRows() []row {
	var rows []row
	for _, m := range r.Metrics {
		for _, b := range r.Beds {
			for _, against := range append(r.against(b), r.kinOf(b)...) {
				ratios := paired(r.Samples[m][b], r.Samples[m][against])
				if len(ratios) > 0 {
					rows = append(rows, row{Bed: b, Metric: m, Against: against, spread: spreadOf(ratios), Rounds: len(ratios)})
				}
			}
		}
	}
	return rows
}

// kinOf is the bed that one differs least from, if it was measured.
func (r *record) kinOf(bed string) []string {
	if kin := kindNamed(bed).kin; slices.Contains(r.Beds, kin) {
		return []string{kin}
	}
	return nil
}

// programRows compares each program with the empty one.
func (r *record) programRows() []row {
	var rows []row
	for _, bed := range r.Beds {
		empty := r.Programs[bed][emptyProgram]
		for _, name := range slices.Sorted(maps.Keys(r.Programs[bed])) {
			if name == emptyProgram {
				continue
			}
			ratios := paired(r.Programs[bed][name], empty)
			rows = append(rows, row{Bed: bed, Metric: metricPrograms + "/" + name, Against: emptyProgram,
				spread: spreadOf(ratios), Rounds: len(ratios)})
		}
	}
	return rows
}

// attachRows are absolute: the times with so many containers there, their 99th percentile, and the
// agent's memory with the most.
func (r *record) attachRows() []row {
	var rows []row
	for _, n := range slices.Sorted(maps.Keys(r.Attach)) {
		ms := r.Attach[n]
		p99 := quantile(slices.Sorted(slices.Values(ms)), 0.99)
		rows = append(rows,
			row{Bed: laceL3.name, Metric: fmt.Sprintf("%s/%d", metricAttach, n), Unit: "ms", spread: spreadOf(ms), Rounds: len(ms)},
			row{Bed: laceL3.name, Metric: fmt.Sprintf("%s-p99/%d", metricAttach, n), Unit: "ms", spread: spread{p99, p99, p99}, Rounds: len(ms)})
	}
	if r.RSS > 0 {
		rows = append(rows, row{Bed: laceL3.name, Metric: fmt.Sprintf("rss/%d", slices.Max(populations)), Unit: "MB",
			spread: spread{r.RSS, r.RSS, r.RSS}, Rounds: 1})
	}
	return rows
}

// flowRows compare a look-up among the most entries with one among the fewest.
func (r *record) flowRows() []row {
	if len(r.Flows) == 0 {
		return nil
	}
	rows := fewAndMany(laceL3.name, metricFlows, r.Flows)
	collect := fmt.Sprintf("collect/%d", slices.Max(slices.Collect(maps.Keys(r.Flows))))
	return append(rows, row{Bed: laceL3.name, Metric: collect, Unit: "ms", spread: spreadOf(r.Collect), Rounds: len(r.Collect)})
}

// fewAndMany are the times in ns with the fewest there and with the most, and how these compare.
func fewAndMany(bed, metric string, ns map[int][]float64) []row {
	sizes := slices.Sorted(maps.Keys(ns))
	few, many := sizes[0], sizes[len(sizes)-1]
	ratios := paired(ns[many], ns[few])
	return []row{
		{Bed: bed, Metric: fmt.Sprintf("%s/%d", metric, few), Unit: "ns", spread: spreadOf(ns[few]), Rounds: len(ns[few])},
		{Bed: bed, Metric: fmt.Sprintf("%s/%d", metric, many), Unit: "ns", spread: spreadOf(ns[many]), Rounds: len(ns[many])},
		{Bed: bed, Metric: fmt.Sprintf("%s/%d ÷ %d", metric, many, few), Unit: "times", spread: spreadOf(ratios), Rounds: len(ratios)},
	}
}

// fdbRows compare a frame to one of many endpoints with a frame to one of few.
func (r *record) fdbRows() []row {
	var rows []row
	for _, name := range slices.Sorted(maps.Keys(r.FDB)) {
		rows = append(rows, fewAndMany(laceL2.name, name, r.FDB[name])...)
	}
	return rows
}

func (r *record) floodRows() []row {
	return absolute(laceL2.name, metricFlood, "ns", r.Flood)
}

// masqueradeRows are absolute, and those of what was refused had better be 0.
func (r *record) masqueradeRows() []row {
	m := r.Masquerade
	if m == nil {
		return nil
	}
	one := func(what, unit string, v float64) row {
		return row{Bed: laceMasq.name, Metric: metricMasq + "/" + what, Unit: unit, spread: spread{v, v, v}, Rounds: 1}
	}
	return []row{one("at-once", "flows", float64(m.Flows)), one("refused", unitRefused, float64(m.Refused)),
		{Bed: laceMasq.name, Metric: metricMasq + "/opened", Unit: "connections/s", spread: spreadOf(m.Opened), Rounds: len(m.Opened)}}
}

// unitRefused is of the one figure that may be 0.
const unitRefused = "connections"

func (r *record) applyRows() []row {
	return absolute(laceL3.name, metricApply, "ms", r.Apply)
}

// absolute are samples of several things, each a row.
func absolute(bed, metric, unit string, samples map[string][]float64) []row {
	var rows []row
	for _, what := range slices.Sorted(maps.Keys(samples)) {
		rows = append(rows, row{Bed: bed, Metric: metric + "/" + what, Unit: unit, spread: spreadOf(samples[what]), Rounds: len(samples[what])})
	}
	return rows
}

// against are the references that come after a bed; all of them for one that is no reference, none for one that they say nothing of.
func (r *record) against(bed string) []string {
	if kindNamed(bed).outside {
		return nil
	}
	return r.referencesFrom(slices.Index(references, bed) + 1)
}

// referencesFrom are those from a place in their order on that were measured.
func (r *record) referencesFrom(place int) []string {
	var refs []string
	for _, ref := range references[place:] {
		if slices.Contains(r.Beds, ref) {
			refs = append(refs, ref)
		}
	}
	return refs
}

// publish writes the rows, the samples where asked, and prints the table.
func (r *record) publish(opt options, stdout io.Writer) error {
	rows := r.rows()
	if err := writeJSON(opt.out, rows); err != nil {
		return err
	}
	if opt.raw != "" {
		if err := writeJSON(opt.raw, r); err != nil {
			return err
		}
	}
	table := new(bytes.Buffer)
	r.print(table, rows)
	if opt.doc != "" {
		if err := replaceTable(opt.doc, table.String()); err != nil {
			return err
		}
	}
	_, err := stdout.Write(table.Bytes())
	return err
}

// The marks around the table in a Markdown file.
const (
	tableBegin = "<!-- bench: the table below is written by `scripts/bench --doc` -->\n```\n"
	tableEnd   = "```\n<!-- bench: end -->\n"
)

// replaceTable puts the table between the marks of a Markdown file.
func replaceTable(path, table string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("put the table into %s: %w", path, err)
	}
	before, rest, begins := strings.Cut(string(b), tableBegin)
	_, after, ends := strings.Cut(rest, tableEnd)
	if !begins || !ends {
		return fmt.Errorf("put the table into %s: it lacks the lines %q and %q", path, tableBegin, tableEnd)
	}
	return writeFile(path, []byte(before+tableBegin+table+tableEnd+after))
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	return writeFile(path, append(b, '\n'))
}

// writeFile replaces the file in one step, so that a reader never sees half of it.
func writeFile(path string, b []byte) error {
	if err := os.WriteFile(path+".new", b, 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// print shows the medians and the paired ratios with their quartiles.
func (r *record) print(w io.Writer, rows []row) {
	fmt.Fprintf(w, "%s, load %.1f before; IPv%d, wire %q, %s samples on one CPU; median of paired ratios [quartiles]\n\n",
		r.Host, r.Load, r.Family, r.Wire, r.Sample)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, m := range r.Metrics {
		r.printMetric(t, metricNamed(m), rows)
	}
	r.printKin(t, rows)
	r.printPrograms(t, rows)
	r.printAttach(t, rows)
	t.Flush()
}

func (r *record) printMetric(w io.Writer, m metric, rows []row) {
	head := []string{m.name, m.unit}
	refs := r.referencesFrom(0)
	for _, ref := range refs {
		head = append(head, "÷ "+ref)
	}
	fmt.Fprintln(w, strings.Join(head, "\t"))
	for _, b := range r.Beds {
		if len(r.Samples[m.name][b]) == 0 {
			continue
		}
		cells := []string{b, figure(spreadOf(r.Samples[m.name][b]).Median)}
		for _, ref := range refs {
			cells = append(cells, ratioCell(rows, b, m.name, ref))
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	fmt.Fprintln(w)
}

// printKin shows each bed against the one that it differs least from, the metrics side by side.
func (r *record) printKin(w io.Writer, rows []row) {
	if !slices.ContainsFunc(r.Beds, func(b string) bool { return r.kinOf(b) != nil }) || len(r.Metrics) == 0 {
		return
	}
	fmt.Fprintf(w, "side by side\t%s\n", strings.Join(r.Metrics, "\t"))
	for _, b := range r.Beds {
		for _, kin := range r.kinOf(b) {
			cells := []string{b + " ÷ " + kin}
			for _, m := range r.Metrics {
				cells = append(cells, ratioCell(rows, b, m, kin))
			}
			fmt.Fprintln(w, strings.Join(cells, "\t"))
		}
	}
	fmt.Fprintln(w)
}

func (r *record) printPrograms(w io.Writer, rows []row) {
	for _, bed := range r.Beds {
		if len(r.Programs[bed]) == 0 {
			continue
		}
		fmt.Fprintf(w, "program of %s\tns\t÷ %s\n", bed, emptyProgram)
		for _, name := range slices.Sorted(maps.Keys(r.Programs[bed])) {
			fmt.Fprintf(w, "%s\t%s\t%s\n", name, figure(spreadOf(r.Programs[bed][name]).Median),
				ratioCell(rows, bed, metricPrograms+"/"+name, emptyProgram))
		}
		fmt.Fprintln(w)
	}
}

func (r *record) printAttach(w io.Writer, rows []row) {
	for _, row := range rows {
		if row.Unit != "" {
			fmt.Fprintf(w, "%s\t%s %s\t[%.2f–%.2f]\n", row.Metric, figure(row.Median), row.Unit, row.Q1, row.Q3)
		}
	}
}

func ratioCell(rows []row, bed, metric, against string) string {
	i := slices.IndexFunc(rows, func(r row) bool {
		return r.Bed == bed && r.Metric == metric && r.Against == against
	})
	if i < 0 {
		return "–"
	}
	return fmt.Sprintf("%.3f [%.2f–%.2f]", rows[i].Median, rows[i].Q1, rows[i].Q3)
}

// figure prints a median with as many digits as it deserves.
func figure(v float64) string {
	if v < 100 {
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.0f", v)
}
