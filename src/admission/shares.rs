//! Memory apart from calls: of services, which live on between them, and of what is left of
//! runs. Those that wait for it are no namespace's queue; but each may be overtaken only as
//! often as a call, and then it is the eldest's turn of all that were.

use super::{Admission, AdmissionError, OVERTAKEN_MAX, State};
use crate::units::Limit;

/// Those that wait for their share at once and may not be overtaken for ever.
const QUEUED_MAX: usize = 1024;

/// Who waits for a share.
#[derive(Debug, Default)]
pub(super) struct Queue(Vec<Waiting>);

#[derive(Debug)]
struct Waiting {
    /// Of the same count as those of calls.
    id: u64,
    memory: u64,
    overtaken: u32,
}

impl Queue {
    /// The one that came first of those that were overtaken too often.
    fn eldest(&self) -> Option<u64> {
        let overdue = self.0.iter().filter(|waiting| waiting.overtaken >= OVERTAKEN_MAX);
        overdue.map(|waiting| waiting.id).min()
    }

    /// Whether memory is kept from a call for one of these; `overdue` is the call's number
    /// where it was overtaken as often.
    pub(super) fn keep_out(&self, overdue: Option<u64>) -> bool {
        self.eldest().is_some_and(|eldest| overdue.is_none_or(|call| eldest < call))
    }

    /// Memory went to another, and so much is left.
    pub(super) fn count_overtaken(&mut self, left: u64) {
        for waiting in self.0.iter_mut().filter(|waiting| waiting.memory > left) {
            waiting.overtaken = waiting.overtaken.saturating_add(1);
        }
    }
}

impl Admission {
    /// Memory for what lives on between calls, if there is room for it now. Whoever was
    /// overtaken as often as he may be comes first.
    ///
    /// # Errors
    /// [`AdmissionError::NeverFits`]; `None` for no room: see [`Self::released`].
    pub fn share(&self, memory: Limit<u64>) -> Result<Option<Share>, AdmissionError> {
        let mut state = self.state();
        let memory = state.wanted(memory)?;
        Ok(self.take(&mut state, memory, None))
    }

    /// Waits in turn for what [`Self::share`] had no room for. It has to be asked for by
    /// [`Self::share_of`] whenever memory was released.
    ///
    /// # Errors
    /// [`AdmissionError::NeverFits`]
    pub fn queue_share(&self, memory: Limit<u64>) -> Result<QueuedShare, AdmissionError> {
        let mut state = self.state();
        let memory = state.wanted(memory)?;
        let id = state.next_id;
        state.next_id += 1;
        if state.shares.0.len() < QUEUED_MAX {
            state.shares.0.push(Waiting { id, memory, overtaken: 0 });
        }
        Ok(QueuedShare { admission: self.clone(), id, memory })
    }

    /// The memory that it waits for, if it is its turn.
    #[must_use]
    pub fn share_of(&self, queued: &QueuedShare) -> Option<Share> {
        self.take(&mut self.state(), queued.memory, Some(queued.id))
    }

    fn take(&self, state: &mut State, memory: u64, id: Option<u64>) -> Option<Share> {
        let firsts = state.tenants.values().filter_map(|tenant| tenant.waiting.front());
        let calls = firsts.filter(|first| first.overtaken >= OVERTAKEN_MAX).map(|first| first.id);
        let eldest = calls.chain(state.shares.eldest()).min();
        let in_turn = eldest.is_none() || eldest == id;
        if !in_turn || state.memory.saturating_add(memory) > state.capacity.memory {
            return None;
        }
        state.memory += memory;
        // It overtakes whoever waits for memory, as a call does.
        let left = state.capacity.memory - state.memory;
        for first in state.tenants.values_mut().filter_map(|tenant| tenant.waiting.front_mut()) {
            if first.memory > left {
                first.overtaken += 1;
            }
        }
        state.shares.0.retain(|waiting| Some(waiting.id) != id);
        state.shares.count_overtaken(left);
        Some(Share { admission: self.clone(), memory })
    }
}

/// Memory that is promised apart from a call that runs: to a service, or to what is left of
/// a run in quarantine. Dropping it gives it back.
#[derive(Debug)]
pub struct Share {
    pub(super) admission: Admission,
    pub(super) memory: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.admission.give_back(|state| state.memory -= self.memory);
    }
}

/// A place among those that wait for a share.
#[derive(Debug)]
pub struct QueuedShare {
    admission: Admission,
    id: u64,
    memory: u64,
}

impl Drop for QueuedShare {
    /// Whoever was kept out for its sake may come in, and is told.
    fn drop(&mut self) {
        self.admission.give_back(|state| {
            state.shares.0.retain(|waiting| waiting.id != self.id);
        });
    }
}
