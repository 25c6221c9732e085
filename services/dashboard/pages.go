package main

import (
	"net/http"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/services/dashboard/internal/web"
)

// pages returns what browsers see.
func (p *process) pages() (http.Handler, error) {
	return web.New(web.Config{
		Login: p.login, Directory: p.directory, Policy: policyv1.NewPolicyServiceClient(p.conn),
		Log: p.log, Metrics: p.registry, Secure: !p.cfg.InsecureHTTP,
	})
}
