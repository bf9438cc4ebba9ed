// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// side is one end of a peering as it is written: a name, or the labels that networks must have.
// Neither is there where it did not parse, which is reported then.
type side struct {
	name   *string
	labels *map[string]string
}

// choose reads a string as a name, and anything else as labels.
func (s *side) choose(v any) any {
	if _, ok := v.(string); ok {
		return &s.name
	}
	return &s.labels
}

// pair is a peering by the places of its networks.
type pair struct{ from, to int }

// resolver makes pairs of networks of the [[peering]] tables.
type resolver struct {
	complaints
	networks []*Network
	places   map[string]int
	labelled map[string]map[string]set // key, value: the networks that have this label
	reach    []set                     // by network: those that it may open flows to; of an external one also all external ones, which are never joined
	joins    map[pair]int              // line of the first peering that joins a pair
	named    map[pair]int              // line of the peering that has both ends by name
	external set
	ways     map[pair]way   // of the pairs that lead to an external network
	alike    map[sender]set // those that a network reaches in the same way
}

func (b *builder) peerings(raw []rawPeering) {
	if b.limit("peering", len(raw), MaxPeerings, "peerings"); len(raw) > MaxPeerings {
		return
	}
	r := newResolver(b)
	for i := range raw {
		r.peering(indexKey("peering", i), &raw[i])
	}
	if len(r.joins) > MaxPeerings {
		r.fail("peering", "leave some out, or split the topology", "more than %d pairs of networks", MaxPeerings)
		return
	}
	r.limit("peering", r.prefixes(), MaxPeerings, "prefixes of external networks, counted for each network that is peered with them")
	near := r.neighbours()
	r.overlaps(near)
	r.shadows(near)
	r.gatewaysOfPeered(near)
	r.tellRest()
	r.finish()
}

func newResolver(b *builder) *resolver {
	networks := b.topology.Networks
	r := &resolver{
		complaints: complaints{builder: b, of: "peering"}, networks: networks, places: map[string]int{}, labelled: map[string]map[string]set{},
		joins: map[pair]int{}, named: map[pair]int{}, external: newSet(len(networks)), ways: map[pair]way{}, alike: map[sender]set{},
	}
	for i, n := range networks {
		r.places[n.Name] = i
		r.reach = append(r.reach, newSet(len(networks)))
		for key, value := range n.Labels {
			r.having(key, value).add(i)
		}
		if n.Type == External {
			r.external.add(i)
		}
	}
	for i := range r.external.all() {
		copy(r.reach[i], r.external) // so that none of those pairs is ever new
	}
	return r
}

// having is the set of networks that have a label, to be added to.
func (r *resolver) having(key, value string) set {
	values := r.labelled[key]
	if values == nil {
		values = map[string]set{}
		r.labelled[key] = values
	}
	if values[value] == nil {
		values[value] = newSet(len(r.networks))
	}
	return values[value]
}

// finish hands the pairs over, sorted by name.
func (r *resolver) finish() {
	for p, line := range r.joins {
		w := r.ways[p]
		r.topology.Peerings = append(r.topology.Peerings, Peering{
			From: r.networks[p.from].Name, To: r.networks[p.to].Name, Masquerade: w.masquerade, Egress: w.egress, Line: line,
		})
	}
	slices.SortFunc(r.topology.Peerings, func(x, y Peering) int {
		return cmp.Or(strings.Compare(x.From, y.From), strings.Compare(x.To, y.To))
	})
}

// peering adds the pairs of one table.
func (r *resolver) peering(key string, p *rawPeering) {
	from, to := r.side(joinKey(key, "from"), &p.From), r.side(joinKey(key, "to"), &p.To)
	if from == nil || to == nil {
		return
	}
	w, ok := r.way(key, p, to)
	if !ok || r.alone(key, p, from, to) || r.outerOnly(key, p, from, to) || r.again(key, p) {
		return
	}
	r.join(key, from, to, w)
	if p.Bidirectional {
		r.join(key, to, from, way{})
	}
}

