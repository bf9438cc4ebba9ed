// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// TestLabelsAreHeeded asks for addresses, MACs and names in every way there is.
func TestLabelsAreHeeded(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	tests := []struct {
		name   string
		flags  []string
		v4, v6 string // "": any
	}{
		{"one IPv4 address", labels(backend, "lace.ip=10.40.1.7"), "10.40.1.7", ""},
		{"one IPv6 address", labels(backend, "lace.ip=fd40:0:0:1::ff07"), "", "fd40:0:0:1::ff07"},
		{"both", labels(backend, "lace.ip=fd40:0:0:1::8, 10.40.1.9"), "10.40.1.9", "fd40:0:0:1::8"},
		{"annotations alone", []string{"--annotation", backend, "--annotation", "lace.ip=10.40.1.10"}, "10.40.1.10", ""},
		{"the last address of the block", labels(backend, "lace.ip=10.40.1.254"), "10.40.1.254", ""},
		{"spaces around", labels("lace.network= backend ", "lace.ip= 10.40.1.12 "), "10.40.1.12", ""},
	}
	for _, tt := range tests {
		b.sub(tt.name, func(b *bed) {
			n := n.with(b.t).node("edge-1")
			for client, line := range map[string][]string{
				"nerdctl": nerdctlRun(tt.flags, "--rm", image, "ip", "-o", "addr"),
				"ctr":     append(append([]string{"ctr", "run", "--rm"}, tt.flags...), image, "c1", "ip", "-o", "addr"),
			} {
				v4, v6, err := addressesIn(n.must(line...))
				if err != nil || tt.v4 != "" && v4.String() != tt.v4 || tt.v6 != "" && v6.String() != tt.v6 || !v4.IsValid() || !v6.IsValid() {
					b.t.Errorf("%s: got %v, %v, %v; want %s, %s", client, v4, v6, err, tt.v4, tt.v6)
				}
			}
		})
	}
	n.eventuallyEmpty()
	b.sub("annotations win, key by key", func(b *bed) {
		// Not with ctr, which makes annotations of its labels, over those that were given as such.
		flags := append(labels("lace.network=staging", "lace.ip=10.40.1.11"), "--annotation", backend, "--rm", image, "ip", "-o", "addr")
		v4, v6, err := addressesIn(b.node("edge-1").must(nerdctlRun(flags)...))
		if err != nil || v4.String() != "10.40.1.11" || !v6.IsValid() { // staging has no IPv6
			b.t.Errorf("got %v, %v, %v", v4, v6, err)
		}
	})
	b.sub("MAC", func(b *bed) {
		g := n.with(b.t).node("edge-1").nerdctl("mac", backend, "lace.mac=02:00:00:00:00:05")
		contains(b.t, g.in("cat /sys/class/net/eth0/address"), "02:00:00:00:00:05")
		g.ping(b.node("edge-2").nerdctl("peer", backend))
		g.remove()
	})
	b.sub("name", func(b *bed) {
		n := b.node("edge-1")
		one := n.nerdctl("one", backend, "lace.name=db")
		contains(b.t, n.must("lace", "status"), "\ndb         backend")
		one.remove()
		if again := n.ctr("two", backend, "lace.name=db"); again.v4 != one.v4 || again.v6 != one.v6 {
			b.t.Errorf("the name had %v, %v and now has %v, %v", one.v4, one.v6, again.v4, again.v6)
		}
	})
	b.sub("networks of one family", func(b *bed) {
		six := b.node("edge-1").nerdctl("six", "lace.network=six")
		staging := b.node("edge-1").nerdctl("staging", "lace.network=staging")
		if six.v4.IsValid() || !netip.MustParsePrefix("fd60:0:0:1::/64").Contains(six.v6) {
			b.t.Errorf("got %v", six)
		}
		if staging.v6.IsValid() || !netip.MustParsePrefix("10.40.1.0/24").Contains(staging.v4) {
			b.t.Errorf("got %v", staging)
		}
		six.ping(b.node("edge-2").ctr("six", "lace.network=six"))
		staging.ping(b.node("edge-2").ctr("staging", "lace.network=staging"))
	})
}

