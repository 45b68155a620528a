//! THE map: how a call went → code, verdict, reason, message and details.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    admission::AdmissionError,
    artifact::{ArtifactError, elf::ElfError},
    call::FormError,
    dispatch::{CallError, Finished, Reply, rules::Terms},
    execute::{ExecuteError, Outcome, Verdict},
    instances::NotServed,
    jail::{
        message::{Exhausted, Refusal, StopCause},
        plan::Control,
    },
    units::{Limit, Size, Span},
    wire::status::Code,
};

/// gRPC's code as `Status.code`: the names are the same, the numbers are not.
#[must_use]
pub fn code_of(code: tonic::Code) -> Code {
    match code {
        tonic::Code::Ok => Code::Ok,
        tonic::Code::Cancelled => Code::Cancelled,
        tonic::Code::Unknown => Code::Unknown,
        tonic::Code::InvalidArgument => Code::InvalidArgument,
        tonic::Code::DeadlineExceeded => Code::DeadlineExceeded,
        tonic::Code::NotFound => Code::NotFound,
        tonic::Code::AlreadyExists => Code::AlreadyExists,
        tonic::Code::PermissionDenied => Code::PermissionDenied,
        tonic::Code::ResourceExhausted => Code::ResourceExhausted,
        tonic::Code::FailedPrecondition => Code::FailedPrecondition,
        tonic::Code::Aborted => Code::Aborted,
        tonic::Code::OutOfRange => Code::OutOfRange,
        tonic::Code::Unimplemented => Code::Unimplemented,
        tonic::Code::Internal => Code::Internal,
        tonic::Code::Unavailable => Code::Unavailable,
        tonic::Code::DataLoss => Code::DataLoss,
        tonic::Code::Unauthenticated => Code::Unauthenticated,
    }
}

/// When to come again where the host itself ran out of something.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The call was stopped, for its caller or with the whole service.
pub(super) const CANCELLED: &str = "cancelled";
const DRAINING: &str = "draining";

/// How a call went, in the contract's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// `Status.code`
    pub code: Code,
    /// The report's verdict.
    pub verdict: Verdict,
    /// `details.reason`; `None` for success.
    pub reason: Option<&'static str>,
    /// `Status.message`; empty for success.
    pub message: String,
    /// `details`, the reason included.
    pub details: BTreeMap<String, String>,
    /// On overload: when to come again.
    pub retry_after: Option<Duration>,
}

/// Sums up a call.
#[must_use]
pub fn summarize(reply: &Reply) -> Summary {
    let summary = match &reply.result {
        Ok(finished) => {
            let terms = reply.facts.terms.as_ref();
            match &finished.service {
                Some(service) => super::service::summarize(&finished.outcome, service, terms),
                None => ran(finished, terms),
            }
        }
        Err(error) => refused(error),
    };
    // Its caller is still there, and is to try elsewhere.
    if reply.facts.draining && summary.reason == Some(CANCELLED) {
        let message = "the dispatcher was being stopped, and the call with it".to_owned();
        let told = Summary { code: Code::Unavailable, reason: Some(DRAINING), message, ..summary };
        return told.with("reason", DRAINING);
    }
    summary
}

impl Summary {
    pub(super) fn new(
        code: Code,
        verdict: Verdict,
        reason: &'static str,
        message: impl ToString,
    ) -> Self {
        Self {
            code,
            verdict,
            reason: Some(reason),
            message: message.to_string(),
            details: BTreeMap::from([("reason".to_owned(), reason.to_owned())]),
            retry_after: None,
        }
    }

    fn refused(code: Code, reason: &'static str, message: impl ToString) -> Self {
        Self::new(code, Verdict::Refused, reason, message)
    }

    fn failed(message: impl ToString) -> Self {
        Self::new(Code::Internal, Verdict::Failed, "internal", message)
    }

    pub(super) fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.details.insert(key.to_owned(), value.to_string());
        self
    }

    /// Names the limit that was gone over and, where it has one, its value.
    pub(super) fn over(self, limit: &str, allowed: Option<String>) -> Self {
        let named = self.with("limit", limit);
        match allowed {
            Some(allowed) => named.with("allowed", allowed),
            None => named,
        }
    }

    fn retry(mut self, after: Duration) -> Self {
        // Rounded up: who comes back on time is not to come too early.
        let milliseconds = after.as_nanos().div_ceil(1_000_000);
        self.retry_after = Some(after);
        self.with("retry_after_ms", milliseconds)
    }
}

