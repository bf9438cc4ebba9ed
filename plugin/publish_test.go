// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/plugin/wire"
)

// at is a port at one address; none where that is empty.
func at(address string, protocol uint8, port, to uint16) Publish {
	p := Publish{Protocol: protocol, Port: port, To: to}
	if address != "" {
		p.Address = netip.MustParseAddr(address)
	}
	return p
}

func TestParsePublish(t *testing.T) {
	for value, want := range map[string][]Publish{
		"8080:80":                         {at("", unix.IPPROTO_TCP, 8080, 80)},
		" 8080:80/tcp ":                   {at("", unix.IPPROTO_TCP, 8080, 80)},
		"53:5353/udp":                     {at("", unix.IPPROTO_UDP, 53, 5353)},
		"192.0.2.1:8080:80":               {at("192.0.2.1", unix.IPPROTO_TCP, 8080, 80)},
		"[2001:db8::1]:8080:80/udp":       {at("2001:db8::1", unix.IPPROTO_UDP, 8080, 80)},
		"[2001:db8::]:1:65535":            {at("2001:db8::", unix.IPPROTO_TCP, 1, 65535)},
		"8080-8082:80-82":                 {at("", unix.IPPROTO_TCP, 8080, 80), at("", unix.IPPROTO_TCP, 8081, 81), at("", unix.IPPROTO_TCP, 8082, 82)},
		"65535-65535:1-1":                 {at("", unix.IPPROTO_TCP, 65535, 1)},
		"65534-65535:1-2":                 {at("", unix.IPPROTO_TCP, 65534, 1), at("", unix.IPPROTO_TCP, 65535, 2)},
		"53:53/udp , 53:53":               {at("", unix.IPPROTO_UDP, 53, 53), at("", unix.IPPROTO_TCP, 53, 53)},
		"80:80, 81:80":                    {at("", unix.IPPROTO_TCP, 80, 80), at("", unix.IPPROTO_TCP, 81, 80)},
		"192.0.2.1:80:80,192.0.2.2:80:80": {at("192.0.2.1", unix.IPPROTO_TCP, 80, 80), at("192.0.2.2", unix.IPPROTO_TCP, 80, 80)},
		"192.0.2.1:80:80,[fd00::1]:80:81": {at("192.0.2.1", unix.IPPROTO_TCP, 80, 80), at("fd00::1", unix.IPPROTO_TCP, 80, 81)},
	} {
		got, err := parsePublish(value)
		if d := cmp.Diff(want, got, equal); err != nil || d != "" {
			t.Errorf("%s: error %v\n%s", quote(value), err, d)
		}
	}
}

