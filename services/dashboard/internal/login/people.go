package login

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	"golang.org/x/text/secure/precis"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
)

// localUser is a person in the file of users.
type localUser struct {
	name     string
	password hash
	rights   Rights
}

// localUsers are by canonical name. strongest is of those with a password, for those who are not there.
type localUsers struct {
	byName    map[string]localUser
	strongest parameters
}

// rightsEntry is how both files write rights.
type rightsEntry struct {
	Name          string   `yaml:"name"`
	Administrator []string `yaml:"administrator"`
	Auditor       []string `yaml:"auditor"`
}

// parseUsers reads the file of users:
//
//	users:
//	  - name: anna@example.org
//	    password: $argon2id$v=19$m=19456,t=2,p=1$…   # allowednets-dashboard hash-password
//	    administrator: [example.org]                 # may view and change
//	    auditor: ["*"]                               # may view
func parseUsers(data []byte) (localUsers, error) {
	var doc struct {
		Users []yaml.Node `yaml:"users"`
	}
	if err := livefile.Decode(data, &doc); err != nil {
		return localUsers{}, err
	}
	all := localUsers{byName: make(map[string]localUser), strongest: recommended}
	for _, node := range doc.Users {
		var entry struct {
			rightsEntry `yaml:",inline"`
			Password    string `yaml:"password"`
		}
		if err := decodeEntry(&node, &entry, "name", "password", "administrator", "auditor"); err != nil {
			return localUsers{}, err
		}
		name, err := canonicalName(entry.Name)
		if err != nil {
			return localUsers{}, fmt.Errorf("line %d: the user %w", node.Line, err)
		}
		if _, twice := all.byName[name]; twice {
			return localUsers{}, fmt.Errorf("line %d: the user %s stands there already", node.Line, name)
		}
		u := localUser{name: name}
		if u.rights, err = entry.parse(); err != nil {
			return localUsers{}, fmt.Errorf("line %d: the user %s: %w", node.Line, name, err)
		}
		if u.password, err = parseHash(entry.Password); err != nil {
			return localUsers{}, fmt.Errorf("line %d: the password of %s %w; 'allowednets-dashboard hash-password' makes one", node.Line, name, err)
		}
		all.strongest = all.strongest.stronger(u.password.parameters)
		all.byName[name] = u
	}
	if len(all.byName) == 0 {
		return localUsers{}, errors.New("it has no users; write users: and below it a list of name, password and administrator or auditor")
	}
	return all, nil
}

// parseRoles reads the file of the roles that groups of an OpenID provider have:
//
//	groups:
//	  - name: mail-admins
//	    administrator: ["*"]
func parseRoles(data []byte) (map[string]Rights, error) {
	var doc struct {
		Groups []yaml.Node `yaml:"groups"`
	}
	if err := livefile.Decode(data, &doc); err != nil {
		return nil, err
	}
	roles := make(map[string]Rights)
	for _, node := range doc.Groups {
		var entry rightsEntry
		if err := decodeEntry(&node, &entry, "name", "administrator", "auditor"); err != nil {
			return nil, err
		}
		if entry.Name == "" {
			return nil, fmt.Errorf("line %d: a group has no name", node.Line)
		}
		if _, twice := roles[entry.Name]; twice {
			return nil, fmt.Errorf("line %d: the group %q stands there already", node.Line, entry.Name)
		}
		rights, err := entry.parse()
		if err != nil {
			return nil, fmt.Errorf("line %d: the group %q: %w", node.Line, entry.Name, err)
		}
		roles[entry.Name] = rights
	}
	if len(roles) == 0 {
		return nil, errors.New("it has no groups; write groups: and below it a list of name and administrator or auditor")
	}
	return roles, nil
}

// decodeEntry decodes node, a mapping of known fields, which errors name with their lines.
func decodeEntry(node *yaml.Node, v any, known ...string) error {
	if node.Kind != yaml.MappingNode {
		return fmt.Errorf("line %d: it must have a name and more, such as {name: anna, auditor: [example.org]}", node.Line)
	}
	for i := 0; i < len(node.Content); i += 2 {
		if key := node.Content[i]; !slices.Contains(known, key.Value) {
			return fmt.Errorf("line %d: there is no field %q; the fields are %s", key.Line, key.Value, strings.Join(known, ", "))
		}
	}
	err := node.Decode(v)
	if wrong := new(yaml.TypeError); errors.As(err, &wrong) {
		return errors.New(strings.Join(wrong.Errors, "; "))
	}
	return err
}

// parse returns the rights, at least one.
func (e rightsEntry) parse() (Rights, error) {
	administrator, err := parseDomains(e.Administrator)
	if err != nil {
		return Rights{}, fmt.Errorf("administrator: %w", err)
	}
	auditor, err := parseDomains(e.Auditor)
	if err != nil {
		return Rights{}, fmt.Errorf("auditor: %w", err)
	}
	if len(administrator)+len(auditor) == 0 {
		return Rights{}, errors.New(`has no rights; give domains in administrator or auditor, such as auditor: [example.org], or ["*"] for all`)
	}
	return Rights{Administrator: administrator, Auditor: auditor}, nil
}

func parseDomains(texts []string) ([]string, error) {
	var domains []string
	for _, text := range texts {
		domain := All
		if text != All {
			var err error
			if domain, err = allow.ParseDomain(text); err != nil {
				return nil, err
			}
		}
		domains = append(domains, domain)
	}
	return domains, nil
}

// maxName bounds a user's name in octets; the policy service takes 255.
const maxName = 128

// canonicalName returns the form of a local user's name in which it is compared: RFC 8265 §3.3, so that case does not matter.
func canonicalName(s string) (string, error) {
	name, err := precis.UsernameCaseMapped.String(s)
	if err != nil || name == "" || len(name) > maxName || len(s) > 4*maxName {
		return "", fmt.Errorf("%.60q must have a name of letters, digits and signs without spaces, at most %d octets", s, maxName)
	}
	return name, nil
}
