// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/lace-net/lace/plugin/wire"
)

// The two calls of containerd's API that lace-runc makes, when the agent cannot say what a container asks for.
const (
	getContainer = "/containerd.services.containers.v1.Containers/Get"
	getSandbox   = "/containerd.services.sandbox.v1.Store/Get"
)

// maxReply bounds an answer of containerd, in bytes.
const maxReply = 4 << 20

// errNotFound says that containerd has no such record.
var errNotFound = errors.New("containerd has no record of it")

// containerd is one of its sockets. Lace's own client of it is the agent's; this one makes unary calls only
// and costs no start-up time.
type containerd struct{ socket string }

func newContainerd(address string) containerd {
	if address == "" {
		address = wire.DefaultContainerd
	}
	return containerd{strings.TrimPrefix(address, "unix://")}
}

// labels returns the labels on the record of a container.
func (c containerd) labels(ctx context.Context, namespace, id string) (map[string]string, error) {
	reply, err := c.call(ctx, namespace, getContainer, id)
	if err != nil {
		return nil, fmt.Errorf("read the labels of container %s from containerd at %s: %w", id, c.socket, err)
	}
	return containerLabels(reply)
}

// pod returns CRI's record of a pod.
func (c containerd) pod(ctx context.Context, id string) (wire.Pod, error) {
	reply, err := c.call(ctx, wire.CRINamespace, getSandbox, id)
	if err != nil {
		return wire.Pod{}, fmt.Errorf("read the record of pod %s from containerd at %s: %w", id, c.socket, err)
	}
	record, err := sandboxExtension(reply, wire.SandboxMetadata)
	if err != nil {
		return wire.Pod{}, err
	}
	return wire.ParsePod(record)
}

// call makes a unary gRPC call whose request is a message with the id as its field 1.
func (c containerd) call(ctx context.Context, namespace, method, id string) ([]byte, error) {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", c.socket)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://containerd"+method, bytes.NewReader(frame(id)))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("TE", "trailers")
	req.Header.Set("containerd-namespace", namespace)
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	if err != nil {
		return nil, err
	}
	return unframe(resp, body)
}

// frame is the gRPC form of the request: no compression, length, message.
func frame(id string) []byte {
	message := append(binary.AppendUvarint([]byte{1<<3 | 2}, uint64(len(id))), id...)
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

// unframe checks the status, which comes in the trailer, or in the header of an answer without a body.
func unframe(resp *http.Response, body []byte) ([]byte, error) {
	status, text := resp.Trailer.Get("Grpc-Status"), resp.Trailer.Get("Grpc-Message")
	if status == "" {
		status, text = resp.Header.Get("Grpc-Status"), resp.Header.Get("Grpc-Message")
	}
	switch {
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("HTTP status %s", resp.Status)
	case status == "5":
		return nil, errNotFound
	case status != "0":
		return nil, fmt.Errorf("gRPC status %q: %q", status, text)
	case len(body) > maxReply:
		return nil, fmt.Errorf("the answer is larger than %d bytes", maxReply)
	case len(body) < 5 || body[0] != 0 || binary.BigEndian.Uint32(body[1:]) != uint32(len(body)-5):
		return nil, errors.New("the answer is no single gRPC message without compression")
	}
	return body[5:], nil
}
