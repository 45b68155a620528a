//! A `dispatch-docker` by itself, spoken to as monitor and server do.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use dispatcher::{
    container::message::{ContainerConfig, FromMonitor},
    jail::{
        message::{
            End, FromLauncher, FromServer, Launch, MESSAGE_MAX, Refusal, ServiceSocket, Sight,
            StopCause,
        },
        plan::{Limits, Mode, Template, TemplateId, TemplateSet},
    },
    names::{Digest, RunId},
    sys,
    units::Limit,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::common::{docker::Docker, host::Process, patience, programs};

/// The digest of the set that the policy is in.
const SET: Digest = Digest::from_bytes([7; 32]);
/// How long it may take to say the next thing.
const LIMIT: Duration = Duration::from_secs(60);

/// A policy of the namespace `test` whose runs are services.
pub fn template() -> Template {
    Template {
        modes: vec![Mode::Container],
        limits: Limits { timeout: Limit::Unlimited, ..Limits::default() },
        environment: [("A".into(), "1".into())].into(),
        listens: true,
        ..crate::common::template::template()
    }
}

/// A `dispatch-docker` with one policy, and our ends of its sockets.
pub struct Maker {
    pub child: Child,
    pub process: Process,
    monitor: Option<OwnedFd>,
    server: Option<OwnedFd>,
}

/// A run of it.
pub struct Run {
    pub id: RunId,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

impl Maker {
    /// Starts it, with slots below `directory`.
    pub fn start(docker: &Docker, directory: &Path, template: Template) -> Self {
        let (ours, theirs) = sys::seqpacket_pair().unwrap();
        let binary = std::env::var("DISPATCHER_BIN")
            .unwrap_or_else(|_| env!("CARGO_BIN_EXE_dispatcher").into());
        let mut command = Command::new(binary);
        command.arg0("dispatch-docker").stdin(Stdio::null()).stdout(Stdio::null());
        let raw = theirs.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe.
        #[expect(clippy::disallowed_methods, reason = "nothing to be quick for")]
        unsafe {
            command.pre_exec(move || sys::dup_to_inherited(raw, 3))
        };
        let child = command.spawn().unwrap();
        drop(theirs);
        let config =
            ContainerConfig { socket: docker.socket.clone(), directory: directory.to_owned() };
        send(&ours, &FromMonitor::Configure(config), &[]);
        let set = TemplateSet { digest: SET, containers: true, templates: vec![template] };
        let bytes = postcard::to_stdvec(&set).unwrap();
        let memfd = sys::sealed_memfd(c"policies", &[&bytes], false).unwrap();
        send(&ours, &FromMonitor::Policies, &[&memfd]);
        let (server, theirs) = sys::seqpacket_pair().unwrap();
        send(&ours, &FromMonitor::Server, &[&theirs]);
        drop(theirs);
        let process = Process::read(child.id() as i32).expect("it runs");
        let maker = Self { child, process, monitor: Some(ours), server: Some(server) };
        assert_eq!(maker.hear(), FromLauncher::Ready { policy_set: SET });
        maker
    }

    /// What it says next, where that has no descriptor.
    #[track_caller]
    pub fn hear(&self) -> FromLauncher {
        let (message, descriptors) = self.receive();
        assert!(descriptors.is_empty(), "{message:?} with {descriptors:?}");
        message
    }

    #[track_caller]
    fn receive(&self) -> (FromLauncher, Vec<OwnedFd>) {
        let server = self.server.as_ref().unwrap();
        let limit = Timespec::try_from(patience(LIMIT)).unwrap();
        let ready = poll(&mut [PollFd::new(server, PollFlags::IN)], Some(&limit)).unwrap();
        assert!(ready > 0, "it says nothing");
        let mut buffer = vec![0; MESSAGE_MAX];
        let (length, fds) = sys::receive_packet(server, &mut buffer).unwrap().expect("closed");
        (postcard::from_bytes(&buffer[..length]).unwrap(), fds)
    }

    pub fn say(&self, message: &FromServer) {
        send(self.server.as_ref().unwrap(), message, &[]);
    }

    /// Asks for a run of `tests/programs/sockets.c`, with little memory.
    pub fn launch(&self, args: &[&str]) -> Run {
        self.launch_with(args, Some(64 << 20))
    }

