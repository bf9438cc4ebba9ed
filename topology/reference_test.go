// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// The reference file shows every key that the parser knows, so that none is a secret.
func TestReferenceShowsEveryKey(t *testing.T) {
	text, err := ReadFile("../conf/topology.toml")
	if err != nil {
		t.Fatal(err)
	}
	keys := keysOf(reflect.TypeFor[rawFile]())
	if len(keys) < 40 {
		t.Errorf("only %d keys found: %v", len(keys), keys)
	}
	for _, key := range keys {
		shown := regexp.MustCompile(`(?m)(^#?|[{,] )` + regexp.QuoteMeta(key) + ` = |^\[+` + regexp.QuoteMeta(key) + `[.\]]`)
		if !shown.Match(text) {
			t.Errorf("conf/topology.toml does not show %s", key)
		}
	}
}

// keysOf are the words of the file that the fields of a struct stand for, those inside of them too.
func keysOf(of reflect.Type) []string {
	var keys []string
	for of.Kind() == reflect.Map || of.Kind() == reflect.Slice || of.Kind() == reflect.Pointer {
		of = of.Elem()
	}
	if of.Kind() != reflect.Struct {
		return nil
	}
	for field := range of.Fields() {
		if key, _, _ := strings.Cut(field.Tag.Get("toml"), ","); key != "" {
			keys = append(append(keys, key), keysOf(field.Type)...)
		}
	}
	return keys
}
