#!/usr/bin/env bash
# Builds the container images into bin/images/, one OCI tarball each, without a container engine and without a registry. Load one
# with `docker load -i`, `podman load -i`, `kind load image-archive`, `ctr -n k8s.io images import`, or push it with `crane push`.
# `images.sh check` builds them twice, in two folders of different names, and compares them octet by octet.
#   IMAGE_PREFIX  what comes before /policy, /sidecar … in their names
#   VERSION       their tag
#   PLATFORMS     such as linux/amd64,linux/arm64 (the tarball then has both)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
prefix=${IMAGE_PREFIX:-registry.example/allowednets}
version=${VERSION:-$(sed -n 's/^appVersion: *"\{0,1\}\([^"]*\).*/\1/p' charts/allowednets/Chart.yaml)}
platforms=${PLATFORMS:-linux/$(go env GOARCH)}
revision=$(git rev-parse HEAD)
created=$(git log -1 --format=%ct)

# image NAME TITLE PACKAGE=/PATH…: the first program is the one that runs.
image() {
  local name=$1 title=$2 platform program
  local -a files=()
  shift 2
  for platform in ${platforms//,/ }; do
    for program; do
      CGO_ENABLED=0 GOOS=${platform%/*} GOARCH=${platform#*/} \
        go build -trimpath -ldflags='-s -w' -o ".tmp/images/${platform/\//-}/${program##*/}" "./${program%%=*}"
    done
  done
  for program; do files+=(".tmp/images/{os}-{arch}/${program##*/}=${program#*=}"); done
  .tmp/bin/image -o "bin/images/$name.tar" -name "$prefix/$name:$version" -platform "$platforms" -created "$created" -env PATH=/bin \
    -label "org.opencontainers.image.title=$title" \
    -label org.opencontainers.image.source=https://github.com/allowednets/allowednets \
    -label org.opencontainers.image.licenses=Apache-2.0 \
    -label "org.opencontainers.image.version=$version" -label "org.opencontainers.image.revision=$revision" "${files[@]}"
  echo "bin/images/$name.tar  $prefix/$name:$version"
}

build() {
  mkdir -p bin/images .tmp/bin
  (cd tools/image && GOWORK=off go build -o ../../.tmp/bin/image .)
  # The command line is in the policy service's image, so that it is at hand in the pod.
  image policy 'Allowed Nets policy service' services/policy=/bin/allowednets-policy services/cli=/bin/allowednets
  image sidecar 'Allowed Nets sidecar' sidecar=/bin/allowednets-sidecar
  [[ ! -d services/dashboard ]] || image dashboard 'Allowed Nets dashboard' services/dashboard=/bin/allowednets-dashboard
}

check() {
  local one image
  copies=$(mktemp -d) # not local: the trap outlives the function
  trap 'for one in "$copies"/*; do git worktree remove --force "$one"; done; rm -rf "$copies"' EXIT
  for one in "$copies/first" "$copies/second-and-longer"; do
    git worktree add -q --detach "$one" HEAD
    VERSION=$version PLATFORMS=$platforms "$one/tools/images.sh"
  done
  for image in "$copies"/first/bin/images/*.tar; do
    cmp "$image" "$copies/second-and-longer/bin/images/${image##*/}"
  done
  echo 'both builds are the same'
}

"${1:-build}"
