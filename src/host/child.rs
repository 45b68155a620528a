//! Trying things where they do no harm: in a cloned child that then exits.

use std::{io, os::fd::AsRawFd as _};

use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::{
    jail::{
        identity::{IdMap, write_maps},
        namespaces::{self, Cloned},
        step::{REPORT_LEN, Report, Step, StepError, word},
    },
    sys,
};

/// Where a trial ended.
#[derive(Debug)]
pub(super) enum Failed {
    /// The child couldn't be made with these namespaces.
    Clone(io::Error),
    /// Its ids couldn't be mapped.
    Maps(io::Error),
    /// What it did failed.
    Step(StepError),
    /// It ended without a word.
    Died,
}

impl Failed {
    /// errno(3), 0 where there is none.
    pub(super) fn errno(&self) -> i32 {
        match self {
            Self::Clone(error) | Self::Maps(error) => error.raw_os_error().unwrap_or(0),
            Self::Step(error) => error.errno,
            Self::Died => 0,
        }
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Clone(error) => write!(f, "clone3: {error}"),
            Self::Maps(error) => write!(f, "writing id maps: {error}"),
            Self::Step(error) => {
                write!(f, "{}: {}", error.step, io::Error::from_raw_os_error(error.errno))
            }
            Self::Died => f.write_str("the child that tried it died"),
        }
    }
}

/// Runs `body` in a child with new `namespaces` (`CLONE_NEW*`), its ids mapped
/// by `map` where it has a user namespace. `body` may only make system calls;
/// one that execs a program which exits with 0 has succeeded.
pub(super) fn in_child(
    namespaces: u64,
    map: Option<IdMap>,
    body: impl FnOnce() -> Result<(), StepError>,
) -> Result<(), Failed> {
    let (ours, theirs) = sys::seqpacket_pair().map_err(Failed::Clone)?;
    // SAFETY: `body` only makes system calls, so that what other threads may
    // hold at this moment is of no concern to the copy.
    let (pid, pidfd) =
        match unsafe { namespaces::clone(namespaces, None) }.map_err(Failed::Clone)? {
            Cloned::Child => {
                // Its copy must go, or our end of file would never reach it.
                sys::close(ours.as_raw_fd()).ok();
                let mut byte = [0];
                let told = rustix::io::read(&theirs, &mut byte);
                if told != Ok(1) {
                    sys::exit_now(1);
                }
                match body() {
                    Ok(()) => sys::exit_now(0),
                    Err(error) => {
                        sys::send_packet(&theirs, &Report::Failed(error).encode(), &[]).ok();
                        sys::exit_now(1)
                    }
                }
            }
            Cloned::Parent(pid, pidfd) => (pid, pidfd),
        };
    drop(theirs);
    let mapped = map.map_or(Ok(()), |map| write_maps(pid, map));
    let told = mapped
        .map_err(Failed::Maps)
        .and_then(|()| sys::send_packet(&ours, &[word::MAPPED], &[]).map_err(|_| Failed::Died));
    let mut buffer = [0; REPORT_LEN];
    let report = match told {
        Ok(()) => Ok(sys::receive_packet(&ours, &mut buffer)),
        Err(failed) => {
            // Without our word it exits.
            drop(ours);
            Err(failed)
        }
    };
    let ended = waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)), WaitIdOptions::EXITED);
    match (report?, ended) {
        (Ok(Some(_)), _) => match Report::decode(&buffer) {
            Some(Report::Failed(error)) => Err(Failed::Step(error)),
            _ => Err(Failed::Died),
        },
        (_, Ok(Some(status))) if status.exit_status() == Some(0) => Ok(()),
        _ => Err(Failed::Died),
    }
}

/// A system call's result as that of a step.
pub(super) fn at<T, E: Into<io::Error>>(step: Step, result: Result<T, E>) -> Result<T, StepError> {
    result.map_err(|error| StepError {
        step,
        index: 0,
        errno: error.into().raw_os_error().unwrap_or(libc::EIO),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_childs_word_comes_back() {
        assert!(in_child(0, None, || Ok(())).is_ok());
        let error = StepError { step: Step::Proc, index: 0, errno: libc::EPERM };
        let failed = in_child(0, None, || Err(error)).unwrap_err();
        assert!(matches!(failed, Failed::Step(back) if back == error), "{failed}");
        let failed = in_child(0, None, || sys::exit_now(3)).unwrap_err();
        assert!(matches!(failed, Failed::Died), "{failed}");
        let failed = in_child(1 << 63, None, || Ok(())).unwrap_err();
        assert!(matches!(failed, Failed::Clone(_)), "{failed}");
    }
}
