package web

import (
	"context"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/google/uuid"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// panel is what stands at the right: one mailbox, to edit or to look at.
type panel struct {
	Mailbox                string
	Changes                bool // the reader may change it
	Gone                   bool // it is not in the directory
	Known                  bool // what is saved could be read
	Saved                  []netLine
	UpdatedBy              string
	UpdatedAt              time.Time
	URL, Close, HistoryURL string
	Action, CheckURL       string
	Etag, RequestID, Text  string
	Unsaved                bool   // the text is not what is saved
	Focus                  string // title, text, notice or problems
	Notice                 *notice
	Problems               []entryProblem
	Address                *addressView
	Check                  checkView
	History                *historyView
	current                *policyv1.AllowedNets
	silent                 error // why the policy service, or the directory, is not asked any more for this page
}

// netLine is a net with what became of it: plus, minus, same or nothing.
type netLine struct{ Text, Class string }

// netView is what the template of a list takes. A long one scrolls, and then the keyboard must get into it.
func netView(lines []netLine, label string) any {
	plain := !slices.ContainsFunc(lines, func(l netLine) bool { return l.Class != "" })
	return struct {
		Nets           []netLine
		Label          string
		Plain, Scrolls bool
	}{lines, label, plain, len(lines) > 12}
}

func plainNets(nets []*policyv1.Net) []netLine {
	lines := make([]netLine, len(nets))
	for i, n := range nets {
		lines[i].Text = n.GetNet()
	}
	return lines
}

// notice is what the panel says above the field.
type notice struct {
	Kind          string // saved, conflict, lift; or good, warn, bad, info
	Title, Text   any    // strings, or HTML with a time
	Theirs, Yours []netLine
	Progress      *progressView
}

// entryProblem is an entry that was refused.
type entryProblem struct {
	Position        int // from 1
	Entry, Sentence string
	Fixes           []fix
}

// fix is a button that puts something else in the place of an entry.
type fix struct{ Label, Action string }

// addressView is where the reader's browser is.
type addressView struct {
	Text            string
	Covered, Usable bool // it lies in the text; it could be listed
	Warn            bool
}

// panel makes the panel of a mailbox with what is saved. If the policy service does not answer, the panel is returned with the
// error, to be shown by those who have something typed to keep.
func (s *site) panel(r *http.Request, at place) (*panel, error) {
	state := readListState(r.URL.Query(), at.domain)
	m := at.mailbox
	p := &panel{
		Mailbox: m.String(), Changes: at.changes(), Focus: "text", RequestID: uuid.NewString(),
		URL: mailboxURL(m, "", state), Action: mailboxURL(m, "", state), CheckURL: mailboxURL(m, "/check", state),
		HistoryURL: mailboxURL(m, "/history", state), Close: domainURL(at.domain, state) + "#" + anchor(m),
		Check: s.view(r).check(checkForm{}),
	}
	if !p.Changes {
		p.Focus = "title"
	}
	known, err := s.cfg.Directory.Has(r.Context(), m)
	if err != nil {
		return p, err
	}
	p.Gone = !known
	return p, s.refresh(r.Context(), p)
}

// refresh reads what is saved. A name that is neither in the directory nor ever had a list is nobody's mailbox.
func (s *site) refresh(ctx context.Context, p *panel) error {
	current, err := s.policy.get(ctx, p.Mailbox)
	if err != nil {
		return err
	}
	if p.Gone && current.GetRevision() == "" {
		return errNotFound
	}
	p.current, p.Known, p.Etag = current, true, current.GetEtag()
	p.Saved, p.UpdatedBy = plainNets(current.GetNets()), current.GetUpdatedBy()
	if current.GetUpdateTime() != nil {
		p.UpdatedAt = current.GetUpdateTime().AsTime()
	}
	return nil
}

// fieldText is how a list stands in the field.
func fieldText(nets []*policyv1.Net) string {
	texts := make([]string, len(nets))
	for i, n := range nets {
		texts[i] = n.GetNet()
	}
	return strings.Join(texts, ",\n")
}

func (s *site) showMailbox(w http.ResponseWriter, r *http.Request, at place) error {
	p, err := s.panel(r, at)
	if err != nil {
		return err
	}
	p.Text = fieldText(p.current.GetNets())
	q := r.URL.Query()
	switch {
	case q.Get("saved") != "":
		p.Notice = s.savedNotice(r, at, p, q)
		p.Focus = "notice"
	case q.Get("restore") != "" && p.Changes:
		if err := s.restore(r, p, q.Get("restore"), q.Get("page")); err != nil {
			return err
		}
	}
	return s.renderPanel(w, r, http.StatusOK, at, p)
}

// renderPanel completes a panel and shows it: alone for the script, else with the list of mailboxes beside it.
func (s *site) renderPanel(w http.ResponseWriter, r *http.Request, status int, at place, p *panel) error {
	if p.Changes && p.History == nil {
		p.Address = s.address(r, p)
	}
	p.Unsaved = p.current == nil || p.Text != fieldText(p.current.GetNets())
	if partly(r) {
		return s.part(w, r, "panel", p)
	}
	return s.renderDomain(w, r, status, at, p)
}

// address compares the browser's address with the text in the field.
func (s *site) address(r *http.Request, p *panel) *addressView {
	addr := s.cfg.Login.ClientAddr(r)
	if !addr.IsValid() {
		return nil
	}
	addr = addr.Unmap()
	a := &addressView{Text: addr.String(), Covered: covers(p.Text, addr), Usable: allow.IsPublic(addr)}
	if !a.Usable && !a.Covered && p.silent == nil { // the operator may permit it all the same
		_, err := callOnce(r.Context(), s.policy.SetAllowedNets, &policyv1.SetAllowedNetsRequest{
			Mailbox: p.Mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: a.Text}, ValidateOnly: true,
		})
		a.Usable = err == nil
	}
	a.Warn = !a.Covered && !empty(p.Text)
	return a
}

