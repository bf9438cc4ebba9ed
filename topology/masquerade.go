// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"fmt"
	"strconv"
	"strings"
)

// Bounds of the ports that containers are masqueraded with.
const (
	minMasqueradePort  = 1024
	minMasqueradePorts = 256
)

// DefaultMasquerade is what holds where the file says nothing: the ports below those that Linux gives to its own sockets.
func DefaultMasquerade() Masquerade { return Masquerade{First: 4096, Last: 32767} }

// String is the range as the file has it.
func (m Masquerade) String() string { return fmt.Sprintf("%d-%d", m.First, m.Last) }

// MarshalText writes the range as the file has it.
func (m Masquerade) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText writes. It bounds nothing: that is for the file.
func (m *Masquerade) UnmarshalText(text []byte) error {
	first, last, _ := strings.Cut(string(text), "-")
	from, err := strconv.ParseUint(first, 10, 16)
	to, err2 := strconv.ParseUint(last, 10, 16)
	if err != nil || err2 != nil {
		return bad("", "%s is no range of ports", shortQuote(string(text)))
	}
	m.First, m.Last = uint16(from), uint16(to)
	return nil
}

// portRange is a range of ports that containers may be masqueraded with.
type portRange struct{ Masquerade }

func (r *portRange) UnmarshalText(text []byte) error {
	var m Masquerade
	if err := m.UnmarshalText(text); err != nil {
		return err
	}
	switch count := int(m.Last) - int(m.First) + 1; {
	case m.First > m.Last:
		return bad("", "%s has its ends the wrong way round", m)
	case m.First < minMasqueradePort:
		return bad(fmt.Sprintf("begin at %d or above", minMasqueradePort), "%d is a port of services", m.First)
	case count < minMasqueradePorts:
		return bad(fmt.Sprintf("make it at least %d", minMasqueradePorts), "%s has %d ports only", m, count)
	}
	r.Masquerade = m
	return nil
}
