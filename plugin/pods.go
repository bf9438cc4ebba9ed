// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"fmt"
	"slices"

	"github.com/lace-net/lace/plugin/wire"
)

// createSandbox judges the own container of a CRI pod. Where CNI or NRI wired the pod it finds that done; with
// neither, it is the one that does it.
func (a *Agent) createSandbox(ctx context.Context, s wire.State) (*wire.Result, error) {
	p, err := a.records.pod(ctx, s.ID)
	if err != nil {
		return nil, undecidedError{fmt.Errorf("read the labels of pod %s: %w", s.ID, err)}
	}
	res, err := a.attachPod(ctx, p, p.Netns)
	return wireResult(res), err
}

func (a *Agent) cniAdd(ctx context.Context, c wire.CNI) (*wire.Result, error) {
	p, err := a.cniPod(ctx, c)
	if err != nil {
		return nil, undecidedError{fmt.Errorf("%w; this CNI plugin serves the pods of CRI in containerd 2 (nerdctl: --net none)", err)}
	}
	r, asks, err := podRequest(p)
	if !asks || err != nil {
		return nil, err
	}
	if err := checkCNIName(c.IfName, r.Interfaces); err != nil {
		return nil, err
	}
	res, err := a.attachPodRequest(ctx, r, c.Netns)
	return wireResult(res), err
}

// cniPod reads CRI's record of the pod that a CNI call is about.
func (a *Agent) cniPod(ctx context.Context, c wire.CNI) (wire.Pod, error) {
	p, err := a.records.pod(ctx, c.ContainerID)
	if err != nil {
		return p, fmt.Errorf("read the labels of pod %s: %w", c.ContainerID, err)
	}
	p.Annotations = merged(p.Annotations, c.Annotations)
	return p, nil
}

// checkCNIName refuses a call for an interface that the pod will not have: CRI would look for the pod's address there.
func checkCNIName(name string, interfaces []Interface) error {
	if name == "" || slices.ContainsFunc(interfaces, func(i Interface) bool { return i.IfName == name }) {
		return nil
	}
	first := interfaces[0]
	return fmt.Errorf("CNI asks for interface %s; Lace makes %s for the first network, %s, unless %s names another",
		quote(name), first.IfName, quote(first.Network), netLabel(first.Network, fieldIfName))
}

func (a *Agent) cniCheck(ctx context.Context, c wire.CNI) (*wire.Result, error) {
	p, err := a.cniPod(ctx, c)
	if err != nil {
		return nil, undecidedError{err}
	}
	return nil, a.checkPod(p)
}

// checkPod fails for a pod that asks for Lace and is not wired.
func (a *Agent) checkPod(p wire.Pod) error {
	r, asks, err := podRequest(p)
	if !asks || err != nil {
		return err
	}
	if _, ok := a.wired(r); !ok {
		return fmt.Errorf("pod %s asks for network %q and is not wired; remove the pod and run it again", p.ID, r.networks())
	}
	return nil
}

// podRequest reads what a pod asks for. One on the node's own network asks for nothing.
func podRequest(p wire.Pod) (r Request, asks bool, err error) {
	if p.HostNetwork {
		return Request{}, false, nil
	}
	r, asks, err = ParseLabels(p.Labels, p.Annotations)
	if !asks || err != nil {
		return r, asks, err
	}
	r, err = complete(r, wire.CRINamespace, p.ID, p.Name)
	return r, true, err
}

// attachPod wires a pod that asks and is not wired yet; there are no results when it asks for nothing.
func (a *Agent) attachPod(ctx context.Context, p wire.Pod, netns string) ([]Result, error) {
	r, asks, err := podRequest(p)
	if !asks || err != nil {
		return nil, err
	}
	return a.attachPodRequest(ctx, r, netns)
}

func (a *Agent) attachPodRequest(ctx context.Context, r Request, netns string) ([]Result, error) {
	if netns == "" {
		return nil, fmt.Errorf("pod %s asks for network %q, but has no network namespace yet", r.Container, r.networks())
	}
	r.Netns = netns
	defer a.one.lock(r.Container)()
	if res, ok := a.wired(r); ok {
		a.learn(r.Container, 0)
		return res, nil
	}
	return a.attach(ctx, r, 0)
}
