//! The monitor: `dispatcher` as started by `serve`.
//!
//! It binds the listening sockets and keeps them, has the policies compiled,
//! starts the server and the launcher, joins them by a socketpair, starts them
//! again when they die, and passes signals on. It is single-threaded, and parses
//! nothing that a stranger sent.
//!
//! | file | what |
//! | --- | --- |
//! | `state` | what is done when: a state machine without any system call |
//! | `wait` | what happened, as that machine's events |
//! | `process`, `privilege` | starting a child, and what it gives up |
//! | `compile` | the compiler of policies, both sides of it |
//! | `listen` | the listening sockets |
//! | `peer` | talking to a child |
//! | `private` | a child of one's own, for `dispatcher run` |
//! | `signals`, `watch`, `notify`, `storage`, `backoff` | what they say |
//!
//! Two deaths are prepared for. That of the monitor itself: each child asked
//! for SIGKILL in that case, and sees the end of its socket. That of a child:
//! its peers see the end of theirs, what ran is ended, and a new one is started.

mod backoff;
pub mod compile;
mod listen;
mod notify;
mod peer;
mod private;
mod privilege;
mod process;
mod signals;
mod state;
mod storage;
mod wait;
mod watch;

use std::{
    collections::VecDeque,
    io::{self, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    process::ExitCode,
    time::Instant,
};

pub use private::{PrivateProcess, spawn_containers, spawn_launcher};

use self::{
    compile::{Compilation, CompileError, Compiled},
    listen::{ListenError, Listeners},
    notify::Notifier,
    peer::Peer,
    process::{Executable, Privilege, Process, Spawn},
    signals::Signals,
    state::{Action, Event, Role, State},
    watch::Watch,
};
use crate::{
    config::{Config, ListenAddress, Reload},
    container::{self, message as to_containers},
    jail::message as to_launcher,
    server::message as to_server,
    sys,
};

/// The server's name and argv[0].
pub const SERVER: &str = "dispatch-serve";

/// The launcher's name and argv[0].
pub const LAUNCHER: &str = "dispatch-launch";

/// The name and argv[0] of whoever has Docker's socket.
pub const CONTAINERS: &str = container::process::NAME;

/// Why the service can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It was told to stop before it had started.
    #[error("told to stop while starting")]
    Stopped,
    /// There are no policies.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// An address can't be listened on.
    #[error("can't listen on {address}: {error}")]
    Listen {
        /// As configured.
        address: ListenAddress,
        /// Why.
        error: ListenError,
    },
    /// The system refused something.
    #[error("{what}: {error}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        error: io::Error,
    },
}

impl StartError {
    /// Whether it is for whoever wrote the configuration or the policies to mend.
    #[must_use]
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Compile(error) => matches!(error, CompileError::Faults),
            Self::Listen { error, .. } => error.is_configuration(),
            Self::Stopped | Self::System { .. } => false,
        }
    }

    fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::System { what, error }
    }
}

/// Runs the service until it is told to stop. Call it while there is one thread.
///
/// # Errors
/// [`StartError`], before anything is served.
pub fn run(config: &Config) -> Result<ExitCode, StartError> {
    match Monitor::start(config) {
        Ok(mut monitor) => Ok(ExitCode::from(monitor.serve())),
        Err(StartError::Stopped) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(error),
    }
}

struct Monitor<'a> {
    config: &'a Config,
    executable: Executable,
    signals: Signals,
    notifier: Notifier,
    /// `None` from the moment that the end begins.
    listeners: Option<Listeners>,
    policies: Compiled,
    compilation: Option<Compilation>,
    watch: Option<Watch>,
    /// The server's own user and group, where it has one.
    server_id: Option<u32>,
    server: Option<Peer>,
    launcher: Option<Peer>,
    containers: Option<Peer>,
}

