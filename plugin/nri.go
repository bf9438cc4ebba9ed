// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"

	"github.com/lace-net/lace/plugin/wire"
)

const (
	nriName         = "lace"
	defaultNRIIndex = "10" // early, so that later plugins see a wired pod
	// nriMargin is kept between the plugin's deadline and NRI's: an answer that comes too late lets
	// the container run.
	nriMargin = 4
)

// nriPlugin handles the events of pods. It stands on Agent for everything.
type nriPlugin struct {
	agent   *Agent
	timeout func() time.Duration // NRI's own
	synced  atomic.Bool
}

// followNRI stays registered with NRI, and tries again, ever more slowly, where NRI is not there.
func (a *Agent) followNRI(ctx context.Context) {
	var b backoff
	absent := false
	for ctx.Err() == nil {
		if _, err := os.Stat(a.options.NRI); err != nil {
			if !absent {
				a.log.Info("NRI is not there; pods are wired by CNI and the runtime's hook alone", "socket", a.options.NRI, "error", err)
			}
			absent = true
			b.wait(ctx)
			continue
		}
		absent = false
		registered, err := a.nriSession(ctx)
		if ctx.Err() != nil {
			return
		}
		if registered {
			b.reset()
		}
		a.log.Warn("NRI is not followed; trying again", "socket", a.options.NRI, "error", err)
		b.wait(ctx)
	}
}

// nriSession lasts as long as one connection. registered tells whether containerd took the plugin.
func (a *Agent) nriSession(ctx context.Context) (registered bool, err error) {
	p := &nriPlugin{agent: a}
	s, err := stub.New(p, stub.WithPluginName(nriName), stub.WithPluginIdx(a.options.NRIIndex), stub.WithSocketPath(a.options.NRI),
		stub.WithOnClose(func() {}), // without it the stub ends the process
		stub.WithLogger(nriLogger{a.log}),
		stub.WithFailurePolicy(&api.FailurePolicy{FailRequest: true, KeepConnected: true}))
	if err != nil {
		return false, fmt.Errorf("make the NRI plugin: %w", err)
	}
	p.timeout = s.RequestTimeout
	err = s.Run(ctx)
	if err == nil {
		err = errors.New("NRI closed the connection")
	}
	return p.synced.Load(), err
}

// deadline ends before NRI's, so that the answer is an error, which fails the pod, and not silence, which lets it run.
func (p *nriPlugin) deadline(ctx context.Context) (context.Context, context.CancelFunc) {
	t := p.timeout()
	return context.WithTimeout(ctx, t-t/nriMargin)
}

// Synchronize wires the pods that were started while nobody listened.
func (p *nriPlugin) Synchronize(ctx context.Context, pods []*api.PodSandbox, _ []*api.Container) ([]*api.ContainerUpdate, error) {
	p.synced.Store(true)
	p.agent.log.Info("registered with NRI", "pods", len(pods))
	for _, pod := range pods {
		if err := p.attach(ctx, pod); err != nil {
			p.agent.log.Error("synchronise a pod", "pod", pod.GetId(), "name", pod.GetName(), "error", err)
		}
	}
	return nil, nil
}

// RunPodSandbox wires a pod that CNI has not wired.
func (p *nriPlugin) RunPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.refuse("RunPodSandbox", pod, p.attach(ctx, pod))
}

// StartContainer is the last look before a container of the pod runs.
func (p *nriPlugin) StartContainer(_ context.Context, pod *api.PodSandbox, _ *api.Container) error {
	w, _ := wirePod(pod)
	return p.refuse("StartContainer", pod, p.agent.checkPod(w))
}

// StopPodSandbox takes the pod's wiring away. It never fails: a pod can always end.
func (p *nriPlugin) StopPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.teardown(ctx, "StopPodSandbox", pod, p.agent.detach)
}

// RemovePodSandbox gives the pod's addresses back. Its namespace is gone by now.
func (p *nriPlugin) RemovePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.teardown(ctx, "RemovePodSandbox", pod, p.agent.release)
}

func (p *nriPlugin) attach(ctx context.Context, pod *api.PodSandbox) error {
	ctx, cancel := p.deadline(ctx)
	defer cancel()
	w, netns := wirePod(pod)
	_, err := p.agent.attachPod(ctx, w, netns)
	return err
}

func (p *nriPlugin) teardown(ctx context.Context, event string, pod *api.PodSandbox, do func(context.Context, string) error) error {
	id := key(wire.CRINamespace, pod.GetId())
	if _, asked := p.agent.pidOf(id); !asked {
		return nil
	}
	ctx, cancel := p.deadline(ctx)
	defer cancel()
	if err := do(ctx, id); err != nil {
		p.agent.log.Error("clean up after a pod", "event", event, "pod", pod.GetId(), "error", err)
	}
	return nil
}

func (p *nriPlugin) refuse(event string, pod *api.PodSandbox, err error) error {
	if err == nil {
		return nil
	}
	p.agent.log.Warn("pod refused", "event", event, "pod", pod.GetId(), "name", pod.GetName(), "error", err)
	return fmt.Errorf("lace: %w", err)
}

// wirePod turns NRI's view of a pod into CRI's, with the path of its network namespace.
func wirePod(pod *api.PodSandbox) (wire.Pod, string) {
	w := wire.Pod{ID: pod.GetId(), Name: pod.GetName(), Namespace: pod.GetNamespace(),
		Labels: pod.GetLabels(), Annotations: pod.GetAnnotations(), HostNetwork: true}
	for _, ns := range pod.GetLinux().GetNamespaces() {
		if ns.GetType() == "network" {
			w.HostNetwork, w.Netns = false, ns.GetPath()
		}
	}
	return w, w.Netns
}

// nriLogger gives the stub's own messages to slog, where they are details.
type nriLogger struct{ log *slog.Logger }

func (l nriLogger) Debugf(_ context.Context, f string, v ...any) { l.log.Debug(fmt.Sprintf(f, v...)) }
func (l nriLogger) Infof(_ context.Context, f string, v ...any)  { l.log.Debug(fmt.Sprintf(f, v...)) }
func (l nriLogger) Warnf(_ context.Context, f string, v ...any)  { l.log.Warn(fmt.Sprintf(f, v...)) }
func (l nriLogger) Errorf(_ context.Context, f string, v ...any) { l.log.Warn(fmt.Sprintf(f, v...)) }
