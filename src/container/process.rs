//! The process `dispatch-docker`: started by the monitor where a policy in force uses
//! container mode, as the only one that has Docker's socket.
//!
//! It stands to the server as the launcher does, and believes it no more: every launch is
//! checked against the templates that came from the monitor.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io::{self, Read as _, Seek as _},
    os::fd::OwnedFd,
    process::ExitCode,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use super::{
    ahead::Ahead,
    engine::Engine,
    make::Maker,
    message::{ContainerConfig, FromMonitor},
    run::{self, Task, say},
    spec,
};
use crate::{
    jail::{
        check,
        message::{
            Exhausted, FromLauncher, FromServer, Launch, LaunchFds, MESSAGE_MAX, Refusal, StopCause,
        },
        plan::{Control, Mode, Template, TemplateId, TemplateSet},
    },
    names::{Digest, RunId},
    observe,
    packets::Packets,
    sys,
};

/// The process's name and argv[0].
pub const NAME: &str = "dispatch-docker";

/// The descriptor that the monitor left us.
const MONITOR: i32 = 3;
/// Sets of policies that are kept: the current one, and superseded ones that a call may
/// have been decided by a moment ago.
const SETS_KEPT: usize = 4;
/// Encoded size of a set that is still believed.
const SET_MAX: u64 = 256 << 20;
/// How long all containers may take to be removed at the end.
const FAREWELL: Duration = Duration::from_secs(8);
/// How long after a failed sweep the next one comes: twice as long each time.
const SWEEP_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How often containers that wait for calls are looked through.
const REVIEW: Duration = Duration::from_secs(60);
/// Words of the server's about one run that may wait.
const STOPS: usize = 4;

/// Runs the process to its end: 0 where no container was left.
#[must_use]
pub fn main() -> ExitCode {
    observe::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .thread_name("docker-worker")
        .build();
    let worked = runtime.and_then(|runtime| {
        let monitor = prepare()?;
        let worked = runtime.block_on(work(monitor));
        runtime.shutdown_background();
        worked
    });
    match worked {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            error!(%error, "{NAME} ends");
            ExitCode::FAILURE
        }
    }
}

/// Takes the monitor's descriptor over, and makes this process what it should be.
fn prepare() -> io::Result<OwnedFd> {
    let monitor = sys::take_inherited(MONITOR)?;
    rustix::io::fcntl_setfd(&monitor, rustix::io::FdFlags::CLOEXEC)?;
    // Whoever reads its memory, or its descriptors, has Docker's socket, which is root.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let files = rustix::process::Resource::Nofile;
    let limit = rustix::process::getrlimit(files);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(files, raised)?;
    Ok(monitor)
}

/// The conversation with the monitor. Whether nothing was left at the end.
async fn work(monitor: OwnedFd) -> io::Result<bool> {
    let monitor = Packets::new(monitor)?;
    let mut buffer = vec![0; MESSAGE_MAX];
    let Some((FromMonitor::Configure(config), _)) = hear(&monitor, &mut buffer).await? else {
        return Err(io::Error::other("the monitor's first message was no configuration"));
    };
    let office = Arc::new(Office::open(config)?);
    let sweeping = tokio::spawn(sweep(Arc::clone(&office.maker)));
    let reviewing = tokio::spawn(review(Arc::clone(&office.ahead)));
    let mut serving: Option<tokio::task::JoinHandle<()>> = None;
    loop {
        let heard = tokio::select! {
            heard = hear(&monitor, &mut buffer) => heard?,
            () = office.unwanted() => None,
        };
        let Some((message, descriptors)) = heard else { break };
        match (message, descriptors.into_iter().next()) {
            (FromMonitor::Policies, Some(memory)) => office.load(memory)?,
            (FromMonitor::Server, Some(socket)) => {
                if let Some(earlier) = serving.take() {
                    earlier.abort();
                }
                office.stop_all();
                let socket = Arc::new(Packets::new(socket)?);
                office.take_server(&socket).await;
                serving = Some(tokio::spawn(serve(Arc::clone(&office), socket)));
            }
            (other, _) => warn!("unexpected from the monitor: {other:?}"),
        }
    }
    office.maker.close();
    sweeping.abort();
    reviewing.abort();
    office.ahead.review(|_| false);
    if let Some(serving) = serving {
        serving.abort();
    }
    office.stop_all();
    Ok(tokio::time::timeout(FAREWELL, office.maker.all_removed()).await.is_ok())
}

