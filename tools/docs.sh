#!/usr/bin/env bash
# Checks what no linter knows: documents against the tree, and rules about text.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=0

# complain MESSAGE: one complaint for each line of standard input.
complain() {
  local line
  while IFS= read -r line; do
    echo "$1: $line" >&2
    failed=1
  done
}

files() {
  git ls-files -co --exclude-standard -- "$@" | while IFS= read -r f; do [[ ! -f $f ]] || echo "$f"; done
}

# Lines that are in the first list only.
only_first() { comm -23 <(sort -u <<<"$1") <(sort -u <<<"$2"); }

# Every direct dependency has its line, and no other.
modules=$(sed -n 's|^[[:space:]]*\./||p' go.work)
required=$(
  for module in $modules tools/benchreport tools/charts tools/image tools/lint test/bench/peers; do
    sed -n -E 's/^(tool|require)?[[:space:]]+([a-z0-9-]+\.[a-z0-9.-]+\/[^ ]+)( v[^ ]+)?$/\2/p' "$module/go.mod"
  done | grep -v '^github.com/allowednets/'
  sed -n 's/^    "\(@[^"]*\)":.*/\1/p' tools/buf/package.json
)
described=$(sed -n 's/^| \([^ ]*\) |.*/\1/p' docs/dependencies.md | grep -F /)
complain 'docs/dependencies.md has no line for' < <(only_first "$required" "$described")
complain 'docs/dependencies.md describes what is not a direct dependency' < <(only_first "$described" "$required")

# Every metric has its line, and no other. Names stand whole in the code, so that one can find them.
code=$(files 'internal/*.go' 'services/*.go' 'sidecar/*.go' | grep -v '_test\.go$')
complain 'write the name of a metric whole' < <(xargs grep -nE '"allowednets_([a-z0-9_]+_)?"' <<<"$code")
if [[ -f docs/metrics.md ]]; then
  metrics=$(xargs grep -hoE '"allowednets_[a-z0-9_]+[a-z0-9]"' <<<"$code" | tr -d '"')
  described=$(sed -n -E 's/^\| `?(allowednets_[a-z0-9_]+).*/\1/p' docs/metrics.md)
  complain 'docs/metrics.md has no line for' < <(only_first "$metrics" "$described")
  complain 'docs/metrics.md describes what no code registers' < <(only_first "$described" "$metrics")
fi

# Links between documents lead somewhere.
for doc in $(files '*.md'); do
  complain "$doc links to nothing" < <(
    grep -oE '\]\([^)# ]+' "$doc" | sed 's/^](//' | grep -vE '^[a-z]+:' |
      while IFS= read -r link; do [[ -e $(dirname "$doc")/$link ]] || echo "$link"; done
  )
done

complain 'TODO(#issue) only' < <(
  files '*.go' '*.proto' '*.md' 'buf*.yaml' Makefile | xargs grep -nE '(^|[^.])\b(TODO|FIXME|XXX)\b' | grep -vE 'TODO\(#[0-9]+\)'
)

# In a synctest bubble Sleep moves the clock; anywhere else it waits and hopes.
complain 'a test waits for the thing itself, not for a time' < <(
  files '*_test.go' | xargs grep -nE '\btime\.Sleep\(' /dev/null |
    while IFS= read -r hit; do grep -q '"testing/synctest"' "${hit%%:*}" || echo "$hit"; done
)

complain 'the lock file must not name a registry' < <(grep -n '"resolved"' tools/*/package-lock.json)

exit "$failed"
