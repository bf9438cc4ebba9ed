// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// orderPatience bounds one order to a node.
const orderPatience = 60 * time.Second

// nodeProcess is a node of a Lace bed, seen from the bench.
type nodeProcess struct {
	name    string
	cmd     *exec.Cmd
	in      io.WriteCloser
	reports chan report
	stderr  *bytes.Buffer
	ended   chan error
}

// startNode starts the node's process in its namespace. It ends with stop, or with the bench itself.
func startNode(at ns, name, topology string) (*nodeProcess, error) {
	cmd := exec.Command("/proc/self/exe", "isolate", string(at), "--name", name, "--topology", topology)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt of the bench is not its own
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe to node %s: %w", name, err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe from node %s: %w", name, err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start node %s: %w", name, err)
	}
	p := &nodeProcess{name, cmd, in, make(chan report), stderr, make(chan error, 1)}
	go p.listen(out)
	return p, nil
}

// listen passes the reports on until the process closes its output.
func (p *nodeProcess) listen(out io.Reader) {
	defer close(p.reports)
	dec := json.NewDecoder(out)
	for {
		var r report
		if err := dec.Decode(&r); err != nil {
			p.ended <- p.cmd.Wait()
			return
		}
		p.reports <- r
	}
}

// do gives an order and waits for its report.
func (p *nodeProcess) do(o order) (report, error) {
	if err := json.NewEncoder(p.in).Encode(o); err != nil {
		return report{}, p.failed(o, err)
	}
	select {
	case r, ok := <-p.reports:
		switch {
		case !ok:
			return r, p.failed(o, errors.New("the node's process ended"))
		case r.Error != "":
			return r, p.failed(o, errors.New(r.Error))
		}
		return r, nil
	case <-time.After(orderPatience + patience):
		return report{}, p.failed(o, errors.New("no answer"))
	}
}

func (p *nodeProcess) failed(o order, err error) error {
	if said := bytes.TrimSpace(p.stderr.Bytes()); len(said) > 0 {
		return fmt.Errorf("node %s: %s %s: %w; it said: %s", p.name, o.Do, o.Container, err, said)
	}
	return fmt.Errorf("node %s: %s %s: %w", p.name, o.Do, o.Container, err)
}

// stop ends the process, by force where it does not end by itself.
func (p *nodeProcess) stop() error {
	p.in.Close()
	select {
	case err := <-p.ended:
		if err != nil {
			return fmt.Errorf("node %s: %w: %s", p.name, err, bytes.TrimSpace(p.stderr.Bytes()))
		}
		return nil
	case <-time.After(patience):
		return errors.Join(fmt.Errorf("node %s did not end by itself", p.name), p.cmd.Process.Kill())
	}
}

// topologyText is a topology of two nodes, which lie at the ends of a bed's wire.
func topologyText(encapsulation string) string {
	text := fmt.Sprintf("version = 1\n[underlay]\nlocator-block = \"5f00:1ace::/32\"\nencapsulation = %q\n", encapsulation)
	for i, name := range nodeNames {
		text += fmt.Sprintf("[node.%s]\nunderlay = %q\nlocator = \"5f00:1ace:%d::/48\"\nuplinks = [\"up0\"]\n", name, wire6[i], i+1)
	}
	return text + fmt.Sprintf("[network.%s]\ntype = \"l3\"\nid = 100\nsubnets = [\"10.60.0.0/16\", \"fd60::/48\"]\n", nodeNetwork)
}

var nodeNames = [2]string{"node-a", "node-b"}

// writeTopology puts the bed's topology into a directory that goes with the bed.
func (b *bed) writeTopology(encapsulation string) (file string, err error) {
	if b.dir, err = os.MkdirTemp("", netnsPrefix); err != nil {
		return "", fmt.Errorf("make a directory for the topology: %w", err)
	}
	b.onStop = append(b.onStop, func() error { return os.RemoveAll(b.dir) })
	file = filepath.Join(b.dir, "topology.toml")
	text := topologyText(encapsulation)
	if b.flows > 0 {
		text += fmt.Sprintf("[conntrack]\nmax = %d\n", b.flows)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return "", fmt.Errorf("write the topology: %w", err)
	}
	return file, nil
}

// startNodes starts a node process at both ends of the wire.
func (b *bed) startNodes(encapsulation string) error {
	file, err := b.writeTopology(encapsulation)
	if err != nil {
		return err
	}
	for i, at := range b.node {
		p, err := startNode(at, nodeNames[i], file)
		if err != nil {
			return err
		}
		b.onStop = append(b.onStop, p.stop)
		b.agents[i] = p
	}
	return nil
}