func TestParsePublishRefuses(t *testing.T) {
	for _, tt := range []struct{ value, want string }{
		{"", "names no port; write [ADDRESS:]PORT[-PORT]:PORT[-PORT][/tcp|/udp], as in 8080:80 or [2001:db8::1]:53:5353/udp"},
		{"80:80,", `"": names no port`},
		{"80:80,,81:81", `"": names no port`},
		{"8080", `names one port; write the node's and the container's, as in "8080:8080"`},
		{"80:80, 8080/udp", `"8080/udp": names one port; write the node's and the container's, as in "8080:8080"`},
		{"8080-8090", `as in "8080-8090:8080-8090"`},
		{"192.0.2.1:8080", `names one port; write the node's and the container's, as in "192.0.2.1:8080:8080"`},
		{"[fd00::1]:8080", `as in "[fd00::1]:8080:8080"`},
		{"web", "is no published port; write [ADDRESS:]"},
		{"192.0.2.1", "is no published port; write [ADDRESS:]"},
		{"0", "is no published port"},
		{"80:80/sctp", `has the protocol "sctp"; ports of tcp and udp can be published`},
		{"80/sctp", `has the protocol "sctp"`},
		{"80:80/TCP", `has the protocol "TCP"`},
		{"80:80/", `has the protocol ""`},
		{"80:80/tcp/udp", `has the protocol "tcp/udp"`},
		{":80", "has no port of the node; write"},
		{"80:", "has no port of the container; write"},
		{"192.0.2.1::80", "has no port of the node; write"},
		{":8080:80", "has an empty address; leave its colon away"},
		{"0:80", `has "0" where a port of the node belongs, which is a number from 1 to 65535`},
		{"80:0", `has "0" where a port of the container belongs`},
		{"65536:80", `has "65536" where`},
		{"+80:80", `has "+80" where`},
		{"80 :80", `has "80 " where`},
		{"http:80", `has "http" where`},
		{"80:http", `has "http" where a port of the container`},
		{"80-:80", `has "" where`},
		{"-80:80", `has "" where`},
		{"80-81-82:80", `has "81-82" where`},
		{"81-80:80-81", `has the range "81-80", which ends before it begins; write 80-81`},
		{"8000-8009:80", "has ports of the node and of the container in different number, 10 and 1; give ranges of one length"},
		{"1-257:1-257", "publishes 257 ports; a container has at most 256"},
		{"1-65535:1-65535", "publishes 65535 ports; a container has at most 256"},
		{"1-256:1-256,300:300", "publishes 257 ports"},
		{"80:80,80:81", "publishes 80/tcp twice; a port of the node leads to one port of a container"},
		{"79-81:79-81/udp,80:1/udp", "publishes 80/udp twice"},
		{"[fd00::1]:80:80,[fd00:0::1]:80:81", "publishes [fd00::1]:80/tcp twice"},
		{"80:80,192.0.2.1:80:81", "publishes 80/tcp and 192.0.2.1:80/tcp, but a port without an address is that of every address"},
		{"[fd00::1]:80:80,80:81", "publishes [fd00::1]:80/tcp and 80/tcp"},
		{"fd00::1:8080:80", `has an IPv6 address without brackets; write "[fd00::1]"`},
		{"::1:8080:80", `has an IPv6 address without brackets`},
		{"[192.0.2.1]:8080:80", "has an IPv4 address in brackets; write 192.0.2.1 without them"},
		{"[fd00::1:8080:80", `has "[fd00::1" where an IP address belongs; write`},
		{"localhost:8080:80", `has "localhost" where an IP address belongs`},
		{"eth0:8080:80", `has "eth0" where an IP address belongs`},
		{"[]:80:80", `has "[]" where`},
		{"[[fd00::1]]:80:80", `has "[[fd00::1]]" where`},
		{"192.0.2.0/24:80:80", `has the protocol "24:80:80"`},
		{"0.0.0.0:8080:80", "0.0.0.0 means every address of IPv4 alone, which cannot be published at; leave the address away to publish at every address of the node"},
		{"[::]:8080:80", ":: means every address of IPv6 alone"},
		{"127.0.0.1:8080:80", "127.0.0.1 is a loopback address, which cannot be published at alone; leave"},
		{"[::1]:8080:80", "::1 is a loopback address"},
		{"224.0.0.1:80:80", "224.0.0.1 is no global unicast address, as others reach the node by"},
		{"[ff02::1]:80:80", "ff02::1 is no global unicast address"},
		{"169.254.1.1:80:80", "169.254.1.1 is no global unicast address"},
		{"[fe80::1]:80:80", "fe80::1 is no global unicast address"},
		{"255.255.255.255:80:80", "255.255.255.255 is no global unicast address"},
		{"[fe80::1%eth0]:80:80", `"fe80::1%eth0" has a zone; leave %"eth0" away`},
		{"[::ffff:192.0.2.1]:80:80", "::ffff:192.0.2.1 is IPv4 written as IPv6; write 192.0.2.1"},
		{"80:\x1b[2J", `has "\x1b[2J" where`},
	} {
		got, err := parsePublish(tt.value)
		if err == nil || !strings.Contains(err.Error(), tt.want) || got != nil {
			t.Errorf("%s: %v, error %v, want %q", quote(tt.value), got, err, tt.want)
		}
	}
}

