//! `dispatcher version`.

use std::process::ExitCode;

use clap::Args;

/// The version of `proto/` that is spoken.
pub const WIRE: u32 = 1;
/// The version of the policy files that are understood.
pub const POLICY: u32 = 1;

/// Arguments of `dispatcher version`.
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
#[must_use]
pub fn run(args: &VersionArgs) -> ExitCode {
    let (version, commit) = (env!("CARGO_PKG_VERSION"), env!("DISPATCHER_COMMIT"));
    if args.json {
        let json = serde_json::json!({
            "version": version, "commit": commit, "wire": WIRE, "policy": POLICY,
        });
        println!("{json}");
    } else {
        println!("dispatcher {version} (commit {commit}, wire {WIRE}, policy {POLICY})");
    }
    ExitCode::SUCCESS
}
