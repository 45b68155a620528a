//! Which controls can really be given: by giving them to a child that does nothing.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use rustix::process::{Pid, WaitOptions, waitpid};

use super::{Cgroup, CgroupLimits, Control, Hierarchy, Reason, mend};
use crate::units::{Limit, MilliCpus};

/// Small enough for any host, large enough for a child that only waits.
const LIMITS: CgroupLimits = CgroupLimits {
    memory: Limit::At(64 << 20),
    swap: Limit::At(0),
    cpus: Limit::At(MilliCpus(100)),
    pids: Limit::At(1),
};

/// The controls that could not be given, and why.
pub(super) fn run(hierarchy: &Hierarchy) -> Vec<(Control, Reason)> {
    let mut cgroup = match Cgroup::make(hierarchy, "trial") {
        Ok(made) => made,
        Err(error) => return all(&mend::failed("making a run's cgroup", &error.in_full())),
    };
    let mut lacks = cgroup.set_limits(hierarchy, &LIMITS);
    if !hierarchy.features.kill {
        lacks.push((Control::CgroupKill, mend::no_kill()));
    }
    if !cgroup.enforced().contains(&Control::CpuTime) {
        lacks.push((Control::CpuTime, mend::no_controller()));
    }
    match with_child(&cgroup) {
        Ok(more) => lacks.extend(more),
        Err(reason) => lacks.extend(all(&reason)),
    }
    if let Err(cgroup) = cgroup.remove() {
        // Closing the hierarchy tries once more, and tells.
        drop(cgroup);
    }
    lacks
}

/// Puts a child into the cgroup and kills it there.
fn with_child(cgroup: &Cgroup) -> Result<Vec<(Control, Reason)>, Reason> {
    let failed = |what: &str, error: io::Error| mend::failed(what, &error);
    let (child, release) = spawn().map_err(|error| failed("forking", error))?;
    let mut lacks = Vec::new();
    let attached = cgroup.attach(child);
    if attached.is_ok() && cgroup.enforced().contains(&Control::CgroupKill) && !cgroup.kill() {
        lacks.push((Control::CgroupKill, mend::no_kill()));
    }
    if attached.is_ok() && cgroup.cpu_usage().is_err() {
        lacks.push((Control::CpuTime, mend::no_controller()));
    }
    // End of file ends the child, where nothing killed it before.
    drop(release);
    waitpid(Some(child), WaitOptions::empty()).map_err(|error| failed("waiting", error.into()))?;
    attached.map_err(|error| mend::failed("joining a run's cgroup", &error.in_full()))?;
    Ok(lacks)
}

/// A child that ends when the returned descriptor is closed, by us or by our death.
fn spawn() -> io::Result<(Pid, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (read_raw, write_raw) = (read.as_raw_fd(), write.as_raw_fd());
    // SAFETY: the child calls nothing but close(2), read(2) and _exit(2) on
    // numbers that were copied before, so no lock or allocation is touched.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => wait_for_end(read_raw, write_raw),
        child => {
            let child = Pid::from_raw(child).ok_or(io::ErrorKind::Other)?;
            Ok((child, write))
        }
    }
}

fn wait_for_end(read: i32, write: i32) -> ! {
    // SAFETY: closes this process's copy of the write end, so that the end of file can come.
    unsafe { libc::close(write) };
    let mut byte = 0_u8;
    // SAFETY: `byte` is valid for a write of its one byte.
    unsafe { libc::read(read, (&raw mut byte).cast(), 1) };
    // SAFETY: ends this copy of the process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}

fn all(reason: &Reason) -> Vec<(Control, Reason)> {
    super::CONTROLS.into_iter().map(|control| (control, reason.clone())).collect()
}
