// SPDX-License-Identifier: Apache-2.0

// Package lab makes the hosts of a topology file on one machine, each in namespaces of its own with
// its own containerd and agent, joined by an IPv6 underlay.
//
// Everything a lab makes is found again by the lab's name alone: its processes live in PID
// namespaces whose first processes are recorded, its network namespaces are called lace-NAME-NODE and
// lace-NAME.fabric, its files lie in /run/lace-lab/NAME and its cgroups in lace-lab/NAME. So Down works
// after a crash at any point.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/lace-net/lace/topology"
)

const (
	stateRoot   = "/run/lace-lab" // one directory a lab, mode 0700
	netnsRoot   = "/run/netns"    // where the ip tool keeps names
	DefaultName = "lab"
	DefaultMTU  = 1500
	minMTU      = 1280 + 64 // IPv6's own least (RFC 8200, section 5) inside the longest encapsulation
	maxMTU      = 65535
)

// Options say what Up makes.
type Options struct {
	Name     string             // of the lab: letters, digits and underscores, at most 16
	Topology *topology.Topology // its nodes of kind host are made
	File     []byte             // the topology file, handed to each node
	Routed   bool               // a router between the nodes, instead of one link
	MTU      int                // of the underlay, in bytes
	Self     string             // path of the lace program, for what the lab itself runs in the nodes
	Stack    *Stack             // containerd and its clients; nil: none
	Agent    []string           // command line of the agent, run in each node; nil: none
	Path     []string           // directories in front of a node's PATH
	Log      io.Writer          // one line a step
}

// A name is part of names of namespaces and cgroups. Without a dash in it, no name of a lab and a
// node together can be read in two ways.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9_]{1,16}$`)

// CheckName refuses names that a lab cannot have.
func CheckName(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("lab name %q: must be 1 to 16 letters, digits or underscores", name)
	}
	return nil
}

func netnsName(lab, node string) string { return "lace-" + lab + "-" + node }
func fabricName(lab string) string      { return "lace-" + lab + ".fabric" }

func (o *Options) logf(format string, args ...any) { fmt.Fprintf(o.Log, format+"\n", args...) }

// check refuses what could not work, before anything is made.
func (o *Options) check() error {
	if os.Geteuid() != 0 {
		return errors.New("a lab needs root: it makes network and mount namespaces")
	}
	if err := CheckName(o.Name); err != nil {
		return err
	}
	if o.MTU < minMTU || o.MTU > maxMTU {
		return fmt.Errorf("mtu %d: must be between %d and %d", o.MTU, minMTU, maxMTU)
	}
	return errors.Join(checkFabric(hosts(o.Topology), o.Routed), checkInternet(o.Topology))
}

// hosts are the nodes that run an agent; foreign routers are not the lab's to make.
func hosts(t *topology.Topology) []*topology.Node {
	var found []*topology.Node
	for _, n := range t.Nodes {
		if n.Kind == topology.KindHost {
			found = append(found, n)
		}
	}
	return found
}

// Up makes the lab and returns when every node is ready, its containerd and its agent too. If
// anything fails, all that was made is taken down again.
func Up(ctx context.Context, o Options) error {
	if err := o.check(); err != nil {
		return err
	}
	lock, err := createState(o.Name)
	if err != nil {
		return err
	}
	defer lock.Close()
	err = build(ctx, &o)
	if err == nil {
		return nil
	}
	if downErr := takeDown(o.Name, o.Log); downErr != nil {
		return fmt.Errorf("%w; and taking the lab down failed: %v", err, downErr)
	}
	return err
}

func build(ctx context.Context, o *Options) error {
	began := time.Now()
	nodes := withInternet(o.Topology, hosts(o.Topology))
	cgroups, err := labCgroups(o.Name)
	if err != nil {
		return err
	}
	if err := writeRecord(o, nodes, cgroups); err != nil {
		return err
	}
	inits, err := startNodes(o, nodes)
	if err != nil {
		return err
	}
	defer closeAll(inits)
	if err := connect(o, inits); err != nil {
		return err
	}
	err = eachNode(inits, func(n *nodeInit) error { return n.bringUp(ctx, o, cgroups) })
	if err != nil {
		return err
	}
	if hasOutside(o.Topology) {
		o.logf("%s: a web server at %s tells its clients their addresses", internetName, serverAddresses)
	}
	o.logf("lab %q is up: %s (%.1f s)", o.Name, nodeNames(nodes), time.Since(began).Seconds())
	return nil
}

func nodeNames(nodes []*topology.Node) string {
	var names []string
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	return strings.Join(names, ", ")
}

// Down ends the lab's processes and removes all that it made. A lab that is not there, wholly or in
// part, is no error: found says whether there was anything of it.
func Down(name string, log io.Writer) (found bool, err error) {
	if err := CheckName(name); err != nil {
		return false, err
	}
	if os.Geteuid() != 0 {
		return false, errors.New("taking a lab down needs root")
	}
	lock, err := lockState(name)
	if errors.Is(err, os.ErrNotExist) {
		found = len(netnsOf(name)) > 0
		return found, takeDown(name, log)
	}
	if err != nil {
		return true, err
	}
	defer lock.Close()
	return true, takeDown(name, log)
}

// takeDown goes on where a step fails, and says at the end what is left.
func takeDown(name string, log io.Writer) error {
	// The record goes last: it knows what else there is.
	record, recordErr := readRecord(name)
	if recordErr != nil && !errors.Is(recordErr, os.ErrNotExist) {
		fmt.Fprintf(log, "going on without the lab's record: %v\n", recordErr)
	}
	errs := []error{endNodes(name), removeNetns(name), removeCgroups(name, record.Cgroups)}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("take down lab %q: %w; `lace lab down` can be repeated", name, err)
	}
	return removeState(name)
}

// removeNetns takes the names away. With its last process gone, a namespace goes with its name, and
// the interfaces go with it.
func removeNetns(lab string) error {
	var errs []error
	for _, name := range netnsOf(lab) {
		errs = append(errs, unmountAndRemove(filepath.Join(netnsRoot, name)))
	}
	return errors.Join(errs...)
}

// netnsOf lists the names in /run/netns that are the lab's.
func netnsOf(lab string) []string {
	entries, err := os.ReadDir(netnsRoot)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), netnsName(lab, "")) || e.Name() == fabricName(lab) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names
}
