//! A run that lives for many calls: the process of a gRPC service.
//!
//! It is launched like any other, and one task follows it to its end. Who has a
//! [`Service`] can connect to it, look at it, freeze and stop it; when the last one who
//! has it lets go, it is stopped. The first two are questions, and the launcher is asked no
//! more of them at once than there is room for its answers; the others are wishes, of which
//! the newest counts, and wait for no question.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncReadExt as _,
    net::unix::pipe,
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tracing::debug;

use super::{
    ExecuteError, Invocation, Outcome,
    capture::Tail,
    launcher::{Kept, Launcher, RUN_MESSAGES, Registration},
    outcome::{self, Captured},
    run::{ANSWER_WAIT, OUTPUT_WAIT, Plan, before, launch, prepare},
    stop::until,
};
use crate::{
    jail::message::{
        End, FromLauncher, FromServer, Oom, ServiceSocket, Sight, StopCause, WaitStatus,
    },
    names::RunId,
    units::Limit,
};

/// Questions to one service's task that may be waiting.
const REQUESTS_MAX: usize = 32;

/// Questions that the launcher may owe an answer to: beside these there is room for what it
/// says by itself, of the start and of the end.
const OWED_MAX: usize = RUN_MESSAGES - 4;

/// Most bytes of a service's log that are kept, whatever the policy's limit.
const LOG_MAX: u64 = 1 << 20;

/// Bytes that are read of a service's output at once, and how long that takes at least:
/// who writes without end waits at his own pipe, and doesn't keep us busy.
const READ_SIZE: usize = 64 << 10;
const READ_PAUSE: Duration = Duration::from_millis(4);

/// A service's process; clones are the same one.
#[derive(Clone, Debug)]
pub struct Service {
    run: RunId,
    requests: mpsc::Sender<Request>,
    wanted: watch::Sender<Wanted>,
    start: watch::Receiver<bool>,
    end: watch::Receiver<Option<Arc<Ended>>>,
    log: Arc<Mutex<Log>>,
}

/// How a service ended, if it was started at all.
#[derive(Clone, Debug)]
pub struct Ended(pub Result<Outcome, ExecuteError>);

#[derive(Debug)]
enum Request {
    Connect(ServiceSocket, oneshot::Sender<io::Result<OwnedFd>>),
    Look(oneshot::Sender<Option<Sight>>),
}

/// What is to become of it, by the last word of whoever has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Wanted {
    frozen: bool,
    stopped: bool,
}

impl Service {
    /// The run that it is.
    #[must_use]
    pub fn run(&self) -> RunId {
        self.run
    }

    /// Connects to it.
    ///
    /// # Errors
    /// Those of [`FromLauncher::Connected`]; `NotConnected` where it has ended.
    pub async fn connect(&self, to: ServiceSocket) -> io::Result<OwnedFd> {
        let (answer, answered) = oneshot::channel();
        let asked = self.requests.send(Request::Connect(to, answer)).await;
        match (asked, answered.await) {
            (Ok(()), Ok(connected)) => connected,
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// What there is to see of it; `None` where it has ended or wasn't started yet.
    pub async fn look(&self) -> Option<Sight> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(Request::Look(answer)).await.ok()?;
        answered.await.ok()?
    }

    /// Keeps it from using processor time, or lets it go on: where the host can. What is
    /// asked of it afterwards comes after that.
    pub fn freeze(&self, frozen: bool) {
        self.wanted
            .send_if_modified(|wanted| std::mem::replace(&mut wanted.frozen, frozen) != frozen);
    }

    /// Ends it. [`Self::ended`] tells when it is gone.
    pub fn stop(&self) {
        self.wanted.send_if_modified(|wanted| !std::mem::replace(&mut wanted.stopped, true));
    }

    /// Returns when the program was told to start, or never will be. Cancel-safe.
    pub async fn begun(&self) {
        // An error means that the service's task is over.
        let _ = self.start.clone().wait_for(|begun| *begun).await;
    }

    /// Returns when nothing of it is left, or nothing is to be learnt of it any more: how it
    /// ended. Cancel-safe.
    pub async fn ended(&self) -> Arc<Ended> {
        let mut end = self.end.clone();
        let ended = end.wait_for(Option::is_some).await;
        let known = ended.ok().and_then(|ended| (*ended).clone());
        known.unwrap_or_else(|| {
            let error = "its task ended early".to_owned();
            Arc::new(Ended(Err(ExecuteError::Internal { what: "following a service", error })))
        })
    }

    /// Whether that is so already.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.end.borrow().is_some() || self.requests.is_closed()
    }

