//! `dispatcher config`: check the server's own file, print its schema.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Subcommand};

use super::exit;
use crate::{
    config::{self, Surroundings},
    policy::fault::tell,
};

/// Arguments of `dispatcher config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Tell everything that is wrong with the server's own file, as FILE:LINE:COLUMN
    Check {
        /// The file [default: $DISPATCHER_CONFIG, else the one that `serve` would read]
        file: Option<PathBuf>,
        /// The same, as `serve` and `doctor` take it
        #[arg(long, value_name = "FILE", conflicts_with = "file")]
        config: Option<PathBuf>,
    },
    /// Print the JSON Schema of the server's own file
    Schema,
}

/// Runs the command.
#[must_use]
pub fn run(args: &ConfigArgs) -> ExitCode {
    let mut stdout = io::stdout().lock();
    let mut stderr = io::stderr().lock();
    let outcome = run_with(args, &Surroundings::current(), &mut stdout, &mut stderr);
    let outcome = outcome.and_then(|code| {
        stdout.flush()?;
        Ok(code)
    });
    outcome.map_or(ExitCode::from(exit::FAILURE), ExitCode::from)
}

fn run_with(
    args: &ConfigArgs,
    surroundings: &Surroundings<'_>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<u8> {
    match &args.command {
        ConfigCommand::Check { file, config } => {
            let named = file.as_deref().or(config.as_deref());
            match config::find_file(named, surroundings) {
                Some(file) => check(&file, surroundings, out, err),
                None => {
                    writeln!(out, "{}: not there; the defaults hold", config::SYSTEM_FILE)?;
                    Ok(0)
                }
            }
        }
        ConfigCommand::Schema => {
            writeln!(out, "{:#}", config::schema())?;
            Ok(0)
        }
    }
}

fn check(
    file: &Path,
    surroundings: &Surroundings<'_>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<u8> {
    match config::check_file(file, surroundings) {
        Ok(()) => {
            tell(&config::exposed(file), "warning: ", err)?;
            writeln!(out, "{}: no faults", file.display())?;
            Ok(0)
        }
        Err(faults) => {
            tell(&faults, "", err)?;
            Ok(exit::FAILURE)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: ConfigArgs,
    }

    fn config(arguments: &[&str]) -> (u8, String, String) {
        let cli = Cli::try_parse_from([&["config"], arguments].concat()).unwrap();
        let surroundings = Surroundings {
            variable: &|_| None,
            root: true,
            host_name: "here".to_owned(),
            subuid: String::new(),
        };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = run_with(&cli.args, &surroundings, &mut out, &mut err).unwrap();
        (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn check_tells_faults_and_exposure() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("d.toml").to_str().unwrap().to_owned();
        std::fs::write(&path, "[server]\nlisten = [\"0.0.0.0:1\"]\n").unwrap();
        let (code, out, err) = config(&["check", &path]);
        assert_eq!((code, out), (0, format!("{path}: no faults\n")));
        assert!(err.starts_with(&format!("{path}:2:11: warning: server.listen has")), "{err}");

        std::fs::write(&path, "[server]\nlisten = []\nport = 3\n").unwrap();
        let (code, out, err) = config(&["check", &path]);
        assert_eq!((code, out.as_str()), (1, ""));
        assert_eq!(err.lines().count(), 2, "{err}");
        assert_eq!(config(&["check", "/nowhere"]).0, 1);
    }

    #[test]
    fn check_takes_the_file_as_serve_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("d.toml").to_str().unwrap().to_owned();
        std::fs::write(&path, "[server]\nport = 3\n").unwrap();
        let by_place = config(&["check", &path]);
        assert_eq!(by_place.0, 1);
        assert_eq!(config(&["check", "--config", &path]), by_place);
        let both = Cli::try_parse_from(["config", "check", "--config", &path, &path]);
        assert_eq!(both.err().unwrap().exit_code(), 2);
    }

    #[test]
    fn the_schema_is_json() {
        let (code, out, _) = config(&["schema"]);
        assert_eq!(code, 0);
        assert!(serde_json::from_str::<serde_json::Value>(&out).is_ok());
    }
}
