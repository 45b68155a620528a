//! The built-in profile, `profile = "default"`: what ordinary programs need,
//! and at least what Docker's default allows without capabilities, but for the
//! deadly calls and the conditions below.

use crate::jail::plan::{Allowed, ArgumentCondition, Comparison, SyscallPolicy};

use super::{
    rules::{low, low_masked},
    syscalls,
};

/// The built-in profile.
///
/// # Panics
/// Never: a test reads every name in it.
#[must_use]
pub fn default_profile() -> SyscallPolicy {
    let number = |name| syscalls::number(name).expect("a name of the built-in profile");
    let plain = PLAIN.iter().flat_map(|(_, calls)| calls.split_ascii_whitespace());
    let allowed = plain
        .map(|name| (number(name), Allowed::Always))
        .chain(conditional().into_iter().map(|(name, any)| (number(name), Allowed::AnyOf(any))))
        .collect();
    SyscallPolicy { allowed, errnos: Default::default() }
}

/// Calls allowed with any arguments (but for the guards of `rules`): who needs
/// them, and which they are.
const PLAIN: &[(&str, &str)] = &[
    (
        "every program, to start and to end",
        "arch_prctl brk execve exit exit_group prctl restart_syscall rseq set_robust_list
         get_robust_list set_tid_address",
    ),
    (
        "every program, for memory; the JIT compilers' and sanitizers' share included",
        "mmap munmap mprotect mremap madvise mincore msync mlock mlock2 mlockall munlock
         munlockall remap_file_pages pkey_alloc pkey_free pkey_mprotect mseal map_shadow_stack
         memfd_create memfd_secret membarrier",
    ),
    (
        "reading and writing",
        "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek
         sendfile splice tee vmsplice copy_file_range readahead fadvise64 fallocate truncate
         ftruncate sync syncfs fsync fdatasync sync_file_range cachestat",
    ),
    (
        "opening, closing and copying descriptors; ioctl asks terminals and sockets",
        "open openat openat2 creat close close_range dup dup2 dup3 fcntl flock ioctl pipe pipe2",
    ),
    (
        "finding files: loaders, interpreters, everything with a file name",
        "stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink
         readlinkat getdents getdents64 getcwd chdir fchdir umask name_to_handle_at statmount
         listmount",
    ),
    (
        "changing files, in /tmp and writable binds; the kernel checks permissions",
        "mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink
         symlinkat mknod mknodat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat
         utime utimes futimesat utimensat",
    ),
    (
        "archivers and file utilities: extended attributes",
        "getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr setxattrat
         listxattr llistxattr flistxattr listxattrat removexattr lremovexattr fremovexattr
         removexattrat",
    ),
    (
        "watching files: build tools, language servers, reloading daemons",
        "inotify_init inotify_init1 inotify_add_watch inotify_rm_watch fanotify_mark",
    ),
    (
        "waiting for descriptors: event loops of every runtime",
        "poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_ctl_old
         epoll_wait epoll_wait_old epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd signalfd4
         timerfd_create timerfd_settime timerfd_gettime",
    ),
    (
        "asynchronous disk I/O: databases (libaio)",
        "io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents",
    ),
    (
        "threads: locks, scheduling, processor placement",
        "futex futex_wait futex_wake futex_waitv futex_requeue gettid getcpu sched_yield
         sched_getaffinity sched_setaffinity rseq_slice_yield get_thread_area set_thread_area
         modify_ldt",
    ),
    (
        "asking for the scheduler's parameters and setting harmless ones; the kernel refuses \
         real-time ones by RLIMIT_RTPRIO, which these pass in memory",
        "sched_getattr sched_setattr sched_getparam sched_setparam sched_getscheduler
         sched_get_priority_max sched_get_priority_min sched_rr_get_interval getpriority
         ioprio_get",
    ),
    (
        "starting and awaiting processes; clone without namespaces (`rules`)",
        "clone fork vfork wait4 waitid getpid getppid getpgid getpgrp setpgid getsid setsid
         pidfd_open pidfd_send_signal process_mrelease",
    ),
    (
        "signals",
        "kill tkill tgkill rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending
         rt_sigqueueinfo rt_tgsigqueueinfo rt_sigsuspend rt_sigtimedwait sigaltstack pause",
    ),
    (
        "clocks and timers; adjtimex and clock_adjtime only read without a capability",
        "time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep alarm getitimer
         setitimer timer_create timer_delete timer_gettime timer_settime timer_getoverrun
         adjtimex clock_adjtime",
    ),
    (
        "who am I, and may I be less: shells, daemons dropping rights they do not have",
        "getuid geteuid getresuid getgid getegid getresgid getgroups setuid setreuid setresuid
         setfsuid setgid setregid setresgid setfsgid setgroups capget capset",
    ),
    (
        "what is there and how much was used; RLIMIT_CORE stays (`rules`)",
        "uname sysinfo times getrusage getrlimit setrlimit prlimit64 getrandom",
    ),
    (
        "sockets: unix ones always, others by the network mode (`rules`)",
        "socket socketpair bind connect listen accept accept4 shutdown getsockname getpeername
         getsockopt setsockopt sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg",
    ),
    (
        "System V and POSIX queues, semaphores and shared memory, in the run's own IPC namespace",
        "shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
         mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr",
    ),
    (
        "sandboxing oneself further: browsers' and decoders' helpers",
        "seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self",
    ),
    (
        "the kernel's own trampolines, where the host traces a library with uprobes",
        "uprobe uretprobe",
    ),
];

