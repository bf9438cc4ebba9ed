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

// writeTopology puts a node's topology into the directory of the bed, which goes with it.
func (b *bed) writeTopology(node string, f fabric) (file string, err error) {
	if b.dir == "" {
		if b.dir, err = os.MkdirTemp("", netnsPrefix); err != nil {
			return "", fmt.Errorf("make a directory for the topology: %w", err)
		}
		b.onStop = append(b.onStop, func() error { return os.RemoveAll(b.dir) })
	}
	if b.flows > 0 {
		f = f.and(fmt.Sprintf("[conntrack]\nmax = %d\n", b.flows))
	}
	if err := os.WriteFile(b.topologyOf(node), []byte(f.topology()), 0o600); err != nil {
		return "", fmt.Errorf("write the topology: %w", err)
	}
	return b.topologyOf(node), nil
}

// topologyOf is the file that a node of the bed starts with.
func (b *bed) topologyOf(node string) string { return filepath.Join(b.dir, node+".toml") }

// startNodes starts a node process for each fabric, the first at the first end of the wire.
func (b *bed) startNodes(fabrics ...fabric) error {
	for i, f := range fabrics {
		file, err := b.writeTopology(nodeNames[i], f)
		if err != nil {
			return err
		}
		p, err := startNode(b.node[i], nodeNames[i], file)
		if err != nil {
			return err
		}
		b.onStop = append(b.onStop, p.stop)
		b.agents[i] = p
	}
	return nil
}
