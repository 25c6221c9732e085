package lastgood

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/index"
)

// A state file is a header and frames; integers are big-endian.
//
//	header  magic, length (uint64), zeros up to 508 octets, CRC-32C of those
//	frame   size of the payload (uint32), kind, payload, CRC-32C of all that
//
// The snapshot comes first: the sets, which count from 1 in the order in which mailboxes need them, so that loading goes
// through memory in order too; the mailboxes, by rising id, with the numbers of their sets; and the identity of the state. Then comes the journal, a frame for each commit: the identity of the state it leads to, the
// revision of the one before, and the mailboxes that changed.
//
// The header's length is where the acknowledged state ends. It is written after what it counts is on disk, so below it
// nothing may be wrong or missing, and behind it there can only be a commit that was never acknowledged. The header fits
// into one sector, which disks write as a whole.
//
// Files of version 1 have no anchors. They are read, and then replaced before anything is added to them.
const (
	magic      = "allowednets lkg2"
	magic1     = "allowednets lkg1"
	headerSize = 512
	frameExtra = 4 + 1 + 4
	blockSize  = 64 << 10 // of the payload of a snapshot's frame, about
)

// The kinds of frames, in the order in which they come.
const (
	kindSets      = 1 // each: uvarint length, encoding
	kindMailboxes = 2 // each: id, uvarint number
	kindState     = 3 // identity
	kindCommit    = 4 // identity, revision before, entries
)

// identitySize is the size of an identity but for its anchor, which follows after its length (uvarint).
const identitySize = 8 + 8 + 8 + 8 + 16

func crc(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

func header(length int64) []byte {
	b := make([]byte, headerSize)
	copy(b, magic)
	binary.BigEndian.PutUint64(b[len(magic):], uint64(length))
	binary.BigEndian.PutUint32(b[headerSize-4:], crc(b[:headerSize-4]))
	return b
}

// parseHeader returns the length of the acknowledged state in a file of so many octets, and whether it has anchors.
func parseHeader(b []byte, size int64) (end int64, anchored bool, err error) {
	anchored = string(b[:len(magic)]) == magic
	switch {
	case !anchored && string(b[:len(magic)]) != magic1:
		return 0, false, fmt.Errorf("%w: it is no state file of this version", errDamaged)
	case crc(b[:headerSize-4]) != binary.BigEndian.Uint32(b[headerSize-4:]):
		return 0, false, fmt.Errorf("%w: checksum of the header", errDamaged)
	}
	length := binary.BigEndian.Uint64(b[len(magic):])
	if length > uint64(size) {
		return 0, false, fmt.Errorf("%w: it has %d octets instead of %d", errDamaged, size, length)
	}
	return int64(length), anchored, nil
}

// beginFrame and endFrame stand around what is appended as the payload of a frame.
func beginFrame(b []byte, kind byte) []byte { return append(b, 0, 0, 0, 0, kind) }

func endFrame(b []byte, begin int) []byte {
	binary.BigEndian.PutUint32(b[begin:], uint32(len(b)-begin-5))
	return binary.BigEndian.AppendUint32(b, crc(b[begin:]))
}

func appendEntry(b []byte, id allow.ID, encoding []byte) []byte {
	b = binary.AppendUvarint(append(b, id[:]...), uint64(len(encoding)))
	return append(b, encoding...)
}

func (i identity) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, i.cluster)
	b = binary.BigEndian.AppendUint64(b, i.token.Epoch)
	b = binary.BigEndian.AppendUint64(b, uint64(i.token.Revision))
	b = binary.BigEndian.AppendUint64(b, i.count)
	b = binary.AppendUvarint(append(b, i.digest[:]...), uint64(len(i.anchor)))
	return append(b, i.anchor...)
}

// appendCommit appends the frame of a commit that follows on the revision before.
func appendCommit(b []byte, before int64, to identity, c *Changes) []byte {
	begin := len(b)
	b = to.append(beginFrame(b, kindCommit))
	b = binary.BigEndian.AppendUint64(b, uint64(before))
	return endFrame(append(b, c.entries...), begin)
}

// errWrong means that an index in memory does not contain what it should.
var errWrong = errors.New("the state in memory does not have the count and the digest that it was verified with")

