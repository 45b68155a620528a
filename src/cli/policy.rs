//! `dispatcher policy`: check policy files, explain what holds, print the schema.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Subcommand};

use super::exit;
use crate::{
    config::{self, ConfigOverrides, Surroundings},
    names::{MethodName, Namespace, ServiceName},
    policy::{
        compile::{Loaded, host_user, load, load_file},
        explain::explain,
        fault::{Fault, tell},
        schema::schema,
    },
};

/// Arguments of `dispatcher policy`.
#[derive(Debug, Args)]
pub struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Tell everything that is wrong with policies, as FILE:LINE:COLUMN
    Check {
        /// Directories and policy files [default: the directory that `serve` would read]
        paths: Vec<PathBuf>,
    },
    /// Show the policy in force, where each value comes from, and what it leads to
    Explain {
        /// The namespace
        namespace: String,
        /// One method of a service, as SERVICE/METHOD
        call: Option<String>,
        /// The directory of policies [default: the one that `serve` would read]
        #[arg(long, value_name = "DIR")]
        policies: Option<PathBuf>,
    },
    /// Print the JSON Schema of a policy file
    Schema,
}

/// Runs the command.
#[must_use]
pub fn run(args: &PolicyArgs) -> ExitCode {
    let mut stdout = io::stdout().lock();
    let mut stderr = io::stderr().lock();
    let outcome = run_with(args, &mut stdout, &mut stderr).and_then(|code| {
        stdout.flush()?;
        Ok(code)
    });
    // A reader that went away (`| head`) is no failure of ours to tell.
    outcome.map_or(ExitCode::from(exit::FAILURE), ExitCode::from)
}

