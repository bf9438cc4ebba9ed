// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// cleanUpPatience bounds the clean-up, which goes on after an interrupt.
const cleanUpPatience = time.Minute

// lab holds all beds of a run, alive at once.
type lab struct {
	beds  []*bed
	apart []*bed // those without traffic, made when needed
	opt   options
	log   func(format string, args ...any)
}

func newLab(opt options, stderr io.Writer) *lab {
	log := func(format string, args ...any) { fmt.Fprintf(stderr, "bench: "+format+"\n", args...) }
	l := &lab{opt: opt, log: log}
	for _, name := range opt.beds {
		l.beds = append(l.beds, newBed(kindNamed(name), opt.wire))
	}
	return l
}

// build makes every bed and shows that a packet gets through it.
func (l *lab) build(ctx context.Context) error {
	if err := errors.Join(removeNetns(ctx), removeDirs()); err != nil {
		return fmt.Errorf("remove what an earlier bench left: %w", err)
	}
	for _, b := range l.beds {
		began := time.Now()
		if err := b.construct(ctx); err != nil {
			return fmt.Errorf("build bed %s: %w", b.name, err)
		}
		if err := b.prove(ctx, l.opt.family); err != nil {
			return fmt.Errorf("bed %s: %w", b.name, err)
		}
		l.log("bed %s is up after %d ms", b.name, time.Since(began).Milliseconds())
	}
	return nil
}

// prove waits until a short exchange gets through.
func (b *bed) prove(ctx context.Context, family int) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var why error
	for {
		_, err := b.traffic(ctx, "rr", family, 10*time.Millisecond)
		if err == nil {
			return nil
		}
		if why == nil || ctx.Err() == nil { // the last one may only say that its time was up
			why = err
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return fmt.Errorf("no traffic gets through: %w", why)
		}
	}
}

// removeDirs takes away the directories of a bench that was killed.
func removeDirs() error {
	paths, err := filepath.Glob(filepath.Join(os.TempDir(), netnsPrefix+"*"))
	for _, p := range paths {
		err = errors.Join(err, os.RemoveAll(p))
	}
	return err
}

// close takes everything away, in reverse, going on past errors.
func (l *lab) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanUpPatience)
	defer cancel()
	var errs []error
	for _, b := range slices.Backward(slices.Concat(l.beds, l.apart)) {
		for _, stop := range slices.Backward(b.onStop) {
			errs = append(errs, stop())
		}
	}
	return errors.Join(append(errs, removeNetns(ctx))...)
}
