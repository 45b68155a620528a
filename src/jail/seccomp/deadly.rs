//! Calls that end the run. They lie over every profile: no policy can allow them.

use super::syscalls;

/// The deadly calls: ways out of the namespaces and the root, into other
/// processes, or into the kernel. No honest program in a jail makes them.
const NAMES: &[&str] = &[
    // Mounts and roots, by the old calls and by the new.
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "open_tree",
    "open_tree_attr", // open_tree and mount_setattr in one
    "move_mount",
    "mount_setattr",
    // Namespaces; `clone` is deadly with a namespace flag only.
    "unshare",
    "setns",
    // Other processes' memory and registers.
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    // Code into the kernel.
    "bpf",
    "kexec_load",
    "kexec_file_load",
    "init_module",
    "finit_module",
    "delete_module",
    // Keyrings are not namespaced; perf reads what others do.
    "keyctl",
    "add_key",
    "perf_event_open",
    // Opens files by inode number, past every mount.
    "open_by_handle_at",
    // Administration of the machine.
    "quotactl",
    "quotactl_fd",
    "reboot",
    "swapon",
    "swapoff",
    "iopl",
    "ioperm",
    "acct",
];

/// Flags of `clone` that make namespaces: deadly. CLONE_NEWTIME (0x80) is not
/// among them: clone(2) takes the low byte as the exit signal, so that only
/// clone3 and unshare can make a time namespace.
pub const CLONE_NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET)
    .cast_unsigned();

/// Whether a call of this x86_64 number is deadly with any arguments.
#[must_use]
pub fn is_deadly(number: u32) -> bool {
    syscalls::name(number).is_some_and(is_deadly_name)
}

/// Whether the call of this name is deadly with any arguments.
#[must_use]
pub fn is_deadly_name(name: &str) -> bool {
    NAMES.contains(&name)
}

/// The deadly calls' names.
#[must_use]
pub fn names() -> &'static [&'static str] {
    NAMES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_deadly_name_is_a_system_call() {
        for name in names() {
            assert!(syscalls::number(name).is_some_and(is_deadly), "{name}");
        }
    }

    #[test]
    fn clone_mask_is_all_namespaces_but_time() {
        assert_eq!(CLONE_NAMESPACES, 0x7e02_0000);
    }
}
