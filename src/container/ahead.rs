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
    make::{Container, Maker},
    run::Task,
};
use crate::jail::{
    check::Checked,
    message::{Launch, Refusal},
    plan::Template,
    root::{self, Seen},
};

/// Most of all namespaces together: a caller names any namespace that a default policy
/// takes. The longest without a call give way.
const ALL_MAX: usize = 64;
/// After the last call, how long they are kept.
const IDLE: Duration = Duration::from_secs(600);
/// How long nothing is made after one that couldn't be.
const RETRY: Duration = Duration::from_secs(5);

/// What waits, for whom.
#[derive(Default)]
pub struct Ahead {
    shelves: Mutex<Shelves>,
}

#[derive(Default)]
struct Shelves {
    by_key: HashMap<Key, Shelf>,
    /// Shelves that there ever were.
    count: u64,
}

/// By the template itself: the same name may mean another one after a reload.
type Key = (usize, String);

struct Shelf {
    /// Which of all that there ever were: one that went may come again under its key.
    number: u64,
    /// Keeps the address that is the key.
    template: Arc<Template>,
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
        // Of superseded policies nothing is kept.
        if task.template.container.ahead == 0 || !task.is_current {
            return None;
        }
        let found = self.find(task);
        self.fill(maker, task);
        let (container, streams) = found?;
        maker.rename(&container, task.launch.run);
        Some((container, streams))
    }

    fn find(&self, task: &Task) -> Option<(Container, Streams)> {
        let mut waiting = {
            let mut shelves = self.lock();
            let shelf = shelves.shelf(task);
            shelf.called = Instant::now();
            // One for less can't be had of one that has all.
            if !is_whole(&task.checked, &task.template) {
                return None;
            }
            shelf.waiting.pop_front()
        };
        // Without the lock: what is shown may be slow to look at.
        while let Some(one) = waiting {
            if one.container.waits()
                && one.shown == root::seen(&task.template.filesystem, task.template.listens)
            {
                return Some((one.container, one.streams));
            }
            waiting = self.lock().by_key.get_mut(&key(task))?.waiting.pop_front();
        }
        None
    }

    /// Makes as many as are wanting, beside.
    fn fill(self: &Arc<Self>, maker: &Arc<Maker>, task: &Task) {
        let (wanting, number, given_up) = self.lock().order(&key(task));
        drop(given_up);
        for _ in 0..wanting {
            let making = Making { ahead: Arc::clone(self), key: key(task), number };
            let (maker, task) = (Arc::clone(maker), Like::of(task));
            tokio::spawn(async move { making.make_one(&maker, &task).await });
        }
    }

    /// Lets go of what nobody called for in a while, and of what `keep` doesn't want.
    pub fn review(&self, keep: impl Fn(&Arc<Template>) -> bool) {
        let now = Instant::now();
        let gone: Vec<_> = {
            let mut shelves = self.lock();
            let goes =
                |shelf: &Shelf| now.duration_since(shelf.called) >= IDLE || !keep(&shelf.template);
            shelves.by_key.extract_if(|_, shelf| goes(shelf)).collect()
        };
        // Without the lock: slots are removed from the disk.
        drop(gone);
    }

    fn lock(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelves {
    fn shelf(&mut self, task: &Task) -> &mut Shelf {
        let count = &mut self.count;
        self.by_key.entry(key(task)).or_insert_with(|| {
            *count += 1;
            Shelf {
                number: *count,
                template: Arc::clone(&task.template),
                waiting: VecDeque::new(),
                making: 0,
                called: Instant::now(),
                retry: None,
            }
        })
    }

    /// How many are to be made for a shelf, which it is, and what gives way to them.
    fn order(&mut self, key: &Key) -> (usize, u64, Vec<Shelf>) {
        let Some(shelf) = self.by_key.get(key) else { return (0, 0, Vec::new()) };
        let number = shelf.number;
        if shelf.retry.is_some_and(|at| at > Instant::now()) {
            return (0, number, Vec::new());
        }
        let there = shelf.waiting.len() + shelf.making;
        let mut wanting = (shelf.template.container.ahead as usize).saturating_sub(there);
        let mut given_up = Vec::new();
        while wanting > 0 && self.all() + wanting > ALL_MAX {
            let others = self.by_key.iter().filter(|(other, _)| *other != key);
            let oldest = others.min_by_key(|(_, shelf)| shelf.called).map(|(key, _)| key.clone());
            match oldest.and_then(|oldest| self.by_key.remove(&oldest)) {
                Some(shelf) => given_up.push(shelf),
                None => wanting = ALL_MAX.saturating_sub(self.all()),
            }
        }
        if let Some(shelf) = self.by_key.get_mut(key) {
            shelf.making += wanting;
        }
        (wanting, number, given_up)
    }

    fn all(&self) -> usize {
        self.by_key.values().map(|shelf| shelf.waiting.len() + shelf.making).sum()
    }
}

/// What one that is made ahead is like.
struct Like {
    launch: Launch,
    template: Arc<Template>,
    filter: Arc<str>,
}

impl Like {
    fn of(task: &Task) -> Self {
        Self {
            launch: task.launch.clone(),
            template: Arc::clone(&task.template),
            filter: Arc::clone(&task.filter),
        }
    }
}

/// One that is being made; however that ends, it isn't counted any more.
struct Making {
    ahead: Arc<Ahead>,
    key: Key,
    number: u64,
}

impl Making {
    async fn make_one(self, maker: &Arc<Maker>, like: &Like) {
        let limits = &like.template.limits;
        let checked =
            Checked { memory: limits.memory, cpus: limits.cpus, timeout: None, call_len: 0 };
        // Calls that wait for theirs come first.
        let Some(_turn) = maker.stock_turn().await else { return };
        // Before it is made: what changes meanwhile is a change.
        let shown = root::seen(&like.template.filesystem, like.template.listens);
        let made = maker.make(&like.template, &like.filter, &like.launch, None, &checked).await;
        let mut shelves = self.ahead.lock();
        // Where nobody wants it any more, it is removed.
        let Some(shelf) = self.shelf(&mut shelves) else { return };
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

    fn shelf<'a>(&self, shelves: &'a mut Shelves) -> Option<&'a mut Shelf> {
        shelves.by_key.get_mut(&self.key).filter(|shelf| shelf.number == self.number)
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        let ahead = Arc::clone(&self.ahead);
        let mut shelves = ahead.lock();
        if let Some(shelf) = self.shelf(&mut shelves) {
            shelf.making = shelf.making.saturating_sub(1);
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
