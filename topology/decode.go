// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"encoding"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// MaxFile bounds what is read of a file: 1 MiB.
const MaxFile = 1 << 20

// ReadFile reads a file of at most MaxFile bytes.
func ReadFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > MaxFile {
		return nil, tooLong(path)
	}
	return data, nil
}

func tooLong(file string) Errors {
	return Errors{{File: file, Problem: "longer than 1 MiB", Fix: "is it the right file?"}}
}

// Decode reads TOML into a struct and reports all that does not fit it at once. A field is named
// by its tag: `toml:"key"` or `toml:"key,required"`, and `want:"…"` says what would be right.
// Types with UnmarshalText parse themselves; they may return an Error for a fix of their own.
//
// A value that does not fit leaves its field zero, and the others are read all the same, so that
// the caller can go on to look for more. The error is of type Errors. Lines is nil where the
// syntax is wrong and nothing was read.
func Decode(file string, data []byte, into any) (Lines, error) {
	if len(data) > MaxFile {
		return nil, tooLong(file)
	}
	lines, err := scanLines(file, string(data))
	if err != nil {
		return nil, err
	}
	values := map[string]any{}
	if _, err := toml.Decode(string(data), &values); err != nil {
		return nil, Errors{syntaxError(file, lines, err)}
	}
	d := decoder{file: file, lines: lines}
	d.table("", values, reflect.ValueOf(into).Elem())
	if len(d.errs) > 0 {
		return lines, d.errs.Sorted()
	}
	return lines, nil
}

func syntaxError(file string, lines Lines, err error) Error {
	var p toml.ParseError
	if !errors.As(err, &p) {
		return Error{File: file, Problem: err.Error()}
	}
	problem := p.Message
	if problem == "" {
		problem = strings.TrimPrefix(p.Error(), fmt.Sprintf("toml: line %d: ", p.Position.Line))
	}
	return Error{File: file, Line: p.Position.Line, Key: lines.at(p.Position.Line), Problem: problem}
}

type decoder struct {
	file  string
	lines Lines
	errs  Errors
}

func (d *decoder) fail(key, problem, fix string) {
	d.errs = append(d.errs, Error{File: d.file, Line: d.lines.Of(key), Key: key, Problem: problem, Fix: fix})
}

// table fills a struct, and refuses the keys that it has no field for.
func (d *decoder) table(path string, values map[string]any, into reflect.Value) {
	known := map[string]bool{}
	for field, value := range into.Fields() {
		key, option, _ := strings.Cut(field.Tag.Get("toml"), ",")
		known[key] = true
		want := field.Tag.Get("want")
		if v, ok := values[key]; ok {
			d.value(joinKey(path, key), v, value, want)
		} else if option == "required" {
			d.fail(joinKey(path, key), "is missing", "add "+want)
		}
	}
	for _, key := range sortedKeys(values) {
		if !known[key] {
			d.fail(joinKey(path, key), "unknown key", unknownFix(key, sortedKeys(known)))
		}
	}
}

func unknownFix(key string, known []string) string {
	if near := Nearest(key, known); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	return "known here: " + strings.Join(known, ", ")
}

// chooser is a type that may be written in several ways: choose returns a pointer to what the value
// is read into.
type chooser interface{ choose(v any) any }

// value fills one field from one value of the file.
func (d *decoder) value(path string, v any, into reflect.Value, want string) {
	if c, ok := into.Addr().Interface().(chooser); ok {
		into = reflect.ValueOf(c.choose(v)).Elem()
	}
	if u, ok := into.Addr().Interface().(encoding.TextUnmarshaler); ok {
		d.text(path, v, u, want)
		return
	}
	switch into.Kind() {
	case reflect.Pointer:
		before, there := len(d.errs), reflect.New(into.Type().Elem())
		if d.value(path, v, there.Elem(), want); len(d.errs) == before {
			into.Set(there)
		}
	case reflect.Struct:
		d.sub(path, v, want, func(t map[string]any) { d.table(path, t, into) })
	case reflect.Map:
		d.sub(path, v, want, func(t map[string]any) { d.names(path, t, into, want) })
	case reflect.Slice:
		d.list(path, v, into, want)
	default:
		d.scalar(path, v, into, want)
	}
}

func (d *decoder) text(path string, v any, u encoding.TextUnmarshaler, want string) {
	s, ok := v.(string)
	if !ok {
		d.fail(path, "is "+kindOf(v), "write "+want)
		return
	}
	err := u.UnmarshalText([]byte(s))
	if err == nil {
		return
	}
	var own Error
	if !errors.As(err, &own) {
		own.Problem = err.Error()
	}
	if own.Fix == "" {
		own.Fix = "write " + want
	}
	d.fail(path, own.Problem, own.Fix)
}

func (d *decoder) sub(path string, v any, want string, fill func(map[string]any)) {
	t, ok := v.(map[string]any)
	if !ok {
		d.fail(path, "is "+kindOf(v), "write "+want)
		return
	}
	fill(t)
}

// names fills a map whose keys are the operator's own words.
func (d *decoder) names(path string, values map[string]any, into reflect.Value, want string) {
	into.Set(reflect.MakeMap(into.Type()))
	for _, key := range sortedKeys(values) {
		element := reflect.New(into.Type().Elem()).Elem()
		d.value(joinKey(path, key), values[key], element, want)
		into.SetMapIndex(reflect.ValueOf(key), element)
	}
}

// list fills a slice. An element that does not fit stays zero, so that the others keep their index.
func (d *decoder) list(path string, v any, into reflect.Value, want string) {
	if tables, ok := v.([]map[string]any); ok {
		v = untyped(tables)
	}
	values, ok := v.([]any)
	if !ok {
		d.fail(path, "is "+kindOf(v), "write "+want)
		return
	}
	into.Set(reflect.MakeSlice(into.Type(), len(values), len(values)))
	for i, e := range values {
		d.value(indexKey(path, i), e, into.Index(i), want)
	}
}

// untyped makes an array of tables an array like any other.
func untyped(tables []map[string]any) []any {
	values := make([]any, len(tables))
	for i, t := range tables {
		values[i] = t
	}
	return values
}

func (d *decoder) scalar(path string, v any, into reflect.Value, want string) {
	got := reflect.ValueOf(v)
	if got.Kind() != into.Kind() {
		d.fail(path, "is "+kindOf(v), "write "+want)
		return
	}
	into.Set(got.Convert(into.Type()))
}

// kindOf names the kind of a value as the TOML specification does.
func kindOf(v any) string {
	switch v := v.(type) {
	case string:
		return "the string " + shortQuote(v)
	case int64:
		return "the integer " + strconv.FormatInt(v, 10)
	case float64:
		return "a float"
	case bool:
		return "the boolean " + strconv.FormatBool(v)
	case time.Time:
		return "a date or time"
	case []any:
		return "an array"
	case []map[string]any:
		return "an array of tables"
	default:
		return "a table"
	}
}

// shortQuote quotes what the operator wrote, cut to a length that leaves a message readable.
func shortQuote(s string) string {
	const longest = 80
	if len(s) > longest {
		return strconv.Quote(s[:longest]) + "…"
	}
	return strconv.Quote(s)
}

func sortedKeys[V any](m map[string]V) []string {
	return slices.Sorted(maps.Keys(m))
}