/// Calls allowed with some arguments only; groups of conditions, one of which must hold.
fn conditional() -> Vec<(&'static str, Vec<Vec<ArgumentCondition>>)> {
    use Comparison::{Equal, Less};
    let any = |conditions: &[ArgumentCondition]| conditions.iter().map(|&one| vec![one]).collect();
    vec![
        // Asked by shells and runtimes. Others weaken address randomization or
        // change how the kernel reads the program.
        ("personality", any(&[low(0, Equal, 0), low(0, Equal, u32::MAX)])),
        // nice(1), downwards: as an int, what has the top bit is below 0.
        ("setpriority", any(&[low(2, Less, 1 << 31)])),
        // Batch jobs; with or without SCHED_RESET_ON_FORK. Not FIFO, RR, DEADLINE.
        (
            "sched_setscheduler",
            any(&[libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE].map(|policy| {
                let kind = !libc::SCHED_RESET_ON_FORK.cast_unsigned();
                low_masked(1, kind, policy.cast_unsigned())
            })),
        ),
        // ionice(1), downwards: classes none, best effort, idle; not real time.
        (
            "ioprio_set",
            any(&[0, 2, 3]
                .map(|class| low_masked(2, !0 << IOPRIO_CLASS_SHIFT, class << IOPRIO_CLASS_SHIFT))),
        ),
        // By path it is execve. By descriptor it could execute what was never a
        // file; fexecve(3) then goes by /proc/self/fd, where noexec counts.
        ("execveat", any(&[low_masked(4, libc::AT_EMPTY_PATH.cast_unsigned(), 0)])),
    ]
}

