// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	gsoSize    = 1000
	gsoPayload = 5500 // five full segments and a half
	tcpHeaders = 14 + 20 + 20
)

func TestSegmenterCutsWhatTCPLeftWhole(t *testing.T) {
	h, c, _ := segment(t, false)
	near, far, err := h.Segmenter()
	must(t, err)
	want := []int{1000, 1000, 1000, 1000, 1000, 500}
	if got := throughSegmenter(t, c, near, far); !slices.Equal(got, want) {
		t.Errorf("payloads %v, want %v", got, want)
	}
	switchTSO(t, c, true)
	if got := throughSegmenter(t, c, near, far); !slices.Equal(got, []int{gsoPayload}) {
		t.Errorf("payloads %v with the offload: the test cannot tell", got)
	}
	_, err = h.Apply(segmentPlan(), Options{MTU: uplinkMTU})
	must(t, err)
	if got := throughSegmenter(t, c, near, far); !slices.Equal(got, want) {
		t.Errorf("payloads %v after the drift was corrected, want %v", got, want)
	}
}

func switchTSO(t *testing.T, c *conn, on bool) {
	t.Helper()
	must(t, inNetns(c.ns, func() error {
		e, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer e.Close()
		return e.Change(segmenterNear, map[string]bool{"tx-tcp-segmentation": on, "tx-gso-robust": on})
	}))
}

// throughSegmenter sends one large TCP packet out of the near end, as a stack leaves it to the device, and returns the payloads of
// what arrives.
func throughSegmenter(t *testing.T, c *conn, near, far int) (payloads []int) {
	t.Helper()
	in, out := packetSocket(t, c, far), packetSocket(t, c, near)
	must(t, unix.SetsockoptInt(out, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	must(t, unix.SetsockoptTimeval(in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, timeval(30*time.Second)))
	_, err := unix.Write(out, largePacket())
	must(t, err)
	frame := make([]byte, 65536)
	for sum := 0; sum < gsoPayload; {
		n, err := unix.Read(in, frame)
		if err != nil {
			t.Fatalf("wait for the rest after %v: %v", payloads, err)
		}
		if n < tcpHeaders || frame[12] != 8 || frame[13] != 0 || frame[23] != unix.IPPROTO_TCP {
			continue
		}
		payloads = append(payloads, n-tcpHeaders)
		sum += n - tcpHeaders
	}
	return payloads
}

// packetSocket is bound to one interface of c's namespace.
func packetSocket(t *testing.T, c *conn, index int) int {
	t.Helper()
	fd := -1
	must(t, inNetns(c.ns, func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: index})) // ETH_P_ALL in network order
	return fd
}

// largePacket is a virtio_net_hdr that asks for segments of gsoSize, and a TCP packet with gsoPayload bytes.
func largePacket() []byte {
	const needsChecksum, gsoTCPv4 = 1, 1
	h := binary.NativeEndian.AppendUint16([]byte{needsChecksum, gsoTCPv4}, tcpHeaders)
	for _, v := range []uint16{gsoSize, 34, 16} { // the checksum's start, and its place from there
		h = binary.NativeEndian.AppendUint16(h, v)
	}
	p := make([]byte, tcpHeaders+gsoPayload)
	copy(p, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0})
	ip := p[14:]
	copy(ip, []byte{0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, unix.IPPROTO_TCP, 0, 0, 10, 50, 0, 17, 10, 50, 0, 18})
	binary.BigEndian.PutUint16(ip[2:], uint16(20+20+gsoPayload))
	binary.BigEndian.PutUint16(ip[10:], ^fold(ip[:20]))
	tcp := ip[20:]
	tcp[12], tcp[13] = 5<<4, 0x10
	pseudo := append(slices.Clone(ip[12:20]), 0, unix.IPPROTO_TCP, byte((20+gsoPayload)>>8), byte((20+gsoPayload)&0xff))
	binary.BigEndian.PutUint16(tcp[16:], fold(pseudo))
	return append(h, p...)
}

func fold(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	sum = sum>>16 + sum&0xffff
	return uint16(sum>>16 + sum&0xffff)
}

