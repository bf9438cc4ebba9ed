// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
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
	Against string `json:"against"` // "": an absolute figure, its unit in the metric's name
	spread
	Rounds int `json:"rounds"`
}

// references are the beds that others are compared with, nearest relative first.
var references = []string{"vxlan", "seg6", "routed", "bare"}

// rows compares every bed with every reference; a reference only with those after it.
func (r *record) rows() []row {
	var rows []row
	for _, m := range r.Metrics {
		for _, b := range r.Beds {
			for _, against := range r.against(b) {
				ratios := paired(r.Samples[m][b], r.Samples[m][against])
				rows = append(rows, row{b, m, against, spreadOf(ratios), len(ratios)})
			}
		}
	}
	return rows
}

func (r *record) against(bed string) []string {
	var refs []string
	for _, ref := range references[slices.Index(references, bed)+1:] {
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
	r.print(stdout, rows)
	return nil
}

// writeJSON replaces the file in one step, so that a reader never sees half of it.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// print shows the medians and the paired ratios with their quartiles.
func (r *record) print(w io.Writer, rows []row) {
	fmt.Fprintf(w, "%s; IPv%d, wire %q, %s samples, all on one CPU; median of paired ratios [quartiles]\n\n",
		r.Host, r.Family, r.Wire, r.Sample)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, m := range r.Metrics {
		r.printMetric(t, metricNamed(m), rows)
	}
	t.Flush()
}

func (r *record) printMetric(w io.Writer, m metric, rows []row) {
	head := []string{m.name, m.unit}
	refs := r.against("")
	for _, ref := range refs {
		head = append(head, "÷ "+ref)
	}
	fmt.Fprintln(w, strings.Join(head, "\t"))
	for _, b := range r.Beds {
		cells := []string{b, figure(spreadOf(r.Samples[m.name][b]).Median)}
		for _, ref := range refs {
			cells = append(cells, ratioCell(rows, b, m.name, ref))
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	fmt.Fprintln(w)
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
