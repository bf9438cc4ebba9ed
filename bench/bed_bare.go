// SPDX-License-Identifier: Apache-2.0

package main

import "context"

// bare is node to node with no pod and no tunnel: what the wire and the sockets can do.
var bare = kind{name: "bare", build: func(_ context.Context, b *bed) error {
	b.client, b.server = b.node[0], b.node[1]
	b.serverAt(wire4[1], wire6[1])
	return nil
}}
