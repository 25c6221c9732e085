// Package roundcube runs Debian's Roundcube, with the plugin of integrations/roundcube, behind PHP-FPM and nginx, and visits
// it as browsers from anywhere do.
package roundcube

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/allowednets/allowednets/test/nginx"
	"github.com/allowednets/allowednets/test/stack"
)

const (
	fpm = "php-fpm8.2"
	// installed is where Debian's packages roundcube-core and roundcube-sqlite3 put the program, and configured its defaults,
	// which nothing here changes.
	installed  = "/usr/share/roundcube"
	configured = "/etc/roundcube"
	// runsAs is the user of PHP.
	runsAs = "www-data"
)

// Missing says what this machine lacks to run Roundcube; nil if nothing.
func Missing() error {
	if err := nginx.Missing(); err != nil {
		return err
	}
	if _, err := exec.LookPath(fpm); err != nil {
		return fmt.Errorf("looking for PHP-FPM 8.2 (Debian's package php-fpm): %w", err)
	}
	for path, name := range map[string]string{
		installed + "/index.php":                 "roundcube-core",
		installed + "/SQL/sqlite.initial.sql":    "roundcube-core",
		"/etc/php/8.2/fpm/conf.d/20-sqlite3.ini": "php-sqlite3",
		"/etc/php/8.2/fpm/conf.d/20-curl.ini":    "php-curl",
		"/etc/php/8.2/fpm/conf.d/20-intl.ini":    "php-intl",
	} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("looking for Debian's package %s: %w", name, err)
		}
	}
	return nil
}

// Site is a Roundcube with a configuration and a database of its own.
type Site struct {
	Name string
	// IMAP is the address of the mail server.
	IMAP string
	// Sidecar is the plugin's setting of that name. Empty: Roundcube runs without the plugin.
	Sidecar string
	// Settings are more lines of its configuration, in PHP.
	Settings string
}

// Server is PHP-FPM and nginx with some sites.
type Server struct {
	fpm   *stack.Process
	nginx *nginx.Server
	stack *stack.Stack
	dir   string
	sites map[string]listeners

	fronts map[string]*front
}

// listeners are the addresses of a site: for a load balancer that speaks the PROXY protocol, and for one that sends
// X-Forwarded-For.
type listeners struct{ proxied, forwarded string }

const fpmConfiguration = `[global]
error_log = /proc/self/fd/2
daemonize = no
[www]
user = %[2]s
group = %[2]s
listen = %[1]s/fpm.sock
listen.owner = %[2]s
pm = static
pm.max_children = 6
catch_workers_output = yes
php_admin_value[error_log] = /proc/self/fd/2
php_admin_flag[log_errors] = on
`

// siteConfiguration is nginx's for a site. What concerns this product is included as people copy it.
const siteConfiguration = `
  server {
    listen %[2]s proxy_protocol;
    set_real_ip_from 127.0.0.1;
    real_ip_header proxy_protocol;
    set $config %[1]s;
    include site.conf;
  }
  server {
    listen %[3]s;
    set_real_ip_from 127.0.0.1; # the load balancer of these tests
    include real-ip.conf;
    set $config %[1]s;
    include site.conf;
  }
`

const siteInclude = `root %[1]s/public_html;
location / { index index.php; }
location ~ \.php$ {
  fastcgi_pass unix:%[1]s/fpm.sock;
  include /etc/nginx/fastcgi_params;
  fastcgi_param SCRIPT_FILENAME $document_root$fastcgi_script_name;
  fastcgi_param ROUNDCUBE_CONFIG_DIR $config;
}
`

// Start starts PHP-FPM and nginx as processes of s, with at least one site, and waits until they listen.
func Start(ctx context.Context, s *stack.Stack, name string, sites ...Site) (*Server, error) {
	root, err := stack.Root()
	if err != nil {
		return nil, err
	}
	// PHP must get in; the stack's folder is private.
	dir, err := os.MkdirTemp("", "roundcube-")
	if err != nil {
		return nil, err
	}
	r := &Server{dir: dir, stack: s, sites: make(map[string]listeners), fronts: make(map[string]*front)}
	integration := filepath.Join(root, "integrations", "roundcube")
	if err := r.install(integration); err != nil {
		return nil, errors.Join(err, r.Remove())
	}
	var http strings.Builder
	http.WriteString("http {\n  access_log off;\n  include /etc/nginx/mime.types;\n")
	for _, site := range sites {
		var l listeners
		for _, address := range []*string{&l.proxied, &l.forwarded} {
			if *address, err = s.FreeAddress(); err != nil {
				return nil, errors.Join(err, r.Remove())
			}
		}
		r.sites[site.Name] = l
		config, err := r.configure(site)
		if err != nil {
			return nil, errors.Join(err, r.Remove())
		}
		fmt.Fprintf(&http, siteConfiguration, config, l.proxied, l.forwarded)
	}
	http.WriteString("}\n")
	if err := r.startPHP(ctx, name+"-fpm"); err != nil {
		return nil, errors.Join(err, r.Remove())
	}
	conf := strings.NewReplacer(
		"include site.conf;", "include "+filepath.Join(r.dir, "site.conf")+";",
		"include real-ip.conf;", "include "+filepath.Join(integration, "real-ip.conf")+";",
	).Replace(http.String())
	if r.nginx, err = nginx.Start(ctx, s, name+"-nginx", conf, r.sites[sites[0].Name].forwarded); err != nil {
		return nil, errors.Join(err, r.Remove())
	}
	return r, nil
}

