// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// outside is the lab of conf/lab/internet.toml. edge-2 has a firewall and strict reverse path filters, as hosts have them.
type outside struct {
	*bed
	text             string // of the topology
	web, www, far    *guest // of network web: one that asks and one that publishes port 8080 on edge-1, one that does both on edge-2
	db               *guest // of network db, on edge-2, publishes port 5432
	sum, served      string // of the files that the internet has at port 8000, and www at its published one
	internet, office ends
}

// ends are the addresses of one party.
type ends struct{ v4, v6 string }

// both are the same for each family.
func (e ends) both() [2]string { return [2]string{e.v4, e.v6} }

func (g *guest) ends() ends { return ends{g.v4.String(), g.v6.String()} }

var nodeEnds = map[string]ends{"edge-1": {"192.0.2.1", "fd00:a::1"}, "edge-2": {"192.0.2.2", "fd00:a::2"}}

// downloaded is the size of the file that is fetched, in bytes.
const downloaded = 32 << 20

// hostFirewall is what a careful administrator writes, without a thought of Lace: whoever is not asked comes in by SSH and echo only,
// and nothing is forwarded.
const hostFirewall = `table inet filter {
	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		iif "lo" accept
		meta l4proto { icmp, ipv6-icmp } accept
		tcp dport 22 accept
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
	}
}
`

func upOutside(t *testing.T) *outside {
	t.Helper()
	needPrograms(t, map[string]string{"curl": "curl", "nft": "nftables", "busybox": "busybox-static"})
	o := &outside{text: shipped(t, "internet.toml"), internet: ends{"198.51.100.1", "2001:db8:100::1"}, office: ends{"203.0.113.1", "2001:db8:200::1"}}
	o.bed = up(t, o.text)
	one, two := o.node("edge-1"), o.node("edge-2")
	two.sh("nft -f %s && sysctl -q -w net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1", o.file("firewall.nft", hostFirewall))
	world := o.node("internet")
	o.sum = world.sh("mkdir /run/www; head -c %d /dev/urandom >/run/www/file; busybox httpd -p 8000 -h /run/www; sha256sum </run/www/file", downloaded)
	one.sh("mkdir /run/host && echo here >/run/host/file && busybox httpd -p 9000 -h /run/host")
	o.web = one.nerdctl("web", "lace.network=web").direct()
	o.www = one.nerdctl("www", "lace.network=web", "lace.publish=8080:80,53:53/udp").namesClients()
	o.served = o.www.in("head -c %d /dev/urandom >/www/file && sha256sum </www/file", downloaded)
	o.far = two.nerdctl("far", "lace.network=web", "lace.publish=8080:80").direct().namesClients()
	o.db = two.nerdctl("db", "lace.network=db", "lace.publish=5432:80").direct().namesClients()
	return o
}

// in is the same lab seen from a part of the test.
func (o *outside) in(name string, f func(o *outside)) {
	o.t.Helper()
	o.t.Run(name, func(t *testing.T) {
		c := *o
		c.bed = o.with(t)
		c.rebind(&c.web, &c.www, &c.far, &c.db)
		f(&c)
	})
}

const whoScript = `#!/bin/sh
printf 'Content-Type: text/plain\r\n\r\n%s:%s' "$REMOTE_ADDR" "$REMOTE_PORT"
`

// namesClients has the guest tell its HTTP clients their addresses, as the server on the internet does.
func (g *guest) namesClients() *guest {
	g.t.Helper()
	g.in("mkdir -p /www/cgi-bin && echo '%s' >/www/cgi-bin/index.cgi && chmod +x /www/cgi-bin/index.cgi && httpd -p 80 -h /www", strings.ReplaceAll(whoScript, "'", `'\''`))
	return g
}

// asker is somebody on a node who runs curl: a process of the node, or one in the network of a guest.
type asker struct {
	*node
	name  string
	words []string // in front of curl, or behind
	flags []string
}

func (n *node) asker() asker { return asker{node: n, name: n.host} }

