//! A server that takes the same messages and does nothing: what the wire alone costs. It is this
//! program again, as a process of its own.

use std::{
    env,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStdin, Command, Stdio},
};

use dispatcher::wire::{
    ConnectRequest, ConnectResponse, DispatchRequest, DispatchResponse, ServeRequest,
    ServeResponse,
    collective_dispatcher_server::{CollectiveDispatcher, CollectiveDispatcherServer},
};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use crate::Outcome;

/// As the dispatcher's own server has them.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// The running process; ended when dropped.
pub struct Bare {
    child: Child,
    /// Its end of file ends the process.
    stdin: Option<ChildStdin>,
    /// `127.0.0.1:PORT`
    pub address: String,
}

impl Bare {
    /// Starts it and waits until it listens.
    pub fn start() -> Outcome<Self> {
        let mut child = Command::new(env::current_exe()?)
            .arg("--bare-server")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take();
        let mut bare = Self { child, stdin, address: String::new() };
        BufReader::new(stdout.ok_or("no pipe")?).read_line(&mut bare.address)?;
        bare.address.truncate(bare.address.trim_end().len());
        Ok(bare)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        drop(self.stdin.take());
        if let Err(error) = self.child.wait() {
            eprintln!("field: the bare server: {error}");
        }
    }
}

/// What that process does, until the end of its standard input.
pub fn serve() -> Outcome {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(workers()?).enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let service =
            CollectiveDispatcherServer::new(Nothing).max_decoding_message_size(usize::MAX);
        let end = async {
            let _ = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0])).await;
        };
        Server::builder()
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, end)
            .await?;
        Ok(())
    })
}

/// As many as the dispatcher's own server has.
fn workers() -> Outcome<usize> {
    Ok((std::thread::available_parallelism()?.get() / 2).max(1))
}

struct Nothing;

#[tonic::async_trait]
impl CollectiveDispatcher for Nothing {
    async fn serve(&self, _: Request<ServeRequest>) -> Result<Response<ServeResponse>, Status> {
        Ok(Response::new(ServeResponse::default()))
    }

    async fn connect(
        &self,
        _: Request<ConnectRequest>,
    ) -> Result<Response<ConnectResponse>, Status> {
        Err(Status::unimplemented("nothing but Serve"))
    }

    async fn dispatch(
        &self,
        _: Request<DispatchRequest>,
    ) -> Result<Response<DispatchResponse>, Status> {
        Err(Status::unimplemented("nothing but Serve"))
    }
}
