//! Calls that come several at a time, so that the jails among them are what calls get in
//! earnest: built ahead, of what earlier runs had. And the proof that they are.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use dispatcher::{names::Digest, wire::serve_request::ServiceDef};
use nix::time::{ClockId, clock_gettime};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use super::{Call, Dispatcher, Facts, Reply, client, dispatcher::Running, programs, slowness};

/// Calls at a time, and how many each of these is followed by.
const TOGETHER: usize = 3;
const FOLLOWED_BY: usize = 3;
/// Calls that are made for one of the wanted kind, and within one crowd.
const TRIES: usize = 64;
const TRIES_EACH: usize = 4;
/// The kernel says in these when a process was made.
const TICK: Duration = Duration::from_millis(10);

/// Since the host was booted, as the kernel counts for a process's start.
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap().into()
}

/// By what a program says its jail is known: `marks` of probe.h.
#[derive(Clone, Debug)]
pub struct Marks {
    /// The cookie of its network namespace.
    pub network: u64,
    /// The number of its root's file system.
    pub root: String,
    begun: Duration,
}

impl Marks {
    #[track_caller]
    pub fn of(facts: &Facts) -> Self {
        Self {
            network: facts.number("network"),
            root: facts.one("root").to_owned(),
            begun: Duration::from_millis(facts.number("begun")),
        }
    }

    /// Whether the process that became the program was there at that moment.
    pub fn begun_before(&self, moment: Duration) -> bool {
        self.begun + TICK <= moment
    }
}

/// A reply, and by what its jail was known.
#[derive(Debug)]
pub struct Marked {
    pub reply: Reply,
    pub marks: Marks,
    /// When the call was sent, [`since_boot`].
    pub sent: Duration,
}

impl Marked {
    /// Whether its jail was there before its call.
    pub fn was_ahead(&self) -> bool {
        self.marks.begun_before(self.sent)
    }

    /// Whether its network namespace was that of a run whose reply came before this call.
    pub fn is_again(&self) -> bool {
        let known = NETWORKS.lock().unwrap();
        known
            .as_ref()
            .and_then(|known| known.get(&self.marks.network))
            .is_some_and(|first| *first < self.sent)
    }
}

/// The first reply out of each network namespace, of any dispatcher of these tests.
static NETWORKS: Mutex<Option<HashMap<u64, Duration>>> = Mutex::new(None);

fn note(marks: &Marks) {
    let mut known = NETWORKS.lock().unwrap();
    known.get_or_insert_default().entry(marks.network).or_insert_with(since_boot);
}

/// A call of the program `attack`, which tells its marks first. By its digest, where the
/// dispatcher holds it: most of such a call's time would be its bytes'.
async fn send(call: Call, channel: Channel) -> Result<Reply, tonic::Status> {
    static DIGEST: OnceLock<String> = OnceLock::new();
    let digest = DIGEST.get_or_init(|| Digest::of(&programs::bytes("attack")).to_string());
    let short = call
        .clone()
        .with(|request| request.service_def = Some(ServiceDef::ServiceUri(digest.clone())));
    let reply = short.send(channel.clone()).await?;
    if reply.reason() == "artifact_missing" { call.send(channel).await } else { Ok(reply) }
}

fn marked(namespace: &str, args: &[&str]) -> Call {
    Call::new(namespace, "attack").args(&[&["marked"], args].concat())
}

/// Begins an attack that tells its marks.
pub fn begin(dispatcher: &Dispatcher, namespace: &str, args: &[&str]) -> Running {
    Running(client::runtime().spawn(send(marked(namespace, args), dispatcher.channel())))
}

/// Short calls that do no harm: some at a time until it is dropped, and not for long. None
/// on a slow machine, which has enough to do.
pub struct Crowd {
    is_over: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Crowd {
    /// Of the policy `jail`, whose runs have to be alone: what is used again goes from policy to
    /// policy. It need be no other's: for a busy policy many jails are built, which takes time.
    pub fn of(dispatcher: &Dispatcher) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let count = if slowness() > 1.0 { 0 } else { TOGETHER };
        let task = |_| {
            let (call, channel) = (marked("jail", &["nothing"]), dispatcher.channel());
            let is_over = Arc::clone(&is_over);
            client::runtime().spawn(async move {
                for _ in 0..=FOLLOWED_BY {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    let reply = send(call.clone(), channel.clone()).await.unwrap().ok();
                    note(&Marks::of(&reply.facts()));
                }
            })
        };
        let tasks = (0..count).map(task).collect();
        Self { is_over, tasks }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for task in self.tasks.drain(..) {
            let ended = client::runtime().block_on(task);
            assert!(ended.is_ok() || thread::panicking(), "a harmless call failed: {ended:?}");
        }
    }
}

/// Makes an attack until one was `wanted`; in a crowd, where that was none of the first. Gives
/// the replies to all of them. On a slow machine it is made once.
#[track_caller]
pub fn among_others(
    dispatcher: &Dispatcher,
    namespace: &str,
    args: &[&str],
    wanted: impl Fn(&Marked) -> bool,
) -> Vec<Reply> {
    let mut all: Vec<Marked> = vec![];
    while all.len() < TRIES {
        let _crowd = (!all.is_empty()).then(|| Crowd::of(dispatcher));
        for _ in 0..TRIES_EACH {
            let sent = since_boot();
            let reply = begin(dispatcher, namespace, args).finish().unwrap().ok();
            let marked = Marked { marks: Marks::of(&reply.facts()), reply, sent };
            let found = wanted(&marked);
            note(&marked.marks);
            all.push(marked);
            if found || slowness() > 1.0 {
                return all.into_iter().map(|marked| marked.reply).collect();
            }
        }
    }
    let all: Vec<_> = all.iter().map(|marked| (marked.sent, &marked.marks)).collect();
    panic!("{args:?} in {namespace}: not once as wanted in {TRIES} calls: {all:?}");
}
