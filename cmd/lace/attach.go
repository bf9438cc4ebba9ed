// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/lace-net/lace/cmd/lace/control"
	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
)

const attachArgs = "[--config FILE] [--json] --netdev NAME --network NAME [--name NAME] [--ip ADDRESS[,ADDRESS]] [--mac MAC]"

// deviceFlags puts a device on the command line. The result is the settings file.
func deviceFlags(flags *flag.FlagSet, d *control.Device) *string {
	flags.StringVar(&d.Device, "netdev", "", "`name` of the device on this host: the tap of a virtual machine, or an end of a veth")
	return flags.String("config", conf.DefaultFile, "settings `FILE`")
}

func runAttach(ctx context.Context, e *env, args []string) error {
	var d control.Device
	flags := newFlags("attach")
	file := deviceFlags(flags, &d)
	asJSON := flags.Bool("json", false, "print JSON")
	flags.StringVar(&d.Network, "network", "", "L2 `network` that it joins")
	flags.StringVar(&d.Name, "name", "", "`name` of what is behind it; that of an [endpoint.NAME] of the topology to be that")
	flags.Func("ip", "`address` of what is behind it, or one of each family with a comma between (default: the endpoint's, else chosen)", readIPs(&d.IPs))
	flags.TextVar(&d.MAC, "mac", plan.MAC{}, "`MAC` of what is behind it (default: the endpoint's, else derived from the address)")
	if err := parseFlags(flags, args, 0); err != nil {
		return err
	}
	if d.Device == "" || d.Network == "" {
		return usagef(flags, "--netdev and --network are wanted")
	}
	socket, err := controlSocket("attach", *file)
	if err != nil {
		return err
	}
	now, err := askAgent(ctx, socket, control.Request{Do: control.Attach, Device: &d}, waitDeadline)
	if err != nil {
		return err
	}
	if err := fitUnderlay(ctx, socket, now.Joined); err != nil {
		return err
	}
	if *asJSON {
		return printJSON(e.stdout, now.Joined)
	}
	return printJoined(e.stdout, now.Joined)
}

func runDetach(ctx context.Context, e *env, args []string) error {
	var d control.Device
	flags := newFlags("detach")
	file := deviceFlags(flags, &d)
	if err := parseFlags(flags, args, 0); err != nil {
		return err
	}
	if d.Device == "" {
		return usagef(flags, "--netdev is wanted")
	}
	socket, err := controlSocket("detach", *file)
	if err != nil {
		return err
	}
	if _, err := askAgent(ctx, socket, control.Request{Do: control.Detach, Device: &d}, waitDeadline); err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stdout, "%s is in no network of Lace\n", d.Device)
	return err
}

// readIPs reads a list of addresses.
func readIPs(into *[]netip.Addr) func(string) error {
	return func(text string) error {
		for word := range strings.SplitSeq(text, ",") {
			a, err := netip.ParseAddr(strings.TrimSpace(word))
			if err != nil {
				return fmt.Errorf("%.60q is no address", word)
			}
			*into = append(*into, a)
		}
		return nil
	}
}

func controlSocket(command, file string) (string, error) {
	s, err := agentSettings(command, []string{"--config", file})
	return s.ControlSocket(), err
}

// askAgent asks and waits for so long. What the agent refuses is an error too.
func askAgent(ctx context.Context, socket string, r control.Request, wait time.Duration) (*control.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	now, err := control.Ask(ctx, socket, r)
	if err == nil {
		err = now.Refusal()
	}
	return now, err
}

// fitUnderlay makes the MTU what the underlay takes too: the device keeps its own, which may be larger.
func fitUnderlay(ctx context.Context, socket string, j *control.Joined) error {
	now, err := askAgent(ctx, socket, control.Request{Do: control.Plan}, lookDeadline)
	if err != nil {
		return fmt.Errorf("%s is attached, but its MTU is not known: %w", j.Interface, err)
	}
	dev, err := netdev.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer dev.Close()
	uplinks, err := dev.Uplinks(now.Plan)
	for _, u := range uplinks {
		if !u.Missing {
			j.MTU = min(j.MTU, u.MTU-j.Overhead)
		}
	}
	return err
}

func printJoined(out io.Writer, j *control.Joined) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "interface\t%s, in network %s\n", j.Interface, j.Network)
	if j.Name != "" {
		fmt.Fprintf(w, "name\t%s\n", j.Name)
	}
	fmt.Fprintf(w, "MAC\t%s\n", j.MAC)
	for _, a := range j.Addresses {
		fmt.Fprintf(w, "address\t%s\n", a)
	}
	for _, g := range j.Gateways {
		fmt.Fprintf(w, "gateway\t%s\n", g)
	}
	fmt.Fprintf(w, "MTU\t%d\n", j.MTU)
	return w.Flush()
}

// The agent's side.

func attachDevice(ctx context.Context, p devices, d control.Device) control.Answer {
	ctx, cancel := context.WithTimeout(ctx, applyDeadline) // it may be in the middle of a reload
	defer cancel()
	port, err := p.AttachDevice(ctx, dataplane.DeviceRequest{Device: d.Device, Network: d.Network, Name: d.Name, IPs: d.IPs, MAC: d.MAC})
	if err != nil {
		return control.Refuse(err)
	}
	return control.Answer{Joined: joined(port)}
}

func detachDevice(ctx context.Context, p devices, device string) control.Answer {
	if err := p.DetachDevice(ctx, device); err != nil {
		return control.Refuse(err)
	}
	return control.Answer{}
}

func joined(p dataplane.Port) *control.Joined {
	j := &control.Joined{Interface: p.HostIf, Network: p.Network, Name: p.Name, Addresses: p.Prefixes, Gateways: []netip.Addr{},
		MAC: p.MAC, MTU: p.MTU, Overhead: p.Overhead}
	for _, g := range []netip.Addr{p.Gateway4, p.Gateway6} {
		if g.IsValid() {
			j.Gateways = append(j.Gateways, g)
		}
	}
	return j
}