func TestPublishLabels(t *testing.T) {
	web, dns := at("", unix.IPPROTO_TCP, 8080, 80), at("192.0.2.1", unix.IPPROTO_UDP, 53, 5353)
	two := func(a, b []Publish) Request {
		return Request{Interfaces: []Interface{{Network: "a", IfName: "eth0", Gateway: true, Publish: a}, {Network: "b", IfName: "eth1", Publish: b}}}
	}
	behind := two(nil, []Publish{web})
	behind.Interfaces[0].Gateway, behind.Interfaces[1].Gateway = false, true
	nowhere := two([]Publish{web}, nil)
	nowhere.Interfaces[0].Gateway = false
	only := eth0("a.b")
	only.Publish = []Publish{dns}
	for name, tt := range map[string]struct {
		labels, annotations labelMap
		want                Request
	}{
		"the first network":                {labelMap{LabelNetwork: "a,b", LabelPublish: "8080:80"}, nil, two([]Publish{web}, nil)},
		"the one with the default route":   {labelMap{LabelNetwork: "a,b", "lace.net.b.gateway": "true", LabelPublish: "8080:80"}, nil, behind},
		"one of two":                       {labelMap{LabelNetwork: "a,b", "lace.net.b.publish": "8080:80"}, nil, two(nil, []Publish{web})},
		"both":                             {labelMap{LabelNetwork: "a,b", LabelPublish: "8080:80", "lace.net.b.publish": "192.0.2.1:53:5353/udp"}, nil, two([]Publish{web}, []Publish{dns})},
		"without a default route, by name": {labelMap{LabelNetwork: "a,b", "lace.net.a.gateway": "false", "lace.net.a.publish": "8080:80"}, nil, nowhere},
		"a name with a dot":                {labelMap{LabelNetwork: "a.b", "lace.net.a.b.publish": "192.0.2.1:53:5353/udp"}, nil, one(only)},
		"the annotation wins":              {labelMap{LabelNetwork: "a.b", LabelPublish: "1-256:1-256"}, labelMap{LabelPublish: "192.0.2.1:53:5353/udp"}, one(only)},
		"annotations alone":                {nil, labelMap{LabelNetwork: "a.b", LabelPublish: "192.0.2.1:53:5353/udp"}, one(only)},
	} {
		got, asks, err := ParseLabels(tt.labels, tt.annotations)
		if d := cmp.Diff(tt.want, got, equal); !asks || err != nil || d != "" {
			t.Errorf("%s: asks %v, error %v\n%s", name, asks, err, d)
		}
	}
}

func TestPublishLabelsThatDisagree(t *testing.T) {
	for name, tt := range map[string]struct {
		labels labelMap
		want   []string // the lines of the error, and no more
	}{
		"no network":            {labelMap{LabelPublish: "80"}, []string{`"lace.publish" is set, but lace.network is not`, `lace.publish = "80": names one port`}},
		"one of a list":         {labelMap{LabelNetwork: "a", LabelPublish: "80:80, 81"}, []string{`lace.publish = "80:80, 81": "81": names one port`}},
		"both forms":            {labelMap{LabelNetwork: "a", LabelPublish: "80:80", "lace.net.a.publish": "81:81"}, []string{"lace.publish and lace.net.a.publish are both set and mean the same"}},
		"both forms, elsewhere": {labelMap{LabelNetwork: "a,b", "lace.net.b.gateway": "true", LabelPublish: "80:80", "lace.net.b.publish": "81:81"}, []string{"lace.publish and lace.net.b.publish are both set"}},
		"no default route": {labelMap{LabelNetwork: "a,b", "lace.net.a.gateway": "false", LabelPublish: "80:80"},
			[]string{"lace.publish means the network with the default route, which none of the container's is; write lace.net.a.publish instead, for the network that is meant"}},
		"a default route that makes no sense": {labelMap{LabelNetwork: "a", "lace.net.a.gateway": "maybe", LabelPublish: "80:80"}, []string{"is neither true nor false"}},
		"a port of two networks": {labelMap{LabelNetwork: "a,b", LabelPublish: "80:80", "lace.net.b.publish": "192.0.2.1:80:80"},
			[]string{`the container, in its networks "a" and "b", publishes 80/tcp and 192.0.2.1:80/tcp, but`}},
		"too many of two networks": {labelMap{LabelNetwork: "a,b", LabelPublish: "1-200:1-200", "lace.net.b.publish": "201-257:1-57"},
			[]string{"the container, in all of its networks, publishes 257 ports; a container has at most 256"}},
		"a network that is not named": {labelMap{LabelNetwork: "a", "lace.net.b.publish": "80:80"}, []string{`"lace.net.b.publish" is about network "b"`}},
		"typo":                        {labelMap{LabelNetwork: "a", "lace.publsh": "80:80"}, []string{`(did you mean "lace.publish"?)`}},
		"typo of a network's":         {labelMap{LabelNetwork: "a", "lace.net.a.publishes": "80:80"}, []string{`(did you mean "lace.net.a.publish"?)`}},
		"long value":                  {labelMap{LabelNetwork: "a", LabelPublish: strings.Repeat("8", 5000)}, []string{"is 5000 bytes long; at most 4096"}},
	} {
		_, asks, err := ParseLabels(tt.labels, nil)
		if !asks || err == nil || strings.Count(err.Error(), "\n") != len(tt.want)-1 {
			t.Errorf("%s: asks %v, error %v", name, asks, err)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %v\nwant %q", name, err, want)
			}
		}
	}
}

