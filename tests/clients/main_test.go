// SPDX-License-Identifier: Apache-2.0

// Package clients runs the whole of Lace: labs of the lace program with the real agent, programs in the
// kernel, real containerd, and nerdctl, ctr and CRI as users have them.
package clients

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"
)

const (
	image = "lace.test/busybox:latest"

	// patience bounds every wait for something that should happen soon.
	patience = 60 * time.Second
)

// lace is the program under test; lace-runc lies beside it.
var lace string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "lace-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	lace = filepath.Join(dir, "lace")
	build := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", dir,
		"github.com/lace-net/lace/cmd/lace", "github.com/lace-net/lace/cmd/lace-runc")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build lace and lace-runc: %v\n%s", err, output)
		return 1
	}
	sweep()
	return m.Run()
}

// labPrefix and the pid of the test make the name of a lab, with a letter for each lab of the test.
const labPrefix = "lacee2e"

var labForm = regexp.MustCompile(`^` + labPrefix + `(\d+)[a-z]$`)

// sweep takes down the labs of tests that were killed before they could.
func sweep() {
	entries, err := os.ReadDir("/run/lace-lab")
	if err != nil {
		return
	}
	for _, e := range entries {
		m := labForm.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		if pid, err := strconv.Atoi(m[1]); err == nil && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			output, err := exec.Command(lace, "lab", "down", "--name", e.Name()).CombinedOutput()
			fmt.Fprintf(os.Stderr, "took down %s of a test that is gone: %v %s", e.Name(), err, output)
		}
	}
}

// need skips the test where it cannot run.
func need(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a lab makes network and mount namespaces: run as root")
	}
	for _, name := range []string{"LACE_TOOLS_BIN", "LACE_IMAGE"} {
		if os.Getenv(name) == "" {
			t.Skipf("%s is not set: `make test` sets it after `make tools`", name)
		}
	}
	needPrograms(t, map[string]string{"ip": "iproute2", "ping": "iputils-ping", "nsenter": "util-linux"})
}

// needPrograms skips the test where a program of the machine is missing. Each is named with its Debian package.
func needPrograms(t *testing.T, packages map[string]string) {
	t.Helper()
	for program, pkg := range packages {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("there is no %s: install the package %s", program, pkg)
		}
	}
}
