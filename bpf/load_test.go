// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
)

// instructionLimit bounds what the verifier may have to look at for one program. The kernel's own
// limit is a million; far below it the programs stay quick to load and open to grow.
const instructionLimit = 30000

// TestVerifier loads every program in both forms of decapsulation.
func TestVerifier(t *testing.T) {
	needRoot(t)
	for name, byFlags := range map[string]uint8{"flags": 1, "change_proto": 0} {
		t.Run(name, func(t *testing.T) {
			spec := loadSpec(t)
			must(t, spec.Variables["decap_by_flags"].Set(byFlags))
			coll := load(t, spec)
			defer coll.Close()
			for name, p := range coll.Programs {
				checkInstructions(t, name, p)
			}
			if len(coll.Programs) < 10 {
				t.Errorf("only %d programs: the object is not whole", len(coll.Programs))
			}
		})
	}
}

func checkInstructions(t *testing.T, name string, p *ebpf.Program) {
	t.Helper()
	info, err := p.Info()
	must(t, err)
	verified, _ := info.VerifiedInstructions()
	size, err := info.TranslatedSize()
	must(t, err)
	t.Logf("%-28s %5d instructions, %6d verified", name, size/8, verified)
	if verified > instructionLimit {
		t.Errorf("program %s: the verifier looked at %d instructions, the limit is %d", name, verified, instructionLimit)
	}
}

// object is the spec, read once.
var object *ebpf.CollectionSpec

func loadSpec(t testing.TB) *ebpf.CollectionSpec {
	t.Helper()
	if object == nil {
		var err error
		object, err = bpf.LoadLace()
		must(t, err)
	}
	return object.Copy()
}

// load loads a collection and says what the verifier said.
func load(t testing.TB, spec *ebpf.CollectionSpec) *ebpf.Collection {
	t.Helper()
	coll, err := ebpf.NewCollection(spec)
	var rejected *ebpf.VerifierError
	if errors.As(err, &rejected) {
		t.Fatalf("the verifier refuses: %+v", rejected)
	}
	must(t, err)
	return coll
}

// TestVerifierErrorIsTold makes sure that the gate above can fail, and what it would say.
func TestVerifierErrorIsTold(t *testing.T) {
	needRoot(t)
	spec := loadSpec(t)
	p := spec.Programs["probe_empty"]
	p.Instructions = p.Instructions[:0]
	_, err := ebpf.NewCollection(spec)
	if err == nil || !strings.Contains(err.Error(), "probe_empty") {
		t.Errorf("a program without instructions: %v", err)
	}
}

// byFlags is what decapByFlags found; 0: nothing yet.
var byFlags int

// decapByFlags probes the kernel as the loader does, once.
func decapByFlags(t testing.TB) bool {
	t.Helper()
	if byFlags == 0 {
		byFlags = -1
		if probesFlags(t) {
			byFlags = 1
		}
	}
	return byFlags > 0
}

func probesFlags(t testing.TB) bool {
	t.Helper()
	p, err := ebpf.NewProgram(loadSpec(t).Programs["probe_decap"])
	must(t, err)
	defer p.Close()
	rc, err := p.Run(&ebpf.RunOptions{Data: outer(t, 4, plainV4(t)), DataOut: make([]byte, 512)})
	must(t, err)
	return rc == 0
}
