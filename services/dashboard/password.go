package main

import (
	"fmt"
	"io"
)

// hashPassword reads a password and prints its hash for the file of users. It returns the exit code.
func hashPassword(_ []string, _ io.Reader, _, stderr io.Writer) int {
	fmt.Fprintln(stderr, "allowednets-dashboard: not built yet")
	return 1
}