// from is an asker with another of its addresses.
func (a asker) from(address string) asker {
	a.flags, a.name = []string{"--interface", address}, a.name+" as "+address
	return a
}

func (g *guest) asker() asker { return asker{node: g.node, name: g.String(), words: g.asMachine()} }

const (
	silent = "curl: (28)" // nobody answers in time
	closed = "curl: (7)"  // somebody says that there is none
)

// asks is what the server at a host and port says of its client's address, or how curl fails.
func (a asker) asks(at string) string {
	a.t.Helper()
	line := append(append(append([]string{}, a.words...), "curl", "-g", "-sS", "-m", "10"), a.flags...)
	said := a.try(append(line, "http://"+at+"/cgi-bin/index.cgi")...)
	client, err := netip.ParseAddrPort(said.out)
	if err != nil {
		return said.out + said.err
	}
	return client.Addr().Unmap().String()
}

// sees wants the server at a host and port to see its client as this address, or curl to fail in this way.
func (a asker) sees(at, want string) {
	a.t.Helper()
	if want == silent {
		a.flags = append(a.flags, "--connect-timeout", "0.5")
	}
	if got := a.asks(at); got != want && !(strings.HasPrefix(want, "curl") && strings.HasPrefix(got, want)) {
		a.t.Errorf("%s asks %s as %q, want %q", a.name, at, got, want)
	}
}

// at is a place in a URL.
func at(address string, port int) string { return net.JoinHostPort(address, fmt.Sprint(port)) }

// TestOutside looks at who meets the internet and the hosts, and whom these meet.
func TestOutside(t *testing.T) {
	o := upOutside(t)
	o.in("masqueraded", (*outside).masqueraded)
	o.in("downloads", (*outside).downloads)
	o.in("published", (*outside).published)
	o.in("published to containers", (*outside).publishedInside)
	o.in("published by UDP", (*outside).publishedUDP)
	o.in("hosts", (*outside).hosts)
	o.in("closed", (*outside).closed)
	o.in("refusals", (*outside).refusals)
	o.in("own addresses", (*outside).ownAddresses)
	o.in("without an agent", (*outside).withoutAgent)
	o.in("comes and goes", (*outside).comesAndGoes)
	o.in("nothing is left", (*outside).nothingLeft)
}

// TestUninstallClosesTheOutside compares all that the kernel tells of a node with an outside before the first agent and after the last.
func TestUninstallClosesTheOutside(t *testing.T) {
	needPrograms(t, map[string]string{"curl": "curl"})
	b := up(t, shipped(t, "internet.toml"), "--no-agent")
	n, world := b.node("edge-1"), b.node("internet").asker()
	n.sh("ping -q -c 1 -W 5 192.0.2.254; ping -q -c 1 -W 5 fd00:a::2; nerdctl run --rm --net none --pull never %s true", image)
	n.probed()
	before := n.kernelState()
	stop := n.agent()
	n.nerdctl("www", "lace.network=web", "lace.publish=8080:80").namesClients()
	world.sees("192.0.2.1:8080", "198.51.100.1")
	n.asker().sees("127.0.0.1:8080", "192.0.2.1")
	stop()
	world.sees("[fd00:a::1]:8080", "2001:db8:100::1")
	contains(t, n.kernelState(), "lc-host")
	contains(t, n.must("lace", "uninstall", "--force"), "nothing of Lace is left in the kernel")
	same(t, before, n.kernelState())
	world.sees("192.0.2.1:8080", closed)
}

// masqueraded: the internet sees the node of each container, and nothing of the office answers web.
func (o *outside) masqueraded() {
	for _, g := range []*guest{o.web, o.far} {
		for i, as := range nodeEnds[g.host].both() {
			g.asker().sees(at(o.internet.both()[i], 80), as)
			g.asker().sees(at(o.office.both()[i], 80), closed)
		}
	}
	for _, probe := range []string{"ping -n -c 2 -i 0.2 -W 5 " + o.internet.v4, "ping -n -c 2 -i 0.2 -W 5 " + o.internet.v6} {
		contains(o.t, o.web.must(o.web.asMachine(strings.Fields(probe)...)...), " 0% packet loss")
	}
	for i, hops := range [][]string{
		{o.web.gateway(false).String(), "192.0.2.254", o.internet.v4},
		{o.web.gateway(true).String(), "2001:db8:100::fe", o.internet.v6},
	} {
		o.web.asker().traces(o.internet.both()[i], hops)
	}
}

