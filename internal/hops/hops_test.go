package hops_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/hops"
)

// trusted are the proxies of the tests and of the table in docs/semantics.md.
func trusted() hops.Trusted {
	return hops.Trusted{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")}
}

// resolved is what client says, in the words of the table.
func resolved(t *testing.T, peer string, forwarded []string) string {
	t.Helper()
	addr, err := trusted().Client(peer, forwarded)
	switch {
	case err == nil && !addr.IsValid():
		return "unknown"
	case err == nil:
		return addr.String()
	}
	if invalid := new(allow.AddressError); !errors.As(err, &invalid) || addr.IsValid() || len(err.Error()) > 500 {
		t.Errorf("%q %q: %v, %v", peer, forwarded, addr, err)
	}
	return "refused"
}

// TestClientTable compares the code with the table in docs/semantics.md.
func TestClientTable(t *testing.T) {
	doc, err := os.ReadFile("../../docs/semantics.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(doc), "### Forwarded addresses")
	_, section, _ = strings.Cut(section, "\n| peer |")
	section, _, _ = strings.Cut(section, "### Reason")
	rows := regexp.MustCompile("(?m)^\\| (?:`([^`]*)` )?\\| (?:`([^`]*)` )?\\| `?([^`| ]+)`? \\|([^|]*)\\|$").FindAllStringSubmatch(section, -1)
	if n := strings.Count(section, "\n| "); len(rows) != n || n < 40 {
		t.Fatalf("read %d of %d rows", len(rows), n)
	}
	for _, row := range rows {
		var forwarded []string
		if row[2] != "" {
			forwarded = strings.Split(row[2], " ⏎ ")
		}
		if got := resolved(t, row[1], forwarded); got != row[3] {
			t.Errorf("%s: %q %q: %s; the table says %s", strings.TrimSpace(row[4]), row[1], row[2], got, row[3])
		}
	}
}

func TestClient(t *testing.T) {
	times := func(s string, n int) string { return strings.Repeat(s, n) }
	for _, c := range []struct {
		name, peer string
		forwarded  []string
		want       string
	}{
		{"100 hops", "10.1.0.1", []string{"198.51.100.9" + times(", 10.1.0.2", 99)}, "198.51.100.9"},
		{"101 hops", "10.1.0.1", []string{"198.51.100.9" + times(", 10.1.0.2", 100)}, "refused"},
		{"101 hops in lines", "10.1.0.1", strings.Split("198.51.100.9"+times(" 10.1.0.2", 100), " "), "refused"},
		{"100 proxies", "10.1.0.1", []string{times("10.1.0.2,", 99) + "10.1.0.3"}, "10.1.0.2"},
		{"100,000 spoofed hops", "10.1.0.1", []string{times("192.0.2.77, ", 100_000) + "198.51.100.9"}, "198.51.100.9"},
		{"100,000 spoofed lines", "10.1.0.1", append(strings.Split(times("192.0.2.77 ", 100_000), " "), "198.51.100.9"), "198.51.100.9"},
		{"100,000 commas", "10.1.0.1", []string{times(",", 100_000)}, "refused"},
		{"1 MB of blanks", "10.1.0.1", []string{times(" ", 1<<20)}, "refused"},
		{"1 MB of blanks before it", "10.1.0.1", []string{times(" ", 1<<20) + "198.51.100.9"}, "198.51.100.9"},
		{"1 MB of digits", "10.1.0.1", []string{times("1", 1<<20)}, "refused"},
		{"tabs", "10.1.0.1", []string{"192.0.2.77,\t198.51.100.9\t"}, "198.51.100.9"},
		{"CR LF", "10.1.0.1", []string{"198.51.100.9\r\n"}, "refused"},
		{"NUL", "10.1.0.1", []string{"198.51.100.9\x00"}, "refused"},
		{"no-break space", "10.1.0.1", []string{"\u00a0198.51.100.9"}, "refused"},
		{"not UTF-8", "10.1.0.1", []string{"198.51.100.9\xff"}, "refused"},
		{"full width", "10.1.0.1", []string{"１98.51.100.9"}, "refused"},
		{"no values", "10.1.0.1", []string{}, "10.1.0.1"},
		{"an empty line only", "10.1.0.1", []string{""}, "refused"},
		{"blank around the peer", " 10.1.0.1", nil, "refused"},
	} {
		if got := resolved(t, c.peer, c.forwarded); got != c.want {
			t.Errorf("%s: %s; want %s", c.name, got, c.want)
		}
	}
	t.Run("nobody is trusted by default", func(t *testing.T) {
		for _, peer := range []string{"127.0.0.1", "::1", "10.1.0.1", "198.51.100.9"} {
			if got, err := hops.Trusted(nil).Client(peer, []string{"192.0.2.77"}); err != nil || got.String() != peer {
				t.Errorf("%s: %v, %v", peer, got, err)
			}
		}
	})
}

// FuzzClient compares client with a model that shares nothing with it: package net in place of netip, and the whole way
// spelled out before it is walked.
func FuzzClient(f *testing.F) {
	f.Add("10.1.0.1", "192.0.2.77, 198.51.100.9\n10.1.0.2")
	f.Add("::ffff:10.1.0.1", "::ffff:198.51.100.9,fd00::2")
	f.Add("10.1.0.1", "[::1]:80,10.1.0.1:1,unknown,,fe80::1%x")
	f.Add("fd00::1", "198.51.100.9"+strings.Repeat(",fd00::2", 100))
	f.Add("", "10.1.0.1")
	f.Fuzz(func(t *testing.T, peer, header string) {
		var forwarded []string
		if header != "" {
			forwarded = strings.Split(header, "\n")
		}
		if got, want := resolved(t, peer, forwarded), model(peer, forwarded); got != want {
			t.Errorf("%q %q: %s; the model says %s", peer, forwarded, got, want)
		}
	})
}

func model(peer string, forwarded []string) string {
	way := []string{}
	if len(forwarded) > 0 {
		for hop := range strings.SplitSeq(strings.Join(forwarded, ","), ",") {
			way = append(way, strings.Trim(hop, " \t"))
		}
	}
	if peer == "" {
		return "unknown"
	}
	way = append(way, peer)
	for i := len(way) - 1; ; i-- {
		if len(way)-1-i > 100 {
			return "refused"
		}
		ip := net.ParseIP(way[i])
		if ip == nil {
			return "refused"
		}
		four := ip.To4()
		isTrusted := four != nil && four[0] == 10 && four[1] == 1 || four == nil && ip[0] == 0xfd
		if !isTrusted || i == 0 {
			return netip.MustParseAddr(way[i]).Unmap().String()
		}
	}
}

func TestParse(t *testing.T) {
	got, err := hops.Parse([]string{" 192.0.2.0/28", "2001:db8::1 ", "::ffff:10.0.0.1"})
	if want := "[192.0.2.0/28 2001:db8::1/128 10.0.0.1/32]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("%v, %v; want %s", got, err, want)
	}
	for text, want := range map[string]string{
		"": "not an address", "proxy.example": "not an address", "10.0.0.1:80": "not an address", "fe80::1%eth0": "not an address",
		"::ffff:10.0.0.0/104": "not an address", "10.0.0.1/8": "write 10.0.0.1 for the address alone", "0.0.0.0/0": "claim any address", "::/0": "claim any address",
	} {
		if got, err := hops.Parse([]string{"10.0.0.1", text}); got != nil || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v; want an error with %q", text, got, err, want)
		}
	}
}
