// SPDX-License-Identifier: Apache-2.0

// Package maps gives the eBPF maps their types. A table is brought to a wanted state by Sync, which
// writes only what differs; rows that change one at a time go through Put and Delete.
package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// Table is a hash map of the data plane with rows of one shape.
type Table[K, V comparable] struct {
	name string
	m    *ebpf.Map
}

// Changes counts what a Sync wrote.
type Changes struct{ Put, Deleted int }

// Add sums up.
func (c Changes) Add(d Changes) Changes { return Changes{c.Put + d.Put, c.Deleted + d.Deleted} }

// Put writes one row. It fails when the map is full (E2BIG).
func (t Table[K, V]) Put(k K, v V) error {
	if err := t.m.Put(k, v); err != nil {
		return t.wrap("write a row of", err)
	}
	return nil
}

// Delete removes one row; a missing one is fine.
func (t Table[K, V]) Delete(k K) error {
	if err := t.m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return t.wrap("delete a row of", err)
	}
	return nil
}

// Get reads one row; false where there is none.
func (t Table[K, V]) Get(k K) (V, bool, error) {
	var v V
	err := t.m.Lookup(k, &v)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return v, false, nil
	}
	if err != nil {
		return v, false, t.wrap("read a row of", err)
	}
	return v, true, nil
}

// All reads the whole table.
func (t Table[K, V]) All() (map[K]V, error) {
	rows := map[K]V{}
	var k K
	var v V
	it := t.m.Iterate()
	for it.Next(&k, &v) {
		rows[k] = v
	}
	if err := it.Err(); err != nil {
		return nil, t.wrap("read", err)
	}
	return rows, nil
}

// Sync makes the table hold want and nothing else: first what is new or different, then what
// is gone, so that a row which stays is never missing. What only fits when others are gone comes last.
func (t Table[K, V]) Sync(want map[K]V) (Changes, error) {
	have, err := t.All()
	if err != nil {
		return Changes{}, err
	}
	var put, gone []K
	for k, v := range want {
		if old, ok := have[k]; !ok || old != v {
			put = append(put, k)
		}
	}
	for k := range have {
		if _, ok := want[k]; !ok {
			gone = append(gone, k)
		}
	}
	waiting, err := t.each(put, func(k K) error { return t.Put(k, want[k]) })
	undeleted, errGone := t.each(gone, t.Delete)
	done := Changes{Put: len(put) - len(waiting), Deleted: len(gone) - len(undeleted)}
	if isFull(err) && done.Deleted > 0 {
		var still []K
		still, err = t.each(waiting, func(k K) error { return t.Put(k, want[k]) })
		done.Put += len(waiting) - len(still)
	}
	return done, errors.Join(err, errGone)
}

// each calls f for every key, goes on where it fails, and returns those keys with one error of each kind.
func (t Table[K, V]) each(keys []K, f func(K) error) (failed []K, err error) {
	told := map[string]bool{}
	var errs []error
	for _, k := range keys {
		e := f(k)
		if e == nil {
			continue
		}
		failed = append(failed, k)
		if !told[e.Error()] {
			told[e.Error()] = true
			errs = append(errs, e)
		}
	}
	if len(failed) > 0 {
		err = fmt.Errorf("%d of %d rows: %w", len(failed), len(keys), errors.Join(errs...))
	}
	return failed, err
}

func (t Table[K, V]) wrap(what string, err error) error {
	if isFull(err) {
		return fmt.Errorf("%s map %s: it holds %d rows and is full: %w", what, t.name, t.m.MaxEntries(), err)
	}
	return fmt.Errorf("%s map %s: %w", what, t.name, err)
}
