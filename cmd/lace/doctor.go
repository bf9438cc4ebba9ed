// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/safchain/ethtool"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// finding is one line of the doctor's report.
type finding struct {
	what string
	ok   bool
	text string
}

var errUnwell = errors.New("something above is missing")

// runDoctor says what this kernel and host have and lack, and what brings what is missing.
func runDoctor(_ context.Context, e *env, args []string) error {
	flags := newFlags("doctor")
	file := flags.String("config", conf.DefaultFile, "settings `FILE`")
	if err := parseFlags(flags, args, 0); err != nil {
		return err
	}
	s, err := agentSettings("doctor", []string{"--config", *file})
	if err != nil {
		return err
	}
	well := true
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	for _, f := range slices.Concat(kernelFindings(s), hostFindings(e, s), outsideFindings(e, s)) {
		mark := "ok"
		if !f.ok {
			mark, well = "MISSING", false
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", f.what, mark, strings.ReplaceAll(f.text, "\n", "\n\t\t"))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if !well {
		return errUnwell
	}
	return nil
}

func kernelFindings(s conf.Settings) []finding {
	var u unix.Utsname
	release := "unknown"
	if err := unix.Uname(&u); err == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	f, err := dataplane.Probe(filepath.Dir(s.BPFFS), slog.New(slog.DiscardHandler))
	if err != nil {
		return []finding{{"kernel " + release, false, err.Error()}}
	}
	return []finding{
		{"kernel " + release, true, "loads the programs"},
		{"VRF", true, choose(f.VRF, "one VRF a network holds the gateway", "not in this kernel (CONFIG_NET_VRF): bridges without addresses, the programs answer for gateways")},
		{"TCX", true, choose(f.TCX, "programs are attached by pinned links", "not in this kernel (6.6 brings it): clsact filters instead")},
		{"decapsulation flags", true, choose(f.DecapByFlags, "adjust_room takes inner packets out", "not in this kernel (6.3 brings them): change_proto instead")},
	}
}

func choose(ok bool, yes, no string) string {
	if ok {
		return yes
	}
	return no
}

func hostFindings(e *env, s conf.Settings) []finding {
	return []finding{
		topologyFinding(e, s),
		segmenterFinding(e, s),
		socketFinding("containerd", s.Containerd, "start containerd, or name its socket: containerd = \"…\" in "+conf.DefaultFile),
		nriFinding(s),
		agentFinding(s),
		wrapperFinding(wrapper),
	}
}

func topologyFinding(e *env, s conf.Settings) finding {
	t, err := topology.Load(s.Topology)
	if err != nil {
		return finding{"topology", false, err.Error()}
	}
	name, err := nodeName(e, s.Node)
	if err != nil {
		return finding{"topology", false, err.Error()}
	}
	if _, ok := t.Node(name); !ok {
		return finding{"topology", false, fmt.Sprintf("%s names no node %q: add it, or say which one this is with node = \"…\" in %s", s.Topology, name, conf.DefaultFile)}
	}
	return finding{"topology", true, fmt.Sprintf("%s, hash %s, this is node %s", s.Topology, t.Hash.String(), name)}
}

const segmentsFound = "L2 networks"

// segmenterFinding looks for what L2 networks need beside the programs: a veth that cuts what no kernel cuts in next header 143.
func segmenterFinding(e *env, s conf.Settings) finding {
	name, p, err := filePlan(e, s.Node, s.Topology)
	if err != nil {
		return finding{segmentsFound, true, "not known without a topology"}
	}
	if !slices.ContainsFunc(p.Networks, func(n plan.Network) bool { return n.Type == topology.L2 }) {
		return finding{segmentsFound, true, "none on node " + name}
	}
	if !agentRuns(s.HookSocket) {
		return finding{segmentsFound, true, "the agent makes the segmenter (laces0, laces1) when it starts"}
	}
	near, err := segmenterName()
	if err != nil {
		return finding{segmentsFound, false, err.Error()}
	}
	on, err := segmentationOf(near)
	if err != nil {
		return finding{segmentsFound, false, err.Error()}
	}
	return segmenterIs(near, on)
}

// segmenterIs judges the near end by the features that it has on.
func segmenterIs(near string, on []string) finding {
	if len(on) > 0 {
		return finding{segmentsFound, false, fmt.Sprintf("%s has %s on, so frames that have to be cut are not: ethtool -K %[1]s %[3]s; the agent's log says why it could not",
			near, strings.Join(on, ", "), strings.Join(on, " off ")+" off")}
	}
	return finding{segmentsFound, true, near + " cuts frames that the underlay does not take whole"}
}

func segmenterName() (string, error) {
	dev, err := netdev.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return "", err
	}
	defer dev.Close()
	near, _, err := dev.Segmenter()
	if err != nil {
		return "", err
	}
	links, err := dev.LinkNames()
	if err == nil && near == 0 {
		err = errors.New("the segmenter (laces0, laces1) is not there, so large frames to routers, and all with l2-gso = \"segment\", are refused as gso_frame: the agent's log says why it is not made; it needs CONFIG_VETH")
	}
	return links[uint32(near)], err
}