/// A program that was started.
pub(super) fn ran(finished: &Finished, terms: Option<&Terms>) -> Summary {
    let outcome = &finished.outcome;
    let verdict = outcome.verdict;
    let summary = |code, reason, message: String| Summary::new(code, verdict, reason, message);
    let size =
        |limit: Option<Limit<u64>>| limit.and_then(Limit::finite).map(|l| Size(l).to_string());
    let with_status = |summary: Summary| match outcome.signal {
        0 => summary,
        signal => summary.with("signal", signal),
    };
    match verdict {
        Verdict::Exited if outcome.exit_code == 0 && finished.output_fits => Summary {
            code: Code::Ok,
            verdict,
            reason: None,
            message: String::new(),
            details: BTreeMap::new(),
            retry_after: None,
        },
        Verdict::Exited if outcome.exit_code == 0 => {
            let text = "the program's output is not a serialized google.protobuf.Any";
            summary(Code::DataLoss, "bad_output", text.to_owned())
        }
        Verdict::Exited => {
            let code = outcome.exit_code;
            let text = format!("the program exited with code {code}");
            summary(Code::Unknown, "exit_nonzero", text).with("exit_code", code)
        }
        Verdict::Signalled => {
            let text = format!("the program was ended by {}", signal_name(outcome.signal));
            summary(Code::Unknown, "signalled", text).with("signal", outcome.signal)
        }
        Verdict::TimedOut => with_status(timed_out("program ran", outcome, terms)),
        Verdict::CpuTimeExceeded => {
            let limit =
                terms.and_then(|terms| terms.cpu_time.finite()).map(|l| Span(l).to_string());
            let text = "the program used more processor time than it may".to_owned();
            with_status(summary(Code::ResourceExhausted, "cpu_time", text).over("cpu_time", limit))
        }
        Verdict::OutOfMemory => {
            let limit = size(terms.map(|terms| terms.memory));
            let text = "the program needed more memory than it may have".to_owned();
            with_status(
                summary(Code::ResourceExhausted, "out_of_memory", text).over("memory", limit),
            )
        }
        Verdict::OutputExceeded => {
            let limit = size(terms.map(|terms| terms.output_size));
            let text = "the program wrote more to standard output than it may".to_owned();
            with_status(summary(Code::ResourceExhausted, "output", text).over("output", limit))
        }
        Verdict::SyscallDenied => {
            let text = match outcome.denied_syscall.as_str() {
                "" => "the program made a forbidden system call; which is not known: container \
                       mode can't tell, a jail can"
                    .to_owned(),
                name => format!("the program made the forbidden system call {name}"),
            };
            with_status(summary(Code::PermissionDenied, "syscall_denied", text))
        }
        Verdict::Cancelled => {
            let text = "the call was cancelled while the program ran".to_owned();
            with_status(summary(Code::Cancelled, CANCELLED, text))
        }
        Verdict::Failed | Verdict::Refused | Verdict::Completed => {
            let (reason, text) =
                outcome.failure.clone().unwrap_or(("internal", "no outcome".to_owned()));
            let code = match reason {
                "launcher_lost" | "docker_unavailable" => Code::Unavailable,
                _ => Code::Internal,
            };
            Summary::new(code, Verdict::Failed, reason, text)
        }
    }
}

pub(super) fn timed_out(who: &str, outcome: &Outcome, terms: Option<&Terms>) -> Summary {
    let limit = terms.and_then(|terms| terms.timeout.finite());
    let by_deadline = limit.is_none_or(|limit| outcome.wall + Duration::from_millis(10) < limit);
    let text = match limit {
        Some(limit) if !by_deadline => format!("the {who} longer than {}", Span(limit)),
        _ => format!("the call's deadline came after {:.3} s", outcome.wall.as_secs_f64()),
    };
    let summary = Summary::new(Code::DeadlineExceeded, Verdict::TimedOut, "timeout", text);
    summary.over("timeout", limit.filter(|_| !by_deadline).map(|limit| Span(limit).to_string()))
}

