// Package policyapi is the gRPC face of the store: it reads requests into values that cannot be invalid, and turns what the
// store knows into messages and errors.
package policyapi

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/services/policy/internal/propagation"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

const (
	defaultPage = 100
	maxPage     = 1000
	// maxPageBytes is about how large a page gets: a client of gRPC takes 4 MiB unless it says otherwise, and one list may
	// be 200 KiB.
	maxPageBytes = 2 << 20
)

// Config is what a [Service] works on.
type Config struct {
	Store  *store.Store
	Mirror *store.Mirror
	// Barrier returns once the mirror has every save acknowledged before the call.
	Barrier func(context.Context) (store.State, error)
	Tracker *propagation.Tracker
	Replica string // this replica's name among the published ones
	Rules   allow.Rules
	Scope   allow.Scope
	// Domains returns the domains that a caller may act in; limited is false for a caller that may act in all. Nil: no
	// caller is limited.
	Domains func(caller string) (domains []string, limited bool)
	// Fault is told of every error that is not the caller's.
	Fault func(ctx context.Context, err error)
}

// Service implements policy.v1.PolicyService.
type Service struct {
	policyv1.UnimplementedPolicyServiceServer
	cfg Config
}

// New returns the service.
func New(cfg Config) *Service { return &Service{cfg: cfg} }

// SetAllowedNets implements policy.v1.PolicyServiceServer.
func (s *Service) SetAllowedNets(ctx context.Context, req *policyv1.SetAllowedNetsRequest) (*policyv1.SetAllowedNetsResponse, error) {
	save, err := s.parseSave(ctx, req, policyv1.ChangeKind_CHANGE_KIND_SET)
	if err == nil {
		save.List, err = s.parseList(req)
	}
	if err != nil {
		return nil, s.status(ctx, err)
	}
	rec, changed, err := s.cfg.Store.Save(ctx, save)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	return &policyv1.SetAllowedNetsResponse{AllowedNets: message(rec, save.ValidateOnly), Changed: changed, Superseded: rec.Superseded}, nil
}

// ClearAllowedNets implements policy.v1.PolicyServiceServer.
func (s *Service) ClearAllowedNets(ctx context.Context, req *policyv1.ClearAllowedNetsRequest) (*policyv1.ClearAllowedNetsResponse, error) {
	rec, changed, err := s.lift(ctx, req, policyv1.ChangeKind_CHANGE_KIND_CLEAR)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	return &policyv1.ClearAllowedNetsResponse{
		AllowedNets: message(rec, req.GetValidateOnly()), Changed: changed, Superseded: rec.Superseded,
	}, nil
}

// DeleteMailbox implements policy.v1.PolicyServiceServer.
func (s *Service) DeleteMailbox(ctx context.Context, req *policyv1.DeleteMailboxRequest) (*policyv1.DeleteMailboxResponse, error) {
	rec, changed, err := s.lift(ctx, req, policyv1.ChangeKind_CHANGE_KIND_DELETE)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	return &policyv1.DeleteMailboxResponse{
		AllowedNets: message(rec, req.GetValidateOnly()), Changed: changed, Superseded: rec.Superseded,
	}, nil
}

// lift saves that a mailbox has no list.
func (s *Service) lift(ctx context.Context, req request, kind policyv1.ChangeKind) (rec store.Record, changed bool, err error) {
	save, err := s.parseSave(ctx, req, kind)
	if err != nil {
		return store.Record{}, false, err
	}
	return s.cfg.Store.Save(ctx, save)
}

// RenameMailbox implements policy.v1.PolicyServiceServer.
func (s *Service) RenameMailbox(ctx context.Context, req *policyv1.RenameMailboxRequest) (*policyv1.RenameMailboxResponse, error) {
	rename, err := s.parseRename(ctx, req)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	rec, changed, err := s.cfg.Store.Rename(ctx, rename)
	if errors.Is(err, store.ErrTargetRestricted) {
		err = &targetError{rec}
	}
	if err != nil {
		return nil, s.status(ctx, err)
	}
	return &policyv1.RenameMailboxResponse{AllowedNets: message(rec, false), Changed: changed}, nil
}