    /// How much it has written to its standard error so far.
    #[must_use]
    pub fn logged(&self) -> u64 {
        lock(&self.log).written
    }

    /// What it has written to its standard error since then, as far as it is kept, and
    /// whether that is not all.
    #[must_use]
    pub fn log_since(&self, mark: u64) -> (Bytes, bool) {
        lock(&self.log).since(mark)
    }
}

/// The newest of what a service has written.
#[derive(Debug)]
struct Log {
    tail: Tail,
    written: u64,
}

impl Log {
    fn new(limit: Limit<u64>) -> Self {
        let limit = limit.finite().unwrap_or(LOG_MAX).min(LOG_MAX);
        Self { tail: Tail::new(Limit::At(limit)), written: 0 }
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.written += bytes.len() as u64;
        self.tail.keep(bytes);
    }

    fn since(&self, mark: u64) -> (Bytes, bool) {
        let wanted = usize::try_from(self.written.saturating_sub(mark)).unwrap_or(usize::MAX);
        let newest = self.tail.newest(wanted);
        let is_all = newest.len() == wanted;
        (newest, !is_all)
    }
}

impl Launcher {
    /// Starts a service. `kept` is what it was granted: given back when nothing of it is left.
    ///
    /// Returns at once; that it can't be started is told by [`Service::ended`].
    ///
    /// # Errors
    /// Those of making its descriptors, and of a launcher that isn't there.
    pub async fn start_service(
        &self,
        invocation: Invocation,
        kept: Kept,
    ) -> Result<Service, ExecuteError> {
        let run = invocation.run;
        let plan = Plan::of(&invocation);
        let log = Arc::new(Mutex::new(Log::new(invocation.stderr_limit)));
        let (ours, theirs) = prepare(invocation).await?;
        let registration = launch(self, &plan.launch, &theirs).await?;
        drop(theirs);
        let (requests, asked) = mpsc::channel(REQUESTS_MAX);
        let (ended, end) = watch::channel(None);
        let (begun, start) = watch::channel(false);
        let (wanted, wants) = watch::channel(Wanted::default());
        let service = Service { run, requests, wanted, start, end, log: Arc::clone(&log) };
        let follow = Follow {
            launcher: self.clone(),
            registration,
            asked,
            wants,
            frozen: false,
            stopped: false,
            connects: VecDeque::new(),
            looks: VecDeque::new(),
            started: None,
            begun,
            // Until it is started; then nothing is owed but what it is asked for.
            answer_by: Some(Instant::now() + ANSWER_WAIT),
        };
        let launcher = self.clone();
        tokio::spawn(async move {
            let mut errors = tokio::spawn(read(ours.stderr, Some(Arc::clone(&log))));
            let output = tokio::spawn(read(ours.stdout, None));
            let followed = follow.until_it_ends().await;
            // What it wrote last; what could not be killed is not waited for.
            let _ = tokio::time::timeout(OUTPUT_WAIT, &mut errors).await;
            errors.abort();
            output.abort();
            let remains = match &followed {
                Ok(Followed { end, .. }) => end.as_ref().is_some_and(|end| end.quarantined),
                Err(error) => matches!(error, ExecuteError::Stuck(_)),
            };
            if remains {
                launcher.keep_until_released(run, kept);
            } else {
                drop(kept);
            }
            ended.send_replace(Some(Arc::new(Ended(followed.map(|it| it.told(&log))))));
        });
        Ok(service)
    }
}

