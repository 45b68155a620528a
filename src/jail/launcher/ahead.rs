//! Jails built ahead of need.
//!
//! Most of what a jail is made of depends on its template alone, so that it can be
//! made before there is a call for it; a call then costs what only it can bring. Each
//! is used once. Nothing here is seen from outside but the time: a jail built ahead is
//! built and started by the same code as one that a call waits for, and where none can
//! be had (a script is part of its root, the first call of a template) the call
//! builds its own, and is told what went wrong with that.
//!
//! As many are kept as a template's calls ran at once lately, and one: when they end,
//! as many may follow. A template whose calls come thick and fast has more. To build one
//! while a call runs slows that call, where processors are few; so they are built in
//! quiet moments, one at a time, and without waiting for one only when few are left: then
//! until all are there again. Where calls come several at a time they are built at once.
//! All templates together have a bound; at it, one that has fewer than another by two gets
//! of the other's, so that who was busy a while ago keeps nobody from having any.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Launcher, log};
use crate::jail::{
    decide::Prepared,
    message::{Launch, StopCause},
    plan::{Mode, Template, TemplateId},
    root,
    run::Run,
};

/// Most jails that wait for one template's calls.
const EACH_MAX: usize = 32;
/// Most that are begun at once: what comes in meanwhile waits for them.
const BATCH: usize = 8;
/// Fewest that are wanted of a busy template.
const EACH_BUSY: usize = 16;
/// Fewest that are wanted of a template that is called.
const EACH_MIN: usize = 2;
/// Calls in one [`REVIEW`] that make a template a busy one.
const BUSY: u32 = 32;
/// Most of all templates together.
const ALL_MAX: usize = 64;
/// Share of the host uids and of the descriptors that they may take.
const SHARE: usize = 8;
/// How often demand is reviewed.
const REVIEW: Duration = Duration::from_secs(10);
/// Reviews without a call after which a template's last jail goes.
const IDLE_REVIEWS: u32 = 60;
/// How long nothing is built after a jail that could not be; doubled each time.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// What waits, and what is wanted.
#[derive(Debug)]
pub(super) struct Ahead {
    demands: HashMap<(TemplateId, Mode), Demand>,
    mounts: Mounts,
    review_at: Option<Instant>,
}

/// Of one template in one mode.
#[derive(Debug)]
struct Demand {
    prepared: Rc<Prepared>,
    /// The oldest first.
    jails: VecDeque<Jail>,
    /// Calls since the last review, and in the time before it.
    calls: u32,
    last_calls: u32,
    /// Calls that run now, and the most that did since the last review and before it.
    running: usize,
    peak: usize,
    last_peak: usize,
    /// Few were left, and not all are there again.
    filling: bool,
    /// Reviews since the last call.
    idle: u32,
    retry: Duration,
    retry_at: Option<Instant>,
}

#[derive(Debug)]
struct Jail {
    serial: u64,
    /// What of the host its root was made of; `None` for nothing.
    shown: Option<Shown>,
}

/// What of the host a root shows.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    files: Vec<root::Seen>,
    mounts: u64,
}

/// Counts changes of the launcher's mount table: what is mounted later isn't seen
/// in a jail.
#[derive(Debug)]
struct Mounts {
    table: File,
    changes: u64,
}

impl Mounts {
    fn watch() -> std::io::Result<Self> {
        Ok(Self { table: File::open("/proc/self/mounts")?, changes: 0 })
    }

    /// How often it was seen changed. Readable with priority, it has changed since
    /// it was last polled, proc_pid_mounts(5).
    fn changes(&mut self) -> u64 {
        let mut fds = [PollFd::new(&self.table, PollFlags::PRI)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled = poll(&mut fds, Some(&at_once));
        if polled.is_err() || fds[0].revents().intersects(PollFlags::PRI | PollFlags::ERR) {
            self.changes += 1;
        }
        self.changes
    }
}

impl Ahead {
    pub(super) fn new() -> Result<Self, String> {
        let mounts = Mounts::watch().map_err(|error| format!("/proc/self/mounts: {error}"))?;
        Ok(Self { demands: HashMap::new(), mounts, review_at: None })
    }

    /// When [`Launcher::build_ahead`] has something to do, with at most `most` jails
    /// and nothing to disturb from `quiet` on.
    pub(super) fn due(&self, most: usize, now: Instant, quiet: Instant) -> Option<Instant> {
        let bound = self.each_may_have(most);
        let wanting = self.demands.values().filter(|demand| demand.lacks_any_below(bound));
        let due = |demand: &Demand| {
            let begin = if demand.filling { now } else { quiet };
            demand.retry_at.map_or(begin, |retry| retry.max(begin))
        };
        wanting.map(due).chain(self.review_at).min()
    }

