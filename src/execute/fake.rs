//! A launcher for tests, on the other end of the real socketpair.
//!
//! It speaks the real messages; what it does with a launch is up to the test:
//! say something and end, wait to be stopped, die, refuse, or really run the
//! program (without any isolation).

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{
            ffi::OsStringExt as _,
            net::UnixStream,
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    process::Command,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::launcher::Launcher;
use crate::{
    jail::message::{
        End, FromLauncher, FromServer, Launch, MESSAGE_MAX, Oom, Refusal, ServiceSocket, Sight,
        StopCause, WaitStatus,
    },
    names::{Digest, RunId},
    sys,
};

/// What the fake does with one launch.
pub(crate) enum Behaviour {
    /// Starts, writes this, and ends so.
    Say { stdout: Vec<u8>, stderr: Vec<u8>, end: Box<End> },
    /// Starts, writes to stdout without end, and ends only when stopped.
    Flood,
    /// Starts, says "begun" and ends only when stopped.
    Wait,
    /// Starts, and never says anything again.
    Hang,
    /// Starts and closes the connection.
    Die,
    /// Does not start.
    Refuse(Refusal),
    /// Really runs it.
    Run,
    /// Is a service, and ends only when stopped: gets our end of each connection to it.
    Serve(Answerer),
    /// The same, and what is to be seen of it is never told.
    ServeUnseen(Answerer),
}

/// Who answers on a connection.
pub(crate) type Answerer = Arc<dyn Fn(UnixStream) + Send + Sync>;

/// The fake's end of the conversation.
pub(crate) struct FakeLauncher {
    launches: Mutex<mpsc::Receiver<Launched>>,
    stops: Mutex<mpsc::Receiver<(RunId, StopCause)>>,
    socket: Arc<OwnedFd>,
}

/// One launch as the fake received it.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) launch: Launch,
    pub(crate) argv: Vec<String>,
    pub(crate) environment: HashMap<String, String>,
    pub(crate) stdin: Vec<u8>,
}

impl FakeLauncher {
    /// Connects a fake that holds the policies `policy_set`.
    pub(crate) fn attach(
        launcher: &Launcher,
        policy_set: Digest,
        behave: impl Fn(&Launch) -> Behaviour + Send + 'static,
    ) -> Self {
        let (ours, theirs) = sys::seqpacket_pair().unwrap();
        launcher.attach(theirs).unwrap();
        let socket = Arc::new(ours);
        let (launch_sender, launches) = mpsc::channel();
        let (stop_sender, stops) = mpsc::channel();
        let serving = Arc::clone(&socket);
        tell(&socket, &FromLauncher::Ready { policy_set });
        thread::spawn(move || serve(&serving, &launch_sender, &stop_sender, behave));
        Self { launches: Mutex::new(launches), stops: Mutex::new(stops), socket }
    }

    /// The next launch it got.
    pub(crate) fn launched(&self) -> Launched {
        let launches = self.launches.lock().unwrap();
        launches.recv_timeout(Duration::from_secs(10)).expect("a launch")
    }

    /// The next stop it was sent.
    pub(crate) fn stopped(&self) -> (RunId, StopCause) {
        let stops = self.stops.lock().unwrap();
        stops.recv_timeout(Duration::from_secs(10)).expect("a stop")
    }

    /// Whether there was a launch that [`Self::launched`] has not returned yet.
    pub(crate) fn was_asked(&self) -> bool {
        self.launches.lock().unwrap().try_recv().is_ok()
    }

    /// Says that a run ended, whatever its behaviour.
    pub(crate) fn end(&self, run: RunId, end: End) {
        tell(&self.socket, &FromLauncher::Ended { run, end: Box::new(end) });
    }

    /// Says so often what nobody asked for.
    pub(crate) fn babble(&self, run: RunId, often: usize) {
        for _ in 0..often {
            tell(&self.socket, &FromLauncher::Seen { run, sight: None });
        }
    }

    /// Announces other policies.
    pub(crate) fn announce(&self, policy_set: Digest) {
        tell(&self.socket, &FromLauncher::Ready { policy_set });
    }
}