/// A service under way.
struct Follow {
    launcher: Launcher,
    registration: Registration,
    asked: mpsc::Receiver<Request>,
    wants: watch::Receiver<Wanted>,
    /// As the launcher was told.
    frozen: bool,
    stopped: bool,
    /// Who waits for an answer; they come in the order of the questions.
    connects: VecDeque<oneshot::Sender<io::Result<OwnedFd>>>,
    looks: VecDeque<oneshot::Sender<Option<Sight>>>,
    started: Option<SystemTime>,
    begun: watch::Sender<bool>,
    answer_by: Option<Instant>,
}

/// How following one ended: with the launcher's word, or without it once it ran.
struct Followed {
    end: Option<End>,
    started: SystemTime,
}

impl Followed {
    fn told(self, log: &Mutex<Log>) -> Outcome {
        let (stderr, stderr_truncated) = lock(log).since(0);
        let captured = Captured { stderr, stderr_truncated, ..Captured::default() };
        // Its standard output is nobody's answer, so nothing limits it.
        outcome::of(self.end.map(of_many_calls), captured, self.started, Limit::Unlimited)
    }
}

/// That a process of a service was killed for memory at some time is no cause of an end
/// that its first one came to by itself.
fn of_many_calls(end: End) -> End {
    match end.status {
        WaitStatus::Signalled(libc::SIGKILL) => end,
        _ => End { oom: Oom::None, ..end },
    }
}

impl Follow {
    async fn until_it_ends(mut self) -> Result<Followed, ExecuteError> {
        loop {
            let may_ask = !self.stopped && self.connects.len() + self.looks.len() < OWED_MAX;
            tokio::select! {
                word = self.registration.next_with_descriptor() => {
                    let Some((message, descriptor)) = word else {
                        self.registration.check_heard_out()?;
                        self.registration.alive = false;
                        let started = self.started.ok_or(ExecuteError::LauncherLost)?;
                        return Ok(Followed { end: None, started });
                    };
                    match message {
                        FromLauncher::Refused { refusal, .. } => {
                            self.registration.alive = false;
                            return Err(match self.stopped {
                                true => ExecuteError::Stopped(StopCause::Cancelled),
                                false => ExecuteError::Refused(refusal),
                            });
                        }
                        FromLauncher::Ended { end, .. } => {
                            self.registration.alive = false;
                            let started = self.started.unwrap_or_else(|| before(end.wall));
                            return Ok(Followed { end: Some(*end), started });
                        }
                        FromLauncher::Started { at, .. } => {
                            self.started = Some(at);
                            self.begun.send_replace(true);
                            if !self.stopped {
                                self.answer_by = None;
                            }
                        }
                        FromLauncher::Connected { result, .. } => {
                            self.connected(result, descriptor);
                        }
                        FromLauncher::Seen { sight, .. } => {
                            if let Some(asking) = self.looks.pop_front() {
                                let _ = asking.send(sight.map(|sight| *sight));
                            }
                        }
                        FromLauncher::Ready { .. } | FromLauncher::Released { .. } => {}
                    }
                }
                () = until(self.answer_by) => {
                    if !self.launcher.give_up(&self.registration) {
                        continue;
                    }
                    let owed = if self.started.is_some() { "end the run" } else { "start the run" };
                    return Err(ExecuteError::Stuck(owed));
                }
                // Nobody has it any more: that is a stop as well.
                changed = self.wants.changed(), if !self.stopped => {
                    if changed.is_err() || self.heed().await {
                        self.stop().await;
                    }
                }
                request = self.asked.recv(), if may_ask => match request {
                    Some(request) if !self.heed().await => self.ask(request).await,
                    _ => self.stop().await,
                },
            }
        }
    }

