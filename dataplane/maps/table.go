// SPDX-License-Identifier: Apache-2.0

// Package maps gives the eBPF maps their types. A table is brought to a wanted state by Sync, which
// writes only what differs; rows that change one at a time go through Put and Delete.
//
// The tables of the configuration hold two slots, one of which is active (generation.go): a new topology is written to
// the other and becomes active with one write.
package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// Table is a hash map or trie of the data plane with rows of one shape.
type Table[K, V comparable] struct {
	name string
	m    *ebpf.Map
}

// Changes counts what a Sync wrote.
type Changes struct{ Put, Deleted int }

// Add sums up.
func (c Changes) Add(d Changes) Changes { return Changes{c.Put + d.Put, c.Deleted + d.Deleted} }

// Put writes one row. It fails when the map is full (E2BIG, ENOSPC for a trie).
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

// batch is how many rows one system call reads, writes or deletes: enough that the calls cost nothing, and far above what
// one bucket of a hash map holds, which a call must take whole.
const batch = 1024

// All reads the whole table, both slots of it.
func (t Table[K, V]) All() (map[K]V, error) {
	rows := map[K]V{}
	err := eachRow(t.m, func(k K, v V) error {
		rows[k] = v
		return nil
	})
	if err != nil {
		return nil, t.wrap("read", err)
	}
	return rows, nil
}

// eachRow calls f for every row, until it fails.
func eachRow[K, V any](m *ebpf.Map, f func(K, V) error) error {
	keys, values := make([]K, batch), make([]V, batch)
	var at ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&at, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		for i := range n {
			if err := f(keys[i], values[i]); err != nil {
				return err
			}
		}
		if err != nil {
			return nil // that was the last batch
		}
	}
}

// Sync makes the table hold want and nothing else: first what is new or different, then what
// is gone, so that a row which stays is never missing. What only fits when others are gone comes last.
func (t Table[K, V]) Sync(want map[K]V) (Changes, error) {
	have, err := t.All()
	if err != nil {
		return Changes{}, err
	}
	return t.change(have, want)
}

// change brings the rows that are there, or a part of them, to those that are wanted.
func (t Table[K, V]) change(have, want map[K]V) (Changes, error) {
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
	waiting, err := t.putAll(put, want)
	undeleted, errGone := t.deleteAll(gone)
	done := Changes{Put: len(put) - len(waiting), Deleted: len(gone) - len(undeleted)}
	if isFull(err) && done.Deleted > 0 {
		var still []K
		still, err = t.putAll(waiting, want)
		done.Put += len(waiting) - len(still)
	}
	return done, errors.Join(err, errGone)
}

// putAll writes rows, goes on where one fails, and returns the keys of those with one error of each kind.
func (t Table[K, V]) putAll(keys []K, rows map[K]V) (failed []K, err error) {
	values := make([]V, 0, batch)
	return t.each(keys, func(part []K) (int, error) {
		values = values[:0]
		for _, k := range part {
			values = append(values, rows[k])
		}
		return t.m.BatchUpdate(part, values, nil)
	}, func(k K) error { return t.Put(k, rows[k]) })
}

// deleteAll removes rows in the same way.
func (t Table[K, V]) deleteAll(keys []K) (failed []K, err error) {
	return t.each(keys, func(part []K) (int, error) { return t.m.BatchDelete(part, nil) }, t.Delete)
}

// each does all keys in batches. A batch ends at the first key that fails: its rest is done one by one.
func (t Table[K, V]) each(keys []K, many func([]K) (int, error), one func(K) error) (failed []K, err error) {
	told := map[string]bool{}
	var errs []error
	for first := 0; first < len(keys); first += batch {
		part := keys[first:min(first+batch, len(keys))]
		done, failure := many(part)
		if failure == nil {
			continue
		}
		for _, k := range part[min(done, len(part)):] {
			e := one(k)
			if e == nil {
				continue
			}
			failed = append(failed, k)
			if !told[e.Error()] {
				told[e.Error()] = true
				errs = append(errs, e)
			}
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
