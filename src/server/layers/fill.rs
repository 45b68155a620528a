//! Puts a large executable into its memfd, and hashes it, while more of it arrives:
//! that takes as long as receiving it, and is done by a thread of its own.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};

use crate::{artifact::filling::Filling, call::Sealed};

/// Smaller executables are copied and hashed in no time when they are there.
const LARGE: usize = 1 << 20;

/// Bytes that are handed over at once, some pages: few enough to stay in a processor's
/// cache on the way, and enough for few handings-over.
const PIECE: usize = 256 << 10;

/// Most pieces that wait: with some in store, the thread doesn't wait for us.
const WAITING_MAX: usize = 4;

/// How many executables may be filled in at once: each takes a descriptor. The
/// messages of others are taken in as if theirs were small.
const FILLERS_MAX: usize = 64;

/// Which executables are filled in, and the places for those that are; clones share
/// them.
#[derive(Clone, Debug)]
pub(super) struct Fillers {
    places: Arc<Semaphore>,
    /// Those that have as many bytes,
    pub(super) large: usize,
    /// once so many of them are there: a descriptor is for who has sent something.
    pub(super) piece: usize,
}

impl Default for Fillers {
    fn default() -> Self {
        Self::new(FILLERS_MAX, LARGE, PIECE)
    }
}

impl Fillers {
    /// So many places for executables of `large` bytes, filled in by pieces of
    /// `piece` bytes.
    pub(super) fn new(places: usize, large: usize, piece: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)), large, piece }
    }

    /// Places that nobody has.
    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.places.available_permits()
    }

    /// Begins an executable of so many bytes, if there is a place.
    ///
    /// # Errors
    /// Those of memfd_create(2).
    pub(super) fn begin(&self, length: usize) -> io::Result<Option<Filler>> {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else { return Ok(None) };
        let state = State {
            waiting: VecDeque::new(),
            spare: Vec::new(),
            filling: At::Rest(Filling::new()?),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), progress: Notify::new() });
        let (piece, enough) = (Vec::new(), self.piece);
        Ok(Some(Filler { shared, piece, enough, missing: length, _place: place }))
    }
}

/// One executable on its way. Dropped, it leaves nothing behind.
#[derive(Debug)]
pub(super) struct Filler {
    shared: Arc<Shared>,
    /// What is being collected.
    piece: Vec<u8>,
    /// How many bytes make a piece.
    enough: usize,
    missing: usize,
    _place: OwnedSemaphorePermit,
}

impl Filler {
    /// Takes what belongs to the executable, and gives back the rest. Waits while
    /// too much of it waits to be put in.
    pub(super) async fn put<'a>(&mut self, data: &'a [u8]) -> io::Result<&'a [u8]> {
        let (mut ours, rest) = data.split_at(data.len().min(self.missing));
        while !ours.is_empty() {
            // Of whole pages: none is written to twice.
            let (now, later) = ours.split_at(ours.len().min(self.enough - self.piece.len()));
            self.piece.extend_from_slice(now);
            self.missing -= now.len();
            ours = later;
            if self.missing == 0 || self.piece.len() == self.enough {
                self.shared.until(|state| state.waiting.len() < WAITING_MAX).await;
                self.hand_over()?;
            }
        }
        Ok(rest)
    }

    /// Bytes that haven't come yet.
    pub(super) fn missing(&self) -> usize {
        self.missing
    }

    /// The executable, of which nothing may be missing.
    pub(super) async fn finish(self) -> io::Result<(Bytes, Sealed)> {
        self.shared.until(|_| false).await;
        let at = std::mem::replace(&mut self.shared.state().filling, At::Work);
        let filling = at.rest()?;
        spawn_blocking(move || filling.finish()).await.map_err(io::Error::other)?
    }

    /// Gives the piece to the thread that puts them in, and starts it if none does.
    fn hand_over(&mut self) -> io::Result<()> {
        let mut state = self.shared.state();
        let buffer = state.spare.pop().unwrap_or_default();
        state.waiting.push_back(std::mem::replace(&mut self.piece, buffer));
        match std::mem::replace(&mut state.filling, At::Work) {
            At::Work => {}
            at => {
                let filling = at.rest()?;
                let shared = Arc::clone(&self.shared);
                spawn_blocking(move || Shift::new(&shared).work(filling));
            }
        }
        Ok(())
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // Whoever is at work need not go on.
        self.shared.state().waiting.clear();
    }
}

/// What the two sides have in common.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Told of every piece that was put in, and of the end of a shift.
    progress: Notify,
}