// TestPublishedPortsHaveRoom lists as many ports, one by one, as a container may have.
func TestPublishedPortsHaveRoom(t *testing.T) {
	var list []string
	for port := range maxPublished {
		list = append(list, fmt.Sprintf("%d:%d/udp", 60000+port, 60000+port))
	}
	for _, key := range []string{LabelPublish, "lace.net.a.publish"} {
		r, _, err := ParseLabels(labelMap{LabelNetwork: "a", key: strings.Join(list, ",")}, nil)
		if err != nil || len(r.Interfaces[0].Publish) != maxPublished {
			t.Errorf("%s: %+v, error %v", key, r, err)
		}
	}
}

var publishing = labelMap{LabelNetwork: "backend", LabelPublish: "8080:80"}

// published lists what the data plane was asked to publish for a container.
func (b agentBed) published(container string) (all []string) {
	b.plane.mu.Lock()
	defer b.plane.mu.Unlock()
	for _, i := range b.plane.wired[container].Interfaces {
		for _, p := range i.Publish {
			all = append(all, fmt.Sprintf("%s %s to %d", i.Network, p, p.To))
		}
	}
	return all
}

// podAt is a pod that asks for published ports, as NRI shows it.
func podAt(netns string, labels, annotations labelMap) *api.PodSandbox {
	return &api.PodSandbox{Id: "p1", Name: "p", Labels: labels, Annotations: annotations,
		Linux: &api.LinuxPodSandbox{Namespaces: []*api.LinuxNamespace{{Type: "network", Path: netns}}}}
}

// TestEachWayToPublish has a label or an annotation reach the data plane by each way that containerd has to tell of it.
func TestEachWayToPublish(t *testing.T) {
	pid := process(t)
	netns := netnsPath(pid)
	byAnnotation := labelMap{LabelPublish: "8081:81/udp"}
	pod := wire.Pod{ID: "p1", Name: "p", Labels: publishing, Netns: netns}
	for name, tt := range map[string]struct {
		container string
		start     func(agentBed) string // returns the error
		want      string
	}{
		"hook, label": {"default/c1", func(b agentBed) string {
			b.add("c1", publishing, 0)
			return b.create("c1", pid).Error
		}, "backend 8080/tcp to 80"},
		"hook, annotation": {"default/c1", func(b agentBed) string {
			b.add("c1", publishing, 0)
			return b.handle(t.Context(), wire.Message{Stage: wire.CreateRuntime, Namespace: "default",
				State: &wire.State{ID: "c1", Pid: pid, Annotations: byAnnotation}}).Error
		}, "backend 8081/udp to 81"},
		"hook, with a record": {"default/c1", func(b agentBed) string {
			b.add("c1", merged(publishing, labelMap{RecordAddress: "10.40.1.7"}), 0)
			return b.create("c1", pid).Error
		}, "backend 8080/tcp to 80"},
		"CNI": {"k8s.io/p1", func(b agentBed) string {
			b.records.podByID["p1"] = pod
			return b.cni(wire.CNIAdd, "eth0").Error
		}, "backend 8080/tcp to 80"},
		"hook of a pod": {"k8s.io/p1", func(b agentBed) string {
			b.records.podByID["p1"] = pod
			return b.handle(t.Context(), wire.Message{Stage: wire.CreateRuntime, Namespace: wire.CRINamespace,
				State: &wire.State{ID: "p1", Annotations: labelMap{wire.KindAnnotation: wire.KindSandbox}}}).Error
		}, "backend 8080/tcp to 80"},
		"NRI, label": {"k8s.io/p1", func(b agentBed) string {
			return errorText(b.nri().RunPodSandbox(t.Context(), podAt(netns, publishing, nil)))
		}, "backend 8080/tcp to 80"},
		"NRI, annotation": {"k8s.io/p1", func(b agentBed) string {
			return errorText(b.nri().RunPodSandbox(t.Context(), podAt(netns, publishing, byAnnotation)))
		}, "backend 8081/udp to 81"},
		"running before the agent": {"default/c1", func(b agentBed) string {
			b.add("c1", publishing, pid)
			return errorText(b.synchronise(t.Context()))
		}, "backend 8080/tcp to 80"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newAgentBed()
			if refusal := tt.start(b); refusal != "" {
				t.Fatal(refusal)
			}
			if got := b.published(tt.container); !slices.Equal(got, []string{tt.want}) {
				t.Errorf("published %q, want %q; calls %v", got, tt.want, b.plane.calls)
			}
		})
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestBadPublishRefusesTheContainer(t *testing.T) {
	pid := process(t)
	bad := merged(publishing, labelMap{LabelPublish: "8080"})
	const want = `lace.publish = "8080": names one port; write the node's and the container's, as in "8080:8080"`
	b := newAgentBed()
	b.add("c1", bad, 0)
	b.records.podByID["p1"] = wire.Pod{ID: "p1", Name: "p", Labels: bad, Netns: netnsPath(pid)}
	for way, got := range map[string]string{
		"hook": b.create("c1", pid).Error,
		"CNI":  b.cni(wire.CNIAdd, "eth0").Error,
		"NRI":  strings.TrimPrefix(errorText(b.nri().RunPodSandbox(t.Context(), podAt(netnsPath(pid), bad, nil))), "lace: "),
	} {
		if got != want {
			t.Errorf("%s: %q, want %q", way, got, want)
		}
	}
	if b.plane.called("attach") {
		t.Errorf("calls %v", b.plane.calls)
	}
}

// FuzzPublish: any value gives ports in bounds, which can be written and read again, or a bounded, printable error.
func FuzzPublish(f *testing.F) {
	for _, value := range []string{"8080:80", "8080", "192.0.2.1:8080:80/tcp", "[2001:db8::1]:53-54:5353-5354/udp, 80:80", "80:80/sctp", "0.0.0.0:1:1",
		"1-256:2-257", "fd00::1:80:80", ":::", "[]:1:1", "1-65535:1-65535", "80:80,192.0.2.1:80:80", ",", "/"} {
		f.Add(value)
	}
	f.Fuzz(func(t *testing.T, value string) {
		all, err := parsePublish(value)
		if err != nil {
			if n := len(err.Error()); n > 1024 || len(all) != 0 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' }) {
				t.Fatalf("%d ports, error of %d bytes: %v", len(all), n, err)
			}
			return
		}
		checkPublished(t, all)
		if again, err := parsePublish(written(all)); err != nil || !slices.Equal(again, all) {
			t.Fatalf("%q became %q, error %v", value, written(all), err)
		}
	})
}