async fn hear(
    monitor: &Packets,
    buffer: &mut [u8],
) -> io::Result<Option<(FromMonitor, Vec<OwnedFd>)>> {
    let received = match monitor.receive(buffer).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
        received => received?,
    };
    let Some((length, descriptors)) = received else { return Ok(None) };
    let message = postcard::from_bytes(&buffer[..length]).map_err(io::Error::other)?;
    Ok(Some((message, descriptors)))
}

/// Removes what dead dispatchers left, as soon as Docker can be asked.
async fn sweep(maker: Arc<Maker>) {
    let (mut pause, longest) = SWEEP_PAUSE;
    while let Err(error) = maker.sweep().await {
        warn!("containers that a dead dispatcher may have left can't be looked for: {error}");
        tokio::time::sleep(pause).await;
        pause = longest.min(pause * 2);
    }
}

/// Lets go of what waits for calls that don't come any more.
async fn review(ahead: Arc<Ahead>) {
    let mut ticks = tokio::time::interval(REVIEW);
    loop {
        ticks.tick().await;
        ahead.review(|_| true);
    }
}

/// A policy that may run in containers.
#[derive(Clone)]
struct Prepared {
    template: Arc<Template>,
    /// Made for its first call: with many policies it would keep all calls waiting.
    filter: Arc<OnceLock<Arc<str>>>,
}

impl Prepared {
    fn filter(&self) -> Result<Arc<str>, Refusal> {
        if let Some(made) = self.filter.get() {
            return Ok(Arc::clone(made));
        }
        // The compiler of policies has tried that.
        let made = spec::filter(&self.template)
            .map_err(|error| Refusal::Invalid { what: error.to_string() })?;
        Ok(Arc::clone(self.filter.get_or_init(|| made.into())))
    }
}

struct LoadedSet {
    digest: Digest,
    templates: HashMap<TemplateId, Prepared>,
}

/// What all tasks share.
struct Office {
    maker: Arc<Maker>,
    ahead: Arc<Ahead>,
    sets: Mutex<VecDeque<LoadedSet>>,
    runs: Mutex<HashMap<RunId, mpsc::Sender<StopCause>>>,
    /// Whether a policy in force uses container mode, and how many runs there are.
    use_of_us: watch::Sender<(bool, usize)>,
    server: Mutex<Option<Arc<Packets>>>,
}

impl Office {
    fn open(config: ContainerConfig) -> io::Result<Self> {
        let maker = Maker::new(Engine::new(config.socket), &config.directory)?;
        Ok(Self {
            maker,
            ahead: Arc::default(),
            sets: Mutex::default(),
            runs: Mutex::default(),
            use_of_us: watch::Sender::new((true, 0)),
            server: Mutex::default(),
        })
    }

    fn load(&self, memory: OwnedFd) -> io::Result<()> {
        let set = read_set(memory)?;
        let mut templates = HashMap::new();
        for template in set.templates {
            if !template.modes.contains(&Mode::Container) {
                continue;
            }
            let id = template.id.clone();
            let same = lock(&self.sets)
                .front()
                .and_then(|set| set.templates.get(&id))
                .filter(|before| *before.template == template)
                .cloned();
            // With the containers that wait for its calls.
            let prepared = same.unwrap_or_else(|| Prepared {
                template: Arc::new(template),
                filter: Arc::default(),
            });
            templates.insert(id, prepared);
        }
        self.use_of_us.send_modify(|(wanted, _)| *wanted = set.containers);
        let digest = set.digest;
        self.ahead.review(|kept| {
            templates.values().any(|prepared| Arc::ptr_eq(&prepared.template, kept))
        });
        {
            let mut sets = lock(&self.sets);
            sets.retain(|set| set.digest != digest);
            sets.push_front(LoadedSet { digest, templates });
            sets.truncate(SETS_KEPT);
        }
        if let Some(server) = lock(&self.server).clone() {
            tokio::spawn(async move {
                say(&server, &FromLauncher::Ready { policy_set: digest }).await;
            });
        }
        Ok(())
    }

    /// Returns when no policy uses container mode any more and the last run is over.
    /// Cancel-safe.
    async fn unwanted(&self) {
        let mut use_of_us = self.use_of_us.subscribe();
        // The sender lives as long as we do.
        let _ = use_of_us.wait_for(|(wanted, runs)| !wanted && *runs == 0).await;
    }

    fn count_runs(&self) {
        let runs = lock(&self.runs).len();
        self.use_of_us.send_modify(|(_, there)| *there = runs);
    }

