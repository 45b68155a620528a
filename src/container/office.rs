//! What all runs share: the policies, the server that they are for, and who they are.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Instant,
};

use rustix::io::Errno;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use super::{
    ahead::Ahead,
    engine::{Engine, Patience},
    make::Maker,
    message::ContainerConfig,
    run::{self, Task},
    seat::Seat,
    server::Server,
    spec,
};
use crate::{
    jail::{
        check,
        message::{Exhausted, FromLauncher, FromServer, Launch, LaunchFds, Refusal, StopCause},
        plan::{Control, Mode, SETS_KEPT, Template, TemplateId, TemplateSet},
    },
    names::{Digest, Namespace, RunId},
};

/// Words of the server's about one run that may wait.
const STOPS: usize = 4;
/// Descriptors that a run takes at most, and those that this process takes besides.
const RUN_DESCRIPTORS: u64 = 16;
const OWN_DESCRIPTORS: u64 = 192;

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

/// How much this process is needed.
#[derive(Clone, Copy)]
struct Need {
    /// A policy in force uses container mode.
    wanted: bool,
    runs: usize,
}

/// A run, as it is spoken to.
struct Run {
    stop: mpsc::Sender<StopCause>,
    seat: Arc<Seat>,
}

/// What all runs share.
pub struct Office {
    maker: Arc<Maker>,
    ahead: Arc<Ahead>,
    /// The newest first.
    sets: Mutex<VecDeque<LoadedSet>>,
    runs: Mutex<HashMap<RunId, Run>>,
    runs_max: usize,
    need: watch::Sender<Need>,
    server: Mutex<Option<Arc<Server>>>,
}

impl Office {
    /// Opens it. `descriptors` is how many this process may have.
    ///
    /// # Errors
    /// Those of [`Maker::new`].
    pub fn open(config: ContainerConfig, descriptors: u64) -> io::Result<Self> {
        let runs_max = descriptors.saturating_sub(OWN_DESCRIPTORS) / RUN_DESCRIPTORS;
        Ok(Self {
            maker: Maker::new(Engine::new(config.socket, Patience::USUAL), &config.directory)?,
            ahead: Arc::default(),
            sets: Mutex::default(),
            runs: Mutex::default(),
            runs_max: usize::try_from(runs_max).unwrap_or(usize::MAX),
            need: watch::Sender::new(Need { wanted: true, runs: 0 }),
            server: Mutex::default(),
        })
    }

    /// Who makes containers.
    #[must_use]
    pub fn maker(&self) -> &Arc<Maker> {
        &self.maker
    }

    /// Those that wait.
    #[must_use]
    pub fn ahead(&self) -> &Arc<Ahead> {
        &self.ahead
    }

    /// Puts policies in force.
    ///
    /// # Errors
    /// What can't be read.
    pub fn load(&self, memory: OwnedFd) -> io::Result<()> {
        let set = TemplateSet::read(memory)?;
        let (digest, wanted) = (set.digest, set.containers);
        let mut templates = HashMap::new();
        for template in set.templates {
            if !template.modes.contains(&Mode::Container) {
                continue;
            }
            let id = template.id.clone();
            let before = lock(&self.sets).front().and_then(|set| set.templates.get(&id)).cloned();
            // With the containers that wait for its calls.
            let same = before.filter(|before| *before.template == template);
            let prepared = same.unwrap_or_else(|| Prepared {
                template: Arc::new(template),
                filter: Arc::default(),
            });
            templates.insert(id, prepared);
        }
        self.ahead.review(|kept| {
            templates.values().any(|prepared| Arc::ptr_eq(&prepared.template, kept))
        });
        {
            let mut sets = lock(&self.sets);
            sets.retain(|set| set.digest != digest);
            sets.push_front(LoadedSet { digest, templates });
            sets.truncate(SETS_KEPT);
        }
        self.need.send_modify(|need| need.wanted = wanted);
        if let Some(server) = &*lock(&self.server) {
            server.tell(&FromLauncher::Ready { policy_set: digest });
        }
        Ok(())
    }

    /// Returns when no policy uses container mode any more and the last run is over.
    /// Cancel-safe.
    pub async fn unneeded(&self) {
        let mut need = self.need.subscribe();
        // The sender lives as long as we do.
        let _ = need.wait_for(|need| !need.wanted && need.runs == 0).await;
    }

    /// Everything that runs is ended: there is nobody to answer to.
    pub fn stop_all(&self) {
        for run in lock(&self.runs).values() {
            // Full: it was told already.
            let _ = run.stop.try_send(StopCause::Cancelled);
        }
    }

