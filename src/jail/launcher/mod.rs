//! `dispatch-launch`: the one process that makes namespaces, cgroups and
//! processes for jail and direct mode.
//!
//! Single-threaded: clone(2) of a process with one thread is sound and cheap.
//! One epoll loop over the monitor, the server, and per run its control
//! socket, init's pidfd and the seccomp listener. It never blocks on a run.
//!
//! Whoever talks to it can end it: the monitor's end of file ends everything,
//! the server's ends that server's runs.
//!
//! `peers` is what the two say, `start` starts a run, in a jail that `ahead` has
//! ready if there is one; `build` builds it, `watch` follows it, `service` is what is asked of
//! one that listens, and `chores` is what nobody waits for.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::ExitCode,
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::event::epoll::{self, EventFlags};

mod ahead;
mod build;
mod chores;
mod peers;
mod service;
mod start;
mod watch;

use self::ahead::Ahead;
use super::{
    cgroup::{Cgroup, Hierarchy, KeptCgroups},
    decide::Prepared,
    empty_root::{EmptyRoot, EmptyRoots},
    facts::Facts,
    identity::{HostIds, IdPool},
    message::{FromMonitor, LauncherConfig, MESSAGE_MAX},
    network::{EmptyNetwork, EmptyNetworks},
    places::{Place, Places},
    plan::TemplateId,
    run::Run,
    step::Fault,
};
use crate::{
    names::{Digest, RunId},
    sys,
};

/// The descriptor that the monitor left us.
const MONITOR_FD: i32 = 3;
/// Answers that may wait for a server that doesn't read.
const OUTBOX_MAX: usize = 65_536;
/// Descriptors that runs leave to the launcher itself: what it has open for good, a
/// packet's worth ([`sys::FDS_MAX`]), and what it opens for a moment to make a run.
const OWN_DESCRIPTORS: usize = 64 + Places::DESCRIPTORS + sys::FDS_MAX;
/// How long word of a start waits for word of the end, to go with it.
const START_WORD: Duration = Duration::from_millis(2);
/// Runs that may be answered for while their init is still going.
const GOING_MAX: usize = 64;
/// How long calls are taken to come several at a time after some did.
const CROWD: Duration = Duration::from_millis(50);
/// How long everything may take to be gone when the launcher is told to end.
const FAREWELL: Duration = Duration::from_secs(5);
/// How often something in quarantine is looked at again.
const QUARANTINE_RETRY: Duration = Duration::from_secs(1);

