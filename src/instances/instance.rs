//! One process that serves: the connection with it, and a call on it.

use std::{
    os::unix::net::UnixStream as StdStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::UnixStream,
    sync::OnceCell,
    time::{Instant, timeout},
};

use super::{Answered, Unanswered, methods::Methods};
use crate::{
    execute::{
        service::{Ended, Service},
        stop::{StopSignal, until},
    },
    jail::{
        message::{ServiceSocket, Sight},
        plan::Control,
    },
    protocol::grpc::{
        connection::{Connection, OpenError},
        unary::{Answer, CallFailure, Unary},
    },
    units::{Limit, MilliCpus},
};

/// How long a service that has answered before may take to answer a new connection.
pub(super) const RECONNECT_WAIT: Duration = Duration::from_secs(5);

/// How long it may take to be told what is in force in it: else nothing is said of it.
const LOOK_WAIT: Duration = Duration::from_secs(2);

/// How long a process that closed its connection may take until its end is seen, and then
/// until nothing is left of it.
const END_WAIT: Duration = Duration::from_millis(250);
const GONE_WAIT: Duration = Duration::from_secs(10);

/// By how much a service may see the end of a call's time before us; a tenth of that time
/// where that is less.
const CLOCKS_APART: Duration = Duration::from_millis(50);

/// What a service answers that has seen the end of a call's time by itself: CANCELLED and
/// DEADLINE_EXCEEDED.
const GIVEN_UP: [u8; 2] = [1, 4];

/// One process.
#[derive(Debug)]
pub(super) struct Instance {
    pub(super) service: Service,
    /// Where it answered.
    pub(super) socket: ServiceSocket,
    pub(super) ready_at: Instant,
    /// Processors that it may use.
    pub(super) cpus: f64,
    /// What is in force in it: asked for while the first call is under way.
    sight: OnceCell<Option<Sight>>,
    connection: tokio::sync::Mutex<Option<Connection>>,
    /// Whether it lived when it was last looked at, and when that was begun.
    life: tokio::sync::Mutex<Option<(Instant, bool)>>,
    /// There was none to be had.
    lost: AtomicBool,
    methods: Methods,
}

/// How a call on an instance went.
#[derive(Debug)]
pub(super) enum Exchange {
    Answered(Answered),
    Unanswered(Unanswered),
    /// It gave up by itself when the call's time was over.
    GaveUp,
    /// The process ended under it.
    Ended(Arc<Ended>),
}

/// Nothing of a call reached the service.
#[derive(Debug)]
pub(super) struct Unreached(pub(super) String);

/// Why a call has no answer yet that is known to be one.
enum NoAnswer {
    Unreached(Unreached),
    Unanswered(Unanswered),
}

impl From<Unreached> for NoAnswer {
    fn from(why: Unreached) -> Self {
        Self::Unreached(why)
    }
}

impl From<Unanswered> for NoAnswer {
    fn from(why: Unanswered) -> Self {
        Self::Unanswered(why)
    }
}

impl Instance {
    pub(super) fn new(
        service: Service,
        socket: ServiceSocket,
        connection: Connection,
        cpus: Limit<MilliCpus>,
    ) -> Self {
        Self {
            service,
            socket,
            ready_at: Instant::now(),
            cpus: cpus.finite().map_or(1.0, |cpus| cpus.as_f64().min(1.0)),
            sight: OnceCell::new(),
            connection: tokio::sync::Mutex::new(Some(connection)),
            life: tokio::sync::Mutex::default(),
            lost: AtomicBool::new(false),
            methods: Methods::default(),
        }
    }

    /// What is in force in it, and its OCI runtime; nothing of one that ended before it could
    /// be looked at.
    pub(super) async fn in_force(&self) -> (Vec<Control>, Option<String>) {
        let look = self.sight.get_or_init(|| self.service.look());
        let sight = timeout(LOOK_WAIT, look).await;
        let known = sight.ok().and_then(Option::as_ref);
        known.map_or_else(Default::default, |sight| (sight.enforced.clone(), sight.runtime.clone()))
    }

    /// Makes a call, to its end or to the moment that it must be over.
    ///
    /// # Errors
    /// [`Unreached`]: it can be given to another instance.
    pub(super) async fn exchange(
        &self,
        call: &Unary,
        stop: &mut StopSignal,
    ) -> Result<Exchange, Unreached> {
        let (begun, end_by) = (Instant::now(), call.end_by);
        let called = tokio::select! {
            biased;
            called = self.call(call) => called,
            () = stop.stopped() => Err(Unanswered::Cancelled.into()),
            () = until(end_by) => Err(Unanswered::TimedOut.into()),
        };
        // It was told how long the call may take, and its clock may be the faster one.
        let time = end_by.map(|end| end.saturating_duration_since(begun));
        let apart = CLOCKS_APART.min(time.unwrap_or_default() / 10);
        let over = end_by.is_some_and(|end| end <= Instant::now() + apart);
        Ok(match called {
            Ok(Answered { status, .. }) if over && GIVEN_UP.contains(&status.code) => {
                Exchange::GaveUp
            }
            Ok(answered) => Exchange::Answered(answered),
            Err(NoAnswer::Unreached(why)) => return Err(why),
            Err(NoAnswer::Unanswered(
                why @ (Unanswered::ConnectionLost(_) | Unanswered::BadAnswer(_)),
            )) => self.perhaps_ended(why, end_by, stop).await,
            Err(NoAnswer::Unanswered(why)) => Exchange::Unanswered(why),
        })
    }

