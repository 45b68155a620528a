//! A token bucket: so many calls per second, as many at once as fall due in one
//! second (at least one).

use std::time::Duration;

use tokio::time::Instant;

use crate::units::Rate;

#[derive(Debug)]
pub(super) struct Bucket {
    tokens: f64,
    capacity: f64,
    rate: f64,
    filled: Instant,
}

impl Bucket {
    pub(super) fn full(rate: Rate, now: Instant) -> Self {
        let capacity = rate.0.max(1.0);
        Self { tokens: capacity, capacity, rate: rate.0, filled: now }
    }

    /// Adds what fell due; a changed rate holds from now on.
    pub(super) fn refill(&mut self, rate: Rate, now: Instant) {
        let due = now.saturating_duration_since(self.filled).as_secs_f64() * self.rate;
        self.capacity = rate.0.max(1.0);
        self.tokens = (self.tokens + due).min(self.capacity);
        self.rate = rate.0;
        self.filled = now;
    }

    /// How long until there is a token; `None` if there is one.
    pub(super) fn wait(&self) -> Option<Duration> {
        // Sums of fractions fall a hair short of the whole that they mean.
        let lacking = 1.0 - self.tokens - 1e-9;
        let wait = || Duration::try_from_secs_f64(lacking / self.rate).unwrap_or(Duration::MAX);
        (lacking > 0.0).then(wait)
    }

    pub(super) fn take(&mut self) {
        self.tokens = (self.tokens - 1.0).max(0.0);
    }

    pub(super) fn is_full(&mut self, now: Instant) -> bool {
        self.refill(Rate(self.rate), now);
        self.tokens >= self.capacity
    }
}
