//! `dispatcher serve`: the monitor.
//!
//! Tiny on purpose. It binds the sockets, has the policies compiled, starts
//! launcher and server and starts them again when they die, and passes signals
//! on. It has one thread, and never reads a byte that a stranger sent.
//!
//! ```text
//!            SIGTERM                 server gone            launcher gone
//!   Serving ─────────► Draining ───────────────► Farewell ───────────────► exit 0
//!      └── SIGTERM twice: both are killed at once ──────────────────────────►
//! ```

pub mod child;
pub mod compiler;
pub mod listen;
mod notify;
mod watch;

use std::{
    io::{self, Write as _},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::event::{PollFd, PollFlags};

use self::{
    child::{Child, Executable, Privilege},
    compiler::Compiled,
    listen::Listener,
    watch::Watch,
};
use crate::{
    config::{Config, Reload},
    jail::message::{FromMonitor as ToLauncher, LauncherConfig},
    server::message::{FromMonitor as ToServer, FromServer},
    sys,
};

/// First pause before a dead process is started again; doubled up to the longest.
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_LONGEST: Duration = Duration::from_secs(5);
/// A process that lived so long died of something else than its start.
const BACKOFF_RESET: Duration = Duration::from_secs(60);
/// What the server gets on top of its drain timeout before it is killed.
const DRAIN_SLACK: Duration = Duration::from_secs(10);
/// How long the launcher may take to end its runs and remove its cgroups.
const FAREWELL: Duration = Duration::from_secs(8);

/// Why the service can't start; `dispatcher serve` then exits with 78.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The policies.
    #[error(transparent)]
    Compile(#[from] compiler::CompileError),
    /// An address.
    #[error(transparent)]
    Listen(#[from] listen::ListenError),
    /// Something the system refused.
    #[error("{what}: {error}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        error: io::Error,
    },
}

fn system(what: &'static str) -> impl Fn(io::Error) -> StartError {
    move |error| StartError::System { what, error }
}

/// Runs the service until it is told to stop.
///
/// # Errors
/// [`StartError`], before anything is served.
pub fn run(config: Config) -> Result<ExitCode, StartError> {
    let executable = Executable::own().map_err(system("/proc/self/exe"))?;
    let compiled = compiler::run(&executable, &config.policies)?;
    let listeners = config
        .listen
        .iter()
        .chain(&config.health_listen)
        .map(|address| Listener::bind(address, config.socket_mode, &config.socket_group))
        .collect::<Result<Vec<_>, _>>()?;
    let signals = signals().map_err(|error| system("signalfd")(error.into()))?;
    let watch = match config.reload {
        Reload::Watch => {
            Some(Watch::over(&config.policies).map_err(|error| system("inotify")(error.into()))?)
        }
        Reload::Signal => None,
    };
    let mut monitor = Monitor {
        config,
        executable,
        compiled,
        listeners,
        signals,
        watch,
        launcher: Slot::default(),
        server: Slot::default(),
        announced: false,
        draining: None,
    };
    Ok(monitor.serve())
}

fn signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// A process that should be there, and when it may be started (again).
#[derive(Debug)]
struct Slot {
    child: Option<Child>,
    start_at: Instant,
    backoff: Duration,
}

impl Default for Slot {
    fn default() -> Self {
        Self { child: None, start_at: Instant::now(), backoff: BACKOFF_FIRST }
    }
}

impl Slot {
    /// Its process ended: decides when the next may start.
    fn ended(&mut self, now: Instant) {
        let lived = self.child.take().map_or(Duration::ZERO, |child| now - child.started);
        if lived >= BACKOFF_RESET {
            self.backoff = BACKOFF_FIRST;
        }
        self.start_at = now + self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF_LONGEST);
    }

    fn is_due(&self, now: Instant) -> bool {
        self.child.is_none() && self.start_at <= now
    }
}

struct Monitor {
    config: Config,
    executable: Executable,
    compiled: Compiled,
    listeners: Vec<Listener>,
    signals: SignalFd,
    watch: Option<Watch>,
    launcher: Slot,
    server: Slot,
    announced: bool,
    /// When the server is killed if it has not drained by then.
    draining: Option<Instant>,
}

impl Monitor {
    fn serve(&mut self) -> ExitCode {
        loop {
            let now = Instant::now();
            if self.draining.is_none() {
                self.start_what_is_missing(now);
            } else if self.server.child.is_none() {
                return self.farewell();
            }
            let ready = self.wait();
            if ready.signals {
                self.on_signals();
            }
            if ready.watch || self.watch.as_ref().is_some_and(|watch| watch.settled()) {
                self.on_watch();
            }
            if ready.server_speaks {
                self.on_server_speaks();
            }
            self.collect_the_dead();
            if self.draining.is_some_and(|deadline| deadline <= Instant::now()) {
                tracing::error!("the server has not drained in time: killing it");
                kill(&self.server);
                self.draining = Some(Instant::now() + DRAIN_SLACK);
            }
        }
    }

    // Starting.

