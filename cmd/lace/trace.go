// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/dataplane/trace"
)

// traced is one line of `lace trace`: an event with the names that belong to it.
type traced struct {
	Time      time.Time  `json:"time"`
	Reason    string     `json:"reason"`
	Container string     `json:"container,omitempty"`
	Name      string     `json:"name,omitempty"`
	Network   string     `json:"network,omitempty"`
	Interface string     `json:"interface"`
	Length    uint32     `json:"length"`
	Missed    uint32     `json:"missed,omitempty"`
	Flow      trace.Flow `json:"flow"`
}

// traceFilter is what the command line asks to see; zero fields ask for everything.
type traceFilter struct {
	network, container, reason string
	address                    netip.Addr
	port                       uint
}

func (f traceFilter) takes(t *traced) bool {
	return (f.network == "" || f.network == t.Network) &&
		(f.container == "" || f.container == t.Name || f.container == t.Container) &&
		(f.reason == "" || f.reason == t.Reason) &&
		(!f.address.IsValid() || f.address == t.Flow.Src || f.address == t.Flow.Dst) &&
		(f.port == 0 || f.port == uint(t.Flow.SrcPort) || f.port == uint(t.Flow.DstPort))
}

// check refuses what no event could ever have, before anybody waits for it.
func (f traceFilter) check(flags *flag.FlagSet, count int) error {
	switch {
	case f.reason != "" && !maps.KnownReason(f.reason):
		return usagef(flags, "there is no reason %q; docs/reasons.md lists them", f.reason)
	case f.port > math.MaxUint16:
		return usagef(flags, "there is no port %d; the highest is %d", f.port, math.MaxUint16)
	case count < 0:
		return usagef(flags, "%d events cannot be shown; leave --count away to go on until interrupted", count)
	}
	return nil
}

var errEnough = errors.New("as many events as were asked for")

func runTrace(ctx context.Context, e *env, args []string) error {
	var filter traceFilter
	flags := newFlags("trace")
	file := flags.String("config", conf.DefaultFile, "settings `FILE`")
	asJSON := flags.Bool("json", false, "print one JSON object a line")
	count := flags.Int("count", 0, "end after so many `events`; 0: go on until interrupted")
	flags.StringVar(&filter.network, "network", "", "only of this `network`")
	flags.StringVar(&filter.container, "container", "", "only of the container with this `name` or namespace/id")
	flags.StringVar(&filter.reason, "reason", "", "only with this `reason`")
	flags.TextVar(&filter.address, "address", netip.Addr{}, "only from or to this `address`")
	flags.UintVar(&filter.port, "port", 0, "only from or to this `port`")
	if err := parseFlags(flags, args, 0); err != nil {
		return err
	}
	if err := filter.check(flags, *count); err != nil {
		return err
	}
	s, err := agentSettings("trace", []string{"--config", *file})
	if err != nil {
		return err
	}
	names, err := newNames()
	if err != nil {
		return err
	}
	defer names.dev.Close()
	r, err := trace.Open(hook.PinDir(s.BPFFS), filepath.Join(filepath.Dir(s.HookSocket), "trace.lock"))
	if err != nil {
		return err
	}
	defer r.Close()
	fmt.Fprintln(e.stderr, "refused packets, as they come; end with Ctrl-C")
	seen := 0
	err = r.Each(ctx, func(ev trace.Event) error {
		t := names.name(ev)
		if !filter.takes(t) {
			return nil
		}
		if err := t.print(e.stdout, *asJSON); err != nil {
			return err
		}
		if seen++; seen == *count {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

func (t *traced) print(w io.Writer, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(t)
	}
	who := "uplink " + t.Interface
	if t.Container != "" {
		who = fmt.Sprintf("%s (%s)", cmp.Or(t.Name, t.Container), t.Network)
	}
	_, err := fmt.Fprintf(w, "%s  %-20s  %s  %s, %d bytes\n", t.Time.Format("15:04:05.000000"), t.Reason, who, t.Flow, t.Length)
	if err == nil && t.Missed > 0 {
		_, err = fmt.Fprintf(w, "%17s%d more were not told: there were too many\n", "", t.Missed)
	}
	return err
}

// names finds the container behind an interface, and looks again where it does not know one.
type names struct {
	dev    *netdev.Handle
	ports  map[uint32]plan.Attachment
	links  map[uint32]string
	looked time.Time
}

func newNames() (*names, error) {
	dev, err := netdev.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	n := &names{dev: dev}
	return n, n.look()
}

// lookEvery bounds how often an interface that nobody knows makes us look.
const lookEvery = time.Second

func (n *names) look() error {
	ports, err := n.dev.Ports()
	if err != nil {
		return err
	}
	n.ports, n.looked = map[uint32]plan.Attachment{}, time.Now()
	for _, p := range ports {
		n.ports[uint32(p.Index)] = p.Attachment
	}
	n.links, err = n.dev.LinkNames()
	return err
}

func (n *names) name(e trace.Event) *traced {
	if n.links[e.Ifindex] == "" && time.Since(n.looked) > lookEvery {
		_ = n.look() // the event is told all the same, with the number
	}
	a := n.ports[e.Ifindex]
	return &traced{
		Time: e.Time, Reason: maps.ReasonName(e.Reason), Container: a.Container, Name: a.Name, Network: a.Network,
		Interface: cmp.Or(n.links[e.Ifindex], fmt.Sprintf("#%d", e.Ifindex)), Length: e.Length, Missed: e.Missed, Flow: e.Flow,
	}
}
