//! `dispatcher serve`.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::exit::{self, BAD_CONFIGURATION, FAILURE};
use crate::{
    config::{self, ConfigOverrides, Surroundings},
    monitor, observe,
};

const EXAMPLES: &str = "\
Examples:
  dispatcher serve
  dispatcher serve --policies ./policies --listen 127.0.0.1:0 --listen unix:./socket

SIGTERM or SIGINT: finish what runs, take nothing new, exit; a second one: exit at once.
SIGHUP: load the policies again, all or none.";

/// Arguments of `dispatcher serve`. A flag beats the `DISPATCHER_*` variable of
/// the same name, which beats the file, which beats the default.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    /// The server's own file [default: /etc/dispatcher/dispatcher.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// HOST:PORT or unix:PATH; may be repeated [default: 127.0.0.1:50051]
    #[arg(long, value_name = "ADDR")]
    listen: Vec<String>,
    /// The directory of policy files [default: /etc/dispatcher/policies]
    #[arg(long, value_name = "DIR")]
    policies: Option<PathBuf>,
    /// Where state is kept [default: $STATE_DIRECTORY or /var/lib/dispatcher]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// How long running calls may take to finish on SIGTERM [default: 45s]
    #[arg(long, value_name = "D")]
    drain_timeout: Option<String>,
    /// Listen beyond loopback without TLS
    #[arg(long)]
    insecure: bool,
}

/// Runs the service until it is told to stop.
#[must_use]
pub fn run(args: &ServeArgs) -> ExitCode {
    observe::init();
    let overrides = ConfigOverrides {
        listen: (!args.listen.is_empty()).then(|| args.listen.clone()),
        policies: args.policies.clone(),
        state: args.state.clone(),
        drain_timeout: args.drain_timeout.clone(),
        insecure: args.insecure.then_some(true),
    };
    let loaded = match config::load(args.config.as_deref(), &overrides, &Surroundings::current()) {
        Ok(loaded) => loaded,
        Err(faults) => {
            for fault in faults {
                eprintln!("{fault}");
            }
            return exit::fail(BAD_CONFIGURATION, "the configuration is not in order");
        }
    };
    for (setting, value, place) in &loaded.settings {
        tracing::info!(target: "config", "{setting} = {value} ({place})");
    }
    match monitor::run(&loaded.config) {
        Ok(code) => code,
        Err(error) if error.is_configuration() => exit::fail(BAD_CONFIGURATION, error),
        Err(error) => exit::fail(FAILURE, error),
    }
}
