"""helloworld.Greeter in another language, by grpcio and without generated code: with health
and reflection, at GRPC_UNIX_SOCKET. grpcio can't take over a socket that listens already."""

import os
from concurrent import futures

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

FILE = descriptor_pb2.FileDescriptorProto(
    name="helloworld.proto",
    package="helloworld",
    syntax="proto3",
    message_type=[
        {"name": name, "field": [{"name": field, "number": 1, "type": "TYPE_STRING", "label": "LABEL_OPTIONAL"}]}
        for name, field in [("HelloRequest", "name"), ("HelloReply", "message")]
    ],
    service=[
        {
            "name": "Greeter",
            "method": [
                {
                    "name": "SayHello",
                    "input_type": ".helloworld.HelloRequest",
                    "output_type": ".helloworld.HelloReply",
                }
            ],
        }
    ],
)
# The default pool is what reflection looks into.
POOL = descriptor_pool.Default()
POOL.Add(FILE)
Request, Reply = (
    message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"helloworld.{name}"))
    for name in ("HelloRequest", "HelloReply")
)


def say_hello(request, context):
    if not request.name:
        context.set_trailing_metadata([("x-note", "from python")])
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "name is empty")
    colour = dict(context.invocation_metadata()).get("x-colour", "no colour")
    return Reply(message=f"Hello {request.name}! {os.getpid()} {colour}")


server = grpc.server(futures.ThreadPoolExecutor(4))
handler = grpc.unary_unary_rpc_method_handler(say_hello, Request.FromString, Reply.SerializeToString)
server.add_generic_rpc_handlers(
    [grpc.method_handlers_generic_handler("helloworld.Greeter", {"SayHello": handler})]
)
states = health.HealthServicer()
states.set("helloworld.Greeter", health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(states, server)
reflection.enable_server_reflection(["helloworld.Greeter", reflection.SERVICE_NAME], server)
assert server.add_insecure_port("unix:" + os.environ["GRPC_UNIX_SOCKET"])
server.start()
server.wait_for_termination()
