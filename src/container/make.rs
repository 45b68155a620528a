//! Making a container: all of it but the program, for which init in it waits.
//!
//! Whatever goes wrong on the way, what was made is removed: by [`Removal`], which the
//! container has from before its creation on. Don't drop [`Maker::make`] half-way: Docker may
//! go on with what it was asked for, and make what was removed already.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use super::{
    demand,
    engine::{Engine, EngineError, Streams},
    image::ContainerRoot,
    inventory::{EXISTING_MAX, Inventory, Removal},
    owner::Owner,
    queue::{Queue, Turn},
    service::Service,
    slot::Slot,
    spec::{self, Making},
    verify,
};
use crate::{
    jail::{
        blueprint::RootPlan,
        cgroup::{Cgroup, Usage},
        check::Checked,
        message::{Launch, Oom, Refusal},
        plan::{Control, Root, Template},
        root::{self, Ownership, RootError},
    },
    names::RunId,
    packets,
};

/// How often what was killed is killed again: some may have been forked meanwhile.
const KILL_AGAIN: Duration = Duration::from_millis(50);
/// How long a container that was started may take to come to its init: with a small share
/// of a processor that is long.
const INIT_WAIT: Duration = Duration::from_secs(10);
/// The same under a runtime in whose last container no init was seen.
const INIT_WAIT_IN_VAIN: Duration = Duration::from_millis(500);
/// How long a call waits for an image that is being pulled: less than the server waits
/// for a start.
const PULL_WAIT: Duration = Duration::from_secs(25);

/// What all containers are made with.
#[derive(Debug)]
pub struct Maker {
    engine: Arc<Engine>,
    inventory: Arc<Inventory>,
    queue: Arc<Queue>,
    /// For slots.
    directory: PathBuf,
    /// Images that are being pulled.
    pulling: Mutex<HashSet<String>>,
    /// Runtimes that the policies name and whose containers can't be looked into, which have
    /// a kernel of their own.
    opaque: Mutex<HashSet<String>>,
}

/// What a container is made for.
#[derive(Clone)]
pub struct Order {
    /// A launch, or one to come that is like it.
    pub launch: Launch,
    /// Its id, where it is known yet.
    pub run: Option<RunId>,
    /// By which policy.
    pub template: Arc<Template>,
    /// Its system calls, for Docker.
    pub filter: Arc<str>,
    /// What holds for it.
    pub checked: Checked,
}

/// An order whose turn it is. Of its container nothing is there yet.
pub struct Ready {
    order: Order,
    root: ContainerRoot,
    image: String,
    _turn: Turn,
}

/// A container whose init waits for a program.
pub struct Container {
    /// Docker's id.
    pub id: String,
    /// Readable when init is dead, and with it all of the pid namespace.
    pub init: AsyncFd<OwnedFd>,
    cgroup: Option<Mutex<Cgroup>>,
    /// What is in force in it.
    pub enforced: Vec<Control>,
    /// Where the executable goes.
    pub slot: Slot,
    /// What it takes to connect to the program, where that listens.
    pub service: Option<Service>,
    removal: Removal,
}

impl Container {
    /// Docker, which has it.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        self.removal.inventory().engine()
    }

    /// What it uses, for a moment; `None` where nothing can be seen of it.
    #[must_use]
    pub fn cgroup(&self) -> Option<MutexGuard<'_, Cgroup>> {
        Some(self.cgroup.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What it has used so far.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.cgroup().map_or(Usage::default(), |cgroup| cgroup.usage())
    }

    /// What it has used and who was killed for want of memory, for as long as Docker keeps its
    /// cgroups: it removes them when the last process has ended.
    #[must_use]
    pub fn last_counts(&self) -> (Option<Usage>, Oom) {
        let cgroup = self.cgroup();
        cgroup.map_or((None, Oom::None), |cgroup| (Some(cgroup.usage()), cgroup.oom()))
    }

    /// SIGKILL for init, by which all should die, and for all the others as well: an init
    /// that doesn't come to run can't die either.
    pub fn kill(&self) {
        // Gone already is as good.
        let _ = pidfd_send_signal(self.init.as_fd(), Signal::KILL);
        if let Some(cgroup) = self.cgroup() {
            cgroup.kill_everyone();
        }
    }

    /// Kills until nothing runs any more, for so long. Whether that is so.
    pub async fn killed_within(&self, patience: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + patience;
        while tokio::time::Instant::now() < deadline {
            self.kill();
            if tokio::time::timeout(KILL_AGAIN, self.gone()).await.is_ok() {
                return true;
            }
        }
        false
    }

    /// Whether init is there and waits.
    #[must_use]
    pub fn waits(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.init, PollFlags::IN)], Some(&at_once)) == Ok(0)
    }

    /// Waits until nothing of it runs any more. Cancel-safe.
    pub async fn gone(&self) {
        // An error would come at once, again and again; a pidfd has none.
        let _ = self.init.readable().await;
    }
}

