// Package dovecot runs Debian's Dovecot with the configuration of integrations/dovecot, and logs in to it as mail clients
// do.
package dovecot

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"github.com/allowednets/allowednets/test/stack"
)

const program = "dovecot"

// Missing says what this machine lacks to run Dovecot; nil if nothing.
func Missing() error {
	if os.Geteuid() != 0 {
		return errors.New("starting Dovecot needs root")
	}
	path, err := exec.LookPath(program)
	if err != nil {
		return fmt.Errorf("looking for dovecot (Debian's packages dovecot-imapd and dovecot-pop3d): %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	version, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(version), "2.3.") {
		return fmt.Errorf("this is Dovecot %s, and 2.3 is needed", strings.TrimSpace(string(version)))
	}
	return nil
}

// Config says what to run.
type Config struct {
	// Door is the URL of the policy server, in place of the one in the configuration that people copy.
	Door string
	// Doveadm is an address for doveadm's HTTP API, with the key in a file; empty for none.
	Doveadm, DoveadmKeyFile string
	// PostLogin is the sidecar that integrations/dovecot/allowednets-postlogin asks, with the command line tool at Tool; empty for
	// no such check.
	PostLogin, Tool string
	// UserdbAliases are names that only the userdb turns into those of mailboxes.
	UserdbAliases map[string]string
	// Before and After are configuration that comes first and last, to show what other settings would do.
	Before, After string
	// MasterContinues makes Dovecot look up the user that a master user acts as.
	MasterContinues bool
	// NoStage leaves the passdb blocks as they are before somebody follows the README.
	NoStage bool
}

// User is an entry of the password file.
type User struct {
	Name, Password string
	// Canonical is the mailbox the name stands for; empty if it is one itself.
	Canonical string
}

// Users and Masters can log in.
const (
	Password       = "right-password"
	Master         = "admin"
	MasterPassword = "master-password"
)

// Server is a running Dovecot.
type Server struct {
	*stack.Process
	// IMAP and POP3 take clients as they come; ProxiedIMAP and ProxiedPOP3 want a PROXY header first.
	IMAP, POP3, ProxiedIMAP, ProxiedPOP3 string

	dir, lookups string
}

// configuration is that of a small mail host; what concerns this product is included as people copy it.
const configuration = `
base_dir = {{.Dir}}/run
state_dir = {{.Dir}}/state
log_path = /dev/stderr
protocols = imap pop3
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain login
auth_master_user_separator = *
auth_failure_delay = 0
mail_location = maildir:{{.Dir}}/mail/%u
mail_max_userip_connections = 1000
first_valid_uid = 1

service imap-login {
  inet_listener imap {
    port = {{port .IMAP}}
  }
  inet_listener imaps {
    port = 0
  }
  inet_listener imap_proxied {
    port = {{port .ProxiedIMAP}}
    haproxy = yes
  }
}
service pop3-login {
  inet_listener pop3 {
    port = {{port .POP3}}
  }
  inet_listener pop3s {
    port = 0
  }
  inet_listener pop3_proxied {
    port = {{port .ProxiedPOP3}}
    haproxy = yes
  }
}

{{.Before}}
# Master users, behind a passdb that counts and knows nobody.
passdb {
  driver = checkpassword
  args = {{.Count}}
  master = yes
}
passdb {
  driver = passwd-file
  args = {{.Dir}}/masters
  master = yes
  {{.Stage}}
  {{.MasterResult}}
}
# Users, likewise.
passdb {
  driver = checkpassword
  args = {{.Count}}
}
passdb {
  driver = passwd-file
  args = {{.Dir}}/users
  {{.Stage}}
}
userdb {
  driver = passwd-file
  args = {{.Dir}}/aliases
}
userdb {
  driver = static
  args = uid=mail gid=mail home={{.Dir}}/mail/%u
}
!include {{.Dir}}/allowednets-2.3.conf
{{if .PostLogin}}!include {{.Dir}}/allowednets-postlogin-2.3.conf{{end}}
# As README.md says: the balancer and the webmail server of these tests are on this machine.
haproxy_trusted_networks = 127.0.0.0/8
login_trusted_networks = 127.0.0.1/32
{{.After}}
`

// published is the configuration that people copy, edited as they do.
func published(text string, cfg Config) (string, error) {
	edits := [][2]string{{"auth_policy_server_url = http://127.0.0.1:7480/dovecot\n", "auth_policy_server_url = " + cfg.Door + "\n"}}
	if cfg.Doveadm != "" {
		_, port, err := net.SplitHostPort(cfg.Doveadm)
		if err != nil {
			return "", err
		}
		edits = append(edits,
			[2]string{"#doveadm_api_key = </etc/dovecot/allowednets-doveadm.key\n", "doveadm_api_key = <" + cfg.DoveadmKeyFile + "\n"},
			[2]string{"#doveadm_allowed_commands", "doveadm_allowed_commands"},
			[2]string{
				"#service doveadm {\n#  inet_listener http {\n#    address = 127.0.0.1\n#    port = 7482\n#  }\n#}\n",
				"service doveadm {\n  inet_listener http {\n    address = 127.0.0.1\n    port = " + port + "\n  }\n}\n",
			})
	}
	for _, e := range edits {
		if strings.Count(text, e[0]) != 1 {
			return "", fmt.Errorf("allowednets-2.3.conf does not have the line %q once", e[0])
		}
		text = strings.Replace(text, e[0], e[1], 1)
	}
	return text, nil
}

// edited returns a file in which old texts are replaced by new ones. Each must be there.
func edited(path string, oldnew ...string) (string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(string(text), oldnew[i]) {
			return "", fmt.Errorf("%s does not have %q", path, oldnew[i])
		}
	}
	return strings.NewReplacer(oldnew...).Replace(string(text)), nil
}

