//! The kernel's system call numbers, as text: each line begins with the number
//! of its first call and counts on from there.
//!
//! Sources: the kernel's `unistd_64.h`, `unistd_32.h`, `unistd_x32.h`, up to
//! Linux 7.1. To add a call, append it to the last line of its table; tests
//! compare with the libc crate.

/// x86_64, the only entry that a run may use.
pub(super) const X86_64: &str = "
   0  read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction
  14  rt_sigprocmask rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select
  24  sched_yield mremap msync mincore madvise shmget shmat shmctl dup dup2 pause nanosleep
  36  getitimer alarm setitimer getpid sendfile socket connect accept sendto recvfrom sendmsg
  47  recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt
  56  clone fork vfork execve exit wait4 kill uname semget semop semctl shmdt msgget msgsnd
  70  msgrcv msgctl fcntl flock fsync fdatasync truncate ftruncate getdents getcwd chdir
  81  fchdir rename mkdir rmdir creat link unlink symlink readlink chmod fchmod chown fchown
  94  lchown umask gettimeofday getrlimit getrusage sysinfo times ptrace getuid syslog getgid
 105  setuid setgid geteuid getegid setpgid getppid getpgrp setsid setreuid setregid getgroups
 116  setgroups setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid getsid
 125  capget capset rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack
 132  utime mknod uselib personality ustat statfs fstatfs sysfs getpriority setpriority
 142  sched_setparam sched_getparam sched_setscheduler sched_getscheduler
 146  sched_get_priority_max sched_get_priority_min sched_rr_get_interval mlock munlock
 151  mlockall munlockall vhangup modify_ldt pivot_root _sysctl prctl arch_prctl adjtimex
 160  setrlimit chroot sync acct settimeofday mount umount2 swapon swapoff reboot sethostname
 171  setdomainname iopl ioperm create_module init_module delete_module get_kernel_syms
 178  query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid
 187  readahead setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr
 196  flistxattr removexattr lremovexattr fremovexattr tkill time futex sched_setaffinity
 204  sched_getaffinity set_thread_area io_setup io_destroy io_getevents io_submit io_cancel
 211  get_thread_area lookup_dcookie epoll_create epoll_ctl_old epoll_wait_old
 216  remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64
 222  timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_settime
 228  clock_gettime clock_getres clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes
 236  vserver mbind set_mempolicy get_mempolicy mq_open mq_unlink mq_timedsend mq_timedreceive
 244  mq_notify mq_getsetattr kexec_load waitid add_key request_key keyctl ioprio_set
 252  ioprio_get inotify_init inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat
 259  mknodat fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat
 268  fchmodat faccessat pselect6 ppoll unshare set_robust_list get_robust_list splice tee
 277  sync_file_range vmsplice move_pages utimensat epoll_pwait signalfd timerfd_create
 284  eventfd fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2
 291  epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open
 299  recvmmsg fanotify_init fanotify_mark prlimit64 name_to_handle_at open_by_handle_at
 305  clock_adjtime syncfs sendmmsg setns getcpu process_vm_readv process_vm_writev kcmp
 313  finit_module sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create
 320  kexec_file_load bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2
 328  pwritev2 pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq uretprobe uprobe
 424  pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount
 430  fsopen fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd
 439  faccessat2 process_madvise epoll_pwait2 mount_setattr quotactl_fd
 444  landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret
 448  process_mrelease futex_waitv set_mempolicy_home_node cachestat fchmodat2
 453  map_shadow_stack futex_wake futex_wait futex_requeue statmount listmount
 459  lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat
 465  listxattrat removexattrat open_tree_attr file_getattr file_setattr listns
 471  rseq_slice_yield
";

/// x32's own numbers; below 512 it shares those of x86_64. All without the x32 bit.
pub(super) const X32: &str = "
 512  rt_sigaction rt_sigreturn ioctl readv writev recvfrom sendmsg recvmsg execve ptrace
 522  rt_sigpending rt_sigtimedwait rt_sigqueueinfo sigaltstack timer_create mq_notify
 528  kexec_load waitid set_robust_list get_robust_list vmsplice move_pages preadv pwritev
 536  rt_tgsigqueueinfo recvmmsg sendmmsg process_vm_readv process_vm_writev setsockopt
 542  getsockopt io_setup io_submit execveat preadv2 pwritev2
";