/// Where the class begins in ioprio_set's value; linux/ioprio.h.
const IOPRIO_CLASS_SHIFT: u32 = 13;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{
        super::{
            deadly,
            filter::{Decision, FilterOptions, compile, decide},
            syscalls::ARCH_X86_64,
        },
        *,
    };
    use crate::jail::plan::Network;

    fn options(network: Network) -> FilterOptions {
        let refuse_exec_memfd = false;
        FilterOptions {
            network,
            refuse_exec_memfd,
            refuse_set_id: false,
            spare_init: false,
            exec_fd: 256,
            control_fd: 257,
            notify: true,
        }
    }

    fn errno(network: Network, name: &str, args: &[u64]) -> Option<i32> {
        let nr = syscalls::number(name).unwrap().cast_signed();
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        match decide(nr, ARCH_X86_64, &all, &default_profile(), &options(network)) {
            Decision::Continue => None,
            Decision::Refuse(errno, named) => {
                assert_eq!(named, name);
                Some(errno)
            }
            Decision::Deadly(_) => panic!("{name} is deadly"),
        }
    }

    #[test]
    fn every_name_is_a_call_once_and_none_is_deadly() {
        let mut seen = BTreeSet::new();
        let plain = PLAIN.iter().flat_map(|(_, calls)| calls.split_ascii_whitespace());
        for name in plain.chain(conditional().iter().map(|(name, _)| *name)) {
            assert!(syscalls::number(name).is_some(), "{name} is no system call");
            assert!(!deadly::is_deadly_name(name), "{name} is deadly");
            assert!(seen.insert(name), "{name} twice");
        }
        compile(&default_profile(), &options(Network::None)).unwrap();
    }

    #[test]
    fn allows_what_docker_does_without_capabilities() {
        // x86_64's share of the list, as of mid-2026, less what is deadly here.
        let docker = "
            accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset
            chdir chmod chown clock_adjtime clock_getres clock_gettime clock_nanosleep clone
            close close_range connect copy_file_range creat dup dup2 dup3 epoll_create
            epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait
            epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat
            faccessat2 fadvise64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2
            fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr
            fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv
            futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents
            getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp
            getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage
            getsid getsockname getsockopt gettid gettimeofday getuid getxattr getxattrat
            inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy
            io_getevents io_pgetevents io_setup io_submit ioctl ioprio_get ioprio_set kill
            landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lgetxattr
            link linkat listen listmount listxattr listxattrat llistxattr lremovexattr lseek
            lsetxattr lstat madvise map_shadow_stack membarrier memfd_create memfd_secret
            mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap modify_ldt mprotect
            mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap
            mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
            name_to_handle_at nanosleep newfstatat open openat openat2 pause personality
            pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll
            ppoll prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pwrite64
            pwritev pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg
            recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2
            restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
            rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
            sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
            sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity
            sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl
            semget semop semtimedop sendfile sendmmsg sendmsg sendto set_robust_list
            set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer
            setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid
            setsockopt setuid setxattr setxattrat shmat shmctl shmdt shmget shutdown
            sigaltstack signalfd signalfd4 socket socketpair splice stat statfs statmount
            statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time
            timer_create timer_delete timer_getoverrun timer_gettime timer_settime
            timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname
            unlink unlinkat uretprobe utime utimensat utimes vfork vmsplice wait4 waitid write
            writev
        ";
        let profile = default_profile();
        for name in docker.split_ascii_whitespace() {
            let number = syscalls::number(name).unwrap_or_else(|| panic!("{name}"));
            assert!(profile.allowed.contains_key(&number), "{name} is missing");
        }
    }

    #[test]
    fn refuses_with_the_errnos_that_programs_understand() {
        let eperm = Some(libc::EPERM);
        let enosys = Some(libc::ENOSYS);
        let none = |name, args: &[u64]| errno(Network::None, name, args);
        for name in ["io_uring_setup", "io_uring_enter", "io_uring_register", "clone3"] {
            assert_eq!(none(name, &[]), enosys, "{name}");
        }
        for name in ["userfaultfd", "request_key", "syslog", "sethostname", "pidfd_getfd", "kcmp"] {
            assert_eq!(none(name, &[]), eperm, "{name}");
        }
        assert_eq!(none("personality", &[0]), None);
        assert_eq!(none("personality", &[0xffff_ffff]), None);
        assert_eq!(none("personality", &[u64::MAX]), None);
        assert_eq!(none("personality", &[libc::ADDR_NO_RANDOMIZE as u64]), eperm);
        assert_eq!(none("execveat", &[3, 1, 1, 1, 0]), None);
        assert_eq!(none("execveat", &[3, 1, 1, 1, 0x1000]), enosys);
        assert_eq!(none("execveat", &[256, 1, 1, 1, 0x1000]), None);
        assert_eq!(none("fork", &[]), None);
    }

    #[test]
    fn sockets_have_the_families_of_the_network_mode() {
        let unsupported = Some(libc::EAFNOSUPPORT);
        for name in ["socket", "socketpair"] {
            for network in [Network::None, Network::Loopback, Network::Host] {
                assert_eq!(errno(network, name, &[1]), None);
                // An int parameter: the kernel does not look at the upper half.
                assert_eq!(errno(network, name, &[0xffff_ffff_0000_0001]), None);
                let inet = if network == Network::None { unsupported } else { None };
                assert_eq!(errno(network, name, &[2]), inet);
                assert_eq!(errno(network, name, &[10]), inet);
                for family in (0..64).chain([0xffff_ffff]).filter(|f| ![1, 2, 10].contains(f)) {
                    assert_eq!(errno(network, name, &[family]), unsupported, "family {family}");
                    assert_eq!(errno(network, name, &[family | 1 << 32]), unsupported);
                }
            }
        }
    }

    #[test]
    fn keeps_the_core_limit_and_others_limits() {
        let eperm = Some(libc::EPERM);
        let of = |name, args: &[u64]| errno(Network::None, name, args);
        assert_eq!(of("setrlimit", &[4, 1]), eperm);
        assert_eq!(of("setrlimit", &[4 | 1 << 32, 1]), eperm);
        assert_eq!(of("setrlimit", &[7, 1]), None);
        assert_eq!(of("prlimit64", &[0, 4, 0, 1]), None, "reads RLIMIT_CORE");
        assert_eq!(of("prlimit64", &[17, 4, 0, 1]), None, "reads another's");
        assert_eq!(of("prlimit64", &[0, 7, 1, 0]), None, "sets its own RLIMIT_NOFILE");
        assert_eq!(of("prlimit64", &[0, 4, 1, 0]), eperm, "sets RLIMIT_CORE");
        assert_eq!(of("prlimit64", &[0, 4 | 1 << 32, 1, 0]), eperm);
        assert_eq!(of("prlimit64", &[0, 4, 1 << 32, 0]), eperm);
        assert_eq!(of("prlimit64", &[17, 7, 1, 0]), eperm, "sets another's");
    }

    #[test]
    fn raises_no_priority_and_types_into_no_terminal() {
        let eperm = Some(libc::EPERM);
        let of = |name, args: &[u64]| errno(Network::Host, name, args);
        assert_eq!(of("setpriority", &[0, 0, 19]), None);
        assert_eq!(of("setpriority", &[0, 0, 0xffff_ffff]), eperm);
        assert_eq!(of("setpriority", &[0, 0, u64::MAX]), eperm);
        for (policy, answer) in
            [(0, None), (3, None), (5, None), (1, eperm), (2, eperm), (6, eperm)]
        {
            assert_eq!(of("sched_setscheduler", &[0, policy]), answer, "policy {policy}");
            assert_eq!(of("sched_setscheduler", &[0, policy | 0x4000_0000]), answer);
            assert_eq!(of("sched_setscheduler", &[0, policy | 7 << 32]), answer);
        }
        assert_eq!(of("ioprio_set", &[1, 0, 2 << 13 | 7]), None);
        assert_eq!(of("ioprio_set", &[1, 0, 3 << 13]), None);
        assert_eq!(of("ioprio_set", &[1, 0, 1 << 13]), eperm);
        assert_eq!(of("ioprio_set", &[1, 0, 9 << 13]), eperm);
        assert_eq!(of("ioctl", &[0, 0x5401]), None);
        for request in [0x5412, 0x541c, 0x5412 | 1 << 32, 0x541c | 0xffff_ffff << 32] {
            assert_eq!(of("ioctl", &[0, request]), eperm, "{request:#x}");
        }
    }

    #[test]
    fn memfds_may_be_limited_to_those_that_cannot_be_executed() {
        let nr = libc::SYS_memfd_create as i32;
        let policy = default_profile();
        for (refuse_exec_memfd, flags, answer) in [
            (false, 0, Decision::Continue),
            (true, 0x8 | 0x1, Decision::Continue),
            (true, 0x1, Decision::Refuse(libc::EACCES, "memfd_create".into())),
            (true, 0x10, Decision::Refuse(libc::EACCES, "memfd_create".into())),
            (true, 0x8 << 32, Decision::Refuse(libc::EACCES, "memfd_create".into())),
        ] {
            let options = FilterOptions { refuse_exec_memfd, ..options(Network::None) };
            let args = [1, flags, 0, 0, 0, 0];
            assert_eq!(decide(nr, ARCH_X86_64, &args, &policy, &options), answer, "{flags:#x}");
        }
    }
}
