package faults

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/allowednets/allowednets/test/stack"
)

// No namespace moves the wall clock of one process, and a static Go program reads it without a system call. So the same source
// is built once more with a time package whose Now adds what a file says to the wall clock, and leaves the monotonic clock
// alone, as settimeofday does.

// shiftFile names, to such a program, the file with its shift: seconds, 8 octets, little endian.
const shiftFile = "FAULTS_CLOCK_SHIFT"

// It is mapped, because Now is also called where there is no stack for a system call.
const shiftSource = `package time

import (
	"syscall"
	"unsafe"
)

var shift = mapShift()

func mapShift() *int64 {
	path, _ := syscall.Getenv("` + shiftFile + `")
	f, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return new(int64)
	}
	defer syscall.Close(f)
	b, err := syscall.Mmap(f, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic("the shift of the clock: " + err.Error())
	}
	return (*int64)(unsafe.Pointer(&b[0]))
}
`

// shifted is where buildShifted puts the sidecar and the policy service.
const shifted = "shifted"

// buildShifted builds them, if ALLOWEDNETS_FAULTS_CLOCK is set: all of their dependencies are built anew, which takes minutes.
func buildShifted(ctx context.Context, dir string) error {
	if os.Getenv("ALLOWEDNETS_FAULTS_CLOCK") == "" {
		return nil
	}
	root, err := stack.Root()
	if err != nil {
		return err
	}
	goroot, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return err
	}
	original := filepath.Join(strings.TrimSpace(string(goroot)), "src", "time", "time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		return err
	}
	const reading = "\tsec, nsec, mono := runtimeNow()\n"
	changed := strings.Replace(string(source), "func Now() Time {\n"+reading, "func Now() Time {\n"+reading+"\tif shift != nil {\n\t\tsec += *shift\n\t}\n", 1)
	if changed == string(source) {
		return fmt.Errorf("%s has another Now than shifted_test.go knows", original)
	}
	// A fixed folder, because the build cache knows files by their path.
	overlayDir := filepath.Join(root, ".tmp", "faults")
	if err := os.MkdirAll(overlayDir, 0o700); err != nil {
		return err
	}
	files := map[string]string{"time.go": changed, "shift.go": shiftSource}
	replace := make(map[string]string)
	for name, text := range files {
		path := filepath.Join(overlayDir, name+".txt")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
		replace[filepath.Join(filepath.Dir(original), name)] = path
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return err
	}
	overlayFile := filepath.Join(overlayDir, "overlay.json")
	if err := os.WriteFile(overlayFile, overlay, 0o600); err != nil {
		return err
	}
	for name, pkg := range map[string]string{"allowednets-sidecar": "./sidecar", "allowednets-policy": "./services/policy"} {
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-overlay", overlayFile, "-o", filepath.Join(dir, shifted, name), pkg)
		build.Dir = root
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s with another clock: %w\n%s", name, err, out)
		}
	}
	return nil
}

// setShift moves the wall clock of the programs that read the file at path, at once.
func setShift(path string, d time.Duration) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(d/time.Second)), 0)
	return errors.Join(err, f.Close())
}
