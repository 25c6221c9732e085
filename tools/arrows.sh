#!/usr/bin/env bash
# Checks the arrows that must never exist (docs/architecture.md) through all dependencies; .golangci.yml (depguard)
# checks the direct imports. `arrows.sh prove` breaks each arrow in a copy of the tree and fails unless each is reported.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ours=github.com/allowednets/allowednets
listed=$(mktemp)
trap 'rm -rf "$listed" "${copy:-}"' EXIT
failed=0

complain() {
  echo "$*" >&2
  failed=1
}

# never NUMBER [-test] PACKAGES REGEXP: no package of PACKAGES may depend on a package that begins with REGEXP.
never() {
  local number=$1 flag='' bad
  shift
  if [[ $1 == -test ]]; then flag=$1 && shift; fi
  # -e: a missing or forbidden package is still listed; the compiler reports it better.
  go list -e -deps ${flag:+"$flag"} "$1" >"$listed" 2>/dev/null
  while read -r bad; do
    complain "arrow $number: $1 must not depend on $bad (to see the way: cd ${1%%/...} && GOWORK=off go mod why $bad)"
  done < <(sed 's/ .*//' "$listed" | grep -E "^($2)(/|\$)" | sort -u)
}

# Doors do not know each other: without one door's file, no other door may fail to compile. Every file that is not named
# as shared here is a door.
doors() {
  local dir=sidecar/internal/check shared=' decider.go denial.go fault.go flat.go http.go label.go text.go word.go ' door line
  [[ -d $dir ]] || return 0
  local -a files
  read -ra files < <(go list -e -f '{{join .GoFiles " "}}' "./$dir")
  for door in "${files[@]}"; do
    [[ $shared != *" $door "* ]] || continue
    while read -r line; do
      [[ $shared == *" ${line%%:*} "* ]] || complain "arrow 8: $dir/${line%%:*} depends on door $door: ${line#*: }"
    done < <(cd "$dir" && for f in "${files[@]}"; do [[ $f == "$door" ]] || echo "$f"; done |
      xargs go build -gcflags=-e -o /dev/null 2>&1 | sed -n 's/^\.\///p' | sort -u)
  done
}

check() {
  never 1 -test ./sidecar/... 'go\.etcd\.io|go\.uber\.org/zap'
  never 2 -test ./sidecar/... "$ours/services"
  never 2 -test ./services/... "$ours/sidecar"
  never 3 -test ./gen/... "$ours/(internal|services|sidecar|test)"
  never 3 -test ./internal/... "$ours/(services|sidecar|test)"
  never 6 ./services/cli/... "go\.etcd\.io|$ours/services/policy"
  [[ ! -d services/dashboard ]] || never 6 ./services/dashboard/... "go\.etcd\.io|$ours/services/policy"
  local pure='net$|net/http|log|log/slog|google\.golang\.org/grpc|github\.com/prometheus'
  never 7 ./internal/allow "$pure"
  [[ ! -d sidecar/internal/index ]] || never 7 ./sidecar/internal/index "$pure"
  local program
  for program in ./services/policy ./services/cli ./services/dashboard ./sidecar; do
    [[ ! -d $program ]] || never 9 "$program" "testing|net/http/httptest|go\.uber\.org/goleak|google\.golang\.org/grpc/test|$ours/test|$ours/.*test"
  done
  doors
}

