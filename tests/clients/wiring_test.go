// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
)

// TestContainersOfAllClientsTalk lets nerdctl, ctr and CRI start one container each on a node of its own, and a
// second one beside the first.
func TestContainersOfAllClientsTalk(t *testing.T) {
	for form, mtu := range map[string]int{"reduced": 1460, "srh": 1436} {
		t.Run(form, func(t *testing.T) {
			b := up(t, strings.Replace(threeNodes, "[node.edge-1]", fmt.Sprintf("encapsulation = %q\n[node.edge-1]", form), 1))
			web := b.node("edge-1").nerdctl("web", backend)
			near := b.node("edge-1").nerdctl("near", backend)
			task := b.node("edge-2").ctr("task", backend)
			sandbox := b.node("edge-3").cri(pod{name: "pod", labels: map[string]string{"lace.network": "backend"}})
			all := []*guest{web, near, task, sandbox}
			for _, g := range all {
				wired(g, mtu)
				g.ping(all...)
			}
			transfer(web, near, task, sandbox)
			transfer(sandbox, web)
		})
	}
}

// wired looks at all that a container of network backend sees of its network.
func wired(g *guest, mtu int) {
	g.t.Helper()
	number := strings.TrimPrefix(g.host, "edge-")
	block4, block6 := netip.MustParsePrefix("10.40."+number+".0/24"), netip.MustParsePrefix("fd40:0:0:"+number+"::/64")
	if !block4.Contains(g.v4) || !block6.Contains(g.v6) {
		g.t.Errorf("%v is not in the blocks %v, %v", g, block4, block6)
	}
	gateway4, gateway6 := block4.Addr().Next(), block6.Addr().Next()
	contains(g.t, g.in("cat /sys/class/net/eth0/mtu"), fmt.Sprint(mtu))
	contains(g.t, g.in("cat /sys/class/net/eth0/address"), fmt.Sprintf("02:4c:0a:28:%02x:%02x", g.v4.As4()[2], g.v4.As4()[3]))
	sees(g, "ip route", "default via "+gateway4.String()+" dev eth0 onlink", gateway4.String()+" dev eth0 scope link")
	sees(g, "ip -6 route | sed 's/ *metric.[0-9]*//' | grep -v ff00::/8", gateway6.String()+" dev eth0", g.v6.String()+" dev eth0",
		"default via "+gateway6.String()+" dev eth0 onlink")
	absent(g.t, g.in("ip -o addr"), "scope link")
	g.in("ping -q -c 1 -W 5 %s && ping -q -c 1 -W 5 %s", gateway4, gateway6)
}

// sees compares the lines that a command prints, but for spaces.
func sees(g *guest, line string, want ...string) {
	g.t.Helper()
	var got []string
	for l := range strings.Lines(g.in("%s", line)) {
		got = append(got, strings.Join(strings.Fields(l), " "))
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		g.t.Errorf("%v: %s:\n%s\nwant:\n%s", g, line, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// transfer fetches 4 MiB from the server by HTTP over each family and compares the sums.
func transfer(server *guest, clients ...*guest) {
	server.t.Helper()
	want := server.in("head -c 4194304 /dev/urandom >/www/file && sha256sum </www/file && httpd -p 80 -h /www")
	for _, c := range clients {
		for _, a := range server.addresses() {
			if got := c.in("timeout 30 wget -q -O - http://%s/file | sha256sum", netip.AddrPortFrom(a, 80)); got != want {
				c.t.Errorf("from %v to %v by %s: sum %s, want %s", server, c, a, got, want)
			}
		}
	}
}

// TestWiredBeforeItsFirstInstruction lets the very first instruction of twenty containers a client look at
// eth0 and speak to another node. The container judges, by its status: on a busy machine nerdctl may lose the output
// of one that ends at once.
func TestWiredBeforeItsFirstInstruction(t *testing.T) {
	b := up(t, threeNodes)
	far := b.node("edge-2").ctr("far", backend)
	n := b.node("edge-1")
	first := []string{"sh", "-c", fmt.Sprintf(
		"set -e; ip -o addr show eth0 >/tmp/eth0; grep -q ' inet 10\\.40\\.1\\.' /tmp/eth0; grep -q ' inet6 fd40:0:0:1:' /tmp/eth0; ping -q -c 1 -W 5 %s; ping -q -c 1 -W 5 %s",
		far.v4, far.v6)}
	for client, line := range map[string]func(i int) []string{
		"nerdctl": func(int) []string { return nerdctlRun(labels(backend), append([]string{"--rm", image}, first...)...) },
		"ctr": func(i int) []string {
			return append([]string{"ctr", "run", "--rm", "--label", backend, image, fmt.Sprintf("c%d", i)}, first...)
		},
	} {
		b.sub(client, func(b *bed) {
			inParallel(20, 4, func(i int) {
				s := n.with(b.t).node("edge-1").try(line(i)...)
				if s.status != 0 {
					b.t.Errorf("container %d: status %d\n%s\n%s", i, s.status, s.out, s.err)
				}
			})
		})
	}
	n.eventuallyEmpty()
}

// inParallel calls f with 0 to n-1, some at once.
func inParallel(n, atOnce int, f func(i int)) {
	var all sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i := range n {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			f(i)
		})
	}
	all.Wait()
}

// TestOthersAreLeftAlone starts containers that do not ask, or cannot be asked for.
func TestOthersAreLeftAlone(t *testing.T) {
	b := up(t, threeNodes)
	n := b.node("edge-1")
	host := n.must("ip", "-o", "link")
	show := []string{"--rm", image, "ip", "-o", "addr"}
	for name, line := range map[string][]string{
		"nerdctl without labels": nerdctlRun(labels("app=web"), show...),
		"ctr without labels":     {"ctr", "run", "--rm", image, "plain", "ip", "-o", "addr"},
	} {
		absent(t, n.must(line...), "eth0")
		if now := n.must("ip", "-o", "link"); now != host {
			t.Errorf("%s: the node's interfaces changed from\n%s\nto\n%s", name, host, now)
		}
	}
	for _, line := range [][]string{
		append([]string{"nerdctl", "run", "--net", "host", "--pull", "never", "--label", backend}, show...),
		{"ctr", "run", "--rm", "--net-host", "--label", backend, image, "host", "ip", "-o", "addr"},
	} {
		contains(t, n.must(line...), "inet6 fd00:a::1/64") // the node's own
	}
	n.eventuallyEmpty()
	first := n.nerdctl("first", backend)
	out := n.must(append([]string{"nerdctl", "run", "--net", "container:first", "--pull", "never", "--label", "lace.network=staging"}, show...)...)
	if v4, v6, err := addressesIn(out); err != nil || v4 != first.v4 || v6 != first.v6 {
		t.Errorf("a container in the network of %v sees\n%s", first, out)
	}
	n.eventuallyHolds(1, 2) // the end of the second took nothing of the first
	first.ping(first)
	first.in("ping -q -c 1 -W 5 10.40.1.1")
}
