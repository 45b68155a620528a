//! The process `dispatch-serve`: started by the monitor, which speaks to it over
//! descriptor 3 and whose end is its own.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    pin::pin,
    process::ExitCode,
    sync::Arc,
};

use tokio::sync::oneshot;
use tracing::{debug, error, info, warn};

use super::{
    Listeners, ServeError,
    listen::Listener,
    message::{FromMonitor, FromServer},
    run,
};
use crate::{
    config::Config,
    execute::{Executors, launcher::Launcher},
    observe,
    packets::Packets,
    policy::{PolicySet, store::PolicyStore},
    sys,
};

/// The descriptor that the monitor passes on.
const MONITOR: i32 = 3;

/// Bytes of one message from the monitor.
const MESSAGE_MAX: usize = 128 << 10;

/// Bytes of a compiled policy set.
const POLICIES_MAX: u64 = 256 << 20;

/// Threads that may block at once: hashing and copying of large executables.
const BLOCKING_THREADS: usize = 8;

/// Why the process ends other than well.
#[derive(Debug, thiserror::Error)]
enum ProcessError {
    #[error("{what}")]
    Setup { what: &'static str, source: io::Error },
    #[error("the monitor's message is not understood")]
    Message(#[from] postcard::Error),
    #[error("the monitor sent {0}")]
    Protocol(&'static str),
    #[error(transparent)]
    Serve(#[from] ServeError),
}

fn setup(what: &'static str) -> impl FnOnce(io::Error) -> ProcessError {
    move |source| ProcessError::Setup { what, source }
}

/// Runs the process to its end: 0 after an orderly drain.
///
/// Descriptor 3 must be the server's end of a SOCK_SEQPACKET pair with the
/// monitor. When the monitor closes its end, this process ends at once.
#[must_use]
pub fn main() -> ExitCode {
    observe::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers())
        .enable_all()
        .thread_name("serve-worker")
        .max_blocking_threads(BLOCKING_THREADS)
        .build();
    let served = match runtime {
        Ok(runtime) => {
            let served = prepare().and_then(|monitor| runtime.block_on(serve(monitor)));
            // What still blocks is not waited for.
            runtime.shutdown_background();
            served
        }
        Err(error) => Err(setup("the runtime could not be started")(error)),
    };
    match served {
        Ok(Ended::Drained) => ExitCode::SUCCESS,
        Ok(Ended::MonitorGone) => {
            warn!("the monitor is gone");
            ExitCode::FAILURE
        }
        Err(error) => {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            error!(%error, cause = source.unwrap_or_default(), "dispatch-serve ends");
            ExitCode::FAILURE
        }
    }
}

/// Threads that serve. Half of the processors are for what is run; and where there are few, to
/// wake a thread costs more than it brings.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| (processors.get() / 2).max(1))
}

/// How an orderly end came about.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Drained,
    MonitorGone,
}

/// Takes the monitor's descriptor over, and makes this process what it should be.
fn prepare() -> Result<OwnedFd, ProcessError> {
    let monitor = sys::take_inherited(MONITOR)
        .map_err(setup("descriptor 3, the monitor's, can't be used"))?;
    let close_on_exec = rustix::io::FdFlags::CLOEXEC;
    rustix::io::fcntl_setfd(&monitor, close_on_exec)
        .map_err(|error| setup("descriptor 3, the monitor's, can't be used")(error.into()))?;
    // Tenants' programs and inputs pass through this memory: no core file of it,
    // and no other process of the same user reads it.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .map_err(|error| setup("the process can't be made undumpable")(error.into()))?;
    // Each run takes a handful of descriptors, each connection one.
    let files = rustix::process::Resource::Nofile;
    let limit = rustix::process::getrlimit(files);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(files, raised)
        .map_err(|error| setup("the limit of open files can't be raised")(error.into()))?;
    Ok(monitor)
}

async fn serve(socket: OwnedFd) -> Result<Ended, ProcessError> {
    let mut monitor = Monitor::new(socket)?;
    let executors = Executors::default();
    let Start { config, listeners, policies } = match configured(&mut monitor, &executors).await? {
        Begin::Serving(start) => *start,
        Begin::Ended(ended) => return Ok(ended),
    };
    let (shut_down, shutdown) = oneshot::channel();
    let mut served =
        pin!(run(listeners, &config, Arc::clone(&policies), executors.clone(), async {
            // An error means that the sender is gone, and with it the monitor.
            let _ = shutdown.await;
        }));
    let mut shut_down = Some(shut_down);
    let launcher = &executors.launcher;
    let mut ready = pin!(launcher.ready());
    let mut lost = pin!(launcher.lost());
    let mut announced = false;
    loop {
        tokio::select! {
            served = &mut served => {
                served?;
                return Ok(Ended::Drained);
            }
            () = &mut ready, if !announced => {
                announced = true;
                monitor.send(&FromServer::Ready).await?;
            }
            () = &mut lost => {
                monitor.send(&FromServer::LauncherLost).await?;
                lost.set(launcher.lost());
            }
            message = monitor.next() => match message? {
                None => return Ok(Ended::MonitorGone),
                Some((FromMonitor::Configure { .. }, _)) => {
                    return Err(ProcessError::Protocol("a second configuration"));
                }
                Some((FromMonitor::Policies, descriptors)) => {
                    take_up(&policies, descriptors);
                    executors.policies_changed();
                }
                Some((FromMonitor::Launcher, descriptors)) => attach(launcher, descriptors)?,
                Some((FromMonitor::Containers, descriptors)) => {
                    attach(&executors.containers, descriptors)?;
                }
                Some((FromMonitor::Drain, _)) => match shut_down.take() {
                    Some(shut_down) => drop(shut_down.send(())),
                    None => debug!("draining already"),
                },
            },
        }
    }
}

/// All that is needed to begin.
struct Start {
    config: Box<Config>,
    listeners: Listeners,
    policies: Arc<PolicyStore>,
}

/// What the monitor wanted first.
enum Begin {
    Serving(Box<Start>),
    Ended(Ended),
}

/// Collects the configuration and the policies.
async fn configured(monitor: &mut Monitor, executors: &Executors) -> Result<Begin, ProcessError> {
    let mut configuration = None;
    let mut policies = None;
    loop {
        let Some((message, descriptors)) = monitor.next().await? else {
            return Ok(Begin::Ended(Ended::MonitorGone));
        };
        match message {
            FromMonitor::Configure { config, listeners: addresses, health } => {
                let mut sockets = descriptors.into_iter();
                let mut listeners = Listeners::default();
                for address in &addresses {
                    listeners.service.push(listener(sockets.next(), address)?);
                }
                if let (true, Some(address)) = (health, &config.health_listen) {
                    listeners.health = Some(listener(sockets.next(), address)?);
                }
                configuration = Some((config, listeners));
            }
            FromMonitor::Policies => {
                policies = Some(decode_policies(descriptors).map_err(|error| {
                    setup("the policies can't be read")(io::Error::other(error))
                })?);
            }
            FromMonitor::Launcher => attach(&executors.launcher, descriptors)?,
            FromMonitor::Containers => attach(&executors.containers, descriptors)?,
            FromMonitor::Drain => return Ok(Begin::Ended(Ended::Drained)),
        }
        match (configuration.take(), policies.take()) {
            (Some((config, listeners)), Some(policies)) => {
                let policies = Arc::new(PolicyStore::new(policies));
                return Ok(Begin::Serving(Box::new(Start { config, listeners, policies })));
            }
            (first, second) => (configuration, policies) = (first, second),
        }
    }
}

fn listener(
    socket: Option<OwnedFd>,
    address: &crate::config::ListenAddress,
) -> Result<Listener, ProcessError> {
    let socket = socket.ok_or(ProcessError::Protocol("fewer sockets than addresses"))?;
    Listener::from_fd(socket, address).map_err(setup("a listening socket can't be used"))
}

fn attach(launcher: &Launcher, descriptors: Vec<OwnedFd>) -> Result<(), ProcessError> {
    let socket = descriptors.into_iter().next();
    let socket = socket.ok_or(ProcessError::Protocol("a launcher without its socket"))?;
    launcher.attach(socket).map_err(setup("the launcher's socket can't be used"))
}

/// Puts newer policies in force; what can't be read changes nothing.
fn take_up(policies: &PolicyStore, descriptors: Vec<OwnedFd>) {
    match decode_policies(descriptors) {
        Ok(set) => {
            info!(policy_set = %set.digest, "policies reloaded");
            policies.replace(set);
        }
        Err(error) => error!(%error, "the new policies can't be read; the old ones stay"),
    }
}

fn decode_policies(descriptors: Vec<OwnedFd>) -> Result<PolicySet, String> {
    let memory = descriptors.into_iter().next().ok_or("no descriptor came with them")?;
    let mut bytes = Vec::new();
    let read = File::from(memory).take(POLICIES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|error| error.to_string())?;
    if bytes.len() as u64 > POLICIES_MAX {
        return Err(format!("they have more than {POLICIES_MAX} bytes"));
    }
    postcard::from_bytes(&bytes).map_err(|error| error.to_string())
}

/// The conversation with the monitor.
struct Monitor {
    socket: Packets,
    buffer: Vec<u8>,
}

impl Monitor {
    fn new(socket: OwnedFd) -> Result<Self, ProcessError> {
        let unusable = setup("descriptor 3, the monitor's, can't be used");
        let socket = Packets::new(socket).map_err(unusable)?;
        Ok(Self { socket, buffer: vec![0; MESSAGE_MAX] })
    }

