// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// record is all that a run measured.
type record struct {
	Host       string                          `json:"host"`
	Date       string                          `json:"date"`
	Load       float64                         `json:"load"` // average before the run
	Family     int                             `json:"family"`
	Wire       string                          `json:"wire"`
	Sample     string                          `json:"sample"`
	Beds       []string                        `json:"beds"`
	Metrics    []string                        `json:"metrics"`            // of the traffic
	Samples    map[string]map[string][]float64 `json:"samples"`            // by metric, by bed, one a round
	Programs   map[string]map[string][]float64 `json:"programs,omitempty"` // ns by bed, by program, one a round
	Attach     map[int][]float64               `json:"attach,omitempty"`   // ms by containers already there
	RSS        float64                         `json:"rss,omitempty"`      // MB of the agent with the last of populations
	Flows      map[int][]float64               `json:"flows,omitempty"`    // ns of pod_l3 by entries in the table, one a round
	Collect    []float64                       `json:"collect,omitempty"`  // ms of a collection among the most entries
	Apply      map[string][]float64            `json:"apply,omitempty"`    // ms of an apply, by what it changes
	FDB        map[string]map[int][]float64    `json:"fdb,omitempty"`      // ns of pod_l2 by frame, by endpoints that are known, one a round
	Flood      map[string][]float64            `json:"flood,omitempty"`    // ns of one more copy, by whom it goes to, one a round
	Masquerade *masqueraded                    `json:"masquerade,omitempty"`
}

func newRecord(opt options) *record {
	return &record{Host: host(), Date: time.Now().UTC().Format(time.DateOnly), Family: opt.family, Wire: opt.wire,
		Sample: opt.sample.String(), Beds: opt.beds, Metrics: opt.traffic(), Samples: map[string]map[string][]float64{},
		Programs: map[string]map[string][]float64{}, Attach: map[int][]float64{}, Flows: map[int][]float64{}, Apply: map[string][]float64{},
		FDB: map[string]map[int][]float64{}, Flood: map[string][]float64{}}
}

// busy is the load from which on a machine has too much else to do for figures of any worth.
const busy = 1.0

// noteLoad records what else runs, and warns.
func (l *lab) noteLoad(rec *record) (err error) {
	if rec.Load, err = load(); err != nil {
		return err
	}
	if rec.Load >= busy {
		l.log("the load is %.1f: something else runs on this machine, so the figures will say little", rec.Load)
	}
	return nil
}

// tries bounds how often a sample that failed is taken again.
const tries = 3

// measure takes the samples: in each round every bed once for each metric, in an order drawn anew, so
// that what the machine does besides hits all beds alike.
func (l *lab) measure(ctx context.Context) (*record, error) {
	rec := newRecord(l.opt)
	if err := l.noteLoad(rec); err != nil {
		return nil, err
	}
	for _, m := range rec.Metrics {
		rec.Samples[m] = map[string][]float64{}
	}
	began := time.Now()
	for round := range l.opt.rounds {
		if err := l.round(ctx, rec); err != nil {
			return nil, fmt.Errorf("round %d: %w", round+1, err)
		}
		l.log("round %d of %d done after %d s", round+1, l.opt.rounds, int(time.Since(began).Seconds()))
	}
	return rec, l.measureApart(ctx, rec)
}

// measureApart takes what needs beds of its own.
func (l *lab) measureApart(ctx context.Context, rec *record) error {
	for _, m := range []struct {
		name    string
		measure func(context.Context, *record) error
	}{{metricAttach, l.measureAttach}, {metricFlows, l.measureFlows}, {metricApply, l.measureApply},
		{metricFDB, l.measureFDB}, {metricFlood, l.measureFlood}, {metricMasq, l.measureMasquerade}} {
		if !l.opt.wants(m.name) {
			continue
		}
		if err := m.measure(ctx, rec); err != nil {
			return fmt.Errorf("measure %s: %w", m.name, err)
		}
	}
	return nil
}

func (l *lab) round(ctx context.Context, rec *record) error {
	for _, m := range rec.Metrics {
		order := slices.DeleteFunc(slices.Clone(l.beds), func(b *bed) bool { return !b.carries(m) })
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, b := range order {
			v, err := l.sample(ctx, b, m)
			if err != nil {
				return fmt.Errorf("measure %s on %s: %w", m, b.name, err)
			}
			rec.Samples[m][b.name] = append(rec.Samples[m][b.name], v)
		}
	}
	if l.opt.wants(metricPrograms) {
		return l.measurePrograms(rec)
	}
	return nil
}

// measurePrograms runs the programs on beds of Lace, with their maps as they are.
func (l *lab) measurePrograms(rec *record) error {
	for _, b := range l.beds {
		if b.trials == "" {
			continue
		}
		r, err := b.agents[0].do(order{Do: "programs", Container: b.container(0), Trials: b.trials,
			Far: b.addr[4].String(), Far6: b.addr[6].String(), Runs: l.opt.runs})
		if err != nil {
			return fmt.Errorf("measure %s on %s: %w", metricPrograms, b.name, err)
		}
		rec.notePrograms(b.name, r.Programs)
	}
	return nil
}

func (r *record) notePrograms(bed string, ns map[string]float64) {
	if r.Programs[bed] == nil {
		r.Programs[bed] = map[string][]float64{}
	}
	for name, took := range ns {
		r.Programs[bed][name] = append(r.Programs[bed][name], took)
	}
}

// sample takes one sample, and takes it again a bounded number of times when it fails, saying so.
func (l *lab) sample(ctx context.Context, b *bed, metric string) (float64, error) {
	var err error
	for range tries {
		var v float64
		if v, err = b.traffic(ctx, metric, l.opt.family, l.opt.sample); err == nil {
			return v, nil
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		l.log("%s on %s failed, taken again: %v", metric, b.name, err)
	}
	return 0, err
}
