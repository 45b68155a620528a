//! The system calls a jailed program may not make: which end the run, under what
//! name, and which are answered with an error.

mod common;

use std::sync::OnceLock;

use common::{Dispatcher, Settings, dispatcher::plain, programs, rootless, shared};

/// What a small static program needs, and one call that no profile can give.
const PROFILE: &str = r#"{
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 1,
    "syscalls": [{
        "names": [
            "arch_prctl", "brk", "execve", "execveat", "exit", "exit_group", "fstat", "getpid",
            "getrandom", "ioctl", "mmap", "mprotect", "munmap", "newfstatat", "prlimit64", "read",
            "readlink", "readlinkat", "rseq", "set_robust_list", "set_tid_address", "unshare",
            "write", "writev"
        ],
        "action": "SCMP_ACT_ALLOW"
    }]
}"#;

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        Settings::new([
            ("jail", plain("")),
            ("loopback", plain("[network]\nmode = \"loopback\"\n")),
            ("strict", plain("[seccomp]\ndeny = [\"getrandom\"]\n")),
            ("loose", plain("[seccomp]\nallow = [\"unshare\"]\n")),
            ("profile", plain("[seccomp]\nprofile = \"little\"\n")),
        ])
        .file("seccomp/little.json", PROFILE)
        .start()
    })
}

