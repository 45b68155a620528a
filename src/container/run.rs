//! One run in a container: from the launch to its end.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bollard::container::LogOutput;
use tokio::{
    io::AsyncWriteExt as _,
    net::unix::pipe,
    sync::mpsc,
    time::{sleep_until, timeout, timeout_at},
};
use tokio_stream::StreamExt as _;

use super::{
    ahead::Ahead,
    engine::Streams,
    make::{self, Container, Maker},
    marks::Marked,
    protocol::{Header, NONCE_LEN, Record, Verdict},
    seat::{self, Seat},
    server::Server,
    service::{Listening, Service},
};
use crate::{
    jail::{
        cgroup::Usage,
        check::{self, Checked},
        message::{
            End, FromLauncher, Launch, LaunchFds, Oom, Refusal, SCRIPT_PATH, StopCause, WaitStatus,
        },
        plan::{Control, Template},
    },
    names::RunId,
    units::Limit,
};

/// How long a call waits for its container: less than the server waits for a start.
const MAKE_WAIT: Duration = Duration::from_secs(27);
/// How long init may take to be told its program.
const SPEAK_WAIT: Duration = Duration::from_secs(2);
/// How long init may take to make a service's socket: Docker passes the message on, and with
/// a small share of a processor all is long.
const LISTENER_WAIT: Duration = Duration::from_secs(10);
/// How long a service may take from its launch to there: less than the server waits for it.
const BEGIN_WAIT: Duration = Duration::from_secs(29);
/// How long what was killed may take to be gone.
const TEARDOWN_GRACE: Duration = Duration::from_secs(2);
/// How long output may still be on its way through Docker once all is over.
const OUTPUT_WAIT: Duration = Duration::from_secs(2);
/// Least and most time between two looks at the CPU time.
const CPU_STEP: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(60));
/// Bytes of input that are copied at once.
const PIECE: usize = 64 << 10;

/// A launch that was checked against its template.
pub struct Task {
    /// What was asked.
    pub launch: Launch,
    /// Its descriptors.
    pub fds: LaunchFds,
    /// What holds for it.
    pub checked: Checked,
    /// By which policy.
    pub template: Arc<Template>,
    /// Its system calls, for Docker.
    pub filter: Arc<str>,
    /// Whether that is of the policies in force.
    pub is_current: bool,
    /// When it came.
    pub received: Instant,
}

/// Runs it; `server` gets word of the start, and what is returned is the last word.
pub async fn run(
    maker: &Arc<Maker>,
    ahead: &Arc<Ahead>,
    task: Task,
    mut stop: mpsc::Receiver<StopCause>,
    seat: &Seat,
    server: &Arc<Server>,
) -> FromLauncher {
    let run = task.launch.run;
    let made = match ahead.take(maker, &task) {
        Some(waited) => Ok(waited),
        None => make_now(maker, &task, &mut stop).await,
    };
    let begun = match made {
        Ok((container, streams)) => Begun::begin(container, streams, task, &mut stop).await,
        Err(refusal) => Err(refusal),
    };
    let begun = match begun {
        Ok(begun) => begun,
        Err(refusal) => return FromLauncher::Refused { run, refusal },
    };
    let (setup, mut begun) = (begun.setup, begun);
    seat.take(&begun.container, begun.listening.take());
    server.tell(&FromLauncher::Started { run, at: SystemTime::now(), setup });
    let ended = begun.follow(&mut stop, seat, server).await;
    match ended {
        Ok(end) => FromLauncher::Ended { run, end: Box::new(end) },
        Err(refusal) => FromLauncher::Refused { run, refusal },
    }
}

/// A container for this call, unless it is stopped before.
async fn make_now(
    maker: &Arc<Maker>,
    task: &Task,
    stop: &mut mpsc::Receiver<StopCause>,
) -> Result<(Container, Streams), Refusal> {
    let maker = Arc::clone(maker);
    let (launch, checked) = (task.launch.clone(), task.checked.clone());
    let (template, filter) = (Arc::clone(&task.template), Arc::clone(&task.filter));
    // To its end in any case: see `make`.
    let making = tokio::spawn(async move {
        maker.make(&template, &filter, &launch, Some(launch.run), &checked).await
    });
    tokio::select! {
        made = making => made.unwrap_or_else(|panic| {
            let why = format!("making the container failed: {panic}");
            Err(Refusal::Docker { why })
        }),
        _ = stop.recv() => Err(Refusal::Ending),
        () = tokio::time::sleep(MAKE_WAIT) => {
            let why = format!("Docker made no container within {} s", MAKE_WAIT.as_secs());
            Err(Refusal::DockerUnavailable { why })
        }
    }
}