#[derive(Debug)]
struct State {
    /// Pieces to be put in, in this order.
    waiting: VecDeque<Vec<u8>>,
    /// Empty buffers, to be used again.
    spare: Vec<Vec<u8>>,
    filling: At,
}

/// Where the memfd is.
#[derive(Debug)]
enum At {
    /// Here: all that was handed over is in it.
    Rest(Filling),
    /// With a thread that puts pieces in.
    Work,
    /// Nowhere any more.
    Failed(io::Error),
}

impl At {
    fn rest(self) -> io::Result<Filling> {
        match self {
            Self::Rest(filling) => Ok(filling),
            Self::Failed(error) => Err(error),
            Self::Work => Err(io::Error::other("a piece is still being put in")),
        }
    }
}

impl Shared {
    /// Waits until `enough`, or until nobody is at work.
    async fn until(&self, enough: impl Fn(&State) -> bool) {
        loop {
            {
                let state = self.state();
                if enough(&state) || !matches!(state.filling, At::Work) {
                    return;
                }
            }
            self.progress.notified().await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread's turn at putting pieces in: as long as there are some. Whichever way it
/// ends, nobody waits for it any more.
struct Shift<'a> {
    shared: &'a Shared,
    /// It has said where the memfd is; from then on that is another shift's to say.
    told: bool,
}

impl<'a> Shift<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self { shared, told: false }
    }

    fn work(mut self, mut filling: Filling) {
        loop {
            let mut state = self.shared.state();
            let Some(mut piece) = state.waiting.pop_front() else {
                state.filling = At::Rest(filling);
                self.told = true;
                return;
            };
            drop(state);
            let added = filling.add(&piece);
            let mut state = self.shared.state();
            if let Err(error) = added {
                state.filling = At::Failed(error);
                self.told = true;
                return;
            }
            piece.clear();
            state.spare.push(piece);
            drop(state);
            self.shared.progress.notify_one();
        }
    }
}

impl Drop for Shift<'_> {
    fn drop(&mut self) {
        if !self.told {
            self.shared.state().filling = At::Failed(io::Error::other("it was left half done"));
        }
        self.shared.progress.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Digest;

    fn content(length: usize) -> Vec<u8> {
        (0..length).map(|index| (index % 251) as u8).collect()
    }

    #[tokio::test]
    async fn the_pieces_come_in_their_order_and_what_follows_is_given_back() {
        let fillers = Fillers::new(1, 1, 1000);
        let content = content(50_000);
        for step in [1, 999, 1000, 7001, 60_000] {
            let mut filler = fillers.begin(content.len()).unwrap().unwrap();
            let (last, first) = (content.chunks(step).count() - 1, content.chunks(step));
            for (index, piece) in first.enumerate() {
                let tail: &[u8] = if index == last { b"tail" } else { b"" };
                assert_eq!(filler.put(&[piece, tail].concat()).await.unwrap(), tail);
                assert!(filler.shared.state().waiting.len() <= WAITING_MAX);
            }
            assert_eq!(filler.missing(), 0);
            assert_eq!(filler.put(b"more").await.unwrap(), b"more");
            let (bytes, sealed) = filler.finish().await.unwrap();
            assert_eq!(bytes, content, "{step}");
            assert_eq!(sealed.digest, Digest::of(&content));
        }
    }

    #[tokio::test]
    async fn half_an_executable_leaves_nothing_behind() {
        let fillers = Fillers::new(1, 1, 10);
        let mut filler = fillers.begin(1000).unwrap().unwrap();
        assert!(fillers.begin(1000).unwrap().is_none(), "there is one place");
        filler.put(&[7; 500]).await.unwrap();
        let shared = Arc::downgrade(&filler.shared);
        drop(filler);
        while shared.strong_count() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert!(fillers.begin(1000).unwrap().is_some(), "its place is free again");
    }

    #[tokio::test]
    async fn a_failure_is_told_and_nobody_waits() {
        let mut filler = Fillers::new(1, 1, 10).begin(1000).unwrap().unwrap();
        filler.shared.state().filling = At::Failed(io::Error::other("no room"));
        let error = filler.put(&[7; 500]).await.unwrap_err();
        assert_eq!(error.to_string(), "no room");

        // A thread that ends in the middle, in whatever way.
        let filler = Fillers::new(1, 1, 10).begin(1000).unwrap().unwrap();
        filler.shared.state().filling = At::Work;
        // One that has told: the next one may be at work before it is quite gone.
        drop(Shift { shared: &filler.shared, told: true });
        assert!(matches!(filler.shared.state().filling, At::Work));
        drop(Shift::new(&filler.shared));
        let error = filler.finish().await.unwrap_err();
        assert_eq!(error.to_string(), "it was left half done");
    }
}
