// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
)

// tracked is one line of `lace conntrack`: a flow in both directions, with the names that belong to it.
type tracked struct {
	Protocol    string       `json:"protocol"` // "tcp", "udp", "icmp", "icmp6", or a number
	State       string       `json:"state"`    // "new", "answered", "established", "closing" or "closed"
	Src         netip.Addr   `json:"src"`      // that opened it
	SrcPort     uint16       `json:"src_port,omitempty"`
	Dst         netip.Addr   `json:"dst"`
	DstPort     uint16       `json:"dst_port,omitempty"`
	ICMPID      uint16       `json:"icmp_id,omitempty"`
	Age         int64        `json:"age"`      // seconds since the first packet
	Idle        int64        `json:"idle"`     // seconds since the last, of either direction
	Sent        amount       `json:"sent"`     // the way it was opened
	Answered    amount       `json:"answered"` // the other way
	OneWay      bool         `json:"one_way,omitempty"`
	Container   string       `json:"container,omitempty"` // that opened it, where it is of this node
	Name        string       `json:"name,omitempty"`      // … as people call it
	Network     string       `json:"network"`
	FromNode    string       `json:"from_node,omitempty"`    // that it was opened from, where it is another one
	ToContainer string       `json:"to_container,omitempty"` // that it was opened to, where it is of this node
	ToName      string       `json:"to_name,omitempty"`
	ToNetwork   string       `json:"to_network"`
	ToNode      string       `json:"to_node,omitempty"`
	Way         string       `json:"way"`               // the way it was opened: "container", "node", "out", "host" or "loopback"
	Rewrite     *translation `json:"rewrite,omitempty"` // what the addresses and ports become the way it was opened
	SID         netip.Addr   `json:"sid,omitzero"`      // outer destination the way it was opened
	File        string       `json:"file,omitempty"`    // the topology
	Line        uint32       `json:"line,omitempty"`    // … and the line of it that lets the flow pass
	Bridged     bool         `json:"bridged,omitempty"` // in frames that are carried as they are, inside of an L2 network
	Generation  uint32       `json:"generation"`        // of the tables that decided; another one is active: it is decided again

	from, to party
}

// amount is what went one way: packets, and bytes from the IP header on.
type amount struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// flowFilter is what the command line asks to see; zero fields ask for everything.
type flowFilter struct {
	network, container, protocol, state string
	address                             netip.Addr
	port                                uint
}

// check refuses what no flow could ever have.
func (f *flowFilter) check(flags *flag.FlagSet) error {
	f.address = f.address.Unmap()
	if f.state != "" && !slices.Contains(maps.FlowStates(), f.state) {
		return usagef(flags, "there is no state %q; it is one of %s", f.state, strings.Join(maps.FlowStates(), ", "))
	}
	if _, ok := protocolNumber(f.protocol); f.protocol != "" && !ok {
		return usagef(flags, "there is no protocol %q; it is tcp, udp, icmp, icmp6, sctp, or a number up to 255", f.protocol)
	}
	return checkPort(flags, f.port)
}

// protocols are those that have names here; ICMP has no ports.
var protocols = map[uint8]string{1: "icmp", 6: "tcp", 17: "udp", 58: "icmp6", 132: "sctp"}

func protocolName(p uint8) string { return cmp.Or(protocols[p], strconv.Itoa(int(p))) }

func isICMP(p uint8) bool { return p == 1 || p == 58 }

func protocolNumber(word string) (uint8, bool) {
	for p, name := range protocols {
		if name == word {
			return p, true
		}
	}
	p, err := strconv.ParseUint(word, 10, 8)
	return uint8(p), err == nil
}

