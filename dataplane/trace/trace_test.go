// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
)

// udp4 is Ethernet, IPv4, UDP: 10.40.1.5:4242 to 10.40.2.7:53.
func udp4() []byte {
	b := make([]byte, 14+20+8+4)
	copy(b[6:], []byte{2, 0x4c, 10, 40, 1, 5})
	b[12] = 0x08
	ip := b[14:]
	ip[0] = 0x45
	binary.BigEndian.PutUint16(ip[2:], 32)
	ip[8], ip[9] = 64, 17
	copy(ip[12:], []byte{10, 40, 1, 5, 10, 40, 2, 7})
	binary.BigEndian.PutUint16(ip[20:], 4242)
	binary.BigEndian.PutUint16(ip[22:], 53)
	binary.BigEndian.PutUint16(ip[24:], 12)
	return b
}

// inSRv6 puts the packet behind an Ethernet header into an IPv6 header with next header 4.
func inSRv6(b []byte) []byte {
	inner := b[14:]
	out := make([]byte, 14+40, 14+40+len(inner))
	binary.BigEndian.PutUint16(out[12:], 0x86dd)
	out[14] = 0x60
	binary.BigEndian.PutUint16(out[18:], uint16(len(inner)))
	out[20], out[21] = 4, 64
	src, dst := netip.MustParseAddr("5f00:1ace:1:5ce:0:6400::").As16(), netip.MustParseAddr("5f00:1ace:2:14:0:6400::").As16()
	copy(out[22:], src[:])
	copy(out[38:], dst[:])
	return append(out, inner...)
}

func TestParseFlow(t *testing.T) {
	arp := make([]byte, 42)
	arp[12], arp[13], arp[15], arp[16], arp[18], arp[19], arp[21] = 8, 6, 1, 8, 6, 4, 1
	copy(arp[28:], []byte{10, 40, 1, 5})
	copy(arp[38:], []byte{10, 40, 1, 9})
	icmp := udp4()
	icmp[23], icmp[34], icmp[35] = 1, 8, 0
	tests := []struct {
		name     string
		head     []byte
		ethernet bool
		want     string
	}{
		{"UDP", udp4(), true, "10.40.1.5:4242 > 10.40.2.7:53 udp"},
		{"ICMP", icmp, true, "10.40.1.5 > 10.40.2.7 icmp EchoRequest"},
		{"in SRv6", inSRv6(udp4()), true, "10.40.1.5:4242 > 10.40.2.7:53 udp in 5f00:1ace:1:5ce:0:6400:: > 5f00:1ace:2:14:0:6400::"},
		{"in SRv6, no Ethernet", inSRv6(udp4())[14:], false, "10.40.1.5:4242 > 10.40.2.7:53 udp in 5f00:1ace:1:5ce:0:6400:: > 5f00:1ace:2:14:0:6400::"},
		{"ARP", arp, true, "10.40.1.5 > 10.40.1.9 arp"},
		{"cut behind Ethernet", udp4()[:14], true, "from 02:4c:0a:28:01:05 ethertype 0x0800"},
		{"cut in Ethernet", udp4()[:9], true, ""},
		{"nothing", nil, true, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := ParseFlow(tt.head, tt.ethernet).String(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestParseRefusesShortEvents(t *testing.T) {
	for n := range offsetHead {
		if _, err := parse(make([]byte, n), time.Time{}); !errors.Is(err, errShort) {
			t.Fatalf("%d bytes: got %v, want %v", n, err, errShort)
		}
	}
	lying := make([]byte, offsetHead+4)
	binary.NativeEndian.PutUint16(lying[offsetHeadLen:], 500)
	if _, err := parse(lying, time.Time{}); err != nil {
		t.Errorf("a head longer than the event: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(append(make([]byte, offsetHead), udp4()...))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parse(b, time.Time{})
		if err == nil {
			_ = e.Flow.String()
		}
	})
}

// plane loads the programs and pins the events below a BPF file system of the test's own.
func plane(t *testing.T) (*ebpf.Collection, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loading eBPF programs needs root; run as root")
	}
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mount a BPF file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	spec, err := bpf.LoadLace()
	if err != nil {
		t.Fatal(err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(coll.Close)
	if err := coll.Maps["events"].Pin(filepath.Join(dir, "events")); err != nil {
		t.Fatal(err)
	}
	return coll, dir
}

// refuse sends a packet from an interface that is in no table.
func refuse(t *testing.T, coll *ebpf.Collection, packet []byte, times uint32) {
	t.Helper()
	_, err := coll.Programs["pod_l3"].Run(&ebpf.RunOptions{Data: packet, DataOut: make([]byte, 1600), Repeat: times})
	if err != nil {
		t.Fatal(err)
	}
}

var errGotIt = errors.New("got it")

func TestRefusedPacketIsTold(t *testing.T) {
	coll, dir := plane(t)
	lock := filepath.Join(t.TempDir(), "lock")
	refuse(t, coll, udp4(), 1) // from before Open: left out
	r, err := Open(dir, lock)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := Open(dir, lock); err == nil || !strings.Contains(err.Error(), "another lace trace") {
		t.Errorf("a second reader: got %v", err)
	}
	long := append(udp4(), make([]byte, 1200)...)
	refuse(t, coll, long, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var got Event
	err = r.Each(ctx, func(e Event) error { got = e; return errGotIt })
	if !errors.Is(err, errGotIt) {
		t.Fatalf("no event: %v", err)
	}
	if got.Reason != bpf.LaceReasonREASON_NO_PORT || int(got.Length) != len(long) {
		t.Errorf("got reason %d and %d bytes, want no_port and %d", got.Reason, got.Length, len(long))
	}
	if want := "10.40.1.5:4242 > 10.40.2.7:53 udp"; got.Flow.String() != want {
		t.Errorf("got flow %q, want %q", got.Flow, want)
	}
	if age := time.Since(got.Time); age < 0 || age > time.Minute {
		t.Errorf("the event is %v old", age)
	}
}

// A flood is told in part, and how much was left out is told with it.
func TestFloodIsCounted(t *testing.T) {
	coll, dir := plane(t)
	r, err := Open(dir, filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	const flood = 200_000
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			refuse(t, coll, udp4(), flood)
		}
	}()
	told, missed := 0, 0
	err = r.Each(ctx, func(e Event) error {
		told++
		if missed += int(e.Missed); missed > 0 && told > 1 {
			return errGotIt
		}
		return nil
	})
	cancel()
	if !errors.Is(err, errGotIt) {
		t.Fatalf("%d events told, %d missed: %v", told, missed, err)
	}
}

func TestOpenWithoutPins(t *testing.T) {
	_, err := Open(t.TempDir(), filepath.Join(t.TempDir(), "lock"))
	if err == nil || !strings.Contains(err.Error(), "has an agent run") {
		t.Errorf("got %v", err)
	}
}
