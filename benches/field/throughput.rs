//! Several callers at once. The contestants take turns in slices.

use std::{
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use dispatcher::wire::ServeRequest;
use tokio::{runtime::Runtime, task::JoinSet};

use crate::{
    Outcome,
    args::Args,
    client::{self, Client},
    contestant::{Contestant, DISPATCHER, Field, How, Pace, SPAWN, spawn},
    machine,
    report::{Goal, Report},
};

/// How many call at once.
pub const CALLERS: [usize; 3] = [2, 8, 32];

/// Turns of each contestant.
const SLICES: usize = 5;

/// The callers of the server share so many connections.
const CONNECTIONS: usize = 4;

/// Measures, and enters what was found.
pub fn measure(args: &Args, field: &Field, report: &mut Report) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    for callers in CALLERS {
        eprintln!("field: throughput, {callers} callers");
        let mut spent = vec![Spent::default(); field.present.len()];
        let runs = |contestant: &Contestant| slice(contestant.pace, args.calls, callers);
        for slice in 0..SLICES {
            for (contestant, spent) in field.present.iter().zip(&mut spent) {
                if slice < turns(contestant.pace) {
                    let busy = machine::busy()?;
                    spent.time += turn(&runtime, contestant, callers, runs(contestant))?;
                    spent.busy += machine::busy()?.saturating_sub(busy);
                }
            }
        }
        for (contestant, spent) in field.present.iter().zip(&spent) {
            let all = (runs(contestant) * turns(contestant.pace)) as f64;
            let row = report.row(contestant.name);
            row.runs_per_s.insert(callers, all / spent.time.as_secs_f64());
            row.busy_ms_per_run.insert(callers, spent.busy.as_secs_f64() * 1000.0 / all);
        }
        goals(report, callers);
    }
    Ok(())
}

/// What all turns of a contestant took.
#[derive(Clone, Default)]
struct Spent {
    time: Duration,
    busy: Duration,
}

fn turns(pace: Pace) -> usize {
    if pace == Pace::Docker { 1 } else { SLICES }
}

/// Runs in one turn; at least as many as there are callers.
fn slice(pace: Pace, calls: usize, callers: usize) -> usize {
    let all = match pace {
        Pace::Quick => calls,
        Pace::Slow => calls / 10,
        Pace::Docker => 0,
    };
    (all / SLICES).max(callers)
}

fn turn(
    runtime: &Runtime,
    contestant: &Contestant,
    callers: usize,
    runs: usize,
) -> Outcome<Duration> {
    match &contestant.how {
        How::Spawn(command) => spawning(&**command, callers, runs),
        How::Serve { address, request } => {
            runtime.block_on(calling(address, request, callers, runs))
        }
    }
}

/// Threads that spawn until all runs are made.
fn spawning(
    command: &(dyn Fn() -> Outcome<Command> + Send + Sync),
    callers: usize,
    runs: usize,
) -> Outcome<Duration> {
    let begun = AtomicUsize::new(0);
    let started = Instant::now();
    let caller = || -> Outcome {
        while begun.fetch_add(1, Relaxed) < runs {
            spawn(command)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..callers).map(|_| scope.spawn(caller)).collect();
        threads.into_iter().try_for_each(|one| one.join().unwrap_or(Err("a caller died".into())))
    })?;
    Ok(started.elapsed())
}

/// Tasks that call until all runs are made.
async fn calling(
    address: &str,
    request: &ServeRequest,
    callers: usize,
    runs: usize,
) -> Outcome<Duration> {
    let mut clients = vec![];
    for _ in 0..CONNECTIONS.min(callers) {
        clients.push(client::connect(address).await?);
    }
    let begun = std::sync::Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for caller in 0..callers {
        let mut client: Client = clients[caller % clients.len()].clone();
        let (begun, request) = (begun.clone(), request.clone());
        tasks.spawn(async move {
            while begun.fetch_add(1, Relaxed) < runs {
                client::serve(&mut client, request.clone()).await?;
            }
            Outcome::Ok(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(started.elapsed())
}

fn goals(report: &mut Report, callers: usize) {
    let [spawn, ours] = [SPAWN, DISPATCHER].map(|name| report.row(name).rate(callers));
    let (Some(spawn), Some(ours)) = (spawn, ours) else { return };
    if callers < 8 {
        return;
    }
    report.goals.push(Goal::at_least(&format!("runs/s, {callers} callers"), ours, 1000.0));
    let share = ours / spawn * 100.0;
    report.goals.push(Goal::at_least(
        &format!("percent of spawn's, {callers} callers"),
        share,
        40.0,
    ));
}
