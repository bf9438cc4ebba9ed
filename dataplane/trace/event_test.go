// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"

	"github.com/lace-net/lace/bpf"
)

// enumOf reads an enum out of the object's BTF: what the C source says.
func enumOf(t *testing.T, name string) []btf.EnumValue {
	t.Helper()
	spec, err := bpf.LoadLace()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName(name, &enum); err != nil {
		t.Fatal(err)
	}
	return enum.Values
}

// TestWordsAreThoseOfC holds the words against the C enums, in order.
func TestWordsAreThoseOfC(t *testing.T) {
	for name, nameOf := range map[string]func(int) string{
		"verdict": func(i int) string { return VerdictName(bpf.LaceVerdict(i)) },
		"stage":   func(i int) string { return StageName(bpf.LaceStage(i)) },
	} {
		values := enumOf(t, name)
		if last := values[len(values)-1]; last.Name == "STAGE_MAX" {
			values = values[:len(values)-1]
		}
		for i, v := range values {
			want := strings.ToLower(strings.TrimPrefix(v.Name, strings.ToUpper(name)+"_"))
			if int(v.Value) != i || nameOf(i) != want {
				t.Errorf("%s = %d is called %q, want %q", v.Name, v.Value, nameOf(i), want)
			}
		}
		if got, want := nameOf(len(values)), name+"_"; !strings.HasPrefix(got, want) {
			t.Errorf("a %s of a newer version is called %q, want %q and its number", name, got, want)
		}
	}
	if !KnownVerdict("ended") || KnownVerdict("dropped") {
		t.Error("the known verdicts are not the known ones")
	}
}

// made is an event with something in each field.
func made() bpf.LaceEvent {
	raw := bpf.LaceEvent{
		Time: 5e9, Reason: uint32(bpf.LaceReasonREASON_ENCAPSULATED), Ifindex: 7, Len: 1500, Missed: 3, Network: 100, To: 200,
		Line: 12, Peer: 2, Generation: 5, Output: 9, Mtu: 1460, Verdict: uint8(bpf.LaceVerdictVERDICT_PASSED),
		Stage: uint8(bpf.LaceStageSTAGE_DELIVER), Ethernet: 1,
	}
	raw.Sid.U8 = netip.MustParseAddr("5f00:1ace:2:14:0:c800::").As16()
	raw.HeadLen = uint16(copy(raw.Head[:], udp4()))
	return raw
}

func encoded(t testing.TB, raw bpf.LaceEvent) []byte {
	t.Helper()
	b, err := binary.Append(nil, binary.NativeEndian, raw)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDecode(t *testing.T) {
	origin := time.Unix(1000, 0)
	b := encoded(t, made())
	if len(b) != 240 {
		t.Fatalf("an event has %d bytes, want 240", len(b))
	}
	got, err := Decode(b, origin)
	if err != nil {
		t.Fatal(err)
	}
	want := Event{
		Time: time.Unix(1005, 0), Verdict: bpf.LaceVerdictVERDICT_PASSED, Reason: bpf.LaceReasonREASON_ENCAPSULATED,
		Stage: bpf.LaceStageSTAGE_DELIVER, Ifindex: 7, Output: 9, Network: 100, To: 200, Peer: 2, Generation: 5, Line: 12,
		SID: netip.MustParseAddr("5f00:1ace:2:14:0:c800::"), MTU: 1460, Length: 1500, Missed: 3, Flow: ParseFlow(udp4(), true),
	}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	raw := made()
	raw.Sid.U8, raw.Ethernet, raw.HeadLen = [16]byte{}, 0, uint16(copy(raw.Head[:], inSRv6(udp4())[14:]))
	if got, err := Decode(encoded(t, raw), origin); err != nil || got.SID.IsValid() || got.Flow.Outer == nil {
		t.Errorf("without SID and Ethernet header: %+v, %v", got, err)
	}
}

// TestDecodeOfWhatIsRewritten: addresses of both families, and none where nothing is said to be rewritten.
func TestDecodeOfWhatIsRewritten(t *testing.T) {
	raw := made()
	raw.Way, raw.Outer, raw.Translated = 2, 1, 1
	raw.Rewrite.Src.U8, raw.Rewrite.Dst.U8 = netip.MustParseAddr("::ffff:192.0.2.1").As16(), netip.MustParseAddr("2001:db8::7").As16()
	raw.Rewrite.Sport, raw.Rewrite.Dport = binary.NativeEndian.Uint16([]byte{0x30, 0x39}), binary.NativeEndian.Uint16([]byte{0, 80})
	want := Rewrite{netip.MustParseAddrPort("192.0.2.1:12345"), netip.MustParseAddrPort("[2001:db8::7]:80")}
	got, err := Decode(encoded(t, raw), time.Time{})
	if err != nil || got.Rewrite != want || got.Way != 2 || got.Outer != SideOutside {
		t.Errorf("got %+v, %v", got, err)
	}
	raw.Translated = 0
	if got, err = Decode(encoded(t, raw), time.Time{}); err != nil || got.Rewrite != (Rewrite{}) {
		t.Errorf("of what is not rewritten: %+v, %v", got.Rewrite, err)
	}
}

func TestDecodeRefusesShortEvents(t *testing.T) {
	b := encoded(t, made())
	for n := range b {
		if _, err := Decode(b[:n], time.Time{}); !errors.Is(err, errShort) {
			t.Fatalf("%d bytes: got %v, want %v", n, err, errShort)
		}
	}
	lying := made()
	lying.HeadLen = 500
	if _, err := Decode(encoded(t, lying), time.Time{}); err != nil {
		t.Errorf("a head longer than the event: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, head := range [][]byte{udp4(), inSRv6(udp4()), icmpError4(), icmpError6(), arp(1), solicitation(), frameInSRv6(frame(0x8100, 0, 7, 0x88, 0xb5), true, true), frameInSRv6(arp(2), false, false)} {
		raw := made()
		raw.HeadLen = uint16(copy(raw.Head[:], head))
		f.Add(encoded(f, raw))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := Decode(b, time.Time{})
		if err == nil {
			_ = e.Flow.String()
		}
	})
}