    fn count(&self) -> usize {
        self.demands.values().map(|demand| demand.jails.len()).sum()
    }

    /// A template that has fewer may have one more, if need be in the place of another's.
    fn each_may_have(&self, most: usize) -> usize {
        if self.count() < most {
            return usize::MAX;
        }
        let fullest = self.demands.values().map(|demand| demand.jails.len()).max();
        // With less between them, they would take turns for ever.
        fullest.filter(|_| most > 0).map_or(0, |fullest| fullest.saturating_sub(1))
    }

    /// The oldest jail of the template that has the most.
    fn give_way(&mut self) -> Option<u64> {
        let fullest = self.demands.values_mut().max_by_key(|demand| demand.jails.len())?;
        fullest.jails.pop_front().map(|jail| jail.serial)
    }

    /// A call of this template runs, or doesn't any more.
    pub(super) fn count_running(&mut self, run: &Run, launch: &Launch, more: bool) {
        let key = (launch.template.clone(), launch.mode);
        let demand = self.demands.get_mut(&key);
        if let Some(demand) = demand.filter(|it| Rc::ptr_eq(&it.prepared, run.prepared())) {
            demand.running =
                if more { demand.running + 1 } else { demand.running.saturating_sub(1) };
            demand.peak = demand.peak.max(demand.running);
        }
    }

    fn shown(&mut self, template: &Template) -> Option<Shown> {
        template.filesystem.shows_host().then(|| Shown {
            files: root::seen(&template.filesystem, root::made_anew(false, template.listens)),
            mounts: self.mounts.changes(),
        })
    }
}

impl Demand {
    fn new(prepared: Rc<Prepared>) -> Self {
        Self {
            prepared,
            jails: VecDeque::new(),
            calls: 0,
            last_calls: 0,
            running: 0,
            peak: 0,
            last_peak: 0,
            filling: true,
            idle: 0,
            retry: RETRY_MIN,
            retry_at: None,
        }
    }

    fn wanted(&self) -> usize {
        if self.idle > IDLE_REVIEWS {
            return 0;
        }
        let is_busy = self.calls.max(self.last_calls) >= BUSY;
        // Each lives for many calls: how many run says nothing of how many will be begun.
        if self.prepared.template.listens {
            return if is_busy { EACH_BUSY } else { EACH_MIN };
        }
        let peak = self.peak.max(self.last_peak);
        if is_busy {
            // Two steps, lest it be another number after each review.
            return if 2 * peak <= EACH_BUSY { EACH_BUSY } else { EACH_MAX };
        }
        (peak + 1).clamp(EACH_MIN, EACH_MAX)
    }

    fn fill_up(&mut self) {
        if self.jails.len() <= self.wanted() / 4 {
            self.filling = true;
        } else if !self.lacks_any() {
            self.filling = false;
        }
    }

    fn lacks_any(&self) -> bool {
        self.jails.len() < self.wanted()
    }

    fn lacks_any_below(&self, bound: usize) -> bool {
        self.lacks_any() && self.jails.len() < bound
    }

    fn back_off(&mut self, now: Instant) {
        self.retry_at = Some(now + self.retry);
        self.retry = (self.retry * 2).min(RETRY_MAX);
    }

    fn review(&mut self) {
        self.idle += 1;
        self.last_calls = self.calls;
        self.calls = 0;
        self.last_peak = self.peak;
        self.peak = self.running;
    }
}

impl Launcher {
    /// A jail for this launch that is there, or at least begun.
    pub(super) fn take_ahead(&mut self, prepared: &Rc<Prepared>, launch: &Launch) -> Option<u64> {
        if launch.interpreter.is_some() {
            return None;
        }
        let key = (launch.template.clone(), launch.mode);
        let demand = self
            .ahead
            .demands
            .entry(key.clone())
            .or_insert_with(|| Demand::new(Rc::clone(prepared)));
        // By a superseded set of policies.
        if !Rc::ptr_eq(&demand.prepared, prepared) {
            return None;
        }
        self.ahead.review_at.get_or_insert_with(|| Instant::now() + REVIEW);
        demand.idle = 0;
        demand.calls = demand.calls.saturating_add(1);
        let jail = demand.jails.pop_front();
        demand.fill_up();
        let jail = jail?;
        demand.retry = RETRY_MIN;
        if self.ahead.shown(&prepared.template) != jail.shown {
            // The others are as old, or hardly younger.
            self.retire(jail.serial);
            self.retire_all(&key);
            return None;
        }
        Some(jail.serial)
    }

