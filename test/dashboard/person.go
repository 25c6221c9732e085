// Package dashboard uses the dashboard as people do: it finds what is on a page by role and name, as they and their screen
// readers know it, and goes there with the mouse or with the keyboard alone.
package dashboard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/dom"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/fetch"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/allowednets/allowednets/test/browser"
)

const (
	// seesWithin bounds the wait for anything on a page.
	seesWithin = 15 * time.Second
	// looksEvery leaves the browser time to get on with it.
	looksEvery = 40 * time.Millisecond
	// maxTabs bounds the way of a keyboard to anything.
	maxTabs = 200
	// clickLasts is how long a finger stays down: what moves away meanwhile is missed.
	clickLasts = 80 * time.Millisecond
	// fieldRole stands for what one can type into: a textbox or a searchbox.
	fieldRole = "field"
)

// Traits say how somebody uses the dashboard.
type Traits struct {
	browser.Person
	// Keyboard: never the mouse.
	Keyboard bool
	// Address is where they are, as the proxy in front of the dashboard says.
	Address string
}

// Person uses the dashboard in a browser of their own. Not for concurrent use.
type Person struct {
	Traits
	page context.Context //nolint:containedctx // chromedp keeps the page in a context
	url  string

	mu    sync.Mutex
	wrong []string          // what the browser complained of
	held  []fetch.RequestID // answers that the browser got and the page did not
}

// Visit opens a browser for somebody; leave closes it.
func Visit(b *browser.Browser, url string, traits Traits) (p *Person, leave func(), err error) {
	p = &Person{Traits: traits, url: url}
	if p.page, leave, err = b.Page(traits.Person); err != nil {
		return nil, nil, err
	}
	headers := network.Headers{"Accept-Language": traits.Language}
	if traits.Address != "" {
		headers["X-Forwarded-For"] = traits.Address
	}
	err = errors.Join(
		chromedp.Listen(p.page, p.hear),
		does(p.page, page.Enable, page.EnableParams{}), does(p.page, log.Enable, cdp.Empty{}), does(p.page, runtime.Enable, cdp.Empty{}),
		does(p.page, accessibility.Enable, cdp.Empty{}),
		// Others may use the browser at the same time.
		does(p.page, emulation.SetFocusEmulationEnabled, emulation.SetFocusEmulationEnabledParams{Enabled: true}),
		does(p.page, network.SetExtraHTTPHeaders, network.SetExtraHTTPHeadersParams{Headers: headers}),
	)
	if err != nil {
		leave()
		return nil, nil, fmt.Errorf("visiting the dashboard: %w", err)
	}
	return p, leave, nil
}

func does[P, R any](ctx context.Context, command cdp.Command[P, R], params P) error {
	_, err := chromedp.Call(ctx, command, params)
	return err
}

// hear notes scripts that fail and what the Content-Security-Policy kept out. Whoever is asked whether to leave a page, leaves.
func (p *Person) hear(event any) {
	var complaint string
	switch e := event.(type) {
	case *page.EventJavascriptDialogOpening:
		go func() { _ = does(p.page, page.HandleJavaScriptDialog, page.HandleJavaScriptDialogParams{Accept: true}) }()
	case *fetch.EventRequestPaused:
		p.mu.Lock()
		p.held = append(p.held, e.RequestID)
		p.mu.Unlock()
	case *runtime.EventExceptionThrown:
		complaint = e.ExceptionDetails.Text
	case *log.EventEntryAdded:
		if e.Entry.Level == log.EntryLevelError && e.Entry.Source != log.EntrySourceNetwork { // an answer of 409 is an error of the network
			complaint = e.Entry.Text
		}
	}
	if complaint != "" {
		p.mu.Lock()
		p.wrong = append(p.wrong, complaint)
		p.mu.Unlock()
	}
}

// Complaints returns what the browser complained of since the last call.
func (p *Person) Complaints() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	wrong := p.wrong
	p.wrong = nil
	return wrong
}

