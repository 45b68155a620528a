//! Containers made ahead of need: `[container] ahead` for each namespace.
//!
//! Most of what a container takes is Docker's work, and the same for each call of a
//! namespace under the same policy. Each serves one call. Docker's labels can't be changed,
//! so that one made ahead has its run's id in its name alone.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    engine::Streams,
    make::{Container, Maker, name_of},
    run::Task,
};
use crate::jail::{
    check::Checked,
    message::{Launch, Refusal},
    plan::Template,
    root::{self, Seen},
};

/// After the last call, how long they are kept.
const IDLE: Duration = Duration::from_secs(600);
/// How long nothing is made after one that couldn't be.
const RETRY: Duration = Duration::from_secs(5);

/// What waits, for whom.
#[derive(Default)]
pub struct Ahead {
    shelves: Mutex<HashMap<Key, Shelf>>,
}

/// By the template itself: the same name may mean another one after a reload.
type Key = (usize, String);

struct Shelf {
    /// Keeps the address that is the key.
    template: Arc<Template>,
    filter: Arc<str>,
    waiting: VecDeque<Waiting>,
    /// How many are being made.
    making: usize,
    called: Instant,
    retry: Option<Instant>,
}

struct Waiting {
    container: Container,
    streams: Streams,
    /// What of the host its root was made of.
    shown: Vec<Seen>,
}

impl Ahead {
    /// One that waits for such a call, if there is one; others are made meanwhile.
    pub fn take(self: &Arc<Self>, maker: &Arc<Maker>, task: &Task) -> Option<(Container, Streams)> {
        if task.template.container.ahead == 0 {
            return None;
        }
        let found = self.find(task);
        self.fill(maker, task);
        let (container, streams) = found?;
        let (maker, id) = (Arc::clone(maker), container.id.clone());
        let name = name_of(task.launch.run);
        // Beside: only people go by it, and Docker writes it to its disk.
        tokio::spawn(async move {
            if let Err(error) = maker.engine.rename(&id, &name).await {
                tracing::debug!(%error, "a container keeps its name");
            }
        });
        Some((container, streams))
    }

    fn find(&self, task: &Task) -> Option<(Container, Streams)> {
        let mut shelves = self.lock();
        let shelf = shelves.entry(key(task)).or_insert_with(|| Shelf::of(task));
        shelf.called = Instant::now();
        // One for less can't be had of one that has all.
        if !is_whole(&task.checked, &task.template) {
            return None;
        }
        let now = root::seen(&task.template.filesystem);
        // In the order in which they were made: the others may be as old, or dead as well.
        while let Some(one) = shelf.waiting.pop_front() {
            if one.shown == now && one.container.waits() {
                return Some((one.container, one.streams));
            }
        }
        None
    }

    /// Makes as many as are wanting, beside.
    fn fill(self: &Arc<Self>, maker: &Arc<Maker>, task: &Task) {
        let key = key(task);
        let wanting = {
            let mut shelves = self.lock();
            let Some(shelf) = shelves.get_mut(&key) else { return };
            if shelf.retry.is_some_and(|at| at > Instant::now()) {
                return;
            }
            let there = shelf.waiting.len() + shelf.making;
            let wanting = (shelf.template.container.ahead as usize).saturating_sub(there);
            shelf.making += wanting;
            wanting
        };
        for _ in 0..wanting {
            let (ahead, maker, key) = (Arc::clone(self), Arc::clone(maker), key.clone());
            let launch = task.launch.clone();
            tokio::spawn(async move { ahead.make_one(&maker, &key, &launch).await });
        }
    }

    async fn make_one(&self, maker: &Arc<Maker>, key: &Key, launch: &Launch) {
        let Some((template, filter)) = self
            .lock()
            .get(key)
            .map(|shelf| (Arc::clone(&shelf.template), Arc::clone(&shelf.filter)))
        else {
            return;
        };
        let checked = Checked {
            memory: template.limits.memory,
            cpus: template.limits.cpus,
            timeout: None,
            call_len: 0,
        };
        // Before it is made: what changes meanwhile is a change.
        let shown = root::seen(&template.filesystem);
        let made = maker.make(&template, &filter, launch, None, &checked).await;
        let mut shelves = self.lock();
        // Nobody wants it any more: it is removed.
        let Some(shelf) = shelves.get_mut(key) else { return };
        shelf.making -= 1;
        match made {
            Ok((container, streams)) => {
                shelf.retry = None;
                shelf.waiting.push_back(Waiting { container, streams, shown });
            }
            // A call that needs one is told why it can't be had.
            Err(Refusal::Ending) => {}
            Err(refusal) => {
                tracing::warn!(?refusal, "a container can't be made ahead");
                shelf.retry = Some(Instant::now() + RETRY);
            }
        }
    }

    /// Lets go of what nobody called for in a while, and of what `keep` doesn't want.
    pub fn review(&self, keep: impl Fn(&Arc<Template>) -> bool) {
        let now = Instant::now();
        self.lock()
            .retain(|_, shelf| now.duration_since(shelf.called) < IDLE && keep(&shelf.template));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Shelf>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn of(task: &Task) -> Self {
        Self {
            template: Arc::clone(&task.template),
            filter: Arc::clone(&task.filter),
            waiting: VecDeque::new(),
            making: 0,
            called: Instant::now(),
            retry: None,
        }
    }
}

fn key(task: &Task) -> Key {
    (Arc::as_ptr(&task.template) as usize, task.launch.namespace.clone())
}

/// Whether a call wants all that its policy gives.
fn is_whole(checked: &Checked, template: &Template) -> bool {
    checked.memory == template.limits.memory && checked.cpus == template.limits.cpus
}