    /// Builds one jail, in a crowd some, where one is wanted; reviews demand when that is due. False
    /// where there was nothing to build.
    pub(super) fn build_ahead(&mut self, now: Instant, is_quiet: bool) -> bool {
        if self.ahead.review_at.is_some_and(|at| at <= now) {
            self.review_ahead(now);
        }
        let most = self.most_ahead();
        let bound = self.ahead.each_may_have(most);
        let wants = |demand: &Demand| {
            demand.lacks_any_below(bound)
                && (is_quiet || demand.filling)
                && demand.retry_at.is_none_or(|at| at <= now)
        };
        let Some((key, demand)) = self
            .ahead
            .demands
            .iter()
            .filter(|(_, demand)| wants(demand))
            .min_by_key(|(_, d)| d.jails.len())
        else {
            return false;
        };
        let (key, prepared) = (key.clone(), Rc::clone(&demand.prepared));
        let wanting = demand.wanted() - demand.jails.len();
        if self.ahead.count() >= most
            && let Some(serial) = self.ahead.give_way()
        {
            self.retire(serial);
        }
        let room = most.saturating_sub(self.ahead.count());
        let count = wanting.min(room).min(if self.is_crowded(now) { BATCH } else { 1 });
        // Before they are built: what changes meanwhile is a change.
        let shown = self.ahead.shown(&prepared.template);
        for built in self.build_for_later(&prepared, key.1, count) {
            let Some(demand) = self.ahead.demands.get_mut(&key) else { return true };
            match built {
                Ok(serial) => {
                    demand.retry_at = None;
                    demand.jails.push_back(Jail { serial, shown: shown.clone() });
                    demand.fill_up();
                }
                // A call that needs one is told why it can't be had.
                Err(_) => demand.back_off(now),
            }
        }
        true
    }

    /// How many may wait, so that calls find uids and descriptors left.
    pub(super) fn most_ahead(&self) -> usize {
        let descriptors = usize::try_from(self.facts.open_files).unwrap_or(usize::MAX);
        let by_descriptors = descriptors / (SHARE * Run::DESCRIPTORS_WAITING);
        let by_ids = if self.facts.root { self.ids.size() / SHARE } else { usize::MAX };
        ALL_MAX.min(by_ids).min(by_descriptors)
    }

    fn review_ahead(&mut self, now: Instant) {
        let mut surplus = Vec::new();
        self.ahead.demands.retain(|_, demand| {
            demand.review();
            let excess = demand.jails.len().saturating_sub(demand.wanted());
            surplus.extend(demand.jails.drain(..excess).map(|jail| jail.serial));
            demand.wanted() > 0 || demand.running > 0
        });
        self.ahead.review_at = (!self.ahead.demands.is_empty()).then_some(now + REVIEW);
        for serial in surplus {
            self.retire(serial);
        }
    }

    /// One that waited died, or could not be built to its end.
    pub(super) fn on_loss_ahead(&mut self, serial: u64, run: &Run) {
        for demand in self.ahead.demands.values_mut() {
            let before = demand.jails.len();
            demand.jails.retain(|jail| jail.serial != serial);
            if demand.jails.len() < before {
                log(&format!("{}, built ahead of need, was lost", run.name()));
                demand.back_off(Instant::now());
            }
        }
    }

    /// Policies were read anew: what changed is built anew when there is a call for it.
    pub(super) fn renew_ahead(&mut self, templates: &HashMap<TemplateId, Rc<Prepared>>) {
        let same = |key: &(TemplateId, Mode), demand: &Demand| {
            templates.get(&key.0).is_some_and(|prepared| Rc::ptr_eq(prepared, &demand.prepared))
        };
        let changed: Vec<_> =
            self.ahead.demands.extract_if(|key, demand| !same(key, demand)).collect();
        for (_, demand) in changed {
            demand.jails.iter().for_each(|jail| self.retire(jail.serial));
        }
    }

    /// All that wait are ended: the launcher ends.
    pub(super) fn give_up_ahead(&mut self) {
        self.renew_ahead(&HashMap::new());
        self.ahead.review_at = None;
    }

    fn retire_all(&mut self, key: &(TemplateId, Mode)) {
        let jails = self.ahead.demands.get_mut(key).map(|demand| std::mem::take(&mut demand.jails));
        for jail in jails.into_iter().flatten() {
            self.retire(jail.serial);
        }
    }

    fn retire(&mut self, serial: u64) {
        let now = Instant::now();
        self.with_run(serial, |run| run.stop(StopCause::Cancelled, now));
    }
}