    fn start_what_is_missing(&mut self, now: Instant) {
        let mut fresh = false;
        // The launcher first: it makes room in our cgroup, which the server then shares.
        if self.launcher.is_due(now) {
            fresh |= self.start_launcher(now);
        }
        if self.server.is_due(now) {
            fresh |= self.start_server(now);
        }
        if fresh {
            self.introduce();
        }
    }

    fn start_launcher(&mut self, now: Instant) -> bool {
        let config = self.launcher_config();
        let started = start_launcher(&self.executable, config).and_then(|child| {
            child.send(&ToLauncher::Policies, &[self.compiled.templates.as_fd()])?;
            Ok(child)
        });
        install(&mut self.launcher, "dispatch-launch", started, now)
    }

    fn launcher_config(&self) -> LauncherConfig {
        LauncherConfig {
            instance: std::process::id().to_string(),
            cgroup_parent: self.config.cgroup_parent.clone(),
            uid_range: self.config.uid_range,
        }
    }

    fn start_server(&mut self, now: Instant) -> bool {
        // The last uid of the range is the server's own: strangers talk to it,
        // so it has no privilege and shares its uid with nobody.
        let privilege = if rustix::process::geteuid().is_root() {
            Privilege::Drop(self.config.uid_range.1)
        } else {
            Privilege::Keep
        };
        let configure = ToServer::Configure {
            config: Box::new(self.config.clone()),
            listeners: self
                .listeners
                .iter()
                .take(self.config.listen.len())
                .map(|listener| listener.address.clone())
                .collect(),
            health: self.config.health_listen.is_some(),
        };
        let sockets: Vec<BorrowedFd<'_>> = self.listeners.iter().map(AsFd::as_fd).collect();
        let started = self.executable.start("dispatch-serve", &[], privilege).and_then(|child| {
            child.send(&configure, &sockets)?;
            child.send(&ToServer::Policies, &[self.compiled.policies.as_fd()])?;
            Ok(child)
        });
        install(&mut self.server, "dispatch-serve", started, now)
    }

    /// Gives server and launcher a fresh socketpair with each other.
    fn introduce(&mut self) {
        let (Some(launcher), Some(server)) = (&self.launcher.child, &self.server.child) else {
            return;
        };
        let introduced = sys::seqpacket_pair().and_then(|(for_launcher, for_server)| {
            launcher.send(&ToLauncher::Server, &[for_launcher.as_fd()])?;
            server.send(&ToServer::Launcher, &[for_server.as_fd()])
        });
        if let Err(error) = introduced {
            // One of them died meanwhile; its successor is introduced again.
            tracing::warn!("launcher and server can't be introduced: {error}");
        }
    }

    // Waiting.

    fn wait(&self) -> Ready {
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        let children = [&self.launcher, &self.server].map(|slot| slot.child.as_ref());
        fds.extend(children.iter().flatten().map(|child| PollFd::new(&child.pidfd, PollFlags::IN)));
        let watch_at = fds.len();
        fds.extend(self.watch.as_ref().map(|watch| PollFd::new(watch, PollFlags::IN)));
        let server_at = fds.len();
        fds.extend(children[1].map(|child| PollFd::new(&child.socket, PollFlags::IN)));
        let timeout = self.next_deadline().map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            rustix::event::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        // An interruption looks as if nothing was ready, which is right.
        rustix::event::poll(&mut fds, timeout.as_ref()).ok();
        let readable =
            |index: usize| fds.get(index).is_some_and(|fd| fd.revents().intersects(PollFlags::IN));
        Ready {
            signals: readable(0),
            watch: self.watch.is_some() && readable(watch_at),
            server_speaks: readable(server_at),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let restarts = [&self.launcher, &self.server]
            .into_iter()
            .filter(|slot| slot.child.is_none() && self.draining.is_none())
            .map(|slot| slot.start_at);
        let settles = self.watch.as_ref().and_then(Watch::settles_at);
        restarts.chain(settles).chain(self.draining).min()
    }

    fn collect_the_dead(&mut self) {
        let now = Instant::now();
        for slot in [&mut self.launcher, &mut self.server] {
            let Some(child) = &slot.child else { continue };
            if let Some(how) = child.ended() {
                if self.draining.is_none() {
                    tracing::error!("{} {how}; starting it again", child.name);
                }
                slot.ended(now);
            }
        }
    }

    // What happens.

    fn on_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo == Signal::SIGHUP as u32 {
                self.reload();
            } else if self.draining.is_none() {
                self.drain();
            } else {
                tracing::warn!("told to stop again: killing what still runs");
                kill(&self.server);
            }
        }
    }

    fn drain(&mut self) {
        tracing::info!("draining");
        notify::tell("STOPPING=1");
        self.draining = Some(Instant::now() + self.config.drain_timeout + DRAIN_SLACK);
        if let Some(server) = &self.server.child
            && server.send(&ToServer::Drain, &[]).is_err()
        {
            server.kill();
        }
    }

    fn on_watch(&mut self) {
        if let Some(watch) = &mut self.watch
            && watch.changed()
        {
            self.reload();
        }
    }

    /// The whole set or, where one file is wrong, none of it.
    fn reload(&mut self) {
        notify::reloading();
        match compiler::run(&self.executable, &self.config.policies) {
            Ok(compiled) => {
                self.compiled = compiled;
                self.hand_out_policies();
                tracing::info!("policies reloaded");
            }
            Err(error) => tracing::error!("{error}; the earlier policies stay in force"),
        }
        notify::tell("READY=1");
    }

    fn hand_out_policies(&self) {
        // The launcher first: it must know what the server will decide by.
        let told_launcher = self.launcher.child.as_ref().map(|launcher| {
            launcher.send(&ToLauncher::Policies, &[self.compiled.templates.as_fd()])
        });
        let told_server = self
            .server
            .child
            .as_ref()
            .map(|server| server.send(&ToServer::Policies, &[self.compiled.policies.as_fd()]));
        for error in [told_launcher, told_server].into_iter().flatten().filter_map(Result::err) {
            // It died: its successor gets them at its start.
            tracing::warn!("a process could not be told of the new policies: {error}");
        }
    }

    fn on_server_speaks(&mut self) {
        let Some(server) = &self.server.child else { return };
        let mut buffer = [0; 64];
        let Ok(Some((length, _))) = sys::receive_packet(&server.socket, &mut buffer) else {
            return; // its end is seen by its pidfd
        };
        match postcard::from_bytes(&buffer[..length]) {
            Ok(FromServer::Ready) if !self.announced => self.announce(),
            Ok(FromServer::Ready) => tracing::info!("the server is back"),
            Err(error) => tracing::warn!("the server said something unknown: {error}"),
        }
    }

    fn announce(&mut self) {
        self.announced = true;
        let mut stdout = io::stdout().lock();
        for listener in self.listeners.iter().take(self.config.listen.len()) {
            // A closed stdout is no reason not to serve.
            writeln!(stdout, "listening on {}", listener.address).ok();
        }
        stdout.flush().ok();
        notify::tell("READY=1");
    }

    /// The server is gone: end the launcher, which ends every run.
    fn farewell(&mut self) -> ExitCode {
        if let Some(launcher) = self.launcher.child.take() {
            end_launcher(launcher);
        }
        self.listeners.clear();
        tracing::info!("stopped");
        ExitCode::SUCCESS
    }
}