// Go enters a path into the address bar.
func (p *Person) Go(path string) error {
	ctx, cancel := context.WithTimeout(p.page, seesWithin)
	defer cancel()
	if err := chromedp.Do(ctx, chromedp.Navigate(p.url+path)); err != nil {
		return fmt.Errorf("going to %s: %w", path, err)
	}
	return nil
}

// Hold keeps answers from the script until release, which waits for one and for what the script makes of it.
func (p *Person) Hold() (release func() error, err error) {
	const fetched = `performance.getEntriesByType("resource").filter(e => e.initiatorType === "fetch").length`
	before, countErr := chromedp.Run(p.page, chromedp.Evaluate[int](fetched))
	enableErr := does(p.page, fetch.Enable, fetch.EnableParams{Patterns: []*fetch.RequestPattern{
		{ResourceType: network.ResourceTypeFetch, RequestStage: fetch.RequestStageResponse}, {ResourceType: network.ResourceTypeXHR, RequestStage: fetch.RequestStageResponse},
	}})
	return func() error {
		var held []fetch.RequestID
		err := p.until(func(context.Context) error {
			p.mu.Lock()
			defer p.mu.Unlock()
			if held, p.held = p.held, nil; held == nil {
				return errors.New("no answer was held")
			}
			return nil
		})
		for _, id := range held {
			err = errors.Join(err, does(p.page, fetch.ContinueRequest, fetch.ContinueRequestParams{RequestID: id}))
		}
		err = errors.Join(err, does(p.page, fetch.Disable, cdp.Empty{}), p.until(func(ctx context.Context) error {
			now, err := chromedp.Run(ctx, chromedp.Evaluate[int](fetched))
			if err == nil && now == before {
				err = errors.New("the answer did not arrive")
			}
			return err
		}))
		_, idleErr := chromedp.Run(p.page, chromedp.Evaluate[bool](`new Promise(done => requestIdleCallback(() => done(true), {timeout: 1000}))`, chromedp.EvalAwaitPromise))
		return errors.Join(err, idleErr)
	}, errors.Join(countErr, enableErr)
}

// EndSession logs out behind the back of the page.
func (p *Person) EndSession() error {
	status, err := chromedp.Run(p.page, chromedp.Evaluate[int](
		`fetch("/logout", {method: "POST", redirect: "manual"}).then(r => r.status)`, chromedp.EvalAwaitPromise))
	if err == nil && status != 0 { // a redirect that is not followed has the status 0
		err = fmt.Errorf("status %d", status)
	}
	return err
}

// Path returns where they are, with the query.
func (p *Person) Path() (string, error) {
	location, err := chromedp.Run(p.page, chromedp.Location())
	return strings.TrimPrefix(location, p.url), err
}

// element is something on a page.
type element struct {
	node  cdp.BackendNodeID
	value string
	props map[string]string
}

// find returns the only thing that has a role and a name and is not hidden. A name that ends in … is the beginning of one.
func (p *Person) find(ctx context.Context, role, name string) (element, error) {
	document, err := chromedp.Call(ctx, dom.GetDocument, dom.GetDocumentParams{})
	if err != nil {
		return element{}, err
	}
	roles := []string{role}
	if role == fieldRole {
		roles = []string{"textbox", "searchbox"}
	}
	var candidates []*accessibility.Node
	for _, r := range roles {
		found, err := chromedp.Call(ctx, accessibility.QueryAXTree, accessibility.QueryAXTreeParams{NodeID: document.Root.NodeID, Role: r})
		if err != nil {
			return element{}, err
		}
		candidates = append(candidates, found.Nodes...)
	}
	begin, part := strings.CutSuffix(name, "…")
	var names []string
	nodes := slices.DeleteFunc(candidates, func(n *accessibility.Node) bool {
		if n.Ignored || n.Name == nil {
			return true
		}
		called := strings.NewReplacer(" @", "@").Replace(text(n.Name)) // where a line may break
		names = append(names, called)
		return called != begin && !(part && strings.HasPrefix(called, begin))
	})
	if len(nodes) != 1 {
		return element{}, fmt.Errorf("the page has %d of %s %q among %q", len(nodes), role, name, names)
	}
	n := nodes[0]
	e := element{node: n.BackendDOMNodeID, props: make(map[string]string)}
	if n.Value != nil {
		e.value = text(n.Value)
	}
	for _, prop := range n.Properties {
		e.props[string(prop.Name)] = text(prop.Value)
	}
	return e, nil
}

