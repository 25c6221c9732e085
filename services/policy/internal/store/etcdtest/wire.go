package etcdtest

import (
	"context"
	"sync/atomic"

	"google.golang.org/grpc"
)

// Wire is what lies between a client and etcd. The zero value is a good wire. Its faults may be changed while it is in use,
// also for streams that are open.
type Wire struct {
	call atomic.Pointer[CallFault]
	recv atomic.Pointer[RecvFault]
}

// CallFault stands in for a unary call. call makes it and fills reply.
type CallFault func(ctx context.Context, req, reply any, call func() error) error

// RecvFault stands in for receiving a message of a stream. recv fills msg.
type RecvFault func(ctx context.Context, msg any, recv func() error) error

// Options lay the wire below a client.
func (w *Wire) Options() []grpc.DialOption {
	return []grpc.DialOption{grpc.WithChainUnaryInterceptor(w.unary), grpc.WithChainStreamInterceptor(w.stream)}
}

// OnCall sets the fault of unary calls; nil ends it.
func (w *Wire) OnCall(f CallFault) { w.call.Store(&f) }

// OnRecv sets the fault of streams; nil ends it.
func (w *Wire) OnRecv(f RecvFault) { w.recv.Store(&f) }

func (w *Wire) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	call := func() error { return invoke(ctx, method, req, reply, cc, opts...) }
	if f := w.call.Load(); f != nil && *f != nil {
		return (*f)(ctx, req, reply, call)
	}
	return call()
}

func (w *Wire) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	cs, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	return &wireStream{ClientStream: cs, wire: w}, nil
}

type wireStream struct {
	grpc.ClientStream
	wire *Wire
}

func (s *wireStream) RecvMsg(msg any) error {
	recv := func() error { return s.ClientStream.RecvMsg(msg) }
	if f := s.wire.recv.Load(); f != nil && *f != nil {
		return (*f)(s.Context(), msg, recv)
	}
	return recv()
}
