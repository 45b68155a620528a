//! Which containers are ours, and their certain removal.
//!
//! Each is entered before Docker is asked for it, under a name that nobody else has, and
//! stays until Docker says that it is gone. What has our label and isn't entered is a
//! leftover: Docker may finish a request long after it was given up.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::process::Pid;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};

use super::{
    engine::{Engine, EngineError, Labelled},
    owner::{self, Owner},
};
use crate::jail::cgroup::Cgroup;

/// Most containers at once, with those that can't be removed yet.
pub const EXISTING_MAX: u32 = 1 << 16;
/// Containers that are removed at once, lest it be in the way of making others.
const AT_ONCE: usize = 4;
/// The same when nothing is made any more and there is little time.
const AT_ONCE_LAST: usize = 32;
/// How long is waited before removing a container is tried again: twice as long each time,
/// up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// How long after a create that was given up leftovers are looked for more often.
const DOUBT: Duration = Duration::from_secs(600);

/// All containers that are ours.
#[derive(Debug)]
pub struct Inventory {
    engine: Arc<Engine>,
    owner: Owner,
    /// One permit for each container there is: all are there when none is left.
    existing: Arc<Semaphore>,
    removing: Semaphore,
    /// By their names and, once they are known, their ids.
    entered: Mutex<HashSet<String>>,
    ending: watch::Sender<bool>,
    /// When a create was given up last.
    doubt: Mutex<Option<Instant>>,
    doubted: Notify,
}

impl Inventory {
    /// One without any.
    #[must_use]
    pub fn new(engine: Arc<Engine>, owner: Owner) -> Arc<Self> {
        Arc::new(Self {
            engine,
            owner,
            existing: Arc::new(Semaphore::new(EXISTING_MAX as usize)),
            removing: Semaphore::new(AT_ONCE),
            entered: Mutex::default(),
            ending: watch::Sender::new(false),
            doubt: Mutex::default(),
            doubted: Notify::new(),
        })
    }

    /// Docker.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Whose they are.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Enters one that is about to be created with this name; `None` where there are too
    /// many.
    #[must_use]
    pub fn enter(self: &Arc<Self>, name: String) -> Option<Removal> {
        let existing = Arc::clone(&self.existing).try_acquire_owned().ok()?;
        lock(&self.entered).insert(name.clone());
        Some(Removal { inventory: Arc::clone(self), name, id: None, existing: Some(existing) })
    }

    /// Removes what dead dispatchers left, and what of ours Docker made too late.
    ///
    /// # Errors
    /// Where Docker can't be asked.
    pub async fn sweep(&self) -> Result<(), EngineError> {
        self.remove_those(|found| self.is_leftover(found) || self.owner.sees_dead(&found.value))
            .await
    }

    /// Whether leftovers are likely.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        lock(&self.doubt).is_some_and(|since| since.elapsed() < DOUBT)
    }

    /// Returns when that may be so from now on. For one listener; cancel-safe.
    pub async fn doubted(&self) {
        self.doubted.notified().await;
    }

    /// Has all that is left to be removed removed in haste.
    pub fn hurry(&self) {
        self.removing.add_permits(AT_ONCE_LAST - AT_ONCE);
        self.ending.send_replace(true);
    }

    /// Returns when no container is left.
    ///
    /// # Errors
    /// Where Docker can't be asked for leftovers, and there may be some.
    pub async fn emptied(&self) -> Result<(), EngineError> {
        // Closed never.
        let _ = self.existing.acquire_many(EXISTING_MAX).await;
        match self.is_in_doubt() {
            true => self.remove_those(|found| self.is_leftover(found)).await,
            false => Ok(()),
        }
    }

    fn is_leftover(&self, found: &Labelled) -> bool {
        let entered = lock(&self.entered);
        // One that went meanwhile can be removed once more.
        found.value == self.owner.label()
            && !entered.contains(&found.id)
            && !found.names.iter().any(|name| entered.contains(name))
    }

    async fn remove_those(&self, goes: impl Fn(&Labelled) -> bool) -> Result<(), EngineError> {
        let mut failed = Ok(());
        for found in self.engine.labelled(owner::OWNER).await? {
            if goes(&found) {
                let id = found.id;
                tracing::info!(id, owner = found.value, "removing a container that was left");
                self.kill_left(&id).await;
                // One that can't be removed keeps none of the others.
                failed = self.engine.remove(&id).await.and(failed);
            }
        }
        failed
    }

    /// Kills everyone in a container that nobody follows.
    async fn kill_left(&self, id: &str) {
        // One that can't be looked at is Docker's to kill.
        let state = self.engine.inspect(id).await.ok().and_then(|found| found.state);
        let pid = state.and_then(|state| i32::try_from(state.pid?).ok()).and_then(Pid::from_raw);
        if let Some(cgroup) = pid.and_then(|pid| Cgroup::of_container(pid, id).ok()) {
            cgroup.kill_everyone();
        }
    }

    /// Removes one, again and again while Docker is away or busy with it. What is left when
    /// this process ends is swept by its successor.
    async fn remove(&self, name: &str) {
        let mut ending = self.ending.subscribe();
        let (mut pause, longest) = PAUSE;
        loop {
            let turn = self.removing.acquire().await;
            let removed = self.engine.remove(name).await;
            drop(turn);
            match removed {
                Ok(()) => return,
                Err(error) => tracing::debug!(%error, name, "a container can't be removed yet"),
            }
            let is_ending = *ending.borrow();
            if is_ending {
                pause = PAUSE.0;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = ending.wait_for(|ending| *ending), if !is_ending => {}
            }
            pause = longest.min(pause * 2);
        }
    }
}

/// A container's end: dropping it has the container removed, whatever state it is in.
#[derive(Debug)]
pub struct Removal {
    inventory: Arc<Inventory>,
    name: String,
    id: Option<String>,
    existing: Option<OwnedSemaphorePermit>,
}

impl Removal {
    /// Where it is entered.
    #[must_use]
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Docker made it, and calls it so.
    pub fn created(&mut self, id: &str) {
        lock(&self.inventory.entered).insert(id.to_owned());
        self.id = Some(id.to_owned());
    }

    /// Docker was asked for it and didn't answer: it may come after Docker has said that
    /// there is none of this name.
    pub fn doubt(&self) {
        *lock(&self.inventory.doubt) = Some(Instant::now());
        self.inventory.doubted.notify_one();
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        let (inventory, id) = (Arc::clone(&self.inventory), self.id.take());
        let (name, existing) = (std::mem::take(&mut self.name), self.existing.take());
        tokio::spawn(async move {
            inventory.remove(id.as_ref().unwrap_or(&name)).await;
            let mut entered = lock(&inventory.entered);
            entered.remove(&name);
            if let Some(id) = id {
                entered.remove(&id);
            }
            drop(entered);
            drop(existing);
        });
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
