package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

// completeCommand is what completion scripts call: the words behind the program's name follow, the last one being typed.
const completeCommand = "__complete"

// filesHere is the answer that file names are wanted; no candidate begins with a colon.
const filesHere = ":files"

type completionCommand struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
}

// Help is shown below the help line.
func (*completionCommand) Help() string {
	return `
Load it in the shell that is running, or write it where the shell finds it:

	source <(allowednets completion bash)
	allowednets completion zsh > "${fpath[1]}/_allowednets"
	allowednets completion fish > ~/.config/fish/completions/allowednets.fish

Exit codes: 0 written; 2 no such shell.
`
}

func (c *completionCommand) Run(s *session) error {
	script := map[string]string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}[c.Shell]
	if _, err := io.WriteString(s.term.out, script); err != nil {
		return fmt.Errorf("writing the script: %w", err)
	}
	return nil
}

// The scripts ask the program itself for candidates, one a line: the word, a tab, what it means.
const (
	bashCompletion = `# bash completion for allowednets
_allowednets() {
    local word
    COMPREPLY=()
    while IFS=$'\t' read -r word _; do
        if [[ $word == :files ]]; then
            compopt -o filenames 2>/dev/null
            mapfile -t COMPREPLY < <(compgen -f -- "${COMP_WORDS[COMP_CWORD]}")
            return
        fi
        COMPREPLY+=("$word")
    done < <("${COMP_WORDS[0]}" __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _allowednets allowednets
`
	zshCompletion = `#compdef allowednets
# zsh completion for allowednets
_allowednets() {
    local line
    local -a candidates
    for line in "${(@f)$("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        if [[ $line == :files ]]; then
            _files
            return
        fi
        if [[ $line == *$'\t'* ]]; then
            candidates+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
        elif [[ -n $line ]]; then
            candidates+=("${line//:/\\:}")
        fi
    done
    _describe allowednets candidates
}
if [[ $funcstack[1] == _allowednets ]]; then
    _allowednets "$@"
else
    compdef _allowednets allowednets
fi
`
	fishCompletion = `# fish completion for allowednets
function __allowednets_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l candidates ($words[1] __complete $words[2..-1] "$current" 2>/dev/null)
    if test "$candidates[1]" = :files
        __fish_complete_path "$current"
        return
    end
    printf '%s\n' $candidates
end
complete -c allowednets -f -a '(__allowednets_complete)'
`
)

// writeCandidates writes what the last of the words could be.
func writeCandidates(w io.Writer, program *kong.Node, words []string) {
	c := newCursor(program, words)
	for _, candidate := range c.candidates() {
		if word, _, _ := strings.Cut(candidate, "\t"); strings.HasPrefix(word, c.typed) || word == filesHere {
			fmt.Fprintln(w, candidate)
		}
	}
}

// cursor is a place on the command line.
type cursor struct {
	node  *kong.Node
	flag  *kong.Value // whose value is being typed
	typed string      // what there is of the word
	args  int         // arguments before it
	plain bool        // behind "--"
	glued string      // "--flag=" in front of the value, in the same word
}

func newCursor(program *kong.Node, words []string) cursor {
	c := cursor{node: program}
	if len(words) == 0 {
		return c
	}
	for i, word := range words[:len(words)-1] {
		switch {
		case word == "=" && i > 0 && strings.HasPrefix(words[i-1], "--"): // bash cuts words there
			if c.flag == nil {
				c.flag = c.find(words[i-1])
			}
		case c.flag != nil:
			c.flag = nil
		case c.plain || !strings.HasPrefix(word, "-") || word == "-":
			c.argument(word)
		case word == "--":
			c.plain = true
		default:
			if f := c.find(word); f != nil && !f.IsBool() && !strings.Contains(word, "=") {
				c.flag = f
			}
		}
	}
	c.typed = words[len(words)-1]
	if c.typed == "=" && len(words) > 1 { // bash again
		c.flag, c.typed = c.find(words[len(words)-2]), ""
	}
	if name, _, glued := strings.Cut(c.typed, "="); c.flag == nil && !c.plain && glued {
		c.flag, c.glued = c.find(name), name+"="
	}
	return c
}

// argument takes a word that is no flag.
func (c *cursor) argument(word string) {
	for _, child := range c.node.Children {
		if child.Name == word {
			c.node = child
			return
		}
	}
	c.args++
}

// find returns the flag of a word such as --timeout or --timeout=5s.
func (c *cursor) find(word string) *kong.Value {
	name, _, _ := strings.Cut(strings.TrimPrefix(word, "--"), "=")
	for _, group := range c.node.AllFlags(false) {
		for _, f := range group {
			if f.Name == name || slices.Contains(f.Aliases, name) {
				return f.Value
			}
		}
	}
	return nil
}

// candidates are all words that fit here, whatever was typed of them.
func (c *cursor) candidates() []string {
	if c.flag != nil {
		return c.values(c.flag)
	}
	if strings.HasPrefix(c.typed, "-") && !c.plain {
		var all []string
		for _, group := range c.node.AllFlags(true) {
			for _, f := range group {
				all = append(all, "--"+f.Name+"\t"+f.Help)
			}
		}
		return all
	}
	var all []string
	for _, child := range c.node.Children {
		if !child.Hidden {
			all = append(all, child.Name+"\t"+child.Help)
		}
	}
	if c.args < len(c.node.Positional) {
		all = append(all, c.values(c.node.Positional[c.args])...)
	}
	return all
}

// values are the candidates for a flag or an argument.
func (c *cursor) values(v *kong.Value) []string {
	var all []string
	switch {
	case v.Tag.Get("complete") == "service":
		all = serviceNames()
	case v.Enum != "":
		all = slices.Sorted(maps.Keys(v.EnumMap()))
	case v.Tag.Get("complete") == "file", strings.HasSuffix(v.Name, "-file"):
		return []string{filesHere}
	}
	for i := range all {
		all[i] = c.glued + all[i]
	}
	return all
}
