//! A call's share of an instance, from when it got it until it lets go.

use std::sync::Arc;

use super::{Shared, group::Group, instance::Instance};

/// How a call let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// The service answered it.
    Answered,
    /// It is over for both sides.
    Done,
    /// The service can't be reached any more.
    Lost,
    /// It is over for us: its time was.
    Overrun,
    /// It is over for us: nobody waited for it any more.
    Cancelled,
}

/// One call's share of an instance. Dropping it cancels the call.
#[derive(Debug)]
pub(super) struct Lease {
    group: Arc<Group>,
    shared: Arc<Shared>,
    instance: Arc<Instance>,
    how: How,
}

impl Lease {
    pub(super) fn new(group: &Arc<Group>, shared: &Arc<Shared>, instance: &Arc<Instance>) -> Self {
        Self {
            group: Arc::clone(group),
            shared: Arc::clone(shared),
            instance: Arc::clone(instance),
            how: How::Cancelled,
        }
    }

    pub(super) fn instance(&self) -> &Arc<Instance> {
        &self.instance
    }

    /// The service answered the call.
    pub(super) fn answered(mut self) {
        self.how = How::Answered;
    }

    /// The call is over, for the service too.
    pub(super) fn done(mut self) {
        self.how = How::Done;
    }

    /// The service can't be reached any more: it gets no more calls.
    pub(super) fn lost(mut self) {
        self.how = How::Lost;
    }

    /// The call's time was over: whether it is over for the service is to be seen.
    pub(super) fn overrun(mut self) {
        self.how = How::Overrun;
    }

    /// Nobody waited for the call any more. The same.
    pub(super) fn cancelled(self) {}
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.group.release(&self.shared, &self.instance, self.how);
    }
}
