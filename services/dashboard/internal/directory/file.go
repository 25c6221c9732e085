package directory

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
)

// File is a directory in a YAML file, which is read again when it changes:
//
//	domains:
//	  example.org: [alice, bob, carol@example.org]
//	  example.net: []
//
// It is safe for concurrent use.
type File struct {
	file *livefile.File[map[string]listing]
}

// OpenFile reads the file at path.
func OpenFile(w *livefile.Watcher, path string) (*File, error) {
	file, err := livefile.Open(w, "directory", path, parse)
	if err != nil {
		return nil, err
	}
	return &File{file: file}, nil
}

// Domains returns the domains that somebody may see, ordered by name.
func (f *File) Domains(_ context.Context, may func(domain string) bool) ([]Domain, error) {
	table := f.file.Get()
	found := []Domain{}
	for name, mailboxes := range table {
		if may(name) {
			found = append(found, Domain{Name: name, Mailboxes: len(mailboxes)})
		}
	}
	sortDomains(found)
	return found, nil
}

// Mailboxes returns a page of the mailboxes of domain, a canonical domain. Of a domain that is not there it is empty.
func (f *File) Mailboxes(_ context.Context, domain string, q Query) (Page, error) {
	return f.file.Get()[domain].page(q), nil
}

// Has reports whether there is such a mailbox.
func (f *File) Has(_ context.Context, m allow.Mailbox) (bool, error) {
	return f.file.Get()[m.Domain()].has(m), nil
}

// parse reads what the file holds. Its errors name the line.
func parse(data []byte) (map[string]listing, error) {
	var doc struct {
		Domains yaml.Node `yaml:"domains"`
	}
	if err := livefile.Decode(data, &doc); err != nil {
		return nil, err
	}
	if doc.Domains.Kind != yaml.MappingNode {
		return nil, errors.New("it has no domains; write domains: and below it, for each domain, its mailboxes as in example.org: [alice, bob]")
	}
	table := make(map[string]listing, len(doc.Domains.Content)/2)
	lines := make(map[string]int)
	for pair := range slices.Chunk(doc.Domains.Content, 2) {
		key, value := pair[0], pair[1]
		domain, err := allow.ParseDomain(key.Value)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", key.Line, err)
		}
		if line, twice := lines[domain]; twice {
			return nil, fmt.Errorf("line %d: the domain %s stands on line %d already", key.Line, domain, line)
		}
		lines[domain] = key.Line
		if table[domain], err = parseMailboxes(domain, value); err != nil {
			return nil, err
		}
	}
	return table, nil
}

func parseMailboxes(domain string, node *yaml.Node) (listing, error) {
	if node.Kind == yaml.ScalarNode && node.Tag == "!!null" {
		return nil, nil
	}
	if node.Kind != yaml.SequenceNode {
		return nil, fmt.Errorf("line %d: the mailboxes of %s must be a list, such as [alice, bob]", node.Line, domain)
	}
	lines := make(map[allow.Mailbox]int, len(node.Content))
	for _, entry := range node.Content {
		if entry.Kind != yaml.ScalarNode || entry.Tag == "!!null" {
			return nil, fmt.Errorf("line %d: a mailbox of %s must be a name, such as alice", entry.Line, domain)
		}
		m, err := allow.CompleteMailbox(entry.Value, domain)
		switch {
		case err != nil:
			return nil, fmt.Errorf("line %d: %w", entry.Line, err)
		case m.Domain() != domain:
			return nil, fmt.Errorf("line %d: the mailbox %s is not in the domain %s, below which it stands", entry.Line, m, domain)
		}
		if line, twice := lines[m]; twice {
			return nil, fmt.Errorf("line %d: the mailbox %s stands on line %d already", entry.Line, m, line)
		}
		lines[m] = entry.Line
	}
	return slices.SortedFunc(maps.Keys(lines), compare), nil
}

func sortDomains(found []Domain) {
	slices.SortFunc(found, func(a, b Domain) int { return strings.Compare(a.Name, b.Name) })
}
