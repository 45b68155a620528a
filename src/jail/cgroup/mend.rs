//! Why a control cannot be had, and the command that mends it: for people.

use std::{io, path::Path};

use super::{
    Reason,
    layout::{Controller, Mount},
    place::Refused,
    v2,
};

/// A scope of one's own, in which systemd lets us make cgroups.
fn own_scope() -> String {
    let user = if is_root() { "" } else { "--user " };
    format!("systemd-run {user}--scope -p Delegate=yes dispatcher …")
}

pub(super) fn no_unified(error: Option<&io::Error>) -> Reason {
    let why = match error {
        None => "no cgroup v2 hierarchy is mounted that can be written to".to_owned(),
        Some(error) => format!("no cgroup v2 hierarchy can be written to or mounted: {error}"),
    };
    let mend = if is_root() {
        "mount -o remount,rw /sys/fs/cgroup, or start the container with --privileged"
    } else {
        "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"
    };
    Reason { why, mend: mend.to_owned() }
}

/// No v1 hierarchy has it, and no v2 hierarchy is there at all.
pub(super) fn nowhere(controller: Controller) -> Reason {
    Reason {
        why: format!("no cgroup hierarchy with the {} controller is mounted", controller.name()),
        mend: format!(
            "boot with cgroup_enable={} and without cgroup_disable={0}, cgroup_no_v1={0} on the kernel's command line",
            controller.name()
        ),
    }
}

pub(super) fn outside(mount: &Mount) -> Reason {
    Reason {
        why: format!("our own cgroup is not visible below {}", mount.point.display()),
        mend: "start the container with --cgroupns=private, or set [server] cgroup_parent".into(),
    }
}

pub(super) fn unusable(directory: &Path, error: &io::Error) -> Reason {
    let mend = match error.raw_os_error() {
        Some(libc::EROFS) => "mount -o remount,rw /sys/fs/cgroup".to_owned(),
        Some(libc::EACCES | libc::EPERM) if !is_root() => own_scope(),
        _ => "set [server] cgroup_parent to a cgroup that exists or can be made".to_owned(),
    };
    Reason { why: format!("{} cannot be made: {error}", shown(directory)), mend }
}

pub(super) fn legacy_not_writable(mount: &Mount, directory: &Path, error: &io::Error) -> Reason {
    let why = format!("{} cannot be written to: {error}", directory.display());
    let mend = if mount.read_only || error.raw_os_error() == Some(libc::EROFS) {
        format!("mount -o remount,rw {}", mount.point.display())
    } else if is_root() {
        "start it as root outside of any user namespace".to_owned()
    } else {
        "run as root, or boot with systemd.unified_cgroup_hierarchy=1: v1 is not for ordinary users"
            .to_owned()
    };
    Reason { why, mend }
}

/// A path below a hierarchy that is mounted for us alone says nothing to people.
fn shown(directory: &Path) -> String {
    match directory.strip_prefix("/proc/self/fd") {
        Ok(rest) => {
            let below: std::path::PathBuf = rest.components().skip(1).collect();
            format!("/{} of the cgroup v2 hierarchy", below.display())
        }
        Err(_) => directory.display().to_string(),
    }
}

pub(super) fn unified_not_writable(directory: &Path, error: &io::Error) -> Reason {
    let mend = match error.raw_os_error() {
        Some(libc::EROFS) => "mount -o remount,rw /sys/fs/cgroup".to_owned(),
        _ => own_scope(),
    };
    Reason { why: format!("{} cannot be written to: {error}", shown(directory)), mend }
}

/// A controller that the children of `parent` cannot have.
pub(super) fn not_enabled(
    controller: Controller,
    refused: &Refused,
    parent: &Path,
    top: &Path,
) -> Reason {
    let name = controller.name();
    let contained = !v2::is_true_root(top);
    let mend = match refused {
        Refused::Occupied { directory, .. } if contained && directory == top => {
            let top = top.display();
            format!(
                "mkdir -p {top}/init && xargs -rn1 <{top}/cgroup.procs >{top}/init/cgroup.procs"
            )
        }
        Refused::Occupied { .. } => own_scope(),
        Refused::Absent if contained => {
            format!("delegate the {name} controller to this container or user")
        }
        Refused::Absent => {
            format!("boot with cgroup_enable={name} and without cgroup_disable={name}")
        }
        Refused::Denied { .. } if is_root() => own_scope(),
        Refused::Denied { .. } => format!(
            "sudo mkdir -p /etc/systemd/system/user@.service.d && printf '[Service]\\nDelegate=cpu memory pids\\n' | \
             sudo tee /etc/systemd/system/user@.service.d/dispatcher.conf && sudo systemctl daemon-reload, \
             log in again, then {}",
            own_scope()
        ),
    };
    let why = format!("the {name} controller is not to be had in {}: {refused}", shown(parent));
    Reason { why, mend }
}

/// Neither a v2 cgroup nor a v1 hierarchy of that kind is there.
pub(super) fn no_controller() -> Reason {
    Reason { why: "no cgroup hierarchy gives it".into(), mend: own_scope() }
}

pub(super) fn no_kill() -> Reason {
    Reason {
        why: "cgroup.kill is missing: the kernel is older than 5.14".into(),
        mend: "use Linux 5.14 or later".into(),
    }
}

pub(super) fn no_swap_accounting() -> Reason {
    Reason {
        why: "the kernel does not account for swap, and the host has some".into(),
        mend: "swapoff -a, or boot with swapaccount=1 on the kernel's command line".into(),
    }
}

pub(super) fn swap_needs_memory() -> Reason {
    Reason {
        why: "cgroup v1 limits memory and swap only together, and memory is unlimited".into(),
        mend: "give limits.memory a size, or boot with systemd.unified_cgroup_hierarchy=1".into(),
    }
}

/// The kernel refused a value or a step that ought to work.
pub(super) fn failed(what: &str, error: &dyn std::fmt::Display) -> Reason {
    Reason { why: format!("{what}: {error}"), mend: own_scope() }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
