//! What a jail has of earlier ones tells nothing of them.
//!
//! Jails are built ahead, and of what earlier ones had some is used again where calls
//! come thick. So everything here happens many times over and many at once.

mod common;

use std::{collections::BTreeSet, time::Duration};

use common::{
    Call, Dispatcher, Facts, Reply,
    dispatcher::{Running, plain},
    not_here, programs, rootless, scaled_ms, slowness, wait_until,
};

/// Calls at once.
const CROWD: usize = 24;
/// How often; less where it takes long.
fn rounds() -> usize {
    ((6.0 / slowness()) as usize).max(2)
}

const TABLES: &str = "[limits]\nmemory = \"128MiB\"\n\
    [admission]\nconcurrency = 64\nqueue = \"unlimited\"\nqueue_timeout = \"5m\"\n";

/// Takes away what is left outside by the proof that it would be found.
struct Cleaned(String);

impl Drop for Cleaned {
    fn drop(&mut self) {
        programs::outside("leave", &["clean", &self.0]);
    }
}

/// Makes as many calls at once, and gives their replies in order.
fn crowd(dispatcher: &Dispatcher, call: impl Fn(usize) -> Call) -> Vec<Reply> {
    let running: Vec<_> = (0..CROWD).map(|index| dispatcher.begin(call(index))).collect();
    running.into_iter().map(|running| running.finish().unwrap()).collect()
}

fn leave(what: &str, key: u32) -> Call {
    Call::new("jail", "leave").args(&[what, &key.to_string()])
}

/// Objects of System V, files, locks on what a root always has, listening sockets: also
/// those that were on their way in a socket when their run ended.
#[test]
fn nothing_that_runs_leave_is_found_by_others() {
    let key = std::process::id();
    let text = key.to_string();
    let _cleaned = Cleaned(text.clone());
    // All is told before anybody looks: who looks takes the locks for a moment as well.
    let program = programs::path("leave");
    let (held, told) = programs::background_telling(&program, &["hold", &text], "itself");
    for made in ["shm", "file", "lock.null", "lock.root", "abstract", "itself"] {
        assert_eq!(told.one(made), "ok", "{made} outside");
    }
    let found = programs::outside("leave", &["look", &text]).facts();
    for what in ["shm", "file", "abstract"] {
        assert_eq!(found.one(what), "ok", "{what} is found outside");
    }
    for lock in ["lock.null", "lock.root"] {
        assert_eq!(found.one(lock), "EAGAIN", "{lock} is found outside");
    }
    drop(held);

    let dispatcher = Dispatcher::start([("jail", plain(TABLES))]);
    let mut looks = 0;
    for _ in 0..rounds() {
        let replies = crowd(&dispatcher, |index| leave(["all", "look"][index % 2], key));
        for (index, reply) in replies.into_iter().enumerate() {
            let facts = reply.ok().facts();
            // Without root the nodes are the host's.
            for lock in ["lock.root", "lock.null"].into_iter().take(if rootless() { 1 } else { 2 })
            {
                assert_eq!(facts.one(lock), "ok", "{lock}");
            }
            if index % 2 == 0 {
                for made in ["shm", "file", "abstract", "itself"] {
                    assert_eq!(facts.one(made), "ok", "{made}");
                }
            } else {
                assert_eq!(facts.one("shm"), "ENOENT");
                assert_eq!(facts.one("file"), "ENOENT");
                assert_eq!(facts.one("abstract"), "ECONNREFUSED");
                looks += 1;
            }
        }
    }
    assert_eq!(looks, rounds() * CROWD / 2);
}

/// The kernel counts inotify's instances for a user, for whoever owns its user namespace,
/// and so on: what one run takes must be nobody else's.
#[test]
fn instances_of_inotify_are_each_runs_own() {
    if rootless() {
        not_here!("without root a run's user namespace is its operator's");
    }
    let count = |facts: Facts| facts.one("instances").to_owned();
    let outside = || count(programs::outside("leave", &["watch", "0"]).facts());
    let most = outside();
    // Told before anybody else counts: two that count at once each get a part.
    let program = programs::path("leave");
    let (held, told) = programs::background_telling(&program, &["watch", "60000"], "instances");
    assert_eq!(count(told), most);
    wait_until("one takes all outside", Duration::from_secs(10), || outside() == "0 EMFILE");
    drop(held);
    wait_until("they are given back", Duration::from_secs(10), || outside() == most);

    let dispatcher = Dispatcher::start([("jail", plain(TABLES))]);
    let alone = count(dispatcher.call(leave("watch", 0)).ok().facts());
    // Long enough to be there all at once.
    let running: Vec<_> =
        (0..CROWD).map(|_| dispatcher.begin(leave("watch", scaled_ms(1000) as u32))).collect();
    while !running.iter().all(Running::is_over) {
        assert_eq!(outside(), most, "root's are its own");
    }
    for running in running {
        assert_eq!(count(running.finish().unwrap().ok().facts()), alone);
    }
}

/// Memory, processor time, tasks, limits and their ends are each run's own; and what is
/// in force is the same for a jail that was built for its call and for any other.
#[test]
fn figures_and_limits_are_of_one_run() {
    let dispatcher = Dispatcher::start([("jail", plain(TABLES))]);
    let print = || Call::new("jail", "act").args(&["print", "x"]);
    let controls = |reply: &Reply| reply.report.enforced.iter().cloned().collect::<BTreeSet<_>>();
    let first = dispatcher.call(print()).ok();
    let hog = |way: &str, size: &str| Call::new("jail", "hog").args(&[way, size]);
    for _ in 0..rounds() {
        let replies = crowd(&dispatcher, |index| match index % 6 {
            0 => hog("mmap", "96m"),
            1 => hog("mmap", "256m"),                 // over its limit
            2 => hog("child-memory", "256m"),         // by a child
            3 => hog("mmap", "96m").memory(32 << 20), // over what its caller left it
            _ => print(),
        });
        for (index, reply) in replies.into_iter().enumerate() {
            match index % 6 {
                0 => drop(reply.ok()),
                1..=3 => {
                    assert_eq!(reply.reason(), "out_of_memory", "{index}: {}", reply.summary());
                }
                _ => {
                    let reply = reply.ok();
                    assert_eq!(reply.report.pids_peak, 1, "{}", reply.summary());
                    let peak = reply.report.memory_peak_bytes;
                    assert!(peak < 8 << 20, "{peak}: {}", reply.summary());
                    assert_eq!(controls(&reply), controls(&first));
                }
            }
        }
    }
}