/// An unremarkable end with this exit code.
pub(crate) fn exited(code: i32) -> End {
    End {
        status: WaitStatus::Exited(code),
        stopped: None,
        oom: Oom::None,
        denied_syscall: None,
        refused_syscalls: Vec::new(),
        enforced: Vec::new(),
        runtime: None,
        lost: None,
        setup: Duration::from_micros(300),
        wall: Duration::from_millis(2),
        user: Duration::from_millis(1),
        system: Duration::from_millis(1),
        memory_peak: 1 << 20,
        pids_peak: 1,
        quarantined: false,
    }
}

fn tell(socket: &OwnedFd, message: &FromLauncher) {
    let bytes = postcard::to_stdvec(message).unwrap();
    // The server may be gone at the end of a test.
    let _ = sys::send_packet(socket, &bytes, &[]);
}

fn serve(
    socket: &Arc<OwnedFd>,
    launches: &mpsc::Sender<Launched>,
    told: &mpsc::Sender<(RunId, StopCause)>,
    behave: impl Fn(&Launch) -> Behaviour,
) {
    let stops: Arc<Mutex<HashMap<RunId, mpsc::Sender<StopCause>>>> = Arc::default();
    let (mut services, mut unseen) = (HashMap::new(), HashSet::new());
    let mut buffer = vec![0; MESSAGE_MAX];
    while let Ok(Some((length, descriptors))) = sys::receive_packet(socket, &mut buffer) {
        match postcard::from_bytes(&buffer[..length]).unwrap() {
            FromServer::Stop { run, cause } => {
                let _ = told.send((run, cause));
                if let Some(stop) = stops.lock().unwrap().get(&run) {
                    let _ = stop.send(cause);
                }
            }
            FromServer::Launch(launch) => {
                let behaviour = behave(&launch);
                if let Behaviour::Serve(answerer) | Behaviour::ServeUnseen(answerer) = &behaviour {
                    services.insert(launch.run, Arc::clone(answerer));
                }
                if let Behaviour::ServeUnseen(_) = &behaviour {
                    unseen.insert(launch.run);
                }
                let (sender, stop) = mpsc::channel();
                stops.lock().unwrap().insert(launch.run, sender);
                let program = Program::receive(&launch, descriptors);
                let _ = launches.send(program.launched(&launch));
                let socket = Arc::clone(socket);
                thread::spawn(move || perform(&socket, &launch, program, behaviour, &stop));
            }
            FromServer::Connect { run, to } => connect(socket, services.get(&run), run, to),
            FromServer::Look { run } if unseen.contains(&run) => {}
            FromServer::Look { run } => {
                let sight = services.contains_key(&run).then(|| {
                    let End { enforced, runtime, user, system, memory_peak, pids_peak, .. } =
                        exited(0);
                    Box::new(Sight { enforced, runtime, user, system, memory_peak, pids_peak })
                });
                tell(socket, &FromLauncher::Seen { run, sight });
            }
            FromServer::Freeze { .. } => {}
        }
    }
}

fn connect(socket: &OwnedFd, service: Option<&Answerer>, run: RunId, to: ServiceSocket) {
    let told = |result| FromLauncher::Connected { run, to, result };
    match service.filter(|_| to == ServiceSocket::Inherited) {
        Some(answerer) => {
            let (ours, theirs) = UnixStream::pair().unwrap();
            answerer(ours);
            let bytes = postcard::to_stdvec(&told(Ok(()))).unwrap();
            let _ = sys::send_packet(socket, &bytes, &[theirs.as_fd()]);
        }
        None => tell(socket, &told(Err(libc::ENOENT))),
    }
}

