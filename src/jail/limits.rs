//! Resource limits (setrlimit(2)) of a run.

use rustix::process::Resource;

use super::plan::Limits;

/// Descriptors between the program's limit and the launcher's own: the
/// executable, the control socket, the Landlock ruleset and a pipe are parked there.
pub const PARKED: u64 = 4;

/// RLIMIT_NOFILE for the program: the policy's, or what the host leaves.
///
/// # Errors
/// `Err(most)` when the policy gives a number that this host can't: the
/// launcher's own hard limit, less [`PARKED`], is the most there is.
pub fn open_files(limits: &Limits, launcher_hard: u64) -> Result<u64, u64> {
    // More than this makes the kernel's table of descriptors itself expensive.
    const UNLIMITED: u64 = 1 << 16;
    let most = launcher_hard.saturating_sub(PARKED);
    match limits.open_files.finite() {
        Some(limit) if limit <= most => Ok(limit),
        Some(_) => Err(most),
        None => Ok(most.min(UNLIMITED)),
    }
}

/// The first of [`PARKED`] numbers that the program can never own: at or above
/// its limit, and above all that its process has open before exec.
#[must_use]
pub fn parking_place(open_files: u64) -> i32 {
    const ABOVE_OUR_OWN: u64 = 64;
    i32::try_from(open_files.max(ABOVE_OUR_OWN)).unwrap_or(i32::MAX - PARKED as i32)
}

/// The limits in the order they are set, soft and hard alike.
#[must_use]
pub fn resource_limits(limits: &Limits, open_files: u64) -> Vec<(Resource, u64)> {
    let mut list = vec![
        // Not 0: a core pattern that begins with `|` ignores 0 but honours 1,
        // which is less than any core's first page, core(5).
        (Resource::Core, 1),
        (Resource::Nofile, open_files),
        (Resource::Memlock, 64 << 10),
        (Resource::Msgqueue, 0),
        (Resource::Nice, 0),
        (Resource::Rtprio, 0),
        (Resource::Sigpending, 1024),
    ];
    if let Some(bytes) = limits.file_size.finite() {
        list.push((Resource::Fsize, bytes));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Limit;

    #[test]
    fn open_files_leave_room_to_park() {
        let mut limits = Limits::default();
        assert_eq!(open_files(&limits, 1024), Ok(256));
        assert_eq!(open_files(&limits, 259), Err(255));
        assert_eq!(open_files(&limits, 260), Ok(256));
        limits.open_files = Limit::Unlimited;
        assert_eq!(open_files(&limits, 1024), Ok(1020));
        assert_eq!(open_files(&limits, 1 << 30), Ok(1 << 16));
    }

    #[test]
    fn cores_are_one_byte_and_files_bounded() {
        let list = resource_limits(&Limits::default(), 256);
        assert!(list.contains(&(Resource::Core, 1)));
        assert!(list.contains(&(Resource::Fsize, 64 << 20)));
    }
}
