"""A client in another language, without generated code: `client.py ADDRESS BINARY`.

Finds the messages by server reflection, makes one Serve call, and prints what
came back as key=value lines.
"""

import sys

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc


def load(channel, symbol):
    """Adds the file that defines `symbol`, and all it needs, to a new pool."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    files = {}
    pending = [request]
    while pending:
        for answer in stub.ServerReflectionInfo(iter([pending.pop()])):
            for blob in answer.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(blob)
                files[file.name] = file
    for name in [name for file in list(files.values()) for name in file.dependency]:
        if name not in files:
            request = reflection_pb2.ServerReflectionRequest(file_by_filename=name)
            for answer in stub.ServerReflectionInfo(iter([request])):
                for blob in answer.file_descriptor_response.file_descriptor_proto:
                    file = descriptor_pb2.FileDescriptorProto.FromString(blob)
                    files[file.name] = file
    pool = descriptor_pool.DescriptorPool()

    def add(name):
        file = files.pop(name, None)
        if file:
            for dependency in file.dependency:
                add(dependency)
            pool.Add(file)

    for name in list(files):
        add(name)
    return pool


def main(address, binary):
    channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
    pool = load(channel, "collector.CollectiveDispatcher")

    def message(name):
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"collector.{name}"))

    request = message("ServeRequest")(namespace="jail", method_name="main")
    request.service.service_name = "test"
    with open(binary, "rb") as file:
        request.service_binary = file.read()
    request.options.args.extend(["print", "from python"])
    serve = channel.unary_unary(
        "/collector.CollectiveDispatcher/Serve",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=message("ServeResponse").FromString,
    )
    response, call = serve.with_call(request, timeout=60)
    verdicts = pool.FindEnumTypeByName("collector.Verdict")
    verdict = verdicts.values_by_number[response.report.verdict].name
    trailers = dict(call.trailing_metadata())
    print(f"verdict={verdict.removeprefix('VERDICT_')}")
    print(f"trailer={trailers.get('dispatcher-verdict')}")
    print(f"stdout={response.output.value[2:].decode()}")


main(*sys.argv[1:])
