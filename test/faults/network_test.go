package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"github.com/allowednets/allowednets/test/stack"
)

// hub is where the bridge is, and the test itself, and what is reached through a [stack.Proxy].
const hub = "hub"

// nodes are the nodes of the network with their addresses: one network namespace each, all on one bridge.
func nodes() map[string]string {
	return map[string]string{
		hub:     "10.77.0.1",
		"etcd0": "10.77.0.10", "etcd1": "10.77.0.11", "etcd2": "10.77.0.12",
		"policy0": "10.77.0.20", "policy1": "10.77.0.21",
		"side0": "10.77.0.30", "side1": "10.77.0.31", "side3": "10.77.0.33",
	}
}

func address(node string) string { return nodes()[node] }

// newNetwork fills the namespaces that the process was born into. /run becomes a private tmpfs, and ip keeps the nodes' names
// there; all of it ends with the last process inside.
func newNetwork() error {
	if err := syscall.Mount("", "/", "", syscall.MS_PRIVATE|syscall.MS_REC, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mounting /run: %w", err)
	}
	// Three addresses for the name of the policy service, as a large host's DNS has.
	hosts := "127.0.0.1 localhost\n"
	for _, node := range []string{"policy0", "policy1", hub} {
		hosts += address(node) + " " + stack.PolicyName + "\n"
	}
	if err := os.WriteFile("/run/hosts", []byte(hosts), 0o600); err != nil {
		return err
	}
	if err := syscall.Mount("/run/hosts", "/etc/hosts", "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting /etc/hosts: %w", err)
	}
	commands := []string{"link set lo up", "link add hub type bridge", "addr add " + address(hub) + "/24 dev hub", "link set hub up"}
	for node, at := range nodes() {
		if node == hub {
			continue
		}
		commands = append(commands, "netns add "+node,
			fmt.Sprintf("link add v-%[1]s type veth peer name eth0 netns %[1]s", node), fmt.Sprintf("link set v-%s master hub up", node),
			fmt.Sprintf("-n %s addr add %s/24 dev eth0", node, at),
			fmt.Sprintf("-n %s link set eth0 up", node), fmt.Sprintf("-n %s link set lo up", node))
	}
	for _, c := range commands {
		if err := ip(c); err != nil {
			return err
		}
	}
	return nil
}

func ip(command string) error {
	//nolint:noctx // it does not wait
	if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", command, err, out)
	}
	return nil
}

// in runs a program in a node's namespace.
func in(node string) []string {
	if node == hub {
		return nil
	}
	return []string{"ip", "netns", "exec", node}
}

// partitions are what is cut now. Several faults may cut the same; it works again when the last of them ends. The methods may be
// called concurrently.
type partitions struct {
	mu   sync.Mutex
	cuts map[[2]string]int
}

// deafen loses, silently, everything that one node sends to another: it goes to a hardware address that nobody has.
func (p *partitions) deafen(from, to string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cuts == nil {
		p.cuts = make(map[[2]string]int)
	}
	p.cuts[[2]string{from, to}]++
	return ip(fmt.Sprintf("%s neigh replace %s lladdr 02:00:00:00:00:ff nud permanent dev %s", at(from), address(to), device(from)))
}

// restore ends deafen.
func (p *partitions) restore(from, to string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cuts[[2]string{from, to}]--; p.cuts[[2]string{from, to}] > 0 {
		return nil
	}
	return ip(fmt.Sprintf("%s neigh del %s dev %s", at(from), address(to), device(from)))
}

// apart loses in both directions.
func (p *partitions) apart(a, b string) error { return errors.Join(p.deafen(a, b), p.deafen(b, a)) }

// together ends apart.
func (p *partitions) together(a, b string) error {
	return errors.Join(p.restore(a, b), p.restore(b, a))
}

// isolate takes a node away from others, until the function it returns is called.
func (p *partitions) isolate(node string, others ...string) (func(context.Context) error, error) {
	each := func(do func(a, b string) error) error {
		var errs []error
		for _, o := range others {
			errs = append(errs, do(node, o))
		}
		return errors.Join(errs...)
	}
	return func(context.Context) error { return each(p.together) }, each(p.apart)
}

// at is the option of ip that names a namespace.
func at(node string) string {
	if node == hub {
		return ""
	}
	return "-n " + node
}

func device(node string) string {
	if node == hub {
		return hub
	}
	return "eth0"
}