/// The main of the process.
#[must_use]
pub fn main() -> ExitCode {
    match start() {
        Ok(launcher) => launcher.serve(),
        Err(error) => {
            log(&format!("cannot start: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn log(text: &str) {
    // No logging framework in the process that forks.
    eprintln!("dispatch-launch: {text}");
}

fn start() -> Result<Launcher, String> {
    let text = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    rustix::thread::set_name(c"dispatch-launch").map_err(|e| format!("prctl: {e}"))?;
    // Nobody but root may look into the process that makes jails.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .map_err(|e| format!("prctl: {e}"))?;
    // The monitor decides what a signal means; a terminal's must not end us. Nor is
    // any ignored: programs inherit that, signal(7).
    sys::block_all_signals().map_err(text("sigprocmask"))?;
    sys::default_signals();
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(text("/dev/null"))?;
    sys::dup_to_inherited(null.as_raw_fd(), 0).map_err(text("stdin"))?;
    sys::dup_to_inherited(null.as_raw_fd(), 1).map_err(text("stdout"))?;
    let monitor =
        sys::take_inherited(MONITOR_FD).map_err(text("descriptor 3, the monitor's socket"))?;

    let mut buffer = vec![0; MESSAGE_MAX];
    let (length, _) = sys::receive_packet(&monitor, &mut buffer)
        .map_err(text("the monitor's first message"))?
        .ok_or("the monitor closed before it configured us")?;
    let config = match postcard::from_bytes(&buffer[..length]) {
        Ok(FromMonitor::Configure(config)) => config,
        other => return Err(format!("the monitor's first message was {other:?}")),
    };
    Launcher::new(monitor, &config)
}

/// What an epoll event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Monitor,
    Server,
    Bell,
    Control(u64),
    Init(u64),
    Listener(u64),
}

impl Source {
    fn token(self) -> u64 {
        match self {
            Self::Monitor => 0,
            Self::Server => 1,
            Self::Bell => 2,
            Self::Control(serial) => serial << 2,
            Self::Init(serial) => serial << 2 | 1,
            Self::Listener(serial) => serial << 2 | 2,
        }
    }

    fn of(token: u64) -> Self {
        match (token >> 2, token & 3) {
            (0, 0) => Self::Monitor,
            (0, 1) => Self::Server,
            (0, _) => Self::Bell,
            (serial, 0) => Self::Control(serial),
            (serial, 1) => Self::Init(serial),
            (serial, _) => Self::Listener(serial),
        }
    }
}

struct LoadedSet {
    digest: Digest,
    templates: HashMap<TemplateId, Rc<Prepared>>,
}

/// What is to be given back of a run whose processes are gone.
struct Remains {
    cgroup: Option<Cgroup>,
    ids: Option<HostIds>,
    network: Option<EmptyNetwork>,
    root: Option<EmptyRoot>,
    user_namespace: Option<OwnedFd>,
    place: Option<Place>,
    /// Whose release the server would have to be told.
    run: Option<RunId>,
}

impl Remains {
    fn of(run: Run) -> Self {
        Self {
            cgroup: run.cgroup,
            ids: run.ids,
            network: run.network,
            root: run.root,
            user_namespace: run.user_namespace,
            place: run.service.and_then(|service| service.place),
            run: None,
        }
    }
}

/// A cgroup or uid that couldn't be freed when its run was answered.
struct Leftover {
    cgroup: Box<Cgroup>,
    ids: Option<HostIds>,
    /// Whose release the server waits for.
    run: Option<RunId>,
}

struct Launcher {
    monitor: OwnedFd,
    server: Option<OwnedFd>,
    epoll: OwnedFd,
    /// Where inits ring, to read from and to write to.
    bell: (OwnedFd, OwnedFd),
    facts: Facts,
    hierarchy: Hierarchy,
    cgroups: KeptCgroups,
    ids: IdPool,
    networks: EmptyNetworks,
    roots: EmptyRoots,
    places: Places,
    ahead: Ahead,
    sets: VecDeque<LoadedSet>,
    runs: HashMap<u64, Run>,
    serials: HashMap<RunId, u64>,
    next_serial: u64,
    timers: BTreeSet<(Instant, u64)>,
    scheduled: HashMap<u64, Instant>,
    outbox: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    /// How many connections are in it.
    connected: usize,
    /// When what is in it goes at the latest.
    outbox_due: Option<Instant>,
    /// The server's socket takes no more for now.
    outbox_full: bool,
    /// How many runs were answered for and are not cleared away yet.
    going: usize,
    /// They are being cleared away without waiting.
    hurried: bool,
    /// Those of them whose init wasn't let go.
    over: VecDeque<u64>,
    /// Those whose init is gone.
    gone: VecDeque<Remains>,
    /// When anything last happened.
    last_heard: Instant,
    /// Until when calls are taken to come several at a time.
    crowded_until: Instant,
    leftovers: Vec<Leftover>,
    /// When they are looked at again.
    leftovers_due: Option<Instant>,
    buffer: Vec<u8>,
    fault: Fault,
    ending: Option<Instant>,
    /// It ends because it can't do its work.
    failed: bool,
}

impl Launcher {
    fn new(monitor: OwnedFd, config: &LauncherConfig) -> Result<Self, String> {
        let facts = Facts::find_out().map_err(|error| format!("this host: {error}"))?;
        let root = facts.root;
        let hierarchy = Hierarchy::open(&config.cgroup_parent, &config.instance, &our_processes())
            .map_err(|error| format!("cgroups: {}", error.in_full()))?;
        for leftover in hierarchy.leftovers() {
            log(&format!("left by a dispatcher that died, and can't be removed: {leftover}"));
        }
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| format!("epoll: {e}"))?;
        let bell = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .and_then(|pipe| rustix::io::ioctl_fionbio(&pipe.0, true).map(|()| pipe))
            .map_err(|error| format!("pipe: {error}"))?;
        let launcher = Self {
            monitor,
            server: None,
            epoll,
            bell,
            facts,
            hierarchy,
            cgroups: KeptCgroups::default(),
            ids: IdPool::new(config.uid_range),
            networks: EmptyNetworks::new().map_err(|error| format!("network: {error}"))?,
            roots: EmptyRoots::default(),
            places: Places::new(root),
            ahead: Ahead::new()?,
            sets: VecDeque::new(),
            runs: HashMap::new(),
            serials: HashMap::new(),
            next_serial: 1,
            timers: BTreeSet::new(),
            scheduled: HashMap::new(),
            outbox: VecDeque::new(),
            connected: 0,
            outbox_due: None,
            outbox_full: false,
            going: 0,
            hurried: false,
            over: VecDeque::new(),
            gone: VecDeque::new(),
            last_heard: Instant::now(),
            crowded_until: Instant::now(),
            leftovers: Vec::new(),
            leftovers_due: None,
            buffer: vec![0; MESSAGE_MAX],
            fault: Fault::from_environment(),
            ending: None,
            failed: false,
        };
        launcher
            .watch(&launcher.monitor, Source::Monitor, EventFlags::IN)
            .and_then(|()| launcher.watch(&launcher.bell.0, Source::Bell, EventFlags::IN))
            .map_err(|error| format!("epoll: {error}"))?;
        Ok(launcher)
    }

    fn serve(mut self) -> ExitCode {
        let mut events = Vec::with_capacity(64);
        loop {
            if let Err(error) = self.wait(&mut events) {
                log(&format!("epoll: {error}"));
                return ExitCode::FAILURE;
            }
            let idle = events.is_empty();
            if !idle {
                self.last_heard = Instant::now();
            }
            // Ends before timers: a program that ended keeps its status.
            for token in events.drain(..) {
                self.on_event(Source::of(token));
            }
            self.on_time(Instant::now());
            if idle || self.hurries() || self.is_crowded(self.last_heard) {
                self.do_a_chore();
            }
            if let Some(deadline) = self.ending {
                let left = self.places.has_left() || !self.leftovers.is_empty();
                if self.runs.is_empty() && self.gone.is_empty() && !left {
                    break;
                }
                if Instant::now() >= deadline {
                    log(&format!("{} runs would not end", self.runs.len()));
                    break;
                }
            }
        }
        if let Err(error) = self.places.close() {
            log(&format!("the directory of sockets: {error}"));
        }
        match self.hierarchy.close() {
            Ok(()) if self.failed => ExitCode::FAILURE,
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                log(&format!("cgroups: {}", error.in_full()));
                ExitCode::FAILURE
            }
        }
    }

    fn wait(&mut self, tokens: &mut Vec<u64>) -> io::Result<()> {
        let now = Instant::now();
        let timer = self.timers.first().map(|(at, _)| *at);
        let chore = self.next_chore(now);
        let deadline = [timer, chore, self.outbox_due, self.leftovers_due, self.ending]
            .into_iter()
            .flatten()
            .min();
        let timeout = deadline.map(|at| {
            let left = at.saturating_duration_since(now);
            rustix::event::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        let mut space = [std::mem::MaybeUninit::<epoll::Event>::uninit(); 64];
        match epoll::wait(&self.epoll, &mut space, timeout.as_ref()) {
            Ok((ready, _)) => {
                tokens.extend(ready.iter().map(|event| event.data.u64()));
                Ok(())
            }
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn watch(&self, fd: impl AsFd, source: Source, flags: EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(source.token());
        Ok(epoll::add(&self.epoll, fd, data, flags)?)
    }

    fn on_event(&mut self, source: Source) {
        match source {
            Source::Monitor => self.on_monitor(),
            Source::Server => self.on_server(),
            Source::Bell => self.on_bell(),
            Source::Control(serial) => self.on_control(serial),
            Source::Listener(serial) => {
                let now = Instant::now();
                self.with_run(serial, |run| run.on_listener(now));
                self.rearm_listener(serial);
            }
            Source::Init(serial) => self.on_init_gone(serial),
        }
    }
}

/// Ourselves, the monitor and its other children: who may be moved within the
/// cgroup that we are all in, where cgroup v2 wants it empty.
fn our_processes() -> Vec<rustix::process::Pid> {
    let mut ours = vec![rustix::process::getpid()];
    let Some(monitor) = rustix::process::getppid() else { return ours };
    ours.push(monitor);
    let number = monitor.as_raw_nonzero();
    let children = std::fs::read_to_string(format!("/proc/{number}/task/{number}/children"));
    let children = children.unwrap_or_default();
    ours.extend(
        children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .filter_map(rustix::process::Pid::from_raw),
    );
    ours
}

fn reap(pidfd: &OwnedFd) {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    if let Err(error) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
        log(&format!("init can't be reaped: {error}"));
    }
}
