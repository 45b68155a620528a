//! An ordinary gRPC server, for `protocol = "grpc"`: it is started once and takes many calls.
//!
//! Nothing in it is the dispatcher's but the socket: it inherits one that already listens,
//! as systemd would give it.

use std::{
    env, error::Error, io, os::fd::FromRawFd as _, os::unix::net::UnixListener as StdListener,
    process,
};

use hello::{
    HelloReply, HelloRequest,
    greeter_server::{Greeter, GreeterServer},
};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use tonic_reflection::server::Builder as Reflection;

/// What build.rs makes of helloworld.proto.
#[allow(missing_docs)]
mod hello {
    tonic::include_proto!("helloworld");
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/helloworld.bin"));
}

struct Greetings;

#[tonic::async_trait]
impl Greeter for Greetings {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        let name = request.into_inner().name;
        if name.is_empty() {
            // The caller of the dispatcher is told this code and these words.
            return Err(Status::invalid_argument("name is empty"));
        }
        Ok(Response::new(HelloReply { message: format!("Hello {name}!") }))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<GreeterServer<Greetings>>().await;
    // Reflection tells the dispatcher the type of an answer; without it, answers are plain bytes.
    let reflection = || {
        Reflection::configure()
            .register_encoded_file_descriptor_set(hello::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Server::builder()
        .add_service(GreeterServer::new(Greetings))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .serve_with_incoming(UnixListenerStream::new(listener()?))
        .await?;
    Ok(())
}

/// The inherited socket, sd_listen_fds(3); without one, a socket of our own at the path we
/// were told.
fn listener() -> io::Result<UnixListener> {
    const FIRST: i32 = 3;
    let number = |name: &str| env::var(name).ok()?.parse::<u32>().ok();
    // Variables that were meant for a parent are inherited too: the pid says whose they are.
    let inherited = number("LISTEN_PID") == Some(process::id())
        && number("LISTEN_FDS").is_some_and(|count| count >= 1);
    if !inherited {
        let path = env::var_os("GRPC_UNIX_SOCKET").ok_or_else(|| {
            io::Error::other("no socket is inherited, and GRPC_UNIX_SOCKET names no path")
        })?;
        return UnixListener::bind(path);
    }
    // SAFETY: whoever set LISTEN_PID to our pid gave us this descriptor, and it is used here only.
    let listener = unsafe { StdListener::from_raw_fd(FIRST) };
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}
