//! What monitor and server say, and how they are answered.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::Instant,
};

use rustix::event::epoll::{self, EventFlags};

use super::{CROWD, FAREWELL, Launcher, LoadedSet, OUTBOX_MAX, START_WORD, Source, log};
use crate::{
    jail::{
        decide::Prepared,
        message::{Exhausted, FromLauncher, FromMonitor, FromServer, Refusal, StopCause},
        plan::{Mode, SETS_KEPT, Template, TemplateSet},
    },
    names::Digest,
    sys,
};

impl Launcher {
    pub(super) fn on_monitor(&mut self) {
        let received = sys::receive_packet(&self.monitor, &mut self.buffer);
        match received {
            Ok(Some((length, fds))) => match postcard::from_bytes(&self.buffer[..length]) {
                Ok(message) => self.on_monitor_message(message, fds),
                Err(error) => log(&format!("the monitor's message can't be read: {error}")),
            },
            Ok(None) => self.end_all(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                log(&format!("the monitor's socket: {error}"));
                self.end_all();
            }
        }
    }

    pub(super) fn on_monitor_message(&mut self, message: FromMonitor, mut fds: Vec<OwnedFd>) {
        match (message, fds.pop()) {
            (FromMonitor::Policies, Some(fd)) => match self.load_policies(fd) {
                Ok(digest) => self.tell(&FromLauncher::Ready { policy_set: digest }),
                Err(error) => {
                    // The server decides by that set already: calls would be
                    // refused as stale for ever. The monitor tells of our end.
                    log(&format!("the policies can't be enforced, so this is the end: {error}"));
                    self.failed = true;
                    self.end_all();
                }
            },
            (FromMonitor::Server, Some(fd)) => self.take_server(fd),
            (other, _) => log(&format!("unexpected from the monitor: {other:?}")),
        }
    }

    pub(super) fn load_policies(&mut self, fd: OwnedFd) -> Result<Digest, String> {
        let set = TemplateSet::read(fd).map_err(|error| error.to_string())?;
        let digest = set.digest;
        let mut templates = HashMap::new();
        // Others are for containers alone.
        let ours = |template: &Template| template.modes.iter().any(|mode| *mode != Mode::Container);
        for template in set.templates.into_iter().filter(ours) {
            let id = template.id.clone();
            let before = self.sets.front().and_then(|set| set.templates.get(&id));
            let prepared = match before.filter(|before| before.template == template) {
                // With the jails that are built by it.
                Some(before) => Rc::clone(before),
                None => Prepared::new(template, &self.facts)
                    .map(Rc::new)
                    .map_err(|error| format!("{} {}: {error}", id.policy, id.variant))?,
            };
            templates.insert(id, prepared);
        }
        self.renew_ahead(&templates);
        self.sets.retain(|set| set.digest != digest);
        self.sets.push_front(LoadedSet { digest, templates });
        self.sets.truncate(SETS_KEPT);
        Ok(digest)
    }

    pub(super) fn take_server(&mut self, fd: OwnedFd) {
        self.drop_server();
        if let Err(error) = rustix::io::ioctl_fionbio(&fd, true)
            .map_err(io::Error::from)
            .and_then(|()| self.watch(&fd, Source::Server, EventFlags::IN))
        {
            log(&format!("the server's socket: {error}"));
            return;
        }
        self.server = Some(fd);
        if let Some(set) = self.sets.front() {
            self.tell(&FromLauncher::Ready { policy_set: set.digest });
        }
    }

    /// The server is gone: nobody is left to answer to.
    pub(super) fn drop_server(&mut self) {
        self.server = None; // closing takes it out of the epoll set
        self.outbox.clear();
        self.connected = 0;
        self.outbox_full = false;
        self.stop_all();
    }

    pub(super) fn stop_all(&mut self) {
        let now = Instant::now();
        for serial in self.runs.keys().copied().collect::<Vec<_>>() {
            self.with_run(serial, |run| {
                if !run.is_free() {
                    run.stop(StopCause::Cancelled, now);
                }
            });
        }
    }

    pub(super) fn end_all(&mut self) {
        if self.ending.is_none() {
            self.ending = Some(Instant::now() + FAREWELL);
            // At its end of file the socket would be readable for ever.
            epoll::delete(&self.epoll, &self.monitor).ok();
            self.drop_server();
            self.give_up_ahead();
        }
    }