/// A program that was started.
struct Begun {
    container: Arc<Container>,
    listening: Option<Listening>,
    streams: Streams,
    task: Task,
    nonce: [u8; NONCE_LEN],
    setup: Duration,
    started: Instant,
    stdout: pipe::Sender,
    stderr: pipe::Sender,
}

/// Why there is nothing more to wait for.
enum Over {
    /// Both records came.
    Told(Record),
    /// Somebody wants it to end.
    Stopped(StopCause),
    /// Init died without them.
    Died,
    /// Docker's connection is at its end, and init lives on.
    Parted,
}

impl Begun {
    /// Gives init the executable, and the program's argv and environment.
    async fn begin(
        container: Container,
        mut streams: Streams,
        task: Task,
        stop: &mut mpsc::Receiver<StopCause>,
    ) -> Result<Self, Refusal> {
        let failed = |step: &str, error: &io::Error| Refusal::Step {
            step: format!("container.{step}"),
            index: 0,
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        };
        let fds = &task.fds;
        let (slot, executable) = (&container.slot, &fds.executable);
        // Of any size, and to a disk.
        tokio::task::block_in_place(|| slot.place(executable, task.launch.executable_size))
            .map_err(|error| failed("executable", &error))?;
        let pipe = |fd: &std::os::fd::OwnedFd| pipe::Sender::from_owned_fd(fd.try_clone()?);
        let stdout = pipe(&fds.stdout).map_err(|error| failed("stdout", &error))?;
        let stderr = pipe(&fds.stderr).map_err(|error| failed("stderr", &error))?;
        let nonce = make::nonce().map_err(|error| failed("nonce", &error))?;
        let message = message(nonce, &task).map_err(|error| failed("call", &error))?;
        if let Some(mut cgroup) = container.cgroup() {
            cgroup.start_measuring().map_err(|error| failed("cgroup", &error))?;
        }
        let deaf = |why: String| Refusal::DockerUnavailable {
            why: format!("the container can't be spoken to: {why}"),
        };
        timeout(SPEAK_WAIT, streams.input.write_all(&message))
            .await
            .map_err(|_| deaf("it takes nothing".to_owned()))?
            .map_err(|error| deaf(error.to_string()))?;
        let listening = match &container.service {
            Some(service) => {
                let until = (Instant::now() + LISTENER_WAIT).min(task.received + BEGIN_WAIT);
                Some(take_listener(&container, service, until, stop).await?)
            }
            None => None,
        };
        let container = Arc::new(container);
        let started = Instant::now();
        let setup = started.saturating_duration_since(task.received);
        Ok(Self { container, listening, streams, task, nonce, setup, started, stdout, stderr })
    }

    /// Follows it to its end.
    async fn follow(
        self,
        stop: &mut mpsc::Receiver<StopCause>,
        seat: &Seat,
        server: &Arc<Server>,
    ) -> Result<End, Refusal> {
        let Self { container, streams, task, nonce, setup, started, stdout, stderr, .. } = self;
        let mut output = Output::new(nonce, stdout, stderr);
        let mut usage = None;
        let wall;
        let over = {
            let (input, source) = (streams.input, &task.fds.stdin);
            let mut feeding = std::pin::pin!(feed(input, source));
            let mut fed = false;
            let mut reading = std::pin::pin!(output.read(streams.output));
            let mut timing = std::pin::pin!(overrun(&container, &task, started));
            let over = loop {
                tokio::select! {
                    () = &mut feeding, if !fed => fed = true,
                    record = &mut reading => match record {
                        Some(record) => break Over::Told(record),
                        // Docker's end of it may come before we see init's.
                        None => match timeout(OUTPUT_WAIT, container.gone()).await {
                            Ok(()) => break Over::Died,
                            Err(_) => break Over::Parted,
                        },
                    },
                    cause = stop.recv() => {
                        break Over::Stopped(cause.unwrap_or(StopCause::Cancelled));
                    }
                    cause = &mut timing => break Over::Stopped(cause),
                    () = container.gone() => {
                        // What it wrote may still be on its way, even its records.
                        match timeout(OUTPUT_WAIT, &mut reading).await {
                            Ok(Some(record)) => break Over::Told(record),
                            _ => break Over::Died,
                        }
                    }
                }
            };
            wall = started.elapsed();
            seat.leave();
            if let Over::Stopped(cause) = over {
                // Before: with its last process Docker removes the cgroups.
                usage = Some(container.usage());
                container.kill();
                // What it wrote before is its caller's, if there is one.
                if cause != StopCause::Cancelled {
                    let _ = timeout(OUTPUT_WAIT, &mut reading).await;
                }
            }
            over
        };
        let run = task.launch.run;
        let closing = Closing { container, task, setup, wall, usage };
        match over {
            Over::Told(Record { verdict: Verdict::NotStarted(errno), .. }) => {
                Err(Refusal::Exec { errno: errno.cast_signed() })
            }
            Over::Told(record) => Ok(closing.told(record)),
            Over::Died => Ok(closing.died().await),
            Over::Stopped(cause) => {
                let end = End { stopped: Some(cause), ..closing.end() };
                Ok(closing.killed(end, run, server).await)
            }
            Over::Parted => {
                let why = "Docker closed its connection to the container".to_owned();
                let end = End { lost: Some(why), ..closing.end() };
                Ok(closing.killed(end, run, server).await)
            }
        }
    }
}

