//! How a run went, in the words of the protocol.

use std::{
    io,
    time::{Duration, Instant},
};

use super::{Phase, Run};
use crate::jail::{
    cgroup::Cgroup,
    message::{End, Oom, Refusal},
    plan::Control,
    step::{Step, StepError},
};

impl Run {
    /// Whether the program was ever started, and did not fail on the way to exec.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        if let Some(error) = self.failure {
            return Some(refusal(error));
        }
        let untold = self.started.is_none()
            && self.stopped.is_none()
            && self.cgroup.as_ref().map(Cgroup::oom) != Some(Oom::Own);
        untold.then(|| refusal(StepError { step: Step::Clone, index: 1, errno: libc::ECHILD }))
    }

    /// How it ended. To be asked when it is gone, or when it is put in quarantine.
    #[must_use]
    pub fn outcome(&self, now: Instant) -> End {
        let ended = self.ended.unwrap_or(now);
        let started = self.started.unwrap_or(ended);
        let usage = self.cgroup.as_ref().map(Cgroup::usage).unwrap_or_default();
        End {
            status: self.status,
            stopped: self.stopped,
            oom: self.cgroup.as_ref().map_or(Oom::None, Cgroup::oom),
            denied_syscall: self.denied.clone(),
            refused_syscalls: self.refused.clone(),
            enforced: self.enforced_now(),
            runtime: None,
            lost: None,
            setup: self
                .call
                .as_ref()
                .map_or(Duration::ZERO, |call| started.saturating_duration_since(call.received)),
            wall: ended.saturating_duration_since(started),
            user: usage.user,
            system: usage.system,
            memory_peak: usage.memory_peak,
            pids_peak: usage.pids_peak,
            quarantined: self.phase == Phase::Quarantined,
        }
    }
}

impl Run {
    /// What is in force: before the filter, the last step but exec, nothing is complete.
    pub(super) fn enforced_now(&self) -> Vec<Control> {
        if self.filtered { self.enforced.clone() } else { Vec::new() }
    }
}

/// A failed step in the words of the answer.
pub fn refusal(error: StepError) -> Refusal {
    let StepError { step, index, errno } = error;
    let text = io::Error::from_raw_os_error(errno);
    let lacks = |control: Control, why: String| Refusal::ControlUnavailable { control, why };
    match step {
        Step::Exec => Refusal::Exec { errno },
        Step::Clone | Step::UserNamespace
            if matches!(errno, libc::EPERM | libc::ENOSPC | libc::EACCES) =>
        {
            lacks(
                Control::NsUser,
                format!(
                    "namespaces can't be made: {text}; `dispatcher doctor` tells what forbids it"
                ),
            )
        }
        Step::Maps => lacks(Control::NsUser, format!("ids can't be mapped: {text}")),
        Step::Sources | Step::Populate => lacks(
            Control::RootReadonly,
            format!("part {index} of the root can't be put in place ({step}): {text}"),
        ),
        Step::Proc => lacks(Control::ProcRestricted, format!("/proc can't be mounted: {text}")),
        Step::Landlock | Step::LandlockRules => {
            lacks(Control::Landlock(0), format!("landlock ({step} {index}): {text}"))
        }
        Step::MemfdNoexec => lacks(Control::MemfdNoexec, text.to_string()),
        _ => Refusal::Step { step: step.name().into(), index: u32::from(index), errno },
    }
}