// takesFlow says the same of both directions: addresses and ports are those before and after translation.
func (f flowFilter) takesFlow(n *names, v maps.Flow) bool {
	number, _ := protocolNumber(f.protocol)
	to := rewriteOf(v)
	return (f.protocol == "" || number == v.Protocol) &&
		(f.state == "" || f.state == maps.FlowStateName(v.State)) &&
		(!f.address.IsValid() || f.address == v.Src.Addr() || f.address == v.Dst.Addr() || to.hasAddress(f.address)) &&
		(f.port == 0 || !isICMP(v.Protocol) && (f.port == uint(v.Src.Port()) || f.port == uint(v.Dst.Port()) || to.hasPort(f.port))) &&
		(f.network == "" && f.container == "" || f.takesEnds(n, v))
}

func (f flowFilter) takesEnds(n *names, v maps.Flow) bool {
	from, to := n.endsOf(v)
	return (f.network == "" || f.network == from.Network || f.network == to.Network) &&
		(f.container == "" || from.is(f.container) || to.is(f.container))
}

func rewriteOf(v maps.Flow) *translation {
	return translated(v.Rewrite.Src, v.Rewrite.Dst, isICMP(v.Protocol))
}

// endsOf are those of one direction. A container is known by its own address, which a published port or a host's address stands for on
// one side of a translation, and by its interface, which the flow has where it goes to one.
func (n *names) endsOf(v maps.Flow) (from, to party) {
	src, dst := v.Src.Addr(), v.Dst.Addr()
	if v.Translated {
		dst = v.Rewrite.Dst.Addr()
	}
	var ifindex uint32
	if v.Way == maps.WayContainer {
		ifindex = v.Ifindex
	}
	return n.between(v.Network, v.To, 0, ifindex, src, dst)
}

// conntrack is a run of `lace conntrack`.
type conntrack struct {
	filter flowFilter
	asJSON bool
	all    bool
	names  *names
	table  maps.FlowTable
	out    *bufio.Writer
}

func runConntrack(_ context.Context, e *env, args []string) error {
	c := &conntrack{out: bufio.NewWriter(e.stdout)}
	run, file, err := c.parse(args)
	if err != nil {
		return err
	}
	s, err := agentSettings("conntrack", []string{"--config", file})
	if err != nil {
		return err
	}
	m, done, err := hook.OpenMaps(s.BPFFS)
	if err != nil {
		return err
	}
	defer done()
	if c.table, err = m.OpenFlows(); err != nil {
		return err
	}
	defer c.table.Close()
	if c.names, err = newNames(e, s); err != nil {
		return err
	}
	defer c.names.close()
	if err := run(); err != nil {
		return err
	}
	return c.out.Flush()
}

// parse reads the command line. The results are what to do, and the settings file.
func (c *conntrack) parse(args []string) (run func() error, file string, err error) {
	flags := newFlags("conntrack")
	config := flags.String("config", conf.DefaultFile, "settings `FILE`")
	flags.BoolVar(&c.asJSON, "json", false, "print JSON: one object a line for list")
	flags.BoolVar(&c.all, "all", false, "delete only: every flow")
	flags.StringVar(&c.filter.network, "network", "", "only from or to this `network`")
	flags.StringVar(&c.filter.container, "container", "", "only from or to the container with this `name` or namespace/id")
	flags.StringVar(&c.filter.protocol, "proto", "", "only of this `protocol`: tcp, udp, icmp, icmp6, sctp or a number")
	flags.StringVar(&c.filter.state, "state", "", "only in this `state`: "+strings.Join(maps.FlowStates(), ", "))
	flags.TextVar(&c.filter.address, "address", netip.Addr{}, "only from or to this `address`, before or after translation")
	flags.UintVar(&c.filter.port, "port", 0, "only from or to this `port`, before or after translation")
	what := "list"
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		what, args = args[0], args[1:]
	}
	if err := parseFlags(flags, args, 0); err != nil {
		return nil, "", err
	}
	if run, err = c.action(flags, what); err != nil {
		return nil, "", err
	}
	return run, *config, c.filter.check(flags)
}