struct Ready {
    signals: bool,
    watch: bool,
    server_speaks: bool,
}

fn kill(slot: &Slot) {
    if let Some(child) = &slot.child {
        child.kill();
    }
}

fn install(slot: &mut Slot, name: &'static str, started: io::Result<Child>, now: Instant) -> bool {
    match started {
        Ok(child) => {
            slot.child = Some(child);
            true
        }
        Err(error) => {
            tracing::error!("{name} can't be started: {error}");
            slot.ended(now);
            false
        }
    }
}

/// Starts a launcher and configures it; policies and a server are still to come.
///
/// # Errors
/// Those of starting a process and of sending it its first message.
pub fn start_launcher(executable: &Executable, config: LauncherConfig) -> io::Result<Child> {
    let child = executable.start("dispatch-launch", &[], Privilege::Keep)?;
    child.send(&ToLauncher::Configure(config), &[])?;
    Ok(child)
}

/// Ends a launcher in good order: it kills its runs and removes its cgroups.
pub fn end_launcher(launcher: Child) {
    let Child { name, pid, pidfd, socket, started } = launcher;
    // Its end of file is its word to end.
    drop(socket);
    let Ok((placeholder, _)) = sys::seqpacket_pair() else { return };
    let launcher = Child { name, pid, pidfd, socket: placeholder, started };
    if launcher.wait(FAREWELL).is_none() {
        tracing::error!("{name} would not end: killing it");
        launcher.kill();
        launcher.wait(Duration::from_secs(1));
    }
}

/// What a private launcher is given by `dispatcher run`.
#[derive(Debug)]
pub struct PrivateLauncher {
    child: Option<Child>,
}

impl PrivateLauncher {
    /// Starts a launcher for this process alone. Returns it and our end of the
    /// socket that the execution client speaks over.
    ///
    /// # Errors
    /// Those of starting it and of handing it its templates.
    pub fn start(config: LauncherConfig, templates: BorrowedFd<'_>) -> io::Result<(Self, OwnedFd)> {
        let executable = Executable::own()?;
        let child = start_launcher(&executable, config)?;
        child.send(&ToLauncher::Policies, &[templates])?;
        let (ours, theirs) = sys::seqpacket_pair()?;
        child.send(&ToLauncher::Server, &[theirs.as_fd()])?;
        Ok((Self { child: Some(child) }, ours))
    }
}

impl Drop for PrivateLauncher {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            end_launcher(child);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_keeps_dying_is_started_ever_more_rarely() {
        let mut slot = Slot::default();
        let now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            slot.ended(now);
            pauses.push(slot.start_at - now);
        }
        assert_eq!(pauses[0], BACKOFF_FIRST);
        assert!(pauses.windows(2).all(|pair| pair[1] == (pair[0] * 2).min(BACKOFF_LONGEST)));
        assert_eq!(pauses[11], BACKOFF_LONGEST);
        assert!(!slot.is_due(now) && slot.is_due(now + BACKOFF_LONGEST));
    }
}
