//! How calls went, as replies.

use super::*;

fn outcome(verdict: Verdict) -> Outcome {
    Outcome {
        verdict,
        exit_code: 0,
        signal: 0,
        stdout: "out".into(),
        stdout_truncated: false,
        stderr: "err".into(),
        stderr_truncated: true,
        started: SystemTime::UNIX_EPOCH,
        setup: Duration::from_micros(300),
        wall: Duration::from_secs(30),
        user: Duration::from_millis(5),
        system: Duration::from_millis(6),
        memory_peak: 7,
        pids_peak: 8,
        enforced: vec![Control::NsUser, Control::Landlock(5)],
        runtime: Some("runsc".into()),
        denied_syscall: String::new(),
        refused_syscalls: Vec::new(),
        failure: None,
        quarantined: false,
    }
}

fn reply(result: Result<Finished, CallError>) -> Reply {
    let policy = testing::policy("demo");
    let facts = Facts {
        run: "00112233445566778899aabbccddeeff".parse().unwrap(),
        queue_time: Duration::from_millis(3),
        mode: Some(Mode::Jail),
        artifact: Some(Digest::of(b"x")),
        policy: Some(("demo".into(), policy.digest)),
        policy_set: Some(Digest::of(b"set")),
        terms: Some(rules::decide(&testing::call(), &policy).unwrap()),
        ignored_context: vec!["x".into()],
        warm: false,
        draining: false,
    };
    Reply { facts, result }
}

fn finished(verdict: Verdict) -> Finished {
    let output = Some(prost_types::Any::default());
    Finished { outcome: outcome(verdict), output, output_fits: true, service: None }
}

fn ran(verdict: Verdict, change: impl FnOnce(&mut Finished)) -> Summary {
    let mut finished = finished(verdict);
    change(&mut finished);
    summarize(&reply(Ok(finished)))
}

#[track_caller]
fn assert_row(summary: &Summary, code: Code, verdict: Verdict, reason: &str) {
    assert_eq!((summary.code, summary.verdict), (code, verdict), "{summary:?}");
    assert_eq!(summary.reason.unwrap_or_default(), reason);
    assert_eq!(summary.details.get("reason").map_or("", |text| text), reason);
    assert_eq!(summary.message.is_empty(), reason.is_empty());
}

#[track_caller]
fn assert_details(summary: &Summary, expected: &[(&str, &str)]) {
    for (key, value) in expected {
        assert_eq!(summary.details.get(*key).map(String::as_str), Some(*value), "{summary:?}");
    }
    assert_eq!(summary.details.len(), expected.len() + 1, "and the reason: {summary:?}");
}

/// Who waits for an answer can have it from another dispatcher.
#[test]
fn calls_stopped_at_the_end_of_a_drain_are_not_their_callers_doing() {
    let mut cancelled = finished(Verdict::Cancelled);
    cancelled.outcome.signal = 9;
    let stopped = CallError::Admission(AdmissionError::Stopped);
    for (result, details) in [(Ok(cancelled), &[("signal", "9")][..]), (Err(stopped), &[])] {
        let mut reply = reply(result);
        assert_row(&summarize(&reply), Code::Cancelled, Verdict::Cancelled, "cancelled");
        reply.facts.draining = true;
        let summary = summarize(&reply);
        assert_row(&summary, Code::Unavailable, Verdict::Cancelled, "draining");
        assert_details(&summary, details);
    }
    // One that was done before is what it was.
    let mut reply = reply(Ok(finished(Verdict::Exited)));
    reply.facts.draining = true;
    assert_row(&summarize(&reply), Code::Ok, Verdict::Exited, "");
}

