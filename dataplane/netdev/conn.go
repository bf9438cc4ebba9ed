// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// answerTimeout bounds the wait for one answer of the kernel.
const answerTimeout = 10 * time.Second

// The kernel's own words about a refused request become part of the error.
func init() { nl.EnableErrorMessageReporting = true }

// conn is a netlink connection to one network namespace, which it keeps open.
type conn struct {
	*netlink.Handle
	raw map[int]*nl.SocketHandle // for the requests that the library has no words for
	ns  netns.NsHandle
}

// dial connects to ns and owns it from then on.
func dial(ns netns.NsHandle) (*conn, error) {
	c := &conn{ns: ns}
	if err := inNetns(ns, c.open); err != nil {
		return nil, fmt.Errorf("open netlink sockets: %w", err)
	}
	return c, nil
}

// open makes the sockets in the namespace of the calling thread.
func (c *conn) open() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		h.Close()
		return err
	}
	c.Handle, c.raw = h, map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}
	tv := unix.NsecToTimeval(answerTimeout.Nanoseconds())
	return errors.Join(h.SetSocketTimeout(answerTimeout),
		s.SetReceiveTimeout(&tv), s.SetSendTimeout(&tv), s.SetExtAck(true))
}

func (c *conn) close() {
	c.Handle.Close()
	for _, s := range c.raw {
		s.Close()
	}
	c.ns.Close()
}

// request prepares a message that the library has no words for.
func (c *conn) request(kind, flags int, parts ...nl.NetlinkRequestData) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(kind, flags)
	r.Sockets = c.raw
	for _, p := range parts {
		r.AddData(p)
	}
	return r
}

// sysctl sets one value below /proc/sys/net, which shows the namespace of the thread that looks.
func (c *conn) sysctl(path, value string) error {
	return inNetns(c.ns, func() error { return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0) })
}

// readSysctl reads a number below /proc/sys/net; ok is false where there is none of that name: the kernel or the device lacks what it is about.
func (c *conn) readSysctl(path string) (value int32, ok bool, err error) {
	var text []byte
	err = inNetns(c.ns, func() (err error) { text, err = os.ReadFile("/proc/sys/net/" + path); return err })
	if errors.Is(err, os.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("read sysctl: %w", err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 32)
	if err != nil {
		return 0, false, fmt.Errorf("read sysctl %s: %w", path, err)
	}
	return int32(n), true, nil
}

// inNetns runs f on a thread in ns. A thread that cannot go back is thrown away with its goroutine.
func inNetns(ns netns.NsHandle, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("open the thread's network namespace: %w", err)
			return
		}
		defer home.Close()
		result <- visit(ns, f)
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return <-result
}

func visit(ns netns.NsHandle, f func() error) error {
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	return f()
}

// openNetns opens the network namespace at path. The descriptor stays that namespace's, whatever
// becomes of the path or of the process that it names.
func openNetns(path string) (netns.NsHandle, error) {
	ns, err := netns.GetFromPath(path)
	if errors.Is(err, os.ErrNotExist) {
		return ns, fmt.Errorf("open network namespace %s: it is gone: the container ended", path)
	}
	if err != nil {
		return ns, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	kind, err := unix.IoctlRetInt(int(ns), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		ns.Close()
		return netns.None(), fmt.Errorf("open network namespace %s: it is something else; a path like /proc/PID/ns/net is wanted", path)
	}
	return ns, nil
}

// links returns all interfaces by name.
func (c *conn) links() (map[string]netlink.Link, error) {
	all, err := list(c.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	byName := make(map[string]netlink.Link, len(all))
	for _, l := range all {
		byName[l.Attrs().Name] = l
	}
	return byName, nil
}

// link finds an interface by its name, nil where there is none.
func (c *conn) link(name string) (netlink.Link, error) {
	l, err := c.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for interface %s: %w", name, err)
	}
	if l.Attrs().Name != name { // found by an alternative name
		return nil, fmt.Errorf("interface %s has the alternative name %s: take it away (ip link property del dev %[1]s altname %[2]s)", l.Attrs().Name, name)
	}
	return l, nil
}

// removeLink deletes an interface; one that is gone already is fine.
func (c *conn) removeLink(l netlink.Link) error {
	err := c.LinkDel(l)
	if errors.Is(err, unix.ENODEV) || errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	return err
}

// few is up to how many links are removed one by one.
const few = 2

// removeLinks removes links of ours, of all that there are. The kernel waits for its packets once for each request, tens of
// milliseconds, so that many go by one that names a group. A link without an alias keeps the group that says whose it is, and
// goes alone, as all do where somebody else uses the group.
func (c *conn) removeLinks(doomed []netlink.Link, all map[string]netlink.Link) error {
	taken := slices.ContainsFunc(slices.Collect(maps.Values(all)), func(l netlink.Link) bool {
		return l.Attrs().Group == leaving && !owned(l)
	})
	var errs []error
	together := 0
	for _, l := range doomed {
		if len(doomed) > few && !taken && !halfMade(l) && c.LinkSetGroup(l, leaving) == nil {
			together++
			continue
		}
		if err := c.removeLink(l); err != nil {
			errs = append(errs, fmt.Errorf("remove %s %s: %w", l.Type(), l.Attrs().Name, err))
		}
	}
	if together == 0 {
		return errors.Join(errs...)
	}
	r := c.request(unix.RTM_DELLINK, unix.NLM_F_ACK, nl.NewIfInfomsg(unix.AF_UNSPEC),
		nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(leaving)))
	if _, err := r.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
		errs = append(errs, fmt.Errorf("remove %d links by their group: %w", together, err))
	}
	return errors.Join(errs...)
}

// unsupported reports an error by which a kernel says that it lacks a kind of link.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT)
}

func trimNul(b []byte) string { return strings.TrimRight(string(b), "\x00") }
