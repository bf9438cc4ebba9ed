// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"testing"

	"github.com/lace-net/lace/dataplane/plan"
)

func TestFlowOfFrame(t *testing.T) {
	for _, c := range []struct{ src, dst string }{{"10.60.1.2:4000", "192.168.9.2:80"}, {"[fd60::2]:4000", "[fd10::b]:80"}} {
		src, dst := netip.MustParseAddrPort(c.src), netip.MustParseAddrPort(c.dst)
		syn := ethernet(plan.MAC{}, plan.MAC{}, segment(src, dst, flagSYN))
		if protocol, from, to := flowOf(syn); protocol != protocolTCP || from != src || to != dst {
			t.Errorf("%s > %s is read as %d %s > %s", src, dst, protocol, from, to)
		}
		asked := ethernet(plan.MAC{}, plan.MAC{}, datagram(src, dst))
		answer := ethernet(plan.MAC{}, plan.MAC{}, turned(asked))
		if protocol, from, to := flowOf(answer); protocol != protocolUDP || from != dst || to != src {
			t.Errorf("the answer to %s > %s is %d %s > %s", src, dst, protocol, from, to)
		}
		for n := range len(asked) {
			flowOf(asked[:n]) // however short it is
		}
		if protocol, _, _ := flowOf(asked[:20]); protocol != 0 {
			t.Errorf("a frame that is cut short has the protocol %d", protocol)
		}
	}
}
