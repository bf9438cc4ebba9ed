// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/lace-net/lace/plugin/wire"
)

// The labels and annotations by which a container asks for Lace.
const (
	LabelNetwork = wire.LabelNetwork
	LabelIP      = "lace.ip"
	LabelMAC     = "lace.mac"
	LabelName    = "lace.name"
	LabelSticky  = "lace.sticky"
	// LabelPublish means the network that the default route leads into.
	LabelPublish = "lace.publish"
	// LabelNet begins the labels of one network of several: LabelNet, its name, and one of the fields below.
	LabelNet = "lace.net."
)

// The fields of a network's own labels. The name before them may have dots too, they have none.
const (
	fieldIP      = "ip"
	fieldMAC     = "mac"
	fieldIfName  = "ifname"
	fieldGateway = "gateway"
	fieldPublish = "publish"
)

const (
	maxNetworks = 8 // of one container
	maxOdd      = 8 // labels that are refused by name: enough to mend them; the text stays bounded
)

var (
	userLabels = []string{LabelNetwork, LabelIP, LabelMAC, LabelName, LabelSticky, LabelPublish}
	netFields  = []string{fieldIP, fieldMAC, fieldIfName, fieldGateway, fieldPublish}
	nameForm   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)
)

// ParseLabels reads what a container asks for. Annotations win over labels, key by key. asks is false
// when it wants nothing of Lace. The Request has neither Container nor Netns, and Name only from
// lace.name; all errors of the labels are reported at once, in the same order always.
func ParseLabels(labels, annotations map[string]string) (r Request, asks bool, err error) {
	own := ownKeys(labels, annotations)
	if len(own) == 0 {
		return Request{}, false, nil
	}
	w := reading{own: own, said: map[string]bool{}}
	w.networks()
	w.perNetwork()
	w.common()
	w.agree()
	return w.Request, true, errors.Join(w.errs...)
}

func ownKeys(labels, annotations map[string]string) map[string]string {
	own := map[string]string{}
	for _, m := range []map[string]string{labels, annotations} {
		for k, v := range m {
			if strings.HasPrefix(k, wire.LabelPrefix) {
				own[k] = v
			}
		}
	}
	return own
}

// reading is one pass over the labels of a container.
type reading struct {
	Request
	own       map[string]string
	said      map[string]bool // the networks with a gateway label that makes sense
	published []Publish       // of LabelPublish, until it is known which network has the default route
	errs      []error
}

func (w *reading) refuse(format string, v ...any) { w.errs = append(w.errs, fmt.Errorf(format, v...)) }

// read gives the value of a label to set, if the label is there.
func (w *reading) read(key string, limit int, set func(value string) error) {
	value, ok := w.own[key]
	if !ok {
		return
	}
	var err error
	if len(value) > limit {
		err = fmt.Errorf("is %d bytes long; at most %d are taken", len(value), limit)
	} else {
		err = set(value)
	}
	if err != nil {
		w.refuse("%s = %s: %w", key, quote(value), err)
	}
}

// networks makes an interface for each network of LabelNetwork; none where that makes no sense.
func (w *reading) networks() {
	w.read(LabelNetwork, maxNetworks*(maxNetwork+2), func(value string) error {
		names, err := parseNetworks(value)
		for i, name := range names {
			w.Interfaces = append(w.Interfaces, Interface{Network: name, IfName: fmt.Sprintf("eth%d", i)})
		}
		return err
	})
}

// perNetwork reads the labels of single networks, and refuses all that are left.
func (w *reading) perNetwork() {
	odd := 0
	for _, key := range slices.Sorted(maps.Keys(w.own)) {
		if slices.Contains(userLabels, key) {
			continue
		}
		network, field, ok := splitNetLabel(key)
		i := w.interfaceOf(network)
		if ok && i != nil {
			w.read(key, limitOf(field), func(value string) error { return w.set(i, field, value) })
			continue
		}
		if odd++; odd <= maxOdd {
			w.refuseKey(key, network, ok)
		}
	}
}

// common reads the labels of the container; those of an interface mean its first.
func (w *reading) common() {
	if _, ok := w.own[LabelNetwork]; !ok {
		w.refuse("%s is set, but %s is not: name the network that the container is to join",
			quoteAll(slices.Sorted(maps.Keys(w.own))), LabelNetwork)
	}
	first := &Interface{}
	if len(w.Interfaces) > 0 {
		first = &w.Interfaces[0]
	}
	w.read(LabelIP, maxValue, func(value string) error { return first.set(fieldIP, value) })
	w.read(LabelMAC, maxValue, func(value string) error { return first.set(fieldMAC, value) })
	w.read(LabelName, maxValue, func(value string) (err error) { w.Name, err = parseName(value); return err })
	w.read(LabelPublish, maxPublish, func(value string) (err error) { w.published, err = parsePublish(value); return err })
	w.read(LabelSticky, maxValue, func(value string) (err error) { w.Sticky, err = parseBool(value); return err })
}

// splitNetLabel takes a network's label apart from both ends, since the name between them may have dots.
func splitNetLabel(key string) (network, field string, ok bool) {
	rest, ok := strings.CutPrefix(key, LabelNet)
	at := strings.LastIndexByte(rest, '.')
	if !ok || at <= 0 || !slices.Contains(netFields, rest[at+1:]) {
		return "", "", false
	}
	return rest[:at], rest[at+1:], true
}

