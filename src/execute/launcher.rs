//! The server's side of its conversation with the launcher.
//!
//! One connection at a time; one task receives on it and hands each message to
//! the run it is about. When the launcher dies its runs fail, and the next
//! connection, from the launcher that the monitor starts instead, takes over.

use std::{
    collections::HashMap,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info, warn};

use super::{ExecuteError, Invocation, Outcome, OutputSink, run, stop::StopSignal};
use crate::{
    jail::message::{FromLauncher, FromServer, MESSAGE_MAX, StopCause},
    names::{Digest, RunId},
    packets::Packets,
};

/// How long a call waits for a launcher that is being started again.
pub const RESTART_WAIT: Duration = Duration::from_secs(2);

/// How long the server waits for a launcher to come back by itself, before it
/// asks the monitor to join them again.
const RECONNECT_WAIT: Duration = Duration::from_secs(1);

/// How long a call waits for the server and the launcher to have the same policies.
const POLICY_WAIT: Duration = Duration::from_secs(1);

/// Messages about one run that may be waiting: of its start and end, and of a service
/// what was asked about it.
pub(super) const RUN_MESSAGES: usize = 16;

/// A handle on whichever launcher is there; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Launcher {
    state: Arc<watch::Sender<State>>,
    aside: Arc<Mutex<HashMap<RunId, Option<Kept>>>>,
}

/// What a quarantined run keeps until it is gone; dropping gives it back.
pub type Kept = Box<dyn std::any::Any + Send>;

#[derive(Clone, Debug, Default)]
struct State {
    /// Set once its launcher said that it is ready.
    connection: Option<Arc<Connection>>,
    /// The newest policies that launcher holds.
    policy_set: Option<Digest>,
    /// There has been one before.
    was_ready: bool,
}

impl Launcher {
    /// A handle with no launcher behind it yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes up a fresh socketpair with a launcher. It is used from the moment
    /// the launcher says it is ready, in place of any earlier one.
    ///
    /// # Errors
    /// Those of fcntl(2) and of registering the socket with the runtime.
    pub fn attach(&self, socket: OwnedFd) -> io::Result<()> {
        let socket = Packets::new(socket)?;
        let connection = Arc::new(Connection { socket, runs: Mutex::new(Some(HashMap::new())) });
        let launcher = self.clone();
        tokio::spawn(async move {
            let ended = launcher.receive(&connection).await;
            match ended {
                Ok(()) => info!("the launcher closed its connection"),
                Err(error) => error!(%error, "the connection with the launcher failed"),
            }
            launcher.forget(&connection);
            // Drops the senders: each waiting run learns that it is lost.
            connection.close();
            // The next launcher sweeps what this one left.
            launcher.aside().clear();
        });
        Ok(())
    }

    /// Returns once a launcher is connected and ready. Cancel-safe.
    pub async fn ready(&self) {
        let mut state = self.state.subscribe();
        // The sender lives in `self`.
        let _ = state.wait_for(|state| state.connection.is_some()).await;
    }

    /// Returns when there was a launcher and has been none for
    /// [`RECONNECT_WAIT`], counted from now at the earliest. Cancel-safe.
    pub async fn lost(&self) {
        let mut state = self.state.subscribe();
        loop {
            // The sender lives in `self`.
            let _ = state.wait_for(|state| state.connection.is_none() && state.was_ready).await;
            let back = state.wait_for(|state| state.connection.is_some());
            if tokio::time::timeout(RECONNECT_WAIT, back).await.is_err() {
                return;
            }
        }
    }

    /// Waits a moment until the launcher's newest policies are those that
    /// `current` names; returns either way.
    pub async fn await_policies(&self, current: impl Fn() -> Digest) {
        let mut state = self.state.subscribe();
        let agree = state.wait_for(|state| state.policy_set == Some(current()));
        let _ = tokio::time::timeout(POLICY_WAIT, agree).await;
    }

    /// Has those who wait for policies look again: the server took up others.
    pub fn policies_changed(&self) {
        self.state.send_modify(|_| {});
    }

    /// Keeps something for a quarantined run until the launcher says that what
    /// was left of it is gone, which may already be so.
    pub fn keep_until_released(&self, run: RunId, kept: Kept) {
        if let Some(place) = self.aside().get_mut(&run) {
            *place = Some(kept);
        }
    }