impl<'a> Monitor<'a> {
    /// Everything up to the first child. Bad configuration is told before
    /// anything is bound.
    fn start(config: &'a Config) -> Result<Self, StartError> {
        let system = StartError::system;
        rustix::thread::set_name(c"dispatcher").map_err(|e| system("prctl")(e.into()))?;
        // First of all: from here on an end is orderly.
        let signals = Signals::take().map_err(system("signals"))?;
        let executable = Executable::own().map_err(system("/proc/self/exe"))?;
        let notifier = Notifier::from_environment().map_err(system("$NOTIFY_SOCKET"))?;
        // Watching before reading, so that no change is missed; but what the
        // policies' faults say about a missing directory is clearer.
        let watch = (config.reload == Reload::Watch).then(|| Watch::new(&config.policies));
        let policies = wait::first_policies(&executable, &signals, &config.policies)?;
        let watch = watch.transpose().map_err(system("watching the policies"))?;
        tracing::info!(digest = %policies.digest, "policies of {}", config.policies.display());
        let server_id = privilege::server_id(config.uid_range);
        let unusable =
            storage::prepare(&config.state, server_id).map_err(system("the state directory"))?;
        if let Some(why) = unusable {
            tracing::warn!("{why}");
        }
        let listeners = Listeners::bind(config)
            .map_err(|(address, error)| StartError::Listen { address, error })?;
        Ok(Self {
            config,
            executable,
            signals,
            notifier,
            listeners: Some(listeners),
            policies,
            compilation: None,
            watch,
            server_id,
            server: None,
            launcher: None,
            containers: None,
        })
    }

    /// Waits, decides, acts; to the end.
    fn serve(&mut self) -> u8 {
        let containers = self.policies.containers;
        let (mut state, first) =
            State::start(self.config.drain_timeout, containers, Instant::now());
        let mut actions = VecDeque::from(first);
        let mut events = VecDeque::new();
        loop {
            while let Some(action) = actions.pop_front() {
                if let Action::Exit(code) = action {
                    return code;
                }
                if let Err(error) = self.perform(action, &mut events) {
                    tracing::error!(%error, "{action:?} failed");
                }
            }
            if events.is_empty()
                && let Err(error) = self.wait(state.deadline(), &mut events)
            {
                // Without poll(2) there is nothing left to do; the children go with us.
                tracing::error!(%error, "waiting failed");
                return 1;
            }
            if let Some(event) = events.pop_front() {
                actions.extend(state.on(event, Instant::now()));
            }
        }
    }

    fn perform(&mut self, action: Action, events: &mut VecDeque<Event>) -> io::Result<()> {
        match action {
            Action::Start(role) => {
                if let Err(error) = self.start_process(role) {
                    tracing::error!(%error, "{} can't be started", name(role));
                    events.push_back(Event::Gone { role, clean: false });
                }
            }
            Action::Configure(role) => {
                let told = self.configure(role).and_then(|()| self.send_policies(role));
                // A process that takes no messages is of no use.
                told.or_else(|error| self.give_up(role, &error))?;
            }
            Action::Connect(role) => self.connect(role)?,
            Action::Announce => self.announce(),
            Action::Compile => {
                self.notifier.reloading();
                match Compilation::start(&self.executable, &self.config.policies) {
                    Ok(compilation) => self.compilation = Some(compilation),
                    Err(error) => events.push_back(wait::compiled(Err(error.into()))),
                }
            }
            Action::SendPolicies => {
                // The server last: the others must know what it decides by.
                for role in [Role::Launcher, Role::Containers, Role::Server] {
                    self.send_policies(role).or_else(|error| self.give_up(role, &error))?;
                }
            }
            Action::Reloaded => self.notifier.ready(),
            Action::Stopping => {
                tracing::info!("stopping: no new calls, those that run may finish");
                self.notifier.stopping();
                self.compilation = None;
                self.watch = None;
            }
            Action::Drain => {
                let told = match &self.server {
                    Some(server) => server.send(&to_server::FromMonitor::Drain, &[]),
                    None => Ok(()),
                };
                told.or_else(|error| self.give_up(Role::Server, &error))?;
            }
            Action::End => {
                self.listeners = None;
                for peer in [&mut self.launcher, &mut self.containers].into_iter().flatten() {
                    peer.close();
                }
            }
            Action::Kill(role) => self.kill(role)?,
            Action::Exit(_) => {}
        }
        Ok(())
    }

    fn start_process(&mut self, role: Role) -> io::Result<()> {
        let started = start(&self.executable, role, self.server_id)?;
        tracing::info!(pid = started.0.pid(), "{} started", name(role));
        let slot = match role {
            Role::Server => &mut self.server,
            Role::Launcher => &mut self.launcher,
            Role::Containers => &mut self.containers,
        };
        *slot = Some(Peer::new(started)?);
        Ok(())
    }

