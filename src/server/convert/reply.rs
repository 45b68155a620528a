//! How a call went, as messages and trailers.

use std::time::{Duration, SystemTime};

use super::status::{Summary, summarize};
use crate::{
    dispatch::Reply,
    execute::{Outcome, Verdict},
    jail::plan::Mode,
    names::RunId,
    wire::{self, status::Code},
};

/// Puts a reply on the wire; the summary also makes the trailers and the audit record.
#[must_use]
pub fn response(reply: Reply, executor_id: &str) -> (wire::ServeResponse, Summary) {
    let summary = summarize(&reply);
    let mut report = facts(&reply, summary.verdict);
    let mut output = None;
    if let Ok(finished) = reply.result {
        output = finished.output;
        let by_service = finished.service.is_some();
        add_outcome(&mut report, finished.outcome);
        if by_service {
            // An instance's is of many calls, at the same time.
            (report.user_time, report.system_time) = (None, None);
        }
    }
    let response = wire::ServeResponse {
        status: Some(status(&summary)),
        output,
        executor_id: executor_id.to_owned(),
        report: Some(report),
    };
    (response, summary)
}

/// A summary as `Status`.
#[must_use]
pub fn status(summary: &Summary) -> wire::Status {
    wire::Status {
        code: summary.code.into(),
        message: summary.message.clone(),
        details: summary.details.clone().into_iter().collect(),
    }
}

/// What Connect and Dispatch answer until they are built.
#[must_use]
pub fn not_built(what: &str) -> Summary {
    let mut details = std::collections::BTreeMap::new();
    details.insert("reason".to_owned(), "unimplemented".to_owned());
    Summary {
        code: Code::Unimplemented,
        verdict: Verdict::Refused,
        reason: Some("unimplemented"),
        message: format!("{what} is not implemented yet"),
        details,
        retry_after: None,
    }
}

/// A verdict's name, as the wire has it without its prefix.
#[must_use]
pub fn verdict_name(verdict: Verdict) -> &'static str {
    let name = wire_verdict(verdict).as_str_name();
    name.strip_prefix("VERDICT_").unwrap_or(name)
}

/// What every reply says of itself in its trailers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailers {
    /// `dispatcher-code`
    pub code: &'static str,
    /// `dispatcher-verdict`
    pub verdict: &'static str,
    /// `dispatcher-reason`; empty for success.
    pub reason: &'static str,
    /// `dispatcher-run-id`; empty where nothing was to run.
    pub run_id: String,
    /// `grpc-retry-pushback-ms`, on overload.
    pub retry_pushback_ms: Option<u64>,
}

impl Trailers {
    /// The trailers of a reply that sums up so.
    #[must_use]
    pub fn of(summary: &Summary, run: Option<RunId>) -> Self {
        let milliseconds = |after: Duration| after.as_nanos().div_ceil(1_000_000);
        Self {
            code: summary.code.as_str_name(),
            verdict: verdict_name(summary.verdict),
            reason: summary.reason.unwrap_or_default(),
            run_id: run.map(|run| run.to_string()).unwrap_or_default(),
            retry_pushback_ms: summary
                .retry_after
                .map(|after| u64::try_from(milliseconds(after)).unwrap_or(u64::MAX)),
        }
    }
}

fn facts(reply: &Reply, verdict: Verdict) -> wire::ExecutionReport {
    let facts = &reply.facts;
    let text = |digest: &crate::names::Digest| digest.to_string();
    let (policy, policy_digest) = facts.policy.clone().unzip();
    wire::ExecutionReport {
        verdict: wire_verdict(verdict).into(),
        mode: facts.mode.map_or(wire::ExecutionMode::Unspecified, wire_mode).into(),
        queue_time: Some(wire_duration(facts.queue_time)),
        artifact_digest: facts.artifact.as_ref().map(text).unwrap_or_default(),
        policy: policy.unwrap_or_default(),
        policy_digest: policy_digest.as_ref().map(text).unwrap_or_default(),
        policy_set_digest: facts.policy_set.as_ref().map(text).unwrap_or_default(),
        run_id: facts.run.to_string(),
        dispatcher_version: env!("CARGO_PKG_VERSION").to_owned(),
        ignored_context: facts.ignored_context.clone(),
        warm: facts.warm,
        ..wire::ExecutionReport::default()
    }
}

fn add_outcome(report: &mut wire::ExecutionReport, outcome: Outcome) {
    report.exit_code = outcome.exit_code;
    report.signal = outcome.signal;
    report.setup_time = Some(wire_duration(outcome.setup));
    report.wall_time = Some(wire_duration(outcome.wall));
    report.user_time = Some(wire_duration(outcome.user));
    report.system_time = Some(wire_duration(outcome.system));
    report.memory_peak_bytes = outcome.memory_peak;
    report.pids_peak = outcome.pids_peak;
    report.stderr = outcome.stderr;
    report.stdout_truncated = outcome.stdout_truncated;
    report.stderr_truncated = outcome.stderr_truncated;
    report.enforced = outcome.enforced.iter().map(ToString::to_string).collect();
    report.enforced.extend(outcome.runtime.map(|name| format!("runtime:{name}")));
    report.denied_syscall = outcome.denied_syscall;
    report.refused_syscalls = outcome.refused_syscalls;
    report.start_time = Some(wire_time(outcome.started));
}

fn wire_verdict(verdict: Verdict) -> wire::Verdict {
    match verdict {
        Verdict::Exited => wire::Verdict::Exited,
        Verdict::Signalled => wire::Verdict::Signalled,
        Verdict::TimedOut => wire::Verdict::TimedOut,
        Verdict::CpuTimeExceeded => wire::Verdict::CpuTimeExceeded,
        Verdict::OutOfMemory => wire::Verdict::OutOfMemory,
        Verdict::OutputExceeded => wire::Verdict::OutputExceeded,
        Verdict::SyscallDenied => wire::Verdict::SyscallDenied,
        Verdict::Cancelled => wire::Verdict::Cancelled,
        Verdict::Refused => wire::Verdict::Refused,
        Verdict::Failed => wire::Verdict::Failed,
        Verdict::Completed => wire::Verdict::Completed,
    }
}

fn wire_mode(mode: Mode) -> wire::ExecutionMode {
    match mode {
        Mode::Direct => wire::ExecutionMode::Direct,
        Mode::Container => wire::ExecutionMode::Container,
        Mode::Jail => wire::ExecutionMode::Jail,
    }
}

fn wire_duration(duration: Duration) -> prost_types::Duration {
    // A duration that does not fit has stopped meaning anything.
    duration.try_into().unwrap_or(prost_types::Duration { seconds: i64::MAX, nanos: 0 })
}

fn wire_time(time: SystemTime) -> prost_types::Timestamp {
    time.into()
}
