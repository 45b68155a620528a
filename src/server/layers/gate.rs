//! Lets calls in until the service drains, and knows when the last one is done.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::watch;
use tonic::{Code, Status};

use super::{Answer, Inner, Pass, Request, error, is_ours};

/// The gate; clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    closed: AtomicBool,
    inside: watch::Sender<usize>,
}

impl Gate {
    /// Lets nobody in from now on.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::SeqCst);
    }

    /// Whether nobody is let in any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::SeqCst)
    }

    /// Returns once nobody is inside. Cancel-safe.
    pub async fn empty(&self) {
        let mut inside = self.shared.inside.subscribe();
        // The sender lives in `self`.
        let _ = inside.wait_for(|count| *count == 0).await;
    }

    /// How many calls are inside.
    #[must_use]
    pub fn inside(&self) -> usize {
        *self.shared.inside.borrow()
    }

    fn enter(&self) -> Option<Ticket> {
        // Counted first: whoever finds the gate closed and nobody inside is right.
        self.shared.inside.send_modify(|count| *count += 1);
        let ticket = Ticket(Arc::new(Inside(Arc::clone(&self.shared))));
        (!self.shared.closed.load(Ordering::SeqCst)).then_some(ticket)
    }
}

/// Held while a call is inside; clones are the same call.
#[derive(Clone, Debug)]
pub struct Ticket(#[allow(dead_code)] Arc<Inside>);

/// Counts itself out when dropped.
#[derive(Debug)]
struct Inside(Arc<Shared>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.send_modify(|count| *count -= 1);
    }
}

/// Gives each call a [`Ticket`] in its extensions, or refuses it.
impl Pass for Gate {
    fn pass(&self, mut request: Request, inner: &mut impl Inner) -> Answer {
        if !is_ours(&request) {
            return Box::pin(inner.call(request));
        }
        match self.enter() {
            Some(ticket) => {
                request.extensions_mut().insert(ticket);
                Box::pin(inner.call(request))
            }
            None => Box::pin(std::future::ready(Ok(draining().into_http()))),
        }
    }
}

fn draining() -> Status {
    let text = "the dispatcher is shutting down; try another one";
    error(Code::Unavailable, "draining", text, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_gate_lets_nobody_in_and_knows_when_it_is_empty() {
        let gate = Gate::default();
        let ticket = gate.enter().unwrap();
        let copy = ticket.clone();
        gate.close();
        assert!(gate.enter().is_none());
        assert_eq!(gate.inside(), 1);
        drop(ticket);
        let mut empty = Box::pin(gate.empty());
        assert!(tokio::time::timeout(std::time::Duration::ZERO, &mut empty).await.is_err());
        drop(copy);
        empty.await;
    }
}
