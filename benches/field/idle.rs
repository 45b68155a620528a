//! Whether jails in which nothing happens cost those that work: one caller with none of them, with
//! many, and with none again.

use serde::Serialize;

use crate::{
    Outcome,
    args::Args,
    client::{self, Client},
    report::{Goal, Report},
    server::Server,
    sleepers::{POLICY, Sleepers},
    stats::Summary,
};

/// Calls before those that count, each time.
const WARM_UP: usize = 20;

/// Times of the three, alike.
#[derive(Debug, Serialize)]
pub struct Idle {
    pub sleepers: usize,
    pub before: Summary,
    pub with_sleepers: Summary,
    pub after: Summary,
    /// The median with them, times that before they came, and times the mean of before and after.
    pub times_before: f64,
    pub times_mean: f64,
}

/// Measures, and enters what was found.
pub fn measure(args: &Args, report: &mut Report) -> Outcome {
    let server = Server::start(args, &[POLICY])?;
    // Those who sleep need hands of their own; the one who calls has none but this thread.
    let sleepers_runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut caller = runtime.block_on(Caller::new(args, &server))?;

    eprintln!("field: idle, {} rounds thrice, {} asleep in between", args.rounds, args.sleepers);
    let before = runtime.block_on(caller.rounds(args.rounds))?;
    let sleepers = sleepers_runtime.block_on(Sleepers::begin(args, &server, args.sleepers))?;
    let with_sleepers = runtime.block_on(caller.rounds(args.rounds))?;
    sleepers_runtime.block_on(sleepers.end())?;
    let after = runtime.block_on(caller.rounds(args.rounds))?;

    let times_before = with_sleepers.p50_ms / before.p50_ms;
    let times_mean = with_sleepers.p50_ms / ((before.p50_ms + after.p50_ms) / 2.0);
    let what = format!("p50 with {} asleep: times that", args.sleepers);
    let goal = |of: &str, found| Goal::at_most(&format!("{what} {of}"), found, 1.3);
    report.goals.push(goal("before they came", times_before));
    report.goals.push(goal("of before and after, in the mean", times_mean));
    let sleepers = args.sleepers;
    report.idle = Some(Idle { sleepers, before, with_sleepers, after, times_before, times_mean });
    server.stop()
}

struct Caller {
    client: Client,
    request: dispatcher::wire::ServeRequest,
}

impl Caller {
    async fn new(args: &Args, server: &Server) -> Outcome<Self> {
        let request = client::hand_over(&server.address, "default", &args.program("ok")).await?;
        Ok(Self { client: client::connect(&server.address).await?, request })
    }

    async fn rounds(&mut self, count: usize) -> Outcome<Summary> {
        let mut samples = vec![];
        for _ in 0..WARM_UP + count {
            samples.push(client::serve(&mut self.client, self.request.clone()).await?.total);
        }
        Summary::of(&samples[WARM_UP..]).ok_or_else(|| "no rounds".into())
    }
}
