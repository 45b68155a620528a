//! A launcher for as long as one command needs it.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    config::LoadedConfig, execute::launcher::Launcher, jail::message::LauncherConfig,
    jail::plan::TemplateSet, monitor,
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
    work: impl AsyncFnOnce(Launcher, Signals) -> T,
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
    let worked = runtime.block_on(async {
        let client = Launcher::new();
        let socket = launcher.take_server_socket();
        let attached = socket.map_or(Ok(()), |socket| client.attach(socket));
        attached.map_err(|error| failed("the launcher's socket", error))?;
        Ok(work(client, signals).await)
    });
    // Its runs and their cgroups go with it.
    if let Err(error) = launcher.end() {
        eprintln!("warning: {error}");
    }
    worked
}
