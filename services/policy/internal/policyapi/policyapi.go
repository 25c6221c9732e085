// Package policyapi is the gRPC face of the store: it reads requests into values that cannot be invalid, and turns what the
// store knows into messages and errors.
package policyapi

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
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
	Rules   allow.Rules
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
	save, err := s.parseSave(ctx, req)
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
	return &policyv1.SetAllowedNetsResponse{AllowedNets: message(rec, save.ValidateOnly), Changed: changed}, nil
}

// ClearAllowedNets implements policy.v1.PolicyServiceServer.
func (s *Service) ClearAllowedNets(ctx context.Context, req *policyv1.ClearAllowedNetsRequest) (*policyv1.ClearAllowedNetsResponse, error) {
	save, err := s.parseSave(ctx, req)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	rec, changed, err := s.cfg.Store.Save(ctx, save)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	return &policyv1.ClearAllowedNetsResponse{AllowedNets: message(rec, save.ValidateOnly), Changed: changed}, nil
}

// GetAllowedNets implements policy.v1.PolicyServiceServer.
func (s *Service) GetAllowedNets(ctx context.Context, req *policyv1.GetAllowedNetsRequest) (*policyv1.GetAllowedNetsResponse, error) {
	mailbox, err := allow.ParseMailbox(req.GetMailbox())
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
	domain, err := allow.ParseDomain(req.GetDomain())
	if err != nil {
		return nil, s.status(ctx, &domainError{err})
	}
	after, err := parsePageToken(req.GetPageToken(), domain)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	size := int(req.GetPageSize())
	switch {
	case size < 0:
		return nil, s.status(ctx, &fieldError{"page_size", "must not be negative"})
	case size == 0:
		size = defaultPage
	}
	if _, err := s.cfg.Barrier(ctx); err != nil {
		return nil, s.status(ctx, err)
	}
	size = min(size, maxPage)
	page, total := s.cfg.Mirror.Domain(domain, after, size+1)
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

func (s *Service) parseSave(ctx context.Context, req request) (store.Save, error) {
	mailbox, err := allow.ParseMailbox(req.GetMailbox())
	if err != nil {
		return store.Save{}, err
	}
	save := store.Save{
		Mailbox: mailbox, Etag: req.GetEtag(), ValidateOnly: req.GetValidateOnly(),
		Actor: req.GetActor().GetId(), Caller: serve.Caller(ctx),
	}
	if id := req.GetRequestId(); id != "" {
		parsed, err := uuid.Parse(id)
		if err != nil {
			return store.Save{}, &fieldError{"request_id", fmt.Sprintf("%.60q is not a UUID", id)}
		}
		save.RequestID = parsed.String()
	}
	if len(save.Actor) > 255 || strings.ContainsFunc(save.Actor, unicode.IsControl) {
		return store.Save{}, &fieldError{"actor.id", "must be at most 255 octets without control characters"}
	}
	address, err := allow.ParseClient(req.GetActor().GetAddress())
	if err != nil {
		return store.Save{}, &fieldError{"actor.address", err.Error()}
	}
	if address.IsValid() {
		save.ActorAddress = address.String()
	}
	return save, nil
}

func (s *Service) parseList(req *policyv1.SetAllowedNetsRequest) (allow.List, error) {
	list, ok := req.GetInput().(*policyv1.SetAllowedNetsRequest_List)
	if !ok {
		return s.cfg.Rules.ParseText(req.GetText())
	}
	entries := make([]string, len(list.List.GetNets()))
	for i, n := range list.List.GetNets() {
		entries[i] = n.GetNet()
	}
	return s.cfg.Rules.ParseEntries(entries)
}

// message shows a record. A draft was not saved and has no etag or revision.
func message(rec store.Record, draft bool) *policyv1.AllowedNets {
	m := &policyv1.AllowedNets{Mailbox: rec.Mailbox.String()}
	for _, n := range rec.List.Strings() {
		m.Nets = append(m.Nets, &policyv1.Net{Net: n})
	}
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

// parsePageToken returns the last mailbox of the page before. A token of another domain's list is an error.
func parsePageToken(token, domain string) (string, error) {
	if token == "" {
		return "", nil
	}
	name, err := base64.RawURLEncoding.DecodeString(token)
	mailbox, err2 := allow.ParseMailbox(string(name))
	if errors.Join(err, err2) != nil || mailbox.Domain() != domain {
		return "", &fieldError{"page_token", "is not a token of this list; take next_page_token of the page before, for the same domain"}
	}
	return mailbox.String(), nil
}
