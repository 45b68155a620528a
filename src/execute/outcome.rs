//! Which verdict: the contract's order of precedence, in one place.

use std::time::SystemTime;

use bytes::Bytes;

use super::{Outcome, Verdict};
use crate::{
    jail::{
        message::{End, Oom, StopCause, WaitStatus},
        plan::Control,
    },
    units::Limit,
};

/// What a run wrote.
#[derive(Clone, Debug, Default)]
pub(super) struct Captured {
    pub(super) stdout: Bytes,
    pub(super) stdout_truncated: bool,
    pub(super) stderr: Bytes,
    pub(super) stderr_truncated: bool,
}

/// Makes the outcome of what the launcher told and what was captured. `None`
/// for an end that the launcher did not live to tell.
pub(super) fn of(
    end: Option<End>,
    captured: Captured,
    started: SystemTime,
    output_limit: Limit<u64>,
) -> Outcome {
    let Some(end) = end else { return lost(captured, started) };
    let (verdict, failure) = verdict(&end, captured.stdout_truncated);
    let (exit_code, signal) = match end.status {
        WaitStatus::Exited(code) => (code, 0),
        WaitStatus::Signalled(signal) => (0, signal),
        WaitStatus::Unknown => (0, 0),
    };
    let mut enforced = end.enforced;
    if output_limit.finite().is_some() && !enforced.contains(&Control::Output) {
        enforced.push(Control::Output);
    }
    Outcome {
        verdict,
        exit_code,
        signal,
        stdout: captured.stdout,
        stdout_truncated: captured.stdout_truncated,
        stderr: captured.stderr,
        stderr_truncated: captured.stderr_truncated,
        started,
        setup: end.setup,
        wall: end.wall,
        user: end.user,
        system: end.system,
        memory_peak: end.memory_peak,
        pids_peak: end.pids_peak,
        enforced,
        runtime: end.runtime,
        denied_syscall: end.denied_syscall.unwrap_or_default(),
        refused_syscalls: end.refused_syscalls,
        failure,
        quarantined: end.quarantined,
    }
}

/// (1) Who stopped it; else (2) a deadly call, (3) memory, (4) too much output,
/// and only then (5) how the program itself ended.
fn verdict(end: &End, output_exceeded: bool) -> (Verdict, Option<(&'static str, String)>) {
    let verdict = if let Some(cause) = end.stopped {
        match cause {
            StopCause::Timeout => Verdict::TimedOut,
            StopCause::CpuTime => Verdict::CpuTimeExceeded,
            StopCause::Output => Verdict::OutputExceeded,
            StopCause::Cancelled => Verdict::Cancelled,
            StopCause::Syscall => Verdict::SyscallDenied,
        }
    } else if let Some(why) = &end.lost {
        return (Verdict::Failed, Some(("docker_unavailable", why.clone())));
    } else if end.denied_syscall.is_some() {
        Verdict::SyscallDenied
    } else if end.oom == Oom::Own {
        Verdict::OutOfMemory
    } else if end.oom == Oom::Host {
        let text = "the host ran out of memory, not the program's own limit";
        return (Verdict::Failed, Some(("host_memory", text.to_owned())));
    } else if output_exceeded {
        Verdict::OutputExceeded
    } else {
        match end.status {
            WaitStatus::Exited(_) => Verdict::Exited,
            WaitStatus::Signalled(_) => Verdict::Signalled,
            WaitStatus::Unknown => {
                let text = "the program's end was not seen";
                return (Verdict::Failed, Some(("internal", text.to_owned())));
            }
        }
    };
    (verdict, None)
}

fn lost(captured: Captured, started: SystemTime) -> Outcome {
    Outcome {
        stdout: captured.stdout,
        stdout_truncated: captured.stdout_truncated,
        stderr: captured.stderr,
        stderr_truncated: captured.stderr_truncated,
        wall: started.elapsed().unwrap_or_default(),
        failure: Some(("launcher_lost", "the launcher died under the run".to_owned())),
        ..Outcome::unknown(Verdict::Failed, started)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::execute::fake::exited;

    fn judge(change: impl FnOnce(&mut End), output_exceeded: bool) -> Verdict {
        let mut end = exited(0);
        change(&mut end);
        verdict(&end, output_exceeded).0
    }

    #[test]
    fn the_first_kill_comes_before_everything() {
        for (cause, expected) in [
            (StopCause::Timeout, Verdict::TimedOut),
            (StopCause::CpuTime, Verdict::CpuTimeExceeded),
            (StopCause::Output, Verdict::OutputExceeded),
            (StopCause::Cancelled, Verdict::Cancelled),
            (StopCause::Syscall, Verdict::SyscallDenied),
        ] {
            let all_at_once = |end: &mut End| {
                end.stopped = Some(cause);
                end.denied_syscall = Some("unshare".into());
                end.oom = Oom::Own;
                end.status = WaitStatus::Signalled(9);
            };
            assert_eq!(judge(all_at_once, true), expected);
        }
    }

    #[test]
    fn then_the_deadly_call_then_memory_then_output_then_the_status() {
        let mut end = exited(0);
        end.denied_syscall = Some(String::new());
        end.oom = Oom::Own;
        assert_eq!(verdict(&end, true).0, Verdict::SyscallDenied);
        end.denied_syscall = None;
        assert_eq!(verdict(&end, true).0, Verdict::OutOfMemory);
        end.oom = Oom::Host;
        let (failed, why) = verdict(&end, true);
        assert_eq!((failed, why.unwrap().0), (Verdict::Failed, "host_memory"));
        end.oom = Oom::None;
        assert_eq!(verdict(&end, true).0, Verdict::OutputExceeded);
        assert_eq!(verdict(&end, false).0, Verdict::Exited);
        end.status = WaitStatus::Signalled(11);
        assert_eq!(verdict(&end, false).0, Verdict::Signalled);
        end.status = WaitStatus::Unknown;
        assert_eq!(verdict(&end, false).0, Verdict::Failed);
    }

    #[test]
    fn output_is_listed_as_enforced_only_where_it_is_limited() {
        let outcome = |limit| of(Some(exited(3)), Captured::default(), SystemTime::now(), limit);
        assert_eq!(outcome(Limit::At(9)).enforced.last(), Some(&Control::Output));
        assert!(!outcome(Limit::Unlimited).enforced.contains(&Control::Output));
        assert_eq!(outcome(Limit::Unlimited).exit_code, 3);
    }
}
