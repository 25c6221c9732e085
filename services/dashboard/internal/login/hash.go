package login

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/argon2"
	"golang.org/x/text/secure/precis"
)

// parameters are the cost of argon2id, RFC 9106 §3.1.
type parameters struct {
	memory  uint32 // KiB
	time    uint32 // passes
	threads uint8
}

// recommended is the first choice of OWASP's Password Storage Cheat Sheet (2025) for servers with many logins.
//
//nolint:gochecknoglobals // a constant in all but syntax
var recommended = parameters{memory: 19456, time: 2, threads: 1}

const (
	saltLength = 16
	keyLength  = 32

	maxMemory   = 1 << 18 // KiB; a file must not make a login eat the machine
	maxTime     = 16
	maxThreads  = 16
	maxPassword = 1024 // octets
)

// hash is a password that cannot be read back.
type hash struct {
	parameters
	salt, key []byte
}

// HashPassword returns a new hash of password for the file of users, in the PHC string format.
func HashPassword(password string) (string, error) {
	prepared, err := prepare(password)
	if err != nil {
		return "", err
	}
	h := hash{parameters: recommended, salt: make([]byte, saltLength)}
	if _, err := rand.Read(h.salt); err != nil {
		return "", err
	}
	h.key = h.derive(prepared, keyLength)
	return h.String(), nil
}

// prepare maps what keyboards and systems write in different ways to one form, RFC 8265 §4.2.
func prepare(password string) ([]byte, error) {
	if password == "" || len(password) > maxPassword {
		return nil, fmt.Errorf("a password must have from 1 to %d octets", maxPassword)
	}
	prepared, err := precis.OpaqueString.Bytes([]byte(password))
	if err != nil {
		return nil, errors.New("a password must not have control characters, or others that cannot be typed")
	}
	return prepared, nil
}

func (h hash) derive(password []byte, length int) []byte {
	return argon2.IDKey(password, h.salt, h.time, h.memory, h.threads, uint32(length))
}

// matches takes as long whether it does or not.
func (h hash) matches(password string) bool {
	prepared, err := prepare(password)
	if err != nil {
		prepared = []byte{0} // what no password is
	}
	return subtle.ConstantTimeCompare(h.derive(prepared, len(h.key)), h.key) == 1 && err == nil
}

// decoy is a hash that takes as long as one with these parameters and that nothing matches.
func (p parameters) decoy() hash {
	return hash{parameters: p, salt: make([]byte, saltLength), key: make([]byte, keyLength)}
}

// stronger returns whichever costs more.
func (p parameters) stronger(q parameters) parameters {
	if uint64(q.memory)*uint64(q.time) > uint64(p.memory)*uint64(p.time) {
		return q
	}
	return p
}

// enough reports whether the parameters are at least one of those that OWASP's cheat sheet takes for equally strong.
func (p parameters) enough() bool {
	for _, least := range []parameters{{47104, 1, 1}, {19456, 2, 1}, {12288, 3, 1}, {9216, 4, 1}, {7168, 5, 1}} {
		if p.memory >= least.memory && p.time >= least.time {
			return true
		}
	}
	return false
}

// String is in the PHC string format.
func (h hash) String() string {
	encode := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, h.memory, h.time, h.threads, encode(h.salt), encode(h.key))
}

// parseHash reads the PHC string format. Its errors are to be read behind "the password of …", and show nothing of it.
func parseHash(s string) (hash, error) {
	var h hash
	var version int
	parts := strings.Split(s, "$")
	if len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" {
		return h, errors.New("is no argon2id hash")
	}
	if n, err := fmt.Sscanf(parts[2]+" "+parts[3], "v=%d m=%d,t=%d,p=%d", &version, &h.memory, &h.time, &h.threads); n != 4 || err != nil || version != argon2.Version {
		return h, errors.New("is no argon2id hash of version 19 with m, t and p")
	}
	var err, keyErr error
	h.salt, err = base64.RawStdEncoding.Strict().DecodeString(parts[4])
	h.key, keyErr = base64.RawStdEncoding.Strict().DecodeString(parts[5])
	switch {
	case err != nil || keyErr != nil || h.String() != s:
		return h, errors.New("is a damaged argon2id hash")
	case len(h.salt) < 8 || len(h.salt) > 64 || len(h.key) < 16 || len(h.key) > 64:
		return h, errors.New("has a salt or key of an unusual length")
	case h.threads < 1 || h.memory > maxMemory || h.time > maxTime || h.threads > maxThreads:
		return h, fmt.Errorf("costs too much (m=%d,t=%d,p=%d)", h.memory, h.time, h.threads)
	case !h.enough():
		return h, fmt.Errorf("is too weak (m=%d,t=%d,p=%d)", h.memory, h.time, h.threads)
	}
	return h, nil
}
