//! Whose turn it is to have a container made.
//!
//! Docker makes few at a time, so calls wait for each other, and the first comes first. Who
//! goes away before its turn gives its place up. What Docker is at already can't be called
//! back: it goes on for nobody, and as long as it does, later calls of its namespace wait
//! outside the queue. Otherwise one that calls and goes away in a loop had more made than
//! its `[admission]` lets it, and kept all others waiting.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit};

/// Containers that are being made at once: Docker does each in one go, and more at a time
/// only makes all of them slow.
const AT_ONCE: usize = 4;

/// The queue.
#[derive(Debug)]
pub struct Queue {
    turns: Arc<Semaphore>,
    stocking: Semaphore,
    /// How many are being made for nobody, by namespace. Each has a turn, so they are few.
    forsaken: Mutex<HashMap<String, usize>>,
    /// That there are fewer of them.
    fewer: Notify,
}

/// Leave to have one made, until it is dropped.
#[derive(Debug)]
pub struct Turn(#[expect(dead_code, reason = "held, not looked at")] OwnedSemaphorePermit);

/// One that is being made for nobody.
#[derive(Debug)]
pub struct Forsaken {
    queue: Arc<Queue>,
    namespace: String,
}

impl Queue {
    /// One in which nobody waits.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            turns: Arc::new(Semaphore::new(AT_ONCE)),
            stocking: Semaphore::new(1),
            forsaken: Mutex::default(),
            fewer: Notify::new(),
        })
    }

    /// A turn; none at the end. Cancel-safe: the place in the queue is given up.
    pub async fn turn(&self, namespace: &str) -> Option<Turn> {
        loop {
            let fewer = self.fewer.notified();
            // From here on it hears of any.
            let mut fewer = std::pin::pin!(fewer);
            fewer.as_mut().enable();
            if !self.lock().contains_key(namespace) {
                break;
            }
            fewer.await;
        }
        Arc::clone(&self.turns).acquire_owned().await.ok().map(Turn)
    }

    /// A turn at making one that nobody waits for: one at a time. None at the end.
    pub async fn stock_turn(&self) -> Option<SemaphorePermit<'_>> {
        self.stocking.acquire().await.ok()
    }

    /// Notes that one is being made for nobody, until what is returned is dropped.
    #[must_use]
    pub fn forsake(self: &Arc<Self>, namespace: &str) -> Forsaken {
        *self.lock().entry(namespace.to_owned()).or_default() += 1;
        Forsaken { queue: Arc::clone(self), namespace: namespace.to_owned() }
    }

    /// Gives no more turns.
    pub fn close(&self) {
        self.stocking.close();
        self.turns.close();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.forsaken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Forsaken {
    fn drop(&mut self) {
        let mut forsaken = self.queue.lock();
        if let Some(count) = forsaken.get_mut(&self.namespace) {
            *count -= 1;
            if *count == 0 {
                forsaken.remove(&self.namespace);
            }
        }
        self.queue.fewer.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::{Pin, pin},
        task::{Context, Poll, Waker},
    };

    use super::*;

    fn look<F: Future>(at: Pin<&mut F>) -> Poll<F::Output> {
        at.poll(&mut Context::from_waker(Waker::noop()))
    }

    async fn full(queue: &Queue) -> Vec<Turn> {
        let mut turns = Vec::new();
        for _ in 0..AT_ONCE {
            turns.push(queue.turn("a").await.unwrap());
        }
        turns
    }

    #[tokio::test]
    async fn who_goes_away_gives_up_his_place() {
        let queue = Queue::new();
        let mut turns = full(&queue).await;
        let mut last = Box::pin(queue.turn("b"));
        {
            let mut before: Vec<_> = (0..200).map(|_| Box::pin(queue.turn("a"))).collect();
            for one in &mut before {
                assert!(look(one.as_mut()).is_pending());
            }
            assert!(look(last.as_mut()).is_pending());
        }
        turns.pop();
        assert!(matches!(look(last.as_mut()), Poll::Ready(Some(_))), "200 are before it still");
    }

    #[tokio::test]
    async fn what_is_made_for_nobody_keeps_its_own_namespace_waiting() {
        let queue = Queue::new();
        let (one, two) = (queue.forsake("a"), queue.forsake("a"));
        let mut own = pin!(queue.turn("a"));
        assert!(look(own.as_mut()).is_pending());
        assert!(queue.turn("b").await.is_some(), "others don't wait for it");
        drop(one);
        assert!(look(own.as_mut()).is_pending(), "there is another");
        drop(two);
        assert!(matches!(look(own.as_mut()), Poll::Ready(Some(_))));
        assert!(queue.lock().is_empty());
    }

    #[tokio::test]
    async fn at_the_end_there_are_no_turns() {
        let queue = Queue::new();
        let turns = full(&queue).await;
        let mut waiting = pin!(queue.turn("a"));
        assert!(look(waiting.as_mut()).is_pending());
        queue.close();
        assert!(matches!(look(waiting.as_mut()), Poll::Ready(None)));
        assert!(queue.stock_turn().await.is_none());
        drop(turns);
    }
}
