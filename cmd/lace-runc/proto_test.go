// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"maps"
	"testing"

	"github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func containerReply(t testing.TB, labels map[string]string) []byte {
	t.Helper()
	b, err := proto.Marshal(&containers.GetContainerResponse{Container: &containers.Container{ID: "c1", Labels: labels, Image: "i",
		Runtime: &containers.Container_Runtime{Name: "r"}, Spec: &anypb.Any{TypeUrl: "t", Value: []byte("{}")}, CreatedAt: timestamppb.Now()}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestReadsWhatContainerdWrites holds the hand-written reader to containerd's own encoder.
func TestReadsWhatContainerdWrites(t *testing.T) {
	want := map[string]string{"lace.network": "backend", "empty": "", "": "no key"}
	got, err := containerLabels(containerReply(t, want))
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("labels %v, error %v", got, err)
	}
	b, err := proto.Marshal(&sandbox.StoreGetResponse{Sandbox: &types.Sandbox{SandboxID: "s1", Sandboxer: "x", Labels: map[string]string{"metadata": "no"},
		Extensions: map[string]*anypb.Any{"other": {Value: []byte("no")}, "metadata": {TypeUrl: "t", Value: []byte("yes")}}}})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := sandboxExtension(b, "metadata"); err != nil || string(got) != "yes" {
		t.Errorf("extension %q, error %v", got, err)
	}
	if _, err := sandboxExtension(b, "missing"); err == nil {
		t.Error("a missing extension is no error")
	}
	request := frame("c1")
	var m containers.GetContainerRequest
	if err := proto.Unmarshal(request[5:], &m); err != nil || m.GetID() != "c1" || binary.BigEndian.Uint32(request[1:]) != uint32(len(request)-5) {
		t.Errorf("request %v, error %v", &m, err)
	}
}

func TestReaderRefusesWhatIsCutShort(t *testing.T) {
	whole := containerReply(t, map[string]string{"lace.network": "backend"})
	for n := 1; n < len(whole); n++ {
		if _, err := containerLabels(whole[:n]); err == nil {
			t.Errorf("the first %d of %d bytes are taken", n, len(whole))
		}
	}
	for _, bad := range [][]byte{{0xff}, {0x0b}, {0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}} {
		if _, err := containerLabels(bad); err == nil {
			t.Errorf("% x is taken", bad)
		}
	}
}

// FuzzReply: no answer of containerd makes the reader panic or invent bytes.
func FuzzReply(f *testing.F) {
	f.Add(containerReply(f, map[string]string{"lace.network": "backend"}))
	f.Add([]byte{0x0a, 0x04, 0x3a, 0x02, 0x0a, 0x00})
	f.Fuzz(func(t *testing.T, b []byte) {
		labels, err := containerLabels(b)
		size := 0
		for k, v := range labels {
			size += len(k) + len(v)
		}
		if err == nil && size > len(b) {
			t.Fatalf("%d bytes of labels from %d", size, len(b))
		}
		if e, err := sandboxExtension(b, "metadata"); err == nil && len(e) > len(b) {
			t.Fatalf("%d bytes of extension from %d", len(e), len(b))
		}
	})
}