    async fn take_server(&self, socket: &Arc<Packets>) {
        *lock(&self.server) = Some(Arc::clone(socket));
        let newest = lock(&self.sets).front().map(|set| set.digest);
        if let Some(policy_set) = newest {
            say(socket, &FromLauncher::Ready { policy_set }).await;
        }
    }

    /// Everything that runs is ended: there is nobody to answer to.
    fn stop_all(&self) {
        for stop in lock(&self.runs).values() {
            // Full: it was told already.
            let _ = stop.try_send(StopCause::Cancelled);
        }
    }

    /// Refused at once, or a task to be run.
    fn check(&self, launch: Launch, fds: Option<Vec<OwnedFd>>) -> Result<Task, Refusal> {
        let received = Instant::now();
        let invalid = |what: &str| Refusal::Invalid { what: what.into() };
        let fds = fds.ok_or(Refusal::Exhausted(Exhausted::Descriptors))?;
        let fds = LaunchFds::of(fds).ok_or_else(|| invalid("a launch takes five descriptors"))?;
        let (template, filter) = {
            let sets = lock(&self.sets);
            let set = sets.iter().find(|set| set.digest == launch.policy_set);
            let templates = &set.ok_or(Refusal::StalePolicy)?.templates;
            let prepared = templates.get(&launch.template);
            let prepared = prepared.ok_or_else(|| invalid("no such template"))?.clone();
            drop(sets);
            (Arc::clone(&prepared.template), prepared.filter()?)
        };
        let checked = check::check(&launch, &fds, &template, &[Mode::Container])
            .map_err(|what| Refusal::Invalid { what })?;
        if let Some(name) = spec::lacks_for_init(&template) {
            let why = format!(
                "container mode's own init needs the system call {name}, which the policy's \
                 [seccomp] doesn't allow: add it to allow, or write mode = \"jail\""
            );
            return Err(Refusal::ControlUnavailable { control: Control::Seccomp, why });
        }
        Ok(Task { launch, fds, checked, template, filter, received })
    }
}

/// The conversation with one server.
async fn serve(office: Arc<Office>, socket: Arc<Packets>) {
    let mut buffer = vec![0; MESSAGE_MAX];
    loop {
        let (length, descriptors) = match socket.receive(&mut buffer).await {
            Ok(Some(received)) => received,
            Ok(None) => break,
            Err(error) => {
                warn!(%error, "the server's socket");
                break;
            }
        };
        match postcard::from_bytes(&buffer[..length]) {
            Ok(FromServer::Launch(launch)) => begin(&office, &socket, launch, descriptors).await,
            Ok(FromServer::Stop { run, cause }) => {
                if let Some(stop) = lock(&office.runs).get(&run) {
                    let _ = stop.try_send(cause);
                }
            }
            Err(error) => warn!(%error, "the server's message can't be read"),
        }
    }
    info!("the server is gone");
    office.stop_all();
}

async fn begin(
    office: &Arc<Office>,
    socket: &Arc<Packets>,
    launch: Launch,
    descriptors: Vec<OwnedFd>,
) {
    let run = launch.run;
    let checked = office.check(launch, Some(descriptors)).and_then(|task| {
        let (stop, stopped) = mpsc::channel(STOPS);
        let mut runs = lock(&office.runs);
        if runs.contains_key(&run) {
            return Err(Refusal::Invalid { what: "the run id is in use".into() });
        }
        runs.insert(run, stop);
        Ok((task, stopped))
    });
    let (task, stopped) = match checked {
        Ok(begun) => begun,
        Err(refusal) => return say(socket, &FromLauncher::Refused { run, refusal }).await,
    };
    office.count_runs();
    let (office, socket) = (Arc::clone(office), Arc::clone(socket));
    tokio::spawn(async move {
        let last = run::run(&office.maker, &office.ahead, task, stopped, &socket).await;
        lock(&office.runs).remove(&run);
        say(&socket, &last).await;
        office.count_runs();
    });
}

fn read_set(memory: OwnedFd) -> io::Result<TemplateSet> {
    let mut file = File::from(memory);
    let size = file.metadata()?.len();
    if size > SET_MAX {
        return Err(io::Error::other(format!(
            "policies of {size} bytes; at most {SET_MAX} are possible"
        )));
    }
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(SET_MAX).read_to_end(&mut bytes)?;
    postcard::from_bytes(&bytes).map_err(io::Error::other)
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
