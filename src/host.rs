//! What this host can enforce, found out by really trying.
//!
//! Everything with side effects is tried in a child that then exits, with the
//! very functions that the launcher uses, so that the answer is the
//! launcher's. Cgroups are made, joined by a child, and removed again.

mod child;
mod demand;
mod mend;
mod probes;
mod program;
pub use program::EXITS_WITH_0;

#[cfg(test)]
mod tests;

use std::{fmt, io};

pub use demand::{Demand, Shortfall};

use crate::jail::{
    cgroup::{self, CgroupError, Hierarchy},
    facts::Facts,
    plan::Control,
};

/// Settings that the answer depends on, from the server's own file.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `[server] cgroup_parent`
    pub cgroup_parent: String,
    /// `[server] uid_range`
    pub uid_range: (u32, u32),
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A control that reports list as enforced.
    Control(Control),
    /// Something that controls rest on.
    Feature(Feature),
}

/// What the launcher needs or uses, beside the controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Executables run from sealed memory files: without it nothing can be started.
    MemfdExec,
    /// Watching processes by descriptor; needed.
    Pidfd,
    /// fsopen(2) and its kin: roots are made with them.
    MountApi,
    /// Binds that are writable or not world-readable are mapped to their owner;
    /// without it policies that have such binds are refused.
    IdmappedMounts,
    /// The name of a denied system call; without it the program is killed all the same.
    SeccompNotify,
}

impl Feature {
    /// Its word, in the style of the controls'.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::MemfdExec => "memfd_exec",
            Self::Pidfd => "pidfd",
            Self::MountApi => "mount_api",
            Self::IdmappedMounts => "idmapped_mounts",
            Self::SeccompNotify => "seccomp.notify",
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control(control) => control.fmt(f),
            Self::Feature(feature) => f.write_str(feature.word()),
        }
    }
}

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub subject: Subject,
    /// Whether it can be had.
    pub ok: bool,
    /// Why not; or how, where there is more than one way.
    pub why: String,
    /// The command that mends it, or what else to do; empty where all is well.
    pub mend: String,
}

/// A host, with what it can do; it holds cgroups until [`Host::close`].
#[derive(Debug)]
pub struct Host {
    facts: Facts,
    findings: Vec<Finding>,
    /// For trying idmapped binds.
    first_uid: u32,
    hierarchy: Result<Hierarchy, CgroupError>,
}

/// Why something can't be had.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Trouble {
    why: String,
    mend: String,
}

impl Trouble {
    fn new(why: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { why: why.into(), mend: mend.into() }
    }
}

impl Host {
    /// Tries everything. Call it from a process with one thread.
    ///
    /// # Errors
    /// Where /proc can't be read or no child can be made: then nothing can be told.
    pub fn examine(settings: &Settings) -> io::Result<Self> {
        let facts = Facts::find_out()?;
        let mut findings = probes::all(&facts, settings);
        let instance = format!("doctor-{}", std::process::id());
        let own = [rustix::process::getpid()];
        let hierarchy = Hierarchy::open(&settings.cgroup_parent, &instance, &own);
        for control in cgroup::CONTROLS {
            findings.push(cgroup_finding(control, &hierarchy));
        }
        for control in [Control::Timeout, Control::Output] {
            findings.push(Finding::new(
                control,
                Ok("by the launcher's and the server's clocks and counts"),
            ));
        }
        // In the order of reports; features keep their order after that.
        findings.sort_by_key(|finding| match finding.subject {
            Subject::Control(control) => {
                Control::ALL.iter().position(|known| known.word() == control.word())
            }
            Subject::Feature(_) => Some(Control::ALL.len()),
        });
        Ok(Self { facts, findings, first_uid: settings.uid_range.0, hierarchy })
    }

    /// All that was found: the controls, then what they rest on.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Whether it was examined as root with the power of root.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.facts.root
    }

    /// Removes the cgroups that were made for trying.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn close(self) -> Result<(), CgroupError> {
        self.hierarchy.map_or(Ok(()), Hierarchy::close)
    }

    fn finding(&self, subject: Subject) -> Option<&Finding> {
        let same = |finding: &&Finding| match (finding.subject, subject) {
            (Subject::Control(one), Subject::Control(other)) => one.word() == other.word(),
            (one, other) => one == other,
        };
        self.findings.iter().find(same)
    }
}

impl Finding {
    fn new(control: Control, result: Result<&str, Trouble>) -> Self {
        Self::of(Subject::Control(control), result)
    }

    fn of(subject: Subject, result: Result<&str, Trouble>) -> Self {
        match result {
            Ok(how) => Self { subject, ok: true, why: how.to_owned(), mend: String::new() },
            Err(Trouble { why, mend }) => Self { subject, ok: false, why, mend },
        }
    }
}

fn cgroup_finding(control: Control, hierarchy: &Result<Hierarchy, CgroupError>) -> Finding {
    let result = match hierarchy {
        Ok(hierarchy) => match hierarchy.available().lacking(control) {
            None => Ok(""),
            Some(lack) => Err(Trouble::new(&lack.why, &lack.mend)),
        },
        Err(error) => {
            let mend = "correct [server] cgroup_parent in the server's own file";
            Err(Trouble::new(error.in_full(), mend))
        }
    };
    Finding::new(control, result)
}
