package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"

	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

// hashPassword reads a password and prints its hash for the file of users. It returns the exit code.
func hashPassword(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) > 0 {
		fmt.Fprintln(stderr, "Usage: allowednets-dashboard hash-password < FILE\nReads a password, a line of standard input or typed at the terminal, and prints its hash for the file of --users.")
		if args[0] == "--help" || args[0] == "-h" {
			return 0
		}
		return 2
	}
	password, err := readPassword(stdin, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "allowednets-dashboard: %v\n", err)
		return 1
	}
	hash, err := login.HashPassword(password)
	if err != nil {
		fmt.Fprintf(stderr, "allowednets-dashboard: %v\n", err)
		return 2
	}
	fmt.Fprintln(stdout, hash)
	return 0
}

// readPassword reads a line, or what somebody types twice without seeing it.
func readPassword(stdin io.Reader, stderr io.Writer) (string, error) {
	file, ok := stdin.(*os.File)
	if !ok || !term.IsTerminal(int(file.Fd())) {
		line, err := bufio.NewReader(io.LimitReader(stdin, 1<<16)).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		return strings.TrimRight(line, "\r\n"), nil
	}
	var typed [2]string
	for i, prompt := range []string{"Password: ", "Again: "} {
		fmt.Fprint(stderr, prompt)
		b, err := term.ReadPassword(int(file.Fd()))
		fmt.Fprintln(stderr)
		if err != nil {
			return "", err
		}
		typed[i] = string(b)
	}
	if typed[0] != typed[1] {
		return "", errors.New("the two passwords are different")
	}
	return typed[0], nil
}
