package web

import (
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func timeOf(s string) (time.Time, error) { return time.Parse(time.RFC3339, s) }

func prefixes(t *testing.T, texts ...string) (nets []netip.Prefix) {
	t.Helper()
	for _, text := range texts {
		nets = append(nets, netip.MustParsePrefix(text))
	}
	return nets
}

func mailbox(t *testing.T, name string) allow.Mailbox {
	t.Helper()
	m, err := allow.ParseMailbox(name)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func loaded(t *testing.T) assets {
	t.Helper()
	a, err := loadAssets()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func viewIn(t *testing.T, tag string) *view {
	t.Helper()
	views, err := newViews(loaded(t))
	if err != nil {
		t.Fatal(err)
	}
	return views[tag]
}

// TestMessages: every text that the pages name is there in both languages, with the same values in the same order; none is left
// over; and there is one for each value of the enums that a person is told about.
func TestMessages(t *testing.T) {
	all := messages()
	verbs := regexp.MustCompile(`%[sd]`)
	for key, m := range all {
		en, de := strings.Split(m.en, "|"), strings.Split(m.de, "|")
		if m.en == "" || m.de == "" || len(en) != len(de) || len(en) > 2 {
			t.Errorf("%s: %q, %q", key, m.en, m.de)
			continue
		}
		for i := range en {
			if want := verbs.FindAllString(en[0], -1); !slices.Equal(verbs.FindAllString(en[i], -1), want) || !slices.Equal(verbs.FindAllString(de[i], -1), want) {
				t.Errorf("%s has different values: %q, %q", key, en[i], de[i])
			}
		}
	}
	enums := make(map[string]bool)
	for _, d := range []protoreflect.EnumDescriptor{
		decisionv1.Service(0).Descriptor(), decisionv1.Reason(0).Descriptor(), decisionv1.NetRefusal(0).Descriptor(), policyv1.ChangeKind(0).Descriptor(),
	} {
		for i := range d.Values().Len() {
			name := string(d.Values().Get(i).Name())
			if strings.HasSuffix(name, "_UNSPECIFIED") && !strings.HasPrefix(name, "CHANGE_KIND") {
				continue
			}
			enums[name] = true
			m, ok := all[name]
			if !ok {
				t.Errorf("there is no text for %s", name)
			}
			if strings.HasPrefix(name, "NET_REFUSAL") && (!strings.Contains(m.de, "„%s“") || !strings.Contains(m.de, ";")) {
				t.Errorf("the German text for %s does not name the entry and say what to do: %s", name, m.de)
			}
		}
	}
	used := usedKeys(t)
	for _, reason := range []login.Reason{
		login.WrongCredentials, login.TooManyAttempts, login.Busy, login.NoAccess, login.ProviderUnavailable, login.ProviderRefused, login.LoginExpired,
	} {
		used["login."+string(reason)] = true
	}
	for key := range used {
		if _, ok := all[key]; !ok {
			t.Errorf("there is no text for %q", key)
		}
	}
	for key := range maps.Keys(all) {
		if !used[key] && !enums[key] {
			t.Errorf("nothing shows %q", key)
		}
	}
}

// usedKeys finds the keys in templates and code.
func usedKeys(t *testing.T) map[string]bool {
	t.Helper()
	used := make(map[string]bool)
	files := must(filepath.Glob("templates/*.html"))
	inTemplates := regexp.MustCompile(`\(?\b(?:t|tn|timed) "([^"]+)"`)
	all := messages()
	inCode := regexp.MustCompile(`(?:text|plural|timed)\("([a-z-]+(?:\.[a-z-]+)*)"|key(?:: |\s*=\s*| := )"([a-z.-]+)"|"(domain\.[a-z]+)"`)
	for _, path := range append(files, must(filepath.Glob("*.go"))...) {
		if strings.HasSuffix(path, "_test.go") || path == "messages.go" {
			continue
		}
		text := string(must(os.ReadFile(path)))
		for _, m := range inTemplates.FindAllStringSubmatch(text, -1) {
			used[m[1]] = true
		}
		for _, m := range inCode.FindAllStringSubmatch(text, -1) {
			for _, key := range m[1:] {
				if key == "" {
					continue
				}
				if _, whole := all[key]; whole {
					used[key] = true
					continue
				}
				used[key+".title"], used[key+".text"] = true, true // of a page
			}
		}
	}
	return used
}

func TestPluralsAndNumbers(t *testing.T) {
	en, de := viewIn(t, "en"), viewIn(t, "de")
	for got, want := range map[string]string{
		en.plural("domain.nets", 1): "1 network", en.plural("domain.nets", 0): "0 networks", en.plural("domain.nets", 12345): "12,345 networks",
		de.plural("domain.nets", 1): "1 Netz", de.plural("domain.nets", 1234567): "1.234.567 Netzen",
		en.plural("progress.all", 1, 1): "Active on 1 of 1 server.", en.plural("progress.all", 2, 1): "Active on 1 of 2 servers.",
		en.wait(1500 * time.Millisecond): "2 seconds", de.wait(0): "1 Sekunde", de.wait(5 * time.Minute): "5 Minuten",
		de.text("NET_REFUSAL_ZONE", "fe80::1%eth0"): "„fe80::1%eth0“ enthält eine Zone; schreiben Sie die Adresse ohne das Prozentzeichen und was danach kommt.",
		en.text("NET_REFUSAL_ZONE", "fe80::1%eth0"): "“fe80::1%eth0” has a zone; write the address without the % and what follows.",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