func text(v *accessibility.Value) string {
	var s string
	if json.Unmarshal(v.Value, &s) == nil {
		return s
	}
	return string(v.Value)
}

// await finds something as soon as it is there.
func (p *Person) await(role, name string) (e element, err error) {
	err = p.until(func(ctx context.Context) error {
		e, err = p.find(ctx, role, name)
		return err
	})
	return e, err
}

func (p *Person) until(probe func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(p.page, seesWithin)
	defer cancel()
	tick := time.NewTicker(looksEvery)
	defer tick.Stop()
	var last, err error
	for {
		if err = probe(ctx); err == nil || ctx.Err() != nil {
			break
		}
		last = err
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	if err != nil {
		err = errors.Join(err, last)
		path, _ := p.Path()
		return fmt.Errorf("on %s: %w", path, err)
	}
	return nil
}

// Press presses a button, a link or another control: by a click, or by the keyboard.
func (p *Person) Press(role, name string) error {
	e, err := p.await(role, name)
	if err != nil {
		return err
	}
	if p.Keyboard {
		if err := p.tabTo(e.node, role+" "+name); err != nil {
			return err
		}
		key := kb.Enter
		if role == "radio" || role == "DisclosureTriangle" {
			key = " "
		}
		return chromedp.Do(p.page, chromedp.KeyEvent(key))
	}
	return p.click(e.node, role+" "+name)
}

// click moves the window to something and clicks on it. It is an error if something else covers it.
func (p *Person) click(node cdp.BackendNodeID, what string) error {
	object, err := chromedp.Call(p.page, dom.ResolveNode, dom.ResolveNodeParams{BackendNodeID: node})
	if err != nil {
		return fmt.Errorf("looking at %s: %w", what, err)
	}
	place, err := chromedp.Call(p.page, runtime.CallFunctionOn, runtime.CallFunctionOnParams{
		ObjectID: object.Object.ObjectID, ReturnByValue: new(true),
		FunctionDeclaration: `function() {
			this.scrollIntoView({block: "center", behavior: "instant"});
			const r = this.getClientRects()[0];
			if (!r) return {covered: "nothing: it has no place"};
			const x = r.x + r.width / 2, y = r.y + r.height / 2, hit = document.elementFromPoint(x, y);
			return {x, y, covered: hit && (this.contains(hit) || hit.contains(this)) ? "" : hit?.outerHTML ?? "the edge of the window"};
		}`,
	})
	if err != nil {
		return fmt.Errorf("looking at %s: %w", what, err)
	}
	var at struct {
		X, Y    float64
		Covered string
	}
	if err := json.Unmarshal(place.Result.Value, &at); err != nil || at.Covered != "" {
		return fmt.Errorf("%s cannot be clicked, it is behind %.200s %w", what, at.Covered, errors.Join(err))
	}
	x, y := at.X, at.Y
	return chromedp.Do(p.page,
		chromedp.MouseEvent(chromedp.MouseMoved, x, y), chromedp.MouseEvent(chromedp.MousePressed, x, y, chromedp.ButtonLeft, chromedp.ClickCount(1)),
		chromedp.Sleep(clickLasts),
		chromedp.MouseEvent(chromedp.MouseReleased, x, y, chromedp.ButtonLeft, chromedp.ClickCount(1)))
}

// Follow presses something and waits until another page is there.
func (p *Person) Follow(role, name string) error {
	return p.leave(func() error { return p.Press(role, name) }, role+" "+name)
}

// FollowKey presses a key and waits until another page is there.
func (p *Person) FollowKey(key string) error {
	return p.leave(func() error { return p.Key(key) }, fmt.Sprintf("the key %q", key))
}

func (p *Person) leave(act func() error, what string) error {
	const began = "document.readyState === 'complete' ? performance.timeOrigin : 0"
	before, err := chromedp.Run(p.page, chromedp.Evaluate[float64](began))
	if err != nil {
		return err
	}
	if err := act(); err != nil {
		return err
	}
	return p.until(func(ctx context.Context) error {
		now, err := chromedp.Run(ctx, chromedp.Evaluate[float64](began))
		if err == nil && (now == before || now == 0) {
			err = fmt.Errorf("%s leads to no other page", what)
		}
		return err
	})
}

// tabTo goes to something by the keyboard.
func (p *Person) tabTo(node cdp.BackendNodeID, what string) error {
	for range maxTabs {
		focused, err := chromedp.Call(p.page, runtime.Evaluate, runtime.EvaluateParams{Expression: "document.activeElement"})
		if err != nil {
			return err
		}
		described, err := chromedp.Call(p.page, dom.DescribeNode, dom.DescribeNodeParams{ObjectID: focused.Result.ObjectID})
		if err != nil {
			return err
		}
		if described.Node.BackendNodeID == node {
			return nil
		}
		if err := chromedp.Do(p.page, chromedp.KeyEvent(kb.Tab)); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s cannot be reached by the keyboard", what)
}

// Type puts text in the place of what is in a field, as pasting does, and leaves the field there.
func (p *Person) Type(label, text string) error {
	e, err := p.await(fieldRole, label)
	if err != nil {
		return err
	}
	if p.Keyboard {
		err = p.tabTo(e.node, label)
	} else {
		err = p.click(e.node, label)
	}
	if err != nil {
		return err
	}
	if err := chromedp.Do(p.page, chromedp.KeyEvent("a", chromedp.KeyModifiers(kb.ModifierCtrl)), chromedp.KeyEvent(kb.Backspace)); err != nil {
		return err
	}
	if text == "" {
		return nil
	}
	return does(p.page, input.InsertText, input.InsertTextParams{Text: text})
}

// Key presses a key wherever the focus is.
func (p *Person) Key(key string) error { return chromedp.Do(p.page, chromedp.KeyEvent(key)) }

// Value returns what is in a field.
func (p *Person) Value(label string) (string, error) {
	e, err := p.await(fieldRole, label)
	return e.value, err
}

// AwaitValue waits until a field holds a text.
func (p *Person) AwaitValue(label, want string) error {
	return p.until(func(ctx context.Context) error {
		e, err := p.find(ctx, fieldRole, label)
		if err == nil && e.value != want {
			err = fmt.Errorf("the field %s holds %q, want %q", label, e.value, want)
		}
		return err
	})
}

// Has reports whether the page has something with a role and a name now.
func (p *Person) Has(role, name string) bool {
	_, err := p.find(p.page, role, name)
	return err == nil
}

// Await waits until something with a role and a name is there.
func (p *Person) Await(role, name string) error {
	_, err := p.await(role, name)
	return err
}

// AwaitFocus waits until the focus is on something with a role and a name.
func (p *Person) AwaitFocus(role, name string) error {
	return p.until(func(ctx context.Context) error {
		e, err := p.find(ctx, role, name)
		if err == nil && e.props["focused"] != "true" {
			err = fmt.Errorf("%s %q has no focus", role, name)
		}
		return err
	})
}

// Text returns what can be read on the page.
func (p *Person) Text() (string, error) {
	return chromedp.Run(p.page, chromedp.Evaluate[string]("document.body.innerText"))
}

// Read waits until all of the texts can be read on the page.
func (p *Person) Read(texts ...string) error {
	return p.until(func(ctx context.Context) error {
		all, err := chromedp.Run(ctx, chromedp.Evaluate[string]("document.readyState === 'complete' ? document.body.innerText : ''"))
		if err != nil {
			return err
		}
		for _, text := range texts {
			if !strings.Contains(all, text) {
				return fmt.Errorf("%q cannot be read in\n%s", text, all)
			}
		}
		return nil
	})
}