fn run_with(args: &PolicyArgs, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<u8> {
    match &args.command {
        PolicyCommand::Check { paths } if paths.is_empty() => match default_directory() {
            Ok(directory) => check(&[directory], out, err),
            Err(faults) => bad_configuration(&faults, err),
        },
        PolicyCommand::Check { paths } => check(paths, out, err),
        PolicyCommand::Explain { namespace, call, policies } => {
            let directory = policies.clone().map_or_else(default_directory, Ok);
            match directory {
                Ok(directory) => explain_one(namespace, call.as_deref(), &directory, out, err),
                Err(faults) => bad_configuration(&faults, err),
            }
        }
        PolicyCommand::Schema => {
            writeln!(out, "{:#}", schema())?;
            Ok(0)
        }
    }
}

/// Where `serve` would read policies, given no flag.
fn default_directory() -> Result<PathBuf, Vec<Fault>> {
    // Where it listens is of no concern here.
    let overrides = ConfigOverrides { insecure: Some(true), ..ConfigOverrides::default() };
    let loaded = config::load(None, &overrides, &Surroundings::current())?;
    Ok(loaded.config.policies)
}

fn bad_configuration(faults: &[Fault], err: &mut dyn Write) -> io::Result<u8> {
    tell(faults, "", err)?;
    Ok(exit::BAD_CONFIGURATION)
}

fn check(paths: &[PathBuf], out: &mut dyn Write, err: &mut dyn Write) -> io::Result<u8> {
    let mut code = 0;
    for path in paths {
        match load_path(path) {
            Ok(loaded) => {
                tell(&loaded.warnings, "warning: ", err)?;
                let policies = counted(loaded.set.policies.len(), "policy", "policies");
                let warnings = match loaded.warnings.len() {
                    0 => String::new(),
                    number => format!(", {}", counted(number, "warning", "warnings")),
                };
                writeln!(out, "{}: {policies}, no faults{warnings}", path.display())?;
            }
            Err(faults) => {
                tell(&faults, "", err)?;
                let faults = counted(faults.len(), "fault", "faults");
                writeln!(err, "{}: {faults}", path.display())?;
                code = exit::FAILURE;
            }
        }
    }
    Ok(code)
}

fn load_path(path: &Path) -> Result<Loaded, Vec<Fault>> {
    let file = path.symlink_metadata().is_ok_and(|metadata| !metadata.is_dir())
        && !path.metadata().is_ok_and(|metadata| metadata.is_dir());
    if file { load_file(path, &host_user) } else { load(path, &host_user) }
}

fn explain_one(
    namespace: &str,
    call: Option<&str>,
    directory: &Path,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<u8> {
    let (namespace, call) = match parse_call(namespace, call) {
        Ok(parsed) => parsed,
        Err(message) => {
            writeln!(err, "dispatcher: {message}")?;
            return Ok(exit::USAGE);
        }
    };
    let loaded = match load(directory, &host_user) {
        Ok(loaded) => loaded,
        Err(faults) => {
            tell(&faults, "", err)?;
            return Ok(exit::FAILURE);
        }
    };
    tell(&loaded.warnings, "warning: ", err)?;
    let call = call.as_ref().map(|(service, method)| (service, method));
    match explain(&loaded, &namespace, call) {
        Some(text) => {
            out.write_all(text.as_bytes())?;
            Ok(0)
        }
        None => {
            let directory = directory.display();
            writeln!(
                err,
                "dispatcher: every call of namespace {:?} is refused (no_policy): \
                 {directory} has neither {namespace}.toml nor default.toml; write one of them",
                namespace.as_str(),
            )?;
            Ok(exit::FAILURE)
        }
    }
}

type Call = (ServiceName, MethodName);

fn parse_call(namespace: &str, call: Option<&str>) -> Result<(Namespace, Option<Call>), String> {
    let parsed = namespace.parse().map_err(|error| format!("namespace {namespace:?} {error}"))?;
    let Some(text) = call else { return Ok((parsed, None)) };
    let Some((service, method)) = text.split_once('/') else {
        return Err(format!("{text:?} is not SERVICE/METHOD; write such as greeter/SayHello"));
    };
    let service = service.parse().map_err(|error| format!("service {service:?} {error}"))?;
    let method = method.parse().map_err(|error| format!("method {method:?} {error}"))?;
    Ok((parsed, Some((service, method))))
}

fn counted(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: PolicyArgs,
    }

    fn policy(arguments: &[&str]) -> (u8, String, String) {
        let cli = Cli::try_parse_from([&["policy"], arguments].concat()).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = run_with(&cli.args, &mut out, &mut err).unwrap();
        (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn check_tells_all_faults_of_all_paths() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("good.toml"), "protocol = \"grpc\"\ninstances.min = 1\n").unwrap();
        std::fs::write(path("bad.toml"), "[limits]\nmemory = \"1\"\npid = 3\n").unwrap();
        let (code, out, err) = policy(&["check", &path("good.toml"), &path("bad.toml")]);
        assert_eq!(code, 1);
        assert_eq!(out, format!("{}: 1 policy, no faults, 1 warning\n", path("good.toml")));
        let lines: Vec<&str> = err.lines().collect();
        assert!(
            lines[0].starts_with(&format!("{}:2:17: warning: instances.min", path("good.toml")))
        );
        assert!(lines[1].starts_with(&format!("{}:2:10: limits.memory is 1,", path("bad.toml"))));
        assert!(lines[2].starts_with(&format!("{}:3:1: unknown key \"pid\"", path("bad.toml"))));
        assert_eq!(lines[3], format!("{}: 2 faults", path("bad.toml")));

        std::fs::remove_file(path("bad.toml")).unwrap();
        let (code, _, _) = policy(&["check", directory.path().to_str().unwrap()]);
        assert_eq!(code, 0);
        let (code, _, err) = policy(&["check", &path("nowhere")]);
        assert_eq!(code, 1);
        assert!(err.contains("nowhere:1:1: can't be read as a directory"), "{err}");
    }

    #[test]
    fn explain_needs_a_policy_and_well_formed_names() {
        let directory = tempfile::tempdir().unwrap();
        let flag = ["--policies", directory.path().to_str().unwrap()];
        let explain = |arguments: &[&str]| policy(&[&["explain"], arguments, &flag].concat());
        let (code, out, err) = explain(&["demo"]);
        assert_eq!((code, out.as_str()), (1, ""));
        assert!(err.contains("(no_policy)"), "{err}");
        assert_eq!(explain(&["de/mo"]).0, 2);
        assert_eq!(explain(&["demo", "greeter"]).0, 2);
        assert_eq!(explain(&["demo", "gree ter/x"]).0, 2);

        std::fs::write(directory.path().join("default.toml"), "[services]\nallow = []\n").unwrap();
        let (code, out, err) = explain(&["demo", "greeter/SayHello"]);
        assert_eq!((code, err.as_str()), (0, ""));
        assert!(out.contains("greeter/SayHello: refused (service_not_allowed)"), "{out}");
    }

    #[test]
    fn the_schema_is_json() {
        let (code, out, _) = policy(&["schema"]);
        assert_eq!(code, 0);
        assert!(serde_json::from_str::<serde_json::Value>(&out).is_ok());
    }
}
