// SPDX-License-Identifier: Apache-2.0

package containers

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"

	"github.com/lace-net/lace/plugin"
)

// fake is a Dataplane that makes a plain veth with addresses of 10.40.1.0/24, and records what it is asked. What is
// tested here is the way from containerd to it.
type fake struct {
	mu       sync.Mutex
	wired    map[string]plugin.Result
	netns    map[string]string
	reserved map[string]netip.Addr
	calls    []string
	retained [][]string

	refuse  error                   // Attach fails with it
	during  func(plugin.Request)    // called in Attach, before anything is made
	outside func(a netip.Addr) bool // addresses that are not in the block any more
}

func newFake() *fake {
	return &fake{wired: map[string]plugin.Result{}, netns: map[string]string{}, reserved: map[string]netip.Addr{}}
}

var _ plugin.Dataplane = (*fake)(nil)

func (f *fake) Attach(ctx context.Context, r plugin.Request) (plugin.Result, error) {
	f.mu.Lock()
	refuse, during := f.refuse, f.during
	f.calls = append(f.calls, "attach "+r.Container)
	f.mu.Unlock()
	if during != nil {
		during(r)
	}
	if refuse != nil {
		return plugin.Result{}, refuse
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if res, ok := f.wired[r.Container]; ok && f.netns[r.Container] == r.Netns {
		return res, nil
	}
	ip, err := f.choose(r)
	if err != nil {
		return plugin.Result{}, err
	}
	res := plugin.Result{IfName: r.IfName, V4: netip.PrefixFrom(ip, 24), Gateway4: netip.MustParseAddr("10.40.1.1"), MAC: r.MAC, MTU: 1460}
	if res.MAC == nil {
		res.MAC = append(net.HardwareAddr{2, 0x4c}, ip.AsSlice()...)
	}
	if err := wire(ctx, r, res); err != nil {
		return plugin.Result{}, err
	}
	f.wired[r.Container], f.netns[r.Container], f.reserved[r.Container] = res, r.Netns, ip
	return res, nil
}

func (f *fake) choose(r plugin.Request) (netip.Addr, error) {
	taken := map[netip.Addr]bool{}
	for c, ip := range f.reserved {
		taken[ip] = c != r.Container
	}
	if len(r.IPs) > 0 {
		if f.outside != nil && f.outside(r.IPs[0]) || taken[r.IPs[0]] {
			return r.IPs[0], fmt.Errorf("address %s cannot be had", r.IPs[0])
		}
		return r.IPs[0], nil
	}
	if ip, ok := f.reserved[r.Container]; ok {
		return ip, nil
	}
	for ip := netip.MustParseAddr("10.40.1.2"); ; ip = ip.Next() {
		if !taken[ip] && (f.outside == nil || !f.outside(ip)) {
			return ip, nil
		}
	}
}

// wire makes the veth with the end of the container straight in its namespace.
func wire(ctx context.Context, r plugin.Request, res plugin.Result) error {
	host := fmt.Sprintf("lacet%.4x", sha256.Sum256([]byte(r.Container+r.Netns)))
	for _, args := range [][]string{
		{"ip", "link", "add", host, "type", "veth", "peer", "name", r.IfName, "address", res.MAC.String(), "netns", r.Netns},
		{"ip", "link", "set", host, "up"},
		{"nsenter", "--net=" + r.Netns, "ip", "addr", "add", res.V4.String(), "dev", r.IfName},
		{"nsenter", "--net=" + r.Netns, "ip", "link", "set", r.IfName, "up"},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

func (f *fake) Attached(container string) (plugin.Result, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	res, ok := f.wired[container]
	return res, ok
}

func (f *fake) Detach(_ context.Context, container string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "detach "+container)
	delete(f.wired, container)
	delete(f.netns, container)
	return nil
}

func (f *fake) Reserve(_ context.Context, r plugin.Request) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "reserve "+r.Container)
	if len(r.IPs) == 0 {
		return errors.New("nothing to reserve")
	}
	f.reserved[r.Container] = r.IPs[0]
	return nil
}

func (f *fake) Release(ctx context.Context, container string) error {
	err := f.Detach(ctx, container)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "release "+container)
	delete(f.reserved, container)
	return err
}

func (f *fake) Retain(_ context.Context, live []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.retained = append(f.retained, live)
	for c := range f.reserved {
		if !slices.Contains(live, c) {
			delete(f.reserved, c)
			delete(f.wired, c)
		}
	}
	return nil
}

// set changes how the fake behaves.
func (f *fake) set(change func(*fake)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// count tells how often the data plane was asked for something.
func (f *fake) count(call string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.calls {
		if strings.HasPrefix(c, call) {
			n++
		}
	}
	return n
}

func (f *fake) syncs() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.retained)
}

// reservedFor returns the address that a container holds.
func (f *fake) reservedFor(container string) (netip.Addr, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ip, ok := f.reserved[container]
	return ip, ok
}
