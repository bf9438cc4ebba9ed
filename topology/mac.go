// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// MAC is an Ethernet address, comparable so that it can be part of a map key.
type MAC [6]byte

// GatewayMAC answers for the gateway of every network on every node, so that a container's neighbour entry stays right wherever
// it runs. Locally administered; its tail spells "lace".
var GatewayMAC = MAC{0x06, 0x00, 0x6c, 0x61, 0x63, 0x65}

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// MarshalText writes it as String does.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (m *MAC) UnmarshalText(text []byte) error {
	parts := strings.Split(string(text), ":")
	if len(parts) != len(m) {
		return fmt.Errorf("%q is no Ethernet address: write %d bytes in hexadecimal with colons between", text, len(m))
	}
	for i, part := range parts {
		b, err := hex.DecodeString(part)
		if err != nil || len(b) != 1 {
			return fmt.Errorf("%q is no Ethernet address: %q is no byte of two hexadecimal digits", text, part)
		}
		m[i] = b[0]
	}
	return nil
}
