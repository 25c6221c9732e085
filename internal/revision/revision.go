// Package revision is the token that names a state of the store across process borders.
package revision

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Token names one state of the store: the epoch an operator set, and the etcd revision within it.
// The zero Token means "no state". Tokens of one epoch are ordered by revision.
type Token struct {
	Epoch    uint64
	Revision int64
}

// ErrInvalid is returned by [Parse] for text that no Token prints as.
var ErrInvalid = errors.New("not a revision token")

// String returns the token's text, which callers treat as opaque. The zero Token is "0-0".
func (t Token) String() string {
	return strconv.FormatUint(t.Epoch, 10) + "-" + strconv.FormatInt(t.Revision, 10)
}

// Parse reads the text of [Token.String]. Any other text is [ErrInvalid].
func Parse(s string) (Token, error) {
	e, r, ok := strings.Cut(s, "-")
	epoch, err1 := strconv.ParseUint(e, 10, 64)
	rev, err2 := strconv.ParseInt(r, 10, 64)
	t := Token{Epoch: epoch, Revision: rev}
	if !ok || err1 != nil || err2 != nil || rev < 0 || t.String() != s {
		return Token{}, fmt.Errorf("%w: %.60q", ErrInvalid, s)
	}
	return t, nil
}
