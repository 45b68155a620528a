//! What a run's cgroups in v1 hierarchies tell.

use std::{io, path::Path, time::Duration};

use super::{
    files,
    usage::{CpuUsage, OomCounts},
};

/// Charges are made in batches of up to 64 pages per processor, and a failed
/// charge may ask for several pages: a peak this near to the limit has reached it.
const NEAR_LIMIT: u64 = 64 * 4096;

/// CPU time so far. The total is exact, in nanoseconds; user and system are
/// sampled by the timer tick, so that they only tell how to divide it.
pub(super) fn cpu_usage(cpuacct: &Path) -> io::Result<CpuUsage> {
    let total = files::number(cpuacct, "cpuacct.usage")?;
    let user = files::number(cpuacct, "cpuacct.usage_user")?;
    let system = files::number(cpuacct, "cpuacct.usage_sys")?;
    Ok(divide(total, user, system))
}

fn divide(total: u64, user: u64, system: u64) -> CpuUsage {
    let sampled = u128::from(user) + u128::from(system);
    // Never seen by a tick: as the kernel's own accounting has it, all is user time.
    let user = match sampled {
        0 => total,
        _ => (u128::from(total) * u128::from(user) / sampled) as u64,
    };
    CpuUsage { user: Duration::from_nanos(user), system: Duration::from_nanos(total - user) }
}

/// Highest memory use in bytes since it was made or last reset.
pub(super) fn memory_peak(memory: &Path) -> io::Result<u64> {
    files::number(memory, "memory.max_usage_in_bytes")
}

/// Whether a cgroup without processes holds more than what the kernel gives back
/// when it is removed: charges in advance, of up to 64 pages per processor, and
/// kernel objects, which pass to the cgroup above.
pub(super) fn holds_pages(memory: &Path) -> bool {
    files::read(memory, "memory.stat").is_ok_and(|text| {
        ["cache", "rss"].iter().any(|key| files::find_key(&text, key).is_none_or(|bytes| bytes > 0))
    })
}

/// Makes the present use the highest.
pub(super) fn reset_memory_peak(memory: &Path) -> io::Result<()> {
    files::write(memory, "memory.max_usage_in_bytes", "0")?;
    match files::write(memory, "memory.memsw.max_usage_in_bytes", "0") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Gives all of its share of this period back, whatever was used of it, and holds nobody
/// back any more: writing the quota does, `tg_set_cfs_bandwidth`, kernel/sched/core.c.
pub(super) fn refill_cpu(cpu: &Path) -> io::Result<()> {
    let quota = files::number(cpu, "cpu.cfs_quota_us")?;
    files::write(cpu, "cpu.cfs_quota_us", &quota.to_string())
}

/// Memory kills, and whether its own limit was reached: `failcnt` also counts
/// mere reclaim, hence the peak is compared with the limit.
pub(super) fn oom(memory: &Path) -> io::Result<OomCounts> {
    let kills = files::keyed(memory, "memory.oom_control", "oom_kill")?;
    let own_limit = kills > 0
        && (reached(memory, "memory.max_usage_in_bytes", "memory.limit_in_bytes")
            || reached(memory, "memory.memsw.max_usage_in_bytes", "memory.memsw.limit_in_bytes"));
    Ok(OomCounts { kills, own_limit })
}

fn reached(memory: &Path, peak: &str, limit: &str) -> bool {
    match (files::number(memory, peak), files::number(memory, limit)) {
        (Ok(peak), Ok(limit)) => peak.saturating_add(NEAR_LIMIT) >= limit,
        _ => false,
    }
}

/// Quota and period in microseconds; `None` without a quota.
pub(super) fn cpu_quota(cpu: &Path) -> Option<(u64, u64)> {
    // -1, which is no number to us, stands for none.
    let quota = files::number(cpu, "cpu.cfs_quota_us").ok()?;
    Some((quota, files::number(cpu, "cpu.cfs_period_us").ok()?))
}

/// The share of processors in thousandths that `cpu` and what lies above it, up
/// to `top`, allow: v1 refuses a child more than its parent has.
pub(super) fn cpu_ceiling(cpu: &Path, top: &Path) -> Option<u32> {
    cpu.ancestors()
        .take_while(|directory| directory.starts_with(top))
        .filter_map(|directory| {
            let (quota, period) = cpu_quota(directory)?;
            u32::try_from(quota.checked_mul(1000)?.checked_div(period)?).ok()
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_is_divided_by_what_the_ticks_saw() {
        let ms = Duration::from_millis;
        let usage = |user, system| CpuUsage { user, system };
        assert_eq!(divide(100_000_000, 3, 1), usage(ms(75), ms(25)));
        assert_eq!(divide(1_000_000, 0, 0), usage(ms(1), ms(0)));
        assert_eq!(divide(0, 0, 0), CpuUsage::default());
        assert_eq!(divide(1_000_000, 0, 8_000_000), usage(ms(0), ms(1)));
        let huge = divide(u64::MAX, u64::MAX, u64::MAX);
        assert_eq!((huge.user + huge.system).as_nanos(), u128::from(u64::MAX));
    }

    #[test]
    fn blame_needs_a_kill_and_a_peak_at_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let put =
            |file: &str, text: &str| std::fs::write(directory.path().join(file), text).unwrap();
        let oom_control = |kills| format!("oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n");
        put("memory.limit_in_bytes", "16777216\n");
        for (peak, kills, own_limit) in [
            ("16777216", 1, true),
            ("16750000", 1, true),
            ("8000000", 1, false),
            ("16777216", 0, false),
        ] {
            put("memory.max_usage_in_bytes", peak);
            put("memory.oom_control", &oom_control(kills));
            assert_eq!(oom(directory.path()).unwrap(), OomCounts { kills, own_limit }, "{peak}");
        }
    }

    #[test]
    fn the_tightest_quota_above_counts() {
        let top = tempfile::tempdir().unwrap();
        let inner = top.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        for (directory, quota) in [(top.path(), "-1"), (inner.as_path(), "50000")] {
            std::fs::write(directory.join("cpu.cfs_quota_us"), quota).unwrap();
            std::fs::write(directory.join("cpu.cfs_period_us"), "100000").unwrap();
        }
        assert_eq!(cpu_ceiling(&inner, top.path()), Some(500));
        assert_eq!(cpu_ceiling(top.path(), top.path()), None);
    }
}