// TestNetworksWithTheSameAddressesNeverMeet gives two containers of a node one address, and asks who answers.
func TestNetworksWithTheSameAddressesNeverMeet(t *testing.T) {
	b := up(t, threeNodes)
	for _, network := range []string{"backend", "staging"} {
		g := b.node("edge-1").nerdctl(network, "lace.network="+network, "lace.ip=10.40.1.50")
		g.in("echo %s >/www/who && httpd -p 80 -h /www", network)
	}
	for _, network := range []string{"backend", "staging"} {
		for _, host := range []string{"edge-1", "edge-2"} {
			asks := b.node(host).ctr("asks-"+network, "lace.network="+network)
			if got := asks.in("timeout 10 wget -q -O - http://10.40.1.50/who"); got != network {
				t.Errorf("on %s the answer is %q, want that of %s", host, got, network)
			}
		}
	}
}

// TestBadLabelsAreRefused wants the very text on the client's own terminal, and nothing left.
func TestBadLabelsAreRefused(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	holder := n.nerdctl("holder", backend, "lace.ip=10.40.1.77")
	asks := `lace: container asks for network "backend": network backend: `
	tests := []struct {
		name  string
		pairs []string
		want  string
	}{
		{"unknown network", []string{"lace.network=backnd"},
			`lace: container asks for network "backnd": network "backnd" is not in the topology; there are: backend, six, staging, tiny`},
		{"unknown label", []string{backend, "lace.netwrok=x"},
			`lace: unknown label "lace.netwrok" (did you mean "lace.network"?); Lace knows lace.network, lace.ip, lace.mac, lace.name, lace.sticky`},
		{"no network", []string{"lace.ip=10.40.1.7"},
			`lace: "lace.ip" is set, but lace.network is not: name the network that the container is to join`},
		{"no address", []string{backend, "lace.ip=10.40.1"},
			`lace: lace.ip = "10.40.1": "10.40.1" is no IP address; give one IPv4 and/or one IPv6 address, without prefix length, separated by a comma`},
		{"prefix length", []string{backend, "lace.ip=10.40.1.7/24"}, `"10.40.1.7/24" is no IP address`},
		{"outside the block", []string{backend, "lace.ip=10.40.2.7"},
			asks + `address 10.40.2.7 is outside 10.40.1.0/24, the block of network backend on node edge-1`},
		{"IPv6 outside the block", []string{backend, "lace.ip=fd40:0:0:2::7"},
			asks + `address fd40:0:0:2::7 is outside fd40:0:0:1::/64, the block of network backend on node edge-1`},
		{"wrong family", []string{"lace.network=staging", "lace.ip=fd40:0:0:1::7"},
			`address fd40:0:0:1::7: network staging has no block of that family on node edge-1`},
		{"taken", []string{backend, "lace.ip=10.40.1.77"}, asks + `address 10.40.1.77 is taken by container holder (default/` + holder.id + `)`},
		{"gateway", []string{backend, "lace.ip=10.40.1.1"},
			asks + `address 10.40.1.1 is the network, gateway or broadcast address of block 10.40.1.0/24; containers have those from 10.40.1.2 on`},
		{"broadcast", []string{backend, "lace.ip=10.40.1.255"}, asks + `address 10.40.1.255 is the network, gateway or broadcast address`},
		{"IPv6 gateway", []string{backend, "lace.ip=fd40:0:0:1::1"}, asks + `address fd40:0:0:1::1 is the network, gateway or broadcast address`},
		{"a network twice", []string{"lace.network=backend,staging,backend"},
			`lace: lace.network = "backend,staging,backend": names network "backend" twice; a container has one interface in each`},
		{"group MAC", []string{backend, "lace.mac=03:00:00:00:00:01"}, `lace: lace.mac = "03:00:00:00:00:01": is a group address`},
		{"gateway's MAC", []string{backend, "lace.mac=06:00:6c:61:63:65"}, `is the gateway's, on every node; choose another`},
		{"bad sticky", []string{backend, "lace.sticky=perhaps"}, `lace: lace.sticky = "perhaps": is neither true nor false`},
		{"bad name", []string{backend, "lace.name=-x"}, `lace: lace.name = "-x": is no name`},
		{"all errors at once", []string{"lace.foo=1", "lace.mac=x"}, `lace: unknown label "lace.foo"`},
	}
	for _, tt := range tests {
		b.sub(tt.name, func(b *bed) { refusedByAll(b.node("edge-1"), tt.pairs, tt.want) })
	}
	b.sub("eth0 of another network", func(b *bed) { refusedBesideAnother(b.node("edge-1")) })
	n.eventuallyHolds(1, 2)
	for namespace, want := range map[string]string{"default": holder.id, "k8s.io": ""} {
		if got := n.must("ctr", "-n", namespace, "containers", "ls", "-q"); got != want {
			t.Errorf("containers in namespace %s: %q, want %q", namespace, got, want)
		}
	}
	if left := n.must("crictl", "pods", "-q"); left != "" {
		t.Errorf("pods are left: %s", left)
	}
}

