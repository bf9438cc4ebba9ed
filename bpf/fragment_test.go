// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"github.com/lace-net/lace/bpf"
)

// fragments are what the programs remember of first fragments.
func (n *node) fragments() map[bpf.LaceFragmentKey]bpf.LaceFragment {
	n.t.Helper()
	out := map[bpf.LaceFragmentKey]bpf.LaceFragment{}
	var key bpf.LaceFragmentKey
	var first bpf.LaceFragment
	rows := n.coll.Maps["fragments"].Iterate()
	for rows.Next(&key, &first) {
		out[key] = first
	}
	must(n.t, rows.Err())
	return out
}

func (n *node) dropFragments() {
	n.t.Helper()
	for key := range n.fragments() {
		must(n.t, n.coll.Maps["fragments"].Delete(key))
	}
}
