// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"sync"
	"testing"
)

// TestNodesAndNetworksComeAndGo applies topologies with more nodes and networks, and with less again, under traffic of the
// others, which must not notice. The new node has a number before the others, so that all are counted anew.
func TestNodesAndNetworksComeAndGo(t *testing.T) {
	takesLong(t)
	few := bedOptions{nodes: 2}
	b := newBed(t, few)
	x, y := b.nodes[0].run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	local := b.nodes[0].run(t, "local", "backend")
	checkPings(t, x, y, local)
	before := b.nodes[0].holdings()
	floods := []*flood{startFlood(t, x, y.port.V4), startFlood(t, x, y.port.V6), startFlood(t, x, local.port.V4)}
	streams := []*stream{startStream(t, x, y, 0), startStream(t, y, x, 1), startStream(t, x, local, 1)}
	exchanges := []*exchange{startExchange(t, x, y, 0), startExchange(t, y, x, 1)}
	for i := range rounds() / 2 {
		checkComing(t, b, i)
		for _, n := range b.nodes {
			n.apply(few.topology())
		}
	}
	for _, f := range floods {
		f.check(t)
	}
	for _, s := range streams {
		s.check(t)
	}
	for _, e := range exchanges {
		e.check(t)
	}
	if _, err := b.nodes[0].agent.call(order{Do: "retain", Live: []string{x.id, local.id}}); err != nil {
		t.Error(err)
	}
	after := b.nodes[0].holdings()
	if fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("before:\n%q\nafter:\n%q", before, after)
	}
}

// checkComing brings a node and two networks in, and has containers there talk to each other.
func checkComing(t *testing.T, b *bed, round int) {
	t.Helper()
	many := bedOptions{nodes: 2, networks: twoNetworks + peered, more: `
[node.n0]
underlay = "fd00:a::99"
locator = "5f00:1ace::/48"
`}
	b.topology = many.topology()
	for _, n := range b.nodes {
		n.apply(b.topology)
	}
	third := b.newNode("n0")
	b.plug(third.namespace, uplink, fmt.Sprint("n0-", round))
	third.give(t, uplink, "fd00:a::99/64")
	third.start()
	web, db, far := b.nodes[0].run(t, fmt.Sprint("web", round), "web"), third.run(t, "db", "db"), b.nodes[1].run(t, fmt.Sprint("far", round), "db")
	for at := range 2 {
		web.reaches(t, db.addresses()[at])
		web.reaches(t, far.addresses()[at])
		far.reaches(t, db.addresses()[at])
	}
	for _, c := range []*container{web, far} {
		if round%2 == 0 { // otherwise its network goes first
			c.order(t, "release")
		}
	}
	third.stop()
	third.remove()
}

// TestApplyWhileContainersEnd applies topologies while the namespaces of containers go, as they do when containers end:
// that is no reason for an apply to fail.
func TestApplyWhileContainersEnd(t *testing.T) {
	takesLong(t)
	few := bedOptions{nodes: 1}
	texts := []string{few.topology(), bedOptions{nodes: 1, networks: twoNetworks + peered}.topology()}
	n := newBed(t, few).nodes[0]
	for i := range applies() {
		var ends []*container
		for j := range 4 {
			ends = append(ends, n.run(t, fmt.Sprint("ends", i, "-", j), "backend"))
		}
		var removed sync.WaitGroup
		removed.Go(func() {
			for _, c := range ends {
				c.remove()
			}
		})
		n.apply(texts[(i+1)%2])
		removed.Wait()
	}
}