// writeSnapshot writes a state behind the place of the header and returns where it ends. Count and digest are computed from
// what is written; if they are not the state's, that is [errWrong].
func writeSnapshot(ctx context.Context, f *os.File, st State) (int64, error) {
	w := &snapshotWriter{ctx: ctx, f: f, at: headerSize, synced: headerSize, block: make([]byte, 0, blockSize+blockSize/4)}
	numbers := make([]uint32, st.Index.MaxNumber()+1)
	count := uint32(0)
	w.begin(kindSets)
	var encoding []byte
	for _, number := range st.Index.All() {
		if numbers[number] != 0 {
			continue
		}
		count++
		numbers[number] = count
		encoding = st.Index.Set(number).AppendEncoding(encoding[:0])
		w.block = append(binary.AppendUvarint(w.block, uint64(len(encoding))), encoding...)
		if w.full() && w.next(kindSets) != nil {
			break
		}
	}
	_ = w.next(kindMailboxes)
	have := identity{cluster: st.Cluster, token: st.Token, anchor: st.Anchor}
	for id, number := range st.Index.All() {
		encoding = st.Index.Set(number).AppendEncoding(encoding[:0])
		have.count++
		have.digest = have.digest.Add(allow.EntryDigest(id, encoding))
		w.block = binary.AppendUvarint(append(w.block, id[:]...), uint64(numbers[number]))
		if w.full() && w.next(kindMailboxes) != nil {
			break
		}
	}
	_ = w.next(kindState)
	w.block = have.append(w.block)
	if err := w.next(0); err != nil {
		return 0, err
	}
	if have != st.identity() {
		return 0, errWrong
	}
	return w.at, f.Sync()
}

// snapshotWriter writes one frame after another. Its first error stays.
type snapshotWriter struct {
	ctx    context.Context //nolint:containedctx // it lives as long as the one call that makes it
	f      *os.File
	at     int64
	synced int64
	block  []byte // the frame so far
	err    error
}

func (w *snapshotWriter) begin(kind byte) { w.block = beginFrame(w.block[:0], kind) }

func (w *snapshotWriter) full() bool { return len(w.block) >= blockSize }

// next writes the frame and begins another.
func (w *snapshotWriter) next(kind byte) error {
	if w.err == nil {
		w.err = w.ctx.Err()
	}
	if w.err == nil {
		w.block = endFrame(w.block, 0)
		_, w.err = w.f.WriteAt(w.block, w.at)
		w.at += int64(len(w.block))
	}
	// Little at a time, or the journal's next sync waits for all of it.
	if w.err == nil && w.at-w.synced >= 4<<20 {
		w.synced, w.err = w.at, w.f.Sync()
	}
	w.begin(kind)
	return w.err
}

// content is what a state file holds.
type content struct {
	state    State
	writer   *index.Writer // whose newest root is the state's
	snapshot int64         // octets up to the journal
	length   int64         // octets of the acknowledged state
	size     int64         // octets of the file
	anchored bool          // not of version 1
}

// read reads and verifies a state file. An error that wraps [errDamaged] says what is wrong with it; any other is of reading.
func read(f *os.File) (content, error) {
	info, err := f.Stat()
	if err != nil {
		return content{}, err
	}
	var head [headerSize]byte
	if n, err := io.ReadFull(io.NewSectionReader(f, 0, headerSize), head[:]); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: it has only %d octets", errDamaged, n)
		}
		return content{}, err
	}
	length, anchored, err := parseHeader(head[:], info.Size())
	if err != nil {
		return content{}, err
	}
	c := content{writer: index.NewWriter(), length: length, size: info.Size(), anchored: anchored}
	d := &decoder{
		r: bufio.NewReaderSize(io.NewSectionReader(f, headerSize, length-headerSize), 256<<10), at: headerSize, end: length,
		b: c.writer.Rebuild(), anchored: anchored,
	}
	for d.at < d.end {
		if err := d.frame(); err != nil {
			return content{}, fmt.Errorf("at octet %d: %w", d.at, err)
		}
		if d.kind == kindState {
			c.snapshot = d.at
		}
	}
	if d.kind < kindState {
		return content{}, fmt.Errorf("%w: the snapshot has no end", errDamaged)
	}
	c.state = State{Cluster: d.now.cluster, Token: d.now.token, Anchor: d.now.anchor, Index: d.b.Build()}
	return c, nil
}

// decoder applies one frame after another.
type decoder struct {
	r        *bufio.Reader
	at, end  int64
	buf      []byte
	kind     byte // of the last frame
	b        *index.Builder
	sets     uint32
	now      identity // the last one read
	anchored bool
}

func (d *decoder) frame() error {
	if d.end-d.at < frameExtra {
		return damaged("the frame is cut off")
	}
	size, err := d.r.Peek(4)
	if err != nil {
		return err
	}
	total := int64(binary.BigEndian.Uint32(size)) + frameExtra
	if total > d.end-d.at {
		return damaged("the frame is cut off")
	}
	d.buf = slices.Grow(d.buf[:0], int(total))[:total]
	if _, err := io.ReadFull(d.r, d.buf); err != nil {
		return err
	}
	body, sum := d.buf[:total-4], binary.BigEndian.Uint32(d.buf[total-4:])
	if crc(body) != sum {
		return damaged("checksum of the frame")
	}
	if err := d.apply(body[4], body[5:]); err != nil {
		return err
	}
	d.at += total
	return nil
}

