//! A launcher or a `dispatch-docker` of one's own, for a program that is server and
//! monitor in one: `dispatcher run`.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use serde::Serialize;

use super::{
    name, peer,
    process::{Executable, Process, told},
    start,
    state::{END_LIMIT, Role},
};
use crate::{
    container::message::{self as to_containers, ContainerConfig},
    jail::{
        message::{self as to_launcher, LauncherConfig},
        plan::TemplateSet,
    },
    sys,
};

/// A process of one's own. Dropping it ends it and waits until it is gone, and with it
/// its runs and what they were given: their cgroups, their containers.
#[derive(Debug)]
pub struct PrivateProcess {
    role: Role,
    server: Option<OwnedFd>,
    monitor: Option<OwnedFd>,
    process: Option<Process>,
}

impl PrivateProcess {
    /// The server's end of the conversation, once; closing it ends all runs.
    pub fn take_server_socket(&mut self) -> Option<OwnedFd> {
        self.server.take()
    }

    /// Ends it and waits until it is gone.
    ///
    /// # Errors
    /// Where it would not go in good order, and something of a run may be left.
    pub fn end(mut self) -> io::Result<()> {
        self.end_process()
    }

    fn end_process(&mut self) -> io::Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        let name = name(self.role);
        // At this end of file it cleans up and exits.
        self.server = None;
        self.monitor = None;
        match process.wait(END_LIMIT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(io::Error::other(format!("{name} {}", told(status)))),
            None => {
                process.kill()?;
                process.wait(END_LIMIT)?;
                Err(io::Error::other(format!("{name} would not end and was killed")))
            }
        }
    }
}

impl Drop for PrivateProcess {
    fn drop(&mut self) {
        if let Err(error) = self.end_process() {
            tracing::error!("{error}");
        }
    }
}

/// Starts a launcher with these templates. Call it while there is one thread,
/// from that thread: the launcher dies with it.
///
/// # Errors
/// Those of starting a process and of sending it its first messages.
pub fn spawn_launcher(
    config: LauncherConfig,
    templates: &TemplateSet,
) -> io::Result<PrivateProcess> {
    use to_launcher::FromMonitor::{Configure, Policies, Server};
    let words = FirstWords { configure: Configure(config), policies: Policies, server: Server };
    spawn(Role::Launcher, &words, templates)
}

/// Starts a `dispatch-docker` with these templates; call it as [`spawn_launcher`].
///
/// # Errors
/// Those of starting a process and of sending it its first messages.
pub fn spawn_containers(
    config: ContainerConfig,
    templates: &TemplateSet,
) -> io::Result<PrivateProcess> {
    use to_containers::FromMonitor::{Configure, Policies, Server};
    let words = FirstWords { configure: Configure(config), policies: Policies, server: Server };
    spawn(Role::Containers, &words, templates)
}

/// What a process is told first, each in the words that it understands.
struct FirstWords<M> {
    configure: M,
    policies: M,
    server: M,
}

fn spawn(
    role: Role,
    words: &FirstWords<impl Serialize>,
    templates: &TemplateSet,
) -> io::Result<PrivateProcess> {
    let executable = Executable::own()?;
    let bytes = postcard::to_stdvec(templates).map_err(io::Error::other)?;
    let templates = sys::sealed_memfd(c"templates", &[&bytes], false)?;
    let (server, theirs) = sys::seqpacket_pair()?;
    let (process, monitor) = start(&executable, role, None)?;
    // Whole from here on: an error below ends the process.
    let mut private =
        PrivateProcess { role, server: Some(server), monitor: None, process: Some(process) };
    let monitor = &*private.monitor.insert(monitor);
    peer::send(monitor, &words.configure, &[])?;
    peer::send(monitor, &words.policies, &[templates.as_fd()])?;
    peer::send(monitor, &words.server, &[theirs.as_fd()])?;
    Ok(private)
}