pub(super) fn signal_name(signal: i32) -> String {
    match nix::sys::signal::Signal::try_from(signal) {
        Ok(name) => format!("signal {signal} ({name})"),
        Err(_) => format!("signal {signal}"),
    }
}

/// A call that came to nothing.
fn refused(error: &CallError) -> Summary {
    use CallError as E;
    match error {
        E::Form(error) => malformed(error),
        E::NoPolicy(_) => Summary::refused(Code::PermissionDenied, "no_policy", error),
        E::ServiceNotAllowed { .. } => {
            Summary::refused(Code::PermissionDenied, "service_not_allowed", error)
        }
        E::ModeNotAllowed { mode, .. } => {
            Summary::refused(Code::PermissionDenied, "mode_not_allowed", error)
                .with("requested", mode)
        }
        E::SourceNotAllowed { .. } => {
            Summary::refused(Code::PermissionDenied, "source_not_allowed", error)
        }
        E::DigestNotAllowed { digest, .. } => {
            Summary::refused(Code::PermissionDenied, "digest_not_allowed", error)
                .with("requested", digest)
        }
        E::EnvNotAllowed { name, .. } => {
            Summary::refused(Code::PermissionDenied, "env_not_allowed", error)
                .with("requested", name)
        }
        E::OverPolicy { limit, requested, allowed, .. } => {
            Summary::refused(Code::PermissionDenied, "over_policy", error)
                .over(limit, Some(allowed.clone()))
                .with("requested", requested)
        }
        E::ServiceNotFound(_) => Summary::refused(Code::NotFound, "service_not_found", error),
        E::Artifact(error) => no_artifact(error),
        E::Unimplemented(_) => Summary::refused(Code::Unimplemented, "unimplemented", error),
        E::Admission(error) => not_admitted(error),
        E::Execute(error) => not_executed(error),
        E::Service(NotServed::CrashLoop { retry_after, .. }) => {
            Summary::refused(Code::Unavailable, "crash_loop", error).retry(*retry_after)
        }
        E::Service(NotServed::TooMany { retry_after }) => {
            Summary::refused(Code::ResourceExhausted, "queue_full", error).retry(*retry_after)
        }
        E::Service(_) | E::Internal(_) => Summary::failed(error),
    }
}

fn malformed(error: &FormError) -> Summary {
    let (reason, field) = match error {
        FormError::Missing { field } => ("missing_field", field),
        FormError::Bad { field, .. } => ("bad_field", field),
    };
    Summary::refused(Code::InvalidArgument, reason, error).with("field", field)
}

fn no_artifact(error: &ArtifactError) -> Summary {
    use ArtifactError as E;
    let invalid = |reason| Summary::refused(Code::InvalidArgument, reason, error);
    match error {
        E::Empty | E::Elf(ElfError::Unknown(_) | ElfError::NotExecutable(_)) => {
            invalid("not_executable")
        }
        E::Elf(ElfError::WrongArchitecture { .. }) => invalid("wrong_architecture"),
        E::LoaderMissing(_) => invalid("loader_missing"),
        E::ScriptUnrunnable(_) => invalid("script_not_allowed"),
        E::ScriptNotAllowed { interpreter } => {
            invalid("script_not_allowed").with("requested", interpreter)
        }
        E::DigestMismatch { expected, .. } => {
            invalid("digest_mismatch").with("requested", expected)
        }
        E::DigestNotAllowed { found } => {
            Summary::refused(Code::PermissionDenied, "digest_not_allowed", error)
                .with("requested", found)
        }
        E::TooLarge { size, limit } => {
            Summary::refused(Code::ResourceExhausted, "artifact_too_large", error)
                .over("artifact_size", Some(Size(*limit).to_string()))
                .with("requested", Size(*size))
        }
        E::Missing(digest) => {
            Summary::refused(Code::NotFound, "artifact_missing", error).with("requested", digest)
        }
        E::Internal { .. } => Summary::failed(error),
    }
}