impl Maker {
    /// One for this Docker, with slots below `base`.
    ///
    /// # Errors
    /// Those of preparing the directory.
    pub fn new(engine: Engine, base: &Path) -> io::Result<Arc<Self>> {
        let owner = Owner::own()?;
        let directory = super::slot::prepare(base, &owner)?;
        let engine = Arc::new(engine);
        Ok(Arc::new(Self {
            inventory: Inventory::new(Arc::clone(&engine), owner),
            engine,
            queue: Queue::new(),
            directory,
            pulling: Mutex::default(),
            opaque: Mutex::default(),
        }))
    }

    /// Which containers there are.
    #[must_use]
    pub fn inventory(&self) -> &Arc<Inventory> {
        &self.inventory
    }

    /// Who waits for one.
    #[must_use]
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// Gets ready to make a container, and waits for the turn to. Cancel-safe: what was done
    /// for it so far is no order's own.
    ///
    /// # Errors
    /// What Docker or this host can't give.
    pub async fn prepare(self: &Arc<Self>, order: Order) -> Result<Ready, Refusal> {
        let template = &order.template;
        let root = decide_root(template)?;
        let root = ContainerRoot::of(root.pieces, template.listens)
            .map_err(|error| step("image", &error))?;
        let image = self.image(template, &root).await?;
        let turn = self.queue.turn(&order.launch.namespace).await.ok_or(Refusal::Ending)?;
        Ok(Ready { order, root, image, _turn: turn })
    }

    /// Makes the container and starts its init.
    ///
    /// # Errors
    /// What Docker or this host can't give. Nothing stays behind.
    pub async fn make(self: &Arc<Self>, ready: Ready) -> Result<(Container, Streams), Refusal> {
        let Ready { order, root, image, _turn } = ready;
        let Order { launch, run, template, filter, checked } = order;
        let (template, checked) = (&*template, &checked);
        let random = || RunId::random().map_err(|error| step("name", &error));
        // Random in any case: nobody else's container has this name, which has ours removed
        // from before it exists, as a create that is given up may have created it.
        let name = format!("dispatcher-made-{}", random()?);
        let mut removal = self.inventory.enter(name.clone()).ok_or_else(too_many)?;
        let slot = Slot::make(&self.directory, &name).map_err(|error| unplaced("slot", &error))?;
        let host_name = format!("run-{}", random()?);
        let making = Making {
            image: &image,
            host_name: &host_name[..host_name.len().min(HOST_NAME_LEN)],
            binds: &root.binds,
            slot: slot.path(),
            checked,
            labels: self.inventory.owner().labels(&launch, run),
            filter: &filter,
        };
        let body = spec::body(template, making);
        let created = match self.engine.create(&name, body.clone()).await {
            // Ours may have been removed since it was looked for, by `docker image prune`.
            Err(EngineError::Missing(_)) if template.container.image.is_empty() => {
                self.engine.import(&root.image).await?;
                self.engine.create(&name, body).await
            }
            created => created,
        };
        if let Err(EngineError::Unavailable { .. }) = &created {
            removal.doubt();
        }
        let id = created?;
        removal.created(&id);
        let streams = self.engine.attach(&id).await?;
        self.engine.start(&id).await?;
        let state = self.engine.inspect(&id).await?.state.unwrap_or_default();
        let pid = state.pid.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        let ended = || {
            let why = state.error.as_deref().filter(|why| !why.is_empty()).unwrap_or("no reason");
            EngineError::Refused(format!("the container ended at once ({why}); {ADVICE}"))
        };
        let pid = pid.ok_or_else(ended)?;
        let pidfd =
            pidfd_open(pid, PidfdFlags::empty()).map_err(|error| step("pidfd", &error.into()))?;
        let init = packets::until_readable(pidfd).map_err(|error| step("pidfd", &error))?;
        // Whose number it still is: a stranger's must never be killed in its place.
        let still = self.engine.inspect(&id).await?.state.and_then(|state| state.pid);
        if still != state.pid {
            return Err(ended().into());
        }
        if !self.await_init(pid, &init, &slot.init(), &template.container.runtime).await {
            return Err(ended().into());
        }
        let (cgroup, enforced) = demand::look(template, pid, &id, &slot, checked)?;
        let service = template.listens.then(|| Service::of(pid)).transpose();
        let service = service.map_err(|error| no_service(template, &error))?;
        let cgroup = cgroup.map(Mutex::new);
        let container = Container { id, init, cgroup, enforced, slot, service, removal };
        if !container.waits() {
            return Err(ended().into());
        }
        if let Some(run) = run {
            self.rename(&container, run);
        }
        Ok((container, streams))
    }

