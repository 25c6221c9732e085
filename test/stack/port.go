package stack

import (
	"errors"
	"fmt"
	"math/rand/v2"
)

// FreeAddress returns an address on 127.0.0.1 that nobody listens on and that the stack has not chosen before. The ports
// are below the range from which the kernel takes ports for outgoing connections, so that a program that is restarted
// finds its port free.
func (s *Stack) FreeAddress() (string, error) {
	const first, last = 20000, 32000
	var err error
	for range 100 {
		address := fmt.Sprintf("127.0.0.1:%d", first+rand.IntN(last-first))
		if s.chosen[address] {
			continue
		}
		if err = Taken(address); err == nil {
			s.chosen[address] = true
			return address, nil
		}
	}
	return "", errors.Join(errors.New("no free port"), err)
}

func (s *Stack) chooseAddresses(addresses ...*string) error {
	for _, a := range addresses {
		if *a != "" {
			continue
		}
		var err error
		if *a, err = s.FreeAddress(); err != nil {
			return err
		}
	}
	return nil
}
