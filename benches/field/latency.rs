//! One caller. Each round has one run of every contestant, so that whatever else the machine does
//! meets all of them; and two calls that run nothing, which tell parts of a call from each other.

use std::time::Duration;

use dispatcher::{
    names::Digest,
    wire::{serve_request::ServiceDef, status::Code},
};
use serde::Serialize;

use crate::{
    Outcome,
    args::Args,
    bare::Bare,
    client::{self, Phases, Sample},
    contestant::{Contestant, DISPATCHER, Field, How, Pace, SPAWN, spawn},
    report::{Goal, Report},
    rest::order,
    stats::{Summary, median_ms},
};

/// Rounds before those that count.
const WARM_UP: usize = 20;

/// Where a call's time goes: medians of each part, in milliseconds.
#[derive(Debug, Serialize)]
pub struct Breakdown {
    pub queue_ms: f64,
    pub setup_ms: f64,
    pub wall_ms: f64,
    /// Processor time of the run; its cgroup has init's share too.
    pub cpu_ms: f64,
    pub rest_ms: f64,
    pub total_ms: f64,
    /// The same message to a server that does nothing, and back.
    pub empty_rpc_ms: f64,
    /// A call of a program that the dispatcher doesn't hold: all that is done before a launch.
    pub refused_ms: f64,
}

/// The spawn alone, before any server of ours is there.
pub fn control(args: &Args) -> Outcome<Summary> {
    let contestant = Contestant::bare(args);
    let mut runner = Runner::new(&contestant)?;
    eprintln!("field: control, {} rounds of the spawn alone", args.rounds);
    for _ in 0..WARM_UP {
        runner.run()?;
    }
    let samples = (0..args.rounds).map(|_| Ok(runner.run()?.total)).collect::<Outcome<Vec<_>>>()?;
    Summary::of(&samples).ok_or_else(|| "no rounds".into())
}

/// Measures, and enters what was found.
pub fn measure(args: &Args, field: &Field, report: &mut Report) -> Outcome {
    let bare = Bare::start()?;
    let mut probes = Probes::new(field, &bare)?;
    let mut runners = field.present.iter().map(Runner::new).collect::<Outcome<Vec<_>>>()?;
    let warm_up = WARM_UP.min(args.rounds);
    eprintln!("field: latency, {} rounds", args.rounds);
    for round in 0..warm_up + args.rounds {
        for index in order(round, runners.len()) {
            let runner = &mut runners[index];
            if round < warm_up && runner.contestant.pace == Pace::Quick {
                runner.run()?;
            } else if round >= warm_up && runner.takes_part(round - warm_up) {
                let sample = runner.run()?;
                runner.samples.push(sample);
            }
        }
        if let Some(probes) = &mut probes {
            probes.run(round, round >= warm_up)?;
        }
    }
    for runner in &runners {
        let totals: Vec<Duration> = runner.samples.iter().map(|sample| sample.total).collect();
        report.row(runner.contestant.name).latency = Summary::of(&totals);
        if runner.contestant.name == DISPATCHER {
            report.breakdown = Some(breakdown(&runner.samples, probes.take()));
        }
    }
    goals(report);
    Ok(())
}

/// A contestant with all it needs for its next run.
struct Runner<'a> {
    contestant: &'a Contestant,
    served: Option<(tokio::runtime::Runtime, client::Client)>,
    samples: Vec<Sample>,
}

impl<'a> Runner<'a> {
    fn new(contestant: &'a Contestant) -> Outcome<Self> {
        let served = match &contestant.how {
            How::Spawn(_) => None,
            How::Serve { address, .. } => {
                // A caller of one thread, as small as a client can be.
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let client = runtime.block_on(client::connect(address))?;
                Some((runtime, client))
            }
        };
        Ok(Self { contestant, served, samples: vec![] })
    }