    fn launch_with(&self, args: &[&str], memory: Option<u64>) -> Run {
        let program = programs::bytes("sockets");
        let argv = [&["sockets"], args].concat();
        let call = [&argv[..], &["A=1"]].concat();
        let blob: Vec<u8> =
            call.iter().flat_map(|text| [text.as_bytes(), b"\0"].concat()).collect();
        let launch = Launch {
            run: RunId::random().unwrap(),
            policy_set: SET,
            template: TemplateId { policy: "test".into(), variant: 0 },
            mode: Mode::Container,
            namespace: "test".into(),
            timeout: None,
            memory,
            cpus: None,
            executable_size: program.len() as u64,
            interpreter: None,
            argc: argv.len() as u32,
            envc: 1,
        };
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (stdout, theirs_out) = pipe();
        let (stderr, theirs_err) = pipe();
        let descriptors = [
            sys::sealed_memfd(c"exe", &[&program], true).unwrap(),
            sys::sealed_memfd(c"stdin", &[], false).unwrap(),
            theirs_out,
            theirs_err,
            sys::sealed_memfd(c"call", &[&blob], false).unwrap(),
        ];
        let id = launch.run;
        let descriptors: Vec<_> = descriptors.iter().collect();
        send(self.server.as_ref().unwrap(), &FromServer::Launch(launch), &descriptors);
        Run { id, stdout, stderr }
    }

    #[track_caller]
    pub fn started(&self, run: &Run) {
        match self.hear() {
            FromLauncher::Started { run: id, .. } if id == run.id => {}
            other => panic!("not started: {other:?}"),
        }
    }

    /// [`Self::launch`], as far as to a program that runs.
    #[track_caller]
    pub fn begin(&self, args: &[&str]) -> Run {
        let run = self.launch(args);
        self.started(&run);
        run
    }

    /// The same with all that its policy gives.
    #[track_caller]
    pub fn begin_whole(&self, args: &[&str]) -> Run {
        let run = self.launch_with(args, None);
        self.started(&run);
        run
    }

    #[track_caller]
    pub fn refused(&self, run: &Run) -> Refusal {
        match self.hear() {
            FromLauncher::Refused { run: id, refusal } if id == run.id => refusal,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[track_caller]
    pub fn ended(&self, run: &Run) -> End {
        match self.hear() {
            FromLauncher::Ended { run: id, end } if id == run.id => *end,
            other => panic!("not ended: {other:?}"),
        }
    }

    #[track_caller]
    pub fn stop(&self, run: &Run) -> End {
        self.say(&FromServer::Stop { run: run.id, cause: StopCause::Cancelled });
        self.ended(run)
    }

    #[track_caller]
    pub fn connect(&self, run: RunId, to: ServiceSocket) -> Result<UnixStream, i32> {
        self.say(&FromServer::Connect { run, to });
        let (message, mut descriptors) = self.receive();
        match message {
            FromLauncher::Connected { run: id, to: which, result } if (id, which) == (run, to) => {
                assert_eq!(descriptors.len(), usize::from(result.is_ok()), "{result:?}");
                result.map(|()| descriptors.remove(0).into())
            }
            other => panic!("no answer: {other:?}"),
        }
    }

    #[track_caller]
    pub fn look(&self, run: RunId) -> Option<Sight> {
        self.say(&FromServer::Look { run });
        match self.hear() {
            FromLauncher::Seen { run: id, sight } if id == run => sight.map(|sight| *sight),
            other => panic!("no answer: {other:?}"),
        }
    }

    /// Has the program do something: its answer, line by line.
    #[track_caller]
    pub fn order(&self, run: &Run, to: ServiceSocket, word: &str) -> Vec<String> {
        let connection = self.connect(run.id, to).unwrap_or_else(|errno| {
            panic!("{to:?} can't be reached: {}", io::Error::from_raw_os_error(errno))
        });
        connection.set_nonblocking(false).unwrap();
        connection.set_read_timeout(Some(patience(LIMIT))).unwrap();
        (&connection).write_all(format!("{word}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        (&connection).read_to_string(&mut answer).unwrap();
        answer.lines().map(str::to_owned).collect()
    }

    /// [`Self::order`] by the inherited socket, of what goes well.
    #[track_caller]
    pub fn has(&self, run: &Run, word: &str) {
        assert_eq!(self.order(run, ServiceSocket::Inherited, word), ["inherited", "ok"], "{word}");
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Run {
    /// All that it wrote, once nobody can write any more.
    pub fn output(self) -> (String, String) {
        let all = |fd: OwnedFd| {
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            text
        };
        (all(self.stdout), all(self.stderr))
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.server = None;
        self.monitor = None;
        let killed = matches!(self.child.try_wait(), Ok(Some(_)));
        let status = self.child.wait().unwrap();
        if !std::thread::panicking() && !killed {
            assert!(status.success(), "it left something: {status}");
        }
    }
}

fn send<T: serde::Serialize>(socket: &OwnedFd, message: &T, fds: &[&OwnedFd]) {
    let bytes = postcard::to_stdvec(message).unwrap();
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    sys::send_packet(socket, &bytes, &fds).unwrap();
}
