// Command allowall is an auth policy server for Dovecot that reads the question and lets everybody in: the floor below the
// sidecar's door in the benchmark of logins.
package main

import (
	"io"
	"net/http"
	"os"
	"time"
)

func main() {
	server := &http.Server{
		Addr: os.Args[1], ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `{"status":0,"msg":""}`)
		}),
	}
	if server.ListenAndServe() != nil {
		os.Exit(1)
	}
}
