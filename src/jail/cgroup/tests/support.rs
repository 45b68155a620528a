//! A hierarchy to try things in, and children to put there.

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    sync::MutexGuard,
    time::{Duration, Instant},
};

use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};

use super::super::{layout::Controller, *};
use crate::testing::cgroup_turn;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Host {
    pub(super) hierarchy: Hierarchy,
    pub(super) _turn: MutexGuard<'static, ()>,
}

impl Host {
    /// An open hierarchy that gives `needed`; `None` where the host cannot.
    pub(super) fn open(name: &str, needed: &[Control]) -> Option<Self> {
        Self::open_with(needed, || Hierarchy::open("", &unique(name), &[rustix::process::getpid()]))
    }

    pub(super) fn open_with(
        needed: &[Control],
        open: impl FnOnce() -> Result<Hierarchy, CgroupError>,
    ) -> Option<Self> {
        let turn = cgroup_turn();
        let hierarchy = open().unwrap();
        let lacking = needed.iter().find_map(|control| hierarchy.available().lacking(*control));
        let Some(lack) = lacking else { return Some(Self { hierarchy, _turn: turn }) };
        let text = format!("{} can't be had here: {}; {}", lack.control, lack.why, lack.mend);
        hierarchy.close().unwrap();
        assert!(std::env::var_os("CI").is_none(), "{text}");
        eprintln!("skipped: {text}");
        None
    }

    /// Closes, and sees that nothing is left.
    pub(super) fn close(self) {
        let directories = self.directories();
        self.hierarchy.close().unwrap();
        for directory in directories {
            assert!(!directory.exists(), "{} is left", directory.display());
        }
    }

    /// The instance directories.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        let inner = self.hierarchy.directories("x");
        inner.iter().map(|source| source.path.parent().unwrap().to_owned()).collect()
    }

    pub(super) fn memory_directory(&self) -> (Kind, PathBuf) {
        let inner = self.hierarchy.directories("x");
        let memory = inner.iter().find(|s| s.controllers.contains(&Controller::Memory));
        let memory = memory.unwrap();
        (memory.kind, memory.path.parent().unwrap().to_owned())
    }
}

pub(super) fn unique(name: &str) -> String {
    format!("test-{}-{name}", std::process::id())
}

pub(super) fn limits() -> CgroupLimits {
    CgroupLimits {
        memory: Limit::At(32 * MIB),
        swap: Limit::At(0),
        cpus: Limit::At(MilliCpus(1000)),
        pids: Limit::At(16),
    }
}

/// A forked child that waits for its start. It only makes system calls: the
/// test's own process has threads.
pub(super) struct Child {
    pub(super) pid: Pid,
    start: Option<OwnedFd>,
}

impl Child {
    /// Forks, puts the child into `cgroup` and lets it run `body`.
    pub(super) fn run(cgroup: &Cgroup, body: fn()) -> Self {
        let mut child = Self::fork(body);
        cgroup.attach(child.pid).unwrap();
        child.start.take();
        child
    }

    fn fork(body: fn()) -> Self {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (read_raw, write_raw) = (read.as_raw_fd(), write.as_raw_fd());
        // SAFETY: the child only makes system calls before it ends.
        match unsafe { libc::fork() } {
            0 => {
                let mut byte = 0_u8;
                // SAFETY: a failed test leaves no process: its thread's end is this one's.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                // SAFETY: closes this copy, so that the end of file can come.
                unsafe { libc::close(write_raw) };
                // SAFETY: `byte` is valid for one byte.
                unsafe { libc::read(read_raw, (&raw mut byte).cast(), 1) };
                // SAFETY: as init does: what this process inherited, the
                // instance's locks among it, is closed in this copy only.
                unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
                body();
                // SAFETY: ends the copy without running the test harness's ends.
                unsafe { libc::_exit(0) }
            }
            pid => Self { pid: Pid::from_raw(pid).expect("fork"), start: Some(write) },
        }
    }

    pub(super) fn wait(&self) -> WaitStatus {
        waitpid(Some(self.pid), WaitOptions::empty()).unwrap().unwrap().1
    }
}

pub(super) fn pause_forever() {
    loop {
        // SAFETY: waits for a signal.
        unsafe { libc::pause() };
    }
}

pub(super) fn spin_forever() {
    loop {
        std::hint::spin_loop();
    }
}

/// Of its own processor time.
pub(super) fn spin_for_half_a_second() {
    let clock = rustix::time::ClockId::ProcessCPUTime;
    let used = || {
        let time = rustix::time::clock_gettime(clock);
        time.tv_sec * 1_000_000_000 + time.tv_nsec
    };
    while used() < 510_000_000 {
        std::hint::spin_loop();
    }
}

/// Writes to `bytes` of fresh memory, page by page, and gives it back.
pub(super) fn touch(bytes: usize) {
    let (access, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
    for offset in (0..bytes).step_by(4096) {
        // SAFETY: within the mapping just made.
        let byte = unsafe { start.cast::<u8>().add(offset) };
        // SAFETY: mapped for writing, and nobody else knows of it.
        unsafe { byte.write_volatile(1) };
    }
    // SAFETY: nothing refers to it any more.
    unsafe { libc::munmap(start, bytes) };
}

pub(super) fn hog() {
    touch(256 << 20);
}

/// Forks until the kernel refuses; exits with how many there were.
pub(super) fn fork_all() {
    let mut children = 0;
    // SAFETY: the children only wait.
    while children < 100 && unsafe { libc::fork() } > 0 {
        children += 1;
    }
    if children == 0 || children == 100 {
        pause_forever();
    }
    // SAFETY: ends the copy.
    unsafe { libc::_exit(children) }
}

pub(super) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come to pass");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(super) fn remove(mut cgroup: Cgroup) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(back) = cgroup.remove() {
        assert!(Instant::now() < deadline, "{back:?} stays");
        cgroup = *back;
    }
}
