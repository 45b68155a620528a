//! Every step of a launch is made to fail: the call is refused or failed, never run
//! with less than it was promised, and nothing is left over.
//!
//! Only debug builds inject faults; with a release build these tests are skipped.

mod common;

use std::{collections::BTreeSet, sync::OnceLock, time::Duration};

use common::{
    Dispatcher, Reply, Settings, dispatcher::plain, host, patience, rootless, skip, wait_until,
};
use dispatcher::wire::{Verdict, status::Code};

/// Steps by their names in `jail::step`. `Must`: no program may start without it.
/// `May`: not reached on every host (cgroup v1 or v2, root or not, with or without
/// binds), or a control that the tests' policy takes as best effort.
#[derive(Clone, Copy)]
enum Step {
    Must(&'static str),
    May(&'static str),
}
use Step::{May, Must};

const OF_THE_LAUNCHER: &[Step] = &[
    Must("cgroup"),
    May("idmap"),
    May("network_namespace"),
    Must("clone"),
    May("attach"),
    May("maps"),
    Must("start"),
];

const OF_INIT: &[Step] = &[
    Must("close_fds"),
    Must("handshake"),
    May("enter_network"),
    Must("cgroup_namespace"),
    Must("private"),
    Must("sources"),
    Must("proc"),
    Must("dev"),
    Must("tmp"),
    May("enter_root"),
    Must("root"),
    Must("pivot"),
    Must("populate"),
    Must("readonly"),
    May("memfd_noexec"),
    Must("network"),
    May("user_namespace"),
    May("landlock_rules"),
    Must("fork"),
];

const OF_THE_PROGRAM: &[Step] = &[
    Must("identity"),
    Must("capabilities"),
    Must("attributes"),
    Must("session"),
    Must("rlimits"),
    Must("descriptors"),
    Must("arguments"),
    May("landlock"),
    Must("seccomp"),
    May("listener"),
    May("exec"),
];

/// Only services come to them: service_remains.rs has those.
const OF_SERVICES: [&str; 3] = ["service_socket", "service_directory", "service_network"];

#[test]
fn every_step_of_the_launcher_fails_closed() {
    fail_closed(OF_THE_LAUNCHER);
}

#[test]
fn every_step_of_init_fails_closed() {
    fail_closed(OF_INIT);
}

#[test]
fn every_step_of_the_program_fails_closed() {
    fail_closed(OF_THE_PROGRAM);
}

#[test]
fn no_step_is_forgotten() {
    let here = [OF_THE_LAUNCHER, OF_INIT, OF_THE_PROGRAM].concat();
    let here = here.iter().map(|(Must(name) | May(name))| *name).chain(OF_SERVICES);
    let all = dispatcher::jail::step::Step::ALL.iter().map(|step| step.name());
    assert_eq!(here.collect::<BTreeSet<_>>(), all.collect());
}

fn fail_closed(steps: &[Step]) {
    if !injects_faults() {
        skip!("this build injects no faults");
    }
    let hidden = steps.iter().filter_map(|step| match *step {
        Must(name) => (!check(name, true)).then_some(name),
        May(name) => (!check(name, false)).then_some(name),
    });
    let hidden: Vec<_> = hidden.collect();
    eprintln!("of {} faults all showed but {hidden:?}", steps.len());
}

/// Looked at once, for all tests.
fn injects_faults() -> bool {
    static INJECTS: OnceLock<bool> = OnceLock::new();
    *INJECTS.get_or_init(|| {
        let attempt = |fault: &str| ran(&start(fault).run("jail", "act", &["print", "ran"]));
        assert!(attempt(""), "without a fault it runs");
        !attempt("readonly")
    })
}

fn start(fault: &str) -> Dispatcher {
    let jail = match fault {
        // What the default policy comes to: an empty root and an empty network, made before.
        "network_namespace" | "enter_network" | "enter_root" => plain(""),
        _ => plain("[filesystem]\nroot = \"host\"\n[network]\nmode = \"loopback\"\n"),
    };
    Settings::new([("jail", jail)]).env("DISPATCHER_FAULT", fault).start()
}

/// Processor time of a process so far, in clock ticks of 10 ms.
fn ticks(process: &host::Process) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    [11, 12].iter().filter_map(|index| fields.get(*index)?.parse::<u64>().ok()).sum()
}

/// Where jails are built ahead: wait until that is over. Nothing tells so but two
/// looks, this much apart, that find the same.
fn settled_descriptors(process: &host::Process) -> Option<usize> {
    let mut last = Some(usize::MAX);
    wait_until("descriptors settle", Duration::from_secs(20), || {
        std::thread::sleep(Duration::from_millis(100));
        let now = process.descriptors();
        std::mem::replace(&mut last, now) == now
    });
    last
}

/// Whether the program got to say something.
fn ran(reply: &Reply) -> bool {
    reply.output.is_some() && reply.stdout() == b"ran"
}

/// The launch failed, and not as if the program had.
#[track_caller]
fn assert_failed(name: &str, reply: &Reply) {
    assert!(
        matches!(
            (reply.code, reply.verdict),
            (Code::Internal | Code::Unavailable, Verdict::Failed)
                | (Code::FailedPrecondition, Verdict::Refused)
        ),
        "{name}: {}",
        reply.summary()
    );
}

/// Only jails built ahead come to it. A call is served by another, built for it, unless it was
/// given one that was still being built.
const AHEAD_ONLY: &str = "enter_root";

/// Makes calls with one step broken; tells whether the fault showed.
fn check(name: &str, must: bool) -> bool {
    let dispatcher = start(name);
    let first = dispatcher.run("jail", "act", &["print", "ran"]);
    let showed = !ran(&first);
    assert!(showed || !must, "{name} failed, and the program ran: {}", first.summary());
    if showed {
        assert_failed(name, &first);
        assert!(
            [name, "handshake"].iter().any(|step| first.message.contains(step))
                || first.reason() == "control_unavailable",
            "{name}: {}",
            first.summary()
        );
    }

    let launcher = dispatcher.process("dispatch-launch");
    // The kernel shows them to root alone: the launcher is not dumpable.
    let before = settled_descriptors(&launcher);
    assert!(before.is_some() || rootless());
    for _ in 0..4 {
        let again = dispatcher.run("jail", "act", &["print", "ran"]);
        if !ran(&again) {
            // Of one built ahead no more may be known than that it was gone.
            assert_failed(name, &again);
        }
        let same = ran(&again) != showed || name == AHEAD_ONLY;
        assert!(same, "{name}: {}", again.summary());
    }
    assert!(launcher.alive(), "{name}: a failed launch is no reason for the launcher to die");
    wait_until("no descriptor is left over", Duration::from_secs(5), || {
        launcher.descriptors() <= before.map(|count| count + 1)
    });
    wait_until("no jail of a failed launch is left over", Duration::from_secs(5), || {
        let runs = dispatcher.descendants();
        runs.iter().filter(|process| process.name == "dispatch-init" && !process.zombie).count()
            <= 4
    });
    // Where jails are built ahead, one that can't be built is not tried without end.
    // Nothing tells that it rests but the processor time of a while.
    let spent = ticks(&launcher);
    std::thread::sleep(Duration::from_millis(500));
    assert!(ticks(&launcher) - spent < 25, "{name}: the launcher is busy failing");

    // A launch that fails leaves the next one nothing to trip over.
    dispatcher.descendants();
    dispatcher.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(dispatcher.wait(Duration::from_secs(20)).code(), Some(0), "{name}");
    dispatcher.assert_no_processes(patience(Duration::from_secs(2)));
    dispatcher.assert_no_cgroups();
    showed
}
