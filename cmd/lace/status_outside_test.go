// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/plan"
)

// TestStatusOfTheOutside: external networks, lc-host, ways out and published ports, read from a node that has them.
func TestStatusOfTheOutside(t *testing.T) {
	n := opened(t)
	n.wired("web-3", dataplane.Interface{Network: "web", IPs: []netip.Addr{address("10.40.1.13")}, Gateway: true,
		Publish: []plan.Publish{{Address: address("192.0.2.1"), Protocol: unix.IPPROTO_UDP, Port: 53, To: 5353}}})
	out, err := n.run(runStatus, "")
	must(t, err)
	for _, want := range []string{
		"\nHOST     IPV4       IPV6       REACHES\nlc-host  192.0.2.1  fd00:a::1  [10.40.0.0/16 fd40::/48]\n",
		"[0.0.0.0/0]       web masqueraded, db masqueraded by edge-2, backup  -\n",
		"[203.0.113.0/24]  -                                                  web\n",
		"\nWAY OUT  AS IPV4    AS IPV6    PORTS\n", "\nout0     192.0.2.1  fd00:a::1  4096-32767\n",
		"\nPUBLISHED         PORT  CONTAINER  NETWORK\n192.0.2.1:53/udp  5353  web-3      web\n8080/tcp          80    web-1      web\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in\n%s", want, out)
		}
	}
	out, err = n.run(runStatus, "--json")
	must(t, err)
	var st status
	must(t, json.Unmarshal([]byte(out), &st))
	if strings.Contains(out, "null") || st.Host == nil || !st.Host.Present || len(st.Externals) != 2 || len(st.Egresses) != 2 {
		t.Errorf("got\n%s", out)
	}
	want := []publishedStatus{
		{Address: address("192.0.2.1"), Port: 53, Protocol: "udp", To: 5353, Container: "default/web-3", Name: "web-3", Network: "web"},
		{Port: 8080, Protocol: "tcp", To: 80, Container: "default/web-1", Name: "web-1", Network: "web"},
	}
	if !reflect.DeepEqual(st.Published, want) {
		t.Errorf("got %+v", st.Published)
	}
}

func TestStatusPrintsNothingOfNoOutside(t *testing.T) {
	out := printed(t, &status{})
	for _, title := range []string{"HOST", "EXTERNAL", "WAY OUT", "PUBLISHED"} {
		if strings.Contains(out, title) {
			t.Errorf("there is a table %s in\n%s", title, out)
		}
	}
	out = printed(t, &status{outsideStatus: outsideStatus{Host: &hostStatus{Interface: "lc-host"}}})
	if want := "lc-host is not there  -     -     []\n"; !strings.Contains(out, want) {
		t.Errorf("want %q in\n%s", want, out)
	}
}