fn not_admitted(error: &AdmissionError) -> Summary {
    use AdmissionError as E;
    let overload = |reason, after: &Duration| {
        Summary::refused(Code::ResourceExhausted, reason, error).retry(*after)
    };
    match error {
        E::QueueFull { retry_after, .. } => overload("queue_full", retry_after),
        E::QueueTimeout { retry_after, .. } => overload("queue_timeout", retry_after),
        E::NeverFits { asked, budget } => {
            Summary::refused(Code::FailedPrecondition, "control_unavailable", error)
                .with("control", Control::CgroupMemory)
                .over("memory", Some(Size(*budget).to_string()))
                .with("requested", Size(*asked))
        }
        E::RateExceeded { retry_after, .. } => overload("rate_exceeded", retry_after),
        E::Deadline => Summary::refused(Code::DeadlineExceeded, "deadline_in_queue", error),
        E::Stopped => Summary::new(Code::Cancelled, Verdict::Cancelled, CANCELLED, error),
    }
}

fn not_executed(error: &ExecuteError) -> Summary {
    use ExecuteError as E;
    match error {
        E::Refused(refusal) => not_launched(refusal),
        E::LauncherLost => Summary::new(Code::Unavailable, Verdict::Failed, "launcher_lost", error),
        E::Stopped(StopCause::Timeout) => {
            let text = "the deadline passed before the program started";
            Summary::refused(Code::DeadlineExceeded, "deadline_in_queue", text)
        }
        E::Stopped(_) => Summary::new(Code::Cancelled, Verdict::Cancelled, CANCELLED, error),
        E::Stuck(_) | E::Internal { .. } => Summary::failed(error),
    }
}

fn not_launched(refusal: &Refusal) -> Summary {
    match refusal {
        Refusal::StalePolicy => Summary::failed("the policies changed again and again"),
        Refusal::Invalid { what } => Summary::failed(format!("the launcher refused: {what}")),
        Refusal::ControlUnavailable { control, why } => {
            let text =
                format!("this host can't enforce {control}, which the policy demands: {why}");
            Summary::refused(Code::FailedPrecondition, "control_unavailable", text)
                .with("control", control)
        }
        Refusal::Exec { errno } => not_executable(*errno),
        Refusal::Exhausted(what) => {
            let text = match what {
                Exhausted::HostIds => "all host user ids of [server] uid_range are in use",
                Exhausted::Descriptors => {
                    "the runs at work take all descriptors that the launcher may have open; \
                     a higher LimitNOFILE= gives room for more"
                }
            };
            Summary::refused(Code::ResourceExhausted, "queue_full", text).retry(RETRY_AFTER)
        }
        Refusal::Ending => {
            let text = "the launcher is ending; send the call again";
            Summary::new(Code::Unavailable, Verdict::Failed, "launcher_lost", text)
        }
        Refusal::DockerUnavailable { why } => {
            Summary::refused(Code::Unavailable, "docker_unavailable", why)
        }
        Refusal::Docker { why } => {
            Summary::refused(Code::FailedPrecondition, "docker_refused", why)
        }
        Refusal::Image { why } => {
            Summary::refused(Code::FailedPrecondition, "image_unavailable", why)
        }
        Refusal::Step { step, index, errno } => {
            let error = std::io::Error::from_raw_os_error(*errno);
            Summary::failed(format!("launch step {step} {index} failed: {error}"))
        }
    }
}

/// What execve(2) itself refused.
fn not_executable(errno: i32) -> Summary {
    let error = std::io::Error::from_raw_os_error(errno);
    let invalid = |reason, text: &str| {
        Summary::refused(Code::InvalidArgument, reason, format!("{text}: {error}"))
    };
    match errno {
        libc::ENOENT => {
            invalid("loader_missing", "the executable's loader or interpreter is not in the root")
        }
        // The last one is of what it names as its loader.
        libc::ENOEXEC | libc::ELIBBAD | libc::EINVAL | libc::EACCES => {
            invalid("not_executable", "the artifact can't be executed")
        }
        libc::E2BIG => {
            invalid("bad_field", "argv and environment are too large").with("field", "options.args")
        }
        _ => Summary::failed(format!("the program could not be executed: {error}")),
    }
}
