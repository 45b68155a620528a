//! What is to be measured, and how often.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// One part of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// One caller, every contestant
    Latency,
    /// Several callers at once, every contestant
    Throughput,
    /// One caller of the dispatcher, while other jails sleep
    Idle,
    /// A binary of 64 MiB with each call
    Large,
    /// Many jails at once, and those built ahead: their memory
    Alive,
    /// First calls, for which nothing is ready, and calls with pauses
    Cold,
    /// A gRPC service, beside the same server called straight
    Services,
    /// Container mode, beside docker run
    Containers,
}

/// Measures jailed calls beside bare spawns and other sandboxes.
#[derive(Debug, Parser)]
pub struct Args {
    /// What to measure; everything unless told
    #[arg(value_enum)]
    sections: Vec<Section>,
    /// Where the compiled `ok`, `nap` and `greeter` are
    #[arg(long, value_name = "DIR")]
    pub programs: Option<PathBuf>,
    /// The dispatcher to measure
    #[arg(long, value_name = "FILE", default_value = env!("CARGO_BIN_EXE_dispatcher"))]
    pub dispatcher: PathBuf,
    /// The policy that calls go by
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/policies/default.toml"))]
    pub policy: PathBuf,
    /// Only these contestants, by name; `spawn` and `dispatcher` are two
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// The image that docker runs; without one docker doesn't take part
    #[arg(long, value_name = "IMAGE")]
    pub docker_image: Option<String>,
    /// Rounds of latency; slow contestants take part in a tenth of them, docker in a hundredth
    #[arg(long, default_value_t = 2000)]
    pub rounds: usize,
    /// Calls of throughput at each number of callers; the slow make a tenth, docker one each
    #[arg(long, default_value_t = 10_000)]
    pub calls: usize,
    /// Numbers of callers of throughput
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [2, 8, 32])]
    pub callers: Vec<usize>,
    /// Jails asleep in `idle`
    #[arg(long, default_value_t = 200)]
    pub sleepers: usize,
    /// Jails of `alive`
    #[arg(long, default_value_t = 1000)]
    pub alive: usize,
    /// Rounds of `large` and of `cold`; five times as many services are started
    #[arg(long, default_value_t = 10)]
    pub large_rounds: usize,
    /// Very few rounds of everything: whether it works, not how fast
    #[arg(long)]
    pub quick: bool,
    /// Write all figures there
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the latencies there
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Put the tables into this page, in place of those that it has
    #[arg(long, value_name = "FILE")]
    pub page: Option<PathBuf>,
    /// Be the server that does nothing, of `latency` and `large`
    #[arg(long, hide = true)]
    pub bare_server: bool,
    /// Given by `cargo bench`, and without meaning here
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    /// As given on the command line, with `--quick` worked in, and paths that hold anywhere.
    pub fn read() -> Self {
        let mut args = Self::parse();
        // What is started has a directory of its own; and we ourselves are at the root of all after
        // a change of mounts (`rivals::hybrid`).
        let written = [&mut args.json, &mut args.svg, &mut args.page].into_iter().flatten();
        let read = [&mut args.dispatcher, &mut args.policy].into_iter().chain(&mut args.programs);
        for path in read.chain(written) {
            *path = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
        }
        if args.quick {
            args.rounds = args.rounds.min(20);
            args.calls = args.calls.min(200);
            args.sleepers = args.sleepers.min(20);
            args.alive = args.alive.min(50);
            args.large_rounds = args.large_rounds.min(2);
        }
        args
    }

    /// Whether this section is to be measured.
    pub fn wants(&self, section: Section) -> bool {
        self.sections.is_empty() || self.sections.contains(&section)
    }

    /// Whether this contestant is to take part.
    pub fn invites(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }

    /// The path of a compiled program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.as_deref().unwrap_or_else(|| ".".as_ref()).join(name)
    }
}
