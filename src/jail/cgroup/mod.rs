//! Control groups: what a run may use, what it used, and its end.
//!
//! Runs' cgroups lie in `<parent>/dispatcher.<instance>/<name>`, in every
//! hierarchy that is needed: with cgroup v2 that is one; with v1 one for each of
//! memory, pids and cpu; on a hybrid host both, since only v2 has `cgroup.kill`
//! and a cheap answer to "is anyone left?". On a pure v1 host root mounts the v2
//! hierarchy for itself, nowhere in the file tree.
//!
//! The parent is the configured one; else our own cgroup, if it can be written
//! to and holds no strangers; else, for root, the top. `layout` finds the
//! hierarchies, `place` the parent, `supervisor` moves our own processes where that
//! must be, `instance` holds the lock and clears away what dead
//! dispatchers left, `values` writes limits, `v1` and `v2` read figures.
//!
//! Blocking file access throughout: this is for the launcher, which has one thread.

mod adopted;
mod files;
mod hierarchy;
mod instance;
mod kept;
mod layout;
mod mend;
mod place;
mod run;
mod supervisor;
mod trial;
mod usage;
mod v1;
mod v2;
mod values;

#[cfg(test)]
mod tests;

use std::{io, path::PathBuf};

pub use hierarchy::Hierarchy;
pub use kept::KeptCgroups;
pub use run::Cgroup;
pub use usage::{CpuUsage, Usage};

use super::plan::Control;
use crate::units::{Limit, MilliCpus};

/// What a run may use at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupLimits {
    /// Bytes of memory of the whole tree, kernel memory and tmpfs included.
    pub memory: Limit<u64>,
    /// Bytes of swap on top of `memory`.
    pub swap: Limit<u64>,
    /// Share of processor time.
    pub cpus: Limit<MilliCpus>,
    /// Tasks of the program; init is allowed for on top.
    pub pids: Limit<u64>,
}

impl CgroupLimits {
    /// No limit at all.
    pub const UNLIMITED: Self = Self {
        memory: Limit::Unlimited,
        swap: Limit::Unlimited,
        cpus: Limit::Unlimited,
        pids: Limit::Unlimited,
    };
}

/// The controls that cgroups can give.
pub const CONTROLS: [Control; 6] = [
    Control::CgroupMemory,
    Control::CgroupSwap,
    Control::CgroupPids,
    Control::CgroupCpu,
    Control::CgroupKill,
    Control::CpuTime,
];

/// Which of [`CONTROLS`] this host gives to this process, found by trying each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Available {
    lacks: Vec<Lack>,
}

impl Available {
    /// Whether runs can have `control`.
    #[must_use]
    pub fn has(&self, control: Control) -> bool {
        CONTROLS.contains(&control) && self.lacking(control).is_none()
    }

    /// Why runs cannot have `control`.
    #[must_use]
    pub fn lacking(&self, control: Control) -> Option<&Lack> {
        self.lacks.iter().find(|lack| lack.control == control)
    }

    /// All that is lacking.
    pub fn lacks(&self) -> impl Iterator<Item = &Lack> {
        self.lacks.iter()
    }

    /// The first reason stays: what comes later follows from it.
    fn add(&mut self, control: Control, reason: Reason) {
        if self.lacking(control).is_none() {
            self.lacks.push(Lack { control, why: reason.why, mend: reason.mend });
        }
    }
}

/// A control that runs cannot have here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// Which.
    pub control: Control,
    /// Why.
    pub why: String,
    /// A command, or what else to do about it.
    pub mend: String,
}

/// A [`Lack`] before it is known which control it takes away.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reason {
    why: String,
    mend: String,
}

/// The two versions of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// v2
    Unified,
    /// v1
    Legacy,
}

impl Kind {
    const fn is_unified(self) -> bool {
        matches!(self, Self::Unified)
    }
}

/// What can go wrong with cgroups.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// `[server] cgroup_parent` is not a path below a hierarchy's top.
    #[error("cgroup_parent {0:?} is not a path of cgroup names such as /dispatcher.slice/runs")]
    Parent(String),
    /// The configured parent cannot be used in any hierarchy.
    #[error("cgroup_parent {parent:?} can't be used: {why}; {mend}")]
    ParentUnusable {
        /// As configured.
        parent: String,
        /// Why not.
        why: String,
        /// What to do.
        mend: String,
    },
    /// Not the name of one directory.
    #[error("{0:?} can't be a cgroup's name: write letters, digits, '.', '_' and '-', 128 at most")]
    Name(String),
    /// Another living dispatcher has the same instance name.
    #[error("another dispatcher holds {0}; give this one another instance name or stop that one")]
    InUse(PathBuf),
    /// A control that a run demands and cannot have.
    #[error("{control} can't be given: {why}; {mend}")]
    Lacking {
        /// Which.
        control: Control,
        /// Why not.
        why: String,
        /// What to do.
        mend: String,
    },
    /// A system call on a cgroup failed.
    #[error("{what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A process could not be put into a run's cgroup.
    #[error("putting process {pid} into {path}")]
    Attach {
        /// Which.
        pid: i32,
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// At the end something stayed behind.
    #[error("left behind: {0}")]
    LeftBehind(String),
}

impl CgroupError {
    /// With what the kernel said, which the error alone leaves to its source.
    #[must_use]
    pub fn in_full(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}
