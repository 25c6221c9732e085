package web

import "sync"

// crowd bounds how many large forms are handled at once: in all, and of one person or network. It is safe for concurrent use.
type crowd struct {
	most, each int
	mu         sync.Mutex
	all        int
	by         map[string]int // only those who are inside
}

func newCrowd(most, each int) *crowd { return &crowd{most: most, each: each, by: make(map[string]int)} }

// enter takes a place without waiting. If ok, leave gives it back.
func (c *crowd) enter(who string) (leave func(), ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= c.most || c.by[who] >= c.each {
		return nil, false
	}
	c.all++
	c.by[who]++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.all--
		if c.by[who]--; c.by[who] == 0 {
			delete(c.by, who)
		}
	}, true
}