    pub(super) fn on_server(&mut self) {
        if self.outbox_full {
            self.flush();
        }
        // A batch at a time: runs and the monitor want their turn too.
        let mut launches = 0;
        for _ in 0..16 {
            let Some(server) = &self.server else { return };
            match sys::receive_bytes(server, &mut self.buffer) {
                Ok(Some(packet)) => match postcard::from_bytes(&self.buffer[..packet.length]) {
                    Ok(message) => {
                        // What else is asked comes with a launch, and is no other call.
                        launches += u32::from(matches!(message, FromServer::Launch(_)));
                        if launches > 1 {
                            self.crowded_until = Instant::now() + CROWD;
                        }
                        self.on_server_message(message, packet.descriptors);
                    }
                    Err(error) => log(&format!("the server's message can't be read: {error}")),
                },
                Ok(None) => return self.drop_server(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    log(&format!("the server's socket: {error}"));
                    return self.drop_server();
                }
            }
        }
    }

    /// `fds` is `None` where some of them could not be received.
    pub(super) fn on_server_message(&mut self, message: FromServer, fds: Option<Vec<OwnedFd>>) {
        match message {
            FromServer::Launch(launch) => {
                let run = launch.run;
                let fds = fds.ok_or(Refusal::Exhausted(Exhausted::Descriptors));
                if let Err(refusal) = fds.and_then(|fds| self.launch(launch, fds)) {
                    self.tell(&FromLauncher::Refused { run, refusal });
                }
            }
            FromServer::Stop { run, cause } => {
                let now = Instant::now();
                if let Some(serial) = self.serials.get(&run).copied() {
                    self.with_run(serial, |run| run.stop(cause, now));
                }
            }
            FromServer::Connect { run, to } => self.connect(run, to),
            FromServer::Look { run } => self.look(run),
            FromServer::Freeze { run, frozen } => self.freeze(run, frozen),
        }
    }

    /// Sends, or keeps for later in order.
    pub(super) fn tell(&mut self, message: &FromLauncher) {
        self.tell_with(message, None);
    }

    /// The same, with a descriptor.
    pub(super) fn tell_with(&mut self, message: &FromLauncher, descriptor: Option<OwnedFd>) {
        self.queue(message, descriptor);
        self.flush();
    }

    /// Sends with what comes next, but soon: most programs end before the server
    /// could do anything with word of their start.
    pub(super) fn tell_soon(&mut self, message: &FromLauncher) {
        self.queue(message, None);
        self.outbox_due.get_or_insert_with(|| Instant::now() + START_WORD);
    }

    fn queue(&mut self, message: &FromLauncher, descriptor: Option<OwnedFd>) {
        if self.server.is_none() {
            return;
        }
        match postcard::to_stdvec(message) {
            Ok(bytes) => {
                self.connected += usize::from(descriptor.is_some());
                self.outbox.push_back((bytes, descriptor));
            }
            Err(error) => log(&format!("an answer can't be encoded: {error}")),
        }
    }

    pub(super) fn flush(&mut self) {
        self.outbox_due = None;
        let Some(server) = &self.server else { return };
        let was_full = self.outbox_full;
        self.outbox_full = false;
        let mut lost = false;
        while let Some((bytes, descriptor)) = self.outbox.front() {
            match sys::send_packet(server, bytes, descriptor.as_ref().map(AsFd::as_fd).as_slice()) {
                Ok(()) => {
                    self.connected -= usize::from(descriptor.is_some());
                    self.outbox.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.outbox_full = true;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    lost = true;
                    break;
                }
            }
        }
        if lost || self.outbox.len() > OUTBOX_MAX {
            return self.drop_server();
        }
        if self.outbox_full != was_full {
            self.watch_for_room(self.outbox_full);
        }
    }

    fn watch_for_room(&self, wanted: bool) {
        let Some(server) = &self.server else { return };
        let flags = if wanted { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        let data = epoll::EventData::new_u64(Source::Server.token());
        if let Err(error) = epoll::modify(&self.epoll, server, data, flags) {
            log(&format!("epoll: {error}"));
        }
    }
}
