//! When a run must be looked at: its wall clock, its processor time, and how long it may
//! take to be built or to be gone.

use std::time::{Duration, Instant};

use super::{Call, Phase, Run};
use crate::jail::{
    cgroup::Cgroup,
    message::StopCause,
    plan::Template,
    step::{Step, StepError},
};

/// Least time between two looks at a run's CPU time.
const CPU_STEP_MIN: Duration = Duration::from_millis(10);
/// Most time between two: a clock that stood still must not hide it.
const CPU_STEP_MAX: Duration = Duration::from_secs(60);

/// The processor time that a run of this template may use. One that lives for many calls
/// has no such limit.
#[must_use]
pub fn cpu_limit(template: &Template) -> Option<Duration> {
    template.limits.cpu_time.finite().filter(|_| !template.listens)
}

impl Run {
    /// When its processor time is looked at first.
    pub(super) fn first_cpu_check(&self, call: &Call, now: Instant) -> Option<Instant> {
        cpu_limit(&self.prepared.template).map(|limit| now + cpu_step(limit, call.cores))
    }

    /// The next moment at which [`Run::on_time`] must be called.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let clocks = [self.wall_deadline, self.cpu_check, self.grace_deadline];
        let pauses = [self.notices_resume, self.heed_at];
        clocks.into_iter().chain(pauses).flatten().min()
    }

    /// Whether its control socket is to be listened to again.
    pub fn heeds_from(&mut self, now: Instant) -> bool {
        self.heed_at.take_if(|at| *at <= now).is_some()
    }

    /// Acts on what is due. True when the run must now be answered for though
    /// it is not gone.
    pub fn on_time(&mut self, now: Instant) -> bool {
        if self.wall_deadline.is_some_and(|deadline| deadline <= now) {
            self.stop(StopCause::Timeout, now);
        }
        if self.cpu_check.is_some_and(|check| check <= now) {
            self.check_cpu(now);
        }
        if self.notices_resume.is_some_and(|resume| resume <= now) {
            self.notices_resume = None;
            self.on_listener(now);
        }
        if self.grace_deadline.is_some_and(|deadline| deadline <= now) {
            self.grace_deadline = None;
            if self.phase == Phase::Building {
                self.fail(
                    StepError { step: Step::Handshake, index: 2, errno: libc::ETIMEDOUT },
                    now,
                );
                return false;
            }
            if self.phase == Phase::Ending {
                self.phase = Phase::Quarantined;
                return true;
            }
        }
        false
    }

    /// Looks at the tree's CPU time and decides when to look next: no earlier
    /// than the limit could be reached, so a few looks are enough.
    fn check_cpu(&mut self, now: Instant) {
        let Some(limit) = cpu_limit(&self.prepared.template) else { return };
        let used = match self.cgroup.as_ref().map(Cgroup::cpu_usage) {
            Some(Ok(usage)) => usage.total(),
            // A limit that can't be watched is not in force: end the run.
            _ => limit,
        };
        if used >= limit {
            self.stop(StopCause::CpuTime, now);
        } else {
            let cores = self.call.as_ref().map_or(1.0, |call| call.cores);
            self.cpu_check = Some(now + cpu_step(limit - used, cores));
        }
    }
}

/// When a run that uses `cores` processors could have used `left` at the earliest.
fn cpu_step(left: Duration, cores: f64) -> Duration {
    Duration::try_from_secs_f64(left.as_secs_f64() / cores.max(0.001))
        .unwrap_or(CPU_STEP_MAX)
        .clamp(CPU_STEP_MIN, CPU_STEP_MAX)
}
