//! Whether what is in force in a container is all that its policy demands.

use std::io;

use rustix::process::Pid;

use super::{
    make::{image, step},
    slot::Slot,
    spec, verify,
};
use crate::jail::{
    cgroup::{Cgroup, CgroupLimits},
    check::Checked,
    message::Refusal,
    plan::{Control, Template},
};

/// What can be seen of a container from here, and whether it is all that is demanded.
///
/// # Errors
/// The control that isn't in force, or what keeps it from being seen.
pub fn look(
    template: &Template,
    pid: Pid,
    id: &str,
    slot: &Slot,
    checked: &Checked,
) -> Result<(Option<Cgroup>, Vec<Control>), Refusal> {
    let limits = CgroupLimits {
        memory: checked.memory,
        swap: template.limits.swap,
        cpus: checked.cpus,
        pids: template.limits.pids,
    };
    let failed = |error: io::Error| step("verify", &error);
    let named = !template.container.runtime.is_empty();
    let cgroup = match Cgroup::of_container(pid, id) {
        Ok(cgroup) => cgroup,
        // Another kernel's.
        Err(error) if error.kind() == io::ErrorKind::NotFound && named => {
            return unseen(template, Vec::new()).map(|in_force| (None, in_force));
        }
        Err(error) => return Err(failed(error)),
    };
    let found = match verify::in_force(template, pid, &slot.init(), &cgroup, &limits) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let why = "only root can look into a container and confirm what Docker was asked for: \
                       run the dispatcher as root, or write mode = \"jail\"";
            return Err(Refusal::ControlUnavailable { control: Control::NsPid, why: why.into() });
        }
        found => found.map_err(failed)?,
    };
    let in_force = match found {
        Some(in_force) => in_force,
        None if named => {
            let in_force = cgroup.in_force(&limits);
            return unseen(template, in_force).map(|in_force| (Some(cgroup), in_force));
        }
        None => {
            let why = "the container's init isn't to be seen among this host's processes, so that \
                       nothing of what Docker was asked for can be confirmed: run the dispatcher \
                       in the host's pid namespace";
            return Err(Refusal::ControlUnavailable { control: Control::NsPid, why: why.into() });
        }
    };
    match verify::lacking(template, &in_force, spec::demanded(template)).first() {
        None if template.filesystem.tmp.is_some() && !verify::has_tmp(pid) => {
            let name = &template.container.image;
            Err(image(
                name,
                "has a /tmp that isn't writable by all: make it 1777, or write tmp = \"none\"",
            ))
        }
        None => Ok((Some(cgroup), in_force)),
        Some(control) => Err(Refusal::ControlUnavailable {
            control: *control,
            why: "Docker was asked for it, and it isn't in force in the container; \
                  `docker info` tells what this Docker can't do"
                .into(),
        }),
    }
}

/// Of a container into which nothing can be seen, only its cgroup is: whatever else the
/// policy demands may or may not be in force, and its author has to accept that by name.
fn unseen(template: &Template, in_force: Vec<Control>) -> Result<Vec<Control>, Refusal> {
    demand_sight(template)?;
    let lacking = verify::lacking(template, &in_force, spec::demanded(template));
    let Some(control) = lacking.first().copied() else { return Ok(in_force) };
    let words: Vec<_> = lacking.iter().map(|one| format!("{:?}", one.word())).collect();
    let why = format!(
        "containers of the runtime {} can't be looked into, so that it can't be confirmed: name \
         another in [container] runtime or, if what it gives by itself will do, add these to \
         best_effort: {}",
        template.container.runtime,
        words.join(", ")
    );
    Err(Refusal::ControlUnavailable { control, why })
}

/// A service's sockets are in the container: where that isn't to be seen, nobody reaches
/// them.
fn demand_sight(template: &Template) -> Result<(), Refusal> {
    if !template.listens {
        return Ok(());
    }
    let why = format!(
        "the runtime {} lets nobody into its containers, so that no gRPC service in one can be \
         reached: name another in [container] runtime, or write mode = \"jail\"",
        template.container.runtime
    );
    Err(Refusal::ControlUnavailable { control: Control::NsPid, why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_seen_is_accepted_by_name_only() {
        let mut template = crate::testing::template();
        template.container.runtime = "runsc".to_owned();
        let cgroup = vec![
            Control::CgroupMemory,
            Control::CgroupSwap,
            Control::CgroupPids,
            Control::CgroupCpu,
            Control::CpuTime,
        ];
        // All that is missing is told at once.
        let Err(Refusal::ControlUnavailable { control, why }) = unseen(&template, cgroup.clone())
        else {
            panic!("it isn't refused")
        };
        assert_eq!(control, Control::NsMount);
        for word in ["runsc", "\"ns.mount\"", "\"caps.none\"", "\"no_new_privs\"", "\"seccomp\""] {
            assert!(why.contains(word), "{word}: {why}");
        }
        assert!(!why.contains("cgroup.memory"), "{why}");
        template.best_effort = spec::demanded(&template);
        assert_eq!(unseen(&template, cgroup.clone()), Ok(cgroup));
        assert_eq!(unseen(&template, Vec::new()), Ok(Vec::new()));
        template.best_effort.retain(|control| *control != Control::Seccomp);
        let refused = unseen(&template, Vec::new());
        assert!(
            matches!(refused, Err(Refusal::ControlUnavailable { control: Control::Seccomp, .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn a_service_that_nobody_could_reach_is_refused() {
        let mut template = crate::testing::template();
        template.container.runtime = "runsc".to_owned();
        assert_eq!(demand_sight(&template), Ok(()));
        template.listens = true;
        let Err(Refusal::ControlUnavailable { why, .. }) = demand_sight(&template) else {
            panic!("it isn't refused")
        };
        assert!(why.contains("runsc"), "{why}");
    }
}