// refused runs a client that has to fail with this text on its terminal.
func (n *node) refused(want string, line ...string) {
	n.t.Helper()
	s := n.try(line...)
	text := strings.ReplaceAll(s.err, `\`, "") // the quoting of clients that log their error
	if s.status == 0 || !strings.Contains(text, want) {
		n.t.Errorf("%s: status %d, want %q on its terminal:\n%s", strings.Join(line, " "), s.status, want, text)
	}
}

// refusedByAll asks by each client in its own way.
func refusedByAll(n *node, pairs []string, want string) {
	n.t.Helper()
	n.refused(want, nerdctlRun(labels(pairs...), "--rm", image, "true")...)
	n.refused(want, append(append([]string{"ctr", "run", "--rm"}, labels(pairs...)...), image, "refused", "true")...)
	asked := map[string]string{}
	for _, p := range pairs {
		key, value, _ := strings.Cut(p, "=")
		asked[key] = value
	}
	n.refused(want, "crictl", "runp", n.podFile(pod{name: "refused", labels: asked}))
}

// otherNetwork is a CNI plugin that knows nothing of Lace: it makes an eth0.
const otherNetwork = `#!/bin/sh
cat >/dev/null
case $CNI_COMMAND in
ADD)
	nsenter --net=$CNI_NETNS sh -c "ip link show $CNI_IFNAME || ip link add $CNI_IFNAME type veth peer name other0" >/dev/null 2>&1
	echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"'$CNI_NETNS'"}],"ips":[{"address":"192.0.2.1/24","interface":0}]}' ;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}' ;;
esac
`

// refusedBesideAnother runs nerdctl without --net none, whose default network then puts an eth0 into the container.
func refusedBesideAnother(n *node) {
	n.t.Helper()
	plugin := n.file("plugin", otherNetwork)
	n.sh("for p in bridge portmap firewall tuning host-local; do install -m 755 %s /opt/cni/bin/$p; done", plugin)
	contains(n.t, n.must("nerdctl", "run", "--rm", "--pull", "never", image, "ip", "-o", "link"), "eth0")
	n.refused(`lace: container asks for network "backend", but has an interface eth0 of another network already; start it without one (nerdctl: --net none)`,
		"nerdctl", "run", "--rm", "--pull", "never", "--label", backend, image, "true")
}

// TestBlockIsFull takes all five addresses of a block, and asks for a sixth.
func TestBlockIsFull(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	const tiny = "lace.network=tiny"
	seen := map[netip.Addr]bool{}
	for i := range 5 {
		seen[n.ctr(fmt.Sprintf("c%d", i), tiny).v4] = true
	}
	if len(seen) != 5 {
		t.Errorf("five containers have the addresses %v", seen)
	}
	full := `lace: container asks for network "tiny": network tiny: the block of node edge-1 (10.60.0.8/29) is full: ` +
		`its 5 addresses are held by %d running and %d stopped containers and %d sticky names; remove some, or give the network larger blocks`
	refusedByAll(n, []string{tiny}, fmt.Sprintf(full, 5, 0, 0))
	n.must("ctr", "tasks", "rm", "-f", "c0")
	n.eventuallyHolds(4, 4)
	refusedByAll(n, []string{tiny}, fmt.Sprintf(full, 4, 1, 0)) // it is there, so its address is
	n.must("ctr", "containers", "rm", "c0")
	sticky := n.nerdctl("sticky", tiny, "lace.sticky=true")
	sticky.remove()
	n.eventuallyHolds(4, 4)
	refusedByAll(n, []string{tiny}, fmt.Sprintf(full, 4, 0, 1))
	b.node("edge-2").ctr("elsewhere", tiny) // the other node's block is its own
}
