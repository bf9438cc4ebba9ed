// SPDX-License-Identifier: Apache-2.0

// Mkimage packs a static busybox into an OCI image archive, so that containers can be run where no
// registry is to be had. The archive holds two images, see images, that share their one layer.
//
//	mkimage [-busybox /bin/busybox] -o busybox.tar
//
// The same busybox gives the same bytes: there are no times, no owners and no random order in the archive.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// An image is a name and what runs in it when the client names no command.
type image struct {
	name       string
	entrypoint []string
	cmd        []string
}

// The pause image sleeps for as long as its pod lives. As process 1 of the pod the shell reaps what is
// orphaned to it, and the trap makes it end at once on TERM, which process 1 would otherwise ignore.
var images = []image{
	{name: "lace.test/busybox:latest", cmd: []string{"/bin/sh"}},
	{name: "lace.test/pause:latest", entrypoint: []string{"/bin/sh", "-c",
		"trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"}},
}

const indexPage = "lace.test/busybox\n"

func main() {
	busybox := flag.String("busybox", "/bin/busybox", "the static busybox `file` to pack")
	out := flag.String("o", "", "the archive `file` to write")
	flag.Parse()
	if *out == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*busybox, *out); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func run(busybox, out string) error {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	applets, err := listApplets(busybox)
	if err != nil {
		return err
	}
	archive, err := pack(program, applets)
	if err != nil {
		return fmt.Errorf("pack %s: %w", busybox, err)
	}
	return os.WriteFile(out, archive, 0o644)
}

func listApplets(busybox string) ([]string, error) {
	output, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("ask %s for its applets (install the package busybox-static): %w", busybox, err)
	}
	return strings.Fields(string(output)), nil
}

// pack returns the OCI layout archive that holds the images.
func pack(program []byte, applets []string) ([]byte, error) {
	layer, err := layerTar(program, applets)
	if err != nil {
		return nil, err
	}
	blobs := map[string][]byte{}
	store(blobs, layer)
	index := ociIndex{SchemaVersion: 2, MediaType: mediaIndex}
	for _, img := range images {
		d, err := img.store(blobs, layer)
		if err != nil {
			return nil, err
		}
		index.Manifests = append(index.Manifests, d)
	}
	return layoutTar(index, blobs)
}

// layerTar returns the root file system: busybox, a link for each applet, and the directories and files
// that a runtime or an applet expects.
func layerTar(program []byte, applets []string) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	err := errors.Join(
		writeDirs(w, 0o755, "bin/", "dev/", "etc/", "proc/", "root/", "run/", "sys/", "var/", "www/"),
		writeDirs(w, 0o1777, "tmp/"),
		writeFile(w, "bin/busybox", 0o755, program),
		writeFile(w, "etc/group", 0o644, []byte("root:x:0:\n")),
		writeFile(w, "etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n")),
		writeFile(w, "www/index.html", 0o644, []byte(indexPage)),
		writeLinks(w, applets),
		w.Close(),
	)
	return buf.Bytes(), err
}

func writeDirs(w *tar.Writer, mode int64, names ...string) error {
	for _, name := range names {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode}); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(w *tar.Writer, name string, mode int64, content []byte) error {
	h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode, Size: int64(len(content))}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

func writeLinks(w *tar.Writer, applets []string) error {
	applets = slices.DeleteFunc(slices.Clone(applets), func(name string) bool { return name == "busybox" })
	slices.Sort(applets)
	for _, name := range slices.Compact(applets) {
		h := &tar.Header{Name: "bin/" + filepath.Base(name), Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
	}
	return nil
}

// layoutTar returns an OCI image layout (image-spec, image-layout.md) as a tar archive.
func layoutTar(index ociIndex, blobs map[string][]byte) ([]byte, error) {
	manifest, err := json.Marshal(index)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	err = errors.Join(
		writeFile(w, "oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`)),
		writeFile(w, "index.json", 0o644, manifest),
		writeBlobs(w, blobs),
		w.Close(),
	)
	return buf.Bytes(), err
}

func writeBlobs(w *tar.Writer, blobs map[string][]byte) error {
	names := make([]string, 0, len(blobs))
	for name := range blobs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := writeFile(w, "blobs/sha256/"+name, 0o644, blobs[name]); err != nil {
			return err
		}
	}
	return nil
}

// store keeps content among the blobs under its SHA-256 and returns its digest.
func store(blobs map[string][]byte, content []byte) string {
	sum := fmt.Sprintf("%x", sha256.Sum256(content))
	blobs[sum] = content
	return "sha256:" + sum
}

// storeJSON stores v and returns its descriptor.
func storeJSON(blobs map[string][]byte, mediaType string, v any) (ociDescriptor, error) {
	content, err := json.Marshal(v)
	if err != nil {
		return ociDescriptor{}, err
	}
	return ociDescriptor{MediaType: mediaType, Digest: store(blobs, content), Size: len(content)}, nil
}

// store adds the image's configuration and manifest to the blobs and returns the manifest's descriptor.
func (img image) store(blobs map[string][]byte, layer []byte) (ociDescriptor, error) {
	digest := store(blobs, layer)
	config, err := storeJSON(blobs, mediaConfig, img.config(digest))
	if err != nil {
		return ociDescriptor{}, err
	}
	d, err := storeJSON(blobs, mediaManifest, ociManifest{
		SchemaVersion: 2, MediaType: mediaManifest, Config: config,
		Layers: []ociDescriptor{{MediaType: mediaLayer, Digest: digest, Size: len(layer)}},
	})
	_, tag, _ := strings.Cut(img.name, ":")
	d.Platform = &ociPlatform{OS: "linux", Architecture: runtime.GOARCH}
	d.Annotations = map[string]string{
		"io.containerd.image.name":          img.name,
		"org.opencontainers.image.ref.name": tag,
	}
	return d, err
}

func (img image) config(layer string) ociConfig {
	c := ociConfig{OS: "linux", Architecture: runtime.GOARCH}
	c.Config.Env = []string{"PATH=/bin"}
	c.Config.Entrypoint, c.Config.Cmd = img.entrypoint, img.cmd
	c.RootFS.Type, c.RootFS.DiffIDs = "layers", []string{layer}
	return c
}