// side is the networks that an end names or selects. It is nil where there are none, which is
// reported.
func (r *resolver) side(key string, s *side) set {
	switch {
	case s.labels != nil:
		return r.selected(key, *s.labels)
	case s.name == nil:
		return nil
	}
	place, ok := r.places[*s.name]
	if !ok {
		r.unknownName(key, "network", *s.name, maps.Keys(r.places))
		return nil
	}
	one := newSet(len(r.networks))
	one.add(place)
	return one
}

// selected is the networks that have all of the labels.
func (r *resolver) selected(key string, labels map[string]string) set {
	if len(labels) == 0 {
		r.complain(key, `write at least one label, as { tier = "web" }, or a name`, "selects by no label")
		return nil
	}
	if len(labels) > maxLabels {
		r.complain(key, "leave some out", "%d labels; a network has at most %d", len(labels), maxLabels)
		return nil
	}
	found := newSet(len(r.networks))
	for i := range r.networks {
		found.add(i)
	}
	for _, name := range sortedKeys(labels) {
		having := r.labelled[name][labels[name]]
		if having == nil {
			r.unknownLabel(key, name, labels[name])
			return nil
		}
		found.keep(having)
	}
	if found.empty() {
		r.complain(key, "leave a label out, or give one network all of them", "no network has all of %s", inline(labels))
		return nil
	}
	return found
}

// unknownLabel says which labels there are: keys where the key is unknown, else its values.
func (r *resolver) unknownLabel(key, name, value string) {
	values, ok := r.labelled[name]
	switch {
	case r.full():
		r.wrong++
	case !ok:
		r.complain(key, among(name, sortedKeys(r.labelled), "network with labels"), "no network has a label %s", shortQuote(name))
	default:
		r.complain(key, among(value, sortedKeys(values), "value"), "no network has the label %s = %s", joinKey("", name), shortQuote(value))
	}
}

// alone refuses a peering that has the same one network on both sides.
func (r *resolver) alone(key string, p *rawPeering, from, to set) bool {
	place, met := from.common(to)
	if !met || from.count() != 1 || to.count() != 1 {
		return false
	}
	if p.From.name != nil && p.To.name != nil {
		key = joinKey(key, "to")
	}
	r.complain(key, "choose another: inside a network nothing is in the way", "joins %s with itself only", r.networks[place].Name)
	return true
}

// again refuses a pair that two peerings have by name: which of the lines decides would be unclear.
func (r *resolver) again(key string, p *rawPeering) bool {
	if p.From.name == nil || p.To.name == nil {
		return false
	}
	there := pair{r.places[*p.From.name], r.places[*p.To.name]}
	pairs := []pair{there}
	if p.Bidirectional {
		pairs = append(pairs, pair{there.to, there.from})
	}
	for _, x := range pairs {
		if line, ok := r.named[x]; ok {
			r.complain(key, "leave one out", "%s to %s is there already (line %d)", r.networks[x.from].Name, r.networks[x.to].Name, line)
			return true
		}
	}
	for _, x := range pairs {
		r.named[x] = r.lines.Of(key)
	}
	return false
}

// join adds all pairs of different networks that are not there yet. It stops where there are too many, and where a pair is there
// in another way.
func (r *resolver) join(key string, from, to set, w way) {
	line := r.lines.Of(key)
	for i := range from.all() {
		if r.otherwise(key, i, to, w) {
			return
		}
		for j := range to.without(r.reach[i]) {
			if i == j {
				continue
			}
			if len(r.joins) > MaxPeerings {
				return
			}
			r.reach[i].add(j)
			r.joins[pair{i, j}] = line
			r.leave(i, j, w)
		}
	}
}

// placed is a subnet, and where the file has it.
type placed struct {
	netip.Prefix
	network int // its place
	key     string
	line    int
}

// overlaps refuses overlapping subnets of two networks that meet: where they are peered, or both
// with the same third, or where both can be addressed from outside of the overlay, an address would mean two things.
func (r *resolver) overlaps(near []set) {
	checked, inside, open := make([]set, len(r.networks)), make([]set, len(r.networks)), r.open()
	for i := range checked {
		checked[i], inside[i] = newSet(len(r.networks)), newSet(len(r.networks))
		for j := range near[i].without(r.external) { // two that reach the same outside do not meet by that
			inside[i].add(j)
		}
	}
	var around []placed // what contains the subnet that is looked at
	for _, s := range r.subnetsOfMeeting(inside, open) {
		for len(around) > 0 && !around[len(around)-1].Overlaps(s.Prefix) {
			around = around[:len(around)-1]
		}
		for _, a := range around {
			i, j := min(a.network, s.network), max(a.network, s.network)
			if i != j && !checked[i].has(j) {
				checked[i].add(j)
				r.overlap(a, s, inside, open)
			}
		}
		around = append(around, s)
	}
}

