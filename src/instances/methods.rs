//! What an instance tells of its services' methods, by reflection.
//!
//! It is asked once for each service, beside the calls: they wait for the answer a little
//! while the first time, and never again. A service that doesn't answer is called all the same.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use crate::protocol::grpc::{
    connection::Connection,
    reflection::{self, Method},
};

/// How long calls wait for it, from when it was first asked; a quarter of a call's own time
/// where that is less.
const CALLS_WAIT: Duration = Duration::from_secs(2);
const CALLS_SHARE: u32 = 4;

/// How long it may take to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

/// When it is asked again that didn't answer, as it may have been busy.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// Connections that may be lost under the question before it waits as long.
const LOST_MAX: u32 = 1;

/// Services of one instance whose methods are remembered.
const SERVICES_MAX: usize = 64;

/// What is known of an instance's methods.
#[derive(Debug, Default)]
pub(super) struct Methods {
    services: Mutex<HashMap<String, Arc<Told>>>,
}

/// What is known of a service's methods, for all who want to know.
type Told = watch::Sender<Known>;

#[derive(Debug, Default)]
struct Known {
    /// Its answer: `None` in it where it doesn't tell.
    methods: Option<Option<Arc<[Method]>>>,
    asking: bool,
    first_asked: Option<Instant>,
    last_asked: Option<Instant>,
    lost: u32,
}

impl Methods {
    /// A method, as far as the instance tells of it in time. `time` is the call's.
    pub(super) async fn find(
        &self,
        connection: &Connection,
        service: &str,
        method: &str,
        time: Option<Duration>,
    ) -> Option<Method> {
        let told = self.of(service);
        let choose = |known: &Known| {
            let methods = known.methods.as_ref()?.as_ref()?;
            methods.iter().find(|it| it.name == method).cloned()
        };
        if told.borrow().methods.is_some() {
            return choose(&told.borrow());
        }
        if told.send_if_modified(|known| known.begin_asking(Instant::now())) {
            ask(Arc::clone(&told), connection.clone(), service.to_owned());
        }
        let mut known = told.subscribe();
        let wait = time.map_or(CALLS_WAIT, |time| CALLS_WAIT.min(time / CALLS_SHARE));
        let first_asked = known.borrow().first_asked;
        let end = first_asked.unwrap_or_else(Instant::now) + wait;
        let settled = timeout_at(end, known.wait_for(|known| !known.asking)).await;
        settled.ok()?.ok().and_then(|known| choose(&known))
    }

    fn of(&self, service: &str) -> Arc<Told> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(told) = services.get(service) {
            return Arc::clone(told);
        }
        let told = Arc::new(Told::new(Known::default()));
        if services.len() < SERVICES_MAX {
            services.insert(service.to_owned(), Arc::clone(&told));
        }
        told
    }
}

impl Known {
    /// Whether it is to be asked now, which is noted.
    fn begin_asking(&mut self, now: Instant) -> bool {
        let due = self.last_asked.is_none_or(|last| last + ASK_AGAIN <= now);
        if self.asking || self.methods.is_some() || !due {
            return false;
        }
        self.asking = true;
        self.last_asked = Some(now);
        self.first_asked.get_or_insert(now);
        true
    }

    /// The connection was closed under the question: that may have been in good order.
    fn lose(&mut self) {
        self.lost += 1;
        if self.lost <= LOST_MAX {
            (self.first_asked, self.last_asked) = (None, None);
        }
    }
}

/// Asks, whatever becomes of the call that was the first to want to know.
fn ask(told: Arc<Told>, connection: Connection, service: String) {
    tokio::spawn(async move {
        let answer = timeout(ANSWER_WAIT, reflection::methods(&connection, &service)).await;
        told.send_modify(|known| {
            known.asking = false;
            match answer {
                Ok(Ok(methods)) => known.methods = Some(methods.map(Arc::from)),
                Ok(Err(_)) => known.lose(),
                Err(_) => {}
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_asked_once_and_again_later_where_it_did_not_answer() {
        let (mut known, now) = (Known::default(), Instant::now());
        assert!(known.begin_asking(now));
        assert!(!known.begin_asking(now), "it is being asked");
        known.asking = false;
        assert!(!known.begin_asking(now + ASK_AGAIN / 2));
        assert!(known.begin_asking(now + ASK_AGAIN));
        assert_eq!(known.first_asked, Some(now), "nobody waits a second time");
        known.asking = false;
        known.methods = Some(None);
        assert!(!known.begin_asking(now + 10 * ASK_AGAIN), "it has answered");
    }

    #[test]
    fn a_lost_connection_is_forgiven_once() {
        let (mut known, now) = (Known::default(), Instant::now());
        for again in [true, false] {
            assert!(known.begin_asking(now));
            known.asking = false;
            known.lose();
            assert_eq!(known.last_asked.is_none(), again);
        }
    }
}
