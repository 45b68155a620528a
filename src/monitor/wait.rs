//! Waiting: what happened to the monitor's signals, children, directory and
//! clock, as events of its state machine.

use std::{
    collections::VecDeque,
    io,
    os::fd::AsFd as _,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::{
    LAUNCHER, Monitor, SERVER, StartError,
    compile::{Compilation, CompileError, Compiled},
    name,
    peer::Peer,
    process::{Executable, told},
    signals::{Request, Signals},
    state::{Event, Role},
    watch::Watch,
};
use crate::{server::message::FromServer, sys};

/// Longest message that the server may send.
const ANSWER_MAX: usize = 256;

/// What a descriptor that became readable is about.
#[derive(Clone, Copy, Debug)]
enum Source {
    Signals,
    Compiler,
    Watch,
    Process(Role),
    Answers,
}

impl Monitor<'_> {
    /// Waits until something happens, at most until `due`, and tells what.
    pub(super) fn wait(
        &mut self,
        due: Option<Instant>,
        events: &mut VecDeque<Event>,
    ) -> io::Result<()> {
        let deadlines = [
            due,
            self.compilation.as_ref().map(Compilation::deadline),
            self.watch.as_ref().and_then(Watch::deadline),
            self.server.as_ref().and_then(Peer::overdue),
        ];
        let timeout = deadlines.into_iter().flatten().min().map(until).transpose()?;
        for source in self.readable(timeout.as_ref())? {
            self.look(source, events)?;
        }
        let now = Instant::now();
        self.look_at_compiler(now, events);
        if self.watch.as_mut().is_some_and(|watch| watch.settled(now)) {
            tracing::info!("the policies changed");
            events.push_back(Event::Reload);
        }
        if let Some(server) =
            self.server.as_mut().filter(|it| it.overdue().is_some_and(|at| at <= now))
        {
            tracing::error!("{SERVER} closed its socket and lives on: killing it");
            server.process.kill()?;
            server.hung_up(now);
        }
        if due.is_some_and(|due| due <= now) {
            events.push_back(Event::Tick);
        }
        Ok(())
    }

    fn readable(&self, timeout: Option<&Timespec>) -> io::Result<Vec<Source>> {
        let mut sources = vec![(Source::Signals, self.signals.as_fd())];
        sources.extend(self.compilation.as_ref().map(|it| (Source::Compiler, it.as_fd())));
        sources.extend(self.watch.as_ref().map(|it| (Source::Watch, it.as_fd())));
        // What the server said last comes before its end.
        let answers = self.server.as_ref().and_then(Peer::socket);
        sources.extend(answers.map(|it| (Source::Answers, it.as_fd())));
        for role in [Role::Server, Role::Launcher, Role::Containers] {
            let peer = self.peer(role);
            sources.extend(peer.map(|it| (Source::Process(role), it.process.as_fd())));
        }
        let mut fds: Vec<_> =
            sources.iter().map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        let ready = sources.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|((source, _), _)| *source).collect())
    }

    fn look(&mut self, source: Source, events: &mut VecDeque<Event>) -> io::Result<()> {
        match source {
            Source::Signals => {
                while let Some(request) = self.signals.next()? {
                    events.push_back(match request {
                        Request::Stop => Event::Stop,
                        Request::Reload => Event::Reload,
                    });
                }
            }
            // Looked at after every wait, for its deadline.
            Source::Compiler => {}
            Source::Watch => {
                if let Some(watch) = &mut self.watch {
                    watch.note(Instant::now())?;
                }
            }
            Source::Process(role) => self.look_at_process(role, events)?,
            Source::Answers => self.look_at_answer(events)?,
        }
        Ok(())
    }

    fn look_at_compiler(&mut self, now: Instant, events: &mut VecDeque<Event>) {
        let Some(result) = self.compilation.as_mut().and_then(|it| it.result(now)) else {
            return;
        };
        self.compilation = None;
        events.push_back(compiled(result.map(|policies| {
            tracing::info!(digest = %policies.digest, "policies loaded again");
            self.policies = policies;
            self.policies.containers
        })));
    }

    fn look_at_process(&mut self, role: Role, events: &mut VecDeque<Event>) -> io::Result<()> {
        let slot = match role {
            Role::Server => &mut self.server,
            Role::Launcher => &mut self.launcher,
            Role::Containers => &mut self.containers,
        };
        let Some(peer) = slot else { return Ok(()) };
        let Some(status) = peer.process.ended()? else { return Ok(()) };
        let (pid, how) = (peer.process.pid(), told(status));
        if status.success() {
            tracing::info!(pid, "{} {how}", name(role));
        } else {
            tracing::error!(pid, "{} {how}", name(role));
        }
        *slot = None;
        events.push_back(Event::Gone { role, clean: status.success() });
        Ok(())
    }

    fn look_at_answer(&mut self, events: &mut VecDeque<Event>) -> io::Result<()> {
        let Some(server) = &mut self.server else { return Ok(()) };
        let Some(socket) = server.socket() else { return Ok(()) };
        let mut buffer = [0; ANSWER_MAX];
        match sys::receive_packet(socket, &mut buffer) {
            Ok(Some((length, _))) => match postcard::from_bytes(&buffer[..length]) {
                Ok(FromServer::Ready) => {
                    tracing::info!("{SERVER} is ready");
                    events.push_back(Event::Ready);
                }
                Ok(FromServer::LauncherLost) => {
                    tracing::warn!("{SERVER} has lost {LAUNCHER}: joining them again");
                    events.push_back(Event::Parted);
                }
                // It is not what we started any more, whoever it is now.
                Err(error) => {
                    tracing::error!(%error, "{SERVER} said what has no meaning: killing it");
                    server.close();
                    server.process.kill()?;
                }
            },
            Ok(None) => server.hung_up(Instant::now()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::debug!(%error, "{SERVER} broke its socket");
                server.hung_up(Instant::now());
            }
        }
        Ok(())
    }
}

/// The first compilation, before there is anything else to do but to be stopped.
pub(super) fn first_policies(
    executable: &Executable,
    signals: &Signals,
    directory: &Path,
) -> Result<Compiled, StartError> {
    let system = |error: io::Error| CompileError::System(error);
    let mut compilation = Compilation::start(executable, directory).map_err(system)?;
    loop {
        if let Some(result) = compilation.result(Instant::now()) {
            return Ok(result?);
        }
        let timeout = until(compilation.deadline()).map_err(system)?;
        let mut fds =
            [PollFd::new(&compilation, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(system(error.into()).into()),
        }
        while let Some(request) = signals.next().map_err(system)? {
            // A reload is under way already.
            if request == Request::Stop {
                return Err(StartError::Stopped);
            }
        }
    }
}

/// What the end of a compilation means; faults are told already.
pub(super) fn compiled(result: Result<bool, CompileError>) -> Event {
    if let Err(error) = &result {
        tracing::error!("{error}; the earlier ones stay in force");
    }
    Event::Compiled { containers: result.ok() }
}

/// From now; a little longer, so that the time has really come then.
fn until(at: Instant) -> io::Result<Timespec> {
    let left = at.saturating_duration_since(Instant::now());
    (left + Duration::from_millis(1)).try_into().map_err(io::Error::other)
}