func (c *conntrack) action(flags *flag.FlagSet, what string) (func() error, error) {
	filtered := c.filter != flowFilter{}
	switch {
	case what == "list" && !c.all:
		return c.list, nil
	case what == "count" && !c.all:
		return c.count, nil
	case what == "delete" && !c.all && !filtered:
		return nil, usagef(flags, "delete needs a filter, or --all for every flow of this node")
	case what == "delete" && c.all && filtered:
		return nil, usagef(flags, "delete takes either a filter or --all, not both")
	case what == "delete":
		return c.delete, nil
	case c.all:
		return nil, usagef(flags, "--all belongs to delete; %s takes all flows without it", what)
	}
	return nil, usagef(flags, "there is no %q; it is list, count or delete", what)
}

func (c *conntrack) takes(f maps.Flow) bool { return c.filter.takesFlow(c.names, f) }

// list streams the flows in the order of the table, which is none.
func (c *conntrack) list() error {
	if !c.asJSON {
		fmt.Fprintln(c.out, listHeader)
	}
	return maps.EachConnection(c.table, c.takes, func(v maps.Connection) error {
		return c.names.tracked(v).print(c.out, c.asJSON)
	})
}

// delete says how many flows it has removed. Packets of a flow that goes on are decided anew.
func (c *conntrack) delete() error {
	deleted := 0
	err := maps.EachFlow(c.table, func(f maps.Flow) error {
		if !c.takes(f) {
			return nil
		}
		gone, err := maps.DeleteFlow(c.table, f)
		if gone {
			deleted++
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("after %d flows: %w", deleted, err)
	}
	if c.asJSON {
		return json.NewEncoder(c.out).Encode(map[string]int{"deleted": deleted})
	}
	_, err = fmt.Fprintf(c.out, "deleted %s\n", count(deleted, "flow"))
	return err
}

// tally is what `lace conntrack count` prints.
type tally struct {
	fill
	Flows int                       `json:"flows"` // that the filter takes, both directions counted as one
	By    map[string]map[string]int `json:"by"`    // … by protocol and state
}

// fill says how full the table of flows is. A flow has two entries, one for each direction.
type fill struct {
	Entries int `json:"entries"`
	Max     int `json:"max"`
}

func (f fill) String() string {
	return fmt.Sprintf("%d of %d entries (%.1f %%)", f.Entries, f.Max, 100*float64(f.Entries)/float64(max(f.Max, 1)))
}

func (c *conntrack) count() error {
	t := tally{fill: fill{Max: int(c.table.MaxEntries())}, By: map[string]map[string]int{}}
	err := maps.EachFlow(c.table, func(f maps.Flow) error {
		t.Entries++
		if !f.Reply && c.takes(f) {
			t.add(protocolName(f.Protocol), maps.FlowStateName(f.State))
		}
		return nil
	})
	if err != nil {
		return err
	}
	if c.asJSON {
		return json.NewEncoder(c.out).Encode(t)
	}
	return t.print(c.out)
}

func (t *tally) add(protocol, state string) {
	t.Flows++
	if t.By[protocol] == nil {
		t.By[protocol] = map[string]int{}
	}
	t.By[protocol][state]++
}

func (t *tally) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	states := maps.FlowStates()
	fmt.Fprintf(w, "flows\t%d\ntable\t%s\n\nPROTO\t%s\n", t.Flows, t.fill, strings.ToUpper(strings.Join(states, "\t")))
	var names []string
	for p := range t.By {
		names = append(names, p)
	}
	slices.Sort(names)
	for _, p := range names {
		fmt.Fprint(w, p)
		for _, s := range states {
			fmt.Fprintf(w, "\t%d", t.By[p][s])
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

// tracked names what a flow is about.
func (n *names) tracked(c maps.Connection) *tracked {
	from, to := n.endsOf(c.Flow)
	switch {
	case c.Underlay:
		from.Node = n.peer(c.Peer, c.Source)
	case c.Way == maps.WayNode:
		to.Node = n.peer(c.Peer, c.SID)
	default:
		c.SID = netip.Addr{} // of a way that its peering names and that it does not go
	}
	t := &tracked{
		Protocol: protocolName(c.Protocol), State: maps.FlowStateName(c.State), Src: c.Src.Addr(), Dst: c.Dst.Addr(),
		Age: int64(c.Age.Seconds()), Idle: int64(c.Quiet().Seconds()), Sent: amount{c.Packets, c.Bytes}, OneWay: c.Answer == nil,
		Container: from.Container, Name: from.Name, Network: from.Network, FromNode: from.Node,
		ToContainer: to.Container, ToName: to.Name, ToNetwork: to.Network, ToNode: to.Node,
		Way: c.Way.String(), Rewrite: rewriteOf(c.Flow), SID: c.SID, Line: c.Line, Bridged: c.Bridged, Generation: c.Generation,
		from: from, to: to,
	}
	if isICMP(c.Protocol) {
		t.ICMPID = c.Src.Port()
	} else {
		t.SrcPort, t.DstPort = c.Src.Port(), c.Dst.Port()
	}
	if c.Answer != nil {
		t.Answered = amount{c.Answer.Packets, c.Answer.Bytes}
	}
	if c.Line != 0 {
		t.File = n.file
	}
	return t
}

const listFormat = "%-5s %-11s %7s %7s %13s %13s  %-36s  %s"

var listHeader = fmt.Sprintf(listFormat, "PROTO", "STATE", "AGE", "IDLE", "SENT", "ANSWERED", "FLOW", "FROM > TO, AND THE LINE THAT ALLOWS IT")

func (t *tracked) print(w io.Writer, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(t)
	}
	answered := t.Answered.String()
	if t.OneWay {
		answered = "-"
	}
	line := fmt.Sprintf(listFormat, t.Protocol, t.State, span(t.Age), span(t.Idle), t.Sent, answered, t.flow(), ends(t.from, t.to, "?"))
	was := &translation{Src: t.Src, SrcPort: t.SrcPort, Dst: t.Dst, DstPort: t.DstPort, ICMPID: t.ICMPID}
	for _, words := range t.Rewrite.words(was, t.to) {
		line += "  " + words
	}
	if t.Line != 0 {
		line += "  " + rule(t.File, t.Line)
	}
	if t.Bridged {
		line += "  bridged"
	}
	_, err := fmt.Fprintln(w, line)
	return err
}

func (t *tracked) flow() string {
	switch {
	case t.SrcPort != 0 || t.DstPort != 0:
		return fmt.Sprintf("%s > %s", netip.AddrPortFrom(t.Src, t.SrcPort), netip.AddrPortFrom(t.Dst, t.DstPort))
	case t.ICMPID != 0:
		return fmt.Sprintf("%s > %s id %d", t.Src, t.Dst, t.ICMPID)
	}
	return fmt.Sprintf("%s > %s", t.Src, t.Dst)
}

// String is "12/3.4K": packets and bytes.
func (a amount) String() string { return short(a.Packets) + "/" + short(a.Bytes) }

// short writes a number in at most six characters: 9999, 10.0K, 999.9G.
func short(n uint64) string {
	if n < 10000 {
		return strconv.FormatUint(n, 10)
	}
	v, unit := float64(n)/1000, 0
	for v >= 999.95 && unit < len("KMGTPE")-1 {
		v, unit = v/1000, unit+1
	}
	return fmt.Sprintf("%.1f%c", v, "KMGTPE"[unit])
}

// span writes seconds in at most seven characters: 59s, 12m05s, 5h02m, 12d03h.
func span(seconds int64) string {
	d := time.Duration(seconds) * time.Second
	switch day := 24 * time.Hour; {
	case d < time.Minute:
		return fmt.Sprintf("%ds", seconds)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, seconds%60)
	case d < day:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	default:
		return fmt.Sprintf("%dd%02dh", d/day, d%day/time.Hour)
	}
}