// covers reports whether an address lies in one of the entries of a text, as far as they can be read.
func covers(text string, addr netip.Addr) bool {
	for _, piece := range pieces(text) {
		entry := text[piece[0]:piece[1]]
		if net, err := netip.ParsePrefix(entry); err == nil && (net.Contains(addr) || unmap(net).Contains(addr)) {
			return true
		}
		if one, err := netip.ParseAddr(entry); err == nil && one.Unmap() == addr {
			return true
		}
	}
	return false
}

// unmap returns the IPv4 network that an IPv6 one with mapped addresses is.
func unmap(net netip.Prefix) netip.Prefix {
	if !net.Addr().Is4In6() || net.Bits() < 96 {
		return net
	}
	return netip.PrefixFrom(net.Addr().Unmap(), net.Bits()-96)
}

// empty reports whether a text holds no entry at all: that is how a restriction is lifted.
func empty(text string) bool { return len(pieces(text)) == 0 }

// pieces returns where the pieces of a text stand, cut and trimmed as the policy service does it.
func pieces(text string) [][2]int {
	var all [][2]int
	start := 0
	add := func(end int) {
		piece := strings.TrimLeftFunc(text[start:end], ignorable)
		from := end - len(piece)
		if piece = strings.TrimRightFunc(piece, ignorable); piece != "" {
			all = append(all, [2]int{from, from + len(piece)})
		}
	}
	for i, c := range text {
		if c == ',' || c == ';' || unicode.IsSpace(c) {
			add(i)
			start = i + len(string(c))
		}
	}
	add(len(text))
	return all
}

func ignorable(c rune) bool { return unicode.IsSpace(c) || unicode.Is(unicode.Cf, c) }

// replace puts something else in the place of the entry that is the index-th piece. If the text was edited since, it looks for
// the entry elsewhere; ok is false if it is gone.
func replace(text string, index int, entry, by string) (_ string, ok bool) {
	all := pieces(text)
	here := func(i int) bool {
		return i >= 0 && i < len(all) && entry != "" && strings.HasPrefix(text[all[i][0]:], entry)
	}
	if !here(index) {
		if index = slices.IndexFunc(all, func(p [2]int) bool { return text[p[0]:p[1]] == entry }); index < 0 {
			return text, false
		}
	}
	from := all[index][0]
	return text[:from] + by + text[from+len(entry):], true
}

// appendEntry adds an entry on a line of its own.
func appendEntry(text, entry string) string {
	trimmed := strings.TrimRightFunc(text, func(c rune) bool { return ignorable(c) || c == ',' || c == ';' })
	if empty(trimmed) {
		return entry
	}
	return trimmed + ",\n" + entry
}

// problems says in the reader's language what is wrong with the entries of a text; nil if err is about something else.
func (v *view) problems(err error) []entryProblem {
	if rpcerr.Reason(err) != decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID {
		return nil
	}
	var all []entryProblem
	for _, n := range rpcerr.Detail[*policyv1.InvalidNets](err).GetInvalidNets() {
		p := entryProblem{Position: int(n.GetIndex()) + 1, Entry: n.GetText(), Sentence: v.refusal(n)}
		if n.GetRefusal() == decisionv1.NetRefusal_NET_REFUSAL_RANGE && len(n.GetSuggestions()) > 0 {
			// The prefixes are the range only together.
			p.Fixes = []fix{newFix(n, strings.Join(n.GetSuggestions(), ", "))}
		} else {
			for _, suggestion := range n.GetSuggestions() {
				p.Fixes = append(p.Fixes, newFix(n, suggestion))
			}
		}
		all = append(all, p)
	}
	return all
}

// refusal is the sentence about one entry. In English the policy service has said it better than a sentence for each reason can.
func (v *view) refusal(n *policyv1.InvalidNet) string {
	if v.tag == "en" && n.GetMessage() != "" {
		return n.GetMessage()
	}
	if n.GetText() == "" {
		return v.text("refusal.long")
	}
	sentence := v.text(n.GetRefusal().String(), n.GetText())
	if n.GetBlock() != "" {
		sentence += " " + v.text("refusal.block", n.GetBlock())
	}
	return sentence
}
