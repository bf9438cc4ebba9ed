// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/lace-net/lace/plugin/wire"
)

// The error codes of the CNI specification that are used, section 5, "Error".
const (
	cniVersionCode = 1
	cniConfigCode  = 7
	cniEnvCode     = 4
	cniTryLater    = 11
	cniLaceCode    = 100 // plugin-specific: the agent's own verdict
)

// maxNetConf bounds the network configuration on stdin, in bytes. It holds the result of ADD on CHECK and DEL.
const maxNetConf = 1 << 20

var cniVersions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// netConf is the network configuration of the CNI specification, section 1, with Lace's two keys.
type netConf struct {
	CNIVersion string `json:"cniVersion"`
	Socket     string `json:"socket"`     // the agent's; default wire.DefaultSocket
	Containerd string `json:"containerd"` // containerd's; default wire.DefaultContainerd
	// RuntimeConfig has a pod's annotations where the conflist declares that capability.
	RuntimeConfig struct {
		Annotations map[string]string `json:"io.kubernetes.cri.pod-annotations"`
	} `json:"runtimeConfig"`
}

// cniError is the error document of the CNI specification.
type cniError struct {
	CNIVersion string `json:"cniVersion"`
	Code       int    `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details,omitempty"`
}

func (e *cniError) Error() string { return e.Msg }

// cniResult is the success document of the CNI specification for ADD.
type cniResult struct {
	CNIVersion string         `json:"cniVersion"`
	Interfaces []cniInterface `json:"interfaces,omitempty"`
	IPs        []cniIP        `json:"ips"`
	DNS        struct{}       `json:"dns"`
}

type cniInterface struct {
	Name    string `json:"name"`
	Mac     string `json:"mac,omitempty"`
	MTU     int    `json:"mtu,omitempty"`
	Sandbox string `json:"sandbox,omitempty"`
}

type cniIP struct {
	Version   string `json:"version,omitempty"` // before 1.0.0
	Interface *int   `json:"interface,omitempty"`
	Address   string `json:"address"`
	Gateway   string `json:"gateway,omitempty"`
}

// cniMain is a CNI plugin: parameters in the environment, configuration on stdin, result or error on stdout.
func cniMain(stdin io.Reader, stdout io.Writer, getenv func(string) string) int {
	out, err := cniCommand(stdin, getenv)
	code := 0
	if err != nil {
		var e *cniError
		if !errors.As(err, &e) {
			e = &cniError{Code: cniLaceCode, Msg: "lace: " + err.Error()}
		}
		if e.CNIVersion == "" {
			e.CNIVersion = "1.0.0"
		}
		out, code = e, 1
	}
	if out == nil {
		return code
	}
	if err := json.NewEncoder(stdout).Encode(out); err != nil {
		return 1
	}
	return code
}

func cniCommand(stdin io.Reader, getenv func(string) string) (any, error) {
	command := getenv("CNI_COMMAND")
	if command == "VERSION" {
		return map[string]any{"cniVersion": "1.1.0", "supportedVersions": cniVersions}, nil
	}
	conf, err := readNetConf(stdin)
	if err != nil {
		return nil, err
	}
	c := wire.CNI{ContainerID: getenv("CNI_CONTAINERID"), Netns: getenv("CNI_NETNS"), IfName: getenv("CNI_IFNAME"),
		Annotations: conf.RuntimeConfig.Annotations}
	c.PodNamespace, c.PodName = podOf(getenv("CNI_ARGS"))
	if conf.Socket == "" {
		conf.Socket = socketPath(getenv)
	}
	switch command {
	case "ADD":
		return cniAdd(conf, c)
	case "DEL":
		cniDel(conf, c)
		return nil, nil
	case "CHECK":
		return nil, cniCheck(conf, c)
	case "STATUS", "GC":
		// Pods without Lace's labels start without the agent too, so the network is always ready; and what a gone pod left
		// is the agent's to find, from containerd's own list.
		return nil, nil
	}
	return nil, &cniError{Code: cniEnvCode, CNIVersion: conf.CNIVersion,
		Msg: fmt.Sprintf("lace: unknown CNI_COMMAND %q; known are ADD, DEL, CHECK, STATUS, GC, VERSION", command)}
}

func readNetConf(stdin io.Reader) (conf netConf, err error) {
	b, err := io.ReadAll(io.LimitReader(stdin, maxNetConf+1))
	if err == nil && len(b) > maxNetConf {
		err = fmt.Errorf("it is larger than %d bytes", maxNetConf)
	}
	if err == nil {
		err = json.Unmarshal(b, &conf)
	}
	if err != nil {
		return conf, &cniError{Code: cniConfigCode, Msg: "lace: read the network configuration: " + err.Error()}
	}
	if !slices.Contains(cniVersions, conf.CNIVersion) {
		return conf, &cniError{Code: cniVersionCode, Msg: fmt.Sprintf("lace: cniVersion %q is not known; write one of %s in the conflist",
			conf.CNIVersion, strings.Join(cniVersions, ", "))}
	}
	return conf, nil
}

