# SPDX-License-Identifier: Apache-2.0

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
PREFIX  ?= /usr/local
GOBUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)"

.DEFAULT_GOAL := help
.PHONY: help build tools demo test bench generate check-generate lint install uninstall clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | while IFS="$$(printf '\t')" read -r t s; do printf '  make %-15s %s\n' "$$t" "$$s"; done

build: ## build bin/lace and bin/lace-runc, static
	$(GOBUILD) -o bin/lace ./cmd/lace
	$(GOBUILD) -o bin/lace-runc ./cmd/lace-runc

tools: ## bring containerd, ctr, runc, nerdctl, crictl and a busybox image into the cache
	scripts/setup tools
	scripts/tools

demo: ## show two nodes whose containers talk, on this machine, and take all of it down again
	scripts/demo

test: ## run all tests: lint, packages, nodes in namespaces, real containerd, VMs (needs root)
	scripts/test

bench: ## measure Lace against the bare wire, routing, VXLAN and kernel seg6 (needs root)
	scripts/bench

generate: ## compile bpf/ with the pinned clang into the committed objects
	scripts/setup generate
	go generate ./bpf/

check-generate: generate ## fail unless the committed objects are what bpf/ compiles to
	git diff --exit-code -- bpf
	@test -z "$$(git ls-files --others --exclude-standard -- bpf)" || { echo "bpf/ has files that are not committed"; exit 1; }

lint: ## gofmt, vet, staticcheck, shellcheck, clang-format
	scripts/lint

install: build ## put lace and lace-runc under PREFIX (/usr/local), nothing else
	install -D -m 755 bin/lace $(DESTDIR)$(PREFIX)/bin/lace
	install -D -m 755 bin/lace-runc $(DESTDIR)$(PREFIX)/bin/lace-runc

uninstall: ## remove what install put there; `lace uninstall` removes what runs
	rm -f $(DESTDIR)$(PREFIX)/bin/lace $(DESTDIR)$(PREFIX)/bin/lace-runc

clean: ## remove bin/; the cache of tools and kernels stays
	rm -rf bin
