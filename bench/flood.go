// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/plan"
)

// copies of a frame that go to few and to many.
const (
	fewCopies  = 1
	manyCopies = 65
)

// crowdOf is a network of the flood's bed: the sender of a frame for many, and how many others get it where.
type crowdOf struct {
	network string
	what    string // of rec.Flood
	copies  int
	ports   int    // of this node, the sender's among them
	pools   string // line of the network
}

// floodCrowds are networks in which a frame goes to other nodes only, or to other containers of its node only.
var floodCrowds = []crowdOf{
	{"far-few", "node", fewCopies, 1, `pools = { node-a = ["10.62.1.0/24"], node-b = ["10.62.2.0/24"] }`},
	{"far-many", "node", manyCopies, 1, `pool-size = { v4 = 24 }`},
	{"near-few", "port", fewCopies, 1 + fewCopies, `pools = { node-a = ["10.62.1.0/24"] }`},
	{"near-many", "port", manyCopies, 1 + manyCopies, `pools = { node-a = ["10.62.1.0/24"] }`},
}

// measureFlood times what one more copy of a frame for many costs.
func (l *lab) measureFlood(ctx context.Context, rec *record) error {
	b := newBed(kind{name: "flood", build: func(ctx context.Context, b *bed) error {
		// What comes in at the far end is no part of a copy, and is dropped there as soon as can be.
		if err := b.node[1].ip(ctx, "route add blackhole "+locatorBlock); err != nil {
			return err
		}
		return b.startNodes(floodFabric())
	}}, l.opt.wire)
	l.apart = append(l.apart, b)
	if err := b.construct(ctx); err != nil {
		return fmt.Errorf("build bed flood: %w", err)
	}
	for _, c := range floodCrowds {
		if err := b.populate(c); err != nil {
			return err
		}
	}
	if err := b.ready(ctx); err != nil {
		return err
	}
	for range l.opt.rounds {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r, err := b.agents[0].do(order{Do: "flood", Runs: l.opt.runs})
		if err != nil {
			return err
		}
		for what, ns := range perCopy(r.Programs) {
			rec.Flood[what] = append(rec.Flood[what], ns)
		}
	}
	l.log("sent %d and %d copies of frames for many", fewCopies, manyCopies)
	return nil
}

// perCopy is what each copy beyond the few takes, in ns.
func perCopy(ns map[string]float64) map[string]float64 {
	per := map[string]float64{}
	for _, c := range floodCrowds {
		if c.copies == fewCopies {
			per[c.what] -= ns[c.network] / (manyCopies - fewCopies)
		} else {
			per[c.what] += ns[c.network] / (manyCopies - fewCopies)
		}
	}
	return per
}

// floodFabric has one network for each crowd, and as many nodes beyond the wire as get copies.
func floodFabric() fabric {
	w := new(strings.Builder)
	for i := range manyCopies - 1 { // the first is at the other end of the wire
		number := len(nodeNames) + 1 + i
		w.WriteString(farNode(number, fmt.Sprintf("fd11::%x", number)))
	}
	for i, c := range floodCrowds {
		fmt.Fprintf(w, "[network.%s]\ntype = \"l2\"\nid = %d\nsubnets = [\"10.62.0.0/16\"]\nflood-rate = 1000000\n%s\n", c.network, 300+i, c.pools)
	}
	return fabric{tables: w.String()}
}

// populate attaches the ports of a crowd, all in one namespace.
func (b *bed) populate(c crowdOf) error {
	for i := range c.ports {
		_, err := b.agents[0].do(order{Do: "attach", Container: c.container(i), Network: c.network, Netns: b.pod[0].path(),
			IfName: fmt.Sprintf("%s-%d", c.network, i)})
		if err != nil {
			return err
		}
	}
	return nil
}

func (c crowdOf) container(i int) string { return fmt.Sprintf("bench/%s-%d", c.network, i) }

// flood has the sender of each crowd send a frame for many, and makes sure that all copies went out.
func (n *node) flood(o order) (report, error) {
	var trials []trial
	want := 0
	for _, c := range floodCrowds {
		port, err := n.port(c.container(0))
		if err != nil {
			return report{}, err
		}
		everybody := plan.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
		trials = append(trials, trial{name: c.network, program: n.entry(hook.PodL2), ifindex: port.Ifindex, answer: actShot,
			packet: frame(everybody, port.MAC, etherOther, make([]byte, packetSize))})
		want += o.Runs * c.copies
	}
	before, err := packetsSent()
	if err != nil {
		return report{}, err
	}
	r, err := inTurn(o.Runs, trials...)
	if err != nil {
		return report{}, err
	}
	after, err := packetsSent()
	switch copies, astray := after.copies-before.copies, after.astray-before.astray; {
	case err != nil:
		return report{}, err
	case copies < want:
		return report{}, fmt.Errorf("%d copies went out of %d: some were refused", copies, want)
	case astray > 0:
		return report{}, fmt.Errorf("%d copies took the way through the segmenter, as a MAC address of the wire was not known", astray)
	}
	return r, nil
}

// sent is what interfaces of the node have sent.
type sent struct {
	copies int // by the uplink and the ports
	astray int // by the segmenter
}

func packetsSent() (s sent, err error) {
	links, err := filepath.Glob("/sys/class/net/*")
	if err != nil {
		return s, err
	}
	for _, link := range links {
		b, err := os.ReadFile(filepath.Join(link, "statistics", "tx_packets"))
		if err != nil {
			return s, fmt.Errorf("count what is sent: %w", err)
		}
		count, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			return s, fmt.Errorf("count what is sent by %s: %w", filepath.Base(link), err)
		}
		if strings.HasPrefix(filepath.Base(link), "laces") {
			s.astray += count
		} else {
			s.copies += count
		}
	}
	return s, nil
}
