//! What the monitor does when: events in, actions out, no system call.
//!
//! ```text
//!            SIGTERM            server gone, or            launcher gone
//!   Running ─────────▶ Draining ──────────────▶ Ending ───────────────▶ Exit
//!      │               a second SIGTERM                                  ▲
//!      └── too many deaths before the first Ready ──▶ Ending ────────────┘
//! ```

use std::time::{Duration, Instant};

use super::backoff::Backoff;
use crate::server;

/// How much longer than its own drain timeout the server may take to exit: as
/// long as it gives itself to answer what it stops, and a moment more.
pub const DRAIN_GRACE: Duration = server::DRAIN_OVERTIME.saturating_add(Duration::from_secs(1));

/// How long the launcher may take to end all runs and remove their cgroups.
pub const END_LIMIT: Duration = Duration::from_secs(10);

/// Deaths before the service was ever ready after which starting is given up.
const EARLY_DEATHS_MAX: u32 = 5;

/// The processes that are kept alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `dispatch-serve`
    Server,
    /// `dispatch-launch`
    Launcher,
    /// `dispatch-docker`, where a policy in force uses container mode.
    Containers,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// SIGTERM or SIGINT.
    Stop,
    /// SIGHUP, or the policy directory changed and is quiet again.
    Reload,
    /// The server said so.
    Ready,
    /// The server finds no launcher at the other end of their socket.
    Parted,
    /// A process ended, or could not be started. `clean`: it exited with 0.
    Gone {
        /// Which.
        role: Role,
        /// Whether it exited with 0.
        clean: bool,
    },
    /// The compiler ended.
    Compiled {
        /// Whether there are new policies: if so, whether one uses container mode.
        containers: Option<bool>,
    },
    /// Time passed.
    Tick,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a process.
    Start(Role),
    /// Tell a process all that it has to know, policies included. Both are
    /// started before either is told: the launcher may move this dispatcher's
    /// processes into a cgroup of their own, and looks for them then.
    Configure(Role),
    /// Join the server and who runs its calls by a fresh socketpair.
    Connect(Role),
    /// Tell the world that the service is there; once.
    Announce,
    /// Start the compiler.
    Compile,
    /// Give the launcher, then the server, the new policies.
    SendPolicies,
    /// A reload is over, whatever came of it.
    Reloaded,
    /// Tell the world that the end has begun.
    Stopping,
    /// Tell the server to finish what runs and exit.
    Drain,
    /// Stop listening, and close the sockets of all that run calls: they end everything
    /// and exit.
    End,
    /// SIGKILL.
    Kill(Role),
    /// Exit with this code.
    Exit(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// Until the server is gone, or killed at this time.
    Draining(Instant),
    /// Until both are gone, or killed at this time.
    Ending(Instant),
}

#[derive(Clone, Copy, Debug)]
enum Life {
    Alive {
        since: Instant,
    },
    /// To be started then.
    Down {
        until: Instant,
    },
    /// Not to be started again.
    Over,
}

#[derive(Debug)]
struct Keeper {
    life: Life,
    backoff: Backoff,
    killed: bool,
}

impl Keeper {
    fn new(now: Instant) -> Self {
        Self { life: Life::Alive { since: now }, backoff: Backoff::new(), killed: false }
    }

    /// One that isn't wanted.
    fn absent() -> Self {
        Self { life: Life::Over, backoff: Backoff::new(), killed: false }
    }

    fn alive(&self) -> bool {
        matches!(self.life, Life::Alive { .. })
    }

    fn over(&self) -> bool {
        matches!(self.life, Life::Over)
    }
}

/// What the monitor knows.
#[derive(Debug)]
pub struct State {
    phase: Phase,
    drain_timeout: Duration,
    server: Keeper,
    launcher: Keeper,
    containers: Keeper,
    /// Whether a policy in force uses container mode.
    uses_containers: bool,
    announced: bool,
    early_deaths: u32,
    stops: u32,
    /// A compiler is at work.
    compiling: bool,
    /// There was reason for another while it was.
    compile_again: bool,
    code: u8,
}

