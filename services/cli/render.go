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

// writeSet says what a set did. An answer to a repetition does not tell whether the list is new.
func writeSet(w io.Writer, resp *policyv1.SetAllowedNetsResponse, validateOnly, repeated bool) {
	mailbox := printable(resp.GetAllowedNets().GetMailbox())
	switch {
	case validateOnly:
		fmt.Fprintf(w, "The list is valid. Nothing was saved.\n\n")
	case resp.GetSuperseded() && repeated:
		fmt.Fprintf(w, overtaken+" It left this list:\n\n", "Saved", mailbox)
	case resp.GetSuperseded():
		fmt.Fprintf(w, superseded+" It left this list:\n\n", mailbox)
	case resp.GetChanged() || repeated:
		fmt.Fprintf(w, "Saved. %s can now be reached from these networks only.\n\n", mailbox)
	default:
		fmt.Fprintf(w, "Nothing to change: %s has this list already.\n\n", mailbox)
	}
	writeAllowedNets(w, resp.GetAllowedNets())
}

// What a request id once did is no longer in force. superseded: it was given by the caller, and used up long ago. overtaken:
// our first attempt used it, and somebody was quicker than our repetition.
const (
	superseded = "NOTHING WAS DONE: this request id was carried out before, and %s was changed since; see `allowednets get`."
	overtaken  = "%s, but %s was changed again since; see `allowednets get`."
)

// lift is one of the ways to end a restriction, in words.
type lift struct{ could, done, deed string }

func clearing() lift {
	return lift{deed: "Cleared", could: "The list of %s can be cleared. Nothing was changed.\n", done: "Cleared. %s can now be reached from every address.\n"}
}

func deletion() lift {
	return lift{deed: "Deleted", could: "%s can be deleted. Nothing was changed.\n", done: "Deleted. %s has no list any more; its history stays.\n"}
}

// writeLift says what a clear or a delete did.
func writeLift(w io.Writer, words lift, resp saveResponse, validateOnly, repeated bool) {
	mailbox := printable(resp.GetAllowedNets().GetMailbox())
	switch {
	case validateOnly:
		fmt.Fprintf(w, words.could, mailbox)
	case resp.GetSuperseded() && repeated:
		fmt.Fprintf(w, overtaken+"\n", words.deed, mailbox)
	case resp.GetSuperseded():
		fmt.Fprintf(w, superseded+"\n", mailbox)
	case resp.GetChanged() || repeated:
		fmt.Fprintf(w, words.done, mailbox)
	default:
		fmt.Fprintf(w, "Nothing to change: %s had no list.\n", mailbox)
	}
}

func writeRename(w io.Writer, old string, resp *policyv1.RenameMailboxResponse, repeated bool) {
	if !resp.GetChanged() && !repeated {
		fmt.Fprintf(w, "Nothing to change: %s has no list.\n", printable(old))
		return
	}
	fmt.Fprintf(w, "Renamed. %s has no list any more; it is that of %s now:\n\n", printable(old), printable(resp.GetAllowedNets().GetMailbox()))
	writeAllowedNets(w, resp.GetAllowedNets())
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

func writeCheck(w io.Writer, asked accessFlags, resp *checkv1.CheckResponse) {
	d := resp.GetDecision()
	age := "never proven current"
	if resp.GetDataAge() != nil {
		age = "proven current " + resp.GetDataAge().AsDuration().Round(time.Millisecond).String() + " ago"
	}
	if d.GetRevision() != "" {
		age += ", revision " + d.GetRevision()
	}
	writeDecision(w, asked, d, [2]string{"Data", age})
}

func writeExplanation(w io.Writer, asked accessFlags, draft bool, d *decisionv1.Decision) {
	list := "the saved one, revision " + d.GetRevision()
	if draft {
		list = "the draft; nothing was saved"
	}
	writeDecision(w, asked, d, [2]string{"List", list})
}

func writeDecision(w io.Writer, asked accessFlags, d *decisionv1.Decision, basis [2]string) {
	verdict := "no"
	if d.GetVerdict() == decisionv1.Verdict_VERDICT_ALLOW {
		verdict = "yes"
	}
	writeRows(w, [][2]string{
		{"Allowed", verdict + ", " + reason(asked, d)},
		{"Mailbox", asked.Mailbox},
		{"Client", asked.Address},
		{"Service", asked.Service},
		basis,
	})
}

// reason says in words why a decision was made.
func reason(asked accessFlags, d *decisionv1.Decision) string {
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
