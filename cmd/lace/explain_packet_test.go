// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/lace-net/lace/dataplane/plan"
)

func FuzzParseTarget(f *testing.F) {
	for _, s := range []string{"10.40.2.7:80/tcp", "[fd40::7]:53/udp", "10.40.2.7/icmp", "fd40::7/icmp", "[fd40::7]/icmp", "10.40.2.7", "/", "::ffff:1.2.3.4/icmp", "[fe80::1%0]:1/tcp"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		to, err := parseTarget(s)
		if err != nil {
			return
		}
		if again, err := parseTarget(to.String()); err != nil || again != to {
			t.Errorf("%q becomes %q, which becomes %v, %v", s, to, again, err)
		}
		src := netip.MustParseAddr("10.40.1.5")
		if to.addr.Is6() {
			src = netip.MustParseAddr("fd40::5")
		}
		if _, err := firstPacket(src, to); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	})
}

// wantPacket decodes a frame to its end and checks lengths and checksums.
func wantPacket(t *testing.T, frame []byte, inner gopacket.LayerType) gopacket.Packet {
	t.Helper()
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.DecodeOptions{})
	if e := p.ErrorLayer(); e != nil || p.Layer(inner) == nil || p.Metadata().Truncated {
		t.Fatalf("not whole: %v", p)
	}
	var over gopacket.NetworkLayer // the innermost
	for _, l := range p.Layers() {
		if n, ok := l.(gopacket.NetworkLayer); ok {
			over = n
		}
		if c, ok := l.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		}); ok {
			must(t, c.SetNetworkLayerForChecksum(over))
		}
	}
	if err, wrong := p.VerifyChecksums(); err != nil || len(wrong) > 0 {
		t.Errorf("checksums: %v, %+v in %v", err, wrong, p)
	}
	return p
}

func TestFirstPacketsAreWhole(t *testing.T) {
	a, b := plan.MAC{2, 1}, plan.MAC{2, 2}
	for s, want := range map[string]gopacket.LayerType{
		"10.40.2.7:80/tcp": layers.LayerTypeTCP, "[fd40::7]:80/tcp": layers.LayerTypeTCP,
		"10.40.2.7:53/udp": layers.LayerTypeUDP, "[fd40::7]:53/udp": layers.LayerTypeUDP,
		"10.40.2.7/icmp": layers.LayerTypeICMPv4, "fd40::7/icmp": layers.LayerTypeICMPv6Echo,
	} {
		to, err := parseTarget(s)
		must(t, err)
		src := netip.MustParseAddr("10.40.1.5")
		if to.addr.Is6() {
			src = netip.MustParseAddr("fd40::5")
		}
		packet, err := firstPacket(src, to)
		must(t, err)
		p := wantPacket(t, inEthernet(a, b, packet), want)
		if want == layers.LayerTypeTCP {
			if tcp := p.Layer(want).(*layers.TCP); !tcp.SYN || tcp.ACK || tcp.DstPort != 80 {
				t.Errorf("%s: no SYN: %v", s, p)
			}
		}
		for _, srh := range []bool{false, true} {
			outer, err := inSRv6(netip.MustParseAddr("5f00:1ace:2:5ce::"), netip.MustParseAddr("5f00:1ace:1:14:0:6400::"), srh, packet)
			must(t, err)
			wantPacket(t, inEthernet(a, b, outer), want)
			if got := sourceOf(inEthernet(a, b, outer)); got != netip.MustParseAddr("5f00:1ace:2:5ce::") {
				t.Errorf("%s: outer source %s", s, got)
			}
		}
	}
	if got := sourceOf(make([]byte, 20)); got.IsValid() {
		t.Errorf("a short frame has source %s", got)
	}
}
