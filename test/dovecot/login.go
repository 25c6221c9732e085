package dovecot

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"
)

// replyWithin bounds a whole attempt to log in. Dovecot's waits of a penalty (up to 15 s) must not fit in.
const replyWithin = 10 * time.Second

// Attempt is one attempt to log in, over a connection of its own.
type Attempt struct {
	// Client is the address a load balancer puts into the PROXY header. The zero value means no load balancer.
	Client netip.Addr
	// ProxyV2 makes the header a binary one.
	ProxyV2 bool
	// Header replaces the PROXY header, if it is not nil.
	Header []byte
	// From is the loopback address the connection comes from; the zero value means 127.0.0.1.
	From netip.Addr
	// Forward is what a webmail says of its user: pairs of IMAP ID, or arguments of POP3 XCLIENT, in order.
	Forward [][2]string
	// ForwardAgain is a second IMAP ID.
	ForwardAgain [][2]string

	User, Password string
	// Authorize is the user to act as, for SASL PLAIN, which is used if it is set.
	Authorize string
}

// Answer is what the person at the client gets to see.
type Answer struct {
	OK bool
	// Text is the final line without the tag.
	Text string
}

// LoginIMAP tries to log in. An error means that there was no final answer.
func (d *Server) LoginIMAP(ctx context.Context, a Attempt) (Answer, error) {
	c, answer, err := d.imap(ctx, a)
	if c != nil {
		c.close()
	}
	return answer, err
}

// imap logs in. The connection is nil if there is none.
func (d *Server) imap(ctx context.Context, a Attempt) (*conn, Answer, error) {
	c, err := a.open(ctx, d.IMAP, d.ProxiedIMAP)
	if err != nil {
		return nil, Answer{}, err
	}
	if _, err := c.line(); err != nil {
		return c, Answer{}, fmt.Errorf("greeting: %w", err)
	}
	for _, forward := range [][][2]string{a.Forward, a.ForwardAgain} {
		if len(forward) == 0 {
			continue
		}
		var id []string
		for _, kv := range forward {
			id = append(id, imapString(kv[0]), imapString(kv[1]))
		}
		if _, err := c.command("i", "ID ("+strings.Join(id, " ")+")"); err != nil {
			return c, Answer{}, err
		}
	}
	login := "LOGIN " + imapString(a.User) + " " + imapString(a.Password)
	if a.Authorize != "" {
		login = "AUTHENTICATE PLAIN " + a.sasl()
	}
	answer, err := c.command("a", login)
	if err == nil && answer.OK {
		_, err = c.command("s", "SELECT INBOX") // what a login is for
	}
	return c, answer, err
}

// LoginPOP3 tries to log in. An error means that there was no final answer.
func (d *Server) LoginPOP3(ctx context.Context, a Attempt) (Answer, error) {
	c, answer, err := d.pop3(ctx, a)
	if c != nil {
		c.close()
	}
	return answer, err
}

// pop3 logs in. The connection is nil if there is none.
func (d *Server) pop3(ctx context.Context, a Attempt) (*conn, Answer, error) {
	c, err := a.open(ctx, d.POP3, d.ProxiedPOP3)
	if err != nil {
		return nil, Answer{}, err
	}
	if _, err := c.line(); err != nil {
		return c, Answer{}, fmt.Errorf("greeting: %w", err)
	}
	var lines []string
	for _, kv := range a.Forward {
		lines = append(lines, "XCLIENT "+kv[0]+"="+kv[1])
	}
	if a.Authorize != "" {
		lines = append(lines, "AUTH PLAIN "+a.sasl())
	} else {
		lines = append(lines, "USER "+a.User, "PASS "+a.Password)
	}
	var answer Answer
	for _, l := range lines {
		if answer, err = c.popCommand(l); err != nil {
			return c, Answer{}, err
		}
	}
	if answer.OK {
		_, err = c.popCommand("STAT")
	}
	return c, answer, err
}

func (a Attempt) sasl() string {
	return base64.StdEncoding.EncodeToString([]byte(a.Authorize + "\x00" + a.User + "\x00" + a.Password))
}

