//! The compiler: a short-lived process that reads the policy directory and
//! leaves two memfds, one for the server and one for the launcher.
//!
//! A process of its own, so that neither the monitor nor the launcher, which
//! are privileged and live long, ever parse TOML or JSON, and so that one that
//! hangs can be ended. It tells faults and warnings on stderr itself.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    process::{ExitCode, ExitStatus},
    time::{Duration, Instant},
};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, open};

use super::process::{Executable, FIRST_FD, Privilege, Process, Spawn, told};
use crate::{
    names::Digest,
    policy::{
        compile::{Loaded, host_user, load},
        fault::tell,
    },
};

/// The process's name and argv[0].
pub const NAME: &str = "dispatch-compile";

/// How long it may take.
pub const TIME_MAX: Duration = Duration::from_secs(10);

/// Largest result in bytes; the launcher believes no larger one.
const SIZE_MAX: u64 = 256 << 20;

/// The compiler's exit code for policies with faults.
const FAULTY: u8 = 78;

/// Why there are no (new) policies.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// They have faults, which the compiler told.
    #[error("the policies have faults")]
    Faults,
    /// It could not be started or watched.
    #[error("the compiler of policies: {0}")]
    System(#[from] io::Error),
    /// It took longer than [`TIME_MAX`] and was killed.
    #[error("the compiler of policies took longer than {} s", TIME_MAX.as_secs())]
    TooLong,
    /// It ended in another way.
    #[error("the compiler of policies {0}")]
    Died(String),
    /// What it left is not what was asked for.
    #[error("the compiler of policies left {0}")]
    Result(&'static str),
}

/// Compiled policies: sealed, for handing on.
#[derive(Debug)]
pub struct Compiled {
    /// Of the whole set.
    pub digest: Digest,
    /// Whether a policy uses container mode.
    pub containers: bool,
    set: OwnedFd,
    templates: OwnedFd,
}

impl Compiled {
    /// A sealed memfd with the server's `PolicySet`, its offset shared with nobody.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn set(&self) -> io::Result<OwnedFd> {
        reopen(&self.set)
    }

    /// A sealed memfd with the launcher's `TemplateSet`, its offset shared with nobody.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn templates(&self) -> io::Result<OwnedFd> {
        reopen(&self.templates)
    }
}

/// A compiler at work. Dropping it kills it.
#[derive(Debug)]
pub struct Compilation {
    process: Process,
    set: OwnedFd,
    templates: OwnedFd,
    deadline: Instant,
}

impl Compilation {
    /// Starts one on `directory`.
    ///
    /// # Errors
    /// Those of memfd_create(2) and of [`Process::start`].
    pub fn start(executable: &Executable, directory: &Path) -> io::Result<Self> {
        let (set, templates) = (memfd(c"policies")?, memfd(c"templates")?);
        let process = Process::start(
            executable,
            &Spawn {
                name: NAME,
                arguments: &[OsStr::new(directory)],
                descriptors: &[set.as_fd(), templates.as_fd()],
                // It reads what may be for root's eyes only.
                privilege: Privilege::Bounded,
            },
        )?;
        Ok(Self { process, set, templates, deadline: Instant::now() + TIME_MAX })
    }

    /// When it has taken too long.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// What came of it; `None` while it is still at work and in time.
    pub fn result(&mut self, now: Instant) -> Option<Result<Compiled, CompileError>> {
        match self.process.ended() {
            Ok(Some(status)) => Some(self.take(status)),
            Ok(None) if now < self.deadline => None,
            Ok(None) => Some(Err(CompileError::TooLong)),
            Err(error) => Some(Err(error.into())),
        }
    }

    fn take(&self, status: ExitStatus) -> Result<Compiled, CompileError> {
        match status.code() {
            Some(0) => {}
            Some(code) if code == i32::from(FAULTY) => {
                return Err(CompileError::Faults);
            }
            _ => return Err(CompileError::Died(told(status))),
        }
        let digest: Digest = seal(&self.set)?;
        let (same, containers): (Digest, bool) = seal(&self.templates)?;
        if same != digest {
            return Err(CompileError::Result("two results that do not belong together"));
        }
        let (set, templates) = (reopen(&self.set)?, reopen(&self.templates)?);
        Ok(Compiled { digest, containers, set, templates })
    }
}

/// Readable once the compiler has ended.
impl AsFd for Compilation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

impl Drop for Compilation {
    fn drop(&mut self) {
        // Ended already, as a rule; then there is nothing to kill.
        if let Ok(None) = self.process.ended() {
            let killed = self.process.kill().and_then(|()| self.process.wait(TIME_MAX));
            if let Err(error) = killed {
                tracing::error!(%error, "the compiler of policies can't be ended");
            }
        }
    }
}

/// Makes a result unchangeable and reads what it begins with.
fn seal<T: serde::de::DeserializeOwned>(memfd: &OwnedFd) -> Result<T, CompileError> {
    // Refused where something still maps it for writing.
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(memfd, seals).map_err(io::Error::from)?;
    let mut file = File::from(reopen(memfd)?);
    if file.metadata()?.size() > SIZE_MAX {
        return Err(CompileError::Result("more than 256 MiB"));
    }
    // `PolicySet` and `TemplateSet` both have the digest as their first field.
    let mut head = [0; 64];
    let length = file.read(&mut head)?;
    match postcard::take_from_bytes(&head[..length]) {
        Ok((head, _)) => Ok(head),
        Err(_) => Err(CompileError::Result("no result")),
    }
}

fn memfd(name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL)
        // Before Linux 6.3 that flag is unknown.
        .or_else(|_| memfd_create(name, flags))
        .map_err(io::Error::from)
}

fn reopen(memfd: &OwnedFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    Ok(open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

fn encode(loaded: &Loaded) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let set = postcard::to_stdvec(&loaded.set).map_err(io::Error::other)?;
    let templates = postcard::to_stdvec(&loaded.templates).map_err(io::Error::other)?;
    Ok((set, templates))
}

/// The compiler's own main: argv[1] is the directory, the memfds are descriptors
/// 3 (for the server) and 4 (for the launcher).
#[must_use]
pub fn main() -> ExitCode {
    match compile() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // Nobody is left to tell if that fails.
            writeln!(io::stderr(), "{NAME}: {error}").ok();
            ExitCode::FAILURE
        }
    }
}

fn compile() -> io::Result<u8> {
    let usage = || io::Error::other("is started by the dispatcher, not by hand");
    let directory = std::env::args_os().nth(1).ok_or_else(usage)?;
    // By name, which is refused where nobody passed them on.
    let passed = |number: i32| {
        let path = format!("/proc/self/fd/{number}");
        File::options().write(true).open(path).map_err(|_| usage())
    };
    let (mut set, mut templates) = (passed(FIRST_FD)?, passed(FIRST_FD + 1)?);
    match load(Path::new(&directory), &host_user) {
        Ok(loaded) => {
            tell(&loaded.warnings, "warning: ", &mut io::stderr().lock())?;
            let (for_server, for_launcher) = encode(&loaded)?;
            set.write_all(&for_server)?;
            templates.write_all(&for_launcher)?;
            Ok(0)
        }
        Err(faults) => {
            tell(&faults, "", &mut io::stderr().lock())?;
            Ok(FAULTY)
        }
    }
}
