// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/lace-net/lace/plugin/wire"
)

func podReply(t *testing.T, config string) []byte {
	t.Helper()
	record := `{"Version":"v1","Metadata":{"ID":"p1","NetNSPath":"/n","Config":` + config + `}}`
	b, err := proto.Marshal(&sandbox.StoreGetResponse{Sandbox: &types.Sandbox{SandboxID: "p1",
		Extensions: map[string]*anypb.Any{wire.SandboxMetadata: {TypeUrl: "t", Value: []byte(record)}}}})
	if err != nil {
		t.Fatal(err)
	}
	return framed(b)
}

func TestCNI(t *testing.T) {
	gone := filepath.Join(t.TempDir(), "gone.sock")
	eth0 := wire.Interface{Network: "backend", Name: "eth0", MAC: "02:00:00:00:00:01", MTU: 1460,
		IPs:      []netip.Prefix{netip.MustParsePrefix("10.40.1.7/24"), netip.MustParsePrefix("fd40::7/64")},
		Gateways: []netip.Addr{netip.MustParseAddr("10.40.1.1"), {}}}
	eth1 := wire.Interface{Network: "storage", Name: "eth1", MAC: "02:4c:0a:32:00:12", MTU: 1442,
		IPs: []netip.Prefix{netip.MustParsePrefix("10.50.0.18/24")}, Gateways: []netip.Addr{{}}}
	wired := agentThat(t, wire.Answer{Result: &wire.Result{Interfaces: []wire.Interface{eth0}}})
	twice := agentThat(t, wire.Answer{Result: &wire.Result{Interfaces: []wire.Interface{eth0, eth1}}})
	asks := containerdWith(t, "0", podReply(t, `{"labels":{"lace.network":"backend"}}`))
	plain := containerdWith(t, "0", podReply(t, `{"labels":{"app":"web"}}`))
	tests := []struct {
		name, command, version, agent, containerd, more string
		status                                          int
		want                                            string
	}{
		{"ADD", "ADD", "1.0.0", wired, gone, "", 0, `"interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"/n"}],"ips":[{"interface":0,"address":"10.40.1.7/24","gateway":"10.40.1.1"},{"interface":0,"address":"fd40::7/64"}]`},
		{"ADD 1.1.0 has the MTU", "ADD", "1.1.0", wired, gone, "", 0, `"mtu":1460`},
		{"ADD 0.4.0 has the family", "ADD", "0.4.0", wired, gone, "", 0, `{"version":"6","interface":0,"address":"fd40::7/64"}`},
		{"ADD with two networks", "ADD", "1.0.0", twice, gone, "", 0, `"interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"/n"},{"name":"eth1","mac":"02:4c:0a:32:00:12","sandbox":"/n"}],"ips":[{"interface":0,"address":"10.40.1.7/24","gateway":"10.40.1.1"},{"interface":0,"address":"fd40::7/64"},{"interface":1,"address":"10.50.0.18/24"}]`},
		{"ADD 1.1.0 has both MTUs", "ADD", "1.1.0", twice, gone, "", 0, `"mtu":1460,"sandbox":"/n"},{"name":"eth1","mac":"02:4c:0a:32:00:12","mtu":1442`},
		{"ADD of a pod that asks for nothing", "ADD", "1.0.0", agentThat(t, wire.Answer{}), gone, "", 0, `"ips":[{"address":"127.0.0.1/8"}]`},
		{"ADD refused", "ADD", "1.0.0", agentThat(t, wire.Answer{Error: "full"}), gone, "", 1, `"code":100,"msg":"lace: full"`},
		{"ADD without agent, asks by label", "ADD", "1.0.0", gone, asks, "", 1, `pod asks for network \"backend\", but the Lace agent is not running`},
		{"ADD without agent, asks by annotation", "ADD", "1.0.0", gone, gone, `,"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"lace.network":"backend"}}`, 1, `pod asks for network \"backend\"`},
		{"ADD without agent, asks for nothing", "ADD", "1.0.0", gone, plain, "", 0, "127.0.0.1/8"},
		{"ADD and nobody knows", "ADD", "1.0.0", gone, gone, "", 1, `"code":11`},
		{"DEL", "DEL", "1.0.0", wired, gone, "", 0, ""},
		{"DEL without agent", "DEL", "1.0.0", gone, gone, "", 0, ""},
		{"CHECK", "CHECK", "1.0.0", wired, gone, "", 0, ""},
		{"CHECK fails", "CHECK", "1.0.0", agentThat(t, wire.Answer{Error: "not wired"}), gone, "", 1, "not wired"},
		{"STATUS", "STATUS", "1.1.0", gone, gone, "", 0, ""},
		{"GC", "GC", "1.1.0", gone, gone, "", 0, ""},
		{"VERSION", "VERSION", "9.9.9", gone, gone, "", 0, `"supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]`},
		{"unknown command", "FLY", "1.0.0", gone, gone, "", 1, `"code":4`},
		{"unknown version", "ADD", "9.9.9", gone, gone, "", 1, `"code":1,`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			env := map[string]string{"CNI_COMMAND": tt.command, "CNI_CONTAINERID": "p1", "CNI_NETNS": "/n", "CNI_IFNAME": "eth0", "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=p"}
			conf := fmt.Sprintf(`{"cniVersion":%q,"name":"lace","type":"lace-cni","socket":%q,"containerd":%q%s}`, tt.version, tt.agent, tt.containerd, tt.more)
			var stdout bytes.Buffer
			status := cniMain(strings.NewReader(conf), &stdout, func(n string) string { return env[n] })
			if status != tt.status || !strings.Contains(stdout.String(), tt.want) || (tt.want == "") != (stdout.Len() == 0) {
				t.Errorf("status %d, stdout %s", status, &stdout)
			}
		})
	}
}

func TestCNIRefusesBadConfiguration(t *testing.T) {
	for _, conf := range []string{"", "{", strings.Repeat(" ", maxNetConf+1)} {
		var stdout bytes.Buffer
		if status := cniMain(strings.NewReader(conf), &stdout, func(string) string { return "ADD" }); status != 1 || !strings.Contains(stdout.String(), `"code":7`) {
			t.Errorf("%.10q: status %d, stdout %s", conf, status, &stdout)
		}
	}
}
