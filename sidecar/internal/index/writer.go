package index

import (
	"crypto/sha256"
	"slices"
)

// Writer makes one root after another. It is not safe for concurrent use.
type Writer struct {
	root  *Root
	known map[setKey]uint32 // number of each set of root
	// builders is how many there were.
	builders uint64
}

// setKey stands for the content of a set: its SHA-256, cut. A collision takes 2^64 attempts.
type setKey [16]byte

func keyOf(encoding []byte) setKey {
	sum := sha256.Sum256(encoding)
	return setKey(sum[:16])
}

// NewWriter returns a writer whose newest root restricts nobody.
func NewWriter() *Writer {
	return &Writer{root: new(Root), known: make(map[setKey]uint32)}
}

// Edit returns a builder that starts from the newest root.
func (w *Writer) Edit() *Builder {
	root := *w.root
	root.sets.shelves = slices.Clone(root.sets.shelves)
	return w.builder(&root, w.known)
}

// Rebuild returns a builder that starts from nothing.
func (w *Writer) Rebuild() *Builder {
	return w.builder(new(Root), make(map[setKey]uint32))
}

func (w *Writer) builder(root *Root, known map[setKey]uint32) *Builder {
	w.builders++
	return &Builder{writer: w, root: root, known: known, added: make(map[setKey]uint32), owner: w.builders}
}
