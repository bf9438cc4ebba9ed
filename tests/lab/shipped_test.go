// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// upShipped brings a lab of conf/lab up as a user does, with all its programs.
func upShipped(t *testing.T, name, file string, flags ...string) {
	t.Helper()
	needTools(t)
	t.Cleanup(func() {
		if output, err := runLace("lab", "down", "--name", name); err != nil {
			t.Errorf("clean up: %v\n%s", err, output)
		}
	})
	mustRun(t, append([]string{"lab", "up", file, "--name", name}, flags...)...)
}

func TestShippedLabsComeUp(t *testing.T) {
	needTools(t)
	files := glob("../../conf/lab/*.toml")
	if len(files) < 5 {
		t.Errorf("conf/lab has %q only", files)
	}
	for i, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			name := labName("s" + string(rune('a'+i)))
			var flags []string
			if filepath.Base(file) == "three-racks.toml" {
				flags = []string{"--routed"}
			}
			upShipped(t, name, file, flags...)
			if output := mustRun(t, "lab", "status", "--name", name); strings.Contains(output, "ended") || strings.Count(output, " up ") < 2 {
				t.Errorf("status: %s", output)
			}
			if got := in(t, name, "edge-1", "lace status"); !strings.Contains(got, "agent     running") || strings.Contains(got, "PROBLEM") {
				t.Errorf("edge-1: %s", got)
			}
		})
	}
}

// TestMixedLab types what docs/lab.md shows of an Ethernet segment.
func TestMixedLab(t *testing.T) {
	name := labName("t")
	upShipped(t, name, "../../conf/lab/mixed.toml")
	types(t, name,
		"edge-1 nerdctl run -d --net none --label lace.network=storage --name disk-1 "+image+" sleep 1d",
		"edge-2 nerdctl run -d --net none --label lace.network=storage --name disk-2 "+image+" sleep 1d",
		"edge-3 nerdctl run -d --net none --label lace.network=web,storage --name front "+image+" sleep 1d",
		"edge-1 ip netns add vm",
		"edge-1 ip link add tap0 type veth peer name eth0 address 52:54:00:00:00:01 netns vm",
		"edge-1 ip -n vm link set eth0 up",
		"edge-1 lace attach --netdev tap0 --network storage --name nas-1",
		"edge-1 ip -n vm addr add 10.50.0.200/24 dev eth0",
		"edge-2 nerdctl exec disk-2 ping -c 1 -W 5 10.50.0.30",
		"edge-2 nerdctl exec disk-2 ping -c 1 -W 5 10.50.0.200",
		"edge-3 nerdctl exec front ping -c 1 -W 5 10.50.0.200")
	shows(t, name, [][2]string{
		{"edge-3 nerdctl exec front ip -o -4 addr", "3: eth1 inet 10.50.0.56/24 "},
		{"edge-2 nerdctl exec disk-2 ip neigh", "10.50.0.30 dev eth0 lladdr 02:4c:0a:32:00:1e "},
		{"edge-2 lace fdb", "storage 52:54:00:00:00:01 endpoint - nas-1 at edge-1"},
		{"edge-1 lace status", "nas-1 storage device 10.50.0.200 "},
		{"edge-1 lace explain --from disk-1 --to ff:ff:ff:ff:ff:ff", "copies to 1 port (nas-1 (device/tap0)) and 2 nodes (edge-2, edge-3)"},
		{"edge-1 lace detach --netdev tap0", "tap0 is in no network of Lace"},
		{"edge-1 ip -o link show tap0", "tap0@"},
	})
	mustRun(t, "lab", "down", "--name", name) // with its containers and its machine
	wantNothing(t, name)
}

// types runs lines, each of a node and a command for it, which have to succeed.
func types(t *testing.T, name string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		node, command, _ := strings.Cut(line, " ")
		in(t, name, node, command)
	}
}

// shows runs lines, each of a node and a command, and wants a text in what they print. How many blanks there are does not count.
func shows(t *testing.T, name string, lines [][2]string) {
	t.Helper()
	for _, l := range lines {
		node, command, _ := strings.Cut(l[0], " ")
		if got := in(t, name, node, command); !strings.Contains(strings.Join(strings.Fields(got), " "), l[1]) {
			t.Errorf("%s: want %q in\n%s", l[0], l[1], got)
		}
	}
}

// TestInternetLab types what docs/lab.md shows of the internet.
func TestInternetLab(t *testing.T) {
	needCurl(t)
	name := labName("w")
	upShipped(t, name, "../../conf/lab/internet.toml")
	types(t, name,
		"edge-1 nerdctl run -d --net none --label lace.network=web --name front "+image+" sleep 1d",
		"edge-2 nerdctl run -d --net none --label lace.network=web --label lace.publish=8080:80 --name shop "+image+" httpd -f -h /www",
		"edge-2 nerdctl run -d --net none --label lace.network=db --label lace.publish=5432:80 --name store "+image+" httpd -f -h /www")
	shows(t, name, [][2]string{
		{"edge-1 nerdctl exec front wget -q -O - http://198.51.100.1/", "192.0.2.1:"},
		{"edge-1 nerdctl exec front wget -q -O - http://203.0.113.1/ 2>&1 || :", "No route to host"},
		{"edge-1 nerdctl exec front traceroute -n -q 1 198.51.100.1", "2 192.0.2.254 "},
		{"internet curl -s -m 10 http://192.0.2.2:8080/", "lace.test/busybox"},
		{"edge-2 curl -s -m 10 http://localhost:8080/", "lace.test/busybox"},
		{"edge-1 curl -s -m 10 http://10.41.2.157/", "lace.test/busybox"},
		{"internet curl -sS -m 1 http://192.0.2.2:5432/ 2>&1 || :", "curl: (28) "},
		{"internet curl -s -m 10 --interface 203.0.113.1 http://192.0.2.2:5432/", "lace.test/busybox"},
		{"edge-2 lace conntrack", "internet > shop (web) published 8080 > shop:80 "},
	})
	fabric := exec.Command("ip", "-n", "lace-"+name+".fabric", "route", "add", "10.41.0.0/16", "via", "192.0.2.1")
	if output, err := fabric.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	shows(t, name, [][2]string{{"internet busybox traceroute -n -q 1 10.41.2.157", "1 198.51.100.254 "}, {"internet busybox traceroute -n -q 1 10.41.2.157", "3 10.41.2.157 "}})
	mustRun(t, "lab", "down", "--name", name) // with its containers
	wantNothing(t, name)
}
