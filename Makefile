# make demo: see it work. make test: every check. make check: before a commit.
GO          ?= go
STATICCHECK  = $(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2
BUF          = $(GO) run github.com/bufbuild/buf/cmd/buf@v1.75.0
GOOGLEAPIS   = github.com/gogo/googleapis@v1.4.1
PURE         = . ./gateway/... ./agentproto/... ./formats/... ./internal/... ./cmd/...

export GOFLAGS += -trimpath

.PHONY: build demo test check chaos fault-matrix soak soak-token bench corpus interop-trixie interop-systemd overload fuzz deps lint generated generate unit race hostile softhsm clean

build:
	CGO_ENABLED=0 $(GO) build -o bin/signwarden ./cmd/signwarden
	CGO_ENABLED=1 $(GO) build -o bin/signwardend ./cmd/signwardend

demo: deps build
	softhsm-tests/demo.sh

# Everything. What a fresh machine lacks is installed first, from its distribution.
test: deps lint generated race hostile softhsm

# The quick subset: no token, no tools.
check: lint unit

deps:
	softhsm-tests/install-deps.sh

lint:
	@test -z "$$(gofmt -l .)" || { echo "gofmt -w these:"; gofmt -l .; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags bench,chaos,corpus,soak,systemd ./softhsm-tests ./formats/...
	$(STATICCHECK) ./...
	$(GO) test -count=1 -run 'Imports' .

unit:
	$(GO) test -short ./gateway/... ./cmd/...

# Those that wait most come first, beside all others.
race:
	$(GO) test -race -timeout 20m ./hsm/worker ./hsm/... $(PURE)

# 10,000 damaged files of each format, with an eye on memory, which the race
# detector would hide.
hostile:
	$(GO) test -run 'Mutat' ./formats/...

# End to end. -count=1: it drives programs that the test cache does not see.
softhsm: .cache/sign-file/sign-file.c
	$(GO) test -count=1 -timeout 20m ./softhsm-tests/...

# The committed code is what the .proto files generate, and they are clean.
generated: .cache/googleapis
	$(BUF) lint
	rm -rf .cache/generated
	$(BUF) generate -o .cache/generated
	for f in gateway/gatewaypb/*.pb.go; do diff -u $$f .cache/generated/$$f || exit 1; done

generate: .cache/googleapis
	$(BUF) generate

# google/rpc/status.proto, which signwarden.v1 imports, from a pinned Go module.
.cache/googleapis:
	mkdir -p $@/google/rpc
	cd .cache && GOFLAGS=-modcacherw $(GO) mod download -json $(GOOGLEAPIS) >googleapis.json
	cp "$$(sed -n 's/.*"Dir": "\(.*\)".*/\1/p' .cache/googleapis.json)/google/rpc/status.proto" $@/google/rpc/
	chmod u+w $@/google/rpc/status.proto

.cache/sign-file/sign-file.c:
	softhsm-tests/sign-file-source.sh $(@D)

# Faults of the token, its module and its workers, and kills, at random moments, of
# workers, clients and gateways. Under 10 minutes on two CPUs.
chaos: deps
	$(GO) test -tags chaos -count=1 -timeout 30m -run 'TestChaos|TestFault|TestFewSessions|TestTokenReinitialised' -v ./softhsm-tests

# docs/fault-matrix.md as measured here.
fault-matrix: deps
	SIGNWARDEN_UPDATE=1 $(GO) test -count=1 -timeout 10m -run TestFaultMatrix ./softhsm-tests

# Ratios, each measured in one run beside what it is compared with.
bench: deps
	$(GO) test -tags bench -count=1 -timeout 60m -run TestBench -v ./softhsm-tests

# Clients of every kind at once, for a minute, some of them killed.
soak: deps
	$(GO) test -tags soak -count=1 -timeout 10m -run TestAgentLoad -v ./softhsm-tests

# No growth of memory, descriptors or goroutines: make soak-token SIGNATURES=300000, the least.
# Two million take a quarter of an hour, and 2 GB of /tmp for their audit log.
SIGNATURES ?= 2000000
soak-token: deps
	SIGNWARDEN_SOAK_SIGNATURES=$(SIGNATURES) $(GO) test -tags soak -count=1 -timeout 60m -run 'TestTokenSoak|TestWorkerSoak' -v ./softhsm-tests

# The agent with gpg 2.4, rpm 4.20 and sq 1.3, and PKCS#11 tools by OpenSSL's provider, in a
# Debian 13 tree; wants root and debootstrap.
interop-trixie: deps build
	softhsm-tests/interop-trixie.sh

# One principal floods and another asks for one signature at a time. Its goals are met on no
# machine of two CPUs that was tried: docs/PERFORMANCE.md has what was.
overload: deps
	$(GO) test -tags bench -count=1 -timeout 30m -run TestOverload -v ./softhsm-tests

# agent setup, and the agent's units, under a systemd --user that runs; wants root.
interop-systemd: deps
	$(GO) test -tags systemd -count=1 -timeout 10m -run TestAgentSetupSystemd -v ./softhsm-tests

# The kernel modules and EFI images of the distribution, unpacked and not installed,
# packages with every compressor, and 40,000 damaged files through a gateway.
corpus: deps .cache/sign-file/sign-file.c
	softhsm-tests/corpus.sh .cache/corpus
	SIGNWARDEN_CORPUS=$(CURDIR)/.cache/corpus/root \
	$(GO) test -tags corpus -count=1 -timeout 60m -run 'Corpus|HostileFiles' -v ./formats/... ./softhsm-tests \
		>.cache/corpus.log || { grep -v '^=== ' .cache/corpus.log; exit 1; }
	grep -E '^ok|_test.go:|^--- ' .cache/corpus.log

# Each parser for a while: make fuzz FUZZTIME=10m
FUZZTIME ?= 30s
fuzz:
	@for p in $$($(GO) list ./gateway/... ./agentproto/... ./formats/... ./internal/... ./hsm/...); do \
		for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz'); do \
			echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$p || exit 1; \
		done; \
	done

clean:
	rm -rf bin .cache
