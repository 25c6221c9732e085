package revision_test

import (
	"errors"
	"math"
	"testing"

	"github.com/allowednets/allowednets/internal/revision"
)

func TestRoundTrip(t *testing.T) {
	for _, tok := range []revision.Token{{}, {Epoch: 1, Revision: 7}, {Epoch: math.MaxUint64, Revision: math.MaxInt64}} {
		got, err := revision.Parse(tok.String())
		if err != nil || got != tok {
			t.Errorf("Parse(%q) = %v, %v", tok, got, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, s := range []string{"", "-", "1", "1-", "-1", "1--1", "01-1", "1-01", "+1-1", "1-1 ", "1-1-1", "18446744073709551616-1", "1-9223372036854775808", "a-b"} {
		if tok, err := revision.Parse(s); !errors.Is(err, revision.ErrInvalid) {
			t.Errorf("Parse(%q) = %v, %v; want ErrInvalid", s, tok, err)
		}
	}
}
