//! What stands in the way of a control, and the command that mends it.

use std::fs;

use super::{Trouble, child::Failed};
use crate::jail::{plan::Control, step::Step};

/// Why namespaces can't be had.
pub(super) fn namespace(control: Control, failed: &Failed, root: bool) -> Trouble {
    let name = kernel_name(control);
    let limit = format!("user.max_{name}_namespaces");
    let mend = match (failed, failed.errno()) {
        (Failed::Clone(_), libc::ENOSPC | libc::EUSERS) => {
            let value = sysctl(&limit).unwrap_or_default();
            let why = format!("{failed} ({limit} is {value})");
            return Trouble::new(why, format!("sudo sysctl -w {limit}=15000"));
        }
        (Failed::Clone(_), libc::EINVAL) => {
            format!("use a kernel with CONFIG_{}_NS", name.to_uppercase())
        }
        (_, libc::EPERM | libc::EACCES) if !root => return unprivileged(failed),
        (_, libc::EPERM) => NO_ADMIN.to_owned(),
        _ => "see the message of the kernel (dmesg)".to_owned(),
    };
    Trouble::new(failed.to_string(), mend)
}

const NO_ADMIN: &str =
    "run it as root with CAP_SYS_ADMIN (in a container: --privileged, or --cap-add SYS_ADMIN)";

/// An ordinary user is refused: three things are known to do that.
fn unprivileged(failed: &Failed) -> Trouble {
    if sysctl("kernel.apparmor_restrict_unprivileged_userns").as_deref() == Some("1") {
        return Trouble::new(
            format!(
                "{failed} (AppArmor takes the capabilities from unprivileged user namespaces, as Ubuntu sets it up)"
            ),
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (or an AppArmor profile for dispatcher with \"userns,\")",
        );
    }
    if sysctl("kernel.unprivileged_userns_clone").as_deref() == Some("0") {
        return Trouble::new(
            format!("{failed} (kernel.unprivileged_userns_clone is 0)"),
            "sudo sysctl -w kernel.unprivileged_userns_clone=1",
        );
    }
    Trouble::new(
        format!("{failed} (a container runtime's seccomp profile forbids it, most likely)"),
        "run it outside of the container, as root, or with --security-opt seccomp=unconfined",
    )
}

/// Why the root can't be built: `Control::ProcRestricted` or `Control::RootReadonly`,
/// and the trouble.
pub(super) fn root(failed: &Failed, root: bool) -> (Control, Trouble) {
    let (control, mend) = match failed {
        Failed::Step(error) if error.step == Step::Proc && error.errno == libc::EPERM => (
            Control::ProcRestricted,
            "parts of /proc are mounted over, as containers have it: start it with --security-opt systempaths=unconfined, or as root with CAP_SYS_ADMIN",
        ),
        Failed::Step(error) if error.step == Step::Proc => {
            (Control::ProcRestricted, "use Linux 5.8 or later, for proc's subset=pid")
        }
        _ => {
            let mend = match failed.errno() {
                libc::ENOSYS => "use Linux 5.12 or later, for mount_setattr(2)",
                libc::EPERM | libc::EACCES if root => NO_ADMIN,
                libc::EPERM | libc::EACCES => {
                    "let AppArmor, SELinux or the container's profile allow mounting in user namespaces"
                }
                _ => "see the message of the kernel (dmesg)",
            };
            (Control::RootReadonly, mend)
        }
    };
    (control, Trouble::new(failed.to_string(), mend))
}

/// memfds can't be executed: no program can be started at all.
pub(super) fn memfd_exec(why: String) -> Trouble {
    match sysctl("vm.memfd_noexec").as_deref() {
        Some("2") => Trouble::new(
            format!("{why} (vm.memfd_noexec is 2)"),
            "sudo sysctl -w vm.memfd_noexec=0 (1 will do as well)",
        ),
        _ => Trouble::new(why, "allow executing memfds (SELinux, or another security module)"),
    }
}

/// The value of a sysctl, where this kernel has it.
fn sysctl(name: &str) -> Option<String> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

const fn kernel_name(control: Control) -> &'static str {
    match control {
        Control::NsMount => "mnt",
        Control::NsPid => "pid",
        Control::NsIpc => "ipc",
        Control::NsUts => "uts",
        Control::NsNet => "net",
        Control::NsCgroup => "cgroup",
        _ => "user",
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::jail::step::StepError;

    #[test]
    fn each_refusal_has_a_command() {
        let no_room = Failed::Clone(io::Error::from_raw_os_error(libc::ENOSPC));
        let trouble = namespace(Control::NsUser, &no_room, false);
        assert_eq!(trouble.mend, "sudo sysctl -w user.max_user_namespaces=15000");
        let trouble = namespace(Control::NsMount, &no_room, true);
        assert!(trouble.why.contains("user.max_mnt_namespaces"), "{trouble:?}");
        let refused = Failed::Clone(io::Error::from_raw_os_error(libc::EPERM));
        assert!(namespace(Control::NsPid, &refused, true).mend.contains("CAP_SYS_ADMIN"));
        assert!(!namespace(Control::NsUser, &refused, false).mend.is_empty());
    }

    #[test]
    fn an_over_mounted_proc_is_told_from_a_root_that_cannot_be_made() {
        let at = |step, errno| Failed::Step(StepError { step, index: 0, errno });
        let (control, trouble) = root(&at(Step::Proc, libc::EPERM), false);
        assert_eq!(control, Control::ProcRestricted);
        assert!(trouble.mend.contains("systempaths=unconfined"));
        let (control, trouble) = root(&at(Step::Readonly, libc::ENOSYS), true);
        assert_eq!(control, Control::RootReadonly);
        assert!(trouble.mend.contains("5.12"));
    }
}
