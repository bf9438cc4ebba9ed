// SPDX-License-Identifier: Apache-2.0

package control

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"

	"github.com/lace-net/lace/dataplane/plan"
)

// Device is a device of the host, and what it is to be in an L2 network. A request to take one out has its name alone.
type Device struct {
	Device  string       `json:"device"` // its name
	Network string       `json:"network,omitempty"`
	Name    string       `json:"name,omitempty"` // of what is behind it, or of the endpoint that it is
	IPs     []netip.Addr `json:"ips,omitempty"`  // at most one a family; empty: the endpoint's, else chosen by the agent
	MAC     plan.MAC     `json:"mac,omitzero"`   // zero: the endpoint's, else derived
}

// Joined is how a device is in its network: what is behind it has to be configured with that.
type Joined struct {
	Interface string         `json:"interface"` // the device
	Network   string         `json:"network"`
	Name      string         `json:"name,omitempty"`
	Addresses []netip.Prefix `json:"addresses"` // with the length of the subnet
	Gateways  []netip.Addr   `json:"gateways"`  // none where the network declares none
	MAC       plan.MAC       `json:"mac"`
	MTU       int            `json:"mtu"`      // largest packet; of the agent's answer that of the device, of the command's also what the underlay takes
	Overhead  int            `json:"overhead"` // bytes that a packet grows by on the underlay
}

const (
	maxDevice  = 15  // bytes; IFNAMSIZ of the kernel, less the zero behind it
	maxName    = 253 // bytes, as of a container
	maxNetwork = 63
)

// nameForm is that of containers, networks and endpoints.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// deviceForm takes what the kernel takes, but for what no terminal shows.
var deviceForm = regexp.MustCompile(`^[!-.0-9;-~]+$`)

// check refuses what the data plane would not understand. What it says of addresses and networks is its own affair.
func (d *Device) check(do string) error {
	switch {
	case d == nil:
		return fmt.Errorf("request to %s names no device", do)
	case len(d.Device) > maxDevice || !deviceForm.MatchString(d.Device) || d.Device == "." || d.Device == "..":
		return fmt.Errorf("%.40q is no name of an interface: it has 1 to %d characters, without space, slash and colon", d.Device, maxDevice)
	case do == Detach:
		return nil
	case len(d.Network) > maxNetwork || !nameForm.MatchString(d.Network):
		return fmt.Errorf("%.80q is no network name: one has letters, digits, '.', '_' and '-'", d.Network)
	case d.Name != "" && (len(d.Name) > maxName || !nameForm.MatchString(d.Name)):
		return fmt.Errorf("%.80q is no name: one has at most %d letters, digits, '.', '_' and '-'", d.Name, maxName)
	}
	return d.checkIPs()
}

func (d *Device) checkIPs() error {
	families := map[bool]bool{}
	for _, a := range d.IPs {
		if !a.IsValid() || a.Zone() != "" || a.Is4In6() {
			return fmt.Errorf("%q is no address of a network: write one of IPv4 or IPv6, without zone", a)
		}
		if families[a.Is4()] {
			return errors.New("a device has at most one address of each family")
		}
		families[a.Is4()] = true
	}
	return nil
}