/// A run that is over, to be put into the words of the protocol.
struct Closing {
    container: Arc<Container>,
    task: Task,
    setup: Duration,
    wall: Duration,
    /// From before it was killed.
    usage: Option<Usage>,
}

impl Closing {
    /// As init told. It is the last in its container, and waits: usage is final.
    fn told(self, record: Record) -> End {
        let Verdict::Ended(status) = record.verdict else { return self.end() };
        let status = match (status & 0x7f, status >> 8) {
            (0, code) => WaitStatus::Exited((code & 0xff).cast_signed()),
            (signal, _) => WaitStatus::Signalled(signal.cast_signed()),
        };
        let oom = self.container.cgroup().map_or(Oom::None, |cgroup| cgroup.oom());
        let denied_syscall = record.denied.then(String::new);
        End { status, oom, denied_syscall, ..self.end() }
    }

    /// Somebody else killed init: the kernel for want of memory, or a person.
    async fn died(self) -> End {
        let maker = self.container.maker();
        let state = maker.engine.inspect(&self.container.id).await;
        let state = state.map(|found| found.state.unwrap_or_default());
        let end = self.end();
        match state {
            Ok(state) if state.oom_killed == Some(true) => End { oom: Oom::Own, ..end },
            Ok(_) => End { lost: Some("the container was ended from outside".into()), ..end },
            Err(error) => End { lost: Some(error.to_string()), ..end },
        }
    }

    /// We end it. What can't be killed is waited for beside, and counts until it is gone.
    async fn killed(self, end: End, run: RunId, server: &Arc<Server>) -> End {
        let container = self.container;
        if container.killed_within(TEARDOWN_GRACE).await {
            return end;
        }
        let server = Arc::clone(server);
        tokio::spawn(async move {
            while !container.killed_within(TEARDOWN_GRACE).await {}
            drop(container);
            server.tell(&FromLauncher::Released { run });
        });
        End { quarantined: true, ..end }
    }

    /// What is known of it however it ended.
    fn end(&self) -> End {
        let usage = self.usage.unwrap_or_else(|| self.container.usage());
        let mut enforced = self.container.enforced.clone();
        // It isn't counted of what lives for many calls.
        enforced.retain(|control| *control != Control::CpuTime || !self.task.template.listens);
        enforced.extend(self.task.checked.timeout.map(|_| Control::Timeout));
        End {
            status: WaitStatus::Unknown,
            stopped: None,
            oom: Oom::None,
            denied_syscall: None,
            refused_syscalls: Vec::new(),
            enforced,
            runtime: seat::runtime(&self.task.template),
            lost: None,
            setup: self.setup,
            wall: self.wall,
            user: usage.user,
            system: usage.system,
            memory_peak: usage.memory_peak,
            pids_peak: usage.pids_peak,
            quarantined: false,
        }
    }
}

/// The socket that init listens at, by which it is let go on.
async fn take_listener(
    container: &Container,
    service: &Service,
    until: Instant,
    stop: &mut mpsc::Receiver<StopCause>,
) -> Result<Listening, Refusal> {
    let taken = tokio::select! {
        taken = timeout_at(until.into(), service.take_listener()) => taken,
        _ = stop.recv() => return Err(Refusal::Ending),
        () = container.gone() => {
            let why = "the container's init could make no listening socket for the service: does \
                       the policy's [seccomp] refuse sockets of the Unix family?";
            return Err(Refusal::Docker { why: why.into() });
        }
    };
    match taken {
        Ok(Ok(listening)) => Ok(listening),
        Ok(Err(error)) => {
            let why = format!("the service's listening socket can't be reached: {error}");
            Err(Refusal::Docker { why })
        }
        Err(_) => {
            let why = "the container's init makes no listening socket for the service".to_owned();
            Err(Refusal::DockerUnavailable { why })
        }
    }
}

