package allow_test

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/allowednets/allowednets/internal/allow"
)

func ExampleParseMailbox() {
	m, _ := allow.ParseMailbox("Jürgen@Bücher.Example.")
	fmt.Println(m)
	_, err := allow.ParseMailbox("alice*admin@example.org")
	fmt.Println(err)
	// Output:
	// jürgen@xn--bcher-kva.example
	// "alice*admin@example.org" has a character before the @ that a mailbox cannot have: remove spaces, control characters, quotes, \, * and extra @
}

func ExampleRules_ParseText() {
	var rules allow.Rules
	list, _ := rules.ParseText("8.8.8.0/24, 2A00:1450:0::/32\n8.8.4.4/32; 8.8.4.4")
	fmt.Println(list.Strings())

	_, err := rules.ParseText("8.8.8.0/24, 8.8.4.4-8.8.4.6, 192.168.0.0/16")
	if invalid, ok := errors.AsType[*allow.InvalidError](err); ok {
		for _, p := range invalid.Problems {
			fmt.Println(p.Index, p.Refusal, p.Suggestions)
			fmt.Println(p.Message)
		}
	}
	// Output:
	// [8.8.8.0/24 2a00:1450::/32 8.8.4.4]
	// 1 NET_REFUSAL_RANGE [8.8.4.4/31 8.8.4.6]
	// "8.8.4.4-8.8.4.6" is a range; write networks with a prefix length, as in 8.8.8.0/24.
	// 2 NET_REFUSAL_PRIVATE []
	// "192.168.0.0/16" lies in 192.168.0.0/16 (private use), where no client comes from; list the public address that the Internet sees.
}

func ExampleDecide() {
	rules := allow.Rules{Permit: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}
	list, _ := rules.ParseText("192.0.2.0/24, 192.0.2.7")
	set, _ := allow.DecodeSet(list.Encode())
	for _, s := range []string{"::ffff:192.0.2.7", "192.0.2.8", "8.8.8.8", "10.0.0.1", ""} {
		client, _ := allow.ParseClient(s)
		out := allow.Decide(set, client)
		fmt.Println(out.Verdict, out.Reason, out.Net)
	}
	// Output:
	// VERDICT_ALLOW REASON_MATCHED 192.0.2.7/32
	// VERDICT_ALLOW REASON_MATCHED 192.0.2.0/24
	// VERDICT_DENY REASON_NOT_IN_ALLOWED_NETS invalid Prefix
	// VERDICT_DENY REASON_CLIENT_ADDRESS_NOT_PUBLIC invalid Prefix
	// VERDICT_DENY REASON_CLIENT_ADDRESS_UNKNOWN invalid Prefix
}

func ExampleDigest() {
	alice, _ := allow.ParseMailbox("alice@example.org")
	bob, _ := allow.ParseMailbox("bob@example.org")
	var rules allow.Rules
	one, _ := rules.ParseText("8.8.8.8")
	two, _ := rules.ParseText("8.8.4.4")

	// Alice's list changes from one net to another; the digest of the state follows without looking at Bob's.
	var state allow.Digest
	state = state.Add(allow.EntryDigest(alice.ID(), one.Encode())).Add(allow.EntryDigest(bob.ID(), one.Encode()))
	state = state.Sub(allow.EntryDigest(alice.ID(), one.Encode())).Add(allow.EntryDigest(alice.ID(), two.Encode()))

	fresh := allow.EntryDigest(bob.ID(), one.Encode()).Add(allow.EntryDigest(alice.ID(), two.Encode()))
	fmt.Println(state == fresh)
	// Output: true
}