#[test]
fn rows_of_programs_that_ran() {
    assert_row(&ran(Verdict::Exited, |_| {}), Code::Ok, Verdict::Exited, "");

    let nonzero = ran(Verdict::Exited, |finished| finished.outcome.exit_code = 3);
    assert_row(&nonzero, Code::Unknown, Verdict::Exited, "exit_nonzero");
    assert_details(&nonzero, &[("exit_code", "3")]);

    let signalled = ran(Verdict::Signalled, |finished| finished.outcome.signal = 11);
    assert_row(&signalled, Code::Unknown, Verdict::Signalled, "signalled");
    assert_details(&signalled, &[("signal", "11")]);
    assert!(signalled.message.contains("SIGSEGV"));

    let killed = |verdict| ran(verdict, |finished| finished.outcome.signal = 9);
    let timeout = killed(Verdict::TimedOut);
    assert_row(&timeout, Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
    assert_details(&timeout, &[("limit", "timeout"), ("allowed", "30s"), ("signal", "9")]);
    let deadline = ran(Verdict::TimedOut, |f| f.outcome.wall = Duration::from_secs(1));
    assert_row(&deadline, Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
    assert_details(&deadline, &[("limit", "timeout")]);

    for (verdict, reason, limit, allowed) in [
        (Verdict::CpuTimeExceeded, "cpu_time", "cpu_time", "30s"),
        (Verdict::OutOfMemory, "out_of_memory", "memory", "512MiB"),
        (Verdict::OutputExceeded, "output", "output", "3MiB"),
    ] {
        let summary = killed(verdict);
        assert_row(&summary, Code::ResourceExhausted, verdict, reason);
        assert_details(&summary, &[("limit", limit), ("allowed", allowed), ("signal", "9")]);
    }
    assert_row(
        &ran(Verdict::OutOfMemory, |_| {}),
        Code::ResourceExhausted,
        Verdict::OutOfMemory,
        "out_of_memory",
    );

    let denied = ran(Verdict::SyscallDenied, |f| f.outcome.denied_syscall = "unshare".into());
    assert_row(&denied, Code::PermissionDenied, Verdict::SyscallDenied, "syscall_denied");
    assert!(denied.message.contains("unshare"));
    let cancelled = ran(Verdict::Cancelled, |_| {});
    assert_row(&cancelled, Code::Cancelled, Verdict::Cancelled, "cancelled");

    let unparsed = ran(Verdict::Exited, |finished| finished.output_fits = false);
    assert_row(&unparsed, Code::DataLoss, Verdict::Exited, "bad_output");
    let both = ran(Verdict::Exited, |finished| {
        finished.output_fits = false;
        finished.outcome.exit_code = 1;
    });
    assert_row(&both, Code::Unknown, Verdict::Exited, "exit_nonzero");

    for (reason, code) in [
        ("host_memory", Code::Internal),
        ("internal", Code::Internal),
        ("launcher_lost", Code::Unavailable),
    ] {
        let failed = ran(Verdict::Failed, |f| f.outcome.failure = Some((reason, "text".into())));
        assert_row(&failed, code, Verdict::Failed, reason);
    }
}

#[test]
fn rows_of_calls_that_never_ran() {
    use Code::{
        Cancelled, DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument, NotFound,
        PermissionDenied, ResourceExhausted, Unavailable, Unimplemented,
    };
    let digest = Digest::of(b"x");
    let policy = || "demo".to_owned();
    let after = Duration::from_micros(1500);
    let elf = |bytes: &[u8]| ArtifactError::from(elf::inspect(bytes).unwrap_err());
    let mut other_machine = elf::sample(None);
    other_machine[18] = 40;
    let refused = |refusal| CallError::from(ExecuteError::Refused(refusal));
    let exec = |errno| refused(Refusal::Exec { errno });
    let step = Refusal::Step { step: "mounts".into(), index: 1, errno: libc::EPERM };
    let away = Refusal::DockerUnavailable { why: "x".into() };
    let sha = digest.to_string();
    let by_digest: &[(&str, &str)] = &[("requested", &sha)];
    let retry: &[(&str, &str)] = &[("retry_after_ms", "2")];
    type Row<'a> = (CallError, Code, &'static str, &'a [(&'a str, &'a str)]);
    let rows: Vec<Row<'_>> = vec![
        (
            FormError::Missing { field: "namespace" }.into(),
            InvalidArgument,
            "missing_field",
            &[("field", "namespace")],
        ),
        (
            FormError::bad("options.cpus", "is odd").into(),
            InvalidArgument,
            "bad_field",
            &[("field", "options.cpus")],
        ),
        (ArtifactError::Empty.into(), InvalidArgument, "not_executable", &[]),
        (elf(b"text").into(), InvalidArgument, "not_executable", &[]),
        (elf(b"\x7fELF").into(), InvalidArgument, "not_executable", &[]),
        (elf(&other_machine).into(), InvalidArgument, "wrong_architecture", &[]),
        (ArtifactError::LoaderMissing("x".into()).into(), InvalidArgument, "loader_missing", &[]),
        (
            ArtifactError::ScriptNotAllowed { interpreter: "/bin/sh".into() }.into(),
            InvalidArgument,
            "script_not_allowed",
            &[("requested", "/bin/sh")],
        ),
        (
            ArtifactError::DigestMismatch { expected: digest, found: digest }.into(),
            InvalidArgument,
            "digest_mismatch",
            by_digest,
        ),
        (CallError::NoPolicy("x".into()), PermissionDenied, "no_policy", &[]),
        (
            CallError::ServiceNotAllowed {
                policy: policy(),
                service: "a".into(),
                method: "b".into(),
            },
            PermissionDenied,
            "service_not_allowed",
            &[],
        ),
        (
            CallError::ModeNotAllowed { policy: policy(), mode: Mode::Direct },
            PermissionDenied,
            "mode_not_allowed",
            &[("requested", "direct")],
        ),
        (
            CallError::SourceNotAllowed { policy: policy(), what: "x".into() },
            PermissionDenied,
            "source_not_allowed",
            &[],
        ),
        (
            CallError::DigestNotAllowed { policy: policy(), digest },
            PermissionDenied,
            "digest_not_allowed",
            by_digest,
        ),
        (
            ArtifactError::DigestNotAllowed { found: digest }.into(),
            PermissionDenied,
            "digest_not_allowed",
            by_digest,
        ),
        (
            CallError::EnvNotAllowed { policy: policy(), name: "LD_PRELOAD".into() },
            PermissionDenied,
            "env_not_allowed",
            &[("requested", "LD_PRELOAD")],
        ),
        (
            CallError::OverPolicy {
                policy: policy(),
                limit: "memory",
                requested: "1GiB".into(),
                allowed: "512MiB".into(),
            },
            PermissionDenied,
            "over_policy",
            &[("limit", "memory"), ("requested", "1GiB"), ("allowed", "512MiB")],
        ),
        (CallError::ServiceNotFound("a/a/b".into()), NotFound, "service_not_found", &[]),
        (ArtifactError::Missing(digest).into(), NotFound, "artifact_missing", by_digest),
        (
            ArtifactError::TooLarge { size: 2048, limit: 1024 }.into(),
            ResourceExhausted,
            "artifact_too_large",
            &[("limit", "artifact_size"), ("requested", "2KiB"), ("allowed", "1KiB")],
        ),
        (
            AdmissionError::QueueFull { waiting: 1, retry_after: after }.into(),
            ResourceExhausted,
            "queue_full",
            retry,
        ),
        (
            AdmissionError::QueueTimeout { waited: after, retry_after: after }.into(),
            ResourceExhausted,
            "queue_timeout",
            retry,
        ),
        (
            AdmissionError::NeverFits { asked: 2 << 30, budget: 1 << 30 }.into(),
            FailedPrecondition,
            "control_unavailable",
            &[
                ("control", "cgroup.memory"),
                ("limit", "memory"),
                ("requested", "2GiB"),
                ("allowed", "1GiB"),
            ],
        ),
        (
            ArtifactError::ScriptUnrunnable("x".into()).into(),
            InvalidArgument,
            "script_not_allowed",
            &[],
        ),
        (
            AdmissionError::RateExceeded { per_second: "1".into(), retry_after: after }.into(),
            ResourceExhausted,
            "rate_exceeded",
            retry,
        ),
        (
            refused(Refusal::Exhausted(Exhausted::HostIds)),
            ResourceExhausted,
            "queue_full",
            &[("retry_after_ms", "1000")],
        ),
        (
            refused(Refusal::Exhausted(Exhausted::Descriptors)),
            ResourceExhausted,
            "queue_full",
            &[("retry_after_ms", "1000")],
        ),
        (
            refused(Refusal::ControlUnavailable {
                control: Control::CgroupMemory,
                why: "no cgroup".into(),
            }),
            FailedPrecondition,
            "control_unavailable",
            &[("control", "cgroup.memory")],
        ),
        (AdmissionError::Deadline.into(), DeadlineExceeded, "deadline_in_queue", &[]),
        (
            ExecuteError::Stopped(StopCause::Timeout).into(),
            DeadlineExceeded,
            "deadline_in_queue",
            &[],
        ),
        (exec(libc::ENOENT), InvalidArgument, "loader_missing", &[]),
        (exec(libc::ENOEXEC), InvalidArgument, "not_executable", &[]),
        (exec(libc::E2BIG), InvalidArgument, "bad_field", &[("field", "options.args")]),
        (CallError::Unimplemented("x".into()), Unimplemented, "unimplemented", &[]),
    ];
    for (error, code, reason, details) in rows {
        let summary = summarize(&reply(Err(error)));
        assert_row(&summary, code, Verdict::Refused, reason);
        assert_details(&summary, details);
    }
    let others: Vec<(CallError, Code, Verdict, &str)> = vec![
        (AdmissionError::Stopped.into(), Cancelled, Verdict::Cancelled, "cancelled"),
        (
            ExecuteError::Stopped(StopCause::Cancelled).into(),
            Cancelled,
            Verdict::Cancelled,
            "cancelled",
        ),
        (ExecuteError::LauncherLost.into(), Unavailable, Verdict::Failed, "launcher_lost"),
        (ExecuteError::Stuck("start").into(), Internal, Verdict::Failed, "internal"),
        (refused(Refusal::Ending), Unavailable, Verdict::Failed, "launcher_lost"),
        (refused(Refusal::StalePolicy), Internal, Verdict::Failed, "internal"),
        (refused(Refusal::Invalid { what: "x".into() }), Internal, Verdict::Failed, "internal"),
        (refused(step), Internal, Verdict::Failed, "internal"),
        (refused(away), Unavailable, Verdict::Refused, "docker_unavailable"),
        (exec(libc::EACCES), InvalidArgument, Verdict::Refused, "not_executable"),
        (CallError::Internal("x".into()), Internal, Verdict::Failed, "internal"),
    ];
    for (error, code, verdict, reason) in others {
        let summary = summarize(&reply(Err(error)));
        assert_row(&summary, code, verdict, reason);
        assert_details(&summary, &[]);
    }
}

#[test]
fn a_response_carries_output_and_report() {
    let output = prost_types::Any { type_url: "x".into(), value: vec![1] };
    let finished = Finished { output: Some(output.clone()), ..finished(Verdict::Exited) };
    let (response, _) = response(reply(Ok(finished)), "here");
    assert_eq!(response.executor_id, "here");
    assert_eq!(response.output, Some(output));
    let report = response.report.unwrap();
    assert_eq!(report.verdict(), wire::Verdict::Exited);
    assert_eq!(report.mode(), wire::ExecutionMode::Jail);
    assert_eq!(report.enforced, ["ns.user", "landlock.v5", "runtime:runsc"]);
    assert_eq!(report.run_id, "00112233445566778899aabbccddeeff");
    assert_eq!(report.artifact_digest, Digest::of(b"x").to_string());
    assert_eq!(report.policy_set_digest, Digest::of(b"set").to_string());
    assert_eq!((&report.policy[..], &report.stderr[..]), ("demo", &b"err"[..]));
    assert_eq!(report.wall_time.unwrap().seconds, 30);
    assert_eq!(report.queue_time.unwrap().nanos, 3_000_000);
    assert_eq!(report.start_time.unwrap().seconds, 0);
    assert_eq!((report.memory_peak_bytes, report.pids_peak), (7, 8));
    assert!(report.stderr_truncated && !report.stdout_truncated);
    assert_eq!(report.ignored_context, ["x"]);
}

#[test]
fn a_refusal_has_a_report_and_no_output() {
    let (response, summary) = response(reply(Err(CallError::NoPolicy("x".into()))), "here");
    assert!(response.output.is_none());
    let report = response.report.unwrap();
    assert_eq!(report.verdict(), wire::Verdict::Refused);
    assert!(report.start_time.is_none() && !report.run_id.is_empty());
    assert_eq!(response.status.unwrap().code(), Code::PermissionDenied);
    let run = RunId::random().unwrap();
    let trailers = Trailers::of(&summary, Some(run));
    assert_eq!((trailers.code, trailers.verdict), ("PERMISSION_DENIED", "REFUSED"));
    assert_eq!((trailers.reason, trailers.run_id), ("no_policy", run.to_string()));
    assert_eq!(trailers.retry_pushback_ms, None);
}