/// Calls that end the run: name, number, arguments that do no harm outside.
fn deadly() -> Vec<(&'static str, i64, &'static [&'static str])> {
    let mut calls: Vec<(&str, i64, &[&str])> = vec![
        ("mount", libc::SYS_mount, &["str:none", "str:/nonexistent", "str:tmpfs", "0", "0"]),
        ("umount2", libc::SYS_umount2, &["str:/nonexistent", "0"]),
        ("pivot_root", libc::SYS_pivot_root, &["str:/nonexistent", "str:/nonexistent"]),
        ("chroot", libc::SYS_chroot, &["str:/"]),
        ("fsopen", libc::SYS_fsopen, &["str:tmpfs", "0"]),
        ("fsconfig", libc::SYS_fsconfig, &["-1", "0", "0", "0", "0"]),
        ("fsmount", libc::SYS_fsmount, &["-1", "0", "0"]),
        ("fspick", libc::SYS_fspick, &["-1", "str:/nonexistent", "0"]),
        ("open_tree", libc::SYS_open_tree, &["-100", "str:/", "1"]),
        ("move_mount", libc::SYS_move_mount, &["-1", "str:", "-1", "str:", "0"]),
        ("mount_setattr", libc::SYS_mount_setattr, &["-1", "str:", "0", "buf", "0"]),
        ("unshare", libc::SYS_unshare, &["0x10000000"]),
        ("unshare", libc::SYS_unshare, &["0x80"]),
        ("unshare", libc::SYS_unshare, &["0"]),
        ("setns", libc::SYS_setns, &["-1", "0"]),
        ("ptrace", libc::SYS_ptrace, &["0"]),
        // PTRACE_ATTACH, to a process that can't be: a real one would be left stopped.
        ("ptrace", libc::SYS_ptrace, &["16", "2147483647"]),
        ("process_vm_readv", libc::SYS_process_vm_readv, &["self", "buf", "1", "buf", "1", "0"]),
        ("process_vm_writev", libc::SYS_process_vm_writev, &["self", "buf", "1", "buf", "1", "0"]),
        ("bpf", libc::SYS_bpf, &["5", "buf", "48"]),
        ("kexec_load", libc::SYS_kexec_load, &["0", "99999", "buf", "0"]),
        ("init_module", libc::SYS_init_module, &["buf", "0", "str:"]),
        ("finit_module", libc::SYS_finit_module, &["-1", "str:", "0"]),
        ("delete_module", libc::SYS_delete_module, &["str:nonexistent", "0x800"]),
        ("keyctl", libc::SYS_keyctl, &["0", "-3", "0"]),
        ("add_key", libc::SYS_add_key, &["str:user", "str:test", "buf", "1", "-1"]),
        ("perf_event_open", libc::SYS_perf_event_open, &["buf", "0", "-1", "-1", "0"]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, &["-1", "buf", "0"]),
        ("quotactl", libc::SYS_quotactl, &["0x80000100", "0", "0", "0"]),
        ("reboot", libc::SYS_reboot, &["0", "0", "0", "0"]),
        ("swapon", libc::SYS_swapon, &["str:/nonexistent", "0"]),
        ("swapoff", libc::SYS_swapoff, &["str:/nonexistent"]),
        ("acct", libc::SYS_acct, &["str:/nonexistent"]),
        // Every namespace flag, and one behind upper bits that the kernel ignores.
        ("clone", libc::SYS_clone, &["0x10000011"]),
        ("clone", libc::SYS_clone, &["0x00020011"]),
        ("clone", libc::SYS_clone, &["0x20000011"]),
        ("clone", libc::SYS_clone, &["0x40000011"]),
        ("clone", libc::SYS_clone, &["0x08000011"]),
        ("clone", libc::SYS_clone, &["0x04000011"]),
        ("clone", libc::SYS_clone, &["0x02000011"]),
        ("clone", libc::SYS_clone, &["0x110000011"]),
    ];
    #[cfg(target_arch = "x86_64")]
    calls.extend([
        ("kexec_file_load", libc::SYS_kexec_file_load, &["-1", "-1", "0", "0", "0"] as &[&str]),
        ("iopl", libc::SYS_iopl, &["0"]),
        ("ioperm", libc::SYS_ioperm, &["0", "1", "0"]),
    ]);
    calls
}

/// A call's arguments for the `syscall` program.
fn native(number: i64, arguments: &[&str]) -> Vec<String> {
    let mut words = vec!["native".to_owned(), number.to_string()];
    words.extend(arguments.iter().map(|&word| word.to_owned()));
    words
}

fn strs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

#[test]
fn outside_the_kernel_gets_to_decide() {
    for (name, number, arguments) in deadly() {
        let outside = programs::outside("syscall", &strs(&native(number, arguments)));
        let facts = outside.facts();
        eprintln!("{name} {arguments:?} outside: {:?}", facts.maybe("call"));
        assert!(facts.maybe("call").is_some(), "{name}: {outside:?}");
    }
}

#[test]
fn deadly_calls_end_the_run_by_name() {
    for (name, number, arguments) in deadly() {
        let words = native(number, arguments);
        let reply = dispatcher().run("jail", "syscall", &strs(&words));
        assert_eq!(reply.report.denied_syscall, name, "{arguments:?}: {}", reply.summary());
        let reply = reply.denied(name);
        assert_eq!(reply.stdout(), b"", "{name} did not return");
    }
}

/// Those that work outside, so that their absence inside means something.
#[test]
fn outside_the_gravest_calls_work() {
    let mut calls: Vec<(&str, i64, &[&str])> =
        vec![("ptrace", libc::SYS_ptrace, &["0"]), ("keyctl", libc::SYS_keyctl, &["0", "-3", "0"])];
    if !rootless() {
        calls.extend([
            ("unshare", libc::SYS_unshare, &["0x10000000"] as &[&str]),
            ("clone", libc::SYS_clone, &["0x10000011"]),
            ("chroot", libc::SYS_chroot, &["str:/"]),
            ("fsopen", libc::SYS_fsopen, &["str:tmpfs"]),
            ("userfaultfd", libc::SYS_userfaultfd, &["1"]),
        ]);
    }
    for (name, number, arguments) in calls {
        let words = native(number, arguments);
        let facts = programs::outside("syscall", &strs(&words)).facts();
        assert_eq!(facts.one("call"), "ok", "{name}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn other_entries_are_deadly_whatever_the_number() {
    // getpid by the 32-bit entry works outside, if the kernel was built with it.
    let outside = programs::outside("syscall", &["i386", "20"]);
    if outside.signal().is_none() {
        assert_eq!(outside.facts().one("call"), "ok");
        dispatcher().run("jail", "syscall", &["i386", "20"]).denied("i386:getpid");
        // Number 11 is execve there and munmap here.
        dispatcher().run("jail", "syscall", &["i386", "11"]).denied("i386:execve");
        dispatcher().run("loopback", "syscall", &["i386", "102", "1"]).denied("i386:socketcall");
    }
    // Few kernels are built with x32: outside it is ENOSYS, inside it is an attempt.
    dispatcher().run("jail", "syscall", &["x32", "39"]).denied("x32:getpid");
    dispatcher().run("jail", "syscall", &["x32", "0"]).denied("x32:read");
}

#[test]
fn a_grandchild_in_its_own_session_is_named_too() {
    let reply = dispatcher().run("jail", "attack", &["deadly-grandchild"]);
    assert_eq!(reply.report.denied_syscall, "unshare", "{}", reply.summary());
    reply.denied("unshare");
}

/// Calls that are answered with an error: what, arguments, the only answer.
#[test]
fn other_forbidden_calls_are_answered() {
    let cases: &[(&str, i64, &[&str], &str)] = &[
        ("clone3", libc::SYS_clone3, &["buf", "88"], "ENOSYS"),
        ("io_uring_setup", libc::SYS_io_uring_setup, &["8", "buf"], "ENOSYS"),
        ("io_uring_enter", libc::SYS_io_uring_enter, &["-1", "0", "0", "0"], "ENOSYS"),
        ("io_uring_register", libc::SYS_io_uring_register, &["-1", "0", "0", "0"], "ENOSYS"),
        ("userfaultfd", libc::SYS_userfaultfd, &["1"], "EPERM"),
        ("request_key", libc::SYS_request_key, &["str:user", "str:x", "0", "0"], "EPERM"),
        ("personality", libc::SYS_personality, &["0x0040000"], "EPERM"),
        ("personality", libc::SYS_personality, &["0x0000008"], "EPERM"),
        ("AF_ALG", libc::SYS_socket, &["38", "5", "0"], "EAFNOSUPPORT"),
        ("AF_VSOCK", libc::SYS_socket, &["40", "1", "0"], "EAFNOSUPPORT"),
        ("AF_PACKET", libc::SYS_socket, &["17", "3", "0"], "EAFNOSUPPORT"),
        ("AF_BLUETOOTH", libc::SYS_socket, &["31", "3", "1"], "EAFNOSUPPORT"),
        ("AF_XDP", libc::SYS_socket, &["44", "3", "0"], "EAFNOSUPPORT"),
        ("netfilter", libc::SYS_socket, &["16", "3", "12"], "EAFNOSUPPORT"),
        ("AF_ALG, upper bits", libc::SYS_socket, &["0x100000026", "5", "0"], "EAFNOSUPPORT"),
        ("AF_ALG pair", libc::SYS_socketpair, &["38", "1", "0", "buf"], "EAFNOSUPPORT"),
        ("a number of no call", 999, &[], "ENOSYS"),
        ("a large number", 0x3fff_ffff, &[], "ENOSYS"),
    ];
    for (what, number, arguments, expected) in cases {
        for namespace in ["jail", "loopback"] {
            let words = native(*number, arguments);
            let reply = dispatcher().run(namespace, "syscall", &strs(&words)).ok();
            assert_eq!(reply.facts().one("call"), *expected, "{what} in {namespace}");
        }
    }
    for family in ["2", "10"] {
        let words = native(libc::SYS_socket, &[family, "1", "0"]);
        let reply = dispatcher().run("jail", "syscall", &strs(&words)).ok();
        assert_eq!(reply.facts().one("call"), "EAFNOSUPPORT", "family {family} without network");
    }
}

#[test]
fn refused_calls_are_reported() {
    let words = native(libc::SYS_userfaultfd, &["1"]);
    let reply = dispatcher().run("jail", "syscall", &strs(&words)).ok();
    assert_eq!(reply.report.refused_syscalls, ["userfaultfd"]);
    let reply = dispatcher().run("jail", "act", &["print", "x"]).ok();
    assert_eq!(reply.report.refused_syscalls, [""; 0]);
}

/// What ordinary programs need and a too eager filter breaks.
#[test]
fn harmless_calls_work() {
    let cases: &[(&str, i64, &[&str])] = &[
        ("personality, reading", libc::SYS_personality, &["0xffffffff"]),
        ("personality 0", libc::SYS_personality, &["0"]),
        ("getrandom", libc::SYS_getrandom, &["buf", "16", "0"]),
        // MFD_NOEXEC_SEAL: without the sysctl, the filter refuses others.
        ("memfd_create", libc::SYS_memfd_create, &["str:x", "8"]),
        ("eventfd2", libc::SYS_eventfd2, &["0", "0"]),
        ("epoll_create1", libc::SYS_epoll_create1, &["0"]),
        ("timerfd_create", libc::SYS_timerfd_create, &["1", "0"]),
        ("signalfd4", libc::SYS_signalfd4, &["-1", "buf", "8", "0"]),
        ("pipe2", libc::SYS_pipe2, &["buf", "0"]),
        ("socketpair", libc::SYS_socketpair, &["1", "1", "0", "buf"]),
        ("mmap, executable", libc::SYS_mmap, &["0", "4096", "7", "0x22", "-1", "0"]),
        ("clone, plain", libc::SYS_clone, &["0x11"]),
        ("sched_yield", libc::SYS_sched_yield, &[]),
        ("pidfd_open", libc::SYS_pidfd_open, &["self", "0"]),
        ("prlimit64, reading", libc::SYS_prlimit64, &["0", "4", "0", "buf"]),
        ("inotify_init1", libc::SYS_inotify_init1, &["0"]),
        ("setpriority, lowering", libc::SYS_setpriority, &["0", "0", "5"]),
    ];
    for (what, number, arguments) in cases {
        let words = native(*number, arguments);
        assert_eq!(programs::outside("syscall", &strs(&words)).facts().one("call"), "ok", "{what}");
        let reply = dispatcher().run("jail", "syscall", &strs(&words)).ok();
        assert_eq!(reply.facts().one("call"), "ok", "{what}");
    }
}

#[test]
fn policies_may_deny_more_but_not_allow_the_deadly() {
    let words = native(libc::SYS_getrandom, &["buf", "16", "0"]);
    let reply = dispatcher().run("strict", "syscall", &strs(&words));
    assert_ne!(reply.facts().maybe("call"), Some("ok"), "{}", reply.summary());

    // What isn't on a profile's list is refused; what is deadly is so on every list.
    let words = native(libc::SYS_getppid, &[]);
    let reply = dispatcher().run("profile", "syscall", &strs(&words)).ok();
    assert_eq!(reply.facts().one("call"), "EPERM");
    let words = native(libc::SYS_unshare, &["0x10000000"]);
    for namespace in ["profile", "loose"] {
        dispatcher().run(namespace, "syscall", &strs(&words)).denied("unshare");
    }
}
