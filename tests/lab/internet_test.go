// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"os/exec"
	"strings"
	"testing"
)

const world = `
[network.world]
type = "external"
prefixes = ["0.0.0.0/0", "::/0"]
`

// servers are the addresses at which the lab's internet answers.
var servers = []string{"198.51.100.1", "203.0.113.1", "2001:db8:100::1", "2001:db8:200::1"}

// asked is what the server at an address says of its client, without the port.
func asked(t *testing.T, name, node, server string) string {
	t.Helper()
	if strings.Contains(server, ":") {
		server = "[" + server + "]"
	}
	said := in(t, name, node, "curl -sS -m 10 http://"+server+"/")
	return strings.Trim(said[:max(0, strings.LastIndex(said, ":"))], "[]")
}

func needCurl(t *testing.T) {
	t.Helper()
	needLab(t)
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("there is no curl: install the package curl")
	}
}

// TestInternet asks the server of a lab from all its nodes, on one link and routed, and the other way round.
func TestInternet(t *testing.T) {
	needCurl(t)
	for _, tt := range []struct {
		name, topology string
		flags          []string
		underlay       []string // of edge-1, edge-2 and edge-3
	}{
		{"one link", oneLink, nil, []string{"fd00:a::1", "fd00:a::2", "fd00:a::3"}},
		{"routed", racks, []string{"--routed"}, []string{"fd00:a:1::1", "fd00:a:2::1", "fd00:a:2::2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := labName("u")
			up(t, name, tt.topology+world, tt.flags...)
			for i, node := range []string{"edge-1", "edge-2", "edge-3"} {
				addresses := map[bool]string{false: []string{"192.0.2.1", "192.0.2.2", "192.0.2.3"}[i], true: tt.underlay[i]}
				for _, s := range servers {
					if got, want := asked(t, name, node, s), addresses[strings.Contains(s, ":")]; got != want {
						t.Errorf("%s asks %s as %q, want %s", node, s, got, want)
					}
				}
				for _, a := range addresses {
					in(t, name, "internet", "ping -q -c 1 -W 5 "+a)
					in(t, name, "edge-1", "ping -q -c 1 -W 5 "+a)
				}
			}
			status := mustRun(t, "lab", "status", "--name", name)
			if strings.Count(status, " up ") != 4 || !strings.Contains(status, "internet: a web server at 198.51.100.1, ") {
				t.Errorf("status: %s", status)
			}
			mustRun(t, "lab", "logs", "--name", name, "internet", "server")
			mustRun(t, "lab", "down", "--name", name)
			wantNothing(t, name)
		})
	}
}

// TestWithoutInternet: there is none where the topology has no external network.
func TestWithoutInternet(t *testing.T) {
	needLab(t)
	name := labName("v")
	up(t, name, oneLink)
	if output, err := runLace("lab", "exec", "--name", name, "internet", "--", "true"); err == nil || !strings.Contains(output, "edge-1, edge-2, edge-3") {
		t.Errorf("it has an internet: %v, %s", err, output)
	}
	if got := in(t, name, "edge-1", "ip route; ip -6 route show default"); got != "" {
		t.Errorf("edge-1 has routes to an outside: %q", got)
	}
}
