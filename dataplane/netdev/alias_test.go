// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/lace-net/lace/dataplane/plan"
)

var sampleAttachment = plan.Attachment{
	Container: "default/4f1c", Name: "web", Network: "backend", NetworkID: 100, IfName: "eth0",
	V4: netip.MustParseAddr("10.40.1.2"), V6: netip.MustParseAddr("fd40:0:1::2"),
	MAC: plan.MAC{6, 0x4c, 10, 40, 1, 2}, Sticky: true, Gateway: true,
}

var sampleDevice = plan.Attachment{
	Container: "device/tap0", Name: "vm", Network: "storage", NetworkID: 200, IfName: "tap0", Device: "tap0",
	V4: netip.MustParseAddr("10.50.0.200"), MAC: plan.MAC{0x52, 0x54, 0, 0, 0, 1},
}

const sampleAlias = "lace port=1 c=default/4f1c net=100/backend if=eth0 v4=10.40.1.2 v6=fd40:0:1::2 mac=064c0a280102 sticky name=web"

// The text is an interface between versions of the agent: it may only change with its number.
func TestAliasIsStable(t *testing.T) {
	second, device := sampleAttachment, sampleDevice
	second.Gateway, second.IfName, second.Name = false, "eth1", ""
	for want, from := range map[string]label{
		sampleAlias: {Attachment: sampleAttachment},
		"lace port=1 c=default/4f1c net=100/backend if=eth1 v4=10.40.1.2 v6=fd40:0:1::2 mac=064c0a280102 sticky nogw": {Attachment: second},
		"lace port=1 c=device/tap0 net=200/storage if=tap0 dev=tap0 v4=10.50.0.200 mac=525400000001 nogw name=vm":     {Attachment: device},
		"lace port=1 c=device/tap0 net=200/storage if=tap0 dev=tap0 v4=10.50.0.200 mac=525400000001 nogw ip6 name=vm": {Attachment: device, hadIPv6: true},
	} {
		got, err := encodeAlias(from)
		if err != nil || got != want {
			t.Errorf("encodeAlias = %q, %v\nwant %q", got, err, want)
		}
	}
}

// The agents before networks of frames had no word for the default route: each port had it.
func TestAliasWithoutAWordLeadsToTheGateway(t *testing.T) {
	got, err := decodeAlias(sampleAlias)
	if err != nil || !got.Gateway {
		t.Errorf("decodeAlias = %+v, %v", got, err)
	}
}

func TestAliasRoundTrip(t *testing.T) {
	noV4, noV6, odd, bare, device := sampleAttachment, sampleAttachment, sampleAttachment, sampleAttachment, sampleDevice
	noV4.V4, noV6.V6 = netip.Addr{}, netip.Addr{}
	odd.Name, odd.Container, odd.IfName = "a web=\"é 100%\"\n\xff", "k8s.io/x y=%", "eth%0"
	bare.Name, bare.Sticky, bare.Gateway, bare.Network = "", false, false, ""
	device.Device = "a dev=%"
	for name, a := range map[string]plan.Attachment{"all": sampleAttachment, "noV4": noV4, "noV6": noV6, "odd": odd, "bare": bare, "device": device} {
		t.Run(name, func(t *testing.T) {
			want := label{a, name == "device"}
			s, err := encodeAlias(want)
			if err != nil {
				t.Fatal(err)
			}
			got, err := decodeAlias(s)
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(label{}), cmpopts.EquateComparable(netip.Addr{})); diff != "" || err != nil {
				t.Errorf("decodeAlias(%q): %v\n%s", s, err, diff)
			}
		})
	}
}

func TestAliasCutsTheName(t *testing.T) {
	a := label{Attachment: sampleAttachment}
	a.Name = strings.Repeat("é", 100)
	s, err := encodeAlias(a)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeAlias(s)
	if err != nil {
		t.Fatal(err)
	}
	if len(s) > 255 || len(s) < 250 || got.Name == "" || !strings.HasPrefix(a.Name, got.Name) {
		t.Errorf("%d bytes, name %q", len(s), got.Name)
	}
}

func TestAliasRefusesWhatDoesNotFit(t *testing.T) {
	a := label{Attachment: sampleAttachment}
	a.Container = strings.Repeat("c", 200)
	if s, err := encodeAlias(a); err == nil || !strings.Contains(err.Error(), "do not fit") {
		t.Errorf("encodeAlias = %q, %v", s, err)
	}
}

func TestDecodeAliasRefuses(t *testing.T) {
	for name, s := range map[string]string{
		"empty":           "",
		"network's":       "lace network=backend",
		"other version":   strings.Replace(sampleAlias, "port=1", "port=2", 1),
		"unknown word":    sampleAlias + " x=1",
		"other order":     "lace port=1 net=100/backend c=default/4f1c if=eth0 mac=064c0a280102",
		"no device":       strings.Replace(sampleAlias, " v4", " dev= v4", 1),
		"flags' order":    strings.Replace(sampleAlias, "sticky", "nogw sticky", 1),
		"flag's value":    strings.Replace(sampleAlias, "sticky", "sticky nogw=1", 1),
		"twice":           strings.Replace(sampleAlias, "sticky", "sticky sticky", 1),
		"upper case MAC":  strings.Replace(sampleAlias, "064c0a", "064C0A", 1),
		"short MAC":       strings.Replace(sampleAlias, "064c0a", "064c", 1),
		"v6 as v4":        strings.Replace(sampleAlias, "v4=10.40.1.2", "v4=::1", 1),
		"big id":          strings.Replace(sampleAlias, "100/", "16777216/", 1),
		"broken escape":   sampleAlias + "%4",
		"needless escape": sampleAlias + "%41",
		"long v6":         strings.Replace(sampleAlias, "fd40:0:1::2", "fd40:0:1:0:0:0:0:2", 1),
	} {
		if a, err := decodeAlias(s); err == nil {
			t.Errorf("%s: decodeAlias(%q) = %+v", name, s, a)
		}
	}
}

func FuzzAlias(f *testing.F) {
	f.Add(sampleAlias)
	f.Add("lace port=1 c= net=0/ if= mac=000000000000")
	f.Add("lace port=1 c=device/tap0 net=200/storage if=tap0 dev=tap0 v4=10.50.0.200 mac=525400000001 nogw ip6 name=vm")
	f.Add("lace port=1 c=%20 net=1/a if=e v6=::ffff:1.2.3.4 mac=000000000000 name=%C3%A9")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := decodeAlias(s)
		if err != nil {
			return
		}
		if again, err := encodeAlias(a); err != nil || again != s {
			t.Errorf("%q came back as %q, %v", s, again, err)
		}
	})
}
