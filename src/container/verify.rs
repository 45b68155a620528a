//! What is in force in a container, by the kernel's word: Docker was asked for it, which
//! proves nothing. Init waits meanwhile, so that nothing of the tenant's runs yet.

use std::{fs, io, os::unix::fs::MetadataExt as _, path::Path};

use rustix::process::{Pid, Resource};

use super::spec;
use crate::jail::{
    cgroup::{Cgroup, CgroupLimits},
    plan::{CONTAINER_USER, Control, Template},
};

/// The controls of a container in which `pid` is init; `init` is init's executable on
/// the host. `None` where that process is another: under a runtime that has a kernel of
/// its own nothing can be seen from here.
///
/// # Errors
/// Those of reading /proc.
pub fn in_force(
    template: &Template,
    pid: Pid,
    init: &Path,
    cgroup: &Cgroup,
    limits: &CgroupLimits,
) -> io::Result<Option<Vec<Control>>> {
    let of = |file: &str| format!("/proc/{}/{file}", pid.as_raw_nonzero());
    if !is_same_file(&fs::metadata(of("exe"))?, &fs::metadata(init)?) {
        return Ok(None);
    }
    let mut controls = Vec::new();
    for (name, control) in [
        ("user", Control::NsUser),
        ("mnt", Control::NsMount),
        ("pid", Control::NsPid),
        ("ipc", Control::NsIpc),
        ("uts", Control::NsUts),
        ("net", Control::NsNet),
        ("cgroup", Control::NsCgroup),
    ] {
        let own = fs::read_link(format!("/proc/self/ns/{name}"))?;
        if fs::read_link(of(&format!("ns/{name}")))? != own {
            controls.push(control);
        }
    }
    let mounts = fs::read_to_string(of("mountinfo"))?;
    // With what is ours in it.
    if is_read_only(&mounts, "/") && is_read_only(&mounts, spec::SLOT_TARGET) {
        controls.push(Control::RootReadonly);
    }
    let status = fs::read_to_string(of("status"))?;
    if !controls.contains(&Control::NsUser) && !is_nobody(&status) {
        return Err(io::Error::other("the container's init is another user than it was to be"));
    }
    controls.extend(by_status(&status, template));
    if rlimits_hold(&fs::read_to_string(of("limits"))?, &spec::rlimits(template)) {
        controls.push(Control::Rlimits);
    }
    controls.extend(cgroup.in_force(limits));
    Ok(Some(controls))
}

/// Whether `pid` executes `init`; not, where that can't be told.
#[must_use]
pub fn is_init(pid: Pid, init: &Path) -> bool {
    let running = fs::metadata(format!("/proc/{}/exe", pid.as_raw_nonzero()));
    matches!((running, fs::metadata(init)), (Ok(one), Ok(other)) if is_same_file(&one, &other))
}

/// Whether the program can write to /tmp.
#[must_use]
pub fn has_tmp(pid: Pid) -> bool {
    let tmp = format!("/proc/{}/root/tmp", pid.as_raw_nonzero());
    fs::metadata(tmp).is_ok_and(|found| found.mode() & 0o7777 == 0o1777)
}

/// What is demanded and isn't there.
#[must_use]
pub fn lacking(
    template: &Template,
    in_force: &[Control],
    mut demanded: Vec<Control>,
) -> Vec<Control> {
    let best_effort =
        |control: &Control| template.best_effort.iter().any(|one| one.word() == control.word());
    demanded.retain(|control| !in_force.contains(control) && !best_effort(control));
    demanded
}

fn by_status(status: &str, template: &Template) -> Vec<Control> {
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    };
    let mut controls = Vec::new();
    let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
    if sets.into_iter().all(|set| field(set).is_some_and(|set| set.bytes().all(|b| b == b'0'))) {
        controls.push(Control::CapsNone);
    }
    if field("NoNewPrivs") == Some("1") {
        controls.push(Control::NoNewPrivs);
    }
    if field("Seccomp") == Some("2") {
        controls.push(Control::Seccomp);
        if !template.filesystem.tmp_exec {
            // It refuses them: `decide::container_filter_options`.
            controls.push(Control::MemfdNoexec);
        }
    }
    controls
}

/// Whether a process is nobody, in every way and in no other group.
fn is_nobody(status: &str) -> bool {
    let all_nobody = |name: &str| {
        let ids = status.lines().find_map(|line| line.strip_prefix(name));
        let nobody = CONTAINER_USER.to_string();
        ids.is_some_and(|ids| ids.split_whitespace().all(|id| id == nobody))
    };
    ["Uid:", "Gid:", "Groups:"].into_iter().all(all_nobody)
}

/// Whether the mount at this place is, proc_pid_mountinfo(5).
fn is_read_only(mountinfo: &str, place: &str) -> bool {
    // The last one lies over the others.
    let root = mountinfo.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(4);
        let (point, options) = (fields.next()?, fields.next()?);
        (point == place).then_some(options)
    });
    root.is_some_and(|options| options.split(',').any(|option| option == "ro"))
}

/// Whether /proc/PID/limits has all of these, soft and hard.
fn rlimits_hold(limits: &str, wanted: &[(Resource, u64)]) -> bool {
    wanted.iter().all(|(resource, value)| {
        let line = limits.lines().find_map(|line| line.strip_prefix(title(*resource)));
        let mut fields = line.unwrap_or_default().split_whitespace();
        let mut is = || fields.next() == Some(&*value.to_string());
        is() && is()
    })
}

/// As the kernel heads its line, fs/proc/base.c.
fn title(resource: Resource) -> &'static str {
    match resource {
        Resource::Core => "Max core file size",
        Resource::Nofile => "Max open files",
        Resource::Memlock => "Max locked memory",
        Resource::Msgqueue => "Max msgqueue size",
        Resource::Nice => "Max nice priority",
        Resource::Rtprio => "Max realtime priority",
        Resource::Sigpending => "Max pending signals",
        Resource::Fsize => "Max file size",
        _ => "?",
    }
}

fn is_same_file(one: &fs::Metadata, other: &fs::Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_root_that_is_read_only_is_one() {
        let line = |options: &str| format!("30 25 0:26 / / {options} - overlay overlay rw\n");
        assert!(is_read_only(&line("ro,relatime"), "/"));
        assert!(!is_read_only(&line("ro,relatime"), "/run/dispatcher"));
        assert!(!is_read_only(&line("rw,relatime"), "/"));
        assert!(!is_read_only(&(line("ro") + &line("rw")), "/"));
        assert!(!is_read_only("31 30 0:5 / /dev ro - tmpfs tmpfs rw\n", "/"));
        assert!(!is_read_only("", "/"));
    }

    #[test]
    fn resource_limits_are_read_as_the_kernel_writes_them() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max core file size        1                    1                    bytes\n\
                    Max open files            256                  512                  files\n";
        assert!(rlimits_hold(text, &[(Resource::Core, 1)]));
        assert!(!rlimits_hold(text, &[(Resource::Core, 0)]));
        assert!(!rlimits_hold(text, &[(Resource::Nofile, 256)]), "the hard one is another");
        assert!(!rlimits_hold(text, &[(Resource::Nice, 0)]), "not there");
    }

    #[test]
    fn this_process_is_hardly_confined() {
        let own = fs::read_to_string("/proc/self/limits").unwrap();
        let all = spec::rlimits(&crate::testing::template());
        for (resource, _) in &all {
            assert!(own.contains(title(*resource)), "{resource:?}");
        }
    }
}
