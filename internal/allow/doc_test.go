package allow

import (
	"os"
	"slices"
	"strings"
	"testing"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// documented returns the rows of the table in docs/semantics.md that has this header, cells without white space around.
func documented(t *testing.T, header ...string) [][]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/semantics.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(text), "\n| "+strings.Join(header, " | ")+" |\n")
	if !found {
		t.Fatalf("no table %q", header)
	}
	var rows [][]string
	for line := range strings.Lines(table) {
		line, isRow := strings.CutPrefix(strings.TrimSpace(line), "|")
		if !isRow {
			break
		}
		if strings.HasPrefix(line, "---") {
			continue
		}
		cells := strings.Split(strings.TrimSuffix(line, "|"), "|")
		if len(cells) != len(header) {
			t.Fatalf("%q has %d cells", line, len(cells))
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		rows = append(rows, cells)
	}
	return rows
}

// code returns what stands between the backticks of a cell.
func code(cell string) []string {
	var words []string
	for i, s := range strings.Split(cell, "`") {
		if i%2 == 1 {
			words = append(words, s)
		}
	}
	return words
}

func TestDocumentedMailboxes(t *testing.T) {
	for _, row := range documented(t, "given", "canonical") {
		m, err := ParseMailbox(code(row[0])[0])
		if want := code(row[1]); row[1] == "refused" && err == nil || row[1] != "refused" && (err != nil || m.String() != want[0]) {
			t.Errorf("%s: %q, %v; documented as %s", row[0], m, err, row[1])
		}
	}
}

func TestDocumentedRefusals(t *testing.T) {
	seen := map[decisionv1.NetRefusal]bool{decisionv1.NetRefusal_NET_REFUSAL_UNSPECIFIED: true, decisionv1.NetRefusal_NET_REFUSAL_TOO_MANY: true}
	for _, row := range documented(t, "entry", "reason", "suggestions", "message") {
		p := onlyProblem(t, Rules{}, code(row[0])[0])
		checkProblem(t, Rules{}, p)
		seen[p.Refusal] = true
		if got := strings.TrimPrefix(p.Refusal.String(), "NET_REFUSAL_"); got != row[1] {
			t.Errorf("%s is refused as %s; documented as %s", row[0], got, row[1])
		}
		if !slices.Equal(p.Suggestions, code(row[2])) {
			t.Errorf("%s: suggestions %q; documented %q", row[0], p.Suggestions, row[2])
		}
		if p.Message != row[3] {
			t.Errorf("%s:\n%s\ndocumented:\n%s", row[0], p.Message, row[3])
		}
		// A text of this entry alone is the same.
		if _, err := (Rules{}).ParseText(code(row[0])[0]); row[0] != "`8.8.8.8 8.8.4.4`" {
			if got := problemsOf(t, Rules{}, err); len(got) != 1 || !strings.HasSuffix(got[0], row[1]) {
				t.Errorf("%s as a text: %q", row[0], got)
			}
		}
	}
	for n, name := range decisionv1.NetRefusal_name {
		if !seen[decisionv1.NetRefusal(n)] {
			t.Errorf("no example of %s", name)
		}
	}
}

func TestDocumentedBlocks(t *testing.T) {
	var got, want []string
	for _, b := range slices.Concat(refusedBlocks4, refusedBlocks6) {
		want = append(want, b.reason.String()+" "+b.text)
	}
	for _, row := range documented(t, "block", "reason", "use") {
		got = append(got, "NET_REFUSAL_"+row[1]+" "+code(row[0])[0]+" ("+row[2]+")")
	}
	if !slices.Equal(got, want) {
		t.Errorf("documented:\n%s\nin the code:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	text, err := os.ReadFile("../../docs/semantics.md")
	if err != nil {
		t.Fatal(err)
	}
	_, accepted, _ := strings.Cut(string(text), "\nAccepted, as globally reachable blocks inside refused ones: ")
	accepted, _, _ = strings.Cut(accepted, "\n\n")
	for _, cidr := range code(accepted) {
		if _, err := (Rules{}).ParseEntries([]string{cidr}); err != nil {
			t.Error(err)
		}
	}
	if got, want := len(code(accepted)), len(reachableBlocks)+4; got != want {
		t.Errorf("%d accepted blocks are documented; want %d", got, want)
	}
}

func TestDocumentedServices(t *testing.T) {
	withSubmission, err := NewScope(decisionv1.Service_SERVICE_SMTP_SUBMISSION)
	if err != nil {
		t.Fatal(err)
	}
	rows := documented(t, "service", "list applies", "for")
	if len(rows) != len(decisionv1.Service_name)-1 {
		t.Errorf("%d services are documented", len(rows))
	}
	for _, row := range rows {
		svc := decisionv1.Service(decisionv1.Service_value["SERVICE_"+code(row[0])[0]])
		never, known := Scope{}.Restricts(svc)
		also, _ := withSubmission.Restricts(svc)
		want := map[[2]bool]string{{true, true}: "yes", {false, true}: "if the operator restricts it", {false, false}: "never"}[[2]bool{never, also}]
		if !known || row[1] != want {
			t.Errorf("%s: documented as %q; want %q", row[0], row[1], want)
		}
	}
	for _, row := range documented(t, "peer", "word", "service") {
		if _, known := decisionv1.Service_value["SERVICE_"+code(row[2])[0]]; !known {
			t.Errorf("unknown service %s", row[2])
		}
	}
	reasons := documented(t, "reason", "verdict", "when")
	if len(reasons) != len(decisionv1.Reason_name)-1 {
		t.Errorf("%d reasons are documented", len(reasons))
	}
	for _, row := range reasons {
		if _, known := decisionv1.Reason_value["REASON_"+code(row[0])[0]]; !known {
			t.Errorf("unknown reason %s", row[0])
		}
	}
}