func (r *Server) startPHP(ctx context.Context, name string) error {
	conf := filepath.Join(r.dir, "fpm.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, fpmConfiguration, r.dir, runsAs), 0o644); err != nil {
		return err
	}
	path, err := exec.LookPath(fpm)
	if err != nil {
		return err
	}
	if r.fpm, err = r.stack.Start(name, path, []string{"--nodaemonize", "--fpm-config", conf}, nil); err != nil {
		return err
	}
	return r.fpm.AwaitReady(ctx, func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(r.dir, "fpm.sock"))
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// install makes a tree of links to the installed program, with a folder of plugins of its own.
func (r *Server) install(integration string) error {
	at := func(path ...string) string { return filepath.Join(append([]string{r.dir}, path...)...) }
	index := "<?php\ndefine('INSTALL_PATH', realpath(__DIR__ . '/..') . '/');\ninclude INSTALL_PATH . 'index.php';\n"
	errs := []error{
		os.Chmod(r.dir, 0o755), // PHP must get in
		os.Mkdir(at("public_html"), 0o755), os.Mkdir(at("plugins"), 0o755),
		os.WriteFile(at("public_html", "index.php"), []byte(index), 0o644),
		os.WriteFile(at("site.conf"), fmt.Appendf(nil, siteInclude, r.dir), 0o644),
		os.CopyFS(at("plugins", "allowednets"), os.DirFS(filepath.Join(integration, "allowednets"))),
	}
	for link, target := range map[string]string{
		"index.php": installed + "/index.php", "program": installed + "/program", "SQL": installed + "/SQL", "skins": installed + "/skins",
		"public_html/program": installed + "/program", "public_html/skins": installed + "/skins", "public_html/plugins": at("plugins"),
		"plugins/jqueryui": installed + "/plugins/jqueryui", "plugins/filesystem_attachments": installed + "/plugins/filesystem_attachments",
	} {
		errs = append(errs, os.Symlink(target, at(link)))
	}
	return errors.Join(errs...)
}

// configure writes the configuration of a site and returns its folder.
func (r *Server) configure(site Site) (string, error) {
	dir := filepath.Join(r.dir, "site-"+site.Name)
	plugins := ""
	if site.Sidecar != "" {
		plugins = "'allowednets'"
	}
	config := fmt.Sprintf(`<?php
$config['db_dsnw'] = 'sqlite:///%[1]s/var/roundcube.db?mode=0600';
$config['imap_host'] = '%[2]s';
$config['smtp_host'] = '127.0.0.1:1';
$config['des_key'] = 'twenty-four octets, yes.';
$config['log_dir'] = '%[1]s/var';
$config['temp_dir'] = '%[1]s/var';
$config['plugins'] = [%[3]s];
$config['product_name'] = 'Webmail';
$config['enable_installer'] = false;
$config['refresh_interval'] = 0;
%[4]s
`, dir, site.IMAP, plugins, site.Settings)
	// The settings of the plugin as it is delivered, and then those of the site.
	plugin := fmt.Sprintf("<?php\ninclude '%s/plugins/allowednets/config.inc.php.dist';\n$config['allowednets_sidecar'] = '%s';\n%s\n", r.dir, site.Sidecar, site.Settings)
	err := errors.Join(
		os.Mkdir(dir, 0o755), os.Mkdir(filepath.Join(dir, "var"), 0o700), chown(filepath.Join(dir, "var"), runsAs),
		os.WriteFile(filepath.Join(dir, "config.inc.php"), []byte(config), 0o644),
		os.WriteFile(filepath.Join(dir, "allowednets.inc.php"), []byte(plugin), 0o644),
		os.Symlink(filepath.Join(configured, "defaults.inc.php"), filepath.Join(dir, "defaults.inc.php")),
		os.Symlink(filepath.Join(configured, "mimetypes.php"), filepath.Join(dir, "mimetypes.php")),
	)
	return dir, err
}

// chown gives a folder to a user of this machine.
func chown(path, name string) error {
	u, err := user.Lookup(name)
	if err != nil {
		return err
	}
	uid, uidErr := strconv.Atoi(u.Uid)
	gid, gidErr := strconv.Atoi(u.Gid)
	return errors.Join(uidErr, gidErr, os.Chown(path, uid, gid))
}

// Errors returns what Roundcube has logged as errors of a site.
func (r *Server) Errors(site string) (string, error) {
	log, err := os.ReadFile(filepath.Join(r.dir, "site-"+site, "var", "errors.log"))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	return string(log), err
}

// Forwarded is the URL of a site where nginx believes X-Forwarded-For of its client.
func (r *Server) Forwarded(site string) string { return "http://" + r.sites[site].forwarded + "/" }

// Remove closes the ways in and deletes the server's files.
func (r *Server) Remove() error {
	var errs []error
	for _, f := range r.fronts {
		errs = append(errs, f.close())
	}
	if r.nginx != nil {
		errs = append(errs, r.nginx.Remove())
	}
	return errors.Join(append(errs, os.RemoveAll(r.dir))...)
}
