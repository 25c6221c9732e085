// Command image writes an OCI image, as a tarball that containerd, Docker 25, Podman, kind and crane load, without a container
// engine and without a registry. The same input gives the same octets: times are those of -created, owners are root, the
// order is fixed.
//
//	image -o FILE -name NAME [flags] SOURCE=/PATH…
//
// A SOURCE with {os} and {arch} in it is taken once for each -platform, and the tarball then holds an image for all of them.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	var c config
	err := c.parse(os.Args[1:])
	if err == nil {
		err = c.write()
	}
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

type config struct {
	out, name, user, rootfs, platforms string
	created                            int64
	labels, env, entrypoint, cmd       list
	files                              []file
}

// file is one file of the image.
type file struct{ source, path string }

func (c *config) parse(args []string) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.StringVar(&c.out, "o", "image.tar", "the tarball")
	flags.StringVar(&c.name, "name", "", "the image's whole name, with a tag")
	flags.StringVar(&c.user, "user", "65532:65532", "user and group of the process")
	flags.StringVar(&c.rootfs, "rootfs", "", "folder that becomes /, with its owners and modes")
	flags.StringVar(&c.platforms, "platform", "linux/amd64", "OS/ARCH, comma-separated")
	flags.Int64Var(&c.created, "created", 0, "time of the image and of its files, in seconds since 1970")
	flags.Var(&c.labels, "label", "KEY=VALUE, repeatable")
	flags.Var(&c.env, "env", "NAME=VALUE, repeatable")
	flags.Var(&c.entrypoint, "entrypoint", "repeatable; the first file's path if not given")
	flags.Var(&c.cmd, "cmd", "repeatable")
	if err := flags.Parse(args); err != nil {
		return err
	}
	for _, arg := range flags.Args() {
		source, at, ok := strings.Cut(arg, "=")
		if !ok || !path.IsAbs(at) || path.Clean(at) != at {
			return fmt.Errorf("%q is not of the form SOURCE=/PATH", arg)
		}
		c.files = append(c.files, file{source, at})
	}
	if !strings.Contains(path.Base(c.name), ":") {
		return fmt.Errorf("-name=%q has no tag, as in localhost/program:dev", c.name)
	}
	if len(c.entrypoint) == 0 && len(c.files) > 0 {
		c.entrypoint = list{c.files[0].path}
	}
	return nil
}

// write builds the images in a folder, and packs that.
func (c *config) write() error {
	dir, err := os.MkdirTemp(filepath.Dir(c.out), ".image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	to, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	annotations := layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          c.name,
		"org.opencontainers.image.ref.name": c.name[strings.LastIndexByte(c.name, ':')+1:],
	})
	platforms := strings.Split(c.platforms, ",")
	var several v1.ImageIndex = empty.Index
	for _, text := range platforms {
		platform, err := v1.ParsePlatform(text)
		if err != nil {
			return err
		}
		image, err := c.image(*platform)
		if err != nil {
			return err
		}
		if len(platforms) == 1 {
			if err := to.AppendImage(image, annotations, layout.WithPlatform(*platform)); err != nil {
				return err
			}
			break
		}
		several = mutate.AppendManifests(several, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: platform}})
	}
	if len(platforms) > 1 {
		if err := to.AppendIndex(several, annotations); err != nil {
			return err
		}
	}
	return c.pack(dir)
}

func (c *config) image(platform v1.Platform) (v1.Image, error) {
	expand := strings.NewReplacer("{os}", platform.OS, "{arch}", platform.Architecture)
	octets, err := c.tar(expand)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(octets)), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	labels := make(map[string]string)
	for _, label := range c.labels {
		key, value, _ := strings.Cut(label, "=")
		labels[key] = value
	}
	created := v1.Time{Time: time.Unix(c.created, 0).UTC()}
	image := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: platform.OS, Architecture: platform.Architecture, Created: created, RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{User: c.user, Env: c.env, Entrypoint: c.entrypoint, Cmd: c.cmd, WorkingDir: "/", Labels: labels},
	})
	if err != nil {
		return nil, err
	}
	return mutate.Append(image, mutate.Addendum{Layer: layer, History: v1.History{Created: created, CreatedBy: "tools/image"}})
}