// Start starts Dovecot as a process of s, with the users, and waits until it listens.
func Start(ctx context.Context, s *stack.Stack, name string, users []User, cfg Config) (*Server, error) {
	root, err := stack.Root()
	if err != nil {
		return nil, err
	}
	copied, err := os.ReadFile(filepath.Join(root, "integrations", "dovecot", "allowednets-2.3.conf"))
	if err != nil {
		return nil, err
	}
	include, err := published(string(copied), cfg)
	if err != nil {
		return nil, err
	}
	// They run as root here: the stack's folder, which has the sidecar's socket, is private.
	postLogin, err := edited(filepath.Join(root, "integrations", "dovecot", "allowednets-postlogin"), "/usr/bin/allowednets", cfg.Tool)
	if err != nil {
		return nil, err
	}
	postLoginConf, err := edited(filepath.Join(root, "integrations", "dovecot", "allowednets-postlogin-2.3.conf"),
		"unix:/run/allowednets/sidecar.sock", cfg.PostLogin, "user = allowednets-sidecar", "user = root", "/etc/dovecot/", "{{.Dir}}/")
	if err != nil {
		return nil, err
	}
	// Dovecot's own users must get in; the stack's folder is private.
	dir, err := os.MkdirTemp("", "dovecot-")
	if err != nil {
		return nil, err
	}
	d := &Server{dir: dir, lookups: filepath.Join(dir, "lookups")}
	for _, address := range []*string{&d.IMAP, &d.POP3, &d.ProxiedIMAP, &d.ProxiedPOP3} {
		if *address, err = s.FreeAddress(); err != nil {
			return nil, err
		}
	}
	stage := "default_fields = stage=after"
	if cfg.NoStage {
		stage = ""
	}
	masterResult := ""
	if cfg.MasterContinues {
		masterResult = "result_success = continue-ok"
	}
	var conf strings.Builder
	funcs := template.FuncMap{"port": func(address string) (string, error) {
		_, port, err := net.SplitHostPort(address)
		return port, err
	}}
	err = template.Must(template.New("").Funcs(funcs).Parse(configuration)).Execute(&conf, map[string]string{
		"PostLogin": cfg.PostLogin, "Before": cfg.Before, "Stage": stage, "MasterResult": masterResult,
		"Dir": dir, "Count": filepath.Join(dir, "count"), "After": cfg.After,
		"IMAP": d.IMAP, "POP3": d.POP3, "ProxiedIMAP": d.ProxiedIMAP, "ProxiedPOP3": d.ProxiedPOP3,
	})
	if err != nil {
		return nil, err
	}
	var passwords strings.Builder
	for _, u := range users {
		fmt.Fprintf(&passwords, "%s:{PLAIN}%s::::::", u.Name, u.Password)
		if u.Canonical != "" {
			fmt.Fprintf(&passwords, "user=%s", u.Canonical)
		}
		passwords.WriteString("\n")
	}
	var aliases strings.Builder
	for name, mailbox := range cfg.UserdbAliases {
		fmt.Fprintf(&aliases, "%s::8:8::/nonexistent::userdb_user=%s\n", name, mailbox)
	}
	// The interface of checkpassword: name and password end in NUL on descriptor 3; exit 1 means "not here".
	count := "#!/bin/sh\ntr '\\0\\n' '\\n_' <&3 | head -n 1 >>" + d.lookups + "\nexit 1\n"
	for _, f := range []struct {
		name, text string
		mode       os.FileMode
	}{
		{"dovecot.conf", conf.String(), 0o644},
		{"allowednets-2.3.conf", include, 0o644},
		{"users", passwords.String(), 0o644},
		{"allowednets-postlogin", postLogin, 0o755},
		{"allowednets-postlogin-2.3.conf", strings.ReplaceAll(postLoginConf, "{{.Dir}}", dir), 0o644},
		{"aliases", aliases.String(), 0o644},
		{"masters", Master + ":{PLAIN}" + MasterPassword + "\n", 0o644},
		{"count", count, 0o755},
		{"lookups", "", 0o666},
	} {
		path := filepath.Join(dir, f.name)
		if err := errors.Join(os.WriteFile(path, []byte(f.text), f.mode), os.Chmod(path, f.mode)); err != nil {
			return nil, err
		}
	}
	mail := filepath.Join(dir, "mail")
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(mail, 0o777), os.Chmod(mail, 0o777)); err != nil {
		return nil, err
	}
	path, err := exec.LookPath(program)
	if err != nil {
		return nil, err
	}
	d.Process, err = s.Start(name, path, []string{"-F", "-c", filepath.Join(dir, "dovecot.conf")}, nil)
	if err != nil {
		return nil, err
	}
	return d, d.AwaitReady(ctx, func(ctx context.Context) error {
		for _, address := range []string{d.IMAP, d.POP3, d.ProxiedIMAP, d.ProxiedPOP3} {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
			if err != nil {
				return err
			}
			if err := conn.Close(); err != nil {
				return err
			}
		}
		return nil
	})
}

// Lookups returns the names that the counting passdb was asked for since the last call.
func (d *Server) Lookups() ([]string, error) {
	text, err := os.ReadFile(d.lookups)
	if err != nil {
		return nil, err
	}
	return strings.Fields(string(text)), os.Truncate(d.lookups, 0)
}

// Reload makes Dovecot start a new auth process, whose HTTP client knows of no outage.
func (d *Server) Reload(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "doveadm", "-c", filepath.Join(d.dir, "dovecot.conf"), "reload").CombinedOutput()
	if err != nil {
		return fmt.Errorf("doveadm reload: %w\n%s", err, out)
	}
	return nil
}

// Remove deletes Dovecot's files.
func (d *Server) Remove() error { return os.RemoveAll(d.dir) }
