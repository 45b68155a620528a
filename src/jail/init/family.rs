//! How init begins the process that becomes the program.
//!
//! In a jail that process shares init's memory until it execs: to copy it, and to throw
//! the copy away at exec, is much of what a launch takes. Both make only system calls
//! meanwhile, which write to no memory of both (`sys::raw`); what one does to its ids,
//! capabilities and limits is its own, and its descriptors are a copy.
//!
//! One thing is not: while processes share memory, the kernel gives them one OOM score
//! (`__set_oom_adj`, fs/proc/base.c). So init raises its own before, the program inherits
//! it, and init takes it back when exec has parted them.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use rustix::event::Timespec;

use super::Context;
use crate::{
    jail::program::{self, Beginning},
    sys::{self, Mapping},
};

/// The stack of a process that becomes the program, in bytes; a few pages of it are used.
const STACK: usize = 128 << 10;

/// The highest score, oom_score_adj in proc_pid(5).
const HIGHEST: &[u8] = b"1000";

/// Longest text of a score.
const SCORE_LEN: usize = 8;

/// How long init leaves its score raised after exec. The kernel looks at every process of
/// the host when it is taken back, and most programs have ended before.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// The process that becomes the program.
pub(super) struct Begun {
    /// Its pid.
    pub program: i32,
    /// Init's own score, where it must be taken back.
    pub score: Option<Score>,
}

/// Begins it.
pub(super) fn begin(
    context: Context<'_>,
    ruleset: Option<RawFd>,
    host_proc: BorrowedFd<'_>,
) -> io::Result<Begun> {
    // In direct mode init may hold CAP_SYS_RESOURCE of the host: then a score that it
    // raised is the least that it may have. And memfd-exec allocates.
    if context.blueprint.root.is_none() {
        return begin_apart(Beginning { context, ruleset, exec_told_by: None }, host_proc);
    }
    let (exec, told_by) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let score = Score::raise(host_proc, exec)?;
    let exec_told_by = Some(told_by.as_raw_fd());
    let program = begin_sharing(Beginning { context, ruleset, exec_told_by })?;
    Ok(Begun { program, score: Some(score) })
}

fn begin_apart(beginning: Beginning<'_>, host_proc: BorrowedFd<'_>) -> io::Result<Begun> {
    let program = sys::fork()?;
    if program == 0 {
        let raised = open_score(host_proc).and_then(|file| write(&file, HIGHEST));
        match beginning.context.at(crate::jail::step::Step::Attributes, raised) {
            Ok(()) => program::main(beginning),
            Err(error) => beginning.context.fail(error),
        }
    }
    Ok(Begun { program, score: None })
}

fn begin_sharing(beginning: Beginning<'_>) -> io::Result<i32> {
    let stack = Mapping::anonymous(STACK)?;
    let bottom = stack.as_ptr().cast_mut();
    let place: *mut Beginning<'_> = bottom.cast();
    // SAFETY: a mapping begins with a page, which is aligned for everything; it is ours
    // alone, and the stack grows towards it from the other end and never comes so far.
    unsafe { place.write(beginning) };
    // SAFETY: the mapping's end is the stack's; it is never unmapped, and nobody but the
    // child uses it. Of `beginning`, which is plain data, what it refers to is init's
    // blueprint: that is there, and unchanged, as long as init is.
    unsafe { sys::clone_sharing(bottom.add(STACK), enter, place.cast()) }
}

extern "C" fn enter(place: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `begin_sharing` put it there for us.
    let beginning = unsafe { place.cast::<Beginning<'_>>().read() };
    program::main(beginning)
}

/// Init's OOM score while it is raised. When memory runs out, the kernel shall take the
/// program and what it starts, never init, which must tell of it.
pub(super) struct Score {
    /// Its /proc/self/oom_score_adj, which init can't open any more once it is nobody.
    file: OwnedFd,
    /// Hung up when the program was exec'd; nothing once that was seen.
    exec: Option<OwnedFd>,
    before: [u8; SCORE_LEN],
    length: usize,
}

impl Score {
    /// How many descriptors it has.
    pub const DESCRIPTORS: u32 = 2;

    /// Raising it takes no capability. Nor does taking it back, as long as it was raised
    /// without CAP_SYS_RESOURCE of the host: after entering a user namespace.
    fn raise(host_proc: BorrowedFd<'_>, exec: OwnedFd) -> io::Result<Self> {
        let file = open_score(host_proc)?;
        let mut before = [0; SCORE_LEN];
        let length = rustix::io::pread(&file, &mut before, 0)?;
        write(&file, HIGHEST)?;
        Ok(Self { file, exec: Some(exec), before, length })
    }

    /// What is hung up by exec, until that was seen.
    pub(super) fn exec(&self) -> Option<BorrowedFd<'_>> {
        self.exec.as_ref().map(AsFd::as_fd)
    }

    /// The program was exec'd.
    pub(super) fn apart(self) -> Self {
        Self { exec: None, ..self }
    }

    /// Whether exec was seen, so that it can be taken back.
    pub(super) fn is_apart(&self) -> bool {
        self.exec.is_none()
    }

    /// How long to wait for something else before that.
    pub(super) fn pause(&self) -> Option<Timespec> {
        self.is_apart().then_some(PAUSE)
    }

    /// Takes it back.
    pub(super) fn restore(self) -> io::Result<()> {
        write(&self.file, &self.before[..self.length])
    }

    /// Its descriptors at numbers beyond those that init will use.
    pub(super) fn moved_away(self) -> io::Result<Self> {
        let away = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 16);
        let (file, exec) = (away(&self.file)?, self.exec.as_ref().map(away).transpose()?);
        Ok(Self { file, exec, ..self })
    }

    /// Its descriptors at this number and the next one, whatever was there.
    pub(super) fn moved_to(self, first: RawFd) -> io::Result<Self> {
        let to = |fd: &OwnedFd, number| {
            sys::dup_to(fd.as_raw_fd(), number)?;
            // SAFETY: it was just put there, and nothing else has that number.
            Ok::<_, io::Error>(unsafe { OwnedFd::from_raw_fd(number) })
        };
        let exec = self.exec.as_ref().map(|exec| to(exec, first + 1)).transpose()?;
        Ok(Self { file: to(&self.file, first)?, exec, ..self })
    }
}

fn open_score(host_proc: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(host_proc, c"self/oom_score_adj", flags, Mode::empty())?)
}

fn write(file: &OwnedFd, text: &[u8]) -> io::Result<()> {
    rustix::io::pwrite(file, text, 0)?;
    Ok(())
}
