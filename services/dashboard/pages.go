package main

import "net/http"

// pages returns what browsers see.
func (p *process) pages() (http.Handler, error) {
	return p.login.Sessions(http.NotFoundHandler()), nil
}