fn perform(
    socket: &OwnedFd,
    launch: &Launch,
    mut program: Program,
    behaviour: Behaviour,
    stop: &mpsc::Receiver<StopCause>,
) {
    let run = launch.run;
    if let Behaviour::Refuse(refusal) = behaviour {
        drop(program);
        tell(socket, &FromLauncher::Refused { run, refusal });
        return;
    }
    tell(
        socket,
        &FromLauncher::Started {
            run,
            at: std::time::SystemTime::now(),
            setup: Duration::from_micros(300),
        },
    );
    let end = match behaviour {
        Behaviour::Refuse(_) => unreachable!("handled above"),
        Behaviour::Say { stdout, stderr, end } => {
            let _ = program.stdout.write_all(&stdout);
            let _ = program.stderr.write_all(&stderr);
            *end
        }
        Behaviour::Serve(_) | Behaviour::ServeUnseen(_) => {
            stopped(stop.recv().unwrap_or(StopCause::Cancelled))
        }
        Behaviour::Wait => {
            let _ = program.stdout.write_all(b"begun");
            let patience = launch.timeout.unwrap_or(Duration::from_secs(60));
            stopped(stop.recv_timeout(patience).unwrap_or(StopCause::Timeout))
        }
        Behaviour::Flood => loop {
            let _ = program.stdout.write_all(&[b'x'; 4096]);
            if let Ok(cause) = stop.try_recv() {
                break stopped(cause);
            }
        },
        Behaviour::Hang => return,
        Behaviour::Die => {
            let _ = program.stdout.write_all(b"begun");
            // Only once that was read is the capture sure to have it.
            while rustix::io::ioctl_fionread(&program.stdout).unwrap_or(0) > 0 {
                thread::yield_now();
            }
            rustix::net::shutdown(socket, rustix::net::Shutdown::Both).unwrap();
            return;
        }
        Behaviour::Run => program.run(launch, stop),
    };
    drop(program);
    tell(socket, &FromLauncher::Ended { run, end: Box::new(end) });
}

fn stopped(cause: StopCause) -> End {
    End { stopped: Some(cause), status: WaitStatus::Signalled(9), ..exited(0) }
}

struct Program {
    executable: OwnedFd,
    stdin: OwnedFd,
    stdout: File,
    stderr: File,
    argv: Vec<String>,
    environment: HashMap<String, String>,
}

impl Program {
    fn receive(launch: &Launch, descriptors: Vec<OwnedFd>) -> Self {
        let [executable, stdin, stdout, stderr, call] =
            <[OwnedFd; 5]>::try_from(descriptors).expect("five descriptors");
        let mut blob = Vec::new();
        File::from(call).read_to_end(&mut blob).unwrap();
        assert_eq!(blob.pop(), Some(0), "each string ends with a NUL");
        let mut strings =
            blob.split(|byte| *byte == 0).map(|s| String::from_utf8(s.to_vec()).unwrap());
        let argv = strings.by_ref().take(launch.argc as usize).collect();
        let environment = strings
            .map(|pair| pair.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).unwrap())
            .collect::<HashMap<_, _>>();
        assert_eq!(environment.len(), launch.envc as usize);
        Self { executable, stdin, stdout: stdout.into(), stderr: stderr.into(), argv, environment }
    }

    /// Reads the input without moving the program's own offset.
    fn launched(&self, launch: &Launch) -> Launched {
        use std::os::unix::fs::FileExt as _;
        let input = File::from(self.stdin.try_clone().unwrap());
        let mut stdin = vec![0; usize::try_from(input.metadata().unwrap().len()).unwrap()];
        input.read_exact_at(&mut stdin, 0).unwrap();
        Launched {
            launch: launch.clone(),
            argv: self.argv.clone(),
            environment: self.environment.clone(),
            stdin,
        }
    }

    fn run(&mut self, launch: &Launch, stop: &mpsc::Receiver<StopCause>) -> End {
        let path = format!("/proc/self/fd/{}", self.executable.as_raw_fd()).into_bytes();
        let begun = Instant::now();
        let mut child = Command::new(std::ffi::OsString::from_vec(path))
            .arg0(&self.argv[0])
            .args(&self.argv[1..])
            .env_clear()
            .envs(&self.environment)
            .stdin(self.stdin.try_clone().unwrap())
            .stdout(self.stdout.try_clone().unwrap())
            .stderr(self.stderr.try_clone().unwrap())
            .spawn()
            .unwrap();
        let mut cause = None;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if launch.timeout.is_some_and(|timeout| begun.elapsed() >= timeout) {
                cause.get_or_insert(StopCause::Timeout);
            }
            if let Ok(stop) = stop.recv_timeout(Duration::from_millis(1)) {
                cause.get_or_insert(stop);
            }
            if cause.is_some() {
                child.kill().unwrap();
            }
        };
        End {
            status: status.code().map_or_else(
                || WaitStatus::Signalled(status.signal().unwrap_or(0)),
                WaitStatus::Exited,
            ),
            stopped: cause,
            wall: begun.elapsed(),
            ..exited(0)
        }
    }
}
