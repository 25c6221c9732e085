package allow

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

func TestParseText(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"one", "8.8.8.8", "8.8.8.8"},
		{"commas", "8.8.8.0/24,2a00:1450::/32", "8.8.8.0/24 2a00:1450::/32"},
		{"every separator", "1.1.1.1, 2.2.2.2;3.3.3.3\t4.4.4.4\n5.5.5.5\r\n6.6.6.6\v7.7.7.7\f8.8.8.8", "1.1.1.1 2.2.2.2 3.3.3.3 4.4.4.4 5.5.5.5 6.6.6.6 7.7.7.7 8.8.8.8"},
		{"white space of Unicode", "1.1.1.1\u00a02.2.2.2\u20033.3.3.3\u20284.4.4.4\u30005.5.5.5\u00856.6.6.6", "1.1.1.1 2.2.2.2 3.3.3.3 4.4.4.4 5.5.5.5 6.6.6.6"},
		{"empty pieces", ",; ,\n,8.8.8.8,, ;8.8.4.4;\n", "8.8.8.8 8.8.4.4"},
		{"invisible around", "\ufeff\u200b8.8.8.8\u200b,\u20608.8.4.4\u200e \u200b ", "8.8.8.8 8.8.4.4"},
		{"order kept", "9.9.9.9 8.8.8.8 2a00::1 1.1.1.1", "9.9.9.9 8.8.8.8 2a00::1 1.1.1.1"},
		{"duplicates", "8.8.8.8 9.9.9.9 8.8.8.8/32 ::ffff:8.8.8.8 2a00::1 2A00:0::1/128", "8.8.8.8 9.9.9.9 2a00::1"},
		{"nested nets are no duplicates", "8.8.0.0/16 8.8.8.0/24 8.8.8.8", "8.8.0.0/16 8.8.8.0/24 8.8.8.8"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := Rules{}.ParseText(tt.in)
			if got := strings.Join(l.Strings(), " "); err != nil || got != tt.want {
				t.Errorf("%q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

func TestEmptyList(t *testing.T) {
	for _, s := range []string{"", " ", ",;\n", "\ufeff", "\u200b , \u200b"} {
		if l, err := (Rules{}).ParseText(s); !errors.Is(err, ErrEmpty) || l.Len() != 0 {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, e := range [][]string{nil, {}, {""}, {" ", "\t\u200b"}} {
		if l, err := (Rules{}).ParseEntries(e); !errors.Is(err, ErrEmpty) || l.Len() != 0 {
			t.Errorf("%q: %v", e, err)
		}
	}
}

// problemsOf returns "index text reason" of each problem.
func problemsOf(t *testing.T, r Rules, err error) []string {
	t.Helper()
	var invalid *InvalidError
	if !errors.As(err, &invalid) {
		t.Fatalf("%v; want an *InvalidError", err)
	}
	var got []string
	for _, p := range invalid.Problems {
		got = append(got, fmt.Sprintf("%d %s %s", p.Index, p.Text, strings.TrimPrefix(p.Refusal.String(), "NET_REFUSAL_")))
		if p.Text != "" && p.Refusal != decisionv1.NetRefusal_NET_REFUSAL_TOO_MANY {
			checkProblem(t, r, p)
		}
	}
	return got
}

func TestParseTextPositions(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     []string
	}{
		{"every bad entry", "8.8.8.8, foo.example, , 10.0.0.1;9.9.9.9/16\n1.1.1.1", []string{"1 foo.example HOSTNAME", "2 10.0.0.1 PRIVATE", "3 9.9.9.9/16 HOST_BITS_SET"}},
		{"netmask", "1.1.1.1, 8.8.8.0 255.255.255.0, bad!", []string{"1 8.8.8.0 255.255.255.0 NETMASK", "3 bad! SYNTAX"}},
		{"netmask on the next line", "8.8.8.0\n255.255.255.0", []string{"1 255.255.255.0 NETMASK"}},
		{"netmask behind a comma", "8.8.8.0, 255.255.255.0", []string{"1 255.255.255.0 NETMASK"}},
		{"two netmasks", "8.8.8.0 255.255.255.0 9.9.9.0 255.255.255.0", []string{"0 8.8.8.0 255.255.255.0 NETMASK", "2 9.9.9.0 255.255.255.0 NETMASK"}},
		{"netmask behind a network", "8.8.8.0/24 255.255.255.0", []string{"1 255.255.255.0 NETMASK"}},
		{"range with blanks", "1.1.1.1 8.8.8.1 - 8.8.8.9 bad!", []string{"1 8.8.8.1 - 8.8.8.9 RANGE", "4 bad! SYNTAX"}},
		{"range with one blank", "8.8.8.1- 8.8.8.9, 8.8.8.1 –8.8.8.9", []string{"0 8.8.8.1- 8.8.8.9 RANGE", "2 8.8.8.1 –8.8.8.9 RANGE"}},
		{"short range with blanks", "8.8.8.1 - 9", []string{"0 8.8.8.1 - 9 RANGE"}},
		{"length behind a blank", "8.8.8.0 /24 8.8.4.0/ 24, 9.9.9.0 / 24", []string{"0 8.8.8.0 /24 SYNTAX", "2 8.8.4.0/ 24 SYNTAX", "4 9.9.9.0 / 24 SYNTAX"}},
		{"a list with bullets is no range", "- 8.8.8.8\n- 9.9.9.9", []string{"0 - SYNTAX", "2 - SYNTAX"}},
		{"remarks are no ranges", "8.8.8.8 - office", []string{"1 - SYNTAX", "2 office HOSTNAME"}},
		{"ports in a row", "8.8.8.8:1 9.9.9.9:2", []string{"0 8.8.8.8:1 PORT", "1 9.9.9.9:2 PORT"}},
		{"an entry that is cut", strings.Repeat("ä", 150), []string{"0 " + strings.Repeat("ä", 100) + " SYNTAX"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := Rules{}.ParseText(tt.in)
			if got := problemsOf(t, Rules{}, err); !slices.Equal(got, tt.want) || l.Len() != 0 {
				t.Errorf("got %q; want %q", got, tt.want)
			}
		})
	}
}

func TestParseEntriesPositions(t *testing.T) {
	_, err := Rules{}.ParseEntries([]string{" 8.8.8.8 ", "", "8.8.8.8, 9.9.9.9", "8.8.8.1 - 8.8.8.9", "\u200b", "8.8.8.8 9.9.9.9", "x.example"})
	want := []string{"1 8.8.8.8, 9.9.9.9 SYNTAX", "2 8.8.8.1 - 8.8.8.9 RANGE", "3 8.8.8.8 9.9.9.9 SYNTAX", "4 x.example HOSTNAME"}
	if got := problemsOf(t, Rules{}, err); !slices.Equal(got, want) {
		t.Errorf("got %q; want %q", got, want)
	}
}

func TestTooMany(t *testing.T) {
	nets := make([]string, 300)
	for i := range nets {
		nets[i] = fmt.Sprintf("8.8.%d.%d", i/256, i%256)
	}
	text := func(n int) string { return strings.Join(nets[:n], "\n") }
	parse := func(r Rules, n int) (List, []string) {
		l, err1 := r.ParseText(text(n))
		e, err2 := r.ParseEntries(nets[:n])
		if !l.Equal(e) || fmt.Sprint(err1) != fmt.Sprint(err2) {
			t.Errorf("%d entries: text %v %v, entries %v %v", n, l.Len(), err1, e.Len(), err2)
		}
		if err1 == nil {
			return l, nil
		}
		return l, problemsOf(t, r, err1)
	}
	for _, tt := range []struct {
		r    Rules
		n    int
		want []string
	}{
		{Rules{}, 256, nil},
		{Rules{}, 257, []string{"256 8.8.1.0 TOO_MANY"}},
		{Rules{}, 300, []string{"256 8.8.1.0 TOO_MANY"}},
		{Rules{MaxNets: 3}, 3, nil},
		{Rules{MaxNets: 3}, 4, []string{"3 8.8.0.3 TOO_MANY"}},
		{Rules{MaxNets: 300}, 300, nil},
		{Rules{MaxText: len(text(10))}, 10, nil},
	} {
		l, got := parse(tt.r, tt.n)
		if !slices.Equal(got, tt.want) || tt.want == nil && l.Len() != tt.n {
			t.Errorf("%+v, %d entries: %d nets, %q; want %q", tt.r, tt.n, l.Len(), got, tt.want)
		}
	}
	// Duplicates count, and what is wrong with the first ones is told as well.
	_, err := Rules{MaxNets: 2}.ParseText("10.0.0.1 8.8.8.8 8.8.8.8 10.0.0.2")
	if got, want := problemsOf(t, Rules{}, err), []string{"0 10.0.0.1 PRIVATE", "2 8.8.8.8 TOO_MANY"}; !slices.Equal(got, want) {
		t.Errorf("got %q; want %q", got, want)
	}
	// What blanks tear apart counts in parts here too.
	_, err = Rules{MaxNets: 2}.ParseText("1.1.1.1 8.8.8.0 255.255.255.0")
	if got, want := problemsOf(t, Rules{}, err), []string{"2 255.255.255.0 TOO_MANY"}; !slices.Equal(got, want) {
		t.Errorf("got %q; want %q", got, want)
	}
	for _, tt := range []struct {
		name string
		err  func() error
	}{
		{"text", func() error { _, err := Rules{}.ParseText("8.8.8.8" + strings.Repeat(" ", 64<<10)); return err }},
		{"entries", func() error { _, err := Rules{}.ParseEntries(slices.Repeat([]string{"8.8.8.8"}, 10_000)); return err }},
		{"limit", func() error { _, err := Rules{MaxText: 6}.ParseText("8.8.8.8"); return err }},
	} {
		if got, want := problemsOf(t, Rules{}, tt.err()), []string{"0  TOO_MANY"}; !slices.Equal(got, want) {
			t.Errorf("too much %s: got %q; want %q", tt.name, got, want)
		}
	}
	if _, err := (Rules{}).ParseText("8.8.8.8" + strings.Repeat(" ", 64<<10-7)); err != nil {
		t.Errorf("64 KiB: %v", err)
	}
}

func TestInvalidErrorText(t *testing.T) {
	_, err := Rules{}.ParseText("8.8.8.8/24, x.example")
	want := `entry 1: "8.8.8.8/24" is an address inside the network 8.8.8.0/24; write 8.8.8.8 for the address alone or 8.8.8.0/24 for the whole network. (try 8.8.8.8, 8.8.8.0/24)
entry 2: "x.example" is a name, and only IP addresses and networks can be listed; write the addresses behind the name.`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

func TestRestoreList(t *testing.T) {
	canonical := []string{"9.9.9.9", "8.8.8.0/24", "2a00:1450::/32", "2a00::1", "10.0.0.0/7", "::/0", "0.0.0.0/0", "127.0.0.1"}
	l, err := RestoreList(canonical)
	if err != nil || !slices.Equal(l.Strings(), canonical) || l.Len() != len(canonical) {
		t.Fatalf("%v, %v", l.Strings(), err)
	}
	if l, err := RestoreList(nil); err != nil || l.Len() != 0 || !l.Equal(List{}) {
		t.Errorf("nothing restored as %v, %v", l, err)
	}
	for _, bad := range [][]string{
		{""}, {" 8.8.8.8"}, {"8.8.8.8/32"}, {"8.8.8.8/24"}, {"2A00::1"}, {"2a00:0::1"}, {"2a00::1/128"}, {"::ffff:8.8.8.8"}, {"::ffff:8.8.8.0/120"},
		{"fe80::1%eth0"}, {"8.8.8.8", "8.8.8.8"}, {"example.com"}, {"08.8.8.8"}, {"8.8.8.0/024"},
	} {
		if l, err := RestoreList(bad); err == nil || l.Len() != 0 {
			t.Errorf("%q restored as %v, %v", bad, l.Strings(), err)
		}
	}
}

func TestListEqual(t *testing.T) {
	list := func(s string) List {
		l, err := RestoreList(strings.Fields(s))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	if !list("8.8.8.8 9.9.9.9").Equal(list("8.8.8.8 9.9.9.9")) || list("8.8.8.8 9.9.9.9").Equal(list("9.9.9.9 8.8.8.8")) || list("8.8.8.8").Equal(List{}) {
		t.Error("Equal")
	}
}

func TestEncode(t *testing.T) {
	l, err := RestoreList([]string{"2a00:1450::/32", "9.9.9.9", "8.8.8.0/24", "8.8.8.0/23", "8.8.8.0"})
	if err != nil {
		t.Fatal(err)
	}
	want := []byte("\x04\x08\x08\x08\x00\x17" + "\x04\x08\x08\x08\x00\x18" + "\x04\x08\x08\x08\x00\x20" + "\x04\x09\x09\x09\x09\x20" +
		"\x06\x2a\x00\x14\x50\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20")
	if got := l.Encode(); !slices.Equal(got, want) {
		t.Errorf("% x; want % x", got, want)
	}
	if got := (List{}).Encode(); got != nil {
		t.Errorf("the empty list as %v", got)
	}
	if s := l.Strings(); s[0] != "2a00:1450::/32" {
		t.Errorf("Encode changed the order to %v", s)
	}
}

// What holds for any text.
func FuzzParseText(f *testing.F) {
	for _, s := range []string{
		"8.8.8.8, 2a00::/32", "8.8.8.0 255.255.255.0", "8.8.8.1 - 8.8.8.9; x", "- 8.8.8.8\n- 9.9.9.9", "\ufeff8.8.8.8\u200b", "8.8.8.8 /24 / 24",
		"1,2,3,4,5,6,7,8,9", ",", "\xff,\xfe", "8.8.8.8\u200b9.9.9.9", "8.8.8.8 -\u20288.8.8.9", strings.Repeat("8.8.8.8 ", 20),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r := Rules{MaxNets: 8, MaxText: 400}
		l, err := r.ParseText(text)
		if errors.Is(err, ErrEmpty) {
			return
		}
		if err != nil {
			problemsOf(t, r, err)
			last := -1
			var invalid *InvalidError
			errors.As(err, &invalid)
			for _, p := range invalid.Problems {
				if p.Index <= last || p.Index > 8 || len(text) <= 400 && !strings.Contains(strings.ToValidUTF8(text, "\uFFFD"), p.Text) {
					t.Errorf("%q: problem %+v behind index %d", text, p, last)
				}
				last = p.Index
			}
			return
		}
		pieces := strings.FieldsFunc(text, func(c rune) bool { return separator(c) })
		if l.Len() == 0 || l.Len() > 8 || l.Len() > len(pieces) {
			t.Errorf("%q: %v", text, l.Strings())
		}
		for name, again := range map[string]func() (List, error){
			"RestoreList":  func() (List, error) { return RestoreList(l.Strings()) },
			"ParseEntries": func() (List, error) { return r.ParseEntries(l.Strings()) },
			"ParseText":    func() (List, error) { return Rules{}.ParseText(strings.Join(l.Strings(), ",")) },
			"pieces":       func() (List, error) { return r.ParseEntries(pieces) },
		} {
			if o, err := again(); err != nil || !o.Equal(l) {
				t.Errorf("%q: %v, and by %s %v, %v", text, l.Strings(), name, o.Strings(), err)
			}
		}
		if s, err := DecodeSet(l.Encode()); err != nil || s.Len() != l.Len() {
			t.Errorf("%q: %v", text, err)
		}
	})
}

func BenchmarkParseText(b *testing.B) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var nets []string
	for range 256 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{8, byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32())}), 24)
		nets = append(nets, p.Masked().String())
	}
	for _, bm := range []struct{ name, text string }{
		{"3 nets", strings.Join(nets[:3], ", ")},
		{"256 nets", strings.Join(nets, "\n")},
		{"256 nets on a line", strings.Join(nets, " ")},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := (Rules{}).ParseText(bm.text); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
