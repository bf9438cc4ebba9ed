// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// errTruncated says that a protobuf message ends inside a field.
var errTruncated = errors.New("containerd's answer is cut short")

// fields calls do for each length-delimited field of a protobuf message and steps over all others
// (protobuf encoding, "Message Structure").
func fields(b []byte, do func(number uint64, value []byte) error) error {
	for len(b) > 0 {
		tag, n := binary.Uvarint(b)
		if n <= 0 {
			return errTruncated
		}
		b = b[n:]
		value, rest, err := field(tag&7, b)
		if err != nil {
			return err
		}
		if tag&7 == 2 {
			if err := do(tag>>3, value); err != nil {
				return err
			}
		}
		b = rest
	}
	return nil
}

// field splits the value of a wire type from what follows it. The value of a varint is not of interest.
func field(wireType uint64, b []byte) (value, rest []byte, err error) {
	size := uint64(0)
	switch wireType {
	case 0:
		_, n := binary.Uvarint(b)
		if n <= 0 {
			return nil, nil, errTruncated
		}
		return nil, b[n:], nil
	case 1:
		size = 8
	case 5:
		size = 4
	case 2:
		l, n := binary.Uvarint(b)
		if n <= 0 {
			return nil, nil, errTruncated
		}
		size, b = l, b[n:]
	default:
		return nil, nil, fmt.Errorf("containerd's answer has a field of the unknown wire type %d", wireType)
	}
	if size > uint64(len(b)) {
		return nil, nil, errTruncated
	}
	return b[:size], b[size:], nil
}

// entry reads an entry of a map: the key is field 1, the value field 2.
func entry(b []byte) (key string, value []byte, err error) {
	err = fields(b, func(number uint64, v []byte) error {
		switch number {
		case 1:
			key = string(v)
		case 2:
			value = v
		}
		return nil
	})
	return key, value, err
}

// containerLabels reads GetContainerResponse{container 1: Container{labels 2: map<string, string>}}.
func containerLabels(b []byte) (map[string]string, error) {
	labels := map[string]string{}
	err := fields(b, func(number uint64, container []byte) error {
		if number != 1 {
			return nil
		}
		return fields(container, func(number uint64, label []byte) error {
			if number != 2 {
				return nil
			}
			key, value, err := entry(label)
			labels[key] = string(value)
			return err
		})
	})
	return labels, err
}

// sandboxExtension reads the value of StoreGetResponse{sandbox 1: Sandbox{extensions 7: map<string, Any>}}
// with this name; the value of an Any is its field 2.
func sandboxExtension(b []byte, name string) (extension []byte, err error) {
	err = fields(b, func(number uint64, sandbox []byte) error {
		if number != 1 {
			return nil
		}
		return fields(sandbox, func(number uint64, e []byte) error {
			if number != 7 {
				return nil
			}
			key, wrapped, err := entry(e)
			if err != nil || key != name {
				return err
			}
			_, extension, err = entry(wrapped)
			return err
		})
	})
	if err == nil && extension == nil {
		err = fmt.Errorf("containerd's record of the sandbox has no %q: CRI did not make it", name)
	}
	return extension, err
}
