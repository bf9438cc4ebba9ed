// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"testing"
)

// TestMasquerade is what containers reach outside in the name of their node, and what is seen of them there.
func TestMasquerade(t *testing.T) {
	i := newInternet(t, bedOptions{nodes: 2, networks: appNetwork + masqueraded})
	wire := i.router.capture(t, "eth0")
	for at, n := range i.nodes {
		c := n.run(t, "c", "app")
		settle(t, c)
		for v, server := range serverAddresses {
			t.Run(title(n.host, family(server)), func(t *testing.T) {
				checkOutwards(t, i, c, v)
				i.server.sees(t, c.namespace, server, outside(at + 1)[v])
			})
		}
		for _, reason := range []string{"egress", "ingress"} {
			if n.counter(reason) == 0 {
				t.Errorf("no packet of %s was counted as %s", n.host, reason)
			}
		}
		if got := n.counter("too_big"); got > 0 { // what comes in from outside is not encapsulated here
			t.Errorf("%d packets were too big for %s", got, n.host)
		}
	}
	checkNoContainers(t, wire)
}

// checkOutwards has a container use the server by ping, datagrams of all sizes, transfers and downloads.
func checkOutwards(t *testing.T, i *internet, c *container, at int) {
	t.Helper()
	server := serverAddresses[at]
	c.reaches(t, server)
	until(t, "a ping in fragments is answered", func() bool { return c.ping(server, 9000, onePing) == nil })
	echo := i.server.echoUDP(t, server, "echo")
	for _, size := range []int{0, 1, 1200, c.port.MTU, 9000, 60000} {
		payload := pattern(uint64(size), size)
		if got := c.gets(t, echo, payload); !bytes.Equal(got, append([]byte("echo"), payload...)) {
			t.Errorf("%d bytes came back as %d others", size, len(got))
		}
	}
	c.transfer(t, i.server.listenTCP(t, server, digest), transferSize())
	c.downloads(t, i.server.serveHTTP(t, server, transferSize()), transferSize())
}