// traces wants these hops on the way to an address, by datagrams and by echo requests.
func (a asker) traces(to string, hops []string) {
	a.t.Helper()
	program := "traceroute"
	if strings.Contains(to, ":") {
		program = "traceroute6"
	}
	for _, flags := range [][]string{{}, {"-I"}} {
		line := append(append([]string{}, a.words...), "busybox", program, "-n", "-q", "1", "-w", "3", "-m", "6")
		out := a.must(append(append(line, flags...), to)...)
		var seen []string
		for _, l := range strings.Split(out, "\n")[1:] {
			seen = append(seen, strings.Fields(l)[1])
		}
		if strings.Join(seen, " ") != strings.Join(hops, " ") {
			a.t.Errorf("%s traces %s %v:\n%s\nwant %v", a.name, to, flags, out, hops)
		}
	}
}

// downloads fetches tens of megabytes by wget, curl and apt's own client, from containers of all clients.
func (o *outside) downloads() {
	task := o.node("edge-1").ctr("task", "lace.network=web")
	task.direct()
	pod := o.node("edge-2").cri(pod{name: "pod", labels: map[string]string{"lace.network": "web"}})
	for _, g := range []*guest{o.web, task, pod} {
		for _, a := range o.internet.both() {
			if got := g.in("wget -q -O - http://%s/file | sha256sum", at(a, 8000)); got != o.sum {
				o.t.Errorf("%v fetches %s from %s, want %s", g, got, a, o.sum)
			}
		}
	}
	for _, a := range o.internet.both() {
		url := "http://" + at(a, 8000) + "/file"
		got := o.web.sh("nsenter -t %s -n curl -g -sS -m 60 %s | sha256sum", o.web.pid(), url)
		if got != o.sum {
			o.t.Errorf("curl fetches %s from %s, want %s", got, a, o.sum)
		}
		o.apt(url)
	}
	task.remove()
	pod.remove()
}

// apt fetches a file as apt does, which looks at the sum itself.
func (o *outside) apt(url string) {
	const helper = "/usr/lib/apt/apt-helper"
	if _, err := os.Stat(helper); err != nil {
		o.t.Logf("there is no %s: apt's client is left out", helper)
		return
	}
	o.web.must(o.web.asMachine(helper, "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::http::Proxy=false", "download-file", url, "/run/got",
		"SHA256:"+strings.Fields(o.sum)[0])...)
	o.web.must("rm", "/run/got")
}

// published asks at ports of nodes from outside and from the hosts. The client's address is kept, but for that of localhost.
func (o *outside) published() {
	world := o.node("internet").asker()
	one, two := o.node("edge-1").asker(), o.node("edge-2").asker()
	for i := range 2 {
		edge1, edge2 := nodeEnds["edge-1"].both()[i], nodeEnds["edge-2"].both()[i]
		internet, office := o.internet.both()[i], o.office.both()[i]
		localhost := []string{"127.0.0.1", "::1"}[i]
		world.sees(at(edge1, 8080), internet)
		world.sees(at(edge2, 8080), internet)
		world.from(office).sees(at(edge2, 5432), office)
		one.sees(at(edge1, 8080), edge1)
		one.sees(at(localhost, 8080), edge1)
		one.sees(at(edge2, 8080), edge1)
		two.sees(at(edge2, 8080), edge2)
		two.sees(at(localhost, 8080), edge2)
		two.sees(at(edge1, 8080), edge2)
	}
	if got := one.asks("localhost:8080"); got != "fd00:a::1" && got != "192.0.2.1" { // whichever the host looks up first
		o.t.Errorf("edge-1 asks localhost as %q", got)
	}
	for _, a := range nodeEnds["edge-1"].both() {
		if got := world.sh("curl -g -sS -m 60 http://%s/file | sha256sum", at(a, 8080)); got != o.served {
			o.t.Errorf("the internet fetches %s from %s, want %s", got, a, o.served)
		}
	}
}

