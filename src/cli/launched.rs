//! A launcher for as long as one command needs it.

use std::{io, os::fd::OwnedFd};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    config::LoadedConfig,
    container::message::ContainerConfig,
    execute::{Executors, launcher::Launcher},
    jail::{message::LauncherConfig, plan::TemplateSet},
    monitor::{self, PrivateProcess},
};

/// What ends a command before its time.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Returns when the first comes. Cancel-safe.
    pub(super) async fn any(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Starts a launcher with these templates, has `work` use it, and ends it with
/// all that it made. Call it while there is one thread: the launcher is forked.
///
/// # Errors
/// What failed on the way to `work`, in words.
pub(super) fn with_launcher<T>(
    settings: &LoadedConfig,
    templates: &TemplateSet,
    work: impl AsyncFnOnce(Executors, Signals) -> T,
) -> Result<T, String> {
    let failed = |what: &str, error: io::Error| format!("{what}: {error}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| failed("no runtime", error))?;
    // From here on a signal is no reason to leave the launcher's cgroups behind.
    let signals = {
        let _entered = runtime.enter();
        Signals::listen().map_err(|error| failed("signals", error))?
    };
    let config = LauncherConfig {
        instance: monitor::instance(),
        cgroup_parent: settings.config.cgroup_parent.clone(),
        uid_range: settings.config.uid_range,
    };
    let mut launcher = monitor::spawn_launcher(config, templates)
        .map_err(|error| failed("the launcher can't be started", error))?;
    let mut containers = containers(settings, templates)?;
    let worked = runtime.block_on(async {
        let clients = Executors::default();
        let attach = |client: &Launcher, socket: Option<OwnedFd>| {
            socket.map_or(Ok(()), |socket| client.attach(socket))
        };
        attach(&clients.launcher, launcher.take_server_socket())
            .map_err(|error| failed("the launcher's socket", error))?;
        let socket = containers.as_mut().and_then(PrivateProcess::take_server_socket);
        attach(&clients.containers, socket)
            .map_err(|error| failed("the socket to dispatch-docker", error))?;
        Ok(work(clients, signals).await)
    });
    if let Some(Err(error)) = containers.map(PrivateProcess::end) {
        eprintln!("warning: {error}");
    }
    // Its runs and their cgroups go with it.
    if let Err(error) = launcher.end() {
        eprintln!("warning: {error}");
    }
    worked
}

/// Whoever speaks with Docker, where a policy uses container mode.
fn containers(
    settings: &LoadedConfig,
    templates: &TemplateSet,
) -> Result<Option<PrivateProcess>, String> {
    if !templates.containers {
        return Ok(None);
    }
    let config = ContainerConfig {
        socket: settings.config.docker_socket.clone(),
        directory: settings.config.docker_directory.clone(),
    };
    monitor::spawn_containers(config, templates)
        .map(Some)
        .map_err(|error| format!("dispatch-docker can't be started: {error}"))
}