    /// How many ended runs can't be removed yet.
    #[must_use]
    pub fn quarantined(&self) -> usize {
        self.aside().len()
    }

    /// Has [`Self::keep_until_released`] keep what a run was granted of which
    /// nothing is heard; `false` where there is word of it after all.
    pub(super) fn give_up(&self, registration: &Registration) -> bool {
        // The receiving task delivers before it takes this lock: either the
        // message is here already, or the run is found set aside. Likewise it
        // closes the channels before it forgets all that was set aside.
        let mut aside = self.aside();
        let messages = &registration.messages;
        let silent = messages.is_empty() && !messages.is_closed();
        if silent {
            aside.insert(registration.run, None);
        }
        silent
    }

    fn aside(&self) -> MutexGuard<'_, HashMap<RunId, Option<Kept>>> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one invocation to its end, or to the moment `stop` is heard and
    /// what runs is gone. `sink` gets the output as it comes.
    ///
    /// # Errors
    /// [`ExecuteError`] where the program never started.
    pub async fn execute(
        &self,
        invocation: Invocation,
        stop: StopSignal,
        sink: Option<OutputSink>,
    ) -> Result<Outcome, ExecuteError> {
        run::execute(self, invocation, stop, sink).await
    }

    /// The connection to use, waiting [`RESTART_WAIT`] for one at most.
    pub(super) async fn connection(&self) -> Result<Arc<Connection>, ExecuteError> {
        let mut state = self.state.subscribe();
        let there = state.wait_for(|state| state.connection.is_some());
        match tokio::time::timeout(RESTART_WAIT, there).await {
            Ok(Ok(state)) => state.connection.clone().ok_or(ExecuteError::LauncherLost),
            _ => Err(ExecuteError::LauncherLost),
        }
    }

    /// Stops using a connection that failed.
    pub(super) fn forget(&self, connection: &Arc<Connection>) {
        self.state.send_if_modified(|state| {
            let current =
                state.connection.as_ref().is_some_and(|current| Arc::ptr_eq(current, connection));
            if current {
                *state = State { was_ready: true, ..State::default() };
            }
            current
        });
    }

    async fn receive(&self, connection: &Arc<Connection>) -> io::Result<()> {
        let mut buffer = vec![0; MESSAGE_MAX];
        loop {
            let Some((length, mut fds)) = connection.socket.receive(&mut buffer).await? else {
                return Ok(());
            };
            let message = postcard::from_bytes::<FromLauncher>(&buffer[..length])
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            match message {
                FromLauncher::Ready { policy_set } => {
                    debug!(%policy_set, "the launcher is ready");
                    self.state.send_replace(State {
                        connection: Some(Arc::clone(connection)),
                        policy_set: Some(policy_set),
                        was_ready: true,
                    });
                }
                FromLauncher::Released { run } => drop(self.aside().remove(&run)),
                FromLauncher::Started { run, .. } | FromLauncher::Seen { run, .. } => {
                    self.deliver(connection, run, message, None);
                }
                FromLauncher::Connected { run, .. } => {
                    self.deliver(connection, run, message, fds.pop());
                }
                FromLauncher::Refused { run, .. } => {
                    self.deliver(connection, run, message, None);
                    drop(self.aside().remove(&run));
                }
                FromLauncher::Ended { run, ref end } if end.quarantined => {
                    self.aside().insert(run, None);
                    self.deliver(connection, run, message, None);
                }
                FromLauncher::Ended { run, .. } => {
                    self.deliver(connection, run, message, None);
                    // It may have been given up, and ended after all.
                    drop(self.aside().remove(&run));
                }
            }
        }
    }

    /// Hands a message to its run. One of which more comes than was asked for is cut off: with
    /// a message left out, it would take each later answer for another's.
    fn deliver(
        &self,
        connection: &Connection,
        run: RunId,
        message: FromLauncher,
        descriptor: Option<OwnedFd>,
    ) {
        if let Err(last) = connection.deliver(run, message, descriptor) {
            error!(%run, "the launcher says more of the run than it was asked");
            // It may live on: before it learns of this, what it was granted has its place.
            self.aside().entry(run).or_default();
            drop(last);
        }
    }
}

