// helloworld.Greeter in another language, by grpc-go and without generated code: with health and
// reflection, at descriptor 3 as systemd would give it, else at GRPC_UNIX_SOCKET.
package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"strconv"

	"github.com/golang/protobuf/proto"
	"github.com/golang/protobuf/protoc-gen-go/descriptor"
	"github.com/golang/protobuf/ptypes/wrappers"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
)

const name = "helloworld.Greeter"

// Both messages have one field, a string of number 1, and so has a StringValue.
func sayHello(_ interface{}, ctx context.Context, decode func(interface{}) error, _ grpc.UnaryServerInterceptor) (interface{}, error) {
	request := new(wrappers.StringValue)
	if err := decode(request); err != nil {
		return nil, err
	}
	if request.Value == "" {
		grpc.SetTrailer(ctx, metadata.Pairs("x-note", "from go"))
		return nil, status.Error(codes.InvalidArgument, "name is empty")
	}
	colour := "no colour"
	if incoming, _ := metadata.FromIncomingContext(ctx); len(incoming.Get("x-colour")) > 0 {
		colour = incoming.Get("x-colour")[0]
	}
	text := fmt.Sprintf("Hello %s! %d %s", request.Value, os.Getpid(), colour)
	return &wrappers.StringValue{Value: text}, nil
}

// What reflection shows.
func register(file string) {
	message := func(name, field string) *descriptor.DescriptorProto {
		return &descriptor.DescriptorProto{
			Name: proto.String(name),
			Field: []*descriptor.FieldDescriptorProto{{
				Name:   proto.String(field),
				Number: proto.Int32(1),
				Type:   descriptor.FieldDescriptorProto_TYPE_STRING.Enum(),
				Label:  descriptor.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
			}},
		}
	}
	described, err := proto.Marshal(&descriptor.FileDescriptorProto{
		Name:    proto.String(file),
		Package: proto.String("helloworld"),
		Syntax:  proto.String("proto3"),
		MessageType: []*descriptor.DescriptorProto{
			message("HelloRequest", "name"), message("HelloReply", "message"),
		},
		Service: []*descriptor.ServiceDescriptorProto{{
			Name: proto.String("Greeter"),
			Method: []*descriptor.MethodDescriptorProto{{
				Name:       proto.String("SayHello"),
				InputType:  proto.String(".helloworld.HelloRequest"),
				OutputType: proto.String(".helloworld.HelloReply"),
			}},
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	var compressed bytes.Buffer
	writer := gzip.NewWriter(&compressed)
	writer.Write(described)
	writer.Close()
	proto.RegisterFile(file, compressed.Bytes())
}

func listen() (net.Listener, error) {
	pid, _ := strconv.Atoi(os.Getenv("LISTEN_PID"))
	if pid == os.Getpid() && os.Getenv("LISTEN_FDS") == "1" {
		return net.FileListener(os.NewFile(3, "grpc"))
	}
	return net.Listen("unix", os.Getenv("GRPC_UNIX_SOCKET"))
}

func main() {
	listener, err := listen()
	if err != nil {
		log.Fatal(err)
	}
	const file = "helloworld.proto"
	register(file)
	server := grpc.NewServer()
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: name,
		HandlerType: (*interface{})(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "SayHello", Handler: sayHello}},
		Metadata:    file,
	}, nil)
	states := health.NewServer()
	states.SetServingStatus(name, grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(server, states)
	reflection.Register(server)
	log.Fatal(server.Serve(listener))
}
