//! How much memory running calls may be promised together.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::config::MemoryBudget;

/// Why the budget could not be told.
#[derive(Debug, thiserror::Error)]
pub enum BudgetError {
    /// No /proc, or an unusual one.
    #[error("{path} could not be read")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has no `MemTotal`.
    #[error("{0} has no MemTotal")]
    MemTotal(PathBuf),
}

/// Resolves `[server] memory` to bytes: of what the host has, or of the memory
/// limit of our own cgroup (or one above it) where that is less.
///
/// # Errors
/// [`BudgetError`] where /proc/meminfo can't be read.
pub fn resolve(budget: MemoryBudget) -> Result<u64, BudgetError> {
    match budget {
        MemoryBudget::Bytes(bytes) => Ok(bytes),
        MemoryBudget::Percent(percent) => {
            let available = available(Path::new("/"))?;
            Ok((available as f64 * percent.clamp(0.0, 100.0) / 100.0) as u64)
        }
    }
}

fn available(root: &Path) -> Result<u64, BudgetError> {
    let path = root.join("proc/meminfo");
    let meminfo = fs::read_to_string(&path)
        .map_err(|source| BudgetError::Read { path: path.clone(), source })?;
    let total = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"))
        .and_then(|kilobytes| kilobytes.trim().parse::<u64>().ok())
        .ok_or(BudgetError::MemTotal(path))?;
    let limit = cgroup_limits(root).into_iter().min();
    Ok(limit.unwrap_or(u64::MAX).min(total * 1024))
}

/// The memory limits of our cgroup and those above it, in both versions.
fn cgroup_limits(root: &Path) -> Vec<u64> {
    let listing = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut limits = Vec::new();
    for line in listing.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            list if list.split(',').any(|name| name == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let mount = root.join(mount);
        let mut directory = mount.join(path.trim_start_matches('/'));
        while directory.starts_with(&mount) {
            let limit = fs::read_to_string(directory.join(file));
            limits.extend(limit.ok().and_then(|text| text.trim().parse::<u64>().ok()));
            if !directory.pop() {
                break;
            }
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemFree:  1 kB\nMemTotal:       1000 kB\nMemAvailable: 2 kB\n");

    #[test]
    fn the_least_limit_above_us_counts() {
        let plain = host(&[MEMINFO]);
        assert_eq!(available(plain.path()).unwrap(), 1_024_000);

        let v2 = host(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "5000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
        ]);
        assert_eq!(available(v2.path()).unwrap(), 5000);

        let v1 = host(&[
            MEMINFO,
            ("proc/self/cgroup", "9:cpu,cpuacct:/x\n4:memory:/x\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "7000\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        assert_eq!(available(v1.path()).unwrap(), 7000);
    }

    #[test]
    fn without_meminfo_there_is_no_guess() {
        assert!(matches!(available(host(&[]).path()), Err(BudgetError::Read { .. })));
        let odd = host(&[("proc/meminfo", "MemFree: 1 kB\n")]);
        assert!(matches!(available(odd.path()), Err(BudgetError::MemTotal(_))));
    }

    #[test]
    fn bytes_are_bytes_and_percent_is_of_this_host() {
        assert_eq!(resolve(MemoryBudget::Bytes(7)).unwrap(), 7);
        let whole = resolve(MemoryBudget::Percent(100.0)).unwrap();
        let half = resolve(MemoryBudget::Percent(50.0)).unwrap();
        assert!(half > 0 && half.abs_diff(whole / 2) <= 1);
    }
}
