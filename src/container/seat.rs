//! Where a run can be found by its id while its program runs: to be looked at, and to be
//! connected to.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::io::Errno;

use super::{make::Container, service::Listening};
use crate::jail::{
    message::{ServiceSocket, Sight},
    plan::{Control, Template},
};

/// The place of one run, empty before its program is started and after its end.
pub struct Seat {
    template: Arc<Template>,
    taken: Mutex<Option<Arc<Running>>>,
}

struct Running {
    container: Arc<Container>,
    listening: Option<Listening>,
}

impl Seat {
    /// One for a run of this policy.
    #[must_use]
    pub fn new(template: Arc<Template>) -> Self {
        Self { template, taken: Mutex::default() }
    }

    /// The program was started in this container, and everything about it is verified.
    pub fn take(&self, container: &Arc<Container>, listening: Option<Listening>) {
        let container = Arc::clone(container);
        *self.lock() = Some(Arc::new(Running { container, listening }));
    }

    /// It has ended, or is about to be.
    pub fn leave(&self) {
        *self.lock() = None;
    }

    /// What there is to see. Without `timeout`, which may be the server's to keep, and
    /// `cpu_time`.
    #[must_use]
    pub fn sight(&self) -> Option<Sight> {
        let running = self.running()?;
        let container = &running.container;
        let usage = container.usage();
        let mut enforced = container.enforced.clone();
        enforced.retain(|control| !matches!(control, Control::CpuTime | Control::Timeout));
        Some(Sight {
            enforced,
            runtime: runtime(&self.template),
            user: usage.user,
            system: usage.system,
            memory_peak: usage.memory_peak,
            pids_peak: usage.pids_peak,
        })
    }

    /// A connection to the service that it is.
    ///
    /// # Errors
    /// EINVAL where it is none, ENOENT where it isn't started, and those of
    /// [`Service::connect`](super::service::Service::connect).
    pub fn connect(&self, to: ServiceSocket) -> Result<OwnedFd, Errno> {
        if !self.template.listens {
            return Err(Errno::INVAL);
        }
        let running = self.running().ok_or(Errno::NOENT)?;
        let (Some(service), Some(listening)) = (&running.container.service, &running.listening)
        else {
            return Err(Errno::NOENT);
        };
        service.connect(to, listening)
    }

    fn running(&self) -> Option<Arc<Running>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Running>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The OCI runtime that a policy names.
#[must_use]
pub fn runtime(template: &Template) -> Option<String> {
    Some(template.container.runtime.clone()).filter(|name| !name.is_empty())
}
