//! Several callers at once. Each contestant has one turn, without a pause, and the next begins when
//! what it left has been cleared up.

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
    machine::Processors,
    report::{Goal, Report},
    rest,
    stats::milliseconds,
};

/// The callers of the server share so many connections.
const CONNECTIONS: usize = 4;

/// From so many callers on there are goals.
const MANY: usize = 8;

/// Measures, and enters what was found. `server` is whom to wait for between turns.
pub fn measure(args: &Args, field: &Field, server: u32, report: &mut Report) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    rest::wait(server)?;
    for (round, &callers) in args.callers.iter().enumerate() {
        eprintln!("field: throughput, {callers} callers");
        for index in rest::order(round, field.present.len()) {
            let contestant = &field.present[index];
            let runs = runs(contestant.pace, args.calls, callers);
            let before = Processors::look()?;
            let time = turn(&runtime, contestant, callers, runs)?;
            let turn = Processors::look()?.since(before);
            let rested = rest::wait(server)?;
            let all = Processors::look()?.since(before);
            if !rested {
                let name = contestant.name;
                report.note(format!("no rest after {name}'s turn with {callers} callers"));
            }
            let each = |time: Duration| milliseconds(time) / runs as f64;
            let row = report.row(contestant.name);
            row.runs.insert(callers, runs);
            row.runs_per_s.insert(callers, runs as f64 / time.as_secs_f64());
            row.idle_share.insert(callers, turn.idle_share());
            // Where others were at work as well, what came afterwards may be theirs.
            let after = if rested { all.busy.saturating_sub(turn.busy) } else { Duration::ZERO };
            row.busy_ms_per_run.insert(callers, each(turn.busy + after));
            if rested {
                row.busy_after_ms_per_run.insert(callers, each(after));
            }
        }
        goals(report, callers);
    }
    Ok(())
}

/// Runs of one turn; at least as many as there are callers.
fn runs(pace: Pace, calls: usize, callers: usize) -> usize {
    let all = match pace {
        Pace::Quick => calls,
        Pace::Slow => calls / 10,
        Pace::Docker => 0,
    };
    all.max(callers)
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
    let rate = |name| report.find(name).and_then(|row| row.rate(callers));
    let [spawn, ours] = [SPAWN, DISPATCHER].map(rate);
    let (Some(spawn), Some(ours)) = (spawn, ours) else { return };
    if callers < MANY {
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