// interfaceOf returns the interface in a network, nil where none is. While it is not known which networks are meant, each
// label gets an interface of its own, so that the errors of its value are found all the same.
func (w *reading) interfaceOf(network string) *Interface {
	if len(w.Interfaces) == 0 {
		return &Interface{}
	}
	at := slices.IndexFunc(w.Interfaces, func(i Interface) bool { return i.Network == network })
	if at < 0 {
		return nil
	}
	return &w.Interfaces[at]
}

func (w *reading) refuseKey(key, network string, isNet bool) {
	hint := didYouMean(key, w.knownLabels())
	if isNet {
		w.refuse("%s is about network %s%s, which %s does not name; it names %s", quote(key), quote(network), hint, LabelNetwork,
			quoteAll(networkNames(w.Interfaces)))
		return
	}
	w.refuse("unknown label %s%s; Lace knows %s, and %s<network>. with %s", quote(key), hint,
		strings.Join(userLabels, ", "), LabelNet, strings.Join(netFields, ", "))
}

// knownLabels are all that this container may have.
func (w *reading) knownLabels() []string {
	known := slices.Clone(userLabels)
	for _, i := range w.Interfaces {
		for _, field := range netFields {
			known = append(known, netLabel(i.Network, field))
		}
	}
	return known
}

func netLabel(network, field string) string { return LabelNet + network + "." + field }

func networkNames(interfaces []Interface) (names []string) {
	for _, i := range interfaces {
		names = append(names, i.Network)
	}
	return names
}

// limitOf returns how many bytes the value of a field may have.
func limitOf(field string) int {
	if field == fieldPublish {
		return maxPublish
	}
	return maxValue
}

// set reads the value of one field of an interface.
func (w *reading) set(i *Interface, field, value string) error {
	err := i.set(field, value)
	if err == nil && field == fieldGateway {
		w.said[i.Network] = true
	}
	return err
}

// set reads the value of one field; what it was before stays where the value makes no sense.
func (i *Interface) set(field, value string) error {
	next := *i
	var err error
	switch field {
	case fieldIP:
		next.IPs, err = parseIPs(value)
	case fieldMAC:
		next.MAC, err = parseMAC(value)
	case fieldIfName:
		next.IfName, err = parseIfName(value)
	case fieldGateway:
		next.Gateway, err = parseBool(value)
	case fieldPublish:
		next.Publish, err = parsePublish(value)
	}
	if err == nil {
		*i = next
	}
	return err
}

// agree refuses labels that contradict each other, and decides which network has the default route where none says so.
func (w *reading) agree() {
	if len(w.Interfaces) == 0 {
		return
	}
	first := &w.Interfaces[0]
	w.notBoth(LabelIP, netLabel(first.Network, fieldIP))
	w.notBoth(LabelMAC, netLabel(first.Network, fieldMAC))
	w.distinctNames()
	var gateways []string
	for _, i := range w.Interfaces {
		if i.Gateway {
			gateways = append(gateways, i.Network)
		}
	}
	if len(gateways) > 1 {
		w.refuse("gateway is true for the networks %s; the default route leads into one of them only", quoteAll(gateways))
	}
	first.Gateway = first.Gateway || len(gateways) == 0 && !w.said[first.Network]
	w.placePublished()
	w.distinctPorts()
}

// placePublished gives what LabelPublish says to the network with the default route.
func (w *reading) placePublished() {
	if _, ok := w.own[LabelPublish]; !ok {
		return
	}
	at := slices.IndexFunc(w.Interfaces, func(i Interface) bool { return i.Gateway })
	if at < 0 {
		w.refuse("%s means the network with the default route, which none of the container's is; write %s instead, for the network that is meant",
			LabelPublish, netLabel(w.Interfaces[0].Network, fieldPublish))
		return
	}
	i := &w.Interfaces[at]
	w.notBoth(LabelPublish, netLabel(i.Network, fieldPublish))
	i.Publish = w.published
}

// distinctPorts refuses a port that two networks publish, and more ports than a container may have.
func (w *reading) distinctPorts() {
	total := 0
	for n, i := range w.Interfaces {
		total += len(i.Publish)
		for _, before := range w.Interfaces[:n] {
			if p, q, found := firstOverlap(before.Publish, i.Publish); found {
				w.refuse("the container, in its networks %s and %s, %w", quote(before.Network), quote(i.Network), publishedTwice(p, q))
			}
		}
	}
	if total > maxPublished {
		w.refuse("the container, in all of its networks, %w", tooManyPublished(total))
	}
}

func (w *reading) notBoth(a, b string) {
	_, hasA := w.own[a]
	_, hasB := w.own[b]
	if hasA && hasB {
		w.refuse("%s and %s are both set and mean the same; leave one of them away", a, b)
	}
}

func (w *reading) distinctNames() {
	of := map[string]string{}
	for _, i := range w.Interfaces {
		if other, taken := of[i.IfName]; taken {
			w.refuse("networks %s and %s both have the interface %s; give one of them another name with %s",
				quote(other), quote(i.Network), quote(i.IfName), netLabel(i.Network, fieldIfName))
			continue
		}
		of[i.IfName] = i.Network
	}
}
