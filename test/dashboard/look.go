package dashboard

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/chromedp/chromedp"

	"github.com/allowednets/allowednets/test/browser"
	"github.com/allowednets/allowednets/test/stack"
)

// Axe is the script of axe-core.
type Axe string

// LoadAxe reads the script where `make axe` put it.
func LoadAxe() (Axe, error) {
	root, err := stack.Root()
	if err != nil {
		return "", err
	}
	script, err := os.ReadFile(filepath.Join(root, "tools", "axe", "node_modules", "axe-core", "axe.min.js"))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("axe-core is missing, run make axe first: %w", err)
	}
	return Axe(script), err
}

// Screenshot keeps what the window shows as bin/screenshots/NAME.png.
func (p *Person) Screenshot(name string) error { return browser.Screenshot(p.page, name) }

// Look returns what is wrong with the page that can be seen without knowing what it is about: complaints of the browser, a page
// that is wider than the window, and what axe-core finds by its rules of WCAG and of good practice.
func (p *Person) Look(axe Axe) ([]string, error) {
	wrong := p.Complaints()
	wider, err := chromedp.Run(p.page, chromedp.Evaluate[int](`document.documentElement.scrollWidth - document.documentElement.clientWidth`))
	if err != nil {
		return nil, err
	}
	if wider > 0 {
		wrong = append(wrong, fmt.Sprintf("the page is %d pixels wider than the window", wider))
	}
	if p.NoScript {
		return wrong, nil
	}
	// DevTools may evaluate what the page itself may not load.
	result, err := chromedp.Run(p.page, chromedp.Evaluate[string](string(axe)+`
		;(async () => JSON.stringify((await axe.run(document, {resultTypes: ["violations"]})).violations
			.map(v => ({id: v.id, help: v.help, nodes: v.nodes.map(n => n.html + " " + n.failureSummary)}))))()`, chromedp.EvalAwaitPromise))
	if err != nil {
		return nil, fmt.Errorf("running axe-core: %w", err)
	}
	var violations []struct {
		ID, Help string
		Nodes    []string
	}
	if err := json.Unmarshal([]byte(result), &violations); err != nil {
		return nil, fmt.Errorf("running axe-core: %w", err)
	}
	for _, v := range violations {
		wrong = append(wrong, fmt.Sprintf("axe-core: %s (%s): %s", v.ID, v.Help, strings.Join(v.Nodes, "\n\t")))
	}
	return wrong, nil
}
