package dovecot

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Deliver puts a message into a mailbox.
func (d *Server) Deliver(mailbox, message string) error {
	mail, err := user.Lookup("mail")
	if err != nil {
		return err
	}
	uid, uidErr := strconv.Atoi(mail.Uid)
	gid, gidErr := strconv.Atoi(mail.Gid)
	errs := []error{uidErr, gidErr}
	root := filepath.Join(d.dir, "mail", mailbox)
	for _, dir := range []string{root, filepath.Join(root, "new"), filepath.Join(root, "cur"), filepath.Join(root, "tmp")} {
		if err := os.Mkdir(dir, 0o700); errors.Is(err, os.ErrExist) {
			continue
		} else if err != nil {
			return err
		}
		errs = append(errs, os.Chown(dir, uid, gid))
	}
	name := filepath.Join(root, "new", fmt.Sprintf("%d.test", time.Now().UnixNano()))
	text := strings.ReplaceAll(message, "\n", "\r\n")
	return errors.Join(append(errs, os.WriteFile(name, []byte(text), 0o600), os.Chown(name, uid, gid))...)
}
