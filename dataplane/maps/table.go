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
// is gone, so that a row which stays is never missing.
func (t Table[K, V]) Sync(want map[K]V) (Changes, error) {
	var done Changes
	have, err := t.All()
	if err != nil {
		return done, err
	}
	var errs []error
	for k, v := range want {
		if old, ok := have[k]; ok && old == v {
			continue
		}
		if err := t.Put(k, v); err != nil {
			errs = append(errs, err)
			continue
		}
		done.Put++
	}
	for k := range have {
		if _, ok := want[k]; ok {
			continue
		}
		if err := t.Delete(k); err != nil {
			errs = append(errs, err)
			continue
		}
		done.Deleted++
	}
	return done, errors.Join(errs...)
}

func (t Table[K, V]) wrap(what string, err error) error {
	if isFull(err) {
		return fmt.Errorf("%s map %s: it holds %d rows and is full: %w", what, t.name, t.m.MaxEntries(), err)
	}
	return fmt.Errorf("%s map %s: %w", what, t.name, err)
}
