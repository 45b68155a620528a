//! `dispatcher run`: one execution without a server, through the same pipeline.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use clap::Args;
use prost_types::Any;
use tokio::sync::mpsc;

use super::{
    call::{output_bytes, read_input},
    exit::{self, BAD_CONFIGURATION, USAGE},
    json,
    launched::{Signals, with_launcher},
    limits::LimitArgs,
};
use crate::{
    admission::{Admission, Capacity},
    config::{self, ConfigOverrides, LoadedConfig, Surroundings},
    dispatch::{Context, Dispatcher},
    execute::{Chunk, Executors, OutputSink, stop::StopHandle, stop::StopSignal},
    names::RunId,
    policy::{
        PolicySet, Protocol,
        compile::{self, Loaded},
        fault::Fault,
        store::PolicyStore,
    },
    server::convert,
    wire::{ServeRequest, ServeResponse, ServiceTypeRef, Verdict, serve_request::ServiceDef},
};

/// Pieces of output that may wait for a slow terminal; the program waits then.
const CHUNKS_WAITING: usize = 16;

const EXAMPLES: &str = "\
Examples:
  dispatcher run ./hello world
  dispatcher run --policy policies/batch.toml --timeout 5s --memory 64MiB ./job
  dispatcher run --input data.bin --json ./filter | jq .memoryPeakBytes

What stands after BINARY goes to the program, flags included. Without --json its
standard output and error pass through as they come.";

/// Arguments of `dispatcher run`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// The directory of policies [default: the one that `serve` would read, if
    /// it is there, else the built-in policy]
    #[arg(long, value_name = "DIR", conflicts_with = "policy")]
    policies: Option<PathBuf>,
    /// One policy file
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Whose policy applies [default: that of --policy, else `default`]
    #[arg(long, value_name = "NS")]
    namespace: Option<String>,
    /// What the program is told it is called as; a gRPC service's full name [default: run]
    #[arg(long, value_name = "S")]
    service: Option<String>,
    /// Which of its methods [default: main]
    #[arg(long, value_name = "M")]
    method: Option<String>,
    /// Standard input of the program; - for our own
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    #[command(flatten)]
    limits: LimitArgs,
    /// Print the report as JSON instead of the program's output
    #[arg(long)]
    json: bool,
    /// What to run
    binary: PathBuf,
    /// Arguments for the program
    #[arg(value_name = "ARG", trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

impl RunArgs {
    fn service(&self) -> &str {
        self.service.as_deref().unwrap_or("run")
    }

    fn method(&self) -> &str {
        self.method.as_deref().unwrap_or("main")
    }
}

/// Why nothing ran.
enum RunError {
    Usage(String),
    Configuration(Vec<Fault>),
    Failed(String),
}

/// Runs the command.
#[must_use]
pub fn run(args: &RunArgs) -> ExitCode {
    match prepare_and_run(args) {
        Ok((response, unfinished)) => show(args, &response, unfinished),
        Err(RunError::Usage(what)) => exit::fail(USAGE, what),
        Err(RunError::Failed(what)) => {
            exit::fail(exit::REFUSED, format_args!("FAILED internal: {what}"))
        }
        Err(RunError::Configuration(faults)) => {
            for fault in faults {
                eprintln!("{fault}");
            }
            exit::fail(BAD_CONFIGURATION, "the policies or the configuration are not in order")
        }
    }
}

/// The reply, and whether what the program wrote to standard error ends within a line.
fn prepare_and_run(args: &RunArgs) -> Result<(ServeResponse, bool), RunError> {
    // Where it would listen is of no concern here.
    let overrides = ConfigOverrides { insecure: Some(true), ..ConfigOverrides::default() };
    let settings = config::load(None, &overrides, &Surroundings::current())
        .map_err(RunError::Configuration)?;
    let (loaded, namespace) = policies(args, &settings)?;
    check_names(args, &loaded.set, &namespace)?;
    let request = request(args, namespace)?;
    let Loaded { set, templates, .. } = loaded;
    with_launcher(&settings, &templates, async |executors, signals| {
        execute(args, set, request, executors, signals).await
    })
    .map_err(RunError::Failed)?
}

/// The policies, and the namespace that the run is of.
fn policies(args: &RunArgs, settings: &LoadedConfig) -> Result<(Loaded, String), RunError> {
    let users = &compile::host_user;
    let named = args.namespace.clone();
    if let Some(file) = &args.policy {
        let loaded = compile::load_file(file, users).map_err(RunError::Configuration)?;
        let own = file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        return Ok((loaded, named.or(own).unwrap_or_default()));
    }
    let directory = args.policies.as_ref().or_else(|| {
        let default = &settings.config.policies;
        default.is_dir().then_some(default)
    });
    let loaded = match directory {
        Some(directory) => compile::load(directory, users),
        None => compile::built_in(users),
    };
    let loaded = loaded.map_err(RunError::Configuration)?;
    Ok((loaded, named.unwrap_or_else(|| "default".to_owned())))
}

