//! Who takes part: each can run the program that says ok, once, and be checked.

use std::{
    process::{Command, Output},
    time::Instant,
};

use dispatcher::wire::ServeRequest;

use crate::{
    Outcome,
    args::Args,
    client::{self, Sample, WORDS},
    machine,
    rivals::{self, hybrid},
    server::Server,
};

/// Name of the bare spawn, with which all are compared.
pub const SPAWN: &str = "spawn";
/// Name of what is measured here.
pub const DISPATCHER: &str = "dispatcher";

/// How much of a section's rounds a contestant takes part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// All.
    Quick,
    /// A tenth.
    Slow,
    /// Hundreds of milliseconds a run.
    Docker,
}

/// One way of running a program.
pub struct Contestant {
    pub name: &'static str,
    /// By its own word.
    pub version: String,
    /// What it has of our default policy as it is started here.
    pub started: &'static str,
    /// What of our default policy it doesn't do.
    pub leaves_out: &'static str,
    pub pace: Pace,
    pub how: How,
}

/// How it runs the program.
pub enum How {
    /// A command for each run.
    Spawn(Box<dyn Fn() -> Outcome<Command> + Send + Sync>),
    /// A call of a server.
    Serve { address: String, request: Box<ServeRequest> },
}

/// One that can't take part here.
pub struct Absent {
    pub name: &'static str,
    pub why: String,
}

/// All of them.
pub struct Field {
    pub present: Vec<Contestant>,
    pub absent: Vec<Absent>,
    /// What they need while they run.
    _files: tempfile::TempDir,
    _hidden: Option<hybrid::Hidden>,
}

impl Field {
    /// Everybody who is invited; who can't come is named with the reason.
    pub fn gather(args: &Args, server: &Server) -> Outcome<Self> {
        let files = tempfile::Builder::new().prefix("dispatcher-bench-").tempdir()?;
        let hidden = hybrid::hide()?;
        let mut present = vec![Contestant::bare(args), serving(args, server)?];
        let mut absent = vec![];
        for rival in rivals::ALL {
            if !args.invites(rival.name) {
                continue;
            }
            let contestant = rival.contestant(args, files.path());
            match contestant.and_then(|one| one.trial().map(|()| one)) {
                Ok(one) => present.push(one),
                Err(why) => absent.push(Absent { name: rival.name, why: why.to_string() }),
            }
        }
        present.retain(|one| args.invites(one.name));
        Ok(Self { present, absent, _files: files, _hidden: hidden })
    }
}

fn serving(args: &Args, server: &Server) -> Outcome<Contestant> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let program = args.program("ok");
    let request = runtime.block_on(client::hand_over(&server.address, "default", &program))?;
    Ok(Contestant {
        name: DISPATCHER,
        version: machine::said(&args.dispatcher, &["version"])?,
        started: "by the default policy",
        leaves_out: "",
        pace: Pace::Quick,
        how: How::Serve { address: server.address.clone(), request: Box::new(request) },
    })
}

impl Contestant {
    /// The program without a sandbox.
    pub fn bare(args: &Args) -> Self {
        let program = args.program("ok");
        Self {
            name: SPAWN,
            version: String::new(),
            started: "as it is",
            leaves_out: "everything",
            pace: Pace::Quick,
            how: How::Spawn(Box::new(move || Ok(Command::new(&program)))),
        }
    }

    /// One run of a command, to see whether it works here.
    fn trial(&self) -> Outcome {
        match &self.how {
            How::Spawn(command) => spawn(&**command).map(drop),
            How::Serve { .. } => Ok(()),
        }
    }
}

/// One run of a command: from the spawn until all is said and it is reaped.
pub fn spawn(make: &(dyn Fn() -> Outcome<Command> + Send + Sync)) -> Outcome<Sample> {
    let mut command = make()?;
    let started = Instant::now();
    let output = command.output();
    let total = started.elapsed();
    check(&command, &output.map_err(|error| named(&command, &error.to_string()))?)?;
    Ok(Sample { total, phases: None })
}

fn check(command: &Command, output: &Output) -> Outcome {
    if output.status.success() && output.stdout == WORDS.as_bytes() {
        return Ok(());
    }
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let what = format!("{}, said {stdout:?}; {}", output.status, stderr.trim());
    Err(named(command, &what).into())
}

fn named(command: &Command, what: &str) -> String {
    format!("{}: {what}", command.get_program().display())
}