// tar is the image's one layer.
func (c *config) tar(expand *strings.Replacer) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	dirs := map[string]bool{"/": true, ".": true}
	if c.rootfs != "" {
		if err := c.addTree(w, dirs); err != nil {
			return nil, err
		}
	}
	for _, f := range c.files {
		if err := c.addFolders(w, dirs, path.Dir(f.path)); err != nil {
			return nil, err
		}
		if err := c.addFile(w, expand.Replace(f.source), f.path); err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), w.Close()
}

func (c *config) time() time.Time { return time.Unix(c.created, 0).UTC() }

func (c *config) addFolders(w *tar.Writer, dirs map[string]bool, dir string) error {
	if dirs[dir] {
		return nil
	}
	if err := c.addFolders(w, dirs, path.Dir(dir)); err != nil {
		return err
	}
	dirs[dir] = true
	return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir[1:] + "/", Mode: 0o755, ModTime: c.time()})
}

// addFile adds a file with its own permission to be executed, and otherwise with the same for everybody.
func (c *config) addFile(w *tar.Writer, source, at string) error {
	content, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	mode := int64(0o644)
	if info.Mode()&0o100 != 0 {
		mode = 0o755
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: at[1:], Mode: mode, Size: int64(len(content)), ModTime: c.time()}); err != nil {
		return err
	}
	_, err = w.Write(content)
	return err
}

func (c *config) addTree(w *tar.Writer, dirs map[string]bool) error {
	return filepath.WalkDir(c.rootfs, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		at, err := filepath.Rel(c.rootfs, name)
		if err != nil || at == "." {
			return err
		}
		info, err := entry.Info()
		if err != nil || info.Mode()&(fs.ModeSocket|fs.ModeDevice) != 0 {
			return err
		}
		link := ""
		if info.Mode()&fs.ModeSymlink != 0 {
			if link, err = os.Readlink(name); err != nil {
				return err
			}
		}
		header, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		owner := syscall.Stat_t{}
		if stat, ok := info.Sys().(*syscall.Stat_t); ok {
			owner = *stat
		}
		header.Name = filepath.ToSlash(at)
		if info.IsDir() {
			header.Name += "/"
			dirs["/"+at] = true
		}
		*header = tar.Header{
			Typeflag: header.Typeflag, Name: header.Name, Linkname: header.Linkname, Mode: header.Mode, Size: header.Size,
			Uid: int(owner.Uid), Gid: int(owner.Gid), ModTime: c.time(),
		}
		if err := w.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
			return err
		}
		content, err := os.Open(name) //nolint:gosec // nobody else writes to the folder that becomes an image
		if err != nil {
			return err
		}
		defer func() { _ = content.Close() }()
		_, err = io.Copy(w, content)
		return err
	})
}

// pack makes one tarball of an OCI layout.
func (c *config) pack(dir string) error {
	var names []string
	err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			names = append(names, name)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Sort(names)
	partial := c.out + ".part"
	out, err := os.Create(partial)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(partial) }()
	w := tar.NewWriter(out)
	folders := &config{} // of 1970: the tarball is not the image
	dirs := map[string]bool{"/": true}
	for _, name := range names {
		at := "/" + filepath.ToSlash(strings.TrimPrefix(name, dir+string(filepath.Separator)))
		if err = folders.addFolders(w, dirs, path.Dir(at)); err == nil {
			err = folders.addFile(w, name, at)
		}
		if err != nil {
			break
		}
	}
	if err := errors.Join(err, w.Close(), out.Close()); err != nil {
		return err
	}
	return os.Rename(partial, c.out)
}
