//! The cgroups that somebody else made for a run: Docker.
//!
//! They are read like our own, and what is in force in them is told by what their files
//! say, not by what was asked for.

use std::{io, path::Path};

use rustix::process::Pid;

use super::{
    Cgroup, CgroupLimits, Kind, files,
    layout::{Controller, Layout},
    run::Source,
    v1, v2, values,
};
use crate::{
    jail::plan::Control,
    units::{Limit, MilliCpus},
};

impl Cgroup {
    /// The cgroups of a container, as far as they are ours to see: those that `pid` is in
    /// and that have the container's id in their name. (In others, such as the v2 one of
    /// a hybrid host, it may be among strangers.) Dropping it leaves them as they are.
    ///
    /// # Errors
    /// Those of reading /proc, and `NotFound` where none of them is to be seen here.
    pub fn of_container(pid: Pid, id: &str) -> io::Result<Self> {
        let pid = pid.as_raw_nonzero();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let paths = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let mut sources = sources(&Layout::parse(&mounts, &paths));
        sources.retain(|source| is_named(&source.path, id));
        if sources.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Self::adopt(sources)
    }

    /// Kills everyone in it, one by one where the kernel can't kill a cgroup: to be
    /// repeated until nobody is left.
    pub fn kill_everyone(&self) {
        for source in self.sources() {
            files::kill_all(&source.path, 0);
        }
    }

    /// Those of the finite `limits` that are in force in it as wanted or tighter, with
    /// `cgroup.kill` and `cpu_time` where there are these.
    #[must_use]
    pub fn in_force(&self, limits: &CgroupLimits) -> Vec<Control> {
        let mut controls = Vec::new();
        if let (Some(bytes), Some(memory)) =
            (limits.memory.finite(), self.source(Controller::Memory))
        {
            let file = match memory.kind {
                Kind::Unified => "memory.max",
                Kind::Legacy => "memory.limit_in_bytes",
            };
            if at_most(&memory.path, file, bytes) {
                controls.push(Control::CgroupMemory);
            }
        }
        if self.limits_swap(limits) {
            controls.push(Control::CgroupSwap);
        }
        if let (Some(tasks), Some(pids)) = (limits.pids.finite(), self.source(Controller::Pids))
            && at_most(&pids.path, "pids.max", tasks.saturating_add(1))
        {
            controls.push(Control::CgroupPids);
        }
        if let (Some(cpus), Some(cpu)) = (limits.cpus.finite(), self.source(Controller::Cpu))
            && share(cpu).is_some_and(|share| share <= cpus)
        {
            controls.push(Control::CgroupCpu);
        }
        controls.extend(self.enforced().iter().copied());
        controls
    }

    fn limits_swap(&self, limits: &CgroupLimits) -> bool {
        let Some(swap) = limits.swap.finite() else { return false };
        let memory = self.source(Controller::Memory);
        let accounted = memory.is_some_and(|memory| {
            values::accounts_swap(Some((memory.kind, memory.path.as_path())))
        });
        match (memory, limits.memory) {
            (Some(memory), _) if accounted && memory.kind.is_unified() => {
                at_most(&memory.path, "memory.swap.max", swap)
            }
            (Some(memory), Limit::At(bytes)) if accounted => {
                at_most(&memory.path, "memory.memsw.limit_in_bytes", bytes.saturating_add(swap))
            }
            _ => !accounted && swap == 0 && values::host_has_no_swap(),
        }
    }
}

/// `ID`, or systemd's `docker-ID.scope`.
fn is_named(path: &Path, id: &str) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    !id.is_empty() && name.is_some_and(|name| name == id || name == format!("docker-{id}.scope"))
}

fn sources(layout: &Layout) -> Vec<Source> {
    let mut sources = Vec::new();
    if let Some(path) = layout.unified.as_ref().and_then(|mount| mount.own.clone()) {
        let has = |one: &Controller| v2::lists(&path, "cgroup.controllers", one.name());
        let controllers = Controller::ALL.into_iter().filter(has).collect();
        sources.push(Source { kind: Kind::Unified, path, controllers });
    }
    for legacy in &layout.legacy {
        if let Some(path) = legacy.mount.own.clone() {
            let controllers = legacy.controllers.clone();
            sources.push(Source { kind: Kind::Legacy, path, controllers });
        }
    }
    sources.retain(|source| source.path.is_dir());
    sources
}

/// Whether the file has a limit, and one no higher than `wanted`.
fn at_most(directory: &Path, file: &str, wanted: u64) -> bool {
    files::number(directory, file).is_ok_and(|limit| limit <= wanted)
}

/// Its share of processors; `None` where it isn't limited.
fn share(cpu: &Source) -> Option<MilliCpus> {
    let (quota, period) = match cpu.kind {
        Kind::Unified => {
            let text = files::read(&cpu.path, "cpu.max").ok()?;
            let (quota, period) = text.trim().split_once(' ')?;
            (quota.parse().ok()?, period.parse().ok()?)
        }
        Kind::Legacy => v1::cpu_quota(&cpu.path)?,
    };
    let milli = u64::checked_div(quota * 1000, period)?;
    Some(MilliCpus(u32::try_from(milli).unwrap_or(u32::MAX)))
}
