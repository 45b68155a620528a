//! A large program, sent along with each call, beside an empty call that carries the same bytes.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use bytes::Bytes;
use dispatcher::wire::{ServeRequest, serve_request::ServiceDef};
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::{
    Outcome,
    args::Args,
    bare,
    client::{self, Client},
    machine::{field, memory_kib},
    processes::{descendants, memfd_bytes},
    report::{Goal, Report},
    rest,
    server::Server,
    stats::Summary,
};

const SIZE: usize = 64 << 20;

/// The process whose memory is looked at.
const SERVER_COMM: &str = "dispatch-serve";

/// Programs sent to fill the cache, and one more.
const FILLING: usize = 5;

/// How often shared memory is looked at while one is sent.
const LOOK: Duration = Duration::from_millis(1);

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
    /// The most that the serving process had resident.
    pub resident_peak_bytes: u64,
    /// By how much the host's shared memory grew at most: in the first call of all,
    pub memfds_first_bytes: u64,
    /// and when the cache of programs was full and new ones came.
    pub memfds_full_bytes: u64,
    /// What all memfds of the dispatcher's processes held afterwards.
    pub memfds_kept_bytes: u64,
}

/// Measures, and enters what was found.
pub fn measure(args: &Args, report: &mut Report) -> Outcome {
    let server = Server::start(args, &[])?;
    let bare = bare::Bare::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    eprintln!("field: large, {} rounds", args.large_rounds);
    let mut caller = Caller::new(args, &runtime, &server, &bare)?;
    rest::wait(server.pid())?;
    let nothing = memory_kib("Shmem")?;
    // These two calls of the dispatcher are not timed: whoever looks takes time as well.
    let memfds_first_bytes =
        most_shared(nothing, || runtime.block_on(caller.call_same()).map(drop))?;
    let [empty, same, new] = runtime.block_on(caller.rounds(args.large_rounds))?;
    let memfds_full_bytes = most_shared(nothing, || {
        (0..FILLING).try_for_each(|_| runtime.block_on(caller.call_new()).map(drop))
    })?;
    rest::wait(server.pid())?;
    let memfds_kept_bytes = memfd_bytes(server.pid())?;
    let resident_peak_bytes = resident_peak(&server)?;

    let ratio = |one: &Summary| one.p50_ms / empty.p50_ms;
    let what = "a binary of 64 MiB inline: times an empty call";
    report.goals.push(Goal::at_most(&format!("{what}, same"), ratio(&same), 1.5));
    report.goals.push(Goal::at_most(&format!("{what}, new"), ratio(&new), 1.5));
    let mut goal = |what: &str, bytes: u64| {
        report.goals.push(Goal::at_most(what, bytes as f64 / SIZE as f64, 3.0));
    };
    goal("the server's resident memory: times the binary", resident_peak_bytes);
    goal("with memfds, one binary sent: times it", resident_peak_bytes + memfds_first_bytes);
    report.large = Some(Large {
        bytes: SIZE,
        empty,
        same,
        new,
        resident_peak_bytes,
        memfds_first_bytes,
        memfds_full_bytes,
        memfds_kept_bytes,
    });
    server.stop()
}

/// Who calls both servers.
struct Caller {
    ours: Client,
    theirs: Client,
    same: Bytes,
    /// What the next new one is made of, and how many there were.
    padded: Vec<u8>,
    count: u64,
}

impl Caller {
    fn new(args: &Args, runtime: &Runtime, server: &Server, bare: &bare::Bare) -> Outcome<Self> {
        let mut padded = fs::read(args.program("ok"))?;
        padded.resize(SIZE, 0);
        let [ours, theirs] = [&server.address, &bare.address];
        Ok(Self {
            ours: runtime.block_on(client::connect(ours))?,
            theirs: runtime.block_on(client::connect(theirs))?,
            same: Bytes::from(padded.clone()),
            padded,
            count: 0,
        })
    }

    async fn call_empty(&mut self) -> Outcome<Duration> {
        let (took, answer) = client::ask(&mut self.theirs, call(self.same.clone())).await;
        answer?;
        Ok(took)
    }

    async fn call_same(&mut self) -> Outcome<Duration> {
        Ok(client::serve(&mut self.ours, call(self.same.clone())).await?.total)
    }

    async fn call_new(&mut self) -> Outcome<Duration> {
        self.count += 1;
        self.padded[SIZE - 8..].copy_from_slice(&self.count.to_le_bytes());
        let program = Bytes::from(self.padded.clone());
        Ok(client::serve(&mut self.ours, call(program)).await?.total)
    }

    /// Times of the three, in an order that changes; the first of each only warms up.
    async fn rounds(&mut self, rounds: usize) -> Outcome<[Summary; 3]> {
        let mut samples: [Vec<Duration>; 3] = Default::default();
        for round in 0..=rounds {
            for which in rest::order(round, samples.len()) {
                let took = match which {
                    0 => self.call_empty().await?,
                    1 => self.call_same().await?,
                    _ => self.call_new().await?,
                };
                if round > 0 {
                    samples[which].push(took);
                }
            }
        }
        let [empty, same, new] = samples.map(|samples| Summary::of(&samples).ok_or("no rounds"));
        Ok([empty?, same?, new?])
    }
}

fn call(program: Bytes) -> ServeRequest {
    client::request("default", ServiceDef::ServiceBinary(program))
}

/// By how many bytes the host's shared memory exceeded `before` at most while something was done.
/// Memfds are counted there, whoever has them; so is what a jail has in its /tmp.
fn most_shared(before_kib: u64, what: impl FnOnce() -> Outcome) -> Outcome<u64> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watching = scope.spawn(|| -> Outcome<u64> {
            let mut most = 0;
            while !over.load(Relaxed) {
                most = most.max(memory_kib("Shmem")?);
                thread::sleep(LOOK);
            }
            Ok(most)
        });
        let done = what();
        over.store(true, Relaxed);
        let most = watching.join().unwrap_or(Err("nobody watched".into()))?;
        done.map(|()| most.saturating_sub(before_kib) << 10)
    })
}

/// The most memory that the serving process ever had resident.
fn resident_peak(server: &Server) -> Outcome<u64> {
    let all = descendants(server.pid())?;
    let serving = all.iter().find(|one| one.comm == SERVER_COMM);
    let serving = serving.ok_or("the dispatcher has no process that serves")?;
    let status = fs::read_to_string(format!("/proc/{}/status", serving.pid))?;
    let peak = field(&status, "VmHWM").ok_or("no VmHWM")?;
    Ok(peak.trim_end_matches(" kB").parse::<u64>()? << 10)
}
