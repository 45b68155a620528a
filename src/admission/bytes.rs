//! Bytes of requests and replies held at once, over all connections.
//!
//! Nobody waits here: a request that does not fit is refused at once, so that two
//! halves of messages can never block each other. A reply is there already and is
//! counted whether it fits or not: then it is requests that find no room, until
//! the clients have taken their replies.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// The bound on the bytes held.
#[derive(Clone, Debug)]
pub struct ByteBudget {
    limit: u64,
    used: Arc<AtomicU64>,
}

impl ByteBudget {
    /// A budget of `limit` bytes, all free.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self { limit, used: Arc::default() }
    }

    /// A reservation of nothing, to be grown.
    #[must_use]
    pub fn reserve(&self) -> Reservation {
        Reservation { budget: self.clone(), bytes: 0 }
    }

    /// Counts bytes that are there already.
    #[must_use]
    pub fn hold(&self, bytes: u64) -> Reservation {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        Reservation { budget: self.clone(), bytes }
    }

    /// Bytes reserved now.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The bound, in bytes.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }
}

/// Some bytes of a [`ByteBudget`]; dropping it gives them back.
#[derive(Debug)]
pub struct Reservation {
    budget: ByteBudget,
    bytes: u64,
}

impl Reservation {
    /// Reserves so many more; `false`, and unchanged, when there are not as many.
    #[must_use]
    pub fn grow(&mut self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.budget.limit);
        let taken =
            self.budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        if taken {
            self.bytes += bytes;
        }
        taken
    }

    /// Gives back what is over `bytes`.
    pub fn shrink_to(&mut self, bytes: u64) {
        let excess = self.bytes.saturating_sub(bytes);
        self.bytes -= excess;
        self.budget.used.fetch_sub(excess, Ordering::Relaxed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_more_than_the_limit_and_all_of_it_back() {
        let budget = ByteBudget::new(10);
        let (mut one, mut two) = (budget.reserve(), budget.reserve());
        assert!(one.grow(6));
        assert!(!two.grow(5));
        assert!(two.grow(4));
        assert_eq!(budget.used(), 10);
        assert!(!one.grow(u64::MAX));
        one.shrink_to(2);
        one.shrink_to(9);
        assert_eq!(budget.used(), 6);
        drop(one);
        assert!(two.grow(6));
        drop(two);
        assert_eq!(budget.used(), 0);

        let reply = budget.hold(25);
        assert!(!budget.reserve().grow(1), "no room beside it");
        drop(reply);
        assert_eq!(budget.used(), 0);
    }
}
