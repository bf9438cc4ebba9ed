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
	for _, c := range slices.Concat(errorCases, peeringErrors, conntrackErrors) {
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
