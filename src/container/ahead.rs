//! Containers made ahead of need: `[container] ahead` for each namespace.
//!
//! Most of what a container takes is Docker's work, and the same for each call of a
//! namespace under the same policy. Each serves one call. Docker's labels can't be changed,
//! so that one made ahead has its run's id in its name alone.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Waker},
    time::{Duration, Instant},
};

use super::{
    engine::Streams,
    make::{Container, Maker, Order},
    run::Task,
};
use crate::jail::{
    check::Checked,
    message::Refusal,
    plan::Template,
    root::{self, Seen},
};

/// Most of all namespaces together: a caller names any namespace that a default policy
/// takes. The longest without a call give way.
const ALL_MAX: usize = 64;
/// Most that are being made, or that are to be, with those whose shelf has gone since.
const ORDERS_MAX: usize = 2 * ALL_MAX;
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
    /// How many are being made, whoever for.
    orders: usize,
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

impl Waiting {
    /// Whether init waits, and can be spoken to as far as can be told without: a Docker that
    /// was killed takes its streams along, and may leave the container.
    fn is_sound(&mut self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        // Init says nothing before it is spoken to.
        self.container.waits() && self.streams.output.as_mut().poll_next(&mut context).is_pending()
    }
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
        while let Some(mut one) = waiting {
            if one.is_sound() && one.shown == shown(&task.template) {
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
            let (maker, order) = (Arc::clone(maker), order(task));
            tokio::spawn(async move { making.make_one(&maker, order).await });
        }
    }

    /// Lets go of what nobody called for in a while, of what `keep` doesn't want, and of what
    /// can't be used any more.
    pub fn review(&self, keep: impl Fn(&Arc<Template>) -> bool) {
        let now = Instant::now();
        let (mut gone, mut unsound) = (Vec::new(), Vec::new());
        {
            let mut shelves = self.lock();
            let goes =
                |shelf: &Shelf| now.duration_since(shelf.called) >= IDLE || !keep(&shelf.template);
            gone.extend(shelves.by_key.extract_if(|_, shelf| goes(shelf)));
            for shelf in shelves.by_key.values_mut() {
                let (sound, others) = std::mem::take(&mut shelf.waiting)
                    .into_iter()
                    .map(|mut one| (one.is_sound(), one))
                    .partition::<VecDeque<_>, _>(|(is_sound, _)| *is_sound);
                shelf.waiting.extend(sound.into_iter().map(|(_, one)| one));
                unsound.extend(others);
            }
        }
        // Without the lock: slots are removed from the disk.
        drop((gone, unsound));
    }

    /// Lets go of all that wait now; calls to come have others made.
    pub fn empty(&self) {
        let mut shelves = self.lock();
        let all: Vec<_> =
            shelves.by_key.values_mut().map(|it| std::mem::take(&mut it.waiting)).collect();
        drop(shelves);
        // Without the lock, too.
        drop(all);
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
        wanting = wanting.min(ORDERS_MAX.saturating_sub(self.orders));
        self.orders += wanting;
        if let Some(shelf) = self.by_key.get_mut(key) {
            shelf.making += wanting;
        }
        (wanting, number, given_up)
    }

    fn all(&self) -> usize {
        self.by_key.values().map(|shelf| shelf.waiting.len() + shelf.making).sum()
    }
}

/// One that is like what this call's container is to be.
fn order(task: &Task) -> Order {
    let limits = &task.template.limits;
    Order {
        launch: task.launch.clone(),
        run: None,
        template: Arc::clone(&task.template),
        filter: Arc::clone(&task.filter),
        checked: Checked { memory: limits.memory, cpus: limits.cpus, timeout: None, call_len: 0 },
    }
}

/// One that is being made; however that ends, it isn't counted any more.
struct Making {
    ahead: Arc<Ahead>,
    key: Key,
    number: u64,
}

impl Making {
    async fn make_one(self, maker: &Arc<Maker>, order: Order) {
        // Calls that wait for theirs come first.
        let Some(_turn) = maker.queue().stock_turn().await else { return };
        // Its shelf may have given way to others while it waited.
        if self.shelf(&mut self.ahead.lock()).is_none() {
            return;
        }
        // Before it is made: what changes meanwhile is a change.
        let shown = shown(&order.template);
        let made = match maker.prepare(order).await {
            Ok(ready) => maker.make(ready).await,
            Err(refusal) => Err(refusal),
        };
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
        shelves.orders = shelves.orders.saturating_sub(1);
        if let Some(shelf) = self.shelf(&mut shelves) {
            shelf.making = shelf.making.saturating_sub(1);
        }
    }
}

fn key(task: &Task) -> Key {
    (Arc::as_ptr(&task.template) as usize, task.launch.namespace.clone())
}

/// What of the host a root is made of.
fn shown(template: &Template) -> Vec<Seen> {
    root::seen(&template.filesystem, root::made_anew(true, template.listens))
}

/// Whether a call wants all that its policy gives.
fn is_whole(checked: &Checked, template: &Template) -> bool {
    checked.memory == template.limits.memory && checked.cpus == template.limits.cpus
}
