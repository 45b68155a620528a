//! How many jails live at once, and what memory each takes.

use serde::Serialize;

use crate::{
    Outcome,
    args::Args,
    machine::memory_kib,
    report::{Goal, Report},
    server::Server,
    sleepers::{POLICY, Sleepers},
};

/// Memory of the host that went with them, shared out.
#[derive(Debug, Serialize)]
pub struct Alive {
    pub jails: usize,
    pub kib_per_jail: f64,
    pub seconds_to_begin: f64,
    pub seconds_to_end: f64,
}

/// Begins them, looks, and ends them.
pub fn measure(args: &Args, report: &mut Report) -> Outcome {
    let server = Server::start(args, &[POLICY])?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    eprintln!("field: alive, {} jails", args.alive);
    // What a first jail brings about, once for all, isn't any jail's share.
    runtime.block_on(async { Sleepers::begin(args, &server, 1).await?.end().await })?;

    let before = memory_kib("MemAvailable")?;
    let started = std::time::Instant::now();
    let sleepers = runtime.block_on(Sleepers::begin(args, &server, args.alive))?;
    let begun = started.elapsed();
    let after = memory_kib("MemAvailable")?;
    runtime.block_on(sleepers.end())?;
    let ended = started.elapsed() - begun;

    // Once they are all there and gone again, the goal is met.
    let what = format!("jails alive at once, of {}", args.alive);
    report.goals.push(Goal::at_least(&what, args.alive as f64, args.alive as f64));
    report.alive = Some(Alive {
        jails: args.alive,
        kib_per_jail: before.saturating_sub(after) as f64 / args.alive as f64,
        seconds_to_begin: begun.as_secs_f64(),
        seconds_to_end: ended.as_secs_f64(),
    });
    server.stop()
}
