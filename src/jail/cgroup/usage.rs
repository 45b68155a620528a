//! The figures that cgroups give.

use std::time::Duration;

/// CPU time of a whole tree of processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuUsage {
    /// In user mode.
    pub user: Duration,
    /// In the kernel.
    pub system: Duration,
}

impl CpuUsage {
    /// User and system together.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.user + self.system
    }

    /// What was used since `earlier`.
    #[must_use]
    pub(super) fn since(&self, earlier: &Self) -> Self {
        Self {
            user: self.user.saturating_sub(earlier.user),
            system: self.system.saturating_sub(earlier.system),
        }
    }
}

/// What a run used, from [`start_measuring`](super::Cgroup::start_measuring) to its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in user mode.
    pub user: Duration,
    /// CPU time in the kernel.
    pub system: Duration,
    /// Highest memory use in bytes, as the limit counts it: processes, kernel
    /// memory, tmpfs and page cache, init's share included. 0 where no memory
    /// controller could be had. Linux before 6.12 with v2 cannot forget the
    /// setup's peak: a program that stays below it is reported with it.
    pub memory_peak: u64,
    /// Highest number of tasks, init excluded, at least 1. Where the kernel
    /// keeps no peak (before 6.1), the highest that was seen by looking.
    pub pids_peak: u32,
}

/// Memory kills of one cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OomCounts {
    /// How many.
    pub(super) kills: u64,
    /// Whether its own limit was what ran out.
    pub(super) own_limit: bool,
}
