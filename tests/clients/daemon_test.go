// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
)

// daemon is a program of the machine that runs in the network of a guest.
type daemon struct {
	*guest
	words []string
	mu    sync.Mutex
	text  bytes.Buffer
	stop  func()
}

// daemon starts a program that runs until it is stopped, at the latest with the test.
func (g *guest) daemon(words ...string) *daemon {
	g.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	d := &daemon{guest: g, words: words}
	cmd := command(ctx, g.exec(g.asMachine(words...)...)...)
	cmd.Stdout, cmd.Stderr = d, d
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	d.stop = sync.OnceFunc(func() {
		cancel()
		_ = cmd.Wait() // it was told to end
	})
	g.t.Cleanup(d.stop)
	return d
}

// Write takes what the program says, on both its streams.
func (d *daemon) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.Write(p)
}

func (d *daemon) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.String()
}

// says waits until the program has said something.
func (d *daemon) says(what string) {
	d.t.Helper()
	d.eventually(fmt.Sprintf("%s in %v says %q", d.words[0], d.guest, what), func() error {
		if text := d.String(); !strings.Contains(text, what) {
			return fmt.Errorf("it says:\n%s", text)
		}
		return nil
	})
}
