// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/plan"
)

const machineEndpoint = `
[endpoint.machine]
network = "seg"
node = "n1"
mac = "52:54:00:00:00:01"
address = ["10.60.0.201", "fd60::ffff:2"]
`

// attachDevice gives the node's agent a device.
func (n *node) attachDevice(t testing.TB, name, device string, change ...func(*wish)) port {
	t.Helper()
	w := wish{Name: name, Interface: dataplane.Interface{Network: "seg", Device: device}}
	for _, f := range change {
		f(&w)
	}
	got, err := n.agent.call(order{Do: "attach-device", Request: w})
	must(t, err)
	return got.Port
}

func (n *node) detachDevice(t testing.TB, device string) {
	t.Helper()
	_, err := n.agent.call(order{Do: "detach-device", Request: wish{Interface: dataplane.Interface{Device: device}}})
	must(t, err)
}

// newMachine makes a namespace that stands for a virtual machine, with a veth to the node.
func (n *node) newMachine(t testing.TB, device string) *container {
	t.Helper()
	m := &container{namespace: newNamespace(t, "machine"), node: n, network: "seg"}
	joinNamespaces(t, n.namespace, device, m.namespace, "eth0")
	return m
}

// become gives the machine what its port says.
func (m *container) become(t testing.TB, p port) {
	t.Helper()
	m.port = p
	must(t, m.LinkSetDown(m.link(t, "eth0"))) // its link-local address is made when it goes up
	must(t, m.LinkSetHardwareAddr(m.link(t, "eth0"), net.HardwareAddr(p.MAC[:])))
	must(t, m.LinkSetUp(m.link(t, "eth0")))
	must(t, m.LinkSetMTU(m.link(t, "eth0"), 1442))
	m.give(t, "eth0", p.V4.String()+"/24", p.V6.String()+"/64")
}

// deviceLooks is what of a device Lace might change.
func (n *node) deviceLooks(t testing.TB, device string) string {
	t.Helper()
	a := n.link(t, device).Attrs()
	var v6 []byte
	must(t, n.do(func() (err error) {
		v6, err = os.ReadFile("/proc/sys/net/ipv6/conf/" + device + "/disable_ipv6")
		return err
	}))
	return fmt.Sprintf("%q %s %s MTU %d, master %d, IPv6 off %s", a.Alias, a.HardwareAddr, a.Flags, a.MTU, a.MasterIndex, bytes.TrimSpace(v6))
}

// TestDevices gives devices of the host to a segment: ends of veths with machines behind, one declared and one not.
func TestDevices(t *testing.T) {
	s := newSegBed(t, bedOptions{more: machineEndpoint})
	n := s.nodes[0]
	declared, other := n.newMachine(t, "vm0"), n.newMachine(t, "vm1")
	looks, held := n.deviceLooks(t, "vm0"), n.holdings()
	p := n.attachDevice(t, "machine", "vm0")
	if p.V4.String() != "10.60.0.201" || p.V6.String() != "fd60::ffff:2" || p.MAC != [6]byte{0x52, 0x54, 0, 0, 0, 1} {
		t.Errorf("the declared machine is %+v", p)
	}
	declared.become(t, p)
	other.become(t, n.attachDevice(t, "other", "vm1"))
	all := append(s.all(), declared, other)
	checkPings(t, all...)
	checkLinkLocal(t, declared, s.far, other)
	for at := range 2 {
		for _, to := range []*container{s.far, s.a, other} {
			checkTransfers(t, declared, to, at)
		}
		checkSizes(t, s.far, declared, at)
		checkSizes(t, declared, s.a, at)
	}
	t.Run("spoofing", func(t *testing.T) {
		takesLong(t)
		checkSegmentSpoofing(t, s.bed, []*container{declared, s.far}, s.local)
	})
	t.Run("broadcast", func(t *testing.T) { checkReachesMachines(t, s, declared, other) })
	t.Run("restart", func(t *testing.T) {
		takesLong(t)
		checkDeviceOverAgents(t, n, declared, s.far)
	})
	n.detachDevice(t, "vm0")
	n.detachDevice(t, "vm0") // which changes nothing
	if got := n.deviceLooks(t, "vm0"); got != looks {
		t.Errorf("a device was %q, and is %q after it was detached", looks, got)
	}
	must(t, n.LinkDel(n.link(t, "vm1")))
	until(t, "a device that is gone is forgotten", func() bool { return slices.Equal(n.holdings(), held) })
	declared.port.V4, declared.port.V6 = p.V4, p.V6
	n.attachDevice(t, "machine", "vm0")
	checkPings(t, declared, s.far, s.local)
}