    /// Names a container after its run. Beside: only people go by it, and Docker writes it
    /// to its disk.
    pub fn rename(self: &Arc<Self>, container: &Container, run: RunId) {
        let (maker, id) = (Arc::clone(self), container.id.clone());
        tokio::spawn(async move {
            if let Err(error) = maker.engine.rename(&id, &format!("dispatcher-{run}")).await {
                tracing::debug!(%error, "a container keeps its name");
            }
        });
    }

    /// The image's name, once Docker has it.
    async fn image(
        self: &Arc<Self>,
        template: &Template,
        root: &ContainerRoot,
    ) -> Result<String, Refusal> {
        let wanted = &template.container;
        if wanted.image.is_empty() {
            self.engine.import(&root.image).await?;
            return Ok(root.image.name.clone());
        }
        let found = match self.engine.image(&wanted.image).await {
            Err(EngineError::Missing(_)) if wanted.pull => {
                self.pull(&wanted.image).await?;
                self.engine.image(&wanted.image).await?
            }
            Err(EngineError::Missing(_)) => {
                let help = "isn't there; `docker pull` it, or write [container] pull = true";
                return Err(image(&wanted.image, help));
            }
            found => found?,
        };
        let config = found.config.unwrap_or_default();
        if config.volumes.is_some_and(|volumes| !volumes.is_empty()) {
            let why = "declares volumes, which would be writable and without a limit: make one without VOLUME";
            return Err(image(&wanted.image, why));
        }
        // By its id: what was looked at is what is used.
        Ok(found.id.unwrap_or_else(|| wanted.image.clone()))
    }

    fn pulling(&self) -> MutexGuard<'_, HashSet<String>> {
        self.pulling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pulls an image, or has it pulled for a later call.
    async fn pull(self: &Arc<Self>, name: &str) -> Result<(), Refusal> {
        let still = || image(name, "is still being pulled; send the call again");
        let Some(pulling) = Pulling::begin(self, name) else { return Err(still()) };
        let pulling = tokio::spawn(async move { pulling.maker.engine.pull(&pulling.name).await });
        match tokio::time::timeout(PULL_WAIT, pulling).await {
            Err(_) => Err(still()),
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(image(name, &format!("can't be pulled: {error}"))),
            Ok(Err(panic)) => Err(image(name, &format!("can't be pulled: {panic}"))),
        }
    }