// publishedInside asks at ports of nodes from containers: as themselves where they may open flows to the other's network, on the
// same node; else as a client outside, and so does who asks itself.
func (o *outside) publishedInside() {
	for i := range 2 {
		edge1, edge2 := nodeEnds["edge-1"].both()[i], nodeEnds["edge-2"].both()[i]
		o.web.asker().sees(at(edge1, 8080), o.web.ends().both()[i])
		o.www.asker().sees(at(edge1, 8080), edge1) // itself
		o.web.asker().sees(at(edge2, 8080), edge1)
		o.far.asker().sees(at(edge2, 5432), o.far.ends().both()[i]) // by the peering of web with db
	}
}

// publishedUDP sends a datagram to a port of a node, from outside. Who is asked sees who asks, who asks gets the answer from where it asked.
func (o *outside) publishedUDP() {
	for _, asked := range nodeEnds["edge-1"].both() {
		var server *net.UDPConn
		o.www.inNetwork(func() (err error) {
			server, err = net.ListenUDP("udp", &net.UDPAddr{Port: 53})
			return err
		})
		go echoOnce(server)
		o.inInternet(func() error {
			client, err := net.Dial("udp", at(asked, 53))
			if err != nil {
				return err
			}
			defer client.Close()
			_ = client.SetDeadline(time.Now().Add(patience))
			if _, err := fmt.Fprint(client, "who am I?"); err != nil {
				return err
			}
			answer := make([]byte, 128)
			n, err := client.Read(answer)
			if want := client.LocalAddr().String(); err == nil && string(answer[:n]) != want {
				o.t.Errorf("%s says %q to %s", asked, answer[:n], want)
			}
			return err
		})
		server.Close()
	}
}

// echoOnce tells one client its address.
func echoOnce(server *net.UDPConn) {
	_ = server.SetDeadline(time.Now().Add(patience))
	n, client, err := server.ReadFromUDPAddrPort(make([]byte, 128))
	if err != nil || n == 0 {
		return // the client tells
	}
	client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
	_, _ = server.WriteToUDPAddrPort([]byte(client.String()), client)
}

// inInternet runs f in the network of the lab's internet.
func (o *outside) inInternet(f func() error) {
	o.t.Helper()
	ns, err := netns.GetFromName("lace-" + o.name + "-internet")
	if err != nil {
		o.t.Fatal(err)
	}
	defer ns.Close()
	if err := within(ns, f); err != nil {
		o.t.Errorf("on the internet: %v", err)
	}
}

// hosts reach containers of web by their addresses, on any node, and are reached by those of their own.
func (o *outside) hosts() {
	for _, host := range []string{"edge-1", "edge-2"} {
		n := o.node(host)
		for i, own := range nodeEnds[host].both() {
			n.asker().sees(at(o.www.ends().both()[i], 80), own)
			n.asker().sees(at(o.far.ends().both()[i], 80), own)
			n.must("ping", "-q", "-c", "1", "-W", "5", o.web.ends().both()[i])
			n.must("ping", "-q", "-c", "1", "-W", "5", o.far.ends().both()[i])
			n.asker().sees(at(o.db.ends().both()[i], 80), closed)
		}
	}
	for _, a := range nodeEnds["edge-1"].both() {
		contains(o.t, o.web.in("timeout 10 wget -q -O - http://%s/file", at(a, 9000)), "here")
		contains(o.t, o.far.in("timeout 10 wget -q -O - http://%s/file", at(a, 9000)), "here") // as any other of the internet
	}
}