    /// Tells what is wanted by now, before anything that was asked later; whether that is its
    /// end.
    async fn heed(&mut self) -> bool {
        let Wanted { frozen, stopped } = *self.wants.borrow_and_update();
        if frozen != self.frozen && !stopped {
            self.frozen = frozen;
            let run = self.registration.run();
            self.tell(&FromServer::Freeze { run, frozen }).await;
        }
        stopped
    }

    /// Ends it. Who still asks learns that there is nothing to ask any more.
    async fn stop(&mut self) {
        self.stopped = true;
        self.answer_by = Some(Instant::now() + ANSWER_WAIT);
        self.registration.stop(StopCause::Cancelled).await;
        self.asked.close();
        while self.asked.try_recv().is_ok() {}
    }

    async fn ask(&mut self, request: Request) {
        let run = self.registration.run();
        match request {
            Request::Connect(to, answer) => {
                self.connects.push_back(answer);
                self.tell(&FromServer::Connect { run, to }).await;
            }
            Request::Look(answer) => {
                self.looks.push_back(answer);
                self.tell(&FromServer::Look { run }).await;
            }
        }
    }

    fn connected(&mut self, result: Result<(), i32>, socket: Option<OwnedFd>) {
        let connected = match (result, socket) {
            (Ok(()), Some(socket)) => Ok(socket),
            // Its descriptor was lost for want of room among ours.
            (Ok(()), None) => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            (Err(errno), _) => Err(io::Error::from_raw_os_error(errno)),
        };
        if let Some(asking) = self.connects.pop_front() {
            let _ = asking.send(connected);
        }
    }

    /// A launcher that can't be told has died, which ends the run as well.
    async fn tell(&self, message: &FromServer) {
        if let Err(error) = self.registration.connection.send(message, &[]).await {
            debug!(run = %self.registration.run(), %error, "the launcher could not be asked");
        }
    }
}

/// Reads what a service writes until its end, at a measured pace.
async fn read(mut pipe: pipe::Receiver, log: Option<Arc<Mutex<Log>>>) {
    let mut buffer = BytesMut::with_capacity(READ_SIZE);
    while pipe.read_buf(&mut buffer).await.is_ok_and(|read| read > 0) {
        let much = buffer.len() >= READ_SIZE / 2;
        if let Some(log) = &log {
            lock(log).keep(&buffer);
        }
        buffer.clear();
        if much {
            tokio::time::sleep(READ_PAUSE).await;
        }
    }
}

fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::execute::fake::exited;

    #[test]
    fn an_old_kill_for_memory_is_not_the_cause_of_a_later_end() {
        for (status, oom) in [
            (WaitStatus::Exited(0), Oom::None),
            (WaitStatus::Exited(3), Oom::None),
            (WaitStatus::Signalled(libc::SIGSEGV), Oom::None),
            (WaitStatus::Signalled(libc::SIGKILL), Oom::Own),
        ] {
            let end = End { status, oom: Oom::Own, ..exited(0) };
            assert_eq!(of_many_calls(end).oom, oom, "{status:?}");
        }
    }

    #[test]
    fn a_log_keeps_the_newest_and_knows_what_is_missing() {
        let mut log = Log::new(Limit::At(8));
        log.keep(b"12345");
        assert_eq!(log.since(0), ("12345".into(), false));
        let mark = log.written;
        assert_eq!(log.since(mark), ("".into(), false));
        log.keep(b"678");
        assert_eq!(log.since(mark), ("678".into(), false));
        log.keep(b"9");
        assert_eq!(log.since(mark), ("6789".into(), false));
        assert_eq!(log.since(0), ("23456789".into(), true));
        log.keep(b"abcdefghijkl");
        assert_eq!(log.since(mark), ("efghijkl".into(), true));
        assert_eq!(log.since(log.written), ("".into(), false));
    }
}
