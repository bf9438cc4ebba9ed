// SPDX-License-Identifier: Apache-2.0

package containers

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"

	"github.com/lace-net/lace/plugin"
)

// subnets are the fake's networks.
var subnets = map[string]netip.Prefix{"backend": netip.MustParsePrefix("10.40.1.0/24"), "storage": netip.MustParsePrefix("10.50.0.0/24")}

// claim says whose an address is.
type claim struct{ container, network string }

// fake is a Dataplane that makes a plain veth for each network, and records what it is asked. What is
// tested here is the way from containerd to it.
type fake struct {
	mu       sync.Mutex
	wired    map[string][]plugin.Result
	netns    map[string]string
	reserved map[claim]netip.Addr
	calls    []string
	retained [][]string

	refuse  error                   // Attach fails with it
	during  func(plugin.Request)    // called in Attach, before anything is made
	outside func(a netip.Addr) bool // addresses that are not in the block any more
}

func newFake() *fake {
	return &fake{wired: map[string][]plugin.Result{}, netns: map[string]string{}, reserved: map[claim]netip.Addr{}}
}

var _ plugin.Dataplane = (*fake)(nil)

func (f *fake) Attach(ctx context.Context, r plugin.Request) ([]plugin.Result, error) {
	f.mu.Lock()
	refuse, during := f.refuse, f.during
	f.calls = append(f.calls, "attach "+r.Container)
	f.mu.Unlock()
	if during != nil {
		during(r)
	}
	if refuse != nil {
		return nil, refuse
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if res, ok := f.wired[r.Container]; ok && f.netns[r.Container] == r.Netns && len(res) == len(r.Interfaces) {
		return res, nil
	}
	chosen := map[claim]netip.Addr{}
	for _, i := range r.Interfaces {
		c := claim{r.Container, i.Network}
		ip, err := f.choose(c, i.IPs)
		if err != nil {
			return nil, err
		}
		chosen[c] = ip
	}
	var results []plugin.Result
	for _, i := range r.Interfaces {
		res := resultOf(i, chosen[claim{r.Container, i.Network}])
		if err := wire(ctx, r, i, res); err != nil {
			return nil, err
		}
		results = append(results, res)
	}
	maps.Copy(f.reserved, chosen)
	f.wired[r.Container], f.netns[r.Container] = results, r.Netns
	return results, nil
}

func resultOf(i plugin.Interface, ip netip.Addr) plugin.Result {
	subnet := subnets[i.Network]
	res := plugin.Result{Network: i.Network, IfName: i.IfName, V4: netip.PrefixFrom(ip, subnet.Bits()), Gateway4: subnet.Addr().Next(), MAC: i.MAC, MTU: 1460}
	if res.MAC == nil {
		res.MAC = append(net.HardwareAddr{2, 0x4c}, ip.AsSlice()...)
	}
	return res
}

func (f *fake) choose(c claim, ips []netip.Addr) (netip.Addr, error) {
	subnet, ok := subnets[c.network]
	if !ok {
		return netip.Addr{}, fmt.Errorf("there is no network %s", c.network)
	}
	taken := map[netip.Addr]bool{}
	for other, ip := range f.reserved {
		taken[ip] = taken[ip] || other != c
	}
	if len(ips) > 0 {
		if !subnet.Contains(ips[0]) || f.outside != nil && f.outside(ips[0]) || taken[ips[0]] {
			return ips[0], fmt.Errorf("address %s cannot be had", ips[0])
		}
		return ips[0], nil
	}
	if ip, ok := f.reserved[c]; ok {
		return ip, nil
	}
	for ip := subnet.Addr().Next().Next(); ; ip = ip.Next() {
		if !taken[ip] && (f.outside == nil || !f.outside(ip)) {
			return ip, nil
		}
	}
}

// wire makes the veth with the end of the container straight in its namespace.
func wire(ctx context.Context, r plugin.Request, i plugin.Interface, res plugin.Result) error {
	host := fmt.Sprintf("lacet%.4x", sha256.Sum256([]byte(r.Container+r.Netns+i.IfName)))
	commands := [][]string{
		{"ip", "link", "add", host, "type", "veth", "peer", "name", i.IfName, "address", res.MAC.String(), "netns", r.Netns},
		{"ip", "link", "set", host, "up"},
		{"nsenter", "--net=" + r.Netns, "ip", "addr", "add", res.V4.String(), "dev", i.IfName},
		{"nsenter", "--net=" + r.Netns, "ip", "link", "set", i.IfName, "up"},
	}
	if i.Gateway {
		commands = append(commands, []string{"nsenter", "--net=" + r.Netns, "ip", "route", "add", "default", "via", res.Gateway4.String()})
	}
	for _, args := range commands {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

func (f *fake) Attached(container string) ([]plugin.Result, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	res, ok := f.wired[container]
	return res, ok
}

// first returns how the first interface of a container is wired.
func (f *fake) first(container string) (plugin.Result, bool) {
	res, ok := f.Attached(container)
	if !ok {
		return plugin.Result{}, false
	}
	return res[0], true
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
	for _, i := range r.Interfaces {
		if len(i.IPs) == 0 {
			return errors.New("nothing to reserve")
		}
		f.reserved[claim{r.Container, i.Network}] = i.IPs[0]
	}
	return nil
}

func (f *fake) Release(ctx context.Context, container string) error {
	err := f.Detach(ctx, container)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "release "+container)
	maps.DeleteFunc(f.reserved, func(c claim, _ netip.Addr) bool { return c.container == container })
	return err
}

func (f *fake) Retain(_ context.Context, live []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.retained = append(f.retained, live)
	for c := range f.reserved {
		if !slices.Contains(live, c.container) {
			delete(f.reserved, c)
			delete(f.wired, c.container)
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

// reservedFor returns the addresses that a container holds, in the order of the names of the networks.
func (f *fake) reservedFor(container string) (ips []netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, network := range slices.Sorted(maps.Keys(subnets)) {
		if ip, ok := f.reserved[claim{container, network}]; ok {
			ips = append(ips, ip)
		}
	}
	return ips
}