// The pair comes with the first L2 network and goes with the last; it has no addresses and no part in the host's traffic.
func TestSegmenterLivesWithL2Networks(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c := host(t)
		o := Options{VRF: vrf, MTU: uplinkMTU}
		wantNoSegmenter := func() {
			t.Helper()
			if near, far, err := h.Segmenter(); near != 0 || far != 0 || err != nil {
				t.Errorf("Segmenter() = %d, %d, %v", near, far, err)
			}
			noLink(t, c, segmenterNear)
			noLink(t, c, segmenterFar)
		}
		_, err := h.Apply(testPlan(), o)
		must(t, err)
		wantNoSegmenter()
		_, err = h.Prepare(segmentPlan(), o)
		must(t, err)
		wantSegmenter(t, h, c)
		_, err = h.Apply(segmentPlan(), o)
		must(t, err)
		changes, err := h.Apply(segmentPlan(), o)
		noChanges(t, changes, err)
		_, err = h.Prepare(testPlan(), o)
		must(t, err)
		wantSegmenter(t, h, c)
		_, err = h.Apply(testPlan(), o)
		must(t, err)
		wantNoSegmenter()
		_, err = h.Apply(segmentPlan(), o)
		must(t, err)
		must(t, h.Remove())
		wantNoSegmenter()
	})
}

func wantSegmenter(t *testing.T, h *Handle, c *conn) {
	t.Helper()
	near, far, err := h.Segmenter()
	must(t, err)
	for name, index := range map[string]int{segmenterNear: near, segmenterFar: far} {
		a := mustLink(t, c, name).Attrs()
		if a.Index != index || a.Alias != "lace segmenter" || a.MTU != 65535 || a.Flags&net.FlagUp == 0 || a.MasterIndex != 0 {
			t.Errorf("%s is %+v", name, a)
		}
		if addresses := interfaceAddresses(t, c, name, netlink.FAMILY_ALL); len(addresses) > 0 {
			t.Errorf("%s has addresses %v", name, addresses)
		}
		d, err := c.detail(index)
		must(t, err)
		if v, ok := d.inet6Setting(confDisableIPv6); !ok || v != 1 {
			t.Errorf("disable_ipv6 of %s is %d", name, v)
		}
		if mode, _ := d.inet6.number(inet6AddrGenMode); mode != addrGenNone {
			t.Errorf("addrgenmode of %s is %d", name, mode)
		}
	}
}

// What a crash left half made, or somebody took apart, is made anew.
func TestSegmenterIsMadeAnew(t *testing.T) {
	for name, spoil := range map[string]func(*testing.T, *conn){
		"no alias": func(t *testing.T, c *conn) {
			at := attrs(segmenterNear)
			at.Group = group
			must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: at, PeerName: segmenterFar}))
		},
		"near end renamed": func(t *testing.T, c *conn) {
			must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: attrs("x0"), PeerName: segmenterFar}))
			must(t, c.LinkSetAlias(mustLink(t, c, segmenterFar), segmenterAlias))
		},
		"far end renamed": func(t *testing.T, c *conn) {
			must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: attrs(segmenterNear), PeerName: "x0"}))
			must(t, c.LinkSetAlias(mustLink(t, c, segmenterNear), segmenterAlias))
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, c := host(t)
			spoil(t, c)
			if name != "no alias" {
				if near, far, err := h.Segmenter(); near != 0 || far != 0 || err != nil {
					t.Errorf("Segmenter() = %d, %d, %v before", near, far, err)
				}
			}
			_, err := h.Apply(segmentPlan(), Options{MTU: uplinkMTU})
			must(t, err)
			wantSegmenter(t, h, c)
			changes, err := h.Apply(segmentPlan(), Options{MTU: uplinkMTU})
			noChanges(t, changes, err)
		})
	}
}

func TestForeignSegmenterIsNotTouched(t *testing.T) {
	for _, name := range []string{segmenterNear, segmenterFar} {
		t.Run(name, func(t *testing.T) {
			h, c := host(t)
			must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: attrs(name), PeerName: "x0"}))
			_, err := h.Apply(segmentPlan(), Options{MTU: uplinkMTU})
			wantError(t, err, name, "not Lace's", "ip link del "+name)
			var fe *ForeignError
			if !errors.As(err, &fe) {
				t.Errorf("error is %T", err)
			}
			if near, far, err := h.Segmenter(); near != 0 || far != 0 || err != nil {
				t.Errorf("Segmenter() = %d, %d, %v", near, far, err)
			}
			must(t, h.Remove())
			mustLink(t, c, name)
		})
	}
}

// The host's own talk must not get into the pair: a frame that nobody sent would go into the programs.
func TestSegmenterIsSilent(t *testing.T) {
	h, c, _ := segment(t, false)
	_, far, err := h.Segmenter()
	must(t, err)
	in := packetSocket(t, c, far)
	must(t, unix.SetsockoptTimeval(in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, timeval(time.Second)))
	if n, err := unix.Read(in, make([]byte, 2048)); err == nil {
		t.Errorf("%d bytes came by themselves", n)
	}
}

func timeval(d time.Duration) *unix.Timeval {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	return &tv
}
