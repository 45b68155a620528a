//! The connections there are: how many, whose, and which of them may go.
//!
//! When all places are taken, a newcomer gets the place of one that has no call
//! under way: else whoever opens enough connections and then says nothing would
//! keep everybody else out. The one that has been quiet for longest goes, and
//! among several peers one of whoever holds the most.
//!
//! Who doesn't take the answer to a call loses the connection as well: the answer
//! takes up memory until it is sent.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

/// How long a connection keeps its place without a call: time enough to send one.
const QUIET_MIN: Duration = Duration::from_secs(1);

/// How long an answer may take to be sent, and how much more for each byte of it.
const ANSWER_TIME: Duration = Duration::from_secs(30);
const ANSWER_RATE: u64 = 16 << 10;

/// How often answers that were not taken are looked for.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// An address.
    Tcp(Option<SocketAddr>),
    /// A local user, by number.
    Unix(Option<u32>),
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(Some(address)) => write!(f, "{address}"),
            Self::Unix(Some(uid)) => write!(f, "uid:{uid}"),
            Self::Tcp(None) | Self::Unix(None) => f.write_str("unknown"),
        }
    }
}

/// Peers that count as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Origin {
    Host(IpAddr),
    User(u32),
    Unknown,
}

impl Peer {
    fn origin(self) -> Origin {
        match self {
            Self::Tcp(Some(address)) => Origin::Host(address.ip().to_canonical()),
            Self::Unix(Some(uid)) => Origin::User(uid),
            Self::Tcp(None) | Self::Unix(None) => Origin::Unknown,
        }
    }
}

/// All connections of some listeners; clones are the same ones.
#[derive(Clone, Debug)]
pub struct Connections {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    most: usize,
    table: Mutex<Table>,
    displaced: AtomicU64,
    refused: AtomicU64,
    stalled: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    entries: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    caller: Caller,
    /// Dropped to have the connection closed.
    _open: oneshot::Sender<()>,
}

/// Counts of connections, for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Open now.
    pub open: usize,
    /// Closed to make room for others.
    pub displaced: u64,
    /// Closed at once for want of room.
    pub refused: u64,
    /// Closed because an answer was not taken.
    pub stalled: u64,
}

impl Connections {
    /// None yet, and never more than `most`.
    #[must_use]
    pub fn new(most: usize) -> Self {
        let shared = Shared {
            most,
            table: Mutex::default(),
            displaced: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            stalled: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A place for a new connection, if need be that of a quiet one.
    #[must_use]
    pub fn admit(&self, peer: Peer) -> Option<Place> {
        let mut table = self.table();
        if table.entries.len() >= self.shared.most {
            let Some(id) = table.to_displace(Instant::now()) else {
                self.shared.refused.fetch_add(1, Ordering::Relaxed);
                return None;
            };
            table.entries.remove(&id);
            self.shared.displaced.fetch_add(1, Ordering::Relaxed);
        }
        let id = table.next;
        table.next += 1;
        let (open, closing) = oneshot::channel();
        let caller = Caller { peer, activity: Arc::new(Mutex::new(Activity::new())) };
        table.entries.insert(id, Entry { caller: caller.clone(), _open: open });
        Some(Place { connections: self.clone(), id, caller, closing })
    }

    /// How many there are, and were.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            open: self.table().entries.len(),
            displaced: self.shared.displaced.load(Ordering::Relaxed),
            refused: self.shared.refused.load(Ordering::Relaxed),
            stalled: self.shared.stalled.load(Ordering::Relaxed),
        }
    }

    /// Closes those on which an answer has not been taken in its time.
    pub fn close_stalled(&self) {
        let now = Instant::now();
        let mut table = self.table();
        let before = table.entries.len();
        table.entries.retain(|_, entry| !entry.caller.is_stalled(now));
        let closed = (before - table.entries.len()) as u64;
        self.shared.stalled.fetch_add(closed, Ordering::Relaxed);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn to_displace(&self, now: Instant) -> Option<u64> {
        let mut held: HashMap<Origin, usize> = HashMap::new();
        for entry in self.entries.values() {
            *held.entry(entry.caller.peer.origin()).or_default() += 1;
        }
        let quiet = self.entries.iter().filter_map(|(id, entry)| {
            let quiet = entry.caller.quiet(now).filter(|quiet| *quiet >= QUIET_MIN)?;
            Some((held[&entry.caller.peer.origin()], quiet, *id))
        });
        quiet.max().map(|(_, _, id)| id)
    }
}

/// A connection's place; dropping it gives it back.
#[derive(Debug)]
pub struct Place {
    connections: Connections,
    id: u64,
    /// Who has it.
    pub caller: Caller,
    /// Ends when the place goes to another.
    pub closing: oneshot::Receiver<()>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.table().entries.remove(&self.id);
    }
}

/// A connection, as its requests know it.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who is at the other end.
    pub peer: Peer,
    activity: Arc<Mutex<Activity>>,
}

#[derive(Debug)]
struct Activity {
    calls: usize,
    /// When it last began or ended a call.
    since: Instant,
    /// By when the answers that are being sent must have been.
    answers: HashMap<u64, Instant>,
    next: u64,
}