// segmentationOf are the features by which a device takes more than one packet at a time, and that are on.
func segmentationOf(device string) (on []string, err error) {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return nil, fmt.Errorf("read the features of %s: %w", device, err)
	}
	defer e.Close()
	features, err := e.Features(device)
	if err != nil {
		return nil, fmt.Errorf("read the features of %s: %w", device, err)
	}
	for feature, is := range features {
		if is && strings.HasPrefix(feature, "tx-") && strings.HasSuffix(feature, "-segmentation") {
			on = append(on, feature)
		}
	}
	slices.Sort(on)
	return on, nil
}

func socketFinding(what, path, fix string) finding {
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return finding{what, false, fmt.Sprintf("%v: %s", err, fix)}
	}
	c.Close()
	return finding{what, true, "listens on " + path}
}

func agentFinding(s conf.Settings) finding {
	if !agentRuns(s.HookSocket) {
		return finding{"agent", false, "not running, so containers that ask for Lace are refused: systemctl start lace"}
	}
	return finding{"agent", true, "runs, hooks reach it at " + s.HookSocket}
}

// nriFinding only looks: a connection to NRI that says nothing would make containerd wait.
func nriFinding(s conf.Settings) finding {
	if _, err := os.Stat(s.NRISocket); err != nil {
		return finding{"NRI", true, fmt.Sprintf("no socket at %s: pods are wired by CNI and lace-runc alone", s.NRISocket)}
	}
	return finding{"NRI", true, "socket at " + s.NRISocket}
}

// wrapper is where containerd's shims look for runc first.
const wrapper = "/opt/containerd/bin/runc"

// wrapperFinding looks where a container's start would lead.
func wrapperFinding(path string) finding {
	target, err := filepath.EvalSymlinks(path)
	if _, linkErr := os.Readlink(path); errors.Is(err, fs.ErrNotExist) && linkErr == nil {
		return finding{"lace-runc", false, fmt.Sprintf("%s is a link to nothing: %v; make it one to lace-runc", path, err)}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return finding{"lace-runc", false, fmt.Sprintf("%s is not there, so nerdctl and ctr do not reach Lace: ln -s /usr/local/bin/lace-runc %s", path, path)}
	case err != nil:
		return finding{"lace-runc", false, err.Error()}
	case filepath.Base(target) != "lace-runc":
		return finding{"lace-runc", false, fmt.Sprintf("%s is not a link to lace-runc: nerdctl and ctr do not reach Lace unless they name it (--runtime, --runc-binary)", path)}
	}
	if _, err := exec.LookPath(target); err != nil {
		return finding{"lace-runc", false, fmt.Sprintf("%s cannot be executed: %v", path, err)}
	}
	return finding{"lace-runc", true, path + " leads to " + target}
}
