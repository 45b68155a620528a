//! What a jail has of earlier ones tells nothing of them.
//!
//! Jails are built ahead, and of what earlier ones had some is used again where calls
//! come thick. So everything here happens many times over and many at once.

mod common;

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
    time::Duration,
};

use common::{
    Call, Dispatcher, Facts, Reply,
    crowd::{Marked, Marks, since_boot},
    dispatcher::{Running, plain},
    host::{self, Process},
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

/// What inits were found in. Each is held open: as long as it is, the kernel gives its
/// number to no other.
#[derive(Default)]
struct Held {
    user_namespaces: HashMap<u64, (File, BTreeSet<Init>)>,
    /// By path. A run's has a random name, or that of an earlier run.
    cgroups: HashMap<String, BTreeSet<Init>>,
}

/// A process that no other is taken for.
type Init = (i32, u64);

impl Held {
    fn look(&mut self, launcher: &Process) {
        let own = fs::metadata(namespace(launcher)).unwrap().ino();
        let is_init =
            |it: &Process| it.parent == launcher.pid && it.name == "dispatch-init" && !it.zombie;
        for init in host::processes().into_iter().filter(is_init) {
            let path = format!("/proc/{}/cgroup", init.pid);
            let (opened, cgroups) = (File::open(namespace(&init)), fs::read_to_string(path));
            // All of that was the same process's.
            if Process::read(init.pid).is_none_or(|now| now.started != init.started) {
                continue;
            }
            let (Ok(opened), Ok(cgroups)) = (opened, cgroups) else { continue };
            let (number, who) = (opened.metadata().unwrap().ino(), (init.pid, init.started));
            if number != own {
                let entry = self.user_namespaces.entry(number);
                entry.or_insert_with(|| (opened, BTreeSet::new())).1.insert(who);
            }
            // Of v1: the hierarchy of v2 is number 0.
            let of_v1 = |line: &&str| line.contains("/run-") && !line.starts_with("0:");
            for line in cgroups.lines().filter(of_v1) {
                self.cgroups.entry(line.to_owned()).or_default().insert(who);
            }
        }
    }
}

fn namespace(process: &Process) -> PathBuf {
    format!("/proc/{}/ns/user", process.pid).into()
}

/// How many of these were there before.
fn recurring<T: Ord>(all: impl Iterator<Item = T>) -> usize {
    let all: Vec<_> = all.collect();
    all.len() - all.iter().collect::<BTreeSet<_>>().len()
}

/// Asserts that some of these jails had what others had: else nothing was shown.
#[track_caller]
fn assert_used_again(jails: &[Marks]) {
    // Without root nothing is; and on a slow machine it may be too quiet for it.
    if !rootless() && slowness() <= 1.0 {
        assert!(recurring(jails.iter().map(|jail| jail.network)) > 0, "{jails:?}");
    }
}

/// Without this, nothing else here would show anything: jails of a crowd are there before
/// their calls, and have what earlier ones had; never two of them at once.
#[test]
fn a_crowd_has_jails_built_ahead_of_what_others_had() {
    if slowness() > 1.0 {
        not_here!("what is made of it in time depends on a processor's speed");
    }
    let dispatcher = Dispatcher::start([("jail", plain(TABLES))]);
    let launcher = dispatcher.process("dispatch-launch");
    let mut held = Held::default();
    let (mut ahead, mut runs) = (0, vec![]);
    for _ in 0..rounds() {
        let sent = since_boot();
        let running: Vec<_> = (0..CROWD).map(|_| dispatcher.begin(leave("marks", 5))).collect();
        while !rootless() && !running.iter().all(Running::is_over) {
            held.look(&launcher);
        }
        for running in running {
            let facts = running.finish().unwrap().ok().facts();
            let marks = Marks::of(&facts);
            ahead += usize::from(marks.begun_before(sent));
            runs.push((marks, facts.number("from")..facts.number("until")));
        }
    }
    assert!(ahead >= rounds(), "{ahead} of {} were built ahead", runs.len());
    let networks = recurring(runs.iter().map(|(marks, _)| marks.network));
    let roots = recurring(runs.iter().map(|(marks, _)| &marks.root));
    let users = held.user_namespaces.values().filter(|(_, inits)| inits.len() > 1).count();
    let cgroups = held.cgroups.values().filter(|inits| inits.len() > 1).count();
    eprintln!(
        "of {} runs: {ahead} were ahead, {networks} had a network namespace and {roots} a root \
         again; {users} of {} user namespaces and {cgroups} of {} cgroups of v1 had two or more",
        runs.len(),
        held.user_namespaces.len(),
        held.cgroups.len()
    );
    if rootless() {
        assert_eq!((networks, roots), (0, 0), "without root nothing is used again");
        return;
    }
    assert!(networks > 0, "no network namespace was used again");
    assert!(roots > 0, "no root was used again");
    assert!(users > 0, "no user namespace was used again");
    assert!(cgroups > 0 || held.cgroups.is_empty(), "no cgroup of v1 was used again");
    for (index, (one, time)) in runs.iter().enumerate() {
        for (other, at) in &runs[..index] {
            let together = time.start < at.end && at.start < time.end;
            assert!(!together || one.network != other.network, "two at once in one network");
            assert!(!together || one.root != other.root, "two at once in one root");
        }
    }
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
    let (mut looks, mut jails) = (0, vec![]);
    for _ in 0..rounds() {
        let replies = crowd(&dispatcher, |index| leave(["all", "look"][index % 2], key));
        for (index, reply) in replies.into_iter().enumerate() {
            let facts = reply.ok().facts();
            jails.push(Marks::of(&facts));
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
    assert_used_again(&jails);
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
    let before = if slowness() > 1.0 { vec![] } else { crowd(&dispatcher, |_| leave("marks", 0)) };
    let mut jails: Vec<_> =
        before.into_iter().map(|reply| Marks::of(&reply.ok().facts())).collect();
    // Long enough to be there all at once.
    let running: Vec<_> =
        (0..CROWD).map(|_| dispatcher.begin(leave("watch", scaled_ms(1000) as u32))).collect();
    while !running.iter().all(Running::is_over) {
        assert_eq!(outside(), most, "root's are its own");
    }
    for running in running {
        let facts = running.finish().unwrap().ok().facts();
        jails.push(Marks::of(&facts));
        assert_eq!(count(facts), alone);
    }
    assert_used_again(&jails);
}

/// Memory, processor time, tasks, limits and their ends are each run's own; and what is
/// in force is the same for a jail that was built for its call and for any other.
#[test]
fn figures_and_limits_are_of_one_run() {
    let dispatcher = Dispatcher::start([("jail", plain(TABLES))]);
    let nothing = || leave("marks", 0);
    let mut jails = vec![];
    let controls = |reply: &Reply| reply.report.enforced.iter().cloned().collect::<BTreeSet<_>>();
    let first = dispatcher.call(nothing()).ok();
    let hog = |way: &str, size: &str| Call::new("jail", "hog").args(&[way, size]);
    for _ in 0..rounds() {
        let replies = crowd(&dispatcher, |index| match index % 6 {
            0 => hog("mmap", "96m"),
            1 => hog("mmap", "256m"),                 // over its limit
            2 => hog("child-memory", "256m"),         // by a child
            3 => hog("mmap", "96m").memory(32 << 20), // over what its caller left it
            _ => nothing(),
        });
        for (index, reply) in replies.into_iter().enumerate() {
            match index % 6 {
                0 => drop(reply.ok()),
                1..=3 => {
                    assert_eq!(reply.reason(), "out_of_memory", "{index}: {}", reply.summary());
                }
                _ => {
                    let reply = reply.ok();
                    jails.push(Marks::of(&reply.facts()));
                    assert_eq!(reply.report.pids_peak, 1, "{}", reply.summary());
                    let peak = reply.report.memory_peak_bytes;
                    assert!(peak < 8 << 20, "{peak}: {}", reply.summary());
                    assert_eq!(controls(&reply), controls(&first));
                }
            }
        }
    }
    assert_used_again(&jails);
}

/// What is in force is the same for a jail that its call waited for and for one that was there,
/// also where its root shows files of the host or its network is up.
#[test]
fn what_is_in_force_is_the_same_for_every_jail() {
    let shown = tempfile::tempdir().unwrap();
    fs::set_permissions(&shown, fs::Permissions::from_mode(0o755)).unwrap();
    let bind = format!(
        "bind = [{{ source = {:?}, target = \"/shown\", read_only = true }}]",
        shown.path()
    );
    let kinds = [
        ("empty", ""),
        ("host", "[filesystem]\nroot = \"host\"\n"),
        ("loopback", "[network]\nmode = \"loopback\"\n"),
        ("bound", &format!("[filesystem]\n{bind}\n")),
    ];
    let controls = |reply: &Reply| reply.report.enforced.iter().cloned().collect::<BTreeSet<_>>();
    let marks = |kind: &str| Call::new(kind, "leave").args(&["marks", "0"]);
    let is_slow = slowness() > 1.0;
    let mut networks = BTreeSet::new();
    // Of one dispatcher: that the one before was busy keeps the next from nothing.
    let policy = |(kind, tables): (&'static str, &str)| (kind, plain(&format!("{tables}{TABLES}")));
    let dispatcher = Dispatcher::start(kinds.map(policy));
    for (kind, _) in kinds {
        let sent = since_boot();
        let reply = dispatcher.call(marks(kind)).ok();
        let cold = Marked { marks: Marks::of(&reply.facts()), reply, sent };
        assert!(!cold.was_ahead(), "{kind}: the first finds none");
        let expected = controls(&cold.reply);
        // Until there were some of each kind.
        let (mut ahead, mut again) = (0, 0);
        networks.insert(cold.marks.network);
        for round in 0.. {
            let sent = since_boot();
            let count = if is_slow { 2 } else { CROWD };
            let running: Vec<_> = (0..count).map(|_| dispatcher.begin(marks(kind))).collect();
            for running in running {
                let reply = running.finish().unwrap().ok();
                let marks = Marks::of(&reply.facts());
                ahead += usize::from(marks.begun_before(sent));
                again += usize::from(!networks.insert(marks.network));
                assert_eq!(controls(&reply), expected, "{kind}: {marks:?}");
            }
            let needs_again = kind == "empty" && !rootless();
            if !needs_again {
                assert_eq!(again, 0, "{kind}: its network namespaces are no others'");
            }
            if ahead >= 4 && (again > 0 || !needs_again) || is_slow {
                break;
            }
            assert!(round < 20, "{kind}: {ahead} were ahead, {again} had a network again");
        }
    }
}
