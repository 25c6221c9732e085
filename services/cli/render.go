package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

// show writes a response: as JSON if that was asked for, else with text.
func (s *session) show(resp proto.Message, text func(io.Writer)) error {
	var buf bytes.Buffer
	if s.flags.Output == "json" {
		if err := writeJSON(&buf, resp); err != nil {
			return err
		}
	} else {
		text(&buf)
	}
	if _, err := s.term.out.Write(buf.Bytes()); err != nil {
		return fmt.Errorf("writing the answer: %w", err)
	}
	return nil
}

// writeJSON writes m as protojson, with unset fields so that scripts find every key, and in one layout: protojson itself
// varies its white space.
func writeJSON(w io.Writer, m proto.Message) error {
	text, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	var buf bytes.Buffer
	if err := json.Indent(&buf, text, "", "  "); err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	_, err = fmt.Fprintf(w, "%s\n", &buf)
	return err
}

func writeSet(w io.Writer, resp *policyv1.SetAllowedNetsResponse, validateOnly bool) {
	mailbox := printable(resp.GetAllowedNets().GetMailbox())
	switch {
	case validateOnly:
		fmt.Fprintf(w, "The list is valid. Nothing was saved.\n\n")
	case resp.GetChanged():
		fmt.Fprintf(w, "Saved. %s can now be reached from these networks only.\n\n", mailbox)
	default:
		fmt.Fprintf(w, "Nothing to change: %s has this list already.\n\n", mailbox)
	}
	writeAllowedNets(w, resp.GetAllowedNets())
}

func writeClear(w io.Writer, resp *policyv1.ClearAllowedNetsResponse, validateOnly bool) {
	mailbox := printable(resp.GetAllowedNets().GetMailbox())
	switch {
	case validateOnly:
		fmt.Fprintf(w, "The list of %s can be cleared. Nothing was changed.\n", mailbox)
	case resp.GetChanged():
		fmt.Fprintf(w, "Cleared. %s can now be reached from every address.\n", mailbox)
	default:
		fmt.Fprintf(w, "Nothing to change: %s had no list.\n", mailbox)
	}
}

func writeAllowedNets(w io.Writer, a *policyv1.AllowedNets) {
	rows := [][2]string{{"Mailbox", a.GetMailbox()}}
	if len(a.GetNets()) == 0 {
		rows = append(rows, [2]string{"Allowed", "every address: unrestricted, there is no list"})
	}
	for i, n := range a.GetNets() {
		label := ""
		if i == 0 {
			label = "Allowed"
		}
		rows = append(rows, [2]string{label, n.GetNet()})
	}
	if a.GetUpdateTime() != nil {
		rows = append(rows, [2]string{"Saved", clock(a.GetUpdateTime()) + " by " + a.GetUpdatedBy()})
	}
	if a.GetRevision() != "" {
		rows = append(rows, [2]string{"Revision", a.GetRevision()})
	}
	if a.GetEtag() != "" {
		rows = append(rows, [2]string{"Etag", a.GetEtag()})
	}
	writeRows(w, rows)
}

func writeList(w io.Writer, domain string, resp *policyv1.ListAllowedNetsResponse) {
	n := len(resp.GetAllowedNets())
	if n == 0 {
		fmt.Fprintf(w, "No mailbox of %s is restricted.\n", printable(domain))
		return
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "MAILBOX\tSAVED\tBY\tALLOWED")
	for _, a := range resp.GetAllowedNets() {
		nets := make([]string, len(a.GetNets()))
		for i, net := range a.GetNets() {
			nets[i] = printable(net.GetNet())
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", printable(a.GetMailbox()), clock(a.GetUpdateTime()), printable(a.GetUpdatedBy()), strings.Join(nets, ", "))
	}
	_ = table.Flush() // w is a buffer
	fmt.Fprintf(w, "\n%s restricted in %s.\n", count(n, "mailbox is", "mailboxes are"), printable(domain))
}

func writeCheck(w io.Writer, asked *checkCommand, resp *checkv1.CheckResponse) {
	d := resp.GetDecision()
	verdict := "no"
	if d.GetVerdict() == decisionv1.Verdict_VERDICT_ALLOW {
		verdict = "yes"
	}
	age := "never proven current"
	if resp.GetDataAge() != nil {
		age = "proven current " + resp.GetDataAge().AsDuration().Round(time.Millisecond).String() + " ago"
	}
	if d.GetRevision() != "" {
		age += ", revision " + d.GetRevision()
	}
	writeRows(w, [][2]string{
		{"Allowed", verdict + ", " + reason(asked, d)},
		{"Mailbox", asked.Mailbox},
		{"Client", asked.Address},
		{"Service", asked.Service},
		{"Data", age},
	})
}

// reason says in words why a decision was made.
func reason(asked *checkCommand, d *decisionv1.Decision) string {
	switch d.GetReason() {
	case decisionv1.Reason_REASON_UNRESTRICTED:
		return "the mailbox is unrestricted: it has no list"
	case decisionv1.Reason_REASON_MATCHED:
		return "the address lies in " + d.GetMatchedNet()
	case decisionv1.Reason_REASON_SERVICE_EXEMPT:
		return asked.Service + " is not restricted, whatever the list says"
	case decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS:
		return "the address lies in none of the mailbox's networks"
	case decisionv1.Reason_REASON_CLIENT_ADDRESS_UNKNOWN:
		return "the mailbox is restricted and the client's address is unknown"
	case decisionv1.Reason_REASON_CLIENT_ADDRESS_NOT_PUBLIC:
		return "the address is not a public one and lies in none of the mailbox's networks; does a proxy hide the client?"
	case decisionv1.Reason_REASON_STALE:
		return "the sidecar's data is older than its --deny-after"
	case decisionv1.Reason_REASON_UNSPECIFIED:
	}
	return d.GetReason().String() // or one that is newer than this program
}

// writeRows writes label and value in two columns, empty values as a dash.
func writeRows(w io.Writer, rows [][2]string) {
	for _, row := range rows {
		value := row[1]
		if value == "" {
			value = "-"
		}
		fmt.Fprintf(w, "%-9s %s\n", row[0], printable(value))
	}
}

func clock(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().UTC().Format("2006-01-02 15:04:05 UTC")
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// printable escapes whatever could steer a terminal: names and texts come from elsewhere.
func printable(s string) string {
	if strings.IndexFunc(s, hidden) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if hidden(r) {
			fmt.Fprintf(&b, `\u%04x`, r)
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}

func hidden(r rune) bool { return r != ' ' && !unicode.IsPrint(r) }
