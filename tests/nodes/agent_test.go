// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/topology"
)

// agentSetup tells a process which agent it is.
type agentSetup struct {
	Topology string // text of the file
	Node     string
	BPFFS    string
	Remove   bool // take everything of Lace away instead
}

// order is one line to an agent, answer the line that comes back. Orders run at the same time.
type order struct {
	ID       int
	Do       string
	Request  wish
	Live     []string
	Topology string
	Ends     [2]netip.AddrPort // flows: source and destination; the zero value means any
}

// wish is a dataplane.Request as it goes over the pipe: the first interface, and those of other networks.
type wish struct {
	dataplane.Interface
	Container, Name string
	Sticky          bool
	Netns           string
	More            []dataplane.Interface
}

func (w *wish) request() dataplane.Request {
	all := append([]dataplane.Interface{w.Interface}, w.More...)
	return dataplane.Request{Container: w.Container, Name: w.Name, Sticky: w.Sticky, Netns: w.Netns, Interfaces: all}
}

func (w *wish) deviceRequest() dataplane.DeviceRequest {
	return dataplane.DeviceRequest{Device: w.Device, Network: w.Network, Name: w.Name, IPs: w.IPs, MAC: w.MAC}
}

// port is a dataplane.Port as it goes over the pipe.
type port struct {
	V4, V6, Gateway4, Gateway6 netip.Addr
	MAC                        [6]byte
	HostIf, IfName             string
	Ifindex, MTU               int
}

func portOf(p dataplane.Port) port {
	return port{p.V4, p.V6, p.Gateway4, p.Gateway6, p.MAC, p.HostIf, p.IfName, p.Ifindex, p.MTU}
}

type answer struct {
	ID      int // 0: the agent is ready
	Error   string
	Port    port   // the first of them
	Ports   []port // in the order of the wish
	Status  status
	Applied dataplane.Applied
	Flows   []flow
}

// flow is a maps.Connection as it goes over the pipe.
type flow struct {
	Network, To uint32
	Src, Dst    netip.AddrPort
	Protocol    uint8
	State       string
	Line        uint32
	Whole       bool // both directions are there
	There, Back uint64
}

// status is what an agent sees of itself.
type status struct {
	Features  dataplane.Features
	Counters  map[string]uint64 // packets by reason
	Endpoints []string          // "network address"
	Ports     []uint32          // interface indexes
	Room      int               // of the table of flows, in flows
}

// serve is the agent process. It ends when its standard input does.
func serve(text string) int {
	var s agentSetup
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	err := json.Unmarshal([]byte(text), &s)
	if err == nil && s.Remove {
		err = dataplane.Remove(s.BPFFS, log)
	} else if err == nil {
		err = serveOrders(s, log)
	}
	if err != nil {
		json.NewEncoder(os.Stdout).Encode(answer{Error: err.Error()})
		return 1
	}
	return 0
}

func serveOrders(s agentSetup, log *slog.Logger) error {
	top, err := topology.Parse("topology.toml", []byte(s.Topology))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	d, err := dataplane.Open(ctx, dataplane.Options{Topology: top, Node: s.Node, BPFFS: s.BPFFS, Log: log})
	if err != nil {
		cancel()
		return err
	}
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	served := answerOrders(ctx, d)
	cancel()
	return errors.Join(served, <-done, d.Close())
}

func answerOrders(ctx context.Context, d *dataplane.Dataplane) error {
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout)
	out.Encode(answer{})
	var running sync.WaitGroup
	defer running.Wait()
	for in := json.NewDecoder(os.Stdin); ; {
		var o order
		if err := in.Decode(&o); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		running.Go(func() {
			a := obey(ctx, d, o)
			mu.Lock()
			defer mu.Unlock()
			out.Encode(a)
		})
	}
}

func obey(ctx context.Context, d *dataplane.Dataplane, o order) answer {
	a, err := answer{ID: o.ID}, error(nil)
	switch o.Do {
	case "attach":
		err = attach(ctx, d, o, &a)
	case "attach-late": // with a deadline that has passed
		late, cancel := context.WithDeadline(ctx, time.Unix(1, 0))
		defer cancel()
		err = attach(late, d, o, &a)
	case "attach-device":
		var p dataplane.Port
		p, err = d.AttachDevice(ctx, o.Request.deviceRequest())
		a.Port = portOf(p)
	case "detach-device":
		err = d.DetachDevice(ctx, o.Request.Device)
	case "detach":
		err = d.Detach(ctx, o.Request.Container)
	case "release":
		err = d.Release(ctx, o.Request.Container)
	case "reserve":
		err = d.Reserve(ctx, o.Request.request())
	case "retain":
		err = d.Retain(ctx, o.Live)
	case "apply":
		a.Applied, err = apply(ctx, d, o.Topology)
	case "status":
		a.Status, err = statusOf(d)
	case "flows":
		a.Flows, err = flowsOf(d, o.Ends)
	default:
		err = fmt.Errorf("no order is called %q", o.Do)
	}
	if err != nil {
		a.Error = err.Error()
	}
	return a
}

func attach(ctx context.Context, d *dataplane.Dataplane, o order, a *answer) error {
	ports, err := d.Attach(ctx, o.Request.request())
	for _, p := range ports {
		a.Ports = append(a.Ports, portOf(p))
	}
	if len(ports) > 0 {
		a.Port = a.Ports[0]
	}
	return err
}