// neighbours is, by network, what it is peered with in either direction.
func (r *resolver) neighbours() []set {
	near := make([]set, len(r.networks))
	for i := range near {
		near[i] = newSet(len(r.networks))
	}
	for p := range r.joins {
		near[p.from].add(p.to)
		near[p.to].add(p.from)
	}
	return near
}

// subnetsOfMeeting is sorted so that a prefix comes before all that it contains.
func (r *resolver) subnetsOfMeeting(near []set, open set) []placed {
	var all []placed
	for i, n := range r.networks {
		for k, s := range n.Subnets {
			if s.IsValid() && (open.has(i) || !near[i].empty()) {
				key := indexKey(networkKey(n.Name, "subnets"), k)
				all = append(all, placed{s, i, key, r.lines.Of(key)})
			}
		}
	}
	slices.SortStableFunc(all, func(x, y placed) int { return comparePrefix(x.Prefix, y.Prefix) })
	return all
}

// overlap reports two overlapping subnets at the later of their lines, where their networks meet.
func (r *resolver) overlap(x, y placed, near []set, open set) {
	third, shared := near[x.network].common(near[y.network])
	direct := near[x.network].has(y.network)
	if !direct && !shared && !(open.has(x.network) && open.has(y.network)) {
		return
	}
	if r.full() {
		r.wrong++ // there may be half a million, and no text of them is shown
		return
	}
	if cmp.Or(cmp.Compare(x.line, y.line), cmp.Compare(x.network, y.network)) > 0 {
		x, y = y, x
	}
	what := fmt.Sprintf("%s overlaps %s of %s (line %d)", y.Prefix, x.Prefix, r.networks[x.network].Name, x.line)
	switch {
	case direct:
		r.complain(y.key, "make them apart, or leave the peering out", "%s, with which it is peered (line %d)", what, r.joined(x.network, y.network))
	case shared:
		r.complain(y.key, "make them apart, or leave a peering out", "%s, and both are peered with %s (lines %d and %d)",
			what, r.networks[third].Name, r.joined(x.network, third), r.joined(y.network, third))
	default:
		r.complain(y.key, "make them apart, or close one of them", "%s, and both are open to the outside: %s to %s, %s to %s",
			what, r.networks[x.network].Name, r.opener(x.network), r.networks[y.network].Name, r.opener(y.network))
	}
}

// joined is the first line that peers two networks in either direction.
func (r *resolver) joined(i, j int) int {
	there, back := r.joins[pair{i, j}], r.joins[pair{j, i}]
	if there == 0 || back == 0 {
		return max(there, back)
	}
	return min(there, back)
}

// gatewaysOfPeered refuses a peered L2 network without a gateway of a family in which it meets another.
func (r *resolver) gatewaysOfPeered(near []set) {
	for i, n := range r.networks {
		for _, f := range []Family{V4, V6} {
			subnet := n.Subnet(f)
			if n.Type != L2 || !subnet.IsValid() || n.Gateway(f).IsValid() {
				continue
			}
			if j, met := r.meets(near[i], f); met {
				r.complain(networkKey(n.Name, "gateway"), fmt.Sprintf("add one, as %q, or leave the peering out", subnet.Addr().Next()),
					"is peered with %s (line %d) and has no %s gateway that leads there", r.networks[j].Name, r.joined(i, j), f)
			}
		}
	}
}

// meets is the first of some networks that has addresses of the family.
func (r *resolver) meets(others set, f Family) (place int, ok bool) {
	for j := range others.all() {
		if n := r.networks[j]; len(n.subnets(f)) > 0 || slices.ContainsFunc(n.Prefixes, func(p netip.Prefix) bool { return familyOf(p) == f }) {
			return j, true
		}
	}
	return 0, false
}
