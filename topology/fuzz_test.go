// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"errors"
	"slices"
	"testing"
)

// FuzzParse: no text makes the parser panic; what it refuses has lines in the file; what it takes
// has a canonical text that says the same.
func FuzzParse(f *testing.F) {
	f.Add(base)
	f.Add(nets + peering("{ env = 'prod' }", "{ env = 'prod' }") + peering("'web'", "'db'") + "bidirectional = true\n[conntrack]\nmax = 4096\nudp = \"6m\"\n")
	f.Add("peering = [{ from = 'web', to.tier = 'db' }]\n" + nets)
	f.Add(segment + "gateway = ['10.50.0.1', 'fd50::1']\ndhcp = true\n" + l2router + on1("vm", vmAt+"address = ['10.50.0.200']") + webNet + peering("'web'", "'storage'"))
	f.Add(six + "pools = { edge-1 = ['fd50::10/124'] }\nflood = false\n" + on1("vm", "address = ['fd50::7']"))
	f.Add(outerNets + outerPeering("'web'", "'internet'", "masquerade = true", "egress = 'edge-1'", "bidirectional = true") + "[masquerade]\nports = '1024-65535'\n")
	f.Add(outerNets + outerPeering("{ env = 'prod' }", "{ env = 'prod' }") + outerPeering("{ side = 'out' }", "'web'"))
	for _, c := range slices.Concat(errorCases, peeringErrors, conntrackErrors, l2Errors, outerErrors) {
		if len(c.text) < 2000 {
			f.Add(c.text)
		}
	}
	f.Fuzz(func(t *testing.T, text string) {
		top, err := Parse("t.toml", []byte(text))
		if err == nil {
			roundTrip(t, top)
			return
		}
		var errs Errors
		if !errors.As(err, &errs) || len(errs) == 0 {
			t.Fatalf("%v is no Errors", err)
		}
		for _, e := range errs {
			if e.Problem == "" || e.Line < 0 {
				t.Errorf("poor error %+v", e)
			}
		}
	})
}
