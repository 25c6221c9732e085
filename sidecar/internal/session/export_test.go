package session

import "net/http"

// Over makes d send its requests through t.
func Over(d *Doveadm, t http.RoundTripper) { d.http.Transport = t }
