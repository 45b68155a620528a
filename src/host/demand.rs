//! Whether this host can enforce a policy.

use super::{Feature, Host, Subject};
use crate::{
    jail::{
        cgroup::{CgroupError, CgroupLimits},
        identity, limits, namespaces,
        plan::{Control, Filesystem, Limits, Mode, Network},
        root::{self, Ownership},
    },
    policy::{Policy, Protocol, compile::host_user},
};

/// What a policy demands in one of its modes.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// The mode; container mode demands nothing of this host's kernel.
    pub mode: Mode,
    /// `best_effort`
    pub best_effort: &'a [Control],
    /// `[limits]`
    pub limits: &'a Limits,
    /// `[filesystem]`
    pub filesystem: &'a Filesystem,
    /// `[network] mode`
    pub network: Network,
    /// Whether `[capabilities] keep` has any.
    pub keeps_capabilities: bool,
    /// Whom direct mode runs programs as.
    pub user: &'a str,
    /// Whether its runs are services, to which `cpu_time` doesn't apply.
    pub listens: bool,
}

impl<'a> Demand<'a> {
    /// What `policy` demands in each mode that a call may use.
    pub fn of(policy: &'a Policy) -> impl Iterator<Item = Self> {
        let others = policy.allow_modes.iter().filter(|mode| **mode != policy.mode);
        std::iter::once(&policy.mode).chain(others).map(|mode| Self {
            mode: *mode,
            best_effort: &policy.best_effort,
            limits: &policy.limits,
            filesystem: &policy.filesystem,
            network: policy.network,
            keeps_capabilities: !policy.keep_capabilities.is_empty(),
            user: policy.direct_user(),
            listens: policy.protocol == Protocol::Grpc,
        })
    }
}

/// Something that a policy demands and this host can't give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortfall {
    /// What.
    pub subject: Subject,
    /// Why.
    pub why: String,
    /// What to do about it; may be empty where `why` says it.
    pub mend: String,
}

impl Host {
    /// All that keeps this host from enforcing `demand`; nothing where it can.
    #[must_use]
    pub fn shortfalls(&self, demand: &Demand<'_>) -> Vec<Shortfall> {
        if demand.mode == Mode::Container {
            return Vec::new();
        }
        let mut found: Vec<_> = self
            .demanded(demand)
            .into_iter()
            .filter_map(|subject| self.finding(subject))
            .filter(|finding| !finding.ok)
            .map(|finding| Shortfall {
                subject: finding.subject,
                why: finding.why.clone(),
                mend: finding.mend.clone(),
            })
            .collect();
        found.extend(self.cgroup_shortfalls(demand));
        if let Err(most) = limits::open_files(demand.limits, self.facts.open_files) {
            let wanted = demand.limits.open_files.finite().unwrap_or(most);
            let needed = wanted.saturating_add(limits::PARKED);
            found.push(Shortfall {
                subject: Subject::Control(Control::Rlimits),
                why: format!("open_files is over {most}, the most that can be given here"),
                mend: format!("ulimit -Hn {needed}, or LimitNOFILE={needed} in the service's unit"),
            });
        }
        if demand.mode == Mode::Jail
            && let Err(error) =
                root::decide(demand.filesystem, None, self.ownership(), demand.listens)
        {
            found.push(Shortfall {
                subject: Subject::Control(Control::RootReadonly),
                why: error.to_string(),
                mend: String::new(),
            });
        }
        if demand.mode == Mode::Direct
            && let Some(user) = host_user(demand.user)
            && let Some(lack) = identity::lacking_user(&user, self.facts.root, self.facts.own_ids.0)
        {
            found.push(Shortfall {
                subject: Subject::Control(lack.control),
                why: lack.why,
                mend: lack.mend,
            });
        }
        found.retain(|one| !is_best_effort(demand, one.subject));
        // The same may have been found twice: as a whole, and for this policy.
        let mut seen = Vec::new();
        found.retain(|one| {
            !seen.contains(&one.subject) && {
                seen.push(one.subject);
                true
            }
        });
        found
    }

    /// What has to be in force, but for the cgroup's limits: those are tried.
    fn demanded(&self, demand: &Demand<'_>) -> Vec<Subject> {
        let jail = demand.mode == Mode::Jail;
        let root = self.facts.root;
        let made = namespaces::decide(demand.mode, demand.network, root, demand.keeps_capabilities);
        let mut controls = made.controls;
        controls.extend([Control::NoNewPrivs, Control::Rlimits, Control::CgroupKill]);
        if !demand.keeps_capabilities || !jail {
            controls.push(Control::CapsNone);
        }
        if demand.limits.cpu_time.finite().is_some() && !demand.listens {
            controls.push(Control::CpuTime);
        }
        if !root {
            controls.push(Control::Groups);
        }
        let mut features = vec![Feature::MemfdExec, Feature::Pidfd];
        if jail {
            controls.extend([
                Control::RootReadonly,
                Control::ProcRestricted,
                Control::Seccomp,
                Control::Landlock(0),
            ]);
            if !demand.filesystem.tmp_exec {
                controls.push(Control::MemfdNoexec);
            }
            if root {
                controls.push(Control::HostUid);
            }
            features.push(Feature::MountApi);
        }
        let features = features.into_iter().map(Subject::Feature);
        features.chain(controls.into_iter().map(Subject::Control)).collect()
    }

    /// Makes a run's cgroup with the policy's limits, without those that are found
    /// lacking, and removes it again.
    fn cgroup_shortfalls(&self, demand: &Demand<'_>) -> Vec<Shortfall> {
        let limits = CgroupLimits {
            memory: demand.limits.memory,
            swap: demand.limits.swap,
            cpus: demand.limits.cpus,
            pids: demand.limits.pids,
        };
        let Ok(hierarchy) = &self.hierarchy else { return Vec::new() };
        let mut found = Vec::new();
        let mut without = demand.best_effort.to_vec();
        loop {
            match hierarchy.create("policy", &limits, &without) {
                Ok(cgroup) => {
                    // Nobody was in it; closing the hierarchy would tell of trouble.
                    cgroup.remove().ok();
                    return found;
                }
                Err(CgroupError::Lacking { control, why, mend }) if !without.contains(&control) => {
                    without.push(control);
                    found.push(Shortfall { subject: Subject::Control(control), why, mend });
                }
                Err(error) => {
                    let subject = Subject::Control(Control::CgroupKill);
                    found.push(Shortfall { subject, why: error.in_full(), mend: String::new() });
                    return found;
                }
            }
        }
    }

    fn ownership(&self) -> Ownership {
        match self.facts.root {
            true => Ownership::Idmap { program: self.first_uid },
            false => Ownership::Plain { uid: self.facts.own_ids.0 },
        }
    }
}

fn is_best_effort(demand: &Demand<'_>, subject: Subject) -> bool {
    let Subject::Control(control) = subject else { return false };
    demand.best_effort.iter().any(|word| word.word() == control.word())
}