# NUMBER, the depguard list that must report it (or -), the PACKAGES that never() must report (or -), file, import.
violations() {
  cat <<'END'
1 sidecar ./sidecar/... sidecar/arrow1.go go.etcd.io/etcd/client/v3
1 sidecar ./sidecar/... sidecar/arrow2.go go.uber.org/zap
1 - ./sidecar/... internal/serve/arrow3.go go.uber.org/zap/zapcore
2 sidecar ./sidecar/... sidecar/arrow4.go OURS/services/common
2 services ./services/... services/policy/arrow5.go OURS/sidecar/common
3 gen ./gen/... gen/arrow6.go OURS/internal/revision
3 internal ./internal/... internal/serve/arrow7.go OURS/services/common
3 internal ./internal/... internal/serve/arrow8.go OURS/sidecar/common
4 etcd - services/policy/internal/feed/arrow9.go go.etcd.io/etcd/client/v3
4 bart - sidecar/internal/index/arrow10.go github.com/gaissmai/bart
5 status - services/policy/internal/store/arrow11.go google.golang.org/grpc/status
5 status - services/policy/internal/feed/hub_arrow12.go google.golang.org/grpc/codes
5 status - internal/allow/arrow13.go google.golang.org/grpc/status
5 status - sidecar/internal/index/arrow14.go google.golang.org/grpc/codes
5 status - sidecar/internal/mirror/arrow15.go google.golang.org/grpc/codes
6 clients ./services/cli/... services/cli/arrow16.go go.etcd.io/etcd/api/v3/mvccpb
6 clients ./services/dashboard/... services/dashboard/arrow17.go OURS/services/policy/api
6 - ./services/cli/... internal/serve/arrow18.go go.etcd.io/etcd/server/v3/embed
7 pure ./internal/allow internal/allow/arrow19.go net/http
7 pure ./internal/allow internal/allow/arrow20.go log/slog
7 pure - internal/allow/arrow21.go time
7 pure - sidecar/internal/index/arrow22.go os
7 pure ./sidecar/internal/index sidecar/internal/index/arrow23.go net
9 test-helpers ./sidecar sidecar/arrow24.go testing
9 test-helpers ./sidecar sidecar/arrow25.go OURS/test/stack
9 test-helpers ./services/cli services/cli/arrow26.go google.golang.org/grpc/test/bufconn
9 test-helpers ./services/policy services/policy/arrow27.go net/http/httptest
9 - ./services/cli internal/serve/arrow28.go go.uber.org/goleak
END
}

prove() {
  local lint number guard from file import dir name module
  lint=$(realpath "${GOLANGCI_LINT:?}")
  copy=$(mktemp -d)
  git ls-files -co --exclude-standard -z | while IFS= read -r -d '' file; do [[ ! -f $file ]] || printf '%s\0' "$file"; done |
    xargs -0 cp --parents -t "$copy"
  cd "$copy"
  while read -r number guard from file import; do
    dir=$(dirname "$file") && mkdir -p "$dir"
    case $dir in services/* | sidecar) name=main ;; *) name=$(basename "$dir") ;; esac
    [[ $dir != */internal/* ]] || name=$(basename "$dir")
    printf 'package %s\n\nimport _ "%s"\n' "$name" "${import/OURS/$ours}" >"$file"
  done < <(violations)
  mkdir -p sidecar/internal/check
  printf 'package check\n\ntype door_a struct{}\n' >sidecar/internal/check/door_a.go
  printf 'package check\n\nvar _ door_a\n' >sidecar/internal/check/door_b.go

  (check) >reported 2>&1 || true
  while read -r module; do
    (cd "$module" && "$lint" run --enable-only depguard ./...) >>reported 2>&1 || true
  done < <(sed -n 's|^[[:space:]]*\./||p' go.work)
  while read -r number guard from file import; do
    import=${import/OURS/$ours}
    [[ $from == - ]] || grep -qF "arrow $number: $from must not depend on $import " reported ||
      complain "not reported by go list: $number $from → $import"
    [[ $guard == - ]] || grep -qE "^$file:.*'$import' is not allowed from list '$guard'" reported ||
      complain "not reported by depguard: $number $file → $import"
  done < <(violations)
  grep -qF 'arrow 8: sidecar/internal/check/door_b.go depends on door door_a.go' reported ||
    complain 'not reported: 8 a door that knows another'
  ((!failed)) || cat reported >&2
}

"${1:-check}"
exit "$failed"
