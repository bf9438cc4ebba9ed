// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestConntrack(t *testing.T) {
	if diff := cmp.Diff(DefaultConntrack(), mustParse(t, base).Conntrack); diff != "" {
		t.Errorf("what holds without [conntrack] (-want +got):\n%s", diff)
	}
	got := mustParse(t, base+`[conntrack]
max = 1024
tcp-opening = "1s"
tcp-established = "168h"
tcp-closing = "90s"
tcp-closed = "1m30s"
udp-new = "3m"
udp = "6m"
icmp = "0.5h"
other = "1h1m1s"
`)
	want := Conntrack{
		Max: 1024, TCPOpening: time.Second, TCPEstablished: 168 * time.Hour, TCPClosing: 90 * time.Second, TCPClosed: 90 * time.Second,
		UDPNew: 3 * time.Minute, UDP: 6 * time.Minute, ICMP: 30 * time.Minute, Other: time.Hour + time.Minute + time.Second,
	}
	if diff := cmp.Diff(want, got.Conntrack); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	roundTrip(t, got)
}

// The defaults are no shorter than what the RFCs ask for.
func TestConntrackDefaults(t *testing.T) {
	c := DefaultConntrack()
	for _, x := range []struct {
		what        string
		have, least time.Duration
	}{
		{"RFC 5382 REQ-5, established", c.TCPEstablished, 2*time.Hour + 4*time.Minute},
		{"RFC 5382 REQ-5, opening", c.TCPOpening, 4 * time.Minute},
		{"RFC 5382 REQ-5, closing", c.TCPClosing, 4 * time.Minute},
		{"RFC 5382 REQ-5, closed", c.TCPClosed, 4 * time.Minute},
		{"RFC 4787 REQ-5", c.UDPNew, 2 * time.Minute},
		{"RFC 4787 REQ-5, recommended", c.UDP, 5 * time.Minute},
		{"RFC 5508 REQ-1", c.ICMP, time.Minute},
	} {
		if x.have < x.least {
			t.Errorf("%s: %s, less than %s", x.what, x.have, x.least)
		}
	}
}

var conntrackErrors = []errorCase{
	{"max low", base + "[conntrack]\nmax = 1023", `t.toml:15: conntrack.max: 1023 is out of range; choose a number from 1024 to 4194304`},
	{"max high", base + "[conntrack]\nmax = 4194305", `t.toml:15: conntrack.max: 4194305 is out of range; choose a number from 1024 to 4194304`},
	{"max huge", base + "[conntrack]\nmax = -9223372036854775808", `t.toml:15: conntrack.max: -9223372036854775808 is out of range`},
	{"max as text", base + "[conntrack]\nmax = '1k'", `t.toml:15: conntrack.max: is the string "1k"; write a number of flows from 1024 to 4194304`},
	{"time as number", base + "[conntrack]\nudp = 120", `t.toml:15: conntrack.udp: is the integer 120; write a time from 1s to 168h, as "5m"`},
	{"no time", base + "[conntrack]\ntcp-established = '2h4'", `t.toml:15: conntrack.tcp-established: "2h4" is no time; write a time from 1s to 168h, as "2h4m"`},
	{"time 0", base + "[conntrack]\nicmp = '0s'", `t.toml:15: conntrack.icmp: "0s" is out of range; write a time from 1s to 168h, as "1m"`},
	{"time negative", base + "[conntrack]\nother = '-1m'", `t.toml:15: conntrack.other: "-1m" is out of range; write a time from 1s to 168h, as "10m"`},
	{"time long", base + "[conntrack]\nudp-new = '168h1s'", `t.toml:15: conntrack.udp-new: "168h1s" is out of range; write a time from 1s to 168h, as "2m"`},
	{"time broken", base + "[conntrack]\ntcp-closed = '1500ms'", `t.toml:15: conntrack.tcp-closed: "1500ms" is no whole number of seconds; write a time from 1s to 168h, as "4m"`},
	{"conntrack key", base + "[conntrack]\nudp-mew = '1m'", `t.toml:15: conntrack.udp-mew: unknown key; did you mean "udp-new"?`},
	{"conntrack no table", "conntrack = 5\n" + base, `t.toml:1: conntrack: is the integer 5; write [conntrack] with max and times`},
	{"conntrack twice", base + "[conntrack]\nudp = 5\nmax = 5", "t.toml:15: conntrack.udp: is the integer 5; write a time from 1s to 168h, as \"5m\"\nt.toml:16: conntrack.max: 5 is out of range; choose a number from 1024 to 4194304"},
}

func TestConntrackErrors(t *testing.T) { checkErrors(t, conntrackErrors) }

func TestConntrackJSON(t *testing.T) {
	want := DefaultConntrack()
	want.UDP = time.Hour
	text, err := json.Marshal(want)
	if err != nil || !strings.Contains(string(text), `"tcp-established":"2h4m0s"`) {
		t.Fatalf("%s, %v", text, err)
	}
	var got Conntrack
	if err := json.Unmarshal(text, &got); err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{`[]`, `{"max": "x"}`, `{"max": 5}`, strings.Replace(string(text), "1h0m0s", "soon", 1)} {
		before := got
		if err := json.Unmarshal([]byte(bad), &got); err == nil || got != before {
			t.Errorf("%s: %v, read %+v", bad, err, got)
		}
	}
}
