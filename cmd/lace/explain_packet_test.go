// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/dataplane/trace"
)

func FuzzParseTarget(f *testing.F) {
	for _, s := range []string{"10.40.2.7:80/tcp", "[fd40::7]:53/udp", "10.40.2.7/icmp", "fd40::7/icmp", "[fd40::7]/icmp", "10.40.2.7", "/", "::ffff:1.2.3.4/icmp", "[fe80::1%0]:1/tcp", "10.50.0.7/arp", "fd50::7/nd", "02:4c:0a:32:00:07"} {
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
		if _, err := firstFrame(plan.MAC{2, 1}, plan.MAC{2, 2}, src, to); err != nil {
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
			outer, err := inSRv6(netip.MustParseAddr("5f00:1ace:2:5ce::"), netip.MustParseAddr("5f00:1ace:1:14:0:6400::"), srh, innerOf(packet), packet)
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

func TestFirstFramesAreWhole(t *testing.T) {
	a, b := plan.MAC{2, 1}, plan.MAC{2, 2}
	for s, want := range map[string]struct {
		from string
		flow string
	}{
		"10.50.0.7:80/tcp":  {"10.50.0.5", "10.50.0.5:49152 > 10.50.0.7:80 tcp"},
		"10.50.0.7/arp":     {"10.50.0.5", "10.50.0.5 > 10.50.0.7 arp who-has"},
		"fd50::107/nd":      {"fd50::5", "fd50::5 > ff02::1:ff00:107 icmp6 NeighborSolicitation of fd50::107"},
		"02:01:00:00:00:00": {"10.50.0.5", "02:02:00:00:00:00 > 02:01:00:00:00:00 ethertype 0x88b5"},
	} {
		to, err := parseTarget(s)
		must(t, err)
		frame, err := firstFrame(a, b, address(want.from), to)
		must(t, err)
		if got := trace.ParseFlow(frame, true).String(); got != want.flow || len(frame) < 14+28 {
			t.Errorf("%s: %d bytes, %s", s, len(frame), got)
		}
		if to.proto == "nd" {
			wantPacket(t, frame, layers.LayerTypeICMPv6NeighborSolicitation)
		}
		for _, srh := range []bool{false, true} {
			outer, err := inSRv6(address("5f00:1ace:2:5ce::"), address("5f00:1ace:1:17:0:c800::"), srh, framed, frame)
			must(t, err)
			if got := trace.ParseFlow(outer, false).String(); got != want.flow+" in 5f00:1ace:2:5ce:: > 5f00:1ace:1:17:0:c800::" {
				t.Errorf("%s: in SRv6 %s", s, got)
			}
		}
	}
}

func TestGroupMACs(t *testing.T) {
	for a, want := range map[string]string{
		"224.0.0.18": "01:00:5e:00:00:12", "239.129.2.3": "01:00:5e:01:02:03", "255.255.255.255": "ff:ff:ff:ff:ff:ff",
		"ff02::1:ff00:7": "33:33:ff:00:00:07", "10.50.0.7": "", "fd50::7": "",
	} {
		mac, ok := groupMAC(address(a))
		if ok != (want != "") || ok && (mac.String() != want || !isGroup(mac)) {
			t.Errorf("%s: %s, %v", a, mac, ok)
		}
	}
}
