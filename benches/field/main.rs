//! The whole, measured: a jailed call by gRPC beside a bare spawn and beside other sandboxes, in one
//! run with interleaved rounds. `scripts/bench` gets what this needs and starts it.

mod alive;
mod args;
mod bare;
mod client;
mod cold;
mod containers;
mod contestant;
mod idle;
mod large;
mod latency;
mod machine;
mod page;
mod processes;
mod ready;
mod report;
mod rest;
mod rivals;
mod server;
mod services;
mod sleepers;
mod stats;
mod svg;
mod throughput;

use std::{error::Error, fs, process::ExitCode};

use args::{Args, Section};
use contestant::Field;
use machine::Machine;
use report::Report;

/// What may go wrong is told and ends the run: nothing is measured by halves.
type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    let args = Args::read();
    if args.bare_server {
        return ended(bare::serve());
    }
    if args.programs.is_none() {
        // Also how `cargo bench` and `cargo test --benches` come here.
        println!("field: nothing to do without --programs; scripts/bench makes them and starts it");
        return ExitCode::SUCCESS;
    }
    ended(measure(&args))
}

fn ended(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("field: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> Outcome {
    let mut report = Report::new(Machine::look(&args.dispatcher, !args.quick)?);
    if args.wants(Section::Latency) || args.wants(Section::Throughput) {
        side_by_side(args, &mut report)?;
    }
    if args.wants(Section::Idle) {
        idle::measure(args, &mut report)?;
    }
    if args.wants(Section::Large) {
        large::measure(args, &mut report)?;
    }
    if args.wants(Section::Services) {
        services::measure(args, &mut report)?;
    }
    if args.wants(Section::Containers) {
        containers::measure(args, &mut report)?;
    }
    if args.wants(Section::Alive) {
        alive::measure(args, &mut report)?;
        ready::measure(args, &mut report)?;
    }
    if args.wants(Section::Cold) {
        cold::measure(args, &mut report)?;
    }
    report.machine.look_again()?;
    [report.enforced, report.not_in_force] = client::in_force();
    print!("{}", page::of(&report));
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    if let Some(path) = &args.page {
        fs::write(path, page::fill(&fs::read_to_string(path)?, &report)?)?;
    }
    if let Some(path) = &args.svg {
        fs::write(path, svg::picture(&report))?;
    }
    Ok(())
}

/// The sections in which the contestants meet, all at one server.
fn side_by_side(args: &Args, report: &mut Report) -> Outcome {
    // What it is without us: nothing of ours runs yet.
    report.control = Some(latency::control(args)?);
    let server = server::Server::start(args, &[])?;
    let field = Field::gather(args, &server)?;
    report.enter(&field);
    if args.wants(Section::Latency) {
        latency::measure(args, &field, report)?;
    }
    if args.wants(Section::Throughput) {
        throughput::measure(args, &field, server.pid(), report)?;
    }
    drop(field);
    server.stop()
}
