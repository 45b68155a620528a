//! gRPC services, `protocol = "grpc"`: instances that stay, and the calls they take.

mod common;

/// The messages of tests/programs/service.proto and of examples/greeter.
mod wire {
    tonic::include_proto!("test");
    tonic::include_proto!("helloworld");
}

mod services {
    mod outside;
}