// checkReachesMachines has broadcasts of containers come to machines once, and the other way round.
func checkReachesMachines(t *testing.T, s *segBed, machines ...*container) {
	all := append(s.all(), machines...)
	for _, from := range []*container{s.a, s.far, machines[0]} {
		var seen []*capture
		for _, c := range all {
			seen = append(seen, c.capture(t, "eth0"))
		}
		frame := ethernet(broadcast, from.port.MAC, typeFree, []byte("to all, from "+from.name))
		from.raw(t).send(t, frame)
		isIt := func(f []byte) bool { return bytes.Equal(f, frame) }
		for i, c := range seen {
			c.await(t, "a broadcast", isIt)
			if got := c.count(isIt); got != 1 {
				t.Errorf("%s saw %d copies of the broadcast of %s", all[i].name, got, from.name)
			}
		}
	}
}

// checkDeviceOverAgents replaces the agent while a machine talks, and has it look for containers that are gone.
func checkDeviceOverAgents(t *testing.T, n *node, machine, far *container) {
	f := startFlood(t, machine, far.port.V4)
	st := startStream(t, far, machine, 1)
	held := n.holdings()
	n.stop()
	n.start()
	n.agent.kill()
	n.start()
	if got := n.holdings(); !slices.Equal(got, held) {
		t.Errorf("before:\n%q\nafter:\n%q", held, got)
	}
	f.check(t)
	st.check(t)
}

// TestTap has the test itself be a machine behind a tap.
func TestTap(t *testing.T) {
	takesLong(t)
	s := newSegBed(t, bedOptions{})
	n := s.nodes[0]
	tap := newTap(t, n, "tap0")
	frames := readFrames(t, tap)
	p := n.attachDevice(t, "tapped", "tap0", func(w *wish) { w.MAC = plan.MAC{0x52, 0x54, 0, 0, 0, 9} })
	write := func(f []byte) { _, err := tap.Write(f); must(t, err) }
	for _, to := range []*container{s.far, s.local} {
		write(ethernet(broadcast, p.MAC, typeARP, arp(arpRequest, p.MAC, p.V4, [6]byte{}, to.port.V4)))
		awaitFrame(t, frames, "the answer to ARP", func(f []byte) bool { return isARP(f, arpReply, to.port.V4) && [6]byte(f[22:]) == to.port.MAC })
		echo := join([]byte{echoRequest4, 0, 0, 0, 0, 1, 0, 1}, []byte("out of a tap"))
		sum := checksum(echo)
		echo[2], echo[3] = byte(sum>>8), byte(sum)
		until(t, "a machine pings "+to.name, func() bool {
			write(ethernet(to.port.MAC, p.MAC, typeIPv4, ipv4(p.V4, to.port.V4, protoICMP, 64, echo)))
			return findFrame(frames, onePing, func(f []byte) bool { // the other side asks for it first
				if isARP(f, arpRequest, p.V4) {
					t.Errorf("the machine itself was asked: %x", f)
				}
				in, ok := parseIP(f[14:])
				return ok && in.src == to.port.V4 && bytes.HasSuffix(f, []byte("out of a tap"))
			})
		})
	}
	var seen []*capture
	for _, c := range s.all() {
		seen = append(seen, c.capture(t, "eth0"))
	}
	write(ethernet(broadcast, p.MAC, typeFree, []byte("to all out of a tap")))
	for _, c := range seen {
		c.await(t, "a machine's broadcast", containing([]byte("to all out of a tap")))
	}
	s.far.raw(t).to(t, p.MAC, typeFree, []byte("into a tap"))
	awaitFrame(t, frames, "a frame of another node", func(f []byte) bool { return bytes.Contains(f, []byte("into a tap")) })
	s.a.raw(t).to(t, broadcast, typeVLAN, tag(7, typeFree, []byte("tagged, into a tap")))
	awaitFrame(t, frames, "a tagged frame", func(f []byte) bool { return isKind(f, typeVLAN) && bytes.Contains(f, []byte("tagged, into a tap")) })
}

// newTap makes a tap in the node, up.
func newTap(t *testing.T, n *node, name string) *os.File {
	t.Helper()
	return newTunnelDevice(t, n, name, unix.IFF_TAP)
}

// readFrames hands on what comes out of a tap.
func readFrames(t *testing.T, tap *os.File) <-chan []byte {
	frames := make(chan []byte, 1000)
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, err := tap.Read(b)
			if err != nil {
				return
			}
			select {
			case frames <- bytes.Clone(b[:n]):
			default: // nobody looks
			}
		}
	}()
	return frames
}

func awaitFrame(t *testing.T, frames <-chan []byte, what string, match func([]byte) bool) {
	t.Helper()
	if !findFrame(frames, patience, match) {
		t.Fatalf("waited in vain: %s", what)
	}
}

// findFrame looks for a frame among those that come in time.
func findFrame(frames <-chan []byte, wait time.Duration, match func([]byte) bool) bool {
	late := time.After(wait)
	for {
		select {
		case f := <-frames:
			if match(f) {
				return true
			}
		case <-late:
			return false
		}
	}
}
