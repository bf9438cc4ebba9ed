// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// Bounds of conntrack. An idle time may be below what the RFCs ask for: in a lab that is of use.
const (
	MinFlows = 1024
	MaxFlows = 4194304
	MinIdle  = time.Second
	MaxIdle  = 7 * 24 * time.Hour
)

// DefaultConntrack is what holds where the file says nothing: the least times that RFC 5382 REQ-5
// (TCP), RFC 4787 REQ-5 (UDP) and RFC 5508 REQ-1 (ICMP) ask for; for UDP that was answered what RFC 4787 recommends.
func DefaultConntrack() Conntrack {
	return Conntrack{
		Max:        65536,
		TCPOpening: 4 * time.Minute, TCPEstablished: 2*time.Hour + 4*time.Minute,
		TCPClosing: 4 * time.Minute, TCPClosed: 4 * time.Minute,
		UDPNew: 2 * time.Minute, UDP: 5 * time.Minute,
		ICMP: time.Minute, Other: 10 * time.Minute,
	}
}

// idle is a time without packets after which a flow is forgotten. 0 is one that the file does not give.
type idle struct{ time.Duration }

// UnmarshalText reads what time.ParseDuration does, in whole seconds within the bounds.
func (i *idle) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	switch {
	case err != nil:
		return bad("", "%s is no time", shortQuote(string(text)))
	case d < MinIdle || d > MaxIdle:
		return bad("", "%s is out of range", shortQuote(string(text)))
	case d%time.Second != 0:
		return bad("", "%s is no whole number of seconds", shortQuote(string(text)))
	}
	i.Duration = d
	return nil
}

func (b *builder) conntrack(raw *rawConntrack) {
	c := DefaultConntrack()
	if most := raw.Max; most != nil {
		if *most < MinFlows || *most > MaxFlows {
			b.fail("conntrack.max", fmt.Sprintf("choose a number from %d to %d", MinFlows, MaxFlows), "%d is out of range", *most)
		}
		c.Max = int(*most)
	}
	given := []idle{raw.TCPOpening, raw.TCPEstablished, raw.TCPClosing, raw.TCPClosed, raw.UDPNew, raw.UDP, raw.ICMP, raw.Other}
	for i, t := range c.times() {
		if given[i].Duration != 0 {
			*t.idle = given[i].Duration
		}
	}
	b.topology.Conntrack = c
}

// timeOut is one of the times of Conntrack under its key in the file.
type timeOut struct {
	key  string
	idle *time.Duration
}

// times are in the order of the fields.
func (c *Conntrack) times() []timeOut {
	return []timeOut{
		{"tcp-opening", &c.TCPOpening}, {"tcp-established", &c.TCPEstablished}, {"tcp-closing", &c.TCPClosing}, {"tcp-closed", &c.TCPClosed},
		{"udp-new", &c.UDPNew}, {"udp", &c.UDP}, {"icmp", &c.ICMP}, {"other", &c.Other},
	}
}

func (c Conntrack) canonical(w *strings.Builder) {
	fmt.Fprintf(w, "\n[conntrack]\nmax = %d\n", c.Max)
	for _, t := range c.times() {
		fmt.Fprintf(w, "%s = %q\n", t.key, *t.idle)
	}
}

// MarshalJSON writes the keys of the file, times as the file has them.
func (c Conntrack) MarshalJSON() ([]byte, error) {
	values := map[string]any{"max": c.Max}
	for _, t := range c.times() {
		values[t.key] = t.idle.String()
	}
	return json.Marshal(values)
}

// UnmarshalJSON reads what MarshalJSON writes. It bounds nothing: that is for the file.
func (c *Conntrack) UnmarshalJSON(text []byte) error {
	var max struct{ Max int }
	if err := json.Unmarshal(text, &max); err != nil {
		return err
	}
	var values map[string]any
	if err := json.Unmarshal(text, &values); err != nil {
		return err
	}
	read := Conntrack{Max: max.Max}
	for _, t := range read.times() {
		s, _ := values[t.key].(string)
		d, err := time.ParseDuration(s)
		if err != nil {
			return fmt.Errorf("conntrack %s: %w", t.key, err)
		}
		*t.idle = d
	}
	*c = read
	return nil
}
