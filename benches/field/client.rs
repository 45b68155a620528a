//! A client by TCP, and what it says and expects.

use std::{
    fs,
    path::Path,
    sync::OnceLock,
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

/// What the default policy demands of every call, in a report's words; `host_uid` of root alone.
const DEMANDED: [&str; 22] = [
    "ns.user",
    "ns.mount",
    "ns.pid",
    "ns.ipc",
    "ns.uts",
    "ns.net",
    "ns.cgroup",
    "host_uid",
    "root.readonly",
    "proc.restricted",
    "caps.none",
    "no_new_privs",
    "seccomp",
    "rlimits",
    "cgroup.memory",
    "cgroup.swap",
    "cgroup.pids",
    "cgroup.cpu",
    "cgroup.kill",
    "cpu_time",
    "timeout",
    "output",
];

/// What it takes as well where the kernel has it.
const BEST_EFFORT: [&str; 2] = ["landlock", "memfd_noexec"];

/// What was in force in the first call, and so must be in every other.
static IN_FORCE: OnceLock<Vec<String>> = OnceLock::new();

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
    check_enforced(&report.enforced)?;
    Ok(Sample { total, phases: Some(Phases::of(&report, total)) })
}

/// Whether the program said what it says.
pub fn check(response: &ServeResponse) -> Outcome {
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

/// A call that was slow for want of a layer and one that was quick for it are no figures of one thing.
fn check_enforced(enforced: &[String]) -> Outcome {
    let first = match IN_FORCE.get() {
        Some(first) => first,
        None => {
            check_demanded(enforced)?;
            IN_FORCE.get_or_init(|| enforced.to_vec())
        }
    };
    // As it is nearly always, in the same order.
    if enforced == first {
        return Ok(());
    }
    let sorted = |words: &[String]| {
        let mut words = words.to_vec();
        words.sort_unstable();
        words
    };
    let [now, first] = [enforced, first.as_slice()].map(sorted);
    if now == first {
        return Ok(());
    }
    Err(format!("{now:?} was in force in a call, and {first:?} in the first").into())
}

fn check_demanded(enforced: &[String]) -> Outcome {
    let root = nix::unistd::geteuid().is_root();
    let lacking: Vec<_> = DEMANDED
        .into_iter()
        .filter(|word| (root || *word != "host_uid") && !holds(enforced, word))
        .collect();
    if !lacking.is_empty() {
        return Err(format!("the default policy demands {lacking:?}, not in force").into());
    }
    for word in BEST_EFFORT.into_iter().filter(|word| !holds(enforced, word)) {
        eprintln!("field: WARNING: {word} is not in force here, and so in no figure");
    }
    Ok(())
}

/// Whether this control is among them, in whatever version: `landlock.v7`.
fn holds(enforced: &[String], word: &str) -> bool {
    enforced.iter().any(|one| {
        one.strip_prefix(word).is_some_and(|rest| rest.is_empty() || rest.starts_with(".v"))
    })
}

/// What was in force in every jailed call so far, and what of the default policy was not.
pub fn in_force() -> [Vec<String>; 2] {
    let Some(enforced) = IN_FORCE.get() else { return Default::default() };
    let lacking = BEST_EFFORT.into_iter().filter(|word| !holds(enforced, word));
    [enforced.clone(), lacking.map(Into::into).collect()]
}

/// Any call, whatever it is answered, and how long that took.
pub async fn ask(
    client: &mut Client,
    request: ServeRequest,
) -> (Duration, Result<ServeResponse, tonic::Status>) {
    let started = Instant::now();
    let answer = client.serve(request).await;
    (started.elapsed(), answer.map(tonic::Response::into_inner))
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
    /// From the word to start until the program's end.
    pub wall: Duration,
    /// Processor time of the run.
    pub cpu: Duration,
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
        let cpu = time(report.user_time) + time(report.system_time);
        Self { queue, setup, wall, cpu, rest: total.saturating_sub(queue + setup + wall) }
    }
}
