package main

import (
	"io"
	"unicode/utf8"
)

// liveWidth is how much of a live line is shown: a line that wraps cannot be rewritten.
const liveWidth = 79

// liveLine is one line of a terminal that is rewritten in place. The zero value shows nothing.
type liveLine struct {
	w     io.Writer
	shown bool
}

// show replaces the line. The text must be printable.
func (l *liveLine) show(text string) {
	if l.w == nil {
		return
	}
	if utf8.RuneCountInString(text) > liveWidth {
		text = string([]rune(text)[:liveWidth-1]) + "…"
	}
	_, _ = io.WriteString(l.w, "\r"+text+"\x1b[K") // what cannot be shown is not worth an error
	l.shown = true
}

// clear makes room for other output.
func (l *liveLine) clear() {
	if l.shown {
		_, _ = io.WriteString(l.w, "\r\x1b[K")
		l.shown = false
	}
}
