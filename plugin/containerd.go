// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"

	"github.com/lace-net/lace/plugin/wire"
)

// criKind is the label by which CRI marks its containers; it stands beside the pod's own labels.
const criKind = "io.cri-containerd.kind"

// reconnectDelay bounds how long a containerd that came back is not noticed.
const reconnectDelay = time.Second

// containerdClient reads containerd's records. It connects by itself, whenever containerd is there.
type containerdClient struct{ c *containerd.Client }

func dialContainerd(address string) (*containerdClient, error) {
	c, err := containerd.New(address, containerd.WithTimeout(reconnectDelay),
		// A call waits for a containerd that is starting, up to the deadline of its context.
		containerd.WithExtraDialOpts([]grpc.DialOption{grpc.WithDefaultCallOptions(grpc.WaitForReady(true))}))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, err)
	}
	return &containerdClient{c}, nil
}

// probe finds out within a few seconds whether containerd is there, where other calls wait for it.
func (k *containerdClient) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*reconnectDelay)
	defer cancel()
	if _, err := k.c.NamespaceService().List(ctx); err != nil {
		return fmt.Errorf("list the namespaces of containerd: %w", err)
	}
	return nil
}

func (k *containerdClient) close() { k.c.Close() }

func (k *containerdClient) container(ctx context.Context, namespace, id string) (container, error) {
	c, err := k.c.ContainerService().Get(namespaces.WithNamespace(ctx, namespace), id)
	if err != nil {
		return container{}, fmt.Errorf("containerd: %w", err)
	}
	return readContainer(namespace, c), nil
}

func (k *containerdClient) remember(ctx context.Context, namespace, id string, labels map[string]string) error {
	c := containers.Container{ID: id, Labels: labels}
	var paths []string
	for l := range labels {
		paths = append(paths, "labels."+l)
	}
	if _, err := k.c.ContainerService().Update(namespaces.WithNamespace(ctx, namespace), c, paths...); err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	return nil
}

func (k *containerdClient) pod(ctx context.Context, id string) (wire.Pod, error) {
	s, err := k.c.SandboxStore().Get(namespaces.WithNamespace(ctx, wire.CRINamespace), id)
	if err != nil {
		return wire.Pod{}, fmt.Errorf("containerd: %w", err)
	}
	return readPod(s)
}

func readPod(s sandbox.Sandbox) (wire.Pod, error) {
	record, ok := s.Extensions[wire.SandboxMetadata]
	if !ok {
		return wire.Pod{}, fmt.Errorf("sandbox %s was not made by CRI: it has no record %q", s.ID, wire.SandboxMetadata)
	}
	p, err := wire.ParsePod(record.GetValue())
	p.ID = s.ID
	return p, err
}

// pods lists the pods of CRI. A record that cannot be read is an error: nobody knows what it asks for.
func (k *containerdClient) pods(ctx context.Context) ([]wire.Pod, error) {
	list, err := k.c.SandboxStore().List(namespaces.WithNamespace(ctx, wire.CRINamespace))
	if err != nil {
		return nil, fmt.Errorf("list the pods of containerd: %w", err)
	}
	var pods []wire.Pod
	for _, s := range list {
		if _, ok := s.Extensions[wire.SandboxMetadata]; !ok {
			continue
		}
		p, err := readPod(s)
		if err != nil {
			return nil, fmt.Errorf("list the pods of containerd: %w", err)
		}
		pods = append(pods, p)
	}
	return pods, nil
}

// containers lists the containers of all namespaces, with the pids of those that run.
func (k *containerdClient) containers(ctx context.Context) ([]container, error) {
	names, err := k.c.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the namespaces of containerd: %w", err)
	}
	var all []container
	for _, name := range names {
		ctx := namespaces.WithNamespace(ctx, name)
		list, err := k.c.ContainerService().List(ctx)
		if err != nil {
			return nil, fmt.Errorf("list the containers of containerd namespace %s: %w", name, err)
		}
		pids, err := k.pids(ctx)
		if err != nil {
			return nil, fmt.Errorf("list the tasks of containerd namespace %s: %w", name, err)
		}
		for _, c := range list {
			one := readContainer(name, c)
			one.pid = pids[c.ID]
			all = append(all, one)
		}
	}
	return all, nil
}

// pids maps the containers of the context's namespace that have a live task to its process.
func (k *containerdClient) pids(ctx context.Context) (map[string]uint32, error) {
	list, err := k.c.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		return nil, err
	}
	pids := map[string]uint32{}
	for _, t := range list.GetTasks() {
		if t.GetStatus() != task.Status_STOPPED {
			pids[t.GetID()] = t.GetPid()
		}
	}
	return pids, nil
}

// specification is the part of an OCI specification that Lace reads.
type specification struct {
	Annotations map[string]string
	Linux       struct {
		Namespaces []struct{ Type, Path string }
	}
}

func readContainer(namespace string, c containers.Container) container {
	var spec specification
	if c.Spec != nil {
		// What is not JSON is no Linux container; it has no annotations and no network of its own.
		if err := json.Unmarshal(c.Spec.GetValue(), &spec); err != nil {
			spec = specification{}
		}
	}
	out := container{namespace: namespace, id: c.ID, labels: c.Labels, annotations: spec.Annotations,
		cri: c.Labels[criKind] != "" || spec.Annotations[wire.KindAnnotation] != ""}
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == "network" {
			out.ownNetwork = ns.Path == ""
		}
	}
	return out
}

// The events that end a container's wiring.
const (
	topicExit   = "/tasks/exit"
	topicDelete = "/containers/delete"
)

func (k *containerdClient) subscribe(ctx context.Context) (<-chan *events.Envelope, <-chan error) {
	return k.c.Subscribe(ctx, `topic=="`+topicExit+`"`, `topic=="`+topicDelete+`"`)
}

// errStreamEnded is what the end of the event stream without a reason is called.
var errStreamEnded = errors.New("containerd ended the stream of events")