// imapString writes s as a quoted string, or as a non-synchronizing literal where quotes cannot hold it.
func imapString(s string) string {
	if strings.ContainsAny(s, "\r\n\x00") || len(s) > 1000 {
		return fmt.Sprintf("{%d+}\r\n%s", len(s), s)
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// conn is a connection with a deadline on everything.
type conn struct {
	net.Conn

	read *bufio.Reader
}

func (a Attempt) open(ctx context.Context, direct, proxied string) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, replyWithin)
	defer cancel()
	var dialer net.Dialer
	if a.From.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(a.From, 0))
	}
	address := direct
	if a.Client.IsValid() || a.Header != nil {
		address = proxied
	}
	nc, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: nc, read: bufio.NewReader(nc)}
	if deadline, ok := ctx.Deadline(); ok {
		if err := nc.SetDeadline(deadline); err != nil {
			return nil, errors.Join(err, nc.Close())
		}
	}
	if address == proxied {
		header := a.Header
		switch {
		case header != nil:
		case a.ProxyV2:
			header = proxyV2(a.Client)
		default:
			header = proxyV1(a.Client)
		}
		if _, err := nc.Write(header); err != nil {
			return nil, errors.Join(err, nc.Close())
		}
	}
	return c, nil
}

func (c *conn) close() { _ = c.Close() }

func (c *conn) line() (string, error) {
	l, err := c.read.ReadString('\n')
	if err != nil {
		return "", err
	}
	return strings.TrimSuffix(strings.TrimSuffix(l, "\n"), "\r"), nil
}

// command sends an IMAP command and returns its tagged answer. A BYE or an unknown line before it is part of the answer's
// text, so that nothing that a client would see is lost.
func (c *conn) command(tag, text string) (Answer, error) {
	if _, err := fmt.Fprintf(c, "%s %s\r\n", tag, text); err != nil {
		return Answer{}, err
	}
	var before strings.Builder
	for {
		l, err := c.line()
		if err != nil {
			return Answer{Text: before.String()}, fmt.Errorf("no answer to %.20q: %w", text, err)
		}
		rest, tagged := strings.CutPrefix(l, tag+" ")
		switch {
		case tagged:
			return Answer{OK: strings.HasPrefix(rest, "OK"), Text: before.String() + rest}, nil
		case strings.HasPrefix(l, "* OK"), strings.HasPrefix(l, "* CAPABILITY"), strings.HasPrefix(l, "* ID"), strings.HasPrefix(l, "* FLAGS"),
			strings.HasSuffix(l, " EXISTS"), strings.HasSuffix(l, " RECENT"), strings.HasPrefix(l, "+"):
		default:
			before.WriteString(l + "\n")
		}
	}
}

func (c *conn) popCommand(text string) (Answer, error) {
	if _, err := fmt.Fprintf(c, "%s\r\n", text); err != nil {
		return Answer{}, err
	}
	l, err := c.line()
	if err != nil {
		return Answer{}, fmt.Errorf("no answer to %.20q: %w", text, err)
	}
	return Answer{OK: strings.HasPrefix(l, "+OK"), Text: l}, nil
}

// proxyV1 and proxyV2 write headers of the PROXY protocol (haproxy's doc/proxy-protocol.txt, 2.1 and 2.2).
func proxyV1(client netip.Addr) []byte {
	if client.Is4() {
		return fmt.Appendf(nil, "PROXY TCP4 %s 192.0.2.1 40000 143\r\n", client)
	}
	return fmt.Appendf(nil, "PROXY TCP6 %s 2001:db8::1 40000 143\r\n", client)
}

func proxyV2(client netip.Addr) []byte {
	server, family := netip.MustParseAddr("192.0.2.1"), byte(0x11)
	if client.Is6() {
		server, family = netip.MustParseAddr("2001:db8::1"), 0x21
	}
	body := append(client.AsSlice(), server.AsSlice()...)
	body = binary.BigEndian.AppendUint16(body, 40000)
	body = binary.BigEndian.AppendUint16(body, 143)
	header := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), 0x21, family)
	header = binary.BigEndian.AppendUint16(header, uint16(len(body)))
	return append(header, body...)
}