/// A message, and the descriptor that came with it.
pub(super) type Word = (FromLauncher, Option<OwnedFd>);

/// One socketpair with one launcher.
#[derive(Debug)]
pub(super) struct Connection {
    socket: Packets,
    /// Where each run's messages go; `None` once the connection ended.
    runs: Mutex<Option<HashMap<RunId, mpsc::Sender<Word>>>>,
}

impl Connection {
    /// Announces a run, so that messages about it find their way; `None` when
    /// the connection has ended.
    pub(super) fn register(self: &Arc<Self>, run: RunId) -> Option<Registration> {
        let (sender, messages) = mpsc::channel(RUN_MESSAGES);
        self.runs().as_mut()?.insert(run, sender);
        Some(Registration { connection: Arc::clone(self), run, messages, alive: false })
    }

    /// Sends one message.
    pub(super) async fn send(
        &self,
        message: &FromServer,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let bytes = encode(message)?;
        self.socket.send(&bytes, descriptors).await
    }

    /// Where there is no room for it, the run gets no more: the last way to it is returned.
    fn deliver(
        &self,
        run: RunId,
        message: FromLauncher,
        descriptor: Option<OwnedFd>,
    ) -> Result<(), mpsc::Sender<Word>> {
        let mut runs = self.runs();
        let Some(sender) = runs.as_ref().and_then(|runs| runs.get(&run)) else {
            debug!(%run, "a message about a run that nobody waits for");
            return Ok(());
        };
        match sender.try_send((message, descriptor)) {
            Err(mpsc::error::TrySendError::Full(_)) => {
                runs.as_mut().and_then(|runs| runs.remove(&run)).map_or(Ok(()), Err)
            }
            // Or it is over, and hears nothing any more.
            _ => Ok(()),
        }
    }

    fn close(&self) {
        *self.runs() = None;
    }

    fn runs(&self) -> MutexGuard<'_, Option<HashMap<RunId, mpsc::Sender<Word>>>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn encode(message: &FromServer) -> io::Result<Vec<u8>> {
    let bytes = postcard::to_stdvec(message)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    if bytes.len() > MESSAGE_MAX {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok(bytes)
}

/// A run's place on a connection. Dropping it while the run may be alive tells
/// the launcher to end the run.
#[derive(Debug)]
pub(super) struct Registration {
    pub(super) connection: Arc<Connection>,
    run: RunId,
    messages: mpsc::Receiver<Word>,
    /// From sending the launch to hearing of the refusal or the end.
    pub(super) alive: bool,
}

impl Registration {
    /// The next message about this run; `None` when the launcher is gone, or as
    /// [`Self::check_heard_out`] says.
    pub(super) async fn next(&mut self) -> Option<FromLauncher> {
        self.messages.recv().await.map(|(message, _)| message)
    }

    /// The same, with the descriptor that came with it.
    pub(super) async fn next_with_descriptor(&mut self) -> Option<Word> {
        self.messages.recv().await
    }

    /// Tells a launcher that is gone from one that says too much: that run has to be ended,
    /// which dropping this does, and may live for a while.
    pub(super) fn check_heard_out(&self) -> Result<(), ExecuteError> {
        match *self.connection.runs() {
            Some(_) => Err(ExecuteError::Stuck("keep to what it was asked")),
            None => Ok(()),
        }
    }

    /// Which run.
    pub(super) fn run(&self) -> RunId {
        self.run
    }

    /// Asks the launcher to end the run. A launcher that can't be told has died,
    /// which ends the run as well.
    pub(super) async fn stop(&self, cause: StopCause) {
        let message = FromServer::Stop { run: self.run, cause };
        if let Err(error) = self.connection.send(&message, &[]).await {
            debug!(run = %self.run, %error, "the launcher could not be told to stop the run");
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(runs) = self.connection.runs().as_mut() {
            runs.remove(&self.run);
        }
        if !self.alive {
            return;
        }
        let message = FromServer::Stop { run: self.run, cause: StopCause::Cancelled };
        let sent = encode(&message).and_then(|bytes| self.connection.socket.try_send(&bytes));
        if let Err(error) = sent {
            warn!(run = %self.run, %error, "an abandoned run could not be stopped");
        }
    }
}