    fn takes_part(&self, round: usize) -> bool {
        round.is_multiple_of(match self.contestant.pace {
            Pace::Quick => 1,
            Pace::Slow => 10,
            Pace::Docker => 100,
        })
    }

    fn run(&mut self) -> Outcome<Sample> {
        match (&self.contestant.how, &mut self.served) {
            (How::Serve { request, .. }, Some((runtime, client))) => {
                let request = (**request).clone();
                runtime.block_on(client::serve(client, request))
            }
            (How::Spawn(command), _) => spawn(&**command),
            (How::Serve { .. }, None) => Err("a server's contestant without a client".into()),
        }
    }
}

/// Two calls that run nothing.
struct Probes {
    runtime: tokio::runtime::Runtime,
    clients: [client::Client; 2],
    requests: [dispatcher::wire::ServeRequest; 2],
    samples: [Vec<Duration>; 2],
}

impl Probes {
    /// `None` where the dispatcher doesn't take part.
    fn new(field: &Field, bare: &Bare) -> Outcome<Option<Self>> {
        let Some((address, request)) = field.present.iter().find_map(|one| match &one.how {
            How::Serve { address, request } => Some((address, request)),
            How::Spawn(_) => None,
        }) else {
            return Ok(None);
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let clients = runtime.block_on(async {
            Outcome::Ok([client::connect(&bare.address).await?, client::connect(address).await?])
        })?;
        let unknown = ServiceDef::ServiceUri(Digest::of(b"nobody has this").to_string());
        let requests = [(**request).clone(), client::request("default", unknown)];
        Ok(Some(Self { runtime, clients, requests, samples: Default::default() }))
    }

    fn run(&mut self, round: usize, counts: bool) -> Outcome {
        for index in order(2 * round, 2) {
            let (client, request) = (&mut self.clients[index], self.requests[index].clone());
            let (took, answer) = self.runtime.block_on(client::ask(client, request));
            let is_refused = match &answer {
                Ok(reply) => reply.status.as_ref().is_some_and(|one| one.code() == Code::NotFound),
                Err(status) => status.code() == tonic::Code::NotFound,
            };
            if is_refused != (index == 1) {
                return Err(format!("a call that runs nothing was answered {answer:?}").into());
            }
            if counts {
                self.samples[index].push(took);
            }
        }
        Ok(())
    }
}

fn breakdown(samples: &[Sample], probes: Option<Probes>) -> Breakdown {
    let median = |part: fn(&Phases) -> Duration| {
        median_ms(samples.iter().filter_map(|sample| sample.phases.as_ref()).map(part))
    };
    let probes = probes.map(|probes| probes.samples).unwrap_or_default();
    let [empty_rpc_ms, refused_ms] = probes.map(median_ms);
    Breakdown {
        queue_ms: median(|phases| phases.queue),
        setup_ms: median(|phases| phases.setup),
        wall_ms: median(|phases| phases.wall),
        cpu_ms: median(|phases| phases.cpu),
        rest_ms: median(|phases| phases.rest),
        total_ms: median_ms(samples.iter().map(|sample| sample.total)),
        empty_rpc_ms,
        refused_ms,
    }
}

fn goals(report: &mut Report) {
    let latency = |name| report.find(name).and_then(|row| row.latency.clone());
    let [spawn, ours] = [SPAWN, DISPATCHER].map(latency);
    let (Some(spawn), Some(ours)) = (spawn, ours) else { return };
    let ratio = ours.p50_ms / spawn.p50_ms;
    report.goals.push(Goal::at_most("p50, one caller: times a bare spawn's", ratio, 2.0));
    // Either of the two will do.
    let (own, spawns) = (ours.p99_ms / ours.p50_ms, ours.p99_ms / spawn.p99_ms);
    report.goals.push(if own > 4.0 && spawns <= 2.0 {
        Goal::at_most("p99, one caller: times a bare spawn's p99", spawns, 2.0)
    } else {
        Goal::at_most("p99, one caller: times its own p50", own, 4.0)
    });
}