// GetAllowedNets implements policy.v1.PolicyServiceServer.
func (s *Service) GetAllowedNets(ctx context.Context, req *policyv1.GetAllowedNetsRequest) (*policyv1.GetAllowedNetsResponse, error) {
	mailbox, err := s.parseMailbox(ctx, req.GetMailbox())
	if err != nil {
		return nil, s.status(ctx, err)
	}
	rec, err := s.cfg.Store.Get(ctx, mailbox)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	return &policyv1.GetAllowedNetsResponse{AllowedNets: message(rec, false)}, nil
}

// ListAllowedNets implements policy.v1.PolicyServiceServer.
func (s *Service) ListAllowedNets(ctx context.Context, req *policyv1.ListAllowedNetsRequest) (*policyv1.ListAllowedNetsResponse, error) {
	domain, err := s.parseDomain(ctx, req.GetDomain())
	if err != nil {
		return nil, s.status(ctx, err)
	}
	after, err := parseStart(req, domain)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	size, err := pageSize(req.GetPageSize(), defaultPage, maxPage)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	if _, err := s.cfg.Barrier(ctx); err != nil {
		return nil, s.status(ctx, err)
	}
	var page []store.Record
	var total int
	if domain == "" {
		page, total = s.cfg.Mirror.All(after, size+1)
	} else {
		page, total = s.cfg.Mirror.Domain(domain, after.String(), size+1)
	}
	resp := &policyv1.ListAllowedNetsResponse{TotalSize: int64(total)}
	bytes := 0
	for i, rec := range page {
		if i == size || bytes > maxPageBytes {
			resp.NextPageToken = pageToken(page[i-1].Mailbox)
			break
		}
		m := message(rec, false)
		bytes += proto.Size(m)
		resp.AllowedNets = append(resp.AllowedNets, m)
	}
	return resp, nil
}

// request is what the messages of Set and Clear have in common.
type request interface { //nolint:interfacebloat // generated getters, one per field
	GetMailbox() string
	GetEtag() string
	GetRequestId() string
	GetValidateOnly() bool
	GetActor() *policyv1.Actor
}

func (s *Service) parseSave(ctx context.Context, req request, kind policyv1.ChangeKind) (store.Save, error) {
	mailbox, err := s.parseMailbox(ctx, req.GetMailbox())
	if err != nil {
		return store.Save{}, err
	}
	by, err := parseAuthor(ctx, req.GetActor(), req.GetRequestId())
	return store.Save{
		Mailbox: mailbox, Etag: req.GetEtag(), ValidateOnly: req.GetValidateOnly(), Kind: kind, Author: by,
	}, err
}

func (s *Service) parseRename(ctx context.Context, req *policyv1.RenameMailboxRequest) (store.Rename, error) {
	from, err := s.parseMailbox(ctx, req.GetMailbox())
	if err != nil {
		return store.Rename{}, err
	}
	to, err := allow.ParseMailbox(req.GetNewMailbox())
	if err != nil {
		return store.Rename{}, &fieldError{"new_mailbox", err.Error()}
	}
	if err := s.authorize(ctx, to.Domain()); err != nil {
		return store.Rename{}, err
	}
	if from == to {
		return store.Rename{}, &fieldError{"new_mailbox", "is the same mailbox"}
	}
	by, err := parseAuthor(ctx, req.GetActor(), req.GetRequestId())
	return store.Rename{From: from, To: to, Author: by}, err
}

// parseMailbox reads a mailbox that the caller may act on.
func (s *Service) parseMailbox(ctx context.Context, name string) (allow.Mailbox, error) {
	mailbox, err := allow.ParseMailbox(name)
	if err != nil {
		return allow.Mailbox{}, err
	}
	return mailbox, s.authorize(ctx, mailbox.Domain())
}

// parseDomain reads a domain that the caller may act in; empty stands for all.
func (s *Service) parseDomain(ctx context.Context, name string) (string, error) {
	if name == "" {
		return "", s.authorize(ctx, "")
	}
	domain, err := allow.ParseDomain(name)
	if err != nil {
		return "", &domainError{err}
	}
	return domain, s.authorize(ctx, domain)
}