impl State {
    /// The beginning, and what to do first; `containers`: a policy uses container mode.
    #[must_use]
    pub fn start(drain_timeout: Duration, containers: bool, now: Instant) -> (Self, Vec<Action>) {
        let mut state = Self {
            phase: Phase::Running,
            drain_timeout,
            server: Keeper::new(now),
            launcher: Keeper::new(now),
            containers: Keeper::absent(),
            uses_containers: false,
            announced: false,
            early_deaths: 0,
            stops: 0,
            compiling: false,
            compile_again: false,
            code: 0,
        };
        let mut actions = vec![
            Action::Start(Role::Launcher),
            Action::Start(Role::Server),
            Action::Configure(Role::Launcher),
            Action::Configure(Role::Server),
            Action::Connect(Role::Launcher),
        ];
        actions.extend(state.use_containers(containers, now));
        (state, actions)
    }

    /// What to do about `event`, in this order.
    pub fn on(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Stop => self.on_stop(now),
            Event::Reload => self.on_reload(),
            Event::Ready => self.on_ready(),
            Event::Parted => self.on_parted(),
            Event::Gone { role, clean } => self.on_gone(role, clean, now),
            Event::Compiled { containers } => self.on_compiled(containers, now),
            Event::Tick => self.on_tick(now),
        }
    }

    /// When [`Event::Tick`] is due; `None`: not until something else happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let keepers = [&self.server, &self.launcher, &self.containers];
        let starts = keepers.into_iter().filter_map(|keeper| match keeper.life {
            Life::Down { until } => Some(until),
            _ => None,
        });
        let end = match self.phase {
            Phase::Running => None,
            Phase::Draining(at) => (!self.server.killed).then_some(at),
            Phase::Ending(at) => {
                let going = |keeper: &Keeper| keeper.alive() && !keeper.killed;
                (going(&self.launcher) || going(&self.containers)).then_some(at)
            }
        };
        starts.chain(end).min()
    }

    fn on_stop(&mut self, now: Instant) -> Vec<Action> {
        self.stops += 1;
        match self.phase {
            Phase::Running => {
                let mut actions = vec![Action::Stopping];
                if self.server.alive() {
                    self.phase = Phase::Draining(now + self.drain_timeout + DRAIN_GRACE);
                    actions.push(Action::Drain);
                } else {
                    actions.extend(self.end(now));
                }
                actions
            }
            Phase::Draining(_) => self.end(now),
            // The third is for whoever can't wait for cgroups to be removed.
            Phase::Ending(_) if self.stops > 2 => self.kill_those_who_run_calls(),
            Phase::Ending(_) => Vec::new(),
        }
    }

    fn on_reload(&mut self) -> Vec<Action> {
        if self.phase != Phase::Running {
            return Vec::new();
        }
        if self.compiling {
            self.compile_again = true;
            return Vec::new();
        }
        self.compiling = true;
        vec![Action::Compile]
    }

    fn on_compiled(&mut self, containers: Option<bool>, now: Instant) -> Vec<Action> {
        self.compiling = false;
        let again = std::mem::take(&mut self.compile_again);
        if self.phase != Phase::Running {
            return Vec::new();
        }
        let mut actions = Vec::new();
        if let Some(containers) = containers {
            actions.push(Action::SendPolicies);
            actions.extend(self.use_containers(containers, now));
        }
        actions.push(Action::Reloaded);
        if again {
            actions.extend(self.on_reload());
        }
        actions
    }

    fn on_ready(&mut self) -> Vec<Action> {
        let first = !self.announced && self.phase == Phase::Running;
        self.announced |= first;
        if first { vec![Action::Announce] } else { Vec::new() }
    }

    /// Where one of them is dead, its successor is joined to the other anyway.
    fn on_parted(&mut self) -> Vec<Action> {
        let serving = !matches!(self.phase, Phase::Ending(_));
        let both = self.server.alive() && self.launcher.alive();
        if serving && both { vec![Action::Connect(Role::Launcher)] } else { Vec::new() }
    }

    /// Starts whoever has Docker's socket when it is needed, and lets it go when not.
    fn use_containers(&mut self, wanted: bool, now: Instant) -> Vec<Action> {
        let before = std::mem::replace(&mut self.uses_containers, wanted);
        match (before, wanted) {
            // One that still ends its runs is followed by another, or stays.
            (false, true) if self.containers.over() => {
                self.containers = Keeper::new(now);
                let role = Role::Containers;
                vec![Action::Start(role), Action::Configure(role), Action::Connect(role)]
            }
            // It learns from the policies that it isn't wanted, and ends after its last run.
            (true, false) if !self.containers.alive() => {
                self.containers.life = Life::Over;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn on_gone(&mut self, role: Role, clean: bool, now: Instant) -> Vec<Action> {
        let keeper = self.keeper(role);
        let lived = match keeper.life {
            Life::Alive { since } => now.saturating_duration_since(since),
            Life::Down { .. } | Life::Over => return Vec::new(),
        };
        let again = Life::Down { until: now + keeper.backoff.after(lived) };
        match (self.phase, role) {
            (Phase::Running | Phase::Draining(_), Role::Containers) => {
                self.containers.life = if self.uses_containers { again } else { Life::Over };
                Vec::new()
            }
            (Phase::Running, _) => {
                self.keeper(role).life = again;
                self.early_deaths += u32::from(!self.announced);
                if self.early_deaths < EARLY_DEATHS_MAX {
                    return Vec::new();
                }
                self.code = 1;
                self.end(now)
            }
            (Phase::Draining(_), Role::Server) => {
                self.server.life = Life::Over;
                self.end(now)
            }
            // What still waits in the server's queue needs one.
            (Phase::Draining(_), Role::Launcher) => {
                self.launcher.life = again;
                Vec::new()
            }
            (Phase::Ending(_), role) => {
                self.keeper(role).life = Life::Over;
                if role != Role::Server && !clean {
                    self.code = 1;
                }
                if self.server.over() && self.launcher.over() && self.containers.over() {
                    vec![Action::Exit(self.code)]
                } else {
                    Vec::new()
                }
            }
        }
    }

    fn on_tick(&mut self, now: Instant) -> Vec<Action> {
        match self.phase {
            Phase::Draining(at) if at <= now && !self.server.killed => {
                return self.kill(Role::Server);
            }
            Phase::Ending(at) if at <= now => return self.kill_those_who_run_calls(),
            _ => {}
        }
        let mut actions = Vec::new();
        let mut started = Vec::new();
        for role in [Role::Launcher, Role::Containers, Role::Server] {
            let keeper = self.keeper(role);
            if matches!(keeper.life, Life::Down { until } if until <= now) {
                keeper.life = Life::Alive { since: now };
                actions.extend([Action::Start(role), Action::Configure(role)]);
                started.push(role);
            }
        }
        for role in [Role::Launcher, Role::Containers] {
            let fresh = started.contains(&role) || started.contains(&Role::Server);
            if fresh && self.server.alive() && self.keeper(role).alive() {
                actions.push(Action::Connect(role));
            }
        }
        actions
    }

    /// Begins the end: the server goes at once, the launcher cleans up.
    fn end(&mut self, now: Instant) -> Vec<Action> {
        self.phase = Phase::Ending(now + END_LIMIT);
        let mut actions = self.kill(Role::Server);
        if !self.server.alive() {
            self.server.life = Life::Over;
        }
        if !self.containers.alive() {
            self.containers.life = Life::Over;
        }
        if !self.launcher.alive() {
            // The one that died left cgroups, which only its successor removes.
            self.launcher.life = Life::Alive { since: now };
            actions.push(Action::Start(Role::Launcher));
            actions.push(Action::Configure(Role::Launcher));
        }
        actions.push(Action::End);
        actions
    }

    fn kill(&mut self, role: Role) -> Vec<Action> {
        let keeper = self.keeper(role);
        if keeper.alive() && !keeper.killed {
            keeper.killed = true;
            return vec![Action::Kill(role)];
        }
        Vec::new()
    }

    fn keeper(&mut self, role: Role) -> &mut Keeper {
        match role {
            Role::Server => &mut self.server,
            Role::Launcher => &mut self.launcher,
            Role::Containers => &mut self.containers,
        }
    }

    fn kill_those_who_run_calls(&mut self) -> Vec<Action> {
        let mut actions = self.kill(Role::Launcher);
        actions.extend(self.kill(Role::Containers));
        actions
    }
}

#[cfg(test)]
mod tests;
