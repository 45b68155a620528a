//! The cgroup of one run, in all hierarchies.

use std::{
    cell::Cell,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags},
    process::Pid,
};

use super::{
    CgroupError, CgroupLimits, Control, CpuUsage, Hierarchy, Kind, Reason, Usage, files,
    layout::Controller, mend, usage::OomCounts, v1, v2, values,
};
use crate::jail::message::Oom;

/// Tasks of the smallest run: init and the program.
const FEWEST: u64 = 2;
/// Bytes that may still be charged to a cgroup that is used again. The kernel gives
/// back what a run's objects took a little later than the run ends.
const CHARGED_MAX: u64 = 64 << 10;

/// One run's cgroup. Dropping it leaves the directories: [`Cgroup::remove`] them.
#[derive(Debug)]
pub struct Cgroup {
    sources: Vec<Source>,
    /// Its v2 directory, opened for clone3(2).
    unified: Option<OwnedFd>,
    enforced: Vec<Control>,
    features: values::Features,
    /// Nothing limits swap but that the host has none.
    swap_by_absence: bool,
    /// CPU time used before the program was told to start.
    cpu_baseline: CpuUsage,
    /// The most tasks there were before that, in a cgroup that somebody else made: a peak of
    /// tasks can't be reset.
    pids_before: u64,
    /// v2 from Linux 6.12: counts from the program's start.
    fresh_peak: Option<File>,
    /// What it was made with, where all of that is in force and was not changed since.
    limits: Option<CgroupLimits>,
    /// The most that was seen by looking, where the kernel keeps no peak.
    seen: Cell<Seen>,
}

/// Its directory in one hierarchy, and the controllers it has there.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) kind: Kind,
    pub(super) path: PathBuf,
    pub(super) controllers: Vec<Controller>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    pids: u64,
    memory: u64,
}

impl Cgroup {
    /// Most descriptors that one has open: its directory and a fresh peak.
    pub const DESCRIPTORS: usize = 2;

    /// Of these directories, of which nothing is known yet.
    fn over(sources: Vec<Source>, unified: Option<OwnedFd>, features: values::Features) -> Self {
        Self {
            sources,
            unified,
            enforced: Vec::new(),
            features,
            swap_by_absence: false,
            cpu_baseline: CpuUsage::default(),
            pids_before: 0,
            fresh_peak: None,
            limits: None,
            seen: Cell::default(),
        }
    }

    /// Makes the directories.
    pub(super) fn make(hierarchy: &Hierarchy, name: &str) -> Result<Self, CgroupError> {
        let mut cgroup = Self::over(Vec::new(), None, hierarchy.features);
        for source in hierarchy.directories(name) {
            if let Err(error) = cgroup.add(source) {
                cgroup.remove().ok();
                return Err(error);
            }
        }
        Ok(cgroup)
    }

    /// Takes up directories that somebody else made.
    pub(super) fn adopt(sources: Vec<Source>) -> io::Result<Self> {
        let mut features = values::Features::default();
        sources.iter().for_each(|source| features.look(source.kind, &source.path));
        let unified = sources.iter().find(|source| source.kind.is_unified());
        let unified = unified.map(|source| open_directory(&source.path)).transpose()?;
        let mut cgroup = Self::over(sources, unified, features);
        cgroup.pids_before = cgroup.pids_peak().unwrap_or(0);
        cgroup.note_what_needs_no_limit();
        Ok(cgroup)
    }

    fn note_what_needs_no_limit(&mut self) {
        if self.unified.is_some() && self.features.kill {
            self.enforced.push(Control::CgroupKill);
        }
        if self.cpu_source().is_some() {
            self.enforced.push(Control::CpuTime);
        }
    }

    /// Sets the limits, also once more, and tells which could not be set.
    pub(super) fn set_limits(
        &mut self,
        hierarchy: &Hierarchy,
        limits: &CgroupLimits,
    ) -> Vec<(Control, Reason)> {
        let first = self.enforced.is_empty();
        self.enforced.clear();
        let memory = self.source(Controller::Memory);
        let memory = memory.map(|source| (source.kind, source.path.as_path()));
        self.swap_by_absence = limits.swap.finite().is_some() && !values::accounts_swap(memory);
        let mut refused = Vec::new();
        for (control, result) in self.limit(hierarchy, limits) {
            match result {
                Ok(()) => self.enforced.push(control),
                Err(reason) => refused.push((control, reason)),
            }
        }
        self.note_what_needs_no_limit();
        self.limits = (first && refused.is_empty()).then_some(*limits);
        refused
    }

