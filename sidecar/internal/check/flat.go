package check

import "strings"

// flatStrings calls member for each member of a JSON object that has nothing but strings of printable ASCII without escapes in
// it, as most requests have. If it returns false, or member did, the text is something else: read it with package json.
// Nothing it accepts has another meaning there.
func flatStrings(text string, member func(name, value string) bool) bool {
	rest, ok := token(text, '{')
	if !ok {
		return false
	}
	for first := true; ; first = false {
		if end, ok := token(rest, '}'); ok && first {
			return end == ""
		}
		var name, value string
		if name, rest, ok = plainString(rest); !ok {
			return false
		}
		if rest, ok = token(rest, ':'); !ok {
			return false
		}
		if value, rest, ok = plainString(rest); !ok || !member(name, value) {
			return false
		}
		if next, ok := token(rest, ','); ok {
			rest = next
			continue
		}
		end, ok := token(rest, '}')
		return ok && end == ""
	}
}

// token cuts an octet off a text that begins with it, and white space around it.
func token(text string, c byte) (rest string, ok bool) {
	text = skipSpace(text)
	if text == "" || text[0] != c {
		return "", false
	}
	return skipSpace(text[1:]), true
}

func skipSpace(text string) string {
	if text != "" && text[0] > ' ' {
		return text
	}
	return strings.TrimLeft(text, " \t\r\n") // RFC 8259 §2
}

// plainString cuts a string off a text that begins with it.
func plainString(text string) (s, rest string, ok bool) {
	if text == "" || text[0] != '"' {
		return "", "", false
	}
	for i := 1; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"':
			return text[1:i], text[i+1:], true
		case c < ' ', c == '\\', c >= 0x7f:
			return "", "", false
		}
	}
	return "", "", false
}