    /// The next message; `None` when the monitor is gone. Cancel-safe.
    async fn next(&mut self) -> Result<Option<(FromMonitor, Vec<OwnedFd>)>, ProcessError> {
        let received = self.socket.receive(&mut self.buffer).await;
        match received {
            Ok(None) => Ok(None),
            Ok(Some((length, descriptors))) => {
                let message = postcard::from_bytes(&self.buffer[..length])?;
                Ok(Some((message, descriptors)))
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(setup("listening to the monitor failed")(error)),
        }
    }

    async fn send(&self, message: &FromServer) -> Result<(), ProcessError> {
        let bytes = postcard::to_stdvec(message)?;
        self.socket.send(&bytes, &[]).await.map_err(setup("answering the monitor failed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::ListenAddress,
        execute::fake::{Behaviour, FakeLauncher},
        jail::message::FromLauncher,
        testing,
    };
    use std::os::fd::AsFd as _;

    /// The monitor's side.
    struct Bench {
        monitor: OwnedFd,
        served: tokio::task::JoinHandle<Result<Ended, ProcessError>>,
    }

    impl Bench {
        fn start() -> Self {
            let (monitor, socket) = sys::seqpacket_pair().unwrap();
            Self { monitor, served: tokio::spawn(serve(socket)) }
        }

        fn tell(&self, message: &FromMonitor, descriptors: &[std::os::fd::BorrowedFd<'_>]) {
            let bytes = postcard::to_stdvec(message).unwrap();
            sys::send_packet(&self.monitor, &bytes, descriptors).unwrap();
        }

        /// Waits on a thread of its own, as the socket blocks.
        async fn hear(&self) -> FromServer {
            let monitor = self.monitor.try_clone().unwrap();
            let heard = tokio::task::spawn_blocking(move || {
                let mut buffer = [0; 256];
                let (length, _) = sys::receive_packet(&monitor, &mut buffer).unwrap().unwrap();
                postcard::from_bytes(&buffer[..length]).unwrap()
            });
            heard.await.unwrap()
        }

        fn configure(&self) -> ListenAddress {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let address = ListenAddress::Tcp { host: "127.0.0.1".into(), port };
            let configure = FromMonitor::Configure {
                config: Box::new(testing::config()),
                listeners: vec![address.clone()],
                health: false,
            };
            self.tell(&configure, &[listener.as_fd()]);
            address
        }

        fn policies(&self, bytes: &[u8]) {
            let memory = sys::sealed_memfd(c"policies", &[bytes], false).unwrap();
            self.tell(&FromMonitor::Policies, &[memory.as_fd()]);
        }
    }

    fn compiled() -> Vec<u8> {
        postcard::to_stdvec(&testing::policy_set([testing::policy("default")])).unwrap()
    }

    #[tokio::test]
    async fn it_is_ready_once_all_is_there_and_drains_when_told() {
        let bench = Bench::start();
        bench.configure();
        bench.policies(&compiled());
        let (ours, theirs) = sys::seqpacket_pair().unwrap();
        bench.tell(&FromMonitor::Launcher, &[theirs.as_fd()]);
        let ready = FromLauncher::Ready { policy_set: crate::names::Digest::of(b"") };
        sys::send_packet(&ours, &postcard::to_stdvec(&ready).unwrap(), &[]).unwrap();
        assert_eq!(bench.hear().await, FromServer::Ready);
        bench.policies(b"not policies at all");
        bench.policies(&compiled());
        bench.tell(&FromMonitor::Drain, &[]);
        bench.tell(&FromMonitor::Drain, &[]);
        assert_eq!(bench.served.await.unwrap().unwrap(), Ended::Drained);
    }

    #[tokio::test]
    async fn it_asks_for_a_launcher_that_it_has_lost() {
        let bench = Bench::start();
        bench.configure();
        bench.policies(&compiled());
        let join = || {
            let (ours, theirs) = sys::seqpacket_pair().unwrap();
            bench.tell(&FromMonitor::Launcher, &[theirs.as_fd()]);
            let ready = FromLauncher::Ready { policy_set: crate::names::Digest::of(b"") };
            sys::send_packet(&ours, &postcard::to_stdvec(&ready).unwrap(), &[]).unwrap();
            ours
        };
        let first = join();
        assert_eq!(bench.hear().await, FromServer::Ready);
        drop(first);
        assert_eq!(bench.hear().await, FromServer::LauncherLost);
        assert_eq!(bench.hear().await, FromServer::LauncherLost, "until there is one");
        let _second = join();
        bench.tell(&FromMonitor::Drain, &[]);
        assert_eq!(bench.served.await.unwrap().unwrap(), Ended::Drained);
    }

    #[tokio::test]
    async fn the_monitors_end_is_its_end() {
        let early = Bench::start();
        drop(early.monitor);
        assert_eq!(early.served.await.unwrap().unwrap(), Ended::MonitorGone);

        let bench = Bench::start();
        bench.configure();
        bench.policies(&compiled());
        drop(bench.monitor);
        assert_eq!(bench.served.await.unwrap().unwrap(), Ended::MonitorGone);
    }

    #[tokio::test]
    async fn what_it_cannot_begin_with_ends_it() {
        let bench = Bench::start();
        bench.policies(b"");
        assert!(matches!(bench.served.await.unwrap(), Err(ProcessError::Setup { .. })));
        let bench = Bench::start();
        bench.tell(&FromMonitor::Launcher, &[]);
        assert!(matches!(bench.served.await.unwrap(), Err(ProcessError::Protocol(_))));
        let bench = Bench::start();
        sys::send_packet(&bench.monitor, &[255; 9], &[]).unwrap();
        assert!(matches!(bench.served.await.unwrap(), Err(ProcessError::Message(_))));
    }

    #[tokio::test]
    async fn it_is_not_ready_without_a_launcher() {
        let launcher = Launcher::new();
        let mut ready = Box::pin(launcher.ready());
        let moment = std::time::Duration::ZERO;
        assert!(tokio::time::timeout(moment, &mut ready).await.is_err());
        let set = crate::names::Digest::of(b"");
        let _fake = FakeLauncher::attach(&launcher, set, |_| Behaviour::Wait);
        ready.await;
    }
}
