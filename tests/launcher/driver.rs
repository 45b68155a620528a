//! A launcher process, spoken to as monitor and server do.

// Each test file uses its own part of this.
#![allow(dead_code)]

use std::{
    fs::File,
    io::Read as _,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use dispatcher::{
    jail::{
        message::{
            End, FromLauncher, FromMonitor, FromServer, Launch, LauncherConfig, MESSAGE_MAX,
            Refusal,
        },
        plan::{Template, TemplateSet},
    },
    names::Digest,
    sys,
};

/// The digest of the set that the policy is in.
pub const SET: Digest = Digest::from_bytes([7; 32]);

/// A launcher process with one policy, and our end of its server socket.
pub struct Launcher {
    pub child: Child,
    monitor: Option<OwnedFd>,
    pub server: Option<OwnedFd>,
    /// It is to end with a failure.
    pub fails: bool,
}

impl Launcher {
    pub fn start(template: Template) -> Self {
        Self::start_prepared(template, || Ok(()))
    }

    /// `prepare` runs in the process before it becomes the launcher: only
    /// system calls.
    pub fn start_prepared(
        template: Template,
        prepare: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let launcher = Self::start_unready(template, prepare);
        assert_eq!(launcher.next(), FromLauncher::Ready { policy_set: SET });
        launcher
    }

    /// What it makes on the host it makes in this directory.
    pub fn start_in(template: Template, directory: &Path) -> Self {
        Self::start_with(template, &[], directory, || Ok(()))
    }

    /// The same, prepared, and with variables in its environment.
    pub fn start_with(
        template: Template,
        variables: &[(&str, &str)],
        directory: &Path,
        prepare: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let directory = directory.to_str().unwrap();
        let places = [("RUNTIME_DIRECTORY", directory), ("XDG_RUNTIME_DIR", directory)];
        let launcher = Self::spawn(template, &[variables, &places].concat(), prepare);
        assert_eq!(launcher.next(), FromLauncher::Ready { policy_set: SET });
        launcher
    }

    pub fn start_unready(
        template: Template,
        prepare: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self::spawn(template, &[], prepare)
    }

    fn spawn(
        template: Template,
        variables: &[(&str, &str)],
        prepare: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let (ours, theirs) = sys::seqpacket_pair().unwrap();
        let mut command = Command::new(dispatcher_binary());
        command.arg0("dispatch-launch").stdin(Stdio::null()).stdout(Stdio::null());
        command.envs(variables.iter().copied());
        let raw = theirs.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe.
        #[expect(clippy::disallowed_methods, reason = "nothing to be quick for")]
        unsafe {
            command.pre_exec(move || sys::dup_to_inherited(raw, 3).and_then(|()| prepare()))
        };
        let child = command.spawn().unwrap();
        drop(theirs);
        let instance = format!("test-{}-{}", std::process::id(), child.id());
        send(
            &ours,
            &FromMonitor::Configure(LauncherConfig {
                instance,
                cgroup_parent: std::env::var("DISPATCHER_TEST_CGROUP_PARENT").unwrap_or_default(),
                uid_range: (2_000_000, 2_065_535),
            }),
            &[],
        );
        let set = TemplateSet { digest: SET, containers: false, templates: vec![template] };
        let bytes = postcard::to_stdvec(&set).unwrap();
        let memfd = sys::sealed_memfd(c"policies", &[&bytes], false).unwrap();
        send(&ours, &FromMonitor::Policies, &[&memfd]);
        let (server, theirs) = sys::seqpacket_pair().unwrap();
        send(&ours, &FromMonitor::Server, &[&theirs]);
        drop(theirs);
        Self { child, monitor: Some(ours), server: Some(server), fails: false }
    }

    pub fn next(&self) -> FromLauncher {
        self.next_with().0
    }

    /// The same with the descriptors that came along.
    pub fn next_with(&self) -> (FromLauncher, Vec<OwnedFd>) {
        let server = self.server.as_ref().unwrap();
        let mut buffer = vec![0; MESSAGE_MAX];
        let deadline = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
        let mut fds = [rustix::event::PollFd::new(server, rustix::event::PollFlags::IN)];
        let ready = rustix::event::poll(&mut fds, Some(&deadline)).unwrap();
        assert!(ready > 0, "the launcher says nothing");
        let (length, fds) = sys::receive_packet(server, &mut buffer).unwrap().expect("closed");
        (postcard::from_bytes(&buffer[..length]).unwrap(), fds)
    }

    /// Runs a shell script in a jail with the host's root and returns how it ended.
    pub fn run(&self, launch: Launch, call: &[&str], executable: &[u8]) -> Outcome {
        let mut io = Io::new();
        self.launch(&launch, call, executable, &mut io);
        let mut started = false;
        loop {
            match self.next() {
                FromLauncher::Started { .. } => started = true,
                FromLauncher::Refused { refusal, .. } => return Outcome::Refused(refusal),
                FromLauncher::Ended { end, .. } => {
                    assert!(started, "an end without a start");
                    let (stdout, stderr) = io.read();
                    return Outcome::Ended { end, stdout, stderr };
                }
                FromLauncher::Ready { .. } | FromLauncher::Released { .. } => {}
                other => panic!("nobody asked for {other:?}"),
            }
        }
    }

    pub fn launch(&self, launch: &Launch, call: &[&str], executable: &[u8], io: &mut Io) {
        self.launch_with(launch, &descriptors(call, executable, io));
    }

    pub fn launch_with(&self, launch: &Launch, descriptors: &[OwnedFd]) {
        let descriptors: Vec<_> = descriptors.iter().collect();
        send(self.server.as_ref().unwrap(), &FromServer::Launch(launch.clone()), &descriptors);
    }
}

impl Launcher {
    /// As when the monitor dies.
    pub fn drop_monitor(&mut self) {
        self.monitor = None;
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.server = None;
        self.monitor = None;
        let status = self.child.wait().unwrap();
        if !std::thread::panicking() {
            assert_eq!(status.success(), !self.fails, "{status}");
        }
    }
}

#[derive(Debug)]
pub enum Outcome {
    Refused(Refusal),
    Ended { end: Box<End>, stdout: String, stderr: String },
}

pub struct Io {
    pub stdout: (OwnedFd, Option<OwnedFd>),
    pub stderr: (OwnedFd, Option<OwnedFd>),
}

impl Io {
    pub fn new() -> Self {
        let pipe = || {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
            (read, Some(write))
        };
        Self { stdout: pipe(), stderr: pipe() }
    }

    pub fn read(self) -> (String, String) {
        let all = |fd: OwnedFd| {
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            text
        };
        (all(self.stdout.0), all(self.stderr.0))
    }
}

/// What a launch takes, in its order: executable, stdin, stdout, stderr, call.
pub fn descriptors(call: &[&str], executable: &[u8], io: &mut Io) -> [OwnedFd; 5] {
    let blob: Vec<u8> = call.iter().flat_map(|text| [text.as_bytes(), b"\0"].concat()).collect();
    [
        sys::sealed_memfd(c"exe", &[executable], true).unwrap(),
        sys::sealed_memfd(c"stdin", &[], false).unwrap(),
        io.stdout.1.take().unwrap(),
        io.stderr.1.take().unwrap(),
        sys::sealed_memfd(c"call", &[&blob], false).unwrap(),
    ]
}

/// Elsewhere in the VM, where nothing is built.
fn dispatcher_binary() -> String {
    std::env::var("DISPATCHER_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_dispatcher").into())
}

pub fn send<T: serde::Serialize>(socket: &OwnedFd, message: &T, fds: &[&OwnedFd]) {
    let bytes = postcard::to_stdvec(message).unwrap();
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    sys::send_packet(socket, &bytes, &fds).unwrap();
}