// closed: db reaches nothing outside, and what no peering opens does not answer, published or not.
func (o *outside) closed() {
	world, db := o.node("internet").asker(), o.db.asker()
	for i := range 2 {
		edge1, edge2 := nodeEnds["edge-1"].both()[i], nodeEnds["edge-2"].both()[i]
		for _, a := range []string{at(o.internet.both()[i], 80), at(edge2, 8080), at(edge1, 8080), at(o.web.ends().both()[i], 80)} {
			db.sees(a, closed)
		}
		world.sees(at(edge2, 5432), silent)
		world.from(o.office.both()[i]).sees(at(edge1, 8080), silent)
	}
	o.node("edge-1").asker().sees("192.0.2.2:5432", silent)
	o.node("edge-2").asker().sees("192.0.2.2:5432", closed)
	o.node("edge-2").asker().sees("localhost:5432", closed)
}

// refusals has each client print why a port cannot be published.
func (o *outside) refusals() {
	n := o.node("edge-1")
	n.sh("busybox httpd -p 192.0.2.1:9090 -h /run/host")
	const form = `write [ADDRESS:]PORT[-PORT]:PORT[-PORT][/tcp|/udp], as in 8080:80 or [2001:db8::1]:53:5353/udp`
	taken := fmt.Sprintf("container default/%s (www) has it on this node: choose another port, or another address of the node", o.www.id)
	const process = "a process of this host has it: choose another port, or stop that (ss -lntup shows it)"
	refusedByAll(n, []string{"lace.network=web", "lace.publish=8080:81"}, "publish port 0.0.0.0:8080/tcp: "+taken)
	refusedByAll(n, []string{"lace.network=web", "lace.publish=9000:80"}, "publish port 0.0.0.0:9000/tcp: "+process)
	for publish, want := range map[string]string{
		"192.0.2.1:8080:81":           "publish port 192.0.2.1:8080/tcp: " + taken,
		"[fd00:a::1]:50-60:50-60/udp": "publish port [fd00:a::1]:53/udp: " + taken,
		"9090:80":                     "publish port 0.0.0.0:9090/tcp: " + process,
		"8080":                        `lace: lace.publish = "8080": names one port; write the node's and the container's, as in "8080:8080"`,
		"web:80":                      `lace: lace.publish = "web:80": has "web" where a port of the node belongs, which is a number from 1 to 65535`,
		"81:80/sctp":                  `lace: lace.publish = "81:80/sctp": has the protocol "sctp"; ports of tcp and udp can be published`,
		"x":                           `lace: lace.publish = "x": is no published port; ` + form,
	} {
		n.refused(want, nerdctlRun(labels("lace.network=web", "lace.publish="+publish), "--rm", image, "true")...)
	}
	n.refused(`lace: "lace.publish" is set, but lace.network is not: name the network that the container is to join`,
		nerdctlRun(labels("lace.publish=81:80"), "--rm", image, "true")...)
	n.nerdctl("elsewhere", "lace.network=web", "lace.publish=[fd00:a::1]:9090:80").remove() // at an address that the process has not
}

// ownAddresses has the fabric route the networks of containers to one node, which carries what is for the other's.
func (o *outside) ownAddresses() {
	router := func(words ...string) {
		o.t.Helper()
		if out, err := exec.Command("ip", append([]string{"-n", "lace-" + o.name + ".fabric", "route"}, words...)...).CombinedOutput(); err != nil {
			o.t.Fatalf("ip route %v in the fabric: %v\n%s", words, err, out)
		}
	}
	for _, r := range [][2]string{{"10.41.0.0/16", "192.0.2.1"}, {"fd41::/48", "fd00:a::1"}, {"10.42.0.0/16", "192.0.2.1"}, {"fd42::/48", "fd00:a::1"}} {
		router("add", r[0], "via", r[1])
		defer router("del", r[0])
	}
	world := o.node("internet").asker()
	for i := range 2 {
		internet, office := o.internet.both()[i], o.office.both()[i]
		for _, g := range []*guest{o.www, o.far} {
			world.sees(at(g.ends().both()[i], 80), internet)
			world.from(office).sees(at(g.ends().both()[i], 80), silent)
			world.traces(g.ends().both()[i], []string{[]string{"198.51.100.254", "2001:db8:100::fe"}[i], nodeEnds["edge-1"].both()[i], g.ends().both()[i]})
		}
		world.from(office).sees(at(o.db.ends().both()[i], 80), office)
		world.sees(at(o.db.ends().both()[i], 80), silent)
	}
}

