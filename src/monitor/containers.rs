//! Starting `dispatch-docker`; and one of one's own, for `dispatcher run`.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use super::{
    peer,
    process::{Executable, Privilege, Process, Spawn, told},
    state::END_LIMIT,
};
use crate::{
    container::{
        message::{ContainerConfig, FromMonitor},
        process::NAME,
    },
    jail::plan::TemplateSet,
    sys,
};

/// A private one. Dropping it ends it and waits until it is gone, and with it its containers.
#[derive(Debug)]
pub struct ContainersHandle {
    server: Option<OwnedFd>,
    monitor: Option<OwnedFd>,
    process: Option<Process>,
}

impl ContainersHandle {
    /// The server's end of the conversation, once; closing it ends all runs.
    pub fn take_server_socket(&mut self) -> Option<OwnedFd> {
        self.server.take()
    }

    /// Ends it and waits until it is gone.
    ///
    /// # Errors
    /// Where it would not go in good order, and a container may be left.
    pub fn end(mut self) -> io::Result<()> {
        self.end_process()
    }

    fn end_process(&mut self) -> io::Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        // At this end of file it cleans up and exits.
        self.server = None;
        self.monitor = None;
        match process.wait(END_LIMIT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(io::Error::other(format!("{NAME} {}", told(status)))),
            None => {
                process.kill()?;
                process.wait(END_LIMIT)?;
                Err(io::Error::other(format!("{NAME} would not end and was killed")))
            }
        }
    }
}

impl Drop for ContainersHandle {
    fn drop(&mut self) {
        if let Err(error) = self.end_process() {
            tracing::error!("{error}");
        }
    }
}

/// Starts one with these templates. Call it while there is one thread, from that thread:
/// it dies with it.
///
/// # Errors
/// Those of starting a process and of sending it its first messages.
pub fn spawn_containers(
    config: ContainerConfig,
    templates: &TemplateSet,
) -> io::Result<ContainersHandle> {
    let executable = Executable::own()?;
    let bytes = postcard::to_stdvec(templates).map_err(io::Error::other)?;
    let templates = sys::sealed_memfd(c"templates", &[&bytes], false)?;
    let (server, ours) = sys::seqpacket_pair()?;
    let (process, monitor) = start(&executable)?;
    // Whole from here on: an error below ends the process.
    let handle =
        ContainersHandle { server: Some(server), monitor: Some(monitor), process: Some(process) };
    if let Some(monitor) = &handle.monitor {
        peer::send(monitor, &FromMonitor::Configure(config), &[])?;
        peer::send(monitor, &FromMonitor::Policies, &[templates.as_fd()])?;
        peer::send(monitor, &FromMonitor::Server, &[ours.as_fd()])?;
    }
    Ok(handle)
}

/// Starts the process, and gives our end of its socket.
pub(super) fn start(executable: &Executable) -> io::Result<(Process, OwnedFd)> {
    let (ours, theirs) = sys::seqpacket_pair()?;
    let process = Process::start(
        executable,
        &Spawn {
            name: NAME,
            arguments: &[],
            descriptors: &[theirs.as_fd()],
            // Docker's socket is root's, and so is what containers see of ours.
            privilege: Privilege::Bounded,
        },
    )?;
    Ok((process, ours))
}
