// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"github.com/lace-net/lace/dataplane/plan"
)

// TestFDB: every MAC address that the tables have, wherever it is known from.
func TestFDB(t *testing.T) {
	n := segmented(t)
	n.learn(200, plan.MAC{2, 0, 0, 0, 0, 1}, "5f00:1ace:3::")
	n.learn(200, plan.MAC{2, 0, 0, 0, 0, 2}, "5f00:1ace:9::")
	n.learn(900, plan.MAC{2, 0, 0, 0, 0, 3}, "5f00:1ace:2::")
	out, err := n.run(runFDB, "")
	must(t, err)
	want := []string{
		`NETWORK  MAC                KIND      AGE  WHERE`,
		`900      02:00:00:00:00:03  learned   \d+s +edge-2`,
		`quiet    02:4c:00:01:00:02  port      -    six-1, interface lace[0-9a-f]{11}`,
		`storage  02:00:00:00:00:01  learned   \d+s +edge-3`,
		`storage  02:00:00:00:00:02  learned   \d+s +a node that is gone`,
		`storage  02:4c:0a:32:00:12  port      -    db-1, interface lace[0-9a-f]{11}`,
		`storage  02:4c:0a:32:00:13  port      -    db-2, interface lace[0-9a-f]{11}`,
		`storage  02:4c:0a:32:00:14  port      -    both, interface lace[0-9a-f]{11}`,
		`storage  52:54:00:00:00:01  port      -    nas-1, interface vm0`,
		`storage  52:54:00:00:00:02  endpoint  -    nas-2 at edge-2`,
	}
	if !regexp.MustCompile("^" + strings.Join(want, "\n") + "\n$").MatchString(out) {
		t.Errorf("got\n%swant\n%s", out, strings.Join(want, "\n"))
	}
	out, err = n.run(runFDB, "--json --network quiet")
	must(t, err)
	var all []known
	must(t, json.Unmarshal([]byte(out), &all))
	if len(all) != 1 || all[0].Container != "default/six-1" || all[0].Kind != atPort || all[0].ID != 300 || all[0].Age != nil {
		t.Errorf("got %s", out)
	}
	if out, err := n.run(runFDB, "--json --network web"); err != nil || strings.TrimSpace(out) != "[]" {
		t.Errorf("of a routed network: %s, %v", out, err)
	}
	// One that is attached later is there at once, one that leaves is not; a table of the generation before does not show.
	n.container("late", "storage", "10.50.0.21")
	n.in(func() error { return n.plane.DetachDevice(n.t.Context(), "vm0") })
	n.write("topology.toml", strings.Replace(segments, "flood = false", "flood-rate = 7", 1))
	_, err = spaced{n}.Apply(n.t.Context(), parsed(t, n.path("topology.toml")))
	must(t, err)
	out, err = n.run(runFDB, "")
	must(t, err)
	if strings.Count(out, "02:4c:0a:32:00:15  port") != 1 || strings.Contains(out, "52:54:00:00:00:01") || strings.Count(out, "02:4c:0a:32:00:12") != 1 {
		t.Errorf("after changes\n%s", out)
	}
}

func TestFDBWithoutAgent(t *testing.T) {
	file := writeFile(t, "lace.toml", "bpffs = \""+t.TempDir()+"\"\n")
	if err := runFDB(t.Context(), hostEnv(), []string{"--config", file}); err == nil || !strings.Contains(err.Error(), "has an agent of this version run on this host") {
		t.Errorf("got %v", err)
	}
}
