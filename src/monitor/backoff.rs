//! How long to wait before a dead process is started again.

use std::time::Duration;

/// The first wait; it doubles with each early death.
const FIRST: Duration = Duration::from_millis(10);

/// The longest wait.
const LONGEST: Duration = Duration::from_secs(5);

/// A process that lived this long makes its deaths before forgotten.
const FORGIVEN_AFTER: Duration = Duration::from_secs(60);

/// The waits of one process.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    /// With no death so far.
    #[must_use]
    pub const fn new() -> Self {
        Self { next: FIRST }
    }

    /// The wait after a death, of a process that had been alive for `lived`.
    pub fn after(&mut self, lived: Duration) -> Duration {
        if lived >= FORGIVEN_AFTER {
            self.next = FIRST;
        }
        let wait = self.next;
        self.next = LONGEST.min(wait * 2);
        wait
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound() {
        let mut backoff = Backoff::new();
        let waits: Vec<_> =
            (0..12).map(|_| backoff.after(Duration::from_secs(1)).as_millis()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5000, 5000, 5000]);
    }

    #[test]
    fn a_long_life_is_a_fresh_start() {
        let mut backoff = Backoff::new();
        for _ in 0..10 {
            backoff.after(Duration::ZERO);
        }
        assert_eq!(backoff.after(FORGIVEN_AFTER - Duration::from_millis(1)), LONGEST);
        assert_eq!(backoff.after(FORGIVEN_AFTER), FIRST);
        assert_eq!(backoff.after(Duration::ZERO), FIRST * 2);
    }
}
