# `make help` lists what there is. Tools are pinned in tools/ and installed into .tmp/.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --warn-undefined-variables --no-builtin-rules --no-print-directory

# The modules of go.work; `go work edit -json` would need a JSON reader.
MODULES := $(shell sed -n 's|^[[:space:]]*\./||p' go.work)
# What needs other versions than the product.
TOOL_MODULES := tools/benchreport tools/charts tools/image tools/lint test/bench/peers
GOLANGCI_LINT := .tmp/bin/golangci-lint
BUF := tools/buf/node_modules/.bin/buf
AXE := tools/axe/node_modules/axe-core/axe.min.js
# What the protos are compared with: where this branch left main, on main itself the commit before.
BREAKING_AGAINST ?= $(shell git merge-base --is-ancestor HEAD origin/main 2>/dev/null && echo HEAD~1 || git merge-base HEAD origin/main 2>/dev/null || echo HEAD~1)
BENCH ?= .
BENCH_COUNT ?= 3
BENCH_TIME ?= 300ms
DURATION ?= 30m
SEED ?= 7
KILLS ?= 1000
STREAMS ?= 2000

# $(call in-modules,COMMAND): runs COMMAND in each module, then fails if any of them failed.
in-modules = failed=0; for module in $(MODULES); do echo "== $$module"; (cd $$module && $(1)) || failed=1; done; exit $$failed

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the static binaries into bin/
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o bin/allowednets-policy ./services/policy
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o bin/allowednets-sidecar ./sidecar
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o bin/allowednets-dashboard ./services/dashboard
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o bin/allowednets ./services/cli

.PHONY: images
images: ## Build the container images into bin/images/ (IMAGE_PREFIX= VERSION= PLATFORMS=)
	tools/images.sh

# Not `go run`, which answers Ctrl-C with an error.
.PHONY: run
run: build ## Start everything on this machine with sample data, until Ctrl-C
	go build -o .tmp/bin/devstack ./test/cmd/devstack
	@.tmp/bin/devstack

# -count=1: some tests read files outside of their module, such as docs/, where go test sees no change. The black-box tests come last
# and alone: they time what they see.
.PHONY: test
test: build $(AXE) ## Run all tests: vet, race detector, each module alone, end to end
	go vet $(MODULES:%=./%/...)
	@$(call in-modules,GOWORK=off go build ./... && GOWORK=off go vet ./...)
	go test -race -count=1 $(patsubst %,./%/...,$(filter-out test,$(MODULES)))
	go test -race -count=1 -p=1 -timeout=30m ./test/...

# Of their own modules: what they need would lift the product's. The first build of helm's and Kubernetes' packages takes minutes.
.PHONY: test-tools
test-tools: build ## Test the charts (lint, schemas, every values-*.yaml), the image builder, the report of the benchmarks and their peers
	cd tools/image && GOWORK=off go test ./...
	cd tools/benchreport && GOWORK=off go vet . && GOWORK=off go test .
	cd test/bench/peers && GOWORK=off go vet . && GOWORK=off go test -count=1 -timeout=5m .
	cd tools/charts && GOWORK=off go test -count=1 ./... # what it reads lies outside of the module, where go test sees no change

.PHONY: charts
charts: ## Write what the charts' READMEs say about values
	cd tools/charts && GOWORK=off go run . $(abspath charts/allowednets charts/allowednets-sidecar charts/examples/dovecot charts/examples/roundcube)

.PHONY: lint
lint: lint-go lint-proto lint-arrows lint-modules lint-docs breaking ## Run all checks that need no run of the product

.PHONY: lint-go
lint-go: $(GOLANGCI_LINT)
	$(GOLANGCI_LINT) config verify
	@$(call in-modules,$(abspath $(GOLANGCI_LINT)) run ./...)

.PHONY: lint-proto
lint-proto: $(BUF)
	$(BUF) lint
	$(BUF) format --diff --exit-code

.PHONY: lint-arrows
lint-arrows: $(GOLANGCI_LINT)
	tools/arrows.sh
	GOLANGCI_LINT=$(GOLANGCI_LINT) tools/arrows.sh prove

# One version of each dependency, and of Go, across modules; nothing missing and nothing left over.
.PHONY: lint-modules
lint-modules:
	@awk '$$1 == "require" {$$1 = ""; $$0 = $$0} ($$1 == "go" || $$2 ~ /^v[0-9]/) && $$1 !~ /^github.com\/allowednets\// { \
	    if ($$1 in version && version[$$1] != $$2) {print FILENAME ": " $$1 " " $$2 ", but " first[$$1] " has " version[$$1]; bad = 1} \
	    else {version[$$1] = $$2; first[$$1] = FILENAME}} END {exit bad}' go.work $(MODULES:%=%/go.mod)
	@$(call in-modules,GOWORK=off go mod tidy -diff)
	@for module in $(TOOL_MODULES); do (cd $$module && GOWORK=off go mod tidy -diff); done

