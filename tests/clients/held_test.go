// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/lace-net/lace/dataplane/hook"
)

// held is what a node's kernel holds for containers.
type held struct {
	Links            []string // host ends of containers
	Pins             []string // pinned links of programs but those of the uplink, the segmenter and lc-host-peer
	Ports, Endpoints int      // rows of the tables
}

var portForm = regexp.MustCompile(`^lace[0-9a-f]{11}$`)

// root is the node's own root directory, seen from here.
func (n *node) root() string {
	n.t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/run/lace-lab/%s/nodes/%s/init.json", n.name, n.host))
	var first struct{ PID int }
	if err = errors.Join(err, json.Unmarshal(data, &first)); err != nil {
		n.t.Fatalf("find the first process of %s: %v", n.host, err)
	}
	return fmt.Sprintf("/proc/%d/root", first.PID)
}

func (n *node) holds() held {
	n.t.Helper()
	var h held
	for line := range strings.Lines(n.sh("cd /sys/class/net; for i in *; do echo $i $(cat $i/ifindex); done; echo; ls /sys/fs/bpf/lace/links")) {
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && portForm.MatchString(f[0]):
			h.Links = append(h.Links, f[0])
		case len(f) == 1:
			h.Pins = append(h.Pins, f[0])
		}
	}
	own := strings.Fields(n.sh("cd /sys/class/net; for i in eth0 laces1 lc-host-peer; do [ ! -e $i ] || cat $i/ifindex; done"))
	h.Pins = slices.DeleteFunc(h.Pins, func(p string) bool { return slices.Contains(own, p) })
	h.Ports, h.Endpoints = n.rows()
	return h
}

// rows counts what the programs know of containers.
func (n *node) rows() (ports, endpoints int) {
	n.t.Helper()
	m, done, err := hook.OpenMaps(n.root() + "/sys/fs/bpf/lace")
	if err != nil {
		n.t.Fatal(err)
	}
	defer done()
	p, err := m.Ports.All()
	if err != nil {
		n.t.Fatal(err)
	}
	e, err := m.Endpoints.All()
	if err != nil {
		n.t.Fatal(err)
	}
	return len(p), len(e)
}

// eventuallyHolds waits until the kernel holds so many containers with so many addresses, and nothing else.
func (n *node) eventuallyHolds(containers, addresses int) {
	n.t.Helper()
	n.eventually(fmt.Sprintf("%s holds %d containers with %d addresses", n.host, containers, addresses), func() error {
		h := n.holds()
		if len(h.Links) != containers || len(h.Pins) != containers || h.Ports != containers || h.Endpoints != addresses {
			return fmt.Errorf("it holds %+v", h)
		}
		return nil
	})
}

// eventuallyEmpty waits until nothing of any container is left.
func (n *node) eventuallyEmpty() { n.t.Helper(); n.eventuallyHolds(0, 0) }