func podOf(args string) (namespace, name string) {
	for pair := range strings.SplitSeq(args, ";") {
		switch k, v, _ := strings.Cut(pair, "="); k {
		case "K8S_POD_NAMESPACE":
			namespace = v
		case "K8S_POD_NAME":
			name = v
		}
	}
	return namespace, name
}

func (conf netConf) ask(stage string, c wire.CNI) (wire.Answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), wire.AskDeadline)
	defer cancel()
	return wire.Ask(ctx, conf.Socket, wire.Message{Stage: stage, Namespace: wire.CRINamespace, Containerd: conf.Containerd, CNI: &c})
}

// cniAdd lets the agent wire the pod. Without the agent, a pod that asks for nothing still starts.
func cniAdd(conf netConf, c wire.CNI) (any, error) {
	a, err := conf.ask(wire.CNIAdd, c)
	switch {
	case err == nil && a.Error == "":
		return result(conf, c, a.Result), nil
	case err == nil && !a.Undecided:
		return nil, &cniError{CNIVersion: conf.CNIVersion, Code: cniLaceCode, Msg: "lace: " + a.Error}
	}
	cause := noVerdict(a, err)
	network, asks, err := podAsks(conf, c)
	switch {
	case err != nil:
		// Unlike a hook, this plugin is asked for a network; where nobody knows which, there is none to give.
		return nil, &cniError{CNIVersion: conf.CNIVersion, Code: cniTryLater, Msg: fmt.Sprintf("lace: %v; %v", cause, err)}
	case asks:
		return nil, &cniError{CNIVersion: conf.CNIVersion, Code: cniTryLater, Msg: fmt.Sprintf("lace: pod asks for network %q, but %v", network, cause)}
	}
	return result(conf, c, nil), nil
}

func podAsks(conf netConf, c wire.CNI) (network string, asks bool, err error) {
	if network, asks = wire.Asks(nil, c.Annotations); asks {
		return network, true, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), decideDeadline)
	defer cancel()
	p, err := newContainerd(conf.Containerd).pod(ctx, c.ContainerID)
	network, asks = wire.Asks(p.Labels, p.Annotations)
	return network, asks, err
}

// cniDel never fails: a pod can always end, and the agent finds out by itself what it missed.
func cniDel(conf netConf, c wire.CNI) {
	ctx, cancel := context.WithTimeout(context.Background(), poststopDeadline)
	defer cancel()
	m := wire.Message{Stage: wire.CNIDel, Namespace: wire.CRINamespace, Containerd: conf.Containerd, CNI: &c}
	_, _ = wire.Ask(ctx, conf.Socket, m) // the agent logs its own errors; stdout is for the runtime
}

func cniCheck(conf netConf, c wire.CNI) error {
	a, err := conf.ask(wire.CNICheck, c)
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	if err != nil {
		return &cniError{CNIVersion: conf.CNIVersion, Code: cniLaceCode, Msg: "lace: " + err.Error()}
	}
	return nil
}

// result is the success document. CRI does not start a pod without an address on eth0, so one that asks for
// nothing gets the address that it has anyway, on lo: true, and of no use to anybody else.
func result(conf netConf, c wire.CNI, r *wire.Result) cniResult {
	out := cniResult{CNIVersion: conf.CNIVersion}
	if r == nil {
		out.IPs = []cniIP{withVersion(conf, cniIP{Address: "127.0.0.1/8"})}
		return out
	}
	for n, i := range r.Interfaces {
		one := cniInterface{Name: i.Name, Mac: i.MAC, Sandbox: c.Netns}
		if conf.CNIVersion == "1.1.0" {
			one.MTU = i.MTU
		}
		out.Interfaces = append(out.Interfaces, one)
		for _, ip := range addresses(i, n) {
			out.IPs = append(out.IPs, withVersion(conf, ip))
		}
	}
	return out
}

// addresses lists those of the interface that has the place n among the interfaces.
func addresses(i wire.Interface, n int) (ips []cniIP) {
	for k, p := range i.IPs {
		ip := cniIP{Interface: &n, Address: p.String()}
		if k < len(i.Gateways) && i.Gateways[k].IsValid() {
			ip.Gateway = i.Gateways[k].String()
		}
		ips = append(ips, ip)
	}
	return ips
}

// withVersion adds the family, which results before 1.0.0 had to name.
func withVersion(conf netConf, ip cniIP) cniIP {
	if strings.HasPrefix(conf.CNIVersion, "0.") {
		ip.Version = "4"
		if strings.Count(ip.Address, ":") > 1 {
			ip.Version = "6"
		}
	}
	return ip
}
