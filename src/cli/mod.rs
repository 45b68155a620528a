//! A file per command.

pub mod call;
pub mod config;
pub mod doctor;
pub mod exit;
pub mod json;
mod launched;
pub mod limits;
pub mod policy;
pub mod run;
pub mod serve;
pub mod version;

use std::{path::Path, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{container, jail, monitor, server};

/// Runs the binary you send it, in a jail, and tells what came out and what it cost.
#[derive(Debug, Parser)]
#[command(name = "dispatcher", version, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  dispatcher serve --policies ./policies --listen 127.0.0.1:50051
  dispatcher run ./hello world
  dispatcher call --namespace demo --binary ./hello greeter/Hello
  dispatcher policy explain demo
  dispatcher doctor

Exit codes: 0 well; 1 what was checked is wrong; 2 usage; 69 the server can't be
reached; 78 bad configuration. `run` and `call` give the program's own exit code,
128+N for a signal, 124 timed out, 125 refused or failed, 130 cancelled,
137 over a limit, 159 for a forbidden system call.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the service
    Serve(serve::ServeArgs),
    /// Run one binary under a policy, without a service
    Run(run::RunArgs),
    /// Make one call to a running service
    Call(call::CallArgs),
    /// Check, explain and describe policy files
    Policy(policy::PolicyArgs),
    /// Check and describe the server's own file
    Config(config::ConfigArgs),
    /// Tell what this host can and can't enforce, by trying, and how to mend it
    Doctor(doctor::DoctorArgs),
    /// Tell the version, the commit, and which wire and policies it speaks
    Version(version::VersionArgs),
}

/// The main of whichever of our processes this is, by the name it was started as.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let role = Path::new(&name).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if let Some(title) = ROLES.iter().find(|title| title.to_str() == Ok(role)) {
        // What ps(1) and pgrep(1) show; exec made it the file's name. It can't fail.
        rustix::thread::set_name(title).ok();
    }
    match role {
        "dispatch-serve" => server::main(),
        "dispatch-launch" => jail::launcher::main(),
        "dispatch-docker" => container::process::main(),
        "dispatch-compile" => monitor::compile::main(),
        _ => run(Cli::parse()),
    }
}

const ROLES: [&std::ffi::CStr; 4] =
    [c"dispatch-serve", c"dispatch-launch", c"dispatch-docker", c"dispatch-compile"];

fn run(cli: Cli) -> ExitCode {
    match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Call(args) => call::run(args),
        Command::Policy(args) => policy::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Version(args) => version::run(&args),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_command_says_what_it_takes() {
        for command in Cli::command().get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            assert!(command.get_about().is_some(), "{help}");
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{}: {argument}", command.get_name());
            }
        }
    }
}
