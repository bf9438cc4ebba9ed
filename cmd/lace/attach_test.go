// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/cmd/lace/control"
)

// run runs a command in the node's namespace, with its settings; the error is its own.
func (n *edge) run(command func(context.Context, *env, []string) error, args string) (string, error) {
	n.t.Helper()
	var out bytes.Buffer
	var err error
	n.in(func() error {
		err = command(n.t.Context(), &env{stdout: &out}, append([]string{"--config", n.path("lace.toml")}, strings.Fields(args)...))
		return nil
	})
	return out.String(), err
}

// TestAttachADevice: a running agent puts a device into a network, says what belongs behind it, and gives it back.
func TestAttachADevice(t *testing.T) {
	n := newEdge(t, segments)
	n.start()
	n.in(func() error { return makePair("vm0", "vm0far") })
	out, err := n.run(runAttach, "--netdev vm0 --network storage --name nas-1")
	want := "interface  vm0, in network storage\nname       nas-1\nMAC        52:54:00:00:00:01\naddress    10.50.0.200/24\n" +
		"gateway    10.50.0.1\ngateway    fd50::1\nMTU        1442\n"
	if err != nil || out != want {
		t.Errorf("%v\ngot  %swant %s", err, out, want)
	}
	out, err = n.run(runAttach, "--netdev vm0 --network storage --mac 52:54:00:00:00:01 --json") // again, by its MAC address
	var j control.Joined
	if err == nil {
		err = json.Unmarshal([]byte(out), &j)
	}
	if err != nil || j.Interface != "vm0" || j.Network != "storage" || len(j.Addresses) != 1 || j.MTU != 1442 || j.MAC.String() != "52:54:00:00:00:01" {
		t.Errorf("%v, %s", err, out)
	}
	if !n.enslaved("vm0") {
		t.Error("the device is on no bridge")
	}
	for args, want := range map[string]string{
		"--netdev vm0 --network web":                                             "network web is routed (l3): devices of the host can join L2 networks only",
		"--netdev vm9 --network storage":                                         "take device vm9 into network storage: there is no such interface",
		"--netdev vm0far --network storage --name nas-1 --mac 52:54:00:00:00:09": "endpoint nas-1 has MAC address 52:54:00:00:00:01 in the topology",
		"--netdev vm0far --network storage --ip 10.50.0.34":                      "10.50.0.34 is outside",
		"--netdev vm0far --network store":                                        `network "store" is not in the topology`,
	} {
		if out, err := n.run(runAttach, args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("attach %s: %v, want %q; %s", args, err, want, out)
		}
	}
	for range 2 {
		if out, err := n.run(runDetach, "--netdev vm0"); err != nil || out != "vm0 is in no network of Lace\n" {
			t.Errorf("%q, %v", out, err)
		}
		if n.enslaved("vm0") {
			t.Error("the device is on a bridge still")
		}
	}
	if out, err := n.run(runAttach, "--netdev vm0 --network quiet --ip fd60::1:9"); err != nil || !strings.Contains(out, "MAC        02:4c:00:01:00:09\naddress    fd60::1:9/64\nMTU        1442\n") {
		t.Errorf("%v\n%s", err, out)
	}
}

// enslaved says whether a link has a master.
func (n *edge) enslaved(link string) (is bool) {
	n.t.Helper()
	n.in(func() error {
		l, err := netlink.LinkByName(link)
		is = err == nil && l.Attrs().MasterIndex != 0
		return err
	})
	return is
}

func TestAttachRefusesWhatMakesNoSense(t *testing.T) {
	for args, want := range map[string]string{
		"attach":               "--netdev and --network are wanted",
		"attach --netdev tap0": "--netdev and --network are wanted",
		"attach --netdev tap0 --network a --ip x":   `"x" is no address`,
		"attach --netdev tap0 --network a --mac 02": "is no Ethernet address",
		"attach --netdev tap0 --network a b":        `unexpected argument "b"`,
		"detach":                                    "--netdev is wanted",
		"detach --netdev tap0 --network a":          "not defined",
	} {
		words := strings.Fields(args)
		run := runAttach
		if words[0] == "detach" {
			run = runDetach
		}
		var usage *usageError
		if err := run(t.Context(), hostEnv(), words[1:]); !errors.As(err, &usage) || !strings.Contains(usage.problem, want) {
			t.Errorf("lace %s: got %v, want %q", args, err, want)
		}
	}
}

func TestAttachWithoutAnAgent(t *testing.T) {
	file := writeFile(t, "lace.toml", "hook-socket = \""+t.TempDir()+"/lace.sock\"\n")
	for name, err := range map[string]error{
		"attach": runAttach(t.Context(), hostEnv(), []string{"--config", file, "--netdev", "tap0", "--network", "storage"}),
		"detach": runDetach(t.Context(), hostEnv(), []string{"--config", file, "--netdev", "tap0"}),
	} {
		if !errors.Is(err, control.ErrNoAgent) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAddressesAreAList(t *testing.T) {
	var d control.Device
	must(t, readIPs(&d.IPs)("10.50.0.9, fd50::9"))
	if !reflect.DeepEqual(d.IPs, addresses("10.50.0.9", "fd50::9")) {
		t.Errorf("got %v", d.IPs)
	}
}
