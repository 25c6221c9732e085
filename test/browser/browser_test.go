package browser_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"

	"github.com/chromedp/chromedp"
	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/test/browser"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestPerson: a page sees the language, the theme, the window and the script setting of the person who looks at it, and
// no other person's cookies.
func TestPerson(t *testing.T) {
	if err := browser.Missing(); err != nil {
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("ALLOWEDNETS_E2E=required, but: %v", err)
		}
		t.Skipf("NOT TESTED in a real browser: %v", err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cookie, _ := r.Cookie("seen")
		http.SetCookie(w, &http.Cookie{Name: "seen", Value: "yes"})
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintf(w, `<!doctype html><meta name=viewport content="width=device-width"><style>:root { color-scheme: light dark } p::after { content: "light" }
			@media (prefers-color-scheme: dark) { p::after { content: "dark" } }</style>
			<p id=sent>%s, cookie %v</p><p id=script>none</p><script>script.textContent = innerWidth</script>`,
			r.Header.Get("Accept-Language"), cookie != nil)
	}))
	defer server.Close()
	b, err := browser.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, c := range []struct {
		person             browser.Person
		sent, script, mode string
	}{
		{browser.Person{}, "en-US, cookie false", "1440", `"light"`},
		{browser.Person{Language: "de-DE", Width: 360, Height: 640, Dark: true}, "de-DE, cookie false", "360", `"dark"`},
		{browser.Person{NoScript: true}, "en-US, cookie false", "none", `"light"`},
	} {
		page, closePage, err := b.Page(c.person)
		if err != nil {
			t.Fatal(err)
		}
		err = chromedp.Do(page, chromedp.Navigate(server.URL))
		sent, sentErr := chromedp.Run(page, chromedp.Text("#sent"))
		script, scriptErr := chromedp.Run(page, chromedp.Text("#script"))
		mode, modeErr := chromedp.Run(page, chromedp.Evaluate[string](`getComputedStyle(document.querySelector("p"), "::after").content`))
		err = errors.Join(err, sentErr, scriptErr, modeErr)
		closePage()
		if err != nil {
			t.Fatalf("%+v: %v", c.person, err)
		}
		if sent != c.sent || script != c.script || mode != c.mode {
			t.Errorf("%+v: %q, script %q, %s; want %q, %q, %s", c.person, sent, script, mode, c.sent, c.script, c.mode)
		}
	}
}
