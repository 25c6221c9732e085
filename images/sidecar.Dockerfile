# For people with Docker: docker buildx build -f images/sidecar.Dockerfile --platform linux/amd64,linux/arm64 .
# `make images` makes the same image without it.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
ARG TARGETOS TARGETARCH
WORKDIR /src
COPY . .
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -ldflags="-s -w" -o /out/allowednets-sidecar ./sidecar

FROM scratch
LABEL org.opencontainers.image.title="Allowed Nets sidecar" \
      org.opencontainers.image.source="https://github.com/allowednets/allowednets" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out/ /bin/
ENV PATH=/bin
USER 65532:65532
HEALTHCHECK --interval=10s --timeout=4s --start-period=30s CMD ["/bin/allowednets-sidecar", "healthcheck"]
ENTRYPOINT ["/bin/allowednets-sidecar"]
