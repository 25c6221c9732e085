package dashboard

import (
	"bytes"
	"cmp"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/chromedp/chromedp"

	"github.com/allowednets/allowednets/test/stack"
)

// Picture keeps what the window shows as bin/screenshots/NAME.png with 256 colours, small enough for a document.
func (p *Person) Picture(name string) error {
	root, err := stack.Root()
	if err != nil {
		return err
	}
	shot, err := chromedp.Run(p.page, chromedp.CaptureScreenshot())
	if err != nil {
		return fmt.Errorf("taking a picture: %w", err)
	}
	full, err := png.Decode(bytes.NewReader(shot))
	if err != nil {
		return fmt.Errorf("taking a picture: %w", err)
	}
	const colours = 256
	counts := make(map[color.Color]int)
	bounds := full.Bounds()
	for y := range bounds.Dy() {
		for x := range bounds.Dx() {
			counts[full.At(x, y)]++
		}
	}
	most := slices.SortedFunc(maps.Keys(counts), func(a, b color.Color) int { return cmp.Compare(counts[b], counts[a]) })
	palette := color.Palette(most[:min(len(most), colours)])
	nearest := make(map[color.Color]uint8, len(most))
	for _, c := range most {
		nearest[c] = uint8(palette.Index(c))
	}
	small := image.NewPaletted(bounds, palette)
	for y := range bounds.Dy() {
		for x := range bounds.Dx() {
			small.SetColorIndex(x, y, nearest[full.At(x, y)])
		}
	}
	var b bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&b, small); err != nil {
		return fmt.Errorf("taking a picture: %w", err)
	}
	return os.WriteFile(filepath.Join(root, "bin", "screenshots", name+".png"), b.Bytes(), 0o644)
}
