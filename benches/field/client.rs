//! A client by TCP, and what it says and expects.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dispatcher::{
    names::Digest,
    wire::{
        self, ExecutionReport, ServeRequest, ServeResponse, ServiceTypeRef,
        collective_dispatcher_client::CollectiveDispatcherClient, serve_request::ServiceDef,
        status::Code,
    },
};
use prost::Message as _;
use tonic::transport::{Channel, Endpoint};

use crate::Outcome;

/// What the program says.
pub const WORDS: &str = "ok\n";

/// A client of one connection.
pub type Client = CollectiveDispatcherClient<Channel>;

/// Connects to `HOST:PORT`.
pub async fn connect(address: &str) -> Outcome<Client> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
    let channel = endpoint.connect().await?;
    Ok(Client::new(channel)
        .max_decoding_message_size(usize::MAX)
        .max_encoding_message_size(usize::MAX))
}

/// A call in a namespace.
pub fn request(namespace: &str, what: ServiceDef) -> ServeRequest {
    ServeRequest {
        namespace: namespace.into(),
        service: Some(ServiceTypeRef { namespace: String::new(), service_name: "bench".into() }),
        method_name: "run".into(),
        service_def: Some(what),
        ..ServeRequest::default()
    }
}

/// Two calls of a program: one that brings it along, and one that names it for who holds it.
pub fn both(namespace: &str, program: &Path) -> Outcome<[ServeRequest; 2]> {
    let bytes = Bytes::from(fs::read(program)?);
    let digest = Digest::of(&bytes).to_string();
    let kinds = [ServiceDef::ServiceBinary(bytes), ServiceDef::ServiceUri(digest)];
    Ok(kinds.map(|kind| request(namespace, kind)))
}

/// Gives the server a program, by a call that brings it along, and names it from then on.
pub async fn hand_over(address: &str, namespace: &str, program: &Path) -> Outcome<ServeRequest> {
    let [inline, held] = both(namespace, program)?;
    serve(&mut connect(address).await?, inline).await?;
    Ok(held)
}

/// One call of the program that says ok; anything else is an error.
pub async fn serve(client: &mut Client, request: ServeRequest) -> Outcome<Sample> {
    let started = Instant::now();
    let response = client.serve(request).await?.into_inner();
    let total = started.elapsed();
    check(&response)?;
    let report = response.report.ok_or("a reply without a report")?;
    Ok(Sample { total, phases: Some(Phases::of(&report, total)) })
}

fn check(response: &ServeResponse) -> Outcome {
    let status = response.status.clone().unwrap_or_default();
    if status.code() != Code::Ok {
        return Err(
            format!("the dispatcher answered {:?}: {}", status.code(), status.message).into()
        );
    }
    let output = response.output.as_ref().ok_or("a reply without output")?;
    let said = wire::Status::decode(output.value.as_slice())?.message;
    if said != WORDS {
        return Err(format!("the program said {said:?} by the dispatcher").into());
    }
    Ok(())
}

/// One measured run.
pub struct Sample {
    /// As the caller saw it.
    pub total: Duration,
    /// Where it went, if that is told.
    pub phases: Option<Phases>,
}

/// Where a call's time went, by its report.
pub struct Phases {
    /// Waiting for admission.
    pub queue: Duration,
    /// Making the jail.
    pub setup: Duration,
    /// The program's own time.
    pub wall: Duration,
    /// What is left: the wire, decoding, teardown that the reply waits for.
    pub rest: Duration,
}

impl Phases {
    fn of(report: &ExecutionReport, total: Duration) -> Self {
        let time = |from: Option<prost_types::Duration>| {
            from.and_then(|time| Duration::try_from(time).ok()).unwrap_or_default()
        };
        let (queue, setup) = (time(report.queue_time), time(report.setup_time));
        let wall = time(report.wall_time);
        Self { queue, setup, wall, rest: total.saturating_sub(queue + setup + wall) }
    }
}
