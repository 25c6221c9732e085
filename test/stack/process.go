package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	pollEvery = 5 * time.Millisecond
	// stopWithin bounds a clean stop: the servers' own bound of 5 s and some more for a busy machine.
	stopWithin = 15 * time.Second
	killWithin = 10 * time.Second
)

// Await calls probe until it returns nil or ctx ends; then it returns the last error of probe.
func Await(ctx context.Context, probe func(context.Context) error) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last seen: %w", context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// Process is a program that runs beside the test, writes a log, and can be stopped, killed, frozen and started again.
// It dies with the process that started it. Its methods may be called concurrently.
type Process struct {
	name, path string
	args, env  []string
	log        string
	files      []*os.File // passed to each run, from descriptor 3 on; not ours to close

	mu   sync.Mutex
	run  *run
	dead bool // closed for good
}

// run is one life of a process.
type run struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it ended
	err  error         // how; read after done
}

// NewProcess prepares a program; log is the file its output is appended to.
func NewProcess(name, path string, args, env []string, log string) *Process {
	return &Process{name: name, path: path, args: args, env: env, log: log}
}

// Start starts the program. It is an error if it runs.
func (p *Process) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run != nil {
		return fmt.Errorf("%s runs already", p.name)
	}
	if p.dead {
		return fmt.Errorf("%s was closed", p.name)
	}
	log, err := os.OpenFile(p.log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("opening log: %w", err)
	}
	defer func() { _ = log.Close() }()     // the child has its own descriptor
	cmd := exec.Command(p.path, p.args...) //nolint:noctx // a program of the test's choice, ended by Stop and Kill
	environment := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "ALLOWEDNETS_") })
	cmd.Env = append(environment, p.env...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = log, log, p.files
	// A group of its own: Ctrl-C in the terminal reaches us alone, and we stop the others in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", p.name, err)
	}
	r := &run{cmd: cmd, done: make(chan struct{})}
	go func() {
		r.err = cmd.Wait()
		close(r.done)
	}()
	p.run = r
	return nil
}

// Pid returns the process id, or 0 if the program does not run.
func (p *Process) Pid() int {
	if r := p.current(); r != nil {
		return r.cmd.Process.Pid
	}
	return 0
}

func (p *Process) current() *run {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.run
}

// Done returns a channel that is closed when the present run ends; nil if there is none.
func (p *Process) Done() <-chan struct{} {
	if r := p.current(); r != nil {
		return r.done
	}
	return nil
}

// Stop asks the program to end and waits. A program that must be killed, or ends with an error, is an error.
func (p *Process) Stop() error {
	r := p.current()
	if r == nil {
		return nil
	}
	_ = r.cmd.Process.Signal(syscall.SIGCONT) // a frozen one would not hear the next
	_ = r.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-r.done:
		p.forget(r)
		if r.err != nil && !terminated(r.cmd.ProcessState) {
			return fmt.Errorf("%s ended with %w\n%s", p.name, r.err, p.LogTail())
		}
		return nil
	case <-time.After(stopWithin):
		return errors.Join(fmt.Errorf("%s did not stop within %s\n%s", p.name, stopWithin, p.LogTail()), p.Kill())
	}
}

// Kill ends the program at once and waits.
func (p *Process) Kill() error {
	r := p.current()
	if r == nil {
		return nil
	}
	_ = r.cmd.Process.Kill()
	select {
	case <-r.done:
		p.forget(r)
		return nil
	case <-time.After(killWithin):
		return fmt.Errorf("%s did not die within %s", p.name, killWithin)
	}
}

// terminated reports whether a program ended by the signal of Stop: etcd cleans up and then lets it happen.
func terminated(state *os.ProcessState) bool {
	status, ok := state.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGTERM
}

func (p *Process) forget(r *run) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run == r {
		p.run = nil
	}
}

// close stops the program and keeps it from being started again.
func (p *Process) close() error {
	p.mu.Lock()
	p.dead = true
	p.mu.Unlock()
	return p.Stop()
}

// Freeze stops the program's execution, as a hung or swapped-out program stops, and returns when it stands still.
func (p *Process) Freeze(ctx context.Context) error { return p.signalUntil(ctx, syscall.SIGSTOP, true) }

// Thaw ends Freeze.
func (p *Process) Thaw(ctx context.Context) error { return p.signalUntil(ctx, syscall.SIGCONT, false) }

func (p *Process) signalUntil(ctx context.Context, sig syscall.Signal, frozen bool) error {
	r := p.current()
	if r == nil {
		return fmt.Errorf("%s does not run", p.name)
	}
	if err := r.cmd.Process.Signal(sig); err != nil {
		return fmt.Errorf("%s to %s: %w", sig, p.name, err)
	}
	return Await(ctx, func(context.Context) error {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.cmd.Process.Pid))
		if err != nil {
			return err
		}
		_, rest, _ := bytes.Cut(stat, []byte(") ")) // proc(5): the state follows the name in parentheses
		if bytes.HasPrefix(rest, []byte("T")) != frozen {
			return fmt.Errorf("%s is in state %.1s after %s", p.name, rest, sig)
		}
		return nil
	})
}

// AwaitReady waits until probe succeeds. That the program ends meanwhile, or ctx does, is an error with the end of the log.
func (p *Process) AwaitReady(ctx context.Context, probe func(context.Context) error) error {
	r := p.current()
	if r == nil {
		return fmt.Errorf("%s does not run", p.name)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-r.done:
			cancel(fmt.Errorf("it ended: %w", errors.Join(errors.New("before it was ready"), r.err)))
		case <-ctx.Done():
		}
	}()
	if err := Await(ctx, probe); err != nil {
		return fmt.Errorf("waiting for %s: %w\n%s", p.name, err, p.LogTail())
	}
	return nil
}

// LogTail returns the last lines of the log.
func (p *Process) LogTail() string {
	log, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	const most = 4000
	if len(log) > most {
		log = log[len(log)-most:]
	}
	return "--- end of " + p.log + "\n" + strings.TrimSpace(string(log)) + "\n---"
}

// Log returns the whole log.
func (p *Process) Log() (string, error) {
	log, err := os.ReadFile(p.log)
	return string(log), err
}

// Ready returns a probe that asks the admin port at address for /readyz.
func Ready(address string) func(context.Context) error {
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 1000))
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz says %s: %s", resp.Status, strings.TrimSpace(string(body)))
		}
		return nil
	}
}

// Taken returns an error if somebody listens on a TCP address.
func Taken(address string) error {
	lis, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", address)
	if err != nil {
		return err
	}
	return lis.Close()
}
