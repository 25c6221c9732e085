// Package browser drives Debian's Chromium, headless, as a person with a keyboard, a language and a theme would.
package browser

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"

	"github.com/allowednets/allowednets/test/stack"
)

const program = "chromium"

// Missing says what this machine lacks to run Chromium; nil if nothing.
func Missing() error {
	if _, err := exec.LookPath(program); err != nil {
		return fmt.Errorf("looking for chromium (Debian's package of that name): %w", err)
	}
	return nil
}

// Browser is a running Chromium.
type Browser struct {
	ctx     context.Context //nolint:containedctx // chromedp keeps the browser in a context
	stop    func()
	profile string
}

// Start starts Chromium, which ends with ctx, or with Close.
func Start(ctx context.Context) (*Browser, error) {
	// Not below the folder of a test, whose name may be too long for Chromium's sockets.
	profile, err := os.MkdirTemp("", "chromium-")
	if err != nil {
		return nil, err
	}
	// What lets Chromium run as root and leaves it nothing to ask the Internet for.
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(program), chromedp.UserDataDir(profile), chromedp.NoSandbox,
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-gpu", true), chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-features", "OptimizationHints,MediaRouter,Translate,AutofillServerCommunication"),
		chromedp.Flag("host-resolver-rules", "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost , EXCLUDE *.localhost"),
		chromedp.Flag("force-color-profile", "srgb"), chromedp.Flag("font-render-hinting", "none"),
	)
	allocator, stopAllocator := chromedp.NewExecAllocator(ctx, options...)
	browser, stopBrowser := chromedp.NewContext(allocator)
	b := &Browser{ctx: browser, profile: profile, stop: func() { stopBrowser(); stopAllocator() }}
	if err := chromedp.Do(browser); err != nil {
		return nil, errors.Join(fmt.Errorf("starting chromium: %w", err), b.Close())
	}
	return b, nil
}

// Close stops Chromium and deletes its profile.
func (b *Browser) Close() error {
	if c := chromedp.FromContext(b.ctx); c != nil && c.Browser != nil {
		_ = chromedp.Cancel(b.ctx) // it may have ended already
	}
	b.stop()
	return os.RemoveAll(b.profile)
}

// Person is who looks at a page.
type Person struct {
	// Language is what the browser asks for, such as "de-DE"; "en-US" if empty.
	Language string
	// Width and Height of the window in CSS pixels; 1440 by 900 if zero.
	Width, Height int64
	Dark          bool
	NoScript      bool
	// Zone is the time zone by its IANA name; that of the machine if empty.
	Zone string
}

// Page opens an empty page that shares nothing with other pages, cookies included. The caller calls closePage. Actions run with
// chromedp.Do and chromedp.Run on its context.
func (b *Browser) Page(p Person) (page context.Context, closePage func(), err error) {
	if p.Language == "" {
		p.Language = "en-US"
	}
	if p.Width == 0 {
		p.Width, p.Height = 1440, 900
	}
	scheme := "light"
	if p.Dark {
		scheme = "dark"
	}
	page, closePage = chromedp.NewContext(b.ctx, chromedp.WithNewBrowserContext())
	calls := []chromedp.Action[chromedp.Void]{
		call(emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{
			Width: p.Width, Height: p.Height, DeviceScaleFactor: 1, Mobile: p.Width < 600,
		}),
		call(emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: "reduce"},
		}}),
		call(emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: p.NoScript}),
		call(emulation.SetTimezoneOverride, emulation.SetTimezoneOverrideParams{TimezoneID: p.Zone}),
		call(network.Enable, network.EnableParams{}),
		call(network.SetExtraHTTPHeaders, network.SetExtraHTTPHeadersParams{Headers: network.Headers{"Accept-Language": p.Language}}),
	}
	err = chromedp.Do(page, calls...)
	if err != nil {
		closePage()
		return nil, nil, fmt.Errorf("opening a page: %w", err)
	}
	return page, closePage, nil
}

// call is a command of the DevTools protocol that returns nothing.
func call[P any](command cdp.Command[P, cdp.Empty], params P) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, command, params)
		return err
	})
}

// Screenshot writes what the window shows to bin/screenshots/NAME.png.
func Screenshot(page context.Context, name string) error {
	root, err := stack.Root()
	if err != nil {
		return err
	}
	png, err := chromedp.Run(page, chromedp.CaptureScreenshot())
	if err != nil {
		return fmt.Errorf("taking a screenshot: %w", err)
	}
	path := filepath.Join(root, "bin", "screenshots", name+".png")
	return errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, png, 0o644))
}
