package e2e

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"

	"github.com/allowednets/allowednets/test/browser"
	"github.com/allowednets/allowednets/test/dashboard"
	"github.com/allowednets/allowednets/test/stack"
)

// groups are the members of an OpenID provider, by user name, each with the group it tells of.
type groups map[string]string

func (g groups) GetUserByID(id string) *storage.User {
	if _, there := g[id]; !there {
		return nil
	}
	return &storage.User{ID: id, Username: id, Password: dashboardPassword, Email: id + "@provider.example", EmailVerified: true}
}

func (g groups) GetUserByUsername(name string) *storage.User { return g.GetUserByID(name) }
func (g groups) ExampleClientID() string                     { return "unused" }

// memory is the storage of zitadel's example, with groups.
type memory struct {
	*storage.Storage

	groups groups
}

func (m memory) SetUserinfoFromToken(ctx context.Context, info *oidc.UserInfo, token, subject, origin string) error {
	info.AppendClaims("groups", []string{m.groups[subject]})
	return m.Storage.SetUserinfoFromToken(ctx, info, token, subject, origin)
}

// serveProvider serves an OpenID provider on another site than 127.0.0.1, as browsers see it.
func serveProvider(t *testing.T, members groups, clientID, back string) (issuer string) {
	t.Helper()
	server := httptest.NewUnstartedServer(nil)
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	issuer = "http://localhost:" + port
	clients := map[string]*storage.Client{clientID: storage.NativeClient(clientID, back)}
	router := exampleop.SetupServer(issuer, memory{storage.NewStorageWithClients(members, clients), members}, nil, false)
	server.Config.Handler = http.HandlerFunc(router.ServeHTTP)
	server.Start()
	t.Cleanup(server.Close)
	return issuer
}

const openIDRoles = `groups:
  - name: mail-admins
    administrator: [example.org]
  - name: mail-readers
    auditor: [example.org]
`

// logInElsewhere is the way of those whom an OpenID provider knows: login page, provider, back, and out again. The group decides
// what they may do.
func logInElsewhere(t *testing.T, s *site) {
	listen, err := s.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	url, roles := "http://"+listen, s.Path("roles.yaml")
	members := groups{"eva": "mail-admins", "ian": "mail-readers", "guest": "guests"}
	issuer := serveProvider(t, members, "dashboard", url+"/login/oidc/callback")
	if err := os.WriteFile(roles, []byte(openIDRoles), 0o600); err != nil {
		t.Fatal(err)
	}
	openID := *s
	openID.dashboard, err = s.StartDashboard(stack.DashboardConfig{
		Name: "openid", Listen: listen, Policy: s.policy.Address, Directory: s.Path("directory.yaml"),
		AdditionalArgs: []string{
			"--trusted-proxies", "127.0.0.1/32", "--public-url", url,
			"--oidc-issuer", issuer, "--oidc-client-id", "dashboard", "--oidc-roles", roles,
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := openID.dashboard.AwaitReady(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	v := openID.visit(t, walker{name: "openid"})
	v.must(v.Go("/domains/example.org?q=zone"))
	v.look("33-login-openid")
	v.logInAt(issuer, "eva")
	v.must(v.Await("heading", "example.org"), v.Read("Logged in as eva@provider.example"))
	if path, err := v.Path(); err != nil || path != "/domains/example.org?q=zone" {
		t.Errorf("the provider leads back to %s, %v", path, err)
	}
	v.must(v.Go("/domains"), v.Await("link", "example.org…"))
	if text, err := v.Text(); err != nil || strings.Contains(text, "example.net") {
		t.Errorf("she sees %q, %v", text, err)
	}
	const mailbox = "typing@example.org"
	v.must(v.Go("/domains/example.org/mailboxes/"+mailbox), v.Type("Allowed Nets", inside))
	v.save()
	v.must(v.Await("heading", "Saved"))
	s.mustHave(t, mailbox, inside, "eva@provider.example")

	v.must(v.Follow("button", "Log out"), v.Await("link", "Log in with your organisation"))
	v.must(v.Go("/domains/example.org"), v.Await("link", "Log in with your organisation"))
	v.logInAt(issuer, "ian")
	v.must(v.Follow("link", "View "+mailbox), v.Read("You may look at this mailbox", inside))
	if v.Has("textbox", "Allowed Nets") {
		t.Error("an auditor is offered to save")
	}

	stranger := openID.visit(t, walker{"openid-de", dashboard.Traits{Person: browser.Person{Language: "de-DE", Width: 360, Height: 740, Dark: true}}})
	stranger.must(stranger.Go("/"))
	stranger.logInAt(issuer, "guest")
	stranger.must(stranger.Read("Sie sind bekannt, haben hier aber keine Rechte."))
	stranger.look("34-no-access")
	stranger.must(stranger.Go("/domains"), stranger.Await("link", "Mit Ihrer Organisation anmelden"))
}

// logInAt goes to the provider from the login page, and logs in there.
func (v *visitor) logInAt(issuer, user string) {
	v.t.Helper()
	v.must(v.Follow("link", v.say("Log in with your organisation", "Mit Ihrer Organisation anmelden")), v.Await("button", "Login"))
	if at, err := v.Path(); err != nil || !strings.HasPrefix(at, issuer+"/login") {
		v.t.Errorf("it leads to %s, %v", at, err)
	}
	v.must(v.Type("Username:", user), v.Type("Password:", dashboardPassword), v.Follow("button", "Login"))
}
