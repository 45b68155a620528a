//! Telling a call that nobody waits for it any more.

use tokio::{sync::watch, time::Instant};

/// Stops the calls that hold a [`StopSignal`] made from it: when told to, or
/// when it is dropped without [`StopHandle::disarm`].
#[derive(Debug)]
pub struct StopHandle {
    sender: watch::Sender<bool>,
    armed: bool,
}

impl StopHandle {
    /// A handle that has stopped nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self { sender: watch::Sender::new(false), armed: true }
    }

    /// Stops what listens, now and for good.
    pub fn stop(&self) {
        self.sender.send_replace(true);
    }

    /// Lets go without stopping: the answer is there.
    pub fn disarm(mut self) {
        self.armed = false;
    }
}

impl Default for StopHandle {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for StopHandle {
    fn drop(&mut self) {
        if self.armed {
            self.stop();
        }
    }
}

/// Heard by a call: its caller went away, or the whole service is stopping.
#[derive(Clone, Debug)]
pub struct StopSignal {
    caller: watch::Receiver<bool>,
    service: watch::Receiver<bool>,
}

impl StopSignal {
    /// Stops when either handle does.
    #[must_use]
    pub fn new(caller: &StopHandle, service: &StopHandle) -> Self {
        Self { caller: caller.sender.subscribe(), service: service.sender.subscribe() }
    }

    /// Stops when `handle` does.
    #[must_use]
    pub fn of(handle: &StopHandle) -> Self {
        Self::new(handle, handle)
    }

    /// Returns once the call is to be stopped. Cancel-safe.
    pub async fn stopped(&mut self) {
        tokio::select! {
            () = heard(&mut self.caller) => {}
            () = heard(&mut self.service) => {}
        }
    }

    /// Whether it was stopped as the whole service is stopping, and not for its caller.
    #[must_use]
    pub fn is_stopped_by_service(&self) -> bool {
        *self.service.borrow() && !*self.caller.borrow()
    }

    /// Whether it was stopped already.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        *self.caller.borrow() || *self.service.borrow()
    }
}

/// Pends for ever once the handle was disarmed.
async fn heard(receiver: &mut watch::Receiver<bool>) {
    if receiver.wait_for(|stopped| *stopped).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits until then, or for ever. Cancel-safe.
pub async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_now::now;

    mod futures_now {
        use std::{
            future::Future,
            pin::pin,
            task::{Context, Poll, Waker},
        };

        /// Whether a future is ready at its first poll.
        pub fn now(future: impl Future) -> bool {
            let mut context = Context::from_waker(Waker::noop());
            matches!(pin!(future).poll(&mut context), Poll::Ready(_))
        }
    }

    #[test]
    fn either_handle_stops() {
        let (caller, service) = (StopHandle::new(), StopHandle::new());
        let mut signal = StopSignal::new(&caller, &service);
        assert!(!now(signal.stopped()));
        service.stop();
        assert!(now(signal.stopped()));
        assert!(signal.is_stopped() && signal.is_stopped_by_service());
        caller.stop();
        assert!(signal.is_stopped() && !signal.is_stopped_by_service());
    }

    #[test]
    fn dropping_stops_and_disarming_does_not() {
        let service = StopHandle::new();
        let caller = StopHandle::new();
        let mut signal = StopSignal::new(&caller, &service);
        caller.disarm();
        assert!(!now(signal.stopped()));

        let caller = StopHandle::new();
        let mut signal = StopSignal::new(&caller, &service);
        drop(caller);
        assert!(now(signal.stopped()));
    }
}
