// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/safchain/ethtool"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// The segmenter is one pair per node. What the kernel would cut into packets only behind the uplink, it cuts when it leaves by the
// near end, which can send no more than a packet at a time; the packets come in at the far end. A frame in next header 143 has to go
// this way: no kernel can cut it later.
const (
	segmenterNear = "laces0"
	segmenterFar  = "laces1"
)

func needsSegmenter(p *plan.Plan) bool {
	return slices.ContainsFunc(p.Networks, func(n plan.Network) bool { return n.Type == topology.L2 })
}

// Segmenter gives the indexes of the pair that cuts large frames: they are sent out of near, and arrive at far in pieces.
// Both are 0 while no plan with an L2 network is applied.
func (h *Handle) Segmenter() (near, far int, err error) {
	n, f, err := h.host.pair(segmenterNear, segmenterFar)
	if n == nil || err != nil {
		return 0, 0, err
	}
	return n.Attrs().Index, f.Attrs().Index, nil
}

// segmenter makes the pair. It holds no addresses: nothing but what the programs send there ever passes.
func (a *applier) segmenter() error {
	near, far, err := a.pair(segmenterNear, segmenterFar)
	if err != nil {
		return err
	}
	return each(
		func() error { return near.segmenterEnd(cutsLater) },
		func() error { return far.segmenterEnd(joins) },
	)
}

func (d *device) segmenterEnd(unwanted func(feature string) bool) error {
	return each(
		func() error { return d.alias(segmenterAlias) },
		d.noIPv6,
		d.noLinkLocal,
		func() error { return d.mtu(maxMTU) },
		func() error { return d.without(unwanted) },
		d.up,
	)
}

// cutsLater are the features by which a device takes more than one packet at a time.
func cutsLater(feature string) bool {
	return strings.HasPrefix(feature, "tx-") && (strings.HasSuffix(feature, "-segmentation") || strings.HasPrefix(feature, "tx-gso-"))
}

// joins are those by which it makes several packets one.
func joins(feature string) bool {
	return strings.HasPrefix(feature, "rx-gro") || feature == "rx-udp-gro-forwarding"
}

// without switches features of the device off.
func (d *device) without(unwanted func(feature string) bool) error {
	err := inNetns(d.ns, func() error {
		e, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer e.Close()
		return d.switchOff(e, unwanted)
	})
	if err != nil {
		return fmt.Errorf("%s: switch offloads off: %w", d.object(), err)
	}
	return nil
}

func (d *device) switchOff(e *ethtool.Ethtool, unwanted func(feature string) bool) error {
	name := d.Attrs().Name
	on, err := active(e, name, unwanted)
	if err != nil || len(on) == 0 {
		return err
	}
	off := map[string]bool{}
	for _, feature := range on {
		off[feature] = false
	}
	if err := d.set("switch off "+strings.Join(on, " "), func() error { return e.Change(name, off) }); err != nil {
		return err
	}
	if on, err = active(e, name, unwanted); err == nil && len(on) > 0 {
		err = errors.New("the kernel keeps " + strings.Join(on, ", "))
	}
	return err
}

// active are the unwanted features that are on and can be switched, in order.
func active(e *ethtool.Ethtool, name string, unwanted func(feature string) bool) ([]string, error) {
	features, err := e.FeaturesWithState(name)
	if err != nil {
		return nil, fmt.Errorf("read the features: %w", err)
	}
	var on []string
	for feature, state := range features {
		if state.Active && unwanted(feature) {
			on = append(on, feature)
		}
	}
	slices.Sort(on)
	return on, nil
}
