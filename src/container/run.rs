//! One run in a container: from the launch to its end.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    io::AsyncWriteExt as _,
    net::unix::pipe,
    sync::mpsc,
    time::{sleep_until, timeout, timeout_at},
};
use tracing::debug;

use super::{
    ahead::Ahead,
    engine::Streams,
    flow::{Output, feed},
    make::{self, Container, Maker, Order},
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
/// How long Docker may take to say how a container ended.
const INSPECT_WAIT: Duration = Duration::from_secs(2);
/// Least and most time between two looks at the CPU time.
const CPU_STEP: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(60));

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
    let begun = match begin(maker, ahead, task, &mut stop).await {
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

/// Has the program started, in a container that waited for it or in one of its own.
async fn begin(
    maker: &Arc<Maker>,
    ahead: &Arc<Ahead>,
    task: Task,
    stop: &mut mpsc::Receiver<StopCause>,
) -> Result<Begun, Refusal> {
    if let Some((container, mut streams)) = ahead.take(maker, &task) {
        match tell(&container, &mut streams, &task).await {
            Ok(nonce) => return Begun::begin(container, streams, task, nonce, stop).await,
            // Docker was away since, and all that were made before have lost their streams.
            // Init has not been told all, so that the program was not begun.
            Err(Untold::Deaf(why)) => {
                debug!(why, %task.launch.run, "a container made ahead can't be spoken to");
                ahead.empty();
            }
            Err(Untold::Refused(refusal)) => return Err(refusal),
        }
    }
    let (container, mut streams) = make_now(maker, &task, stop).await?;
    let nonce = tell(&container, &mut streams, &task).await.map_err(|untold| match untold {
        Untold::Deaf(why) => Refusal::DockerUnavailable {
            why: format!("the container can't be spoken to: {why}; {}", make::ADVICE),
        },
        Untold::Refused(refusal) => refusal,
    })?;
    Begun::begin(container, streams, task, nonce, stop).await
}

/// A container for this call, unless it is stopped before.
async fn make_now(
    maker: &Arc<Maker>,
    task: &Task,
    stop: &mut mpsc::Receiver<StopCause>,
) -> Result<(Container, Streams), Refusal> {
    let order = Order {
        launch: task.launch.clone(),
        run: Some(task.launch.run),
        template: Arc::clone(&task.template),
        filter: Arc::clone(&task.filter),
        checked: task.checked.clone(),
    };
    let mut late = std::pin::pin!(sleep_until((task.received + MAKE_WAIT).into()));
    let too_late = || {
        let seconds = MAKE_WAIT.as_secs();
        let why = format!("Docker made no container within {seconds} s; {}", make::ADVICE);
        Refusal::DockerUnavailable { why }
    };
    let ready = tokio::select! {
        ready = maker.prepare(order) => ready?,
        _ = stop.recv() => return Err(Refusal::Ending),
        () = &mut late => return Err(too_late()),
    };
    // To its end in any case: see `make`.
    let mut making = {
        let maker = Arc::clone(maker);
        tokio::spawn(async move { maker.make(ready).await })
    };
    let refusal = tokio::select! {
        made = &mut making => return made.unwrap_or_else(|panic| {
            let why = format!("making the container failed: {panic}");
            Err(Refusal::Docker { why })
        }),
        _ = stop.recv() => Refusal::Ending,
        () = &mut late => too_late(),
    };
    let forsaken = maker.queue().forsake(&task.launch.namespace);
    tokio::spawn(async move {
        drop(making.await);
        drop(forsaken);
    });
    Err(refusal)
}

/// Why init wasn't told its program.
enum Untold {
    /// Docker doesn't pass on what is said to it.
    Deaf(String),
    /// It can't be said.
    Refused(Refusal),
}

/// Gives init the executable, and the program's argv and environment: the nonce by which
/// it answers.
async fn tell(
    container: &Container,
    streams: &mut Streams,
    task: &Task,
) -> Result<[u8; NONCE_LEN], Untold> {
    let failed = |step: &str, error: &io::Error| Untold::Refused(make::step(step, error));
    let (slot, executable) = (&container.slot, &task.fds.executable);
    // Of any size, and to a disk.
    tokio::task::block_in_place(|| slot.place(executable, task.launch.executable_size))
        .map_err(|error| Untold::Refused(make::unplaced("executable", &error)))?;
    let nonce = make::nonce().map_err(|error| failed("nonce", &error))?;
    let message = message(nonce, task).map_err(|error| failed("call", &error))?;
    if let Some(mut cgroup) = container.cgroup() {
        cgroup.start_measuring().map_err(|error| failed("cgroup", &error))?;
    }
    timeout(SPEAK_WAIT, streams.input.write_all(&message))
        .await
        .map_err(|_| Untold::Deaf("it takes nothing".to_owned()))?
        .map_err(|error| Untold::Deaf(error.to_string()))?;
    Ok(nonce)
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
    /// Follows init, which was told everything, to the program's start.
    async fn begin(
        container: Container,
        streams: Streams,
        task: Task,
        nonce: [u8; NONCE_LEN],
        stop: &mut mpsc::Receiver<StopCause>,
    ) -> Result<Self, Refusal> {
        let pipe = |fd: &std::os::fd::OwnedFd| pipe::Sender::from_owned_fd(fd.try_clone()?);
        let stdout = pipe(&task.fds.stdout).map_err(|error| make::step("stdout", &error))?;
        let stderr = pipe(&task.fds.stderr).map_err(|error| make::step("stderr", &error))?;
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
        let (mut usage, mut oom) = (None, Oom::None);
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
                            Ok(()) => {
                                (usage, oom) = container.last_counts();
                                break Over::Died;
                            }
                            Err(_) => break Over::Parted,
                        },
                    },
                    cause = stop.recv() => {
                        break Over::Stopped(cause.unwrap_or(StopCause::Cancelled));
                    }
                    cause = &mut timing => break Over::Stopped(cause),
                    () = container.gone() => {
                        // At once: with its last process Docker removes the cgroups.
                        (usage, oom) = container.last_counts();
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
        let closing = Closing { container, task, setup, wall, usage, oom };
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
                let why = "Docker closed its connection to the container: was it restarted? See \
                           its log, and send the call again"
                    .to_owned();
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
    /// From before it was killed, or right after it died.
    usage: Option<Usage>,
    /// The same, of one that died.
    oom: Oom,
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
        let end = self.end();
        if self.oom != Oom::None {
            return End { oom: self.oom, ..end };
        }
        let asked = self.container.engine().inspect(&self.container.id);
        let lost = match timeout(INSPECT_WAIT, asked).await {
            Ok(Ok(found)) => {
                if found.state.is_some_and(|state| state.oom_killed == Some(true)) {
                    return End { oom: Oom::Own, ..end };
                }
                "the container was ended from outside: Docker's log, or `docker events`, may tell by \
                 whom"
                    .to_owned()
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "Docker doesn't say how the container ended: see its log".to_owned(),
        };
        End { lost: Some(lost), ..end }
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
            let why = format!(
                "the container's init made no listening socket for the service in time; {}",
                make::ADVICE
            );
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

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::sync::Notify;

    use super::*;
    use crate::container::fake::{Answer, FakeDocker, until};

    fn task(namespace: &str) -> Task {
        let Order { launch, template, filter, checked, .. } = Order::of(namespace);
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        let fds = LaunchFds::of((0..5).map(|_| null()).collect()).unwrap();
        Task { launch, fds, checked, template, filter, is_current: true, received: Instant::now() }
    }

    /// Who goes away is answered at once, and until Docker is done with what it was asked
    /// for, the next of the same namespace waits.
    #[tokio::test]
    async fn what_is_made_for_nobody_counts_until_it_is_over() {
        let go_on = Arc::new(Notify::new());
        let docker = {
            let go_on = Arc::clone(&go_on);
            FakeDocker::start(move |asked, _| match &*asked.what {
                "POST /containers/create" => {
                    Answer::After(Arc::clone(&go_on), 500, json!({ "message": "too late" }))
                }
                what if what.starts_with("DELETE ") => Answer::Now(404, json!({ "message": "" })),
                _ => Answer::Now(200, json!({})),
            })
        };
        let maker = docker.patient_maker();
        let creates = || docker.asked("POST /containers/create").len();
        let (stop, mut stopped) = mpsc::channel(4);
        let first = task("a");
        let mut making = std::pin::pin!(make_now(&maker, &first, &mut stopped));
        tokio::select! {
            _ = &mut making => panic!("it isn't made yet"),
            () = until("it is being made", || creates() == 1) => {}
        }
        stop.try_send(StopCause::Cancelled).unwrap();
        let answered = timeout(Duration::from_secs(20), making).await.expect("an answer at once");
        assert_eq!(answered.err(), Some(Refusal::Ending));

        let (_stop, mut stopped) = mpsc::channel(4);
        let second = task("a");
        let mut making = std::pin::pin!(make_now(&maker, &second, &mut stopped));
        let other = task("b");
        let (_stop, mut stopped) = mpsc::channel(4);
        let mut others = std::pin::pin!(make_now(&maker, &other, &mut stopped));
        tokio::select! {
            _ = &mut making => panic!("it isn't made yet"),
            _ = &mut others => panic!("it isn't made yet"),
            () = until("another namespace's is being made", || creates() == 2) => {}
        }
        go_on.notify_waiters();
        tokio::select! {
            _ = &mut making => panic!("it isn't made yet"),
            () = until("its turn came", || creates() == 3) => {}
        }
        go_on.notify_waiters();
        let refused = timeout(Duration::from_secs(20), making).await.unwrap().err();
        assert!(matches!(refused, Some(Refusal::Docker { .. })), "{refused:?}");
    }
}
