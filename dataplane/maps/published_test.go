// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
)

// publications are the rows of a slot, with the container's end of each.
func (m *Maps) publications(t *testing.T, s Slot) map[Publication]string {
	t.Helper()
	rows, err := m.Published.All()
	must(t, err)
	out := map[Publication]string{}
	for k, v := range rows {
		if Slot(k.Slot) != s {
			continue
		}
		p := publishOf(k, v)
		out[Publication{netip.AddrPortFrom(p.Address, p.Port), p.Protocol}] = endOf(v.Addr, v.Port).String()
	}
	return out
}

func wantPublications(t *testing.T, m *Maps, s Slot, want map[string]string) {
	t.Helper()
	have := m.publications(t, s)
	for p, to := range have {
		if want[p.String()] != to {
			t.Errorf("%s leads to %s, want %q", p, to, want[p.String()])
		}
	}
	if len(have) != len(want) {
		t.Errorf("published are %v, want %v", have, want)
	}
}

var (
	web   = plan.Publish{Protocol: 6, Port: 8080, To: 80}
	dns   = plan.Publish{Protocol: 17, Port: 53, To: 5353, Address: netip.MustParseAddr("192.0.2.1")}
	other = plan.Publish{Protocol: 6, Port: 8081, To: 80, Address: netip.IPv6Unspecified()}
)

// TestPublishedRows: they come and go with the container, in place, and follow it to the next generation.
func TestPublishedRows(t *testing.T) {
	m := newMaps(t)
	p := testPlan(2)
	was := m.sync(t, p)
	s := SlotOf(was.Generation)
	one, dev := p.Ports[0], Device{Index: 100, MTU: 1460}
	one.Publish = []plan.Publish{web, dns}
	must(t, m.PutPort(one, dev))
	want := map[string]string{"0.0.0.0:8080/tcp": "10.40.1.2:80", "[::]:8080/tcp": "[fd40:0:1::2]:80", "192.0.2.1:53/udp": "10.40.1.2:5353"}
	wantPublications(t, m, s, want)
	p.Ports[0] = one
	if done := m.sync(t, p); done != (Synced{Generation: was.Generation}) {
		t.Errorf("Sync of what is there did %+v", done)
	}
	p.Networks[0].Line++
	next := m.sync(t, p)
	wantPublications(t, m, s, nil)
	s = SlotOf(next.Generation)
	wantPublications(t, m, s, want)

	one.Publish = []plan.Publish{other} // it was attached once more, and asks for something else
	must(t, m.PutPort(one, dev))
	wantPublications(t, m, s, map[string]string{"[::]:8081/tcp": "[fd40:0:1::2]:80"})
	two := p.Ports[1]
	two.Publish = []plan.Publish{web}
	must(t, m.PutPort(two, Device{Index: 101, MTU: 1460}))
	must(t, m.DeletePort(one, 100))
	must(t, m.DeletePort(one, 100))
	wantPublications(t, m, s, map[string]string{"0.0.0.0:8080/tcp": "10.40.1.3:80", "[::]:8080/tcp": "[fd40:0:1::3]:80"})
	must(t, m.DeletePort(two, 0)) // its interface is gone
	wantPublications(t, m, s, nil)
}

func TestPublicationRow(t *testing.T) {
	p := testPlan(1).Ports[0]
	p.Publish = []plan.Publish{dns}
	k := bpf.LacePublicationKey{Slot: 1, Port: netPort(53), Protocol: 17, V4: 1}
	k.Addr.U8 = netip.MustParseAddr("::ffff:192.0.2.1").As16()
	row, ok := publicationRowsOf(p, 1)[k]
	if !ok || row.Network != 100 || row.Addr.U8 != addr(p.V4).U8 || row.Port != netPort(5353) {
		t.Errorf("the row is %+v, %v of %v", row, ok, publicationRowsOf(p, 1))
	}
	p.Publish = []plan.Publish{web}
	k = bpf.LacePublicationKey{Slot: 1, Port: netPort(8080), Protocol: 6, V4: 1}
	if _, ok := publicationRowsOf(p, 1)[k]; !ok {
		t.Errorf("a port of every address is not written with address 0: %v", publicationRowsOf(p, 1))
	}
}

// TestPublishers: a fresh agent reads what it would be told.
func TestPublishers(t *testing.T) {
	m := newMaps(t)
	p := testPlan(2)
	only4 := web
	only4.Address = netip.IPv4Unspecified()
	for name, tt := range map[string]struct{ asked, read []plan.Publish }{
		"both families":       {[]plan.Publish{web, dns}, []plan.Publish{web, dns}},
		"one family of two":   {[]plan.Publish{only4}, []plan.Publish{only4}},
		"another one besides": {[]plan.Publish{other, web}, []plan.Publish{web, other}},
		"nothing":             {nil, nil},
	} {
		p.Ports[0].Publish = tt.asked
		m.sync(t, p)
		all, err := m.Publishers()
		must(t, err)
		if got := all.Of(p.Ports[0].Attachment); !slices.Equal(got, tt.read) {
			t.Errorf("%s: read %v, want %v", name, got, tt.read)
		}
		if got := all.Of(p.Ports[1].Attachment); got != nil {
			t.Errorf("%s: a container that publishes nothing has %v", name, got)
		}
	}
	p.Ports[0].V6, p.Ports[0].Publish = netip.Addr{}, []plan.Publish{web}
	m.sync(t, p)
	all, err := m.Publishers()
	must(t, err)
	if got := all.Of(p.Ports[0].Attachment); !slices.Equal(got, []plan.Publish{web}) {
		t.Errorf("of a container with one family: %v", got)
	}
}

func TestClashes(t *testing.T) {
	at := func(text string, protocol uint8) Publication {
		return Publication{netip.MustParseAddrPort(text), protocol}
	}
	for _, tt := range []struct {
		a, b Publication
		want bool
	}{
		{at("192.0.2.1:80", 6), at("192.0.2.1:80", 6), true},
		{at("192.0.2.1:80", 6), at("192.0.2.2:80", 6), false},
		{at("192.0.2.1:80", 6), at("0.0.0.0:80", 6), true},
		{at("192.0.2.1:80", 6), at("0.0.0.0:81", 6), false},
		{at("192.0.2.1:80", 6), at("0.0.0.0:80", 17), false},
		{at("192.0.2.1:80", 6), at("[::]:80", 6), false},
		{at("[::]:80", 6), at("[2001:db8::1]:80", 6), true},
	} {
		if tt.a.Clashes(tt.b) != tt.want || tt.b.Clashes(tt.a) != tt.want {
			t.Errorf("%s and %s: want %v", tt.a, tt.b, tt.want)
		}
	}
}