    /// Whether what was found when the limits were set still holds: without swap
    /// accounting, "no swap" does for as long as the host has none.
    #[must_use]
    pub fn holds(&self) -> bool {
        !self.swap_by_absence || values::host_has_no_swap()
    }

    fn add(&mut self, source: Source) -> Result<(), CgroupError> {
        let failed = |what, error: io::Error| CgroupError::Io {
            what,
            path: source.path.clone(),
            source: error,
        };
        files::make(&source.path).map_err(|error| failed("making", error))?;
        self.sources.push(source.clone());
        if source.kind.is_unified() {
            let fd = open_directory(&source.path);
            self.unified = Some(fd.map_err(|error| failed("opening", error))?);
        }
        Ok(())
    }

    /// Each finite limit with how setting it went.
    fn limit(
        &self,
        hierarchy: &Hierarchy,
        limits: &CgroupLimits,
    ) -> Vec<(Control, Result<(), Reason>)> {
        let mut results = Vec::new();
        let memory = self.source(Controller::Memory);
        if let Some(bytes) = limits.memory.finite() {
            let set = |source: &Source| values::memory(source.kind, &source.path, bytes);
            results.push(given(hierarchy, Control::CgroupMemory, memory, set));
        }
        if let Some(bytes) = limits.swap.finite() {
            let source = memory.map(|source| (source.kind, source.path.as_path()));
            let result = values::swap(source, limits.memory, bytes);
            let told = |_| hierarchy.reason(Control::CgroupMemory);
            let result = match (result, memory) {
                (Err(reason), None) => Err(told(&reason).unwrap_or(reason)),
                (result, _) => result,
            };
            results.push((Control::CgroupSwap, result));
        }
        if let Some(tasks) = limits.pids.finite() {
            let set = |source: &Source| values::pids(source.kind, &source.path, tasks);
            results.push(given(hierarchy, Control::CgroupPids, self.source(Controller::Pids), set));
        }
        if let Some(cpus) = limits.cpus.finite() {
            let ceiling = hierarchy.cpu_ceiling;
            let set = |source: &Source| values::cpu(source.kind, &source.path, cpus, ceiling);
            results.push(given(hierarchy, Control::CgroupCpu, self.source(Controller::Cpu), set));
        }
        results
    }

    /// The controls of [`super::CONTROLS`] that are in force: the finite limits
    /// that were set, `cgroup.kill`, and `cpu_time` where CPU time can be read.
    #[must_use]
    pub fn enforced(&self) -> &[Control] {
        &self.enforced
    }

    /// Its v2 directory, for clone3(2) with `CLONE_INTO_CGROUP`. After that, the
    /// process writes itself into [`Cgroup::others`].
    #[must_use]
    pub fn v2_dir_fd(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(|fd| fd.as_fd())
    }

    /// The `tasks` of the others, open: a thread that writes a 0 to one joins it.
    ///
    /// # Errors
    /// Those of opening them.
    pub fn others(&self) -> io::Result<Vec<OwnedFd>> {
        let others = self.sources.iter().filter(|source| !source.kind.is_unified());
        others.map(|source| files::open_tasks(&source.path)).collect()
    }

    /// Puts the process into every hierarchy's cgroup.
    ///
    /// # Errors
    /// [`CgroupError::Attach`], with ESRCH when it is gone.
    pub fn attach(&self, pid: Pid) -> Result<(), CgroupError> {
        let pid = pid.as_raw_nonzero().get();
        for source in &self.sources {
            files::move_process(&source.path, pid).map_err(|error| CgroupError::Attach {
                pid,
                path: source.path.clone(),
                source: error,
            })?;
        }
        Ok(())
    }

    /// Call it when all is ready for the program: what init used before is left out
    /// of the figures from here on, as far as the kernel lets it.
    ///
    /// # Errors
    /// Those of reading and writing the cgroup's files.
    pub fn start_measuring(&mut self) -> io::Result<()> {
        if let Some(memory) = self.source(Controller::Memory) {
            match memory.kind {
                Kind::Legacy => v1::reset_memory_peak(&memory.path)?,
                Kind::Unified => self.fresh_peak = v2::fresh_memory_peak(&memory.path),
            }
        }
        if self.cpu_source().is_some() {
            self.cpu_baseline = self.raw_cpu_usage()?;
        }
        Ok(())
    }

