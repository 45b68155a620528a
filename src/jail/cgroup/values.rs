//! A run's limits, written by the cgroups-rs controllers, which know the file
//! names and forms of both versions.

use std::{error::Error as _, io, path::Path};

use cgroups_rs::fs::{MaxValue, cpu::CpuController, memory::MemController, pid::PidController};

use super::{Kind, Reason, files, mend, v2};
use crate::units::{Limit, MilliCpus};

/// The quota's period in µs. Shares below 1% need the long one: a quota is at least 1 ms.
const CPU_PERIOD: u64 = 100_000;
const CPU_PERIOD_LONG: u64 = 1_000_000;

/// Limits memory to `bytes`.
pub(super) fn memory(kind: Kind, directory: &Path, bytes: u64) -> Result<(), Reason> {
    let controller = MemController::new(directory.into(), "".into(), kind.is_unified());
    told("limiting memory", controller.set_limit(signed(bytes)))
}

/// Limits swap to `bytes` on top of the memory limit, which was set before.
///
/// Without swap accounting in the kernel a limit of 0 is kept where the host has
/// no swap: nothing can be swapped out. That is looked up for each run anew.
pub(super) fn swap(
    source: Option<(Kind, &Path)>,
    memory: Limit<u64>,
    bytes: u64,
) -> Result<(), Reason> {
    let (limit, refusal) = match source {
        Some((Kind::Unified, _)) if accounts_swap(source) => (Some(bytes), None),
        Some((Kind::Legacy, _)) if accounts_swap(source) => {
            let both = memory.finite().map(|memory| memory.saturating_add(bytes));
            (both, Some(mend::swap_needs_memory()))
        }
        _ => (None, None),
    };
    match (limit, source) {
        (Some(limit), Some((kind, directory))) => {
            let controller = MemController::new(directory.into(), "".into(), kind.is_unified());
            told("limiting swap", controller.set_memswap_limit(signed(limit)))
        }
        _ if bytes == 0 && host_has_no_swap() => Ok(()),
        _ => Err(refusal.unwrap_or_else(mend::no_swap_accounting)),
    }
}

/// Limits tasks to `tasks` and one more: init.
pub(super) fn pids(kind: Kind, directory: &Path, tasks: u64) -> Result<(), Reason> {
    let controller = PidController::new(directory.into(), "".into(), kind.is_unified());
    let limit = MaxValue::Value(signed(tasks.saturating_add(1)));
    told("limiting tasks", controller.set_pid_max(limit))
}

/// Limits the share of processors. `ceiling` is what a v1 parent has, in thousandths.
pub(super) fn cpu(
    kind: Kind,
    directory: &Path,
    cpus: MilliCpus,
    ceiling: Option<u32>,
) -> Result<(), Reason> {
    let milli = u64::from(ceiling.map_or(cpus.0, |ceiling| cpus.0.min(ceiling)));
    let period = if milli < 10 { CPU_PERIOD_LONG } else { CPU_PERIOD };
    let quota = signed(milli * period / 1000);
    let controller = CpuController::new(directory.into(), "".into(), kind.is_unified());
    let result = match kind {
        Kind::Unified => controller.set_cfs_quota_and_period(Some(quota), Some(period)),
        // The period first: a quota over the old one may be more than the parent's.
        Kind::Legacy => {
            controller.set_cfs_period(period).and_then(|()| controller.set_cfs_quota(quota))
        }
    };
    told("limiting the share of processors", result)
}

/// Whether this cgroup can limit swap.
pub(super) fn accounts_swap(source: Option<(Kind, &Path)>) -> bool {
    source.is_some_and(|(kind, directory)| match kind {
        Kind::Unified => directory.join("memory.swap.max").exists(),
        Kind::Legacy => directory.join("memory.memsw.limit_in_bytes").exists(),
    })
}

/// Whether /proc/swaps has nothing below its heading.
pub(super) fn host_has_no_swap() -> bool {
    files::read(Path::new("/proc"), "swaps").is_ok_and(|text| text.lines().count() <= 1)
}

/// What the files of `directory` let us measure, and how it can be ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Features {
    pub(super) kill: bool,
    pub(super) pids_peak: bool,
    pub(super) memory_peak: bool,
}

impl Features {
    /// Adds those of `directory`.
    pub(super) fn look(&mut self, kind: Kind, directory: &Path) {
        let has = |file| directory.join(file).exists();
        self.kill |= kind.is_unified() && !v2::is_true_root(directory) && has("cgroup.kill");
        self.pids_peak |= has("pids.peak");
        self.memory_peak |= has("memory.peak") || has("memory.max_usage_in_bytes");
    }
}

/// The crate takes -1 for none; our sizes end where its type does.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn told(what: &str, result: cgroups_rs::fs::error::Result<()>) -> Result<(), Reason> {
    result.map_err(|error| {
        match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
            Some(cause) => mend::failed(what, cause),
            None => mend::failed(what, &error),
        }
    })
}