    fn configure(&self, role: Role) -> io::Result<()> {
        let Some(peer) = self.peer(role) else { return Ok(()) };
        match role {
            Role::Launcher => {
                let config = to_launcher::LauncherConfig {
                    instance: instance(),
                    cgroup_parent: self.config.cgroup_parent.clone(),
                    uid_range: self.config.uid_range,
                };
                peer.send(&to_launcher::FromMonitor::Configure(config), &[])
            }
            Role::Containers => {
                let config = to_containers::ContainerConfig {
                    socket: self.config.docker_socket.clone(),
                    directory: self.config.docker_directory.clone(),
                };
                peer.send(&to_containers::FromMonitor::Configure(config), &[])
            }
            Role::Server => {
                // None where the end has begun: no server is started then.
                let Some(listeners) = &self.listeners else { return Ok(()) };
                let configure = to_server::FromMonitor::Configure {
                    config: Box::new(self.config.clone()),
                    listeners: listeners.addresses(),
                    health: listeners.health_address().is_some(),
                };
                peer.send(&configure, &listeners.sockets())
            }
        }
    }

    fn send_policies(&self, role: Role) -> io::Result<()> {
        let Some(peer) = self.peer(role) else { return Ok(()) };
        match role {
            Role::Launcher => {
                let templates = self.policies.templates()?;
                peer.send(&to_launcher::FromMonitor::Policies, &[templates.as_fd()])
            }
            Role::Containers => {
                let templates = self.policies.templates()?;
                peer.send(&to_containers::FromMonitor::Policies, &[templates.as_fd()])
            }
            Role::Server => {
                let set = self.policies.set()?;
                peer.send(&to_server::FromMonitor::Policies, &[set.as_fd()])
            }
        }
    }

    fn connect(&self, role: Role) -> io::Result<()> {
        let (Some(server), Some(other)) = (&self.server, self.peer(role)) else {
            return Ok(());
        };
        let (servers, others) = sys::seqpacket_pair()?;
        let others = [others.as_fd()];
        let (told, to_server) = match role {
            Role::Containers => (
                other.send(&to_containers::FromMonitor::Server, &others),
                to_server::FromMonitor::Containers,
            ),
            Role::Launcher | Role::Server => (
                other.send(&to_launcher::FromMonitor::Server, &others),
                to_server::FromMonitor::Launcher,
            ),
        };
        if let Err(error) = told {
            return self.give_up(role, &error);
        }
        server
            .send(&to_server, &[servers.as_fd()])
            .or_else(|error| self.give_up(Role::Server, &error))
    }

    fn announce(&self) {
        let Some(listeners) = &self.listeners else { return };
        let mut stdout = io::stdout().lock();
        let told = listeners
            .addresses()
            .iter()
            .try_for_each(|address| writeln!(stdout, "listening on {address}"))
            .and_then(|()| stdout.flush());
        if let Err(error) = told {
            // Nobody reads it: no reason not to serve.
            tracing::warn!(%error, "stdout can't be written");
        }
        for address in listeners.addresses() {
            tracing::info!("listening on {address}");
        }
        if let Some(address) = listeners.health_address() {
            tracing::info!("health on {address}");
        }
        self.notifier.ready();
    }

    /// A process that can't be told something: it is dead, about to die, or stuck.
    fn give_up(&self, role: Role, error: &io::Error) -> io::Result<()> {
        tracing::warn!(%error, "{} takes no messages", name(role));
        self.kill(role)
    }

    fn kill(&self, role: Role) -> io::Result<()> {
        self.peer(role).map_or(Ok(()), |peer| peer.process.kill())
    }

    fn peer(&self, role: Role) -> Option<&Peer> {
        match role {
            Role::Server => self.server.as_ref(),
            Role::Launcher => self.launcher.as_ref(),
            Role::Containers => self.containers.as_ref(),
        }
    }
}

/// Starts the process, the server as this user, and gives our end of its socket.
fn start(
    executable: &Executable,
    role: Role,
    server_id: Option<u32>,
) -> io::Result<(Process, OwnedFd)> {
    let (ours, theirs) = sys::seqpacket_pair()?;
    let privilege = match role {
        Role::Server => Privilege::None { id: server_id },
        Role::Launcher => Privilege::Kept,
        // Docker's socket is root's, and so is what containers see of ours.
        Role::Containers => Privilege::Bounded,
    };
    let descriptors = &[theirs.as_fd()];
    let spawn = Spawn { name: name(role), arguments: &[], descriptors, privilege };
    Ok((Process::start(executable, &spawn)?, ours))
}

/// A name for this dispatcher's cgroups that no other on this host has, and by
/// which people find whose they are: the id of this process.
#[must_use]
pub fn instance() -> String {
    std::process::id().to_string()
}

fn name(role: Role) -> &'static str {
    match role {
        Role::Server => SERVER,
        Role::Launcher => LAUNCHER,
        Role::Containers => CONTAINERS,
    }
}