    /// Kills every process in it at once. `false` where the kernel cannot: then
    /// kill init, whose pid namespace takes the others along.
    #[must_use]
    pub fn kill(&self) -> bool {
        self.unified_path().is_some_and(|path| files::write(path, "cgroup.kill", "1").is_ok())
    }

    /// Stops every process in it, or lets them go on: cgroup.freeze of v2. (v1's freezer is
    /// not used: who is frozen by that can't be killed.) `false` where that can't be.
    pub fn freeze(&self, frozen: bool) -> bool {
        let word = if frozen { "1" } else { "0" };
        self.unified_path().is_some_and(|path| files::write(path, "cgroup.freeze", word).is_ok())
    }

    /// CPU time of the whole tree since [`Cgroup::start_measuring`].
    ///
    /// # Errors
    /// Those of reading its files; `Unsupported` where nothing counts it.
    pub fn cpu_usage(&self) -> io::Result<CpuUsage> {
        self.look();
        Ok(self.raw_cpu_usage()?.since(&self.cpu_baseline))
    }

    fn raw_cpu_usage(&self) -> io::Result<CpuUsage> {
        match self.cpu_source() {
            Some((Kind::Unified, path)) => v2::cpu_usage(path),
            Some((Kind::Legacy, path)) => v1::cpu_usage(path),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// What the run used. Ask when it is over and before [`Cgroup::remove`].
    /// A figure that cannot be read is 0.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let cpu = self.cpu_usage().unwrap_or_default();
        // One that others reached before says nothing of the program.
        let pids = self.pids_peak().filter(|peak| *peak > self.pids_before);
        let tasks = pids.unwrap_or(self.seen.get().pids).saturating_sub(1).max(1);
        Usage {
            user: cpu.user,
            system: cpu.system,
            memory_peak: self.memory_peak().unwrap_or(self.seen.get().memory),
            pids_peak: u32::try_from(tasks).unwrap_or(u32::MAX),
        }
    }

    fn pids_peak(&self) -> Option<u64> {
        files::number(&self.source(Controller::Pids)?.path, "pids.peak").ok()
    }

    fn memory_peak(&self) -> Option<u64> {
        if let Some(file) = &self.fresh_peak {
            return v2::read_peak(file).ok();
        }
        let memory = self.source(Controller::Memory)?;
        match memory.kind {
            Kind::Unified => files::number(&memory.path, "memory.peak").ok(),
            Kind::Legacy => v1::memory_peak(&memory.path).ok(),
        }
    }

    /// Whether processes were killed for want of memory, and by whose limit. Ask
    /// after the wait status was seen: the count is complete by then.
    #[must_use]
    pub fn oom(&self) -> Oom {
        match self.oom_counts().unwrap_or_default() {
            OomCounts { kills: 0, .. } => Oom::None,
            OomCounts { own_limit: true, .. } => Oom::Own,
            OomCounts { own_limit: false, .. } => Oom::Host,
        }
    }

    /// `None` where they can't be read.
    fn oom_counts(&self) -> Option<OomCounts> {
        let memory = self.source(Controller::Memory)?;
        let counts = match memory.kind {
            Kind::Unified => v2::oom(&memory.path),
            Kind::Legacy => v1::oom(&memory.path),
        };
        counts.ok()
    }

    /// Whether who listened at the other end of a connection is a process of this cgroup's,
    /// by its name, which no other has, in /proc/PID/cgroup, cgroups(7). Without directories
    /// there is nothing to tell that by.
    #[must_use]
    pub fn has_peer(&self, connection: &OwnedFd) -> bool {
        let Some(name) = self.sources.first().and_then(|source| source.path.file_name()) else {
            return true;
        };
        let Ok((pid, _)) = crate::sys::peer(connection.as_fd()) else { return false };
        let listing = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        listing.lines().any(|line| line.rsplit('/').next().map(OsStr::new) == Some(name))
    }

    /// Removes its directories.
    ///
    /// # Errors
    /// Itself, when a process is still in it: keep it aside and try again later.
    pub fn remove(self) -> Result<(), Box<Self>> {
        let mut gone = true;
        for source in &self.sources {
            let memory =
                !source.kind.is_unified() && source.controllers.contains(&Controller::Memory);
            if memory && v1::holds_pages(&source.path) {
                // They would stay charged, and hold the dead cgroup in the kernel.
                let _fails_only_where_removal_does =
                    files::write(&source.path, "memory.force_empty", "0");
            }
            gone &= files::remove(&source.path).is_ok();
        }
        if gone { Ok(()) } else { Err(Box::new(self)) }
    }

    /// Whether it was made with these limits, and has them still.
    pub(super) fn has_limits(&self, limits: &CgroupLimits) -> bool {
        self.limits.as_ref() == Some(limits)
    }

    /// Whether it can be made as good as new: see [`super::kept`]. To be asked when its
    /// run is gone: nothing comes into it any more.
    pub(super) fn is_reusable(&self) -> bool {
        let counts = |source: &Source| source.kind.is_unified() && !source.controllers.is_empty();
        let timed = self.sources.iter().any(|source| source.kind.is_unified());
        if self.limits.is_none() || !timed || self.sources.iter().any(counts) {
            return false;
        }
        let Some(pids) = self.source(Controller::Pids) else { return false };
        let pids = |file| files::number(&pids.path, file).ok();
        // Without a peak of the kernel's, it is what was seen, and forgotten.
        let few = !self.features.pids_peak || pids("pids.peak").is_some_and(|peak| peak <= FEWEST);
        few && pids("pids.current") == Some(0)
            && self.oom_counts().is_some_and(|counts| counts.kills == 0)
    }

    /// Makes one that is reusable as good as new. False where too much is charged to it
    /// still, or that can't be told.
    pub(super) fn renew(&mut self) -> bool {
        let memory = self.source(Controller::Memory);
        let charged = memory.map(|memory| files::number(&memory.path, "memory.usage_in_bytes"));
        if !charged.is_some_and(|bytes| bytes.is_ok_and(|bytes| bytes <= CHARGED_MAX)) {
            return false;
        }
        if self.renew_unified().is_err() {
            return false;
        }
        self.cpu_baseline = CpuUsage::default();
        self.seen = Cell::default();
        let limits_cpus = self.limits.is_some_and(|limits| limits.cpus.finite().is_some());
        let cpu = self.source(Controller::Cpu).filter(|_| limits_cpus);
        cpu.is_none_or(|cpu| v1::refill_cpu(&cpu.path).is_ok())
    }

    /// On v2 nothing can be reset: how processor time divides between user and system goes
    /// by what was seen since the directory was made, and one that was killed as a whole
    /// kills what is cloned into it later (`kill_seq`, kernel/cgroup/cgroup.c). Without
    /// controllers it is cheap to make.
    fn renew_unified(&mut self) -> io::Result<()> {
        self.unified = None;
        for source in self.sources.iter().filter(|source| source.kind.is_unified()) {
            files::remove(&source.path)?;
            files::make(&source.path)?;
            self.unified = Some(open_directory(&source.path)?);
        }
        Ok(())
    }

    /// Notes what there is now, where the kernel keeps no peak of it alone.
    fn look(&self) {
        let mut seen = self.seen.get();
        if (!self.features.pids_peak || self.pids_before > 0)
            && let Some(pids) = self.source(Controller::Pids)
        {
            let now = files::number(&pids.path, "pids.current").unwrap_or(0);
            seen.pids = seen.pids.max(now);
        }
        if !self.features.memory_peak
            && let Some(memory) = self.source(Controller::Memory)
        {
            let now = files::number(&memory.path, "memory.current").unwrap_or(0);
            seen.memory = seen.memory.max(now);
        }
        self.seen.set(seen);
    }

    pub(super) fn sources(&self) -> &[Source] {
        &self.sources
    }

    pub(super) fn source(&self, controller: Controller) -> Option<&Source> {
        self.sources.iter().find(|source| source.controllers.contains(&controller))
    }

    fn unified_path(&self) -> Option<&Path> {
        let source = self.sources.iter().find(|source| source.kind.is_unified())?;
        Some(&source.path)
    }

    fn cpu_source(&self) -> Option<(Kind, &Path)> {
        let unified = self.unified_path().map(|path| (Kind::Unified, path));
        unified.or_else(|| {
            self.source(Controller::Cpuacct).map(|source| (source.kind, source.path.as_path()))
        })
    }
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn given(
    hierarchy: &Hierarchy,
    control: Control,
    source: Option<&Source>,
    set: impl Fn(&Source) -> Result<(), Reason>,
) -> (Control, Result<(), Reason>) {
    let reason = || hierarchy.reason(control).unwrap_or_else(mend::no_controller);
    (control, source.ok_or_else(reason).and_then(set))
}
