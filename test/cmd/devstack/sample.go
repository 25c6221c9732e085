package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/test/stack"
)

// Who may look at the samples. The dashboard listens on loopback only.
const (
	sampleUser     = "anna@example.org"
	sampleAuditor  = "otto@example.org"
	samplePassword = "allowed-nets"
)

// Mailboxes of example.net: enough for many pages, and some of them restricted.
const (
	sampleCrowd      = 2500
	sampleRestricted = 40
)

// sampleSave is a save of the samples. Empty text lifts the restriction.
type sampleSave struct{ mailbox, by, text string }

// sampleSaves gives every screen something to show: a long list, long addresses, a history, a restriction that was lifted, and
// a list whose mailbox is not in the directory any more. Alice is left to the reader.
func sampleSaves() []sampleSave {
	const anna, bert = sampleUser, "bert@example.org"
	var offices []string
	for i := range 18 {
		offices = append(offices, fmt.Sprintf("198.51.100.%d", 8*i+1), fmt.Sprintf("2001:db8:%x:%x::/64", 0x40+i, 0x1000+i))
	}
	saves := []sampleSave{
		{"bob@example.org", anna, "203.0.113.0/24"},
		{"carol@example.org", anna, strings.Join(offices, ", ")},
		{"dave@example.org", bert, "2001:db8:85a3:8d3:1319:8a2e:370:7348, 2001:db8:1234:5678:9abc:def0:1234:0/112, 198.51.100.7"},
		{"erin@example.org", anna, "203.0.113.7"},
		{"erin@example.org", bert, "203.0.113.0/24, 198.51.100.64/26"},
		{"erin@example.org", anna, ""},
		{"erin@example.org", anna, "203.0.113.0/24, 198.51.100.64/26, 2001:db8:40::/48"},
		{"erin@example.org", bert, "203.0.113.0/24, 2001:db8:40::/48, 2001:db8:41::/48"},
		{"frank@example.org", bert, "192.0.2.17"},
		{"frank@example.org", anna, ""},
		{"accounts.payable.international@example.org", anna, "203.0.113.40/29"},
		{"trainee-2024@example.org", anna, "203.0.113.99"},
	}
	for i := range sampleRestricted {
		saves = append(saves, sampleSave{fmt.Sprintf("user%04d@example.net", 7*i), bert, fmt.Sprintf("203.0.113.%d, 2001:db8:%x::/48", i+1, i)})
	}
	return saves
}

func saveSamples(ctx context.Context, s *stack.Stack, address string) (err error) {
	client, conn, err := s.PolicyClient(address)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	for _, save := range sampleSaves() {
		actor := &policyv1.Actor{Id: save.by, Address: "203.0.113.20"}
		if save.text == "" {
			_, err = client.ClearAllowedNets(ctx, &policyv1.ClearAllowedNetsRequest{Mailbox: save.mailbox, Actor: actor})
		} else {
			_, err = client.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
				Mailbox: save.mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: save.text}, Actor: actor,
			})
		}
		if err != nil {
			return fmt.Errorf("saving the sample of %s: %w", save.mailbox, err)
		}
	}
	return nil
}

// writeSamples writes the dashboard's files. What is there already stays: it may have been edited.
func writeSamples(s *stack.Stack) (directory, users string, err error) {
	directory, users = s.Path("directory.yaml"), s.Path("users.yaml")
	var b strings.Builder
	b.WriteString("domains:\n  example.org:\n")
	for _, name := range []string{
		"alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "accounts.payable.international", "info", "jürgen", "office",
	} {
		fmt.Fprintf(&b, "    - %s\n", name)
	}
	b.WriteString("  example.net:\n")
	for i := range sampleCrowd {
		fmt.Fprintf(&b, "    - user%04d\n", i)
	}
	if err := writeOnce(directory, b.String()); err != nil {
		return "", "", err
	}
	hash := exec.Command(s.Bin("allowednets-dashboard"), "hash-password") //nolint:noctx // it ends by itself
	hash.Stdin = strings.NewReader(samplePassword + "\n")
	out, err := hash.Output()
	if err != nil {
		return "", "", fmt.Errorf("hashing the sample password: %w", err)
	}
	return directory, users, writeOnce(users, fmt.Sprintf(`# The password of both is %[4]s
users:
  - name: %[1]s
    password: %[3]s
    administrator: [example.org, example.net]
  - name: %[2]s
    password: %[3]s
    auditor: [example.org]
`, sampleUser, sampleAuditor, bytes.TrimSpace(out), samplePassword))
}

func writeOnce(path, text string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o600)
}