impl Activity {
    fn new() -> Self {
        Self { calls: 0, since: Instant::now(), answers: HashMap::new(), next: 0 }
    }
}

impl Caller {
    /// Counts a call on this connection for as long as the answer is held.
    #[must_use]
    pub fn begin(&self) -> UnderWay {
        let mut activity = self.activity();
        activity.calls += 1;
        activity.since = Instant::now();
        activity.next += 1;
        UnderWay { caller: self.clone(), id: activity.next }
    }

    fn is_stalled(&self, now: Instant) -> bool {
        self.activity().answers.values().any(|due| *due < now)
    }

    /// For how long nothing has been under way.
    fn quiet(&self, now: Instant) -> Option<Duration> {
        let activity = self.activity();
        (activity.calls == 0).then(|| now.saturating_duration_since(activity.since))
    }

    fn activity(&self) -> MutexGuard<'_, Activity> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held while a call is under way.
#[derive(Debug)]
pub struct UnderWay {
    caller: Caller,
    id: u64,
}

impl UnderWay {
    /// So many more bytes of its answer are on their way: from now on its time runs.
    pub fn answering(&self, bytes: usize) {
        let time = ANSWER_TIME + Duration::from_secs(bytes as u64 / ANSWER_RATE);
        self.caller.activity().answers.insert(self.id, Instant::now() + time);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut activity = self.caller.activity();
        activity.calls -= 1;
        activity.answers.remove(&self.id);
        activity.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{sync::oneshot::error::TryRecvError, time::advance};

    const LATER: Duration = Duration::from_secs(2);

    fn host(number: u8) -> Peer {
        Peer::Tcp(Some(SocketAddr::from(([192, 0, 2, number], 4000))))
    }

    fn is_closed(place: &mut Place) -> bool {
        place.closing.try_recv() == Err(TryRecvError::Closed)
    }

    #[tokio::test(start_paused = true)]
    async fn the_quietest_makes_room_but_not_at_once() {
        let connections = Connections::new(2);
        let mut first = connections.admit(host(1)).unwrap();
        advance(LATER).await;
        let mut second = connections.admit(host(1)).unwrap();
        let third = connections.admit(host(1)).unwrap();
        assert!(is_closed(&mut first) && !is_closed(&mut second));
        assert!(connections.admit(host(1)).is_none(), "both are fresh");
        assert_eq!(connections.counts(), Counts { open: 2, displaced: 1, refused: 1, stalled: 0 });
        // Its place is another's now: leaving must not take that one's.
        drop(first);
        assert_eq!(connections.counts().open, 2);
        drop((second, third));
        assert_eq!(connections.counts().open, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_a_call_under_way_stays() {
        let connections = Connections::new(2);
        let mut busy = connections.admit(host(1)).unwrap();
        let calls = (busy.caller.begin(), busy.caller.begin());
        let mut quiet = connections.admit(host(2)).unwrap();
        advance(LATER).await;
        let mut next = connections.admit(host(2)).unwrap();
        assert!(is_closed(&mut quiet) && !is_closed(&mut busy));
        let done = next.caller.begin();
        drop(calls.0);
        advance(LATER).await;
        assert!(connections.admit(host(3)).is_none(), "a second call is still under way");
        drop((calls.1, done));
        advance(LATER).await;
        let _last = connections.admit(host(3)).unwrap();
        assert!(is_closed(&mut busy) ^ is_closed(&mut next));
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_take_an_answer_is_closed() {
        let connections = Connections::new(2);
        let mut slow = connections.admit(host(1)).unwrap();
        let mut fine = connections.admit(host(1)).unwrap();
        let (call, taken) = (slow.caller.begin(), fine.caller.begin());
        // However long the call itself takes.
        advance(ANSWER_TIME * 10).await;
        call.answering(0);
        taken.answering(0);
        advance(ANSWER_TIME / 2).await;
        // Two minutes' worth of bytes.
        call.answering(120 * ANSWER_RATE as usize);
        drop(taken);
        advance(ANSWER_TIME * 4).await;
        connections.close_stalled();
        assert!(!is_closed(&mut slow), "it has more time for more bytes");
        advance(ANSWER_TIME * 2).await;
        connections.close_stalled();
        assert!(is_closed(&mut slow) && !is_closed(&mut fine));
        assert_eq!(connections.counts().stalled, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_holds_most_loses_first() {
        let connections = Connections::new(4);
        let mut alone = connections.admit(host(1)).unwrap();
        let user = connections.admit(Peer::Unix(Some(1000))).unwrap();
        advance(LATER).await;
        let mut crowd = [connections.admit(host(9)).unwrap(), connections.admit(host(9)).unwrap()];
        advance(LATER).await;
        let _newcomer = connections.admit(host(3)).unwrap();
        assert!(!is_closed(&mut alone));
        assert_eq!(crowd.iter_mut().filter_map(|place| is_closed(place).then_some(())).count(), 1);
        drop(user);
    }
}
