// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"
)

// record is all samples of a run: by metric, by bed, one a round.
type record struct {
	Host    string                          `json:"host"`
	Date    string                          `json:"date"`
	Family  int                             `json:"family"`
	Wire    string                          `json:"wire"`
	Sample  string                          `json:"sample"`
	Beds    []string                        `json:"beds"`
	Metrics []string                        `json:"metrics"`
	Samples map[string]map[string][]float64 `json:"samples"`
}

// tries bounds how often a sample that failed is taken again.
const tries = 3

// measure takes the samples: in each round every bed once for each metric, in an order drawn anew, so
// that what the machine does besides hits all beds alike.
func measure(ctx context.Context, beds []*bed, opt options, stderr io.Writer) (*record, error) {
	rec := &record{Host: host(), Date: time.Now().UTC().Format(time.DateOnly), Family: opt.family, Wire: opt.wire,
		Sample: opt.sample.String(), Beds: opt.beds, Metrics: opt.metrics, Samples: map[string]map[string][]float64{}}
	for _, m := range opt.metrics {
		rec.Samples[m] = map[string][]float64{}
	}
	began := time.Now()
	for round := range opt.rounds {
		if err := rec.round(ctx, beds, opt, stderr); err != nil {
			return nil, fmt.Errorf("round %d: %w", round+1, err)
		}
		fmt.Fprintf(stderr, "bench: round %d of %d done after %d s\n", round+1, opt.rounds, int(time.Since(began).Seconds()))
	}
	return rec, nil
}

func (r *record) round(ctx context.Context, beds []*bed, opt options, stderr io.Writer) error {
	for _, m := range opt.metrics {
		order := slices.Clone(beds)
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, b := range order {
			v, err := b.sample(ctx, m, opt, stderr)
			if err != nil {
				return fmt.Errorf("measure %s on %s: %w", m, b.name, err)
			}
			r.Samples[m][b.name] = append(r.Samples[m][b.name], v)
		}
	}
	return nil
}

// sample takes one sample, and takes it again a bounded number of times when it fails, saying so.
func (b *bed) sample(ctx context.Context, metric string, opt options, stderr io.Writer) (float64, error) {
	var err error
	for range tries {
		var v float64
		if v, err = b.traffic(ctx, metric, opt.family, opt.sample); err == nil {
			return v, nil
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		fmt.Fprintf(stderr, "bench: %s on %s failed, taken again: %v\n", metric, b.name, err)
	}
	return 0, err
}