    /// Docker says that a container was started a moment before it executes its entrypoint.
    /// Returns when it has, or when that took too long: then it isn't to be seen from here.
    /// Not, where it is dead.
    async fn await_init(
        &self,
        pid: Pid,
        pidfd: &AsyncFd<OwnedFd>,
        init: &Path,
        runtime: &str,
    ) -> bool {
        let opaque = || self.opaque.lock().unwrap_or_else(PoisonError::into_inner);
        let patience = if opaque().contains(runtime) { INIT_WAIT_IN_VAIN } else { INIT_WAIT };
        let deadline = tokio::time::Instant::now() + patience;
        let mut pause = Duration::from_millis(1);
        while !verify::is_init(pid, init) {
            if tokio::time::Instant::now() >= deadline {
                if !runtime.is_empty() {
                    // Only for how long the next one is waited for: what holds in it is
                    // told by what is seen of it.
                    opaque().insert(runtime.to_owned());
                }
                return true;
            }
            if tokio::time::timeout(pause, pidfd.readable()).await.is_ok() {
                return false;
            }
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        opaque().remove(runtime);
        true
    }

    /// Makes no more: those who wait for their turn are refused. What is left has little time.
    pub fn close(&self) {
        self.queue.close();
        self.inventory.hurry();
    }

    /// Returns when no container is left, and nothing of ours on the disk: whether that is
    /// certain.
    pub async fn all_removed(&self) -> bool {
        let emptied = self.inventory.emptied().await;
        if let Err(error) = &emptied {
            tracing::warn!(%error, "a container may be left, which the next start removes");
        }
        if let Err(error) = std::fs::remove_dir(&self.directory) {
            tracing::warn!(%error, "{} can't be removed", self.directory.display());
        }
        emptied.is_ok()
    }
}

/// An image that is being pulled, until this is dropped.
struct Pulling {
    maker: Arc<Maker>,
    name: String,
}

impl Pulling {
    /// `None` where it is being pulled already.
    fn begin(maker: &Arc<Maker>, name: &str) -> Option<Self> {
        let begun = maker.pulling().insert(name.to_owned());
        begun.then(|| Self { maker: Arc::clone(maker), name: name.to_owned() })
    }
}

impl Drop for Pulling {
    fn drop(&mut self) {
        self.maker.pulling().remove(&self.name);
    }
}

/// The length of `run-` and eight digits, as in a jail.
const HOST_NAME_LEN: usize = 12;

fn decide_root(template: &Template) -> Result<RootPlan, Refusal> {
    let mut filesystem = template.filesystem.clone();
    if !template.container.image.is_empty() {
        filesystem.root = Root::Empty;
    }
    for bind in &filesystem.binds {
        check_source(&bind.source)?;
    }
    let decided = root::decide(&filesystem, None, Ownership::Docker, false);
    decided.map(|decided| decided.plan).map_err(|error| match error {
        RootError::Path { .. } => {
            Refusal::ControlUnavailable { control: Control::RootReadonly, why: error.to_string() }
        }
        RootError::System { what, error } => step(&what, &error),
    })
}

/// No link on the way, which somebody else could have put there. Docker resolves the path
/// once more: who may write to a directory above a bind decides what is shown.
fn check_source(source: &Path) -> Result<(), Refusal> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = openat2(CWD, source, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS);
    found.map(drop).map_err(|error| Refusal::ControlUnavailable {
        control: Control::RootReadonly,
        why: format!("{} can't be shown: {error}", source.display()),
    })
}

fn no_service(template: &Template, error: &io::Error) -> Refusal {
    let image = match &*template.container.image {
        "" => "",
        _ => "; an image that has something at that path must leave it out",
    };
    Refusal::Docker { why: format!("the service's sockets have no place: {error}{image}") }
}

/// What is wrong with an image.
pub(super) fn image(name: &str, why: &str) -> Refusal {
    Refusal::Image { why: format!("the image {name} {why}") }
}

/// Where Docker is slow, or does what it shouldn't.
pub const ADVICE: &str = "see `docker info` and Docker's log, and send the call again";

/// What couldn't be put where containers are shown it.
#[must_use]
pub fn unplaced(what: &str, error: &io::Error) -> Refusal {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Refusal::DockerUnavailable {
            why: format!(
                "there is no room for what the container is to be shown ({error}): make room \
                 where [docker] directory is, or name another there, and send the call again"
            ),
        },
        _ => step(what, error),
    }
}

/// What failed by itself.
pub(super) fn step(step: &str, error: &io::Error) -> Refusal {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    Refusal::Step { step: format!("container.{step}"), index: 0, errno }
}

fn too_many() -> Refusal {
    let why = format!(
        "there are {EXISTING_MAX} containers, with those that Docker doesn't remove: see `docker \
         ps --all` and Docker's log; send the call again"
    );
    Refusal::DockerUnavailable { why }
}

/// A nonce that the program can't guess.
///
/// # Errors
/// Those of getrandom(2).
pub fn nonce() -> io::Result<[u8; super::protocol::NONCE_LEN]> {
    let mut nonce = [0; super::protocol::NONCE_LEN];
    // So few bytes come in one piece, getrandom(2).
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_as_one() {
        let errno = |errno| unplaced("slot", &io::Error::from_raw_os_error(errno));
        for full in [libc::ENOSPC, libc::EDQUOT] {
            let Refusal::DockerUnavailable { why } = errno(full) else { panic!("{full}") };
            assert!(why.contains("[docker] directory"), "{why}");
        }
        assert!(matches!(errno(libc::EIO), Refusal::Step { errno: libc::EIO, .. }));
    }
}
