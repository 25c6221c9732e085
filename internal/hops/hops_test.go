package hops_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/allowednets/allowednets/internal/hops"
)

func TestClient(t *testing.T) {
	trusted, err := hops.ParseTrusted([]string{"10.0.0.0/8", " 192.0.2.1", "fd00::/8"})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		peer string
		xff  []string
		want string // "" if unknown
	}{
		"direct":                         {peer: "198.51.100.9:1", want: "198.51.100.9"},
		"direct, with a claim":           {peer: "198.51.100.9:1", xff: []string{"8.8.8.8"}, want: "198.51.100.9"},
		"through a proxy":                {peer: "10.1.1.1:1", xff: []string{"198.51.100.9"}, want: "198.51.100.9"},
		"through two":                    {peer: "10.1.1.1:1", xff: []string{"198.51.100.9, 192.0.2.1"}, want: "198.51.100.9"},
		"with a claim":                   {peer: "10.1.1.1:1", xff: []string{"8.8.8.8, 198.51.100.9, 192.0.2.1"}, want: "198.51.100.9"},
		"in several lines":               {peer: "10.1.1.1:1", xff: []string{"8.8.8.8", "198.51.100.9", "192.0.2.1"}, want: "198.51.100.9"},
		"a claim of a trusted one":       {peer: "10.1.1.1:1", xff: []string{"10.2.2.2, 198.51.100.9"}, want: "198.51.100.9"},
		"all trusted":                    {peer: "10.1.1.1:1", xff: []string{"10.3.3.3, 10.2.2.2"}, want: "10.3.3.3"},
		"a proxy that says nothing":      {peer: "10.1.1.1:1", want: "10.1.1.1"},
		"mapped":                         {peer: "[::ffff:10.1.1.1]:1", xff: []string{"::ffff:198.51.100.9"}, want: "198.51.100.9"},
		"IPv6":                           {peer: "[fd00::1]:1", xff: []string{"2001:db8::1"}, want: "2001:db8::1"},
		"IPv6 in brackets with a port":   {peer: "[fd00::1]:1", xff: []string{"[2001:db8::1]:4711"}, want: "2001:db8::1"},
		"IPv6 in brackets":               {peer: "[fd00::1]:1", xff: []string{"[2001:db8::1]"}, want: "2001:db8::1"},
		"with a port":                    {peer: "10.1.1.1:1", xff: []string{"198.51.100.9:4711"}, want: "198.51.100.9"},
		"junk":                           {peer: "10.1.1.1:1", xff: []string{"unknown"}},
		"junk behind the client":         {peer: "10.1.1.1:1", xff: []string{"junk, 198.51.100.9"}, want: "198.51.100.9"},
		"empty":                          {peer: "10.1.1.1:1", xff: []string{""}},
		"an empty one at the end":        {peer: "10.1.1.1:1", xff: []string{"198.51.100.9,"}},
		"with a zone":                    {peer: "10.1.1.1:1", xff: []string{"fe80::1%eth0"}},
		"a peer with a zone":             {peer: "[fe80::1%eth0]:1", want: "fe80::1"},
		"no peer":                        {peer: "@"},
		"more proxies than there can be": {peer: "10.1.1.1:1", xff: []string{"198.51.100.9" + strings.Repeat(", 10.1.1.1", 100)}},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := hops.Client(c.peer, c.xff, trusted)
			if ok != (c.want != "") || ok && got.String() != c.want || !ok && got.IsValid() {
				t.Errorf("%v, %v", got, ok)
			}
		})
	}
}

func TestParseTrusted(t *testing.T) {
	got, err := hops.ParseTrusted([]string{"10.1.0.0/16", " fd00::/8", "10.9.9.9", "::ffff:10.8.8.8"})
	if fmt.Sprint(got) != "[10.1.0.0/16 fd00::/8 10.9.9.9/32 10.8.8.8/32]" || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for text, want := range map[string]string{
		"10.0.0.1/8": "write 10.0.0.1 for the address alone", "0.0.0.0/0": "everybody", "::/0": "everybody", "fe80::1%eth0": "is not an address",
		"x": `"x" is not an address`, "": "is not an address", "::ffff:10.0.0.0/104": "is not an address", "10.1": "is not an address",
	} {
		if _, err := hops.ParseTrusted([]string{"10.0.0.0/8", text}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