func apply(ctx context.Context, d *dataplane.Dataplane, text string) (dataplane.Applied, error) {
	top, err := topology.Parse("topology.toml", []byte(text))
	if err != nil {
		return dataplane.Applied{}, err
	}
	return d.Apply(ctx, top)
}

// maxFlows bounds what is told of a full table.
const maxFlows = 100

var errEnough = errors.New("enough")

func flowsOf(d *dataplane.Dataplane, ends [2]netip.AddrPort) (all []flow, err error) {
	table, err := d.Hooks().Maps().OpenFlows()
	if err != nil {
		return nil, err
	}
	defer table.Close()
	err = maps.EachConnection(table, func(maps.Flow) bool { return true }, func(c maps.Connection) error {
		if ends != [2]netip.AddrPort{} && ends != [2]netip.AddrPort{c.Src, c.Dst} {
			return nil
		}
		f := flow{Network: c.Network, To: c.To, Src: c.Src, Dst: c.Dst, Protocol: c.Protocol, State: maps.FlowStateName(c.State),
			Line: c.Line, Whole: c.Answer != nil, There: c.Packets}
		if c.Answer != nil {
			f.Back = c.Answer.Packets
		}
		if all = append(all, f); len(all) == maxFlows {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return all, err
}

func statusOf(d *dataplane.Dataplane) (status, error) {
	s := status{Features: d.Features(), Counters: map[string]uint64{}}
	m := d.Hooks().Maps()
	counters, err := m.Counters()
	for _, c := range counters {
		s.Counters[maps.ReasonName(c.Reason)] = c.Packets
	}
	endpoints, err2 := m.Endpoints.All()
	for k := range endpoints {
		s.Endpoints = append(s.Endpoints, fmt.Sprintf("%d %x", maps.Network(k.Scope), k.Addr.U8))
	}
	ports, err3 := m.Ports.All()
	for k := range ports {
		s.Ports = append(s.Ports, k.Ifindex)
	}
	table, err4 := m.OpenFlows()
	if err4 == nil {
		s.Room = int(table.MaxEntries()) / 2
		err4 = table.Close()
	}
	return s, errors.Join(err, err2, err3, err4)
}

// agent is the test's side of an agent process.
type agent struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	log   *lockedBuffer
	ready chan answer
	ended chan struct{}

	mu      sync.Mutex
	last    int
	waiting map[int]chan answer
}

// lockedBuffer keeps what a process writes.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// startAgent starts an agent in a namespace and does not wait until it is ready.
func startAgent(n *namespace, s agentSetup, log *lockedBuffer) (*agent, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	a := &agent{cmd: exec.Command("/proc/self/exe"), log: log, ready: make(chan answer, 1), ended: make(chan struct{}), waiting: map[int]chan answer{}}
	a.cmd.Env = append(os.Environ(), agentVariable+"="+string(text))
	a.cmd.Stderr = log
	if a.stdin, err = a.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := n.do(a.cmd.Start); err != nil {
		return nil, fmt.Errorf("start an agent in %s: %w", n.name, err)
	}
	go a.listen(out)
	return a, nil
}

// listen hands the answers out until the process ends.
func (a *agent) listen(out io.Reader) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var got answer
		if json.Unmarshal(lines.Bytes(), &got) != nil {
			fmt.Fprintf(a.log, "not an answer: %s\n", lines.Text())
			continue
		}
		a.deliver(got)
	}
	if err := a.cmd.Wait(); err != nil {
		fmt.Fprintf(a.log, "the process ended: %v\n", err)
	}
	close(a.ended)
}

func (a *agent) deliver(got answer) {
	if got.ID == 0 {
		if got.Error != "" {
			fmt.Fprintf(a.log, "error: %s\n", got.Error)
		}
		select {
		case a.ready <- got:
		default:
		}
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.waiting[got.ID]; c != nil {
		delete(a.waiting, got.ID)
		c <- got
	}
}

var errEnded = errors.New("the agent has ended")

// awaitReady waits until the agent serves.
func (a *agent) awaitReady() error {
	select {
	case got := <-a.ready:
		if got.Error != "" {
			<-a.ended
			return errors.New(got.Error)
		}
		return nil
	case <-a.ended:
		return errEnded
	case <-time.After(patience):
		return errors.New("the agent is not ready in time")
	}
}

// call gives an order and waits for the answer.
func (a *agent) call(o order) (answer, error) {
	c := make(chan answer, 1)
	a.mu.Lock()
	a.last++
	o.ID = a.last
	a.waiting[o.ID] = c
	err := json.NewEncoder(a.stdin).Encode(o)
	a.mu.Unlock()
	if err != nil {
		return answer{}, errEnded
	}
	select {
	case got := <-c:
		if got.Error != "" {
			return got, errors.New(got.Error)
		}
		return got, nil
	case <-a.ended:
		return answer{}, errEnded
	case <-time.After(patience):
		return answer{}, fmt.Errorf("no answer to %s", o.Do)
	}
}

// stop lets the agent end by itself, kill does not.
func (a *agent) stop() { a.stdin.Close(); <-a.ended }

func (a *agent) kill() {
	a.cmd.Process.Kill()
	<-a.ended
	a.stdin.Close()
}