    /// The whole conversation with a server, in place of any earlier one.
    pub async fn serve(self: Arc<Self>, server: Arc<Server>) {
        *lock(&self.server) = Some(Arc::clone(&server));
        let newest = lock(&self.sets).front().map(|set| set.digest);
        if let Some(policy_set) = newest {
            server.tell(&FromLauncher::Ready { policy_set });
        }
        let mut buffer = Vec::new();
        loop {
            match server.hear(&mut buffer).await {
                Ok(Some((FromServer::Launch(launch), fds))) => self.begin(&server, launch, fds),
                Ok(Some((FromServer::Stop { run, cause }, _))) => {
                    if let Some(run) = lock(&self.runs).get(&run) {
                        let _ = run.stop.try_send(cause);
                    }
                }
                Ok(Some((FromServer::Connect { run, to }, _))) => {
                    let connected = self.seat(run).ok_or(Errno::SRCH);
                    let connected = connected.and_then(|seat| seat.connect(to));
                    server.tell_connected(run, to, connected);
                }
                Ok(Some((FromServer::Look { run }, _))) => {
                    let sight = self.seat(run).and_then(|seat| seat.sight()).map(Box::new);
                    server.tell(&FromLauncher::Seen { run, sight });
                }
                // A container that is frozen would outlive us: its init could not see that we
                // are gone.
                Ok(Some((FromServer::Freeze { .. }, _))) => {}
                Ok(None) => break,
                Err(error) => {
                    warn!(%error, "the server can't be understood");
                    break;
                }
            }
        }
        info!("the server is gone");
        *lock(&self.server) = None;
        server.hang_up();
        self.stop_all();
    }

    fn begin(self: &Arc<Self>, server: &Arc<Server>, launch: Launch, fds: Option<Vec<OwnedFd>>) {
        let run = launch.run;
        let admitted = self.check(launch, fds).and_then(|task| {
            let seat = Arc::new(Seat::new(Arc::clone(&task.template)));
            let stopped = self.enter(run, &seat)?;
            Ok((task, stopped, seat))
        });
        let (task, stopped, seat) = match admitted {
            Ok(begun) => begun,
            Err(refusal) => return server.tell(&FromLauncher::Refused { run, refusal }),
        };
        let (office, server) = (Arc::clone(self), Arc::clone(server));
        tokio::spawn(async move {
            let running = {
                let (office, server) = (Arc::clone(&office), Arc::clone(&server));
                tokio::spawn(async move {
                    run::run(&office.maker, &office.ahead, task, stopped, &seat, &server).await
                })
            };
            let last = running.await.unwrap_or_else(|panic| {
                error!(%panic, %run, "a run failed");
                let why = "dispatch-docker failed".to_owned();
                FromLauncher::Refused { run, refusal: Refusal::Docker { why } }
            });
            office.leave(run);
            server.tell(&last);
        });
    }

    fn seat(&self, run: RunId) -> Option<Arc<Seat>> {
        lock(&self.runs).get(&run).map(|run| Arc::clone(&run.seat))
    }

    fn enter(&self, run: RunId, seat: &Arc<Seat>) -> Result<mpsc::Receiver<StopCause>, Refusal> {
        let mut runs = lock(&self.runs);
        if runs.contains_key(&run) {
            return Err(Refusal::Invalid { what: "the run id is in use".into() });
        }
        if runs.len() >= self.runs_max {
            return Err(Refusal::Exhausted(Exhausted::Descriptors));
        }
        let (stop, stopped) = mpsc::channel(STOPS);
        runs.insert(run, Run { stop, seat: Arc::clone(seat) });
        self.need.send_modify(|need| need.runs = runs.len());
        Ok(stopped)
    }

    fn leave(&self, run: RunId) {
        let mut runs = lock(&self.runs);
        runs.remove(&run);
        self.need.send_modify(|need| need.runs = runs.len());
    }

    /// Refused at once, or a task to be run.
    fn check(&self, launch: Launch, fds: Option<Vec<OwnedFd>>) -> Result<Task, Refusal> {
        let received = Instant::now();
        let invalid = |what: &str| Refusal::Invalid { what: what.into() };
        let fds = fds.ok_or(Refusal::Exhausted(Exhausted::Descriptors))?;
        let fds = LaunchFds::of(fds).ok_or_else(|| invalid("a launch takes five descriptors"))?;
        // It comes into labels.
        launch.namespace.parse::<Namespace>().map_err(|_| invalid("no such namespace"))?;
        let (prepared, is_current) = {
            let sets = lock(&self.sets);
            let index = sets.iter().position(|set| set.digest == launch.policy_set);
            let index = index.ok_or(Refusal::StalePolicy)?;
            let prepared = sets[index].templates.get(&launch.template);
            (prepared.ok_or_else(|| invalid("no such template"))?.clone(), index == 0)
        };
        let filter = prepared.filter()?;
        let template = prepared.template;
        let checked = check::check(&launch, &fds, &template, &[Mode::Container])
            .map_err(|what| Refusal::Invalid { what })?;
        if let Some(name) = spec::lacks_for_init(&template) {
            let why = format!(
                "container mode's own init needs the system call {name}, which the policy's \
                 [seccomp] doesn't allow: add it to allow, or write mode = \"jail\""
            );
            return Err(Refusal::ControlUnavailable { control: Control::Seccomp, why });
        }
        if let Some((control, why)) = spec::too_little(&checked) {
            return Err(Refusal::ControlUnavailable { control, why: why.to_owned() });
        }
        Ok(Task { launch, fds, checked, template, filter, is_current, received })
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