// authorize is the one place that keeps callers in their domains.
func (s *Service) authorize(ctx context.Context, domain string) error {
	if s.cfg.Domains == nil {
		return nil
	}
	if domains, limited := s.cfg.Domains(serve.Caller(ctx)); limited && !slices.Contains(domains, domain) {
		return &domainDeniedError{domain}
	}
	return nil
}

func parseAuthor(ctx context.Context, actor *policyv1.Actor, requestID string) (store.Author, error) {
	by := store.Author{Actor: actor.GetId(), Caller: serve.Caller(ctx)}
	if requestID != "" {
		id, err := uuid.Parse(requestID)
		if err != nil {
			return store.Author{}, &fieldError{"request_id", fmt.Sprintf("%.60q is not a UUID", requestID)}
		}
		by.RequestID = id.String()
	}
	if len(by.Actor) > 255 || strings.ContainsFunc(by.Actor, unicode.IsControl) {
		return store.Author{}, &fieldError{"actor.id", "must be at most 255 octets without control characters"}
	}
	address, err := allow.ParseClient(actor.GetAddress())
	if err != nil {
		return store.Author{}, &fieldError{"actor.address", err.Error()}
	}
	if address.IsValid() {
		by.ActorAddress = address.String()
	}
	return by, nil
}

func (s *Service) parseList(req *policyv1.SetAllowedNetsRequest) (allow.List, error) {
	list, ok := req.GetInput().(*policyv1.SetAllowedNetsRequest_List)
	if !ok {
		return s.cfg.Rules.ParseText(req.GetText())
	}
	return s.cfg.Rules.ParseEntries(entries(list.List))
}

func entries(list *policyv1.NetList) []string {
	texts := make([]string, len(list.GetNets()))
	for i, n := range list.GetNets() {
		texts[i] = n.GetNet()
	}
	return texts
}

func netMessages(texts []string) []*policyv1.Net {
	nets := make([]*policyv1.Net, len(texts))
	for i, t := range texts {
		nets[i] = &policyv1.Net{Net: t}
	}
	return nets
}

// message shows a record. A draft was not saved and has no etag or revision.
func message(rec store.Record, draft bool) *policyv1.AllowedNets {
	m := &policyv1.AllowedNets{Mailbox: rec.Mailbox.String(), Nets: netMessages(rec.List.Strings())}
	if draft {
		return m
	}
	m.Etag = rec.Etag()
	if rec.Version > 0 {
		m.Revision, m.UpdateTime, m.UpdatedBy = rec.Etag(), timestamppb.New(rec.UpdatedAt), rec.UpdatedBy
	}
	return m
}

func pageToken(last allow.Mailbox) string {
	return base64.RawURLEncoding.EncodeToString([]byte(last.String()))
}

// parseStart returns the mailbox behind which a page starts; the zero value for the first one.
func parseStart(req *policyv1.ListAllowedNetsRequest, domain string) (allow.Mailbox, error) {
	if req.GetAfterMailbox() == "" {
		return parsePageToken(req.GetPageToken(), domain)
	}
	after, err := allow.ParseMailbox(req.GetAfterMailbox())
	switch {
	case req.GetPageToken() != "":
		return allow.Mailbox{}, &fieldError{"after_mailbox", "stands together with page_token; give one"}
	case err != nil:
		return allow.Mailbox{}, &fieldError{"after_mailbox", err.Error()}
	case domain != "" && after.Domain() != domain:
		return allow.Mailbox{}, &fieldError{"after_mailbox", "is not a mailbox of the domain"}
	}
	return after, nil
}

// parsePageToken returns the last mailbox of the page before. A token of another domain's list is an error.
func parsePageToken(token, domain string) (allow.Mailbox, error) {
	if token == "" {
		return allow.Mailbox{}, nil
	}
	name, err := base64.RawURLEncoding.DecodeString(token)
	mailbox, err2 := allow.ParseMailbox(string(name))
	if errors.Join(err, err2) != nil || domain != "" && mailbox.Domain() != domain {
		return allow.Mailbox{}, &fieldError{"page_token", "is not a token of this list; take next_page_token of the page before, for the same domain"}
	}
	return mailbox, nil
}
