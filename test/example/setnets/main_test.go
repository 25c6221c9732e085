package main

import (
	"os"
	"strings"
	"testing"
)

// TestQuoted: the document shows this very program.
func TestQuoted(t *testing.T) {
	source, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("../../../docs/integrate-your-dashboard.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(doc), "```go\n"+string(source)+"```\n") {
		t.Error("docs/integrate-your-dashboard.md quotes another main.go: copy it between ```go and ```")
	}
}
