//! The process `dispatch-docker`: started by the monitor where a policy in force uses
//! container mode, as the only one that has Docker's socket.
//!
//! It stands to the server as the launcher does, and believes it no more: every launch is
//! checked against the templates that came from the monitor.

use std::{
    io,
    os::fd::OwnedFd,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;
use tracing::{error, warn};

use super::{
    ahead::Ahead, inventory::Inventory, message::FromMonitor, office::Office, server::Server,
};
use crate::{jail::message::MESSAGE_MAX, observe, packets::Packets, sys};

/// The process's name and argv[0].
pub const NAME: &str = "dispatch-docker";

/// The descriptor that the monitor left us.
const MONITOR: i32 = 3;
/// How long all containers may take to be removed at the end.
const FAREWELL: Duration = Duration::from_secs(8);
/// How long after a sweep that failed, or went well, the next one comes.
const SWEEP_AGAIN: Duration = Duration::from_secs(2);
const SWEEP_LATER: Duration = Duration::from_secs(300);
/// The same while leftovers of our own are likely.
const SWEEP_IN_DOUBT: Duration = Duration::from_secs(10);
/// How often containers that wait for calls are looked through.
const REVIEW: Duration = Duration::from_secs(60);
/// How long a server that is lost has a successor waited for: then the monitor is to start
/// us anew, and to join us with whichever there is.
const SERVER_WAIT: Duration = Duration::from_secs(10);

/// Runs the process to its end: 0 where no container was left.
#[must_use]
pub fn main() -> ExitCode {
    observe::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .thread_name("docker-worker")
        .build();
    let worked = runtime.and_then(|runtime| {
        let (monitor, descriptors) = prepare()?;
        let worked = runtime.block_on(work(monitor, descriptors));
        runtime.shutdown_background();
        worked
    });
    match worked {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            error!(%error, "{NAME} ends");
            ExitCode::FAILURE
        }
    }
}

/// Takes the monitor's descriptor over, and makes this process what it should be. How many
/// descriptors it may have.
fn prepare() -> io::Result<(OwnedFd, u64)> {
    let monitor = sys::take_inherited(MONITOR)?;
    rustix::io::fcntl_setfd(&monitor, rustix::io::FdFlags::CLOEXEC)?;
    // Whoever reads its memory, or its descriptors, has Docker's socket, which is root.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let files = rustix::process::Resource::Nofile;
    let limit = rustix::process::getrlimit(files);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(files, raised)?;
    Ok((monitor, limit.maximum.unwrap_or(u64::MAX)))
}

/// From the configuration to the farewell. Whether nothing was left.
async fn work(monitor: OwnedFd, descriptors: u64) -> io::Result<bool> {
    let monitor = Packets::new(monitor)?;
    let mut buffer = vec![0; MESSAGE_MAX];
    let Some((FromMonitor::Configure(config), _)) = hear(&monitor, &mut buffer).await? else {
        return Err(io::Error::other("the monitor's first message was no configuration"));
    };
    let office = Arc::new(Office::open(config, descriptors)?);
    let sweeping = tokio::spawn(sweep(Arc::clone(office.maker().inventory())));
    let reviewing = tokio::spawn(review(Arc::clone(office.ahead())));
    let mut serving = None;
    let heard = listen(&monitor, &mut buffer, &office, &mut serving).await;
    // Whatever ended it, no container stays.
    office.maker().close();
    sweeping.abort();
    reviewing.abort();
    office.ahead().review(|_| false);
    if let Some(serving) = serving {
        serving.abort();
    }
    office.stop_all();
    let removed = tokio::time::timeout(FAREWELL, office.maker().all_removed()).await;
    heard.map(|()| removed.unwrap_or(false))
}

/// The conversation with the monitor, until it is at its end or we aren't needed.
async fn listen(
    monitor: &Packets,
    buffer: &mut [u8],
    office: &Arc<Office>,
    serving: &mut Option<JoinHandle<()>>,
) -> io::Result<()> {
    let mut alone_since: Option<Instant> = None;
    loop {
        let is_alone = serving.as_ref().is_some_and(JoinHandle::is_finished);
        if !is_alone {
            alone_since = None;
        }
        let since = *alone_since.get_or_insert_with(Instant::now);
        if is_alone && since.elapsed() >= SERVER_WAIT {
            warn!("no server came after the one that was lost");
            return Ok(());
        }
        let heard = tokio::select! {
            heard = hear(monitor, buffer) => heard?,
            () = office.unneeded() => None,
            () = tokio::time::sleep(SERVER_WAIT) => continue,
        };
        let Some((message, descriptors)) = heard else { return Ok(()) };
        match (message, descriptors.into_iter().next()) {
            (FromMonitor::Policies, Some(memory)) => office.load(memory)?,
            (FromMonitor::Server, Some(socket)) => {
                if let Some(earlier) = serving.take() {
                    earlier.abort();
                    // Ended for certain: it begins nothing any more.
                    let _ = earlier.await;
                }
                office.stop_all();
                let server = Server::open(socket)?;
                *serving = Some(tokio::spawn(Arc::clone(office).serve(server)));
            }
            (other, _) => warn!("unexpected from the monitor: {other:?}"),
        }
    }
}

async fn hear(
    monitor: &Packets,
    buffer: &mut [u8],
) -> io::Result<Option<(FromMonitor, Vec<OwnedFd>)>> {
    let received = match monitor.receive(buffer).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
        received => received?,
    };
    let Some((length, descriptors)) = received else { return Ok(None) };
    let message = postcard::from_bytes(&buffer[..length]).map_err(io::Error::other)?;
    Ok(Some((message, descriptors)))
}

/// Removes what dead dispatchers left: at the start, as soon as Docker can be asked, and
/// now and then, as others die. The same of our own that Docker made too late.
async fn sweep(inventory: Arc<Inventory>) {
    let mut told = false;
    loop {
        let swept = inventory.sweep().await;
        if let (Err(error), false) = (&swept, told) {
            warn!("containers that were left, if any, can't be removed yet: {error}");
        }
        told = swept.is_err();
        if told {
            tokio::time::sleep(SWEEP_AGAIN).await;
        } else if inventory.is_in_doubt() {
            tokio::time::sleep(SWEEP_IN_DOUBT).await;
        } else {
            // Either is a reason to look.
            let _ = tokio::time::timeout(SWEEP_LATER, inventory.doubted()).await;
        }
    }
}

/// Lets go of what waits for calls that don't come any more.
async fn review(ahead: Arc<Ahead>) {
    let mut ticks = tokio::time::interval(REVIEW);
    loop {
        ticks.tick().await;
        ahead.review(|_| true);
    }
}