.PHONY: lint-docs
lint-docs:
	tools/docs.sh

.PHONY: breaking
breaking: $(BUF) ## Compare the protos with $BREAKING_AGAINST (main, or the commit before)
	@rm -rf .tmp/breaking && mkdir -p .tmp/breaking
	@if git cat-file -e '$(BREAKING_AGAINST):proto' 2>/dev/null; then \
	    git archive '$(BREAKING_AGAINST)' buf.yaml proto | tar -x -C .tmp/breaking; \
	    echo '$(BUF) breaking --against $(BREAKING_AGAINST)'; $(BUF) breaking --against .tmp/breaking; \
	else echo 'breaking: nothing to compare with ($(BREAKING_AGAINST) has no protos here)'; fi

.PHONY: generate
generate: $(BUF) ## Generate gen/ from proto/
	rm -rf gen/allowednets
	$(BUF) generate

.PHONY: check-generated
check-generated: $(BUF) ## Fail if gen/ is not what proto/ generates
	@rm -rf .tmp/generated
	$(BUF) generate -o .tmp/generated
	diff -r .tmp/generated/gen/allowednets gen/allowednets

.PHONY: fmt
fmt: $(GOLANGCI_LINT) $(BUF) ## Format Go and protos
	@$(call in-modules,$(abspath $(GOLANGCI_LINT)) fmt ./...)
	$(BUF) format -w

.PHONY: tidy
tidy: ## Bring all modules to the same versions and tidy them
	@$(call in-modules,GOWORK=off go mod tidy)
	go work sync
	@$(call in-modules,GOWORK=off go mod tidy)
	@for module in $(TOOL_MODULES); do (cd $$module && GOWORK=off go mod tidy); done

# What starts whole processes interleaves what it compares by itself, once: no count, no time. pipefail: a benchmark that fails, fails.
.PHONY: bench
bench: build ## Run the benchmarks and plot them (BENCH=regexp BENCH_COUNT=3 BENCH_TIME=300ms BENCH_LARGE=1)
	{ go test -run='^$$' -bench='$(BENCH)' -benchmem -benchtime=$(BENCH_TIME) -count=$(BENCH_COUNT) -p=1 -timeout=0 ./internal/... ./sidecar/... ./services/policy/...; \
	    go test -run='^$$' -bench='$(BENCH)' -benchtime=1x -p=1 -timeout=0 ./test/bench; \
	    cd test/bench/peers && GOWORK=off go test -run='^$$' -bench='$(BENCH)' -benchtime=1x -timeout=0 .; } | tee bin/bench.txt
	$(MAKE) bench-report

.PHONY: bench-report
bench-report: ## Write the tables of bin/bench.txt to standard output and the plots to docs/images/bench
	@cd tools/benchreport && GOWORK=off go run . $(abspath bin/bench.txt docs/images/bench)

.PHONY: axe
axe: $(AXE) ## Fetch what the browser tests need

# One round of every fault lasts about four minutes. The first build of programs with a clock of their own takes minutes as well.
.PHONY: faults
faults: build ## Run the fault campaign (DURATION=30m SEED=7 KILLS=1000 STREAMS=2000)
	ALLOWEDNETS_E2E=required ALLOWEDNETS_FAULTS_CLOCK=1 ALLOWEDNETS_FAULTS_DURATION=$(DURATION) ALLOWEDNETS_FAULTS_SEED=$(SEED) \
	    ALLOWEDNETS_FAULTS_KILLS=$(KILLS) ALLOWEDNETS_FAULTS_STREAMS=$(STREAMS) go test -count=1 -v -timeout=0 ./test/faults

# A build from source, so that it speaks the Go version of the modules it reads.
$(GOLANGCI_LINT): tools/lint/go.mod tools/lint/go.sum
	cd tools/lint && GOWORK=off CGO_ENABLED=0 go build -ldflags='-s -w' -o $(abspath $@) github.com/golangci/golangci-lint/v2/cmd/golangci-lint

# npm leaves old times on what it unpacks. The package needs no script to be run. Not --prefix: it also moves npm's global
# settings, where a machine's own certificates may be named.
$(BUF): tools/buf/package.json tools/buf/package-lock.json
	cd tools/buf && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

$(AXE): tools/axe/package.json tools/axe/package-lock.json
	cd tools/axe && npm ci --ignore-scripts --no-audit --no-fund
	touch $@
