//! A large program, sent along with each call, beside an empty call that carries the same bytes.

use std::{fs, time::Duration};

use bytes::Bytes;
use dispatcher::wire::{ServeRequest, serve_request::ServiceDef};
use serde::Serialize;

use crate::{
    Outcome,
    args::Args,
    bare,
    client::{self, Client},
    machine::field,
    processes::descendants,
    report::{Goal, Report},
    server::Server,
    stats::Summary,
};

const SIZE: usize = 64 << 20;

/// The process whose memory is looked at.
const SERVER_COMM: &str = "dispatch-serve";

/// Times and memory.
#[derive(Debug, Serialize)]
pub struct Large {
    pub bytes: usize,
    /// A call that does nothing but carry them.
    pub empty: Summary,
    /// The same program each time.
    pub same: Summary,
    /// One that the server hasn't seen yet.
    pub new: Summary,
    pub server_peak_bytes: u64,
}

/// Measures, and enters what was found.
pub fn measure(args: &Args, report: &mut Report) -> Outcome {
    let server = Server::start(args, &[])?;
    let bare = bare::Bare::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    eprintln!("field: large, {} rounds", args.large_rounds);
    let [empty, same, new] = runtime.block_on(rounds(args, &server, &bare))?;
    let server_peak_bytes = peak(&server)?;

    let ratio = |one: &Summary| one.p50_ms / empty.p50_ms;
    let what = "a binary of 64 MiB inline: times an empty call";
    report.goals.push(Goal::at_most(&format!("{what}, same"), ratio(&same), 1.5));
    report.goals.push(Goal::at_most(&format!("{what}, new"), ratio(&new), 1.5));
    let times = server_peak_bytes as f64 / SIZE as f64;
    report.goals.push(Goal::at_most("the server's memory: times the binary", times, 3.0));
    report.large = Some(Large { bytes: SIZE, empty, same, new, server_peak_bytes });
    server.stop()
}

async fn rounds(args: &Args, server: &Server, bare: &bare::Bare) -> Outcome<[Summary; 3]> {
    let mut padded = fs::read(args.program("ok"))?;
    padded.resize(SIZE, 0);
    let same = call(Bytes::from(padded.clone()));
    let mut ours = client::connect(&server.address).await?;
    let mut theirs = client::connect(&bare.address).await?;
    let mut samples: [Vec<Duration>; 3] = Default::default();
    // The first of each only warms up.
    for round in 0..=args.large_rounds {
        padded[SIZE - 8..].copy_from_slice(&(round as u64 + 1).to_le_bytes());
        let new = call(Bytes::from(padded.clone()));
        let times = [
            carry(&mut theirs, same.clone()).await?,
            client::serve(&mut ours, same.clone()).await?.total,
            client::serve(&mut ours, new).await?.total,
        ];
        if round > 0 {
            samples.iter_mut().zip(times).for_each(|(all, time)| all.push(time));
        }
    }
    let [empty, same, new] = samples.map(|samples| Summary::of(&samples).ok_or("no rounds"));
    Ok([empty?, same?, new?])
}

fn call(program: Bytes) -> ServeRequest {
    client::request("default", ServiceDef::ServiceBinary(program))
}

async fn carry(client: &mut Client, request: ServeRequest) -> Outcome<Duration> {
    let started = std::time::Instant::now();
    client.serve(request).await?;
    Ok(started.elapsed())
}

/// The most memory that the serving process ever had resident.
fn peak(server: &Server) -> Outcome<u64> {
    let all = descendants(server.pid())?;
    let serving = all.iter().find(|one| one.comm == SERVER_COMM);
    let serving = serving.ok_or("the dispatcher has no process that serves")?;
    let status = fs::read_to_string(format!("/proc/{}/status", serving.pid))?;
    let peak = field(&status, "VmHWM").ok_or("no VmHWM")?;
    Ok(peak.trim_end_matches(" kB").parse::<u64>()? << 10)
}