/// Returns when the run has used up its time: wall clock or CPU. Cancel-safe.
async fn overrun(container: &Container, task: &Task, started: Instant) -> StopCause {
    let wall = async {
        match task.checked.timeout {
            Some(timeout) => sleep_until((started + timeout).into()).await,
            None => std::future::pending().await,
        }
        StopCause::Timeout
    };
    let cpu = async {
        let limit = match task.template.limits.cpu_time {
            Limit::At(limit) if !task.template.listens => limit,
            // A service's is that of many calls.
            _ => return std::future::pending().await,
        };
        let cores = cores(&task.checked);
        loop {
            let used = container.cgroup().map(|cgroup| cgroup.cpu_usage().unwrap_or_default());
            // Nothing of it can be seen: then it wasn't promised either.
            let Some(used) = used.map(|used| used.total()) else { break };
            let left = limit.saturating_sub(used);
            if left.is_zero() {
                return StopCause::CpuTime;
            }
            // It can't be used up any sooner.
            let step = left.div_f64(cores).clamp(CPU_STEP.0, CPU_STEP.1);
            tokio::time::sleep(step).await;
        }
        std::future::pending().await
    };
    tokio::select! {
        cause = wall => cause,
        cause = cpu => cause,
    }
}

/// How many processors' worth of time it can use per second.
fn cores(checked: &Checked) -> f64 {
    let all = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as f64;
    let given = checked.cpus.finite().map_or(all, |cpus| f64::from(cpus.0) / 1000.0);
    given.clamp(0.001, all)
}

/// Both streams, on their way to the server.
struct Output {
    stdout: (Marked, Option<pipe::Sender>),
    stderr: (Marked, Option<pipe::Sender>),
}

impl Output {
    fn new(nonce: [u8; NONCE_LEN], stdout: pipe::Sender, stderr: pipe::Sender) -> Self {
        Self {
            stdout: (Marked::new(nonce), Some(stdout)),
            stderr: (Marked::new(nonce), Some(stderr)),
        }
    }

    /// Passes all on until both have ended with the same record. `None`: without.
    async fn read(
        &mut self,
        mut output: impl tokio_stream::Stream<Item = Result<LogOutput, bollard::errors::Error>> + Unpin,
    ) -> Option<Record> {
        while let Some(Ok(piece)) = output.next().await {
            let ((marked, sender), bytes) = match piece {
                LogOutput::StdOut { message } => (&mut self.stdout, message),
                LogOutput::StdErr { message } => (&mut self.stderr, message),
                LogOutput::StdIn { .. } | LogOutput::Console { .. } => continue,
            };
            pass_on(sender, &marked.take(&bytes)).await;
            let (first, second) = (self.stdout.0.record(), self.stderr.0.record());
            if first.is_some() && first == second {
                return first;
            }
        }
        for (marked, sender) in [&mut self.stdout, &mut self.stderr] {
            pass_on(sender, &marked.rest()).await;
        }
        None
    }
}

/// Writes to the server's pipe, which holds the program up while it is full. Nobody
/// there any more: it is discarded.
async fn pass_on(sender: &mut Option<pipe::Sender>, bytes: &[u8]) {
    if let Some(pipe) = sender
        && pipe.write_all(bytes).await.is_err()
    {
        *sender = None;
    }
}

/// Gives the program its input, and then the end of it. A program that reads none of it,
/// or is gone, is no error.
async fn feed(
    mut input: std::pin::Pin<Box<dyn tokio::io::AsyncWrite + Send>>,
    source: &std::os::fd::OwnedFd,
) {
    let mut piece = vec![0; PIECE];
    let mut offset = 0;
    loop {
        // A sealed memfd: reading it waits for nothing.
        let length = match rustix::io::pread(source, &mut piece[..], offset) {
            Ok(0) => break,
            Ok(length) => length,
            Err(rustix::io::Errno::INTR) => continue,
            // Half of it must not look like the whole.
            Err(_) => return std::future::pending().await,
        };
        if input.write_all(&piece[..length]).await.is_err() {
            return;
        }
        offset += length as u64;
    }
    // The end of its input; the connection itself stays, for its output.
    let _ = input.shutdown().await;
}

/// What init is told: the header, and the strings.
fn message(nonce: [u8; NONCE_LEN], task: &Task) -> io::Result<Vec<u8>> {
    let mut strings = match &task.launch.interpreter {
        Some(interpreter) => interpreter.clone().into_bytes(),
        None => SCRIPT_PATH.as_bytes().to_vec(),
    };
    strings.push(0);
    strings.extend(check::read_call(&task.fds).map_err(io::Error::other)?);
    let header = Header {
        nonce,
        arguments: task.launch.argc,
        environment: task.launch.envc,
        strings_len: u32::try_from(strings.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        listens: task.template.listens,
    };
    let mut message = header.encode().to_vec();
    message.extend_from_slice(&strings);
    Ok(message)
}