// apply applies the payload of a frame.
func (d *decoder) apply(kind byte, p []byte) error {
	before := d.kind
	d.kind = kind
	switch {
	case kind < before || kind == kindState && before == kindState || kind == kindCommit && before < kindState:
		return damaged("a frame of kind %d after one of kind %d", kind, before)
	case kind == kindSets:
		return d.addSets(p)
	case kind == kindMailboxes:
		return d.addMailboxes(p)
	case kind == kindState:
		p, err := d.identity(p)
		if err == nil && len(p) > 0 {
			err = damaged("the identity is too long")
		}
		if err != nil {
			return err
		}
		return d.verify()
	case kind == kindCommit:
		return d.commit(p)
	}
	return damaged("a frame of kind %d", kind)
}

func (d *decoder) addSets(p []byte) error {
	for len(p) > 0 {
		encoding, rest, err := cut(p)
		if err != nil {
			return err
		}
		number, err := d.b.AddSet(encoding)
		if err != nil {
			return fmt.Errorf("%w: set %d: %w", errDamaged, d.sets+1, err)
		}
		if d.sets++; number != d.sets {
			return damaged("set %d got number %d", d.sets, number)
		}
		p = rest
	}
	return nil
}

func (d *decoder) addMailboxes(p []byte) error {
	for len(p) > 0 {
		if len(p) < len(allow.ID{}) {
			return damaged("a mailbox is cut off")
		}
		id := allow.ID(p)
		p = p[len(id):]
		number, n := binary.Uvarint(p)
		if n <= 0 || number > uint64(d.sets) {
			return damaged("mailbox %x has no set", id)
		}
		if err := d.b.Append(id, uint32(number)); err != nil {
			return fmt.Errorf("%w: mailbox %x: %w", errDamaged, id, err)
		}
		p = p[n:]
	}
	return nil
}

func (d *decoder) commit(p []byte) error {
	was := d.now
	p, err := d.identity(p)
	switch {
	case err != nil:
		return err
	case !d.now.continues(was):
		return damaged("a commit of store %x, epoch %d, in a state of store %x, epoch %d",
			d.now.cluster, d.now.token.Epoch, was.cluster, was.token.Epoch)
	case len(p) < 8:
		return damaged("the commit is cut off")
	}
	if before := int64(binary.BigEndian.Uint64(p)); before != was.token.Revision || d.now.token.Revision < before {
		return damaged("a commit that leads from revision %d to %d, after revision %d", before, d.now.token.Revision, was.token.Revision)
	}
	for p = p[8:]; len(p) > 0; {
		if len(p) < len(allow.ID{}) {
			return damaged("an entry is cut off")
		}
		id := allow.ID(p)
		encoding, rest, err := cut(p[len(id):])
		if err != nil {
			return err
		}
		if err := d.b.Put(id, encoding); err != nil {
			return fmt.Errorf("%w: mailbox %x: %w", errDamaged, id, err)
		}
		p = rest
	}
	return d.verify()
}

// identity reads the identity of the state that the frame leads to.
func (d *decoder) identity(p []byte) ([]byte, error) {
	if len(p) < identitySize {
		return nil, damaged("the identity is cut off")
	}
	word := func(i int) uint64 { return binary.BigEndian.Uint64(p[8*i:]) }
	d.now = identity{cluster: word(0), count: word(3), digest: allow.Digest(p[32:])}
	d.now.token.Epoch, d.now.token.Revision = word(1), int64(word(2))
	if d.now.cluster == 0 || d.now.token.Epoch == 0 || d.now.token.Revision <= 0 {
		return nil, damaged("store %x, epoch %d, revision %d", d.now.cluster, d.now.token.Epoch, d.now.token.Revision)
	}
	p = p[identitySize:]
	if !d.anchored {
		return p, nil
	}
	anchor, p, err := cut(p)
	if err != nil || len(anchor) > MaxAnchor {
		return nil, damaged("the anchor is cut off or too long")
	}
	d.now.anchor = string(anchor)
	return p, nil
}

// verify compares what was built with what it must be.
func (d *decoder) verify() error {
	if d.b.Count() != d.now.count || d.b.Digest() != d.now.digest {
		return damaged("revision %d should have %d mailboxes with digest %x, but has %d with %x",
			d.now.token.Revision, d.now.count, d.now.digest, d.b.Count(), d.b.Digest())
	}
	return nil
}

// cut cuts a length and so many octets off the front of b.
func cut(b []byte) (encoding, rest []byte, err error) {
	size, n := binary.Uvarint(b)
	if n <= 0 || size > uint64(len(b)-n) {
		return nil, nil, damaged("a length reaches behind the end")
	}
	b = b[n:]
	return b[:size], b[size:], nil
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errDamaged}, args...)...)
}
