//! Container mode beside `docker run` with the same limits, by turns.

use std::time::Duration;

use dispatcher::wire::ServeRequest;
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::{
    Outcome,
    args::Args,
    client::{self, Client},
    contestant::{How, spawn},
    report::{Goal, Report},
    rest::{self, order},
    rivals,
    server::Server,
    stats::Summary,
};

/// A container for each call, made for it or ahead of it.
const POLICIES: [(&str, &str); 2] = [
    (MADE, "mode = \"container\"\n[container]\nahead = 0\n"),
    (AHEAD, "mode = \"container\"\n[container]\nahead = 2\n"),
];
const MADE: &str = "made";
const AHEAD: &str = "ahead";

/// Rounds for each of those with large programs.
const ROUNDS: usize = 3;

/// Times of one run.
#[derive(Debug, Serialize)]
pub struct Containers {
    pub docker_run: Summary,
    pub made: Summary,
    pub ahead: Summary,
}

/// Measures, and enters what was found; nothing where there is no image for docker.
pub fn measure(args: &Args, report: &mut Report) -> Outcome {
    let Ok(How::Spawn(docker)) = rivals::docker_run(args) else {
        report.notes.push("container mode was not measured: no --docker-image".into());
        return Ok(());
    };
    let rounds = args.large_rounds * ROUNDS;
    eprintln!("field: containers, {rounds} rounds");
    let server = Server::start(args, &POLICIES)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut client = runtime.block_on(client::connect(&server.address))?;
    let [made_first, made] = client::both(MADE, &args.program("ok"))?;
    let [ahead_first, ahead] = client::both(AHEAD, &args.program("ok"))?;
    // The first of each brings its namespace the program, and has the image made.
    for first in [made_first, ahead_first] {
        call(&runtime, &mut client, first)?;
    }
    let mut samples = [const { vec![] }; 3];
    for round in 0..=rounds {
        for index in order(round, samples.len()) {
            // What the last one left is removed, and another container waits.
            rest::wait(server.pid())?;
            let took = match index {
                0 => spawn(&*docker)?.total,
                1 => call(&runtime, &mut client, made.clone())?,
                _ => call(&runtime, &mut client, ahead.clone())?,
            };
            // One round to warm up.
            if round > 0 {
                samples[index].push(took);
            }
        }
    }
    drop(client);
    let [docker_run, made, ahead] = samples.map(|samples| Summary::of(&samples));
    let (Some(docker_run), Some(made), Some(ahead)) = (docker_run, made, ahead) else {
        return Err("no rounds".into());
    };
    let times = made.p50_ms / docker_run.p50_ms;
    report.goals.push(Goal::at_most("container mode, p50: times docker run's", times, 1.1));
    report.containers = Some(Containers { docker_run, made, ahead });
    server.stop()
}

fn call(runtime: &Runtime, client: &mut Client, request: ServeRequest) -> Outcome<Duration> {
    let (took, answer) = runtime.block_on(client::ask(client, request));
    client::check(&answer?)?;
    Ok(took)
}
