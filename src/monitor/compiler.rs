//! `dispatch-compile`: the short-lived process that reads the policy files.
//!
//! Parsing TOML and JSON stays out of the processes that live on. It answers
//! with two sealed memfds, so that server and launcher get exactly the same set,
//! and neither gets it from the other.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use super::child::{Executable, Privilege, readable};
use crate::{policy::compile, sys};

/// How long reading the policies may take.
const COMPILE_TIME: Duration = Duration::from_secs(20);

/// One load of the policy directory.
#[derive(Debug)]
pub struct Compiled {
    /// A `PolicySet`, for the server.
    pub policies: OwnedFd,
    /// A `TemplateSet`, for the launcher.
    pub templates: OwnedFd,
}

/// Why there is none. The faults themselves are on standard error already.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The files are wrong.
    #[error("the policies are not in order: see the lines above")]
    Faults,
    /// The process could not do its work.
    #[error("the policies could not be read: {0}")]
    System(String),
}

/// Runs the compiler over a directory.
///
/// # Errors
/// [`CompileError`].
pub fn run(executable: &Executable, directory: &Path) -> Result<Compiled, CompileError> {
    let system = |error: std::io::Error| CompileError::System(error.to_string());
    let arguments = [directory.as_os_str()];
    let child =
        executable.start("dispatch-compile", &arguments, Privilege::Keep).map_err(system)?;
    let answered = readable(child.socket.as_fd(), COMPILE_TIME);
    if !answered {
        child.kill();
        child.wait(Duration::from_secs(5));
        return Err(CompileError::System(format!("they took over {COMPILE_TIME:?}")));
    }
    let answer = sys::receive_packet(&child.socket, &mut [0; 16]).map_err(system)?;
    child.wait(Duration::from_secs(5));
    let Some((_, fds)) = answer else { return Err(CompileError::Faults) };
    let [policies, templates]: [OwnedFd; 2] = fds
        .try_into()
        .map_err(|_| CompileError::System("the compiler's answer is malformed".into()))?;
    Ok(Compiled { policies, templates })
}

/// The main of the process: its argument is the directory, descriptor 3 the monitor.
#[must_use]
pub fn main(directory: &Path) -> ExitCode {
    let loaded = match compile::load(directory, &compile::host_user) {
        Ok(loaded) => loaded,
        Err(faults) => {
            for fault in faults {
                eprintln!("{fault}");
            }
            return ExitCode::FAILURE;
        }
    };
    for warning in &loaded.warnings {
        eprintln!("warning: {warning}");
    }
    match answer(&loaded) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dispatch-compile: {error}");
            ExitCode::FAILURE
        }
    }
}

fn answer(loaded: &compile::Loaded) -> std::io::Result<()> {
    let [policies, templates] = memfds(loaded)?;
    // SAFETY: the monitor left it open for us, and nothing else uses the number.
    let monitor = unsafe { sys::inherited_fd(3) };
    sys::send_packet(&monitor, b"compiled", &[policies.as_fd(), templates.as_fd()])
}

/// The two encoded sets: policies, then templates.
///
/// # Errors
/// Those of encoding and of memfd_create(2).
pub fn memfds(loaded: &compile::Loaded) -> std::io::Result<[OwnedFd; 2]> {
    let invalid = |error| std::io::Error::new(std::io::ErrorKind::InvalidData, error);
    let policies = postcard::to_stdvec(&loaded.set).map_err(invalid)?;
    let templates = postcard::to_stdvec(&loaded.templates).map_err(invalid)?;
    Ok([
        sys::sealed_memfd(c"policies", &[&policies], false)?,
        sys::sealed_memfd(c"templates", &[&templates], false)?,
    ])
}
