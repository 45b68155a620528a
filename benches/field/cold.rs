//! Calls that don't follow each other at once: the first of a policy, for which nothing is ready,
//! after a start and after the policy changed; and calls with pauses between them.

use std::{thread, time::Duration};

use dispatcher::wire::ServeRequest;
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::{
    Outcome,
    args::Args,
    client::{self, Client, Sample},
    report::Report,
    rest,
    server::Server,
    stats::{Summary, median_ms},
};

/// Times of first calls, each beside one of the same kind that finds a jail built ahead.
#[derive(Debug, Serialize)]
pub struct Cold {
    /// The first after a start, which brings its program, and the next that does so.
    pub started: Summary,
    pub started_next: Summary,
    /// The first after the policy changed, of a program that is held, and the next.
    pub renewed: Summary,
    pub renewed_next: Summary,
    /// The launcher's part of the first ones, at the median: building the jail.
    pub started_setup_ms: f64,
    pub renewed_setup_ms: f64,
    /// Calls of one who pauses after each, so long that nothing is kept for the next jail to be made of.
    pub paced: Summary,
}

/// How long he pauses: the launcher lets go of such things after 5 ms.
const PAUSE: Duration = Duration::from_millis(20);
/// He makes a tenth of the calls that one makes who doesn't pause.
const PACED_SHARE: usize = 10;

/// Measures, and enters what was found.
pub fn measure(args: &Args, report: &mut Report) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    eprintln!("field: cold, {} starts, and as many changes", args.large_rounds);
    let [inline, held] = client::both("default", &args.program("ok"))?;
    let mut started = [vec![], vec![]];
    for _ in 0..args.large_rounds {
        let server = Server::start(args, &[])?;
        let mut caller = Caller { runtime: &runtime, client: connect(&runtime, &server)? };
        for samples in &mut started {
            samples.push(caller.call(&server, &inline)?);
        }
        drop(caller);
        server.stop()?;
    }
    let mut server = Server::start(args, &[])?;
    let mut caller = Caller { runtime: &runtime, client: connect(&runtime, &server)? };
    caller.call(&server, &inline)?;
    let mut renewed = [vec![], vec![]];
    for _ in 0..args.large_rounds {
        server.renew()?;
        for samples in &mut renewed {
            samples.push(caller.call(&server, &held)?);
        }
    }
    let mut paced = vec![];
    for _ in 0..(args.rounds / PACED_SHARE).max(1) {
        thread::sleep(PAUSE);
        paced.push(runtime.block_on(client::serve(&mut caller.client, held.clone()))?);
    }
    drop(caller);
    report.cold = Some(Cold {
        started: summary(&started[0])?,
        started_next: summary(&started[1])?,
        renewed: summary(&renewed[0])?,
        renewed_next: summary(&renewed[1])?,
        started_setup_ms: setup(&started[0]),
        renewed_setup_ms: setup(&renewed[0]),
        paced: summary(&paced)?,
    });
    server.stop()
}

fn connect(runtime: &Runtime, server: &Server) -> Outcome<Client> {
    runtime.block_on(client::connect(&server.address))
}

struct Caller<'a> {
    runtime: &'a Runtime,
    client: Client,
}

impl Caller<'_> {
    /// One call, once everything that others brought about is done.
    fn call(&mut self, server: &Server, request: &ServeRequest) -> Outcome<Sample> {
        rest::wait(server.pid())?;
        self.runtime.block_on(client::serve(&mut self.client, request.clone()))
    }
}

fn summary(samples: &[Sample]) -> Outcome<Summary> {
    let totals: Vec<Duration> = samples.iter().map(|sample| sample.total).collect();
    Summary::of(&totals).ok_or_else(|| "no rounds".into())
}

fn setup(samples: &[Sample]) -> f64 {
    median_ms(samples.iter().filter_map(|sample| sample.phases.as_ref()).map(|it| it.setup))
}