    /// What became of a call whose answer is missing or none: the process's end says more,
    /// where it comes while somebody waits for it.
    pub(super) async fn perhaps_ended(
        &self,
        why: Unanswered,
        end_by: Option<Instant>,
        stop: &mut StopSignal,
    ) -> Exchange {
        let ended = tokio::select! {
            biased;
            ended = self.end() => ended,
            () = stop.stopped() => None,
            () = until(end_by) => None,
        };
        ended.map_or(Exchange::Unanswered(why), Exchange::Ended)
    }

    /// Its end, which comes by another way than that of its connection, and may come later;
    /// nothing where it lives on, or nothing is to be learnt of it.
    async fn end(&self) -> Option<Arc<Ended>> {
        if let Ok(ended) = timeout(END_WAIT, self.service.ended()).await {
            return Some(ended);
        }
        match timeout(LOOK_WAIT, self.lives()).await {
            Ok(true) | Err(_) => None,
            // It is going: what is left of it may take a while.
            Ok(false) => timeout(GONE_WAIT, self.service.ended()).await.ok(),
        }
    }

    /// Whether it lives, by one look for all who want to know at once.
    async fn lives(&self) -> bool {
        let wanted = Instant::now();
        let mut life = self.life.lock().await;
        if let Some((begun, lives)) = *life
            && begun >= wanted
        {
            return lives;
        }
        let begun = Instant::now();
        let lives = self.service.look().await.is_some();
        *life = Some((begun, lives));
        lives
    }

    async fn call(&self, call: &Unary) -> Result<Answered, NoAnswer> {
        let mut retried = false;
        loop {
            let connection = self.connection().await?;
            let (service, method) = (&call.service, &call.method);
            let left = call.end_by.map(|end| end.saturating_duration_since(Instant::now()));
            let method = self.methods.find(&connection, service, method, left).await;
            if method.as_ref().is_some_and(|method| method.streaming) {
                return Err(Unanswered::Streaming { called: false }.into());
            }
            match connection.unary(call).await {
                Ok(Answer { status, message }) => {
                    let output = method.map(|method| method.output.into_string());
                    return Ok(Answered { status, message, output });
                }
                // It was closing the connection as we came: no harm in coming again.
                Err(CallFailure::Lost { sent: false, .. }) if !retried => {
                    retried = true;
                    self.forget(&connection).await;
                }
                Err(CallFailure::Lost { sent: false, why }) => {
                    return Err(Unreached(why).into());
                }
                Err(CallFailure::Lost { why, .. }) => {
                    return Err(Unanswered::ConnectionLost(why).into());
                }
                Err(CallFailure::TooLarge(_)) => return Err(Unanswered::TooLarge.into()),
                Err(CallFailure::Streaming) => {
                    return Err(Unanswered::Streaming { called: true }.into());
                }
                Err(failure @ (CallFailure::Reset(_) | CallFailure::Malformed(_))) => {
                    return Err(Unanswered::BadAnswer(failure.to_string()).into());
                }
            }
        }
    }

    /// The connection, made anew where it was closed. Where none can be made the instance is
    /// lost, for those too that wait here.
    async fn connection(&self) -> Result<Connection, Unreached> {
        let mut kept = self.connection.lock().await;
        if let Some(connection) = kept.as_ref().filter(|connection| !connection.is_closed()) {
            return Ok(connection.clone());
        }
        *kept = None;
        let silent = || "no connection with the service: it doesn't answer".to_owned();
        if self.is_lost() {
            return Err(Unreached(silent()));
        }
        let made = timeout(RECONNECT_WAIT, self.connect()).await;
        let made = made.unwrap_or_else(|_| Err(silent()));
        let connection = made.map_err(|why| {
            self.lost.store(true, Ordering::Relaxed);
            Unreached(why)
        })?;
        *kept = Some(connection.clone());
        Ok(connection)
    }

    /// Makes all further calls on this connection.
    pub(super) async fn adopt(&self, connection: Connection) {
        *self.connection.lock().await = Some(connection);
    }

    /// Makes no more calls on a connection: those that are under way on it go on.
    async fn forget(&self, connection: &Connection) {
        let mut kept = self.connection.lock().await;
        if kept.as_ref().is_some_and(|kept| kept.is_same(connection)) {
            *kept = None;
        }
    }

    /// Whether it lives and can't be reached.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// A connection of its own, answered.
    pub(super) async fn connect(&self) -> Result<Connection, String> {
        let opened = open(&self.service, self.socket).await;
        opened.map_err(|error| format!("no connection with the service: {error}"))
    }
}

/// Why a socket of a service's has no answered connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoConnection {
    #[error("{0}")]
    Socket(std::io::Error),
    #[error("{0}")]
    Open(OpenError),
}

/// Connects to a service, and waits for its answer.
pub(super) async fn open(
    service: &Service,
    socket: ServiceSocket,
) -> Result<Connection, NoConnection> {
    let connected = service.connect(socket).await.map_err(NoConnection::Socket)?;
    let stream = StdStream::from(connected);
    let stream = stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .map_err(NoConnection::Socket)?;
    Connection::open(stream).await.map_err(NoConnection::Open)
}