// checkPublished holds what the data plane may rely on.
func checkPublished(t *testing.T, all []Publish) {
	t.Helper()
	if len(all) > maxPublished {
		t.Fatalf("accepted %d ports", len(all))
	}
	for n, p := range all {
		if p.Port == 0 || p.To == 0 || p.Protocol != unix.IPPROTO_TCP && p.Protocol != unix.IPPROTO_UDP ||
			p.Address.IsValid() && (!p.Address.IsGlobalUnicast() || p.Address.Is4In6() || p.Address.Zone() != "") {
			t.Fatalf("accepted %+v", p)
		}
		if _, _, twice := firstOverlap(all[:n], all[n:n+1]); twice {
			t.Fatalf("accepted %s, which overlaps another of %v", p, all[:n])
		}
	}
}

// written is the label that asks for all.
func written(all []Publish) string {
	var list []string
	for _, p := range all {
		node, protocol, _ := strings.Cut(p.String(), "/")
		list = append(list, fmt.Sprintf("%s:%d/%s", node, p.To, protocol))
	}
	return strings.Join(list, ",")
}

// FuzzPublishLabels: whatever two labels and the place of the default route say, no two ports of a container overlap.
func FuzzPublishLabels(f *testing.F) {
	f.Add("8080:80", "8080:80", "false")
	f.Add("1-200:1-200", "[fd00::1]:300-350:1-51", "true")
	f.Add("80:80/udp", "192.0.2.1:80:80", "maybe")
	f.Fuzz(func(t *testing.T, common, second, gateway string) {
		labels := labelMap{LabelNetwork: "a,b", LabelPublish: common, "lace.net.b.publish": second, "lace.net.b.gateway": gateway}
		r, _, err := ParseLabels(maps.Clone(labels), nil)
		if err != nil {
			return
		}
		checkPublished(t, slices.Concat(r.Interfaces[0].Publish, r.Interfaces[1].Publish))
		if len(r.Interfaces[0].Publish) == 0 || len(r.Interfaces[1].Publish) == 0 {
			t.Fatalf("%q: %+v", labels, r)
		}
	})
}