/// i386: `int 0x80` and 32-bit programs.
pub(super) const I386: &str = "
   0  restart_syscall exit fork read write open close waitpid creat link unlink execve chdir
  13  time mknod chmod lchown break oldstat lseek getpid mount umount setuid getuid stime
  26  ptrace alarm oldfstat pause utime stty gtty access nice ftime sync kill rename mkdir
  40  rmdir dup pipe times prof brk setgid getgid signal geteuid getegid acct umount2 lock
  54  ioctl fcntl mpx setpgid ulimit oldolduname umask chroot ustat dup2 getppid getpgrp
  66  setsid sigaction sgetmask ssetmask setreuid setregid sigsuspend sigpending sethostname
  75  setrlimit getrlimit getrusage gettimeofday settimeofday getgroups setgroups select
  83  symlink oldlstat readlink uselib swapon reboot readdir mmap munmap truncate ftruncate
  94  fchmod fchown getpriority setpriority profil statfs fstatfs ioperm socketcall syslog
 104  setitimer getitimer stat lstat fstat olduname iopl vhangup idle vm86old wait4 swapoff
 116  sysinfo ipc fsync sigreturn clone setdomainname uname modify_ldt adjtimex mprotect
 126  sigprocmask create_module init_module delete_module get_kernel_syms quotactl getpgid
 133  fchdir bdflush sysfs personality afs_syscall setfsuid setfsgid _llseek getdents
 142  _newselect flock msync readv writev getsid fdatasync _sysctl mlock munlock mlockall
 153  munlockall sched_setparam sched_getparam sched_setscheduler sched_getscheduler
 158  sched_yield sched_get_priority_max sched_get_priority_min sched_rr_get_interval
 162  nanosleep mremap setresuid getresuid vm86 query_module poll nfsservctl setresgid
 171  getresgid prctl rt_sigreturn rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait
 178  rt_sigqueueinfo rt_sigsuspend pread64 pwrite64 chown getcwd capget capset sigaltstack
 187  sendfile getpmsg putpmsg vfork ugetrlimit mmap2 truncate64 ftruncate64 stat64 lstat64
 197  fstat64 lchown32 getuid32 getgid32 geteuid32 getegid32 setreuid32 setregid32 getgroups32
 206  setgroups32 fchown32 setresuid32 getresuid32 setresgid32 getresgid32 chown32 setuid32
 214  setgid32 setfsuid32 setfsgid32 pivot_root mincore madvise getdents64 fcntl64
 224  gettid readahead setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr
 233  llistxattr flistxattr removexattr lremovexattr fremovexattr tkill sendfile64 futex
 241  sched_setaffinity sched_getaffinity set_thread_area get_thread_area io_setup io_destroy
 247  io_getevents io_submit io_cancel fadvise64
 252  exit_group lookup_dcookie epoll_create epoll_ctl epoll_wait remap_file_pages
 258  set_tid_address timer_create timer_settime timer_gettime timer_getoverrun timer_delete
 264  clock_settime clock_gettime clock_getres clock_nanosleep statfs64 fstatfs64 tgkill
 271  utimes fadvise64_64 vserver mbind get_mempolicy set_mempolicy mq_open mq_unlink
 279  mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load waitid
 286  add_key request_key keyctl ioprio_set ioprio_get inotify_init inotify_add_watch
 293  inotify_rm_watch migrate_pages openat mkdirat mknodat fchownat futimesat fstatat64
 301  unlinkat renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll unshare
 311  set_robust_list get_robust_list splice sync_file_range tee vmsplice move_pages getcpu
 319  epoll_pwait utimensat signalfd timerfd_create eventfd fallocate timerfd_settime
 326  timerfd_gettime signalfd4 eventfd2 epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev
 335  rt_tgsigqueueinfo perf_event_open recvmmsg fanotify_init fanotify_mark prlimit64
 341  name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg setns process_vm_readv
 348  process_vm_writev kcmp finit_module sched_setattr sched_getattr renameat2 seccomp
 355  getrandom memfd_create bpf execveat socket socketpair bind connect listen accept4
 365  getsockopt setsockopt getsockname getpeername sendto sendmsg recvfrom recvmsg shutdown
 374  userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc
 382  pkey_free statx arch_prctl io_pgetevents rseq
 393  semget semctl shmget shmctl shmat shmdt msgget msgsnd msgrcv msgctl clock_gettime64
 404  clock_settime64 clock_adjtime64 clock_getres_time64 clock_nanosleep_time64
 408  timer_gettime64 timer_settime64 timerfd_gettime64 timerfd_settime64 utimensat_time64
 413  pselect6_time64 ppoll_time64
 416  io_pgetevents_time64 recvmmsg_time64 mq_timedsend_time64 mq_timedreceive_time64
 420  semtimedop_time64 rt_sigtimedwait_time64 futex_time64 sched_rr_get_interval_time64
 424  pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount
 430  fsopen fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd
 439  faccessat2 process_madvise epoll_pwait2 mount_setattr quotactl_fd
 444  landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret
 448  process_mrelease futex_waitv set_mempolicy_home_node cachestat fchmodat2
 453  map_shadow_stack futex_wake futex_wait futex_requeue statmount listmount
 459  lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat
 465  listxattrat removexattrat open_tree_attr file_getattr file_setattr listns
 471  rseq_slice_yield
";

/// Calls that exist on other architectures only, besides those that i386 alone
/// has. A portable profile lists them; here they mean nothing.
pub(super) const ELSEWHERE: &str = "
    arm_fadvise64_64 arm_sync_file_range atomic_barrier atomic_cmpxchg_32 breakpoint
    cachectl cacheflush get_tls getpagesize multiplexer pciconfig_iobase pciconfig_read
    pciconfig_write recv riscv_flush_icache riscv_hwprobe rtas s390_guarded_storage
    s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr s390_sthyi send set_tls
    spu_create spu_run subpage_prot swapcontext switch_endian sync_file_range2
    sys_debug_setcontext syscall sysmips timerfd usr26 usr32
";