// slowly is a line of shell that takes six seconds and more to fetch the file of a server, of which buffers hold a part only. It prints its sum.
func slowly(at string) string {
	return fmt.Sprintf(`curl -g -sS -m 120 http://%s/file | {
		i=0; while [ $i -lt 64 ]; do dd bs=%d count=1 iflag=fullblock status=none; sleep 0.1; i=$((i+1)); done; } | sha256sum`, at, downloaded/64)
}

// withoutAgent kills the agent of edge-1 under two downloads, one out and one in, and looks at what is open then and when it is back.
func (o *outside) withoutAgent() {
	n, world := o.node("edge-1"), o.node("internet")
	out, in := make(chan string, 1), make(chan string, 1)
	pid := o.web.pid()
	go func() { out <- n.try("sh", "-c", "nsenter -t "+pid+" -n "+slowly("["+o.internet.v6+"]:8000")).out }()
	go func() { in <- world.try("sh", "-c", slowly("192.0.2.1:8080")).out }()
	n.eventually("both downloads are on their way", func() error {
		if c := n.count("--state", "established"); c.Flows < 2 {
			return fmt.Errorf("%d flows are established", c.Flows)
		}
		return nil
	})
	n.killAgent()
	if len(out)+len(in) > 0 {
		o.t.Error("a download was over before the agent was")
	}
	world.asker().sees("192.0.2.1:8080", o.internet.v4)
	n.asker().sees("[::1]:8080", "fd00:a::1")
	o.web.asker().sees(at(o.internet.v4, 80), "192.0.2.1")
	n.start()
	world.asker().sees("[fd00:a::1]:8080", o.internet.v6)
	n.asker().sees("127.0.0.1:8080", "192.0.2.1")
	o.web.asker().sees(at(o.internet.v6, 80), "fd00:a::1")
	n.refused("(www) has it on this node", nerdctlRun(labels("lace.network=web", "lace.publish=8080:80"), "--rm", image, "true")...)
	if got := <-out; got != o.sum {
		o.t.Errorf("web fetched %q while the agent was away, want %s", got, o.sum)
	}
	if got := <-in; got != o.served {
		o.t.Errorf("the internet fetched %q while the agent was away, want %s", got, o.served)
	}
}

// comesAndGoes stops the container that publishes, and starts it again.
func (o *outside) comesAndGoes() {
	n, world := o.node("edge-1"), o.node("internet").asker()
	world.sees("192.0.2.1:8080", o.internet.v4)
	n.must("nerdctl", "stop", "-t", "1", "www")
	for _, a := range nodeEnds["edge-1"].both() {
		world.sees(at(a, 8080), closed)
		n.asker().sees(at(a, 8080), closed)
		o.web.asker().sees(at(a, 8080), closed)
	}
	n.asker().sees("localhost:8080", closed)
	if got := strings.Fields(n.sh("cat /proc/sys/net/ipv4/conf/lo/route_localnet /proc/sys/net/ipv4/conf/lo/accept_local")); strings.Join(got, " ") != "0 0" {
		o.t.Errorf("route_localnet and accept_local of lo are %v while nothing is published", got)
	}
	n.must("nerdctl", "start", "www")
	o.www.again().direct().in("httpd -p 80 -h /www")
	for i, a := range nodeEnds["edge-1"].both() {
		world.sees(at(a, 8080), o.internet.both()[i])
		n.asker().sees(at(a, 8080), a)
	}
}

// nothingLeft takes all containers away, and with them go their ports and flows.
func (o *outside) nothingLeft() {
	for _, g := range []*guest{o.web, o.www, o.far, o.db} {
		g.remove()
	}
	for _, n := range []*node{o.node("edge-1"), o.node("edge-2")} {
		n.eventuallyEmpty()
		absent(o.t, n.agentLog(), "level=ERROR")
	}
	o.node("internet").asker().sees("192.0.2.1:8080", closed)
	o.node("edge-2").asker().sees("localhost:8080", closed)
}