/// A gRPC service has the names that its proto gives it: there is nothing to take
/// in their place. Whatever else is wrong, the run tells.
fn check_names(args: &RunArgs, set: &PolicySet, namespace: &str) -> Result<(), RunError> {
    if args.service.is_some() && args.method.is_some() {
        return Ok(());
    }
    let policy = namespace
        .parse()
        .ok()
        .and_then(|namespace| set.choose(&namespace, args.service(), args.method()));
    if policy.is_none_or(|policy| policy.protocol != Protocol::Grpc) {
        return Ok(());
    }
    Err(RunError::Usage(format!(
        "the policy of {namespace} has protocol \"grpc\": say what to call with both --service and \
         --method, such as --service helloworld.Greeter --method SayHello"
    )))
}

fn request(args: &RunArgs, namespace: String) -> Result<ServeRequest, RunError> {
    let binary = std::fs::read(&args.binary)
        .map_err(|error| RunError::Usage(format!("{}: {error}", args.binary.display())))?;
    let input = args
        .input
        .as_deref()
        .map(|path: &Path| read_input(path).map_err(RunError::Usage))
        .transpose()?;
    Ok(ServeRequest {
        service: Some(ServiceTypeRef {
            namespace: namespace.clone(),
            service_name: args.service().to_owned(),
        }),
        namespace,
        method_name: args.method().to_owned(),
        input: input.map(|value| Any { type_url: String::new(), value }),
        service_def: Some(ServiceDef::ServiceBinary(binary.into())),
        options: Some(args.limits.options(args.args.clone())),
        ..Default::default()
    })
}

async fn execute(
    args: &RunArgs,
    policies: PolicySet,
    request: ServeRequest,
    executors: Executors,
    signals: Signals,
) -> Result<(ServeResponse, bool), RunError> {
    // One call: nothing to share, so nothing to ration.
    let admission = Admission::new(Capacity { runs: None, memory: u64::MAX });
    let dispatcher = Dispatcher::new(Arc::new(PolicyStore::new(policies)), admission, executors, 0);
    let stop = StopHandle::new();
    let (sink, printer) = if args.json { (None, None) } else { live_output() };
    let context = Context {
        run: RunId::random().map_err(|error| RunError::Failed(error.to_string()))?,
        deadline: None,
        stop: StopSignal::of(&stop),
        sink,
        reservation: None,
    };
    let cancel = tokio::spawn(cancel_on_signal(signals, stop));
    let reply = dispatcher.dispatch(convert::call(request), context).await;
    cancel.abort();
    let unfinished = match printer {
        // It ends with the sink; a printer that failed has printed what it could.
        Some(printer) => printer.await.unwrap_or_default(),
        None => false,
    };
    Ok((convert::response(reply, "").0, unfinished))
}

/// Ends by saying whether standard error ends within a line.
type Printer = tokio::task::JoinHandle<bool>;

/// Passes the program's output on as it comes.
fn live_output() -> (Option<OutputSink>, Option<Printer>) {
    let (sink, mut chunks) = mpsc::channel(CHUNKS_WAITING);
    let printer = tokio::task::spawn_blocking(move || {
        let mut unfinished = false;
        while let Some(chunk) = chunks.blocking_recv() {
            // A reader that went away (`| head`) doesn't stop the program.
            match chunk {
                Chunk::Stdout(bytes) => {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(&bytes).and_then(|()| stdout.flush()).ok();
                }
                Chunk::Stderr(bytes) => {
                    io::stderr().write_all(&bytes).ok();
                    unfinished = exit::is_unfinished(&bytes);
                }
            }
        }
        unfinished
    });
    (Some(sink), Some(printer))
}

async fn cancel_on_signal(mut signals: Signals, stop: StopHandle) {
    signals.any().await;
    stop.stop();
    // Dropping the handle would say the same again.
    std::future::pending::<()>().await;
}

fn show(args: &RunArgs, response: &ServeResponse, unfinished: bool) -> ExitCode {
    let report = response.report.clone().unwrap_or_default();
    let mut unfinished = unfinished;
    if args.json {
        writeln!(io::stdout(), "{:#}", json::report(response)).ok();
    } else if report.verdict() == Verdict::Completed {
        // What a service says isn't seen before it answers.
        io::stdout().write_all(&output_bytes(response.output.as_ref())).ok();
        io::stderr().write_all(&report.stderr).ok();
        unfinished = exit::is_unfinished(&report.stderr);
    }
    io::stdout().flush().ok();
    exit::finish(&report, &response.status.clone().unwrap_or_default(), unfinished)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::testing;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        run: RunArgs,
    }

    #[test]
    fn a_grpc_policy_needs_names() {
        let set = |protocol| {
            let mut set = testing::policy_set([testing::policy("demo")]);
            set.policies.get_mut("demo").unwrap().base.protocol = protocol;
            set
        };
        let check = |words: &[&str], protocol| {
            let args = Cli::parse_from([&["run"], words, &["./binary"]].concat()).run;
            check_names(&args, &set(protocol), "demo").is_ok()
        };
        let (service, method) = (["--service", "a.B"], ["--method", "C"]);
        for some in [&[][..], &service, &method] {
            assert!(!check(some, Protocol::Grpc), "{some:?}");
            assert!(check(some, Protocol::Exec), "{some:?}");
        }
        assert!(check(&[service, method].concat(), Protocol::Grpc));
    }
}
