//! What an instance tells of its services' methods, by reflection.
//!
//! It is asked once for each service, beside the calls: they wait for the answer a little
//! while the first time, and never again. A service that doesn't answer is called all the same.
//! What it tells is kept as long as it lives, and counts as nobody's memory: so it is little.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use crate::protocol::grpc::{
    connection::Connection,
    reflection::{self, KEPT_MAX, Method},
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

/// Services of one instance that it is asked about.
const SERVICES_MAX: usize = 16;

/// What is known of an instance's methods.
#[derive(Debug, Default)]
pub(super) struct Methods {
    services: Mutex<HashMap<String, Arc<Told>>>,
    /// Bytes that all of it takes.
    kept: Arc<AtomicUsize>,
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
        let told = self.of(service, Instant::now)?;
        let choose = |known: &Known| {
            let methods = known.methods.as_ref()?.as_ref()?;
            methods.iter().find(|it| *it.name == *method).cloned()
        };
        if told.borrow().methods.is_some() {
            return choose(&told.borrow());
        }
        if told.send_if_modified(|known| known.begin_asking(Instant::now())) {
            let (told, kept) = (Arc::clone(&told), Arc::clone(&self.kept));
            ask(told, kept, connection.clone(), service.to_owned(), method.to_owned());
        }
        let mut known = told.subscribe();
        let wait = time.map_or(CALLS_WAIT, |time| CALLS_WAIT.min(time / CALLS_SHARE));
        let first_asked = known.borrow().first_asked;
        let end = first_asked.unwrap_or_else(Instant::now) + wait;
        let settled = timeout_at(end, known.wait_for(|known| !known.asking)).await;
        settled.ok()?.ok().and_then(|known| choose(&known))
    }

    /// Nothing of a service that there is no place for.
    fn of(&self, service: &str, now: impl FnOnce() -> Instant) -> Option<Arc<Told>> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(told) = services.get(service) {
            return Some(Arc::clone(told));
        }
        if services.len() >= SERVICES_MAX {
            let now = now();
            let mut told = services.iter();
            let (useless, _) = told.find(|(_, told)| told.borrow().is_useless(now))?;
            let useless = useless.clone();
            services.remove(&useless);
        }
        let told = Arc::new(Told::new(Known::default()));
        services.insert(service.to_owned(), Arc::clone(&told));
        Some(told)
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

    /// Whether nothing came of asking: another may take its place, though not so soon that
    /// calls of many could have it asked with each of them.
    fn is_useless(&self, now: Instant) -> bool {
        let told = self.methods.as_ref().is_some_and(Option::is_some);
        !told && !self.asking && self.last_asked.is_none_or(|last| last + ASK_AGAIN <= now)
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
fn ask(
    told: Arc<Told>,
    kept: Arc<AtomicUsize>,
    connection: Connection,
    service: String,
    method: String,
) {
    tokio::spawn(async move {
        let asked = reflection::methods(&connection, &service, &method);
        let answer = timeout(ANSWER_WAIT, asked).await;
        told.send_modify(|known| {
            known.asking = false;
            match answer {
                Ok(Ok(methods)) => known.methods = Some(methods.map(|all| fitting(&kept, all))),
                Ok(Err(_)) => known.lose(),
                Err(_) => {}
            }
        });
    });
}

/// The first of them, as many as the instance has room for beside what is kept already.
fn fitting(kept: &AtomicUsize, mut methods: Vec<Method>) -> Arc<[Method]> {
    let fits = methods.iter().position(|method| {
        let more = |kept: usize| Some(kept + method.size()).filter(|kept| *kept <= KEPT_MAX);
        kept.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_err()
    });
    methods.truncate(fits.unwrap_or(methods.len()));
    Arc::from(methods)
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
    fn all_that_is_kept_of_an_instance_has_one_bound() {
        let kept = AtomicUsize::new(0);
        let method =
            || Method { name: "M".repeat(500).into(), output: "a.R".into(), streaming: false };
        let size = method().size();
        let told: Vec<_> = (0..SERVICES_MAX)
            .map(|_| fitting(&kept, (0..KEPT_MAX / size / 2).map(|_| method()).collect()).len())
            .collect();
        assert_eq!(told[0], KEPT_MAX / size / 2);
        assert_eq!(told.iter().sum::<usize>(), KEPT_MAX / size, "{told:?}");
        assert!(kept.into_inner() <= KEPT_MAX);
    }

    #[test]
    fn no_more_services_are_asked_about_than_there_are_places() {
        let (methods, now) = (Methods::default(), Instant::now());
        let of = |name: &str, now: Instant| methods.of(name, || now);
        for number in 0..SERVICES_MAX {
            let told = of(&number.to_string(), now).unwrap();
            assert!(told.send_if_modified(|known| known.begin_asking(now)));
        }
        let later = now + ASK_AGAIN;
        assert!(of("another", later).is_none(), "all are being asked");
        of("3", now)
            .unwrap()
            .send_modify(|known| (known.asking, known.methods) = (false, Some(None)));
        assert!(of("another", now).is_none(), "not so soon");
        let another = of("another", later).expect("in place of one that doesn't tell");
        assert!(another.send_if_modified(|known| known.begin_asking(later)));
        assert!(of("3", now).is_none());
        assert!(of("4", now).is_some());
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
