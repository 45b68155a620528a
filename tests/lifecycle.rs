//! Starting, reloading, draining, dying: what goes on, what ends, and that nothing
//! is left over whichever way it ends.

mod common;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use common::{
    Call, Dispatcher, Reply, Settings, client,
    dispatcher::{Running, direct, plain},
    host, patience, rootless, scaled_ms, slowness, token, wait_for, wait_until,
};
use dispatcher::wire::{Verdict, status::Code};
use nix::sys::signal::Signal;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// Starts a run that goes on, and sees it running.
fn occupy(dispatcher: &Dispatcher, namespace: &str) -> (Running, String) {
    let name = token();
    let running = dispatcher.begin(Call::new(namespace, "act").args(&["name", &name, "forever"]));
    wait_until("running", Duration::from_secs(10), || !host::named(&name).is_empty());
    (running, name)
}

fn health(dispatcher: &Dispatcher, service: &str) -> Option<ServingStatus> {
    let mut client = HealthClient::new(dispatcher.channel());
    let request = HealthCheckRequest { service: service.into() };
    let reply = client::runtime().block_on(client.check(request)).ok()?;
    Some(reply.into_inner().status())
}

fn gone(name: &str) -> bool {
    host::named(name).is_empty()
}

#[test]
fn sigterm_drains() {
    let dispatcher = Dispatcher::start([("jail", plain(""))]);
    for service in ["", "readiness", "liveness", "collector.CollectiveDispatcher"] {
        assert_eq!(health(&dispatcher, service), Some(ServingStatus::Serving), "{service:?}");
    }
    let name = token();
    let pause = scaled_ms(1500).to_string();
    let call =
        Call::new("jail", "act").args(&["name", &name, "sleep", &pause, "print", "finished"]);
    let running = dispatcher.begin(call);
    wait_until("running", Duration::from_secs(10), || !gone(&name));

    dispatcher.descendants();
    dispatcher.signal(Signal::SIGTERM);
    wait_until("draining shows", Duration::from_secs(5), || {
        health(&dispatcher, "") == Some(ServingStatus::NotServing)
    });
    assert_eq!(health(&dispatcher, "readiness"), Some(ServingStatus::NotServing));
    assert_eq!(
        health(&dispatcher, "collector.CollectiveDispatcher"),
        Some(ServingStatus::NotServing)
    );
    assert_eq!(health(&dispatcher, "liveness"), Some(ServingStatus::Serving));
    let late = dispatcher.try_call(Call::new("jail", "act")).expect_err("no new calls");
    assert_eq!(late.code(), tonic::Code::Unavailable, "{late:?}");

    assert_eq!(running.finish().unwrap().ok().text(), "finished");
    assert_eq!(dispatcher.wait(Duration::from_secs(10)).code(), Some(0));
    dispatcher.assert_no_cgroups();
    dispatcher.stop();
}

#[test]
fn draining_has_an_end() {
    for (argument, second) in [("--drain-timeout=300ms", false), ("--drain-timeout=10m", true)] {
        let dispatcher = Settings::new([("jail", plain(""))]).arg(argument).start();
        let (running, name) = occupy(&dispatcher, "jail");
        dispatcher.descendants();
        let asked = Instant::now();
        dispatcher.signal(Signal::SIGTERM);
        if second {
            wait_until("draining", Duration::from_secs(5), || {
                health(&dispatcher, "") != Some(ServingStatus::Serving)
            });
            dispatcher.signal(Signal::SIGTERM);
        }
        let status = dispatcher.wait(Duration::from_secs(5));
        assert!(asked.elapsed() < patience(Duration::from_secs(5)));
        if !second {
            assert_eq!(status.code(), Some(0));
        }
        assert!(gone(&name), "{argument}");
        // The caller learns of it, by a reply or by the broken connection.
        if let Ok(reply) = running.finish() {
            reply.expect(Code::Unavailable, Verdict::Cancelled, "draining");
        }
        dispatcher.assert_no_cgroups();
        dispatcher.stop();
    }
}

#[test]
fn sigint_drains_as_well() {
    let dispatcher = Dispatcher::start([("jail", plain(""))]);
    dispatcher.run("jail", "act", &[]).ok();
    dispatcher.descendants();
    dispatcher.signal(Signal::SIGINT);
    assert_eq!(dispatcher.wait(Duration::from_secs(10)).code(), Some(0));
    dispatcher.stop();
}

/// A policy in force shows by the environment it gives.
fn environment(dispatcher: &Dispatcher, namespace: &str) -> Reply {
    dispatcher.run(namespace, "act", &["env"])
}

#[test]
fn reloading_is_whole_or_not_at_all() {
    let policy = |word: &str| plain(&format!("[environment]\nset = {{ WORD = \"{word}\" }}\n"));
    let dispatcher = Dispatcher::start([("a", policy("old")), ("b", policy("old"))]);
    let word = |namespace: &str| environment(&dispatcher, namespace).facts().all("env").join(" ");
    let before = environment(&dispatcher, "a").ok().report;
    let (running, _) = occupy(&dispatcher, "b");

    // Both change, one of them is broken: nothing changes, and the log says where.
    dispatcher.write_policy("a", &policy("new"));
    dispatcher.write_policy("b", "[limits]\nmemori = \"1MiB\"\n");
    dispatcher.signal(Signal::SIGHUP);
    wait_until("the fault is logged", Duration::from_secs(10), || {
        let log = dispatcher.log();
        log.contains("b.toml:2:1") && log.contains("memori")
    });
    assert!(word("a").contains("WORD=old") && word("b").contains("WORD=old"));
    assert_eq!(environment(&dispatcher, "a").report.policy_set_digest, before.policy_set_digest);

    // Mended, both change together; a new namespace comes with them.
    dispatcher.write_policy("b", &policy("new"));
    dispatcher.write_policy("c", &policy("fresh"));
    dispatcher.signal(Signal::SIGHUP);
    wait_until("the new policies hold", Duration::from_secs(10), || word("a").contains("WORD=new"));
    assert!(word("b").contains("WORD=new") && word("c").contains("WORD=fresh"));
    let after = environment(&dispatcher, "a").ok().report;
    assert_ne!(after.policy_set_digest, before.policy_set_digest);
    assert_ne!(after.policy_digest, before.policy_digest);

    // What ran all the while was not disturbed.
    running.cancel();
    dispatcher.stop();
}

#[test]
fn a_running_call_keeps_its_policy() {
    let timeout = |ms: u64| plain(&format!("[limits]\ntimeout = \"{ms}ms\"\n"));
    let dispatcher = Dispatcher::start([("a", timeout(60_000))]);
    let name = token();
    let pause = scaled_ms(1200).to_string();
    let call = Call::new("a", "act").args(&["name", &name, "sleep", &pause, "print", "whole"]);
    let running = dispatcher.begin(call);
    wait_until("running", Duration::from_secs(10), || !gone(&name));
    dispatcher.write_policy("a", &timeout(scaled_ms(300)));
    dispatcher.signal(Signal::SIGHUP);
    wait_until("the new policy holds", Duration::from_secs(10), || {
        dispatcher.run("a", "act", &["sleep", &scaled_ms(900).to_string()]).verdict
            == Verdict::TimedOut
    });
    assert_eq!(running.finish().unwrap().ok().text(), "whole");
    dispatcher.stop();
}

#[test]
fn changes_can_be_watched_for() {
    let policy = |word: &str| plain(&format!("[environment]\nset = {{ WORD = \"{word}\" }}\n"));
    let dispatcher = Settings::new([("a", policy("old"))]).reload("watch").start();
    dispatcher.run("a", "act", &[]).ok();
    dispatcher.write_policy("a", &policy("new"));
    wait_until("the change is seen", Duration::from_secs(10), || {
        environment(&dispatcher, "a").text().contains("WORD=new")
    });
    dispatcher.stop();
}

/// The run is over, its caller knows, and the next call is served on the same port.
#[test]
fn each_process_may_be_killed() {
    let dispatcher = Dispatcher::start([("jail", plain(""))]);
    for victim in ["dispatch-serve", "dispatch-launch", "dispatch-init"] {
        let (running, name) = occupy(&dispatcher, "jail");
        let program = host::named(&name).remove(0);
        let process = match victim {
            "dispatch-init" => host::Process::read(program.parent).expect("its parent runs"),
            _ => dispatcher.process(victim),
        };
        assert_eq!(process.name, victim);
        dispatcher.descendants();
        process.signal(Signal::SIGKILL);
        wait_until("the run is over", Duration::from_secs(2), || gone(&name));
        match (victim, running.finish()) {
            // The connection broke with the process that held it.
            ("dispatch-serve", Err(status)) => {
                assert!(
                    [tonic::Code::Unavailable, tonic::Code::Unknown, tonic::Code::Internal]
                        .contains(&status.code()),
                    "{status:?}"
                );
            }
            ("dispatch-launch", Ok(reply)) => {
                drop(reply.expect(Code::Unavailable, Verdict::Failed, "launcher_lost"));
            }
            ("dispatch-init", Ok(reply)) => {
                assert_eq!(reply.verdict, Verdict::Failed, "{}", reply.summary())
            }
            (_, answer) => panic!("after the death of {victim}: {answer:?}"),
        }
        let reply = wait_for("served again", Duration::from_secs(10), || {
            dispatcher
                .try_call(Call::new("jail", "act").args(&["print", "again"]))
                .ok()
                .filter(|reply| reply.verdict == Verdict::Exited)
        });
        assert_eq!(reply.text(), "again", "after the death of {victim}");
        assert!(dispatcher.monitor.alive(), "the monitor stays");
    }
    dispatcher.stop();
}

/// Again and again, also while calls start and end.
#[test]
fn kills_at_any_moment_leave_nothing() {
    let dispatcher = Dispatcher::start([("jail", plain(""))]);
    let rounds = (12.0 / slowness()).ceil() as u64;
    for round in 0..rounds {
        let victim = ["dispatch-launch", "dispatch-serve"][round as usize % 2];
        let calls: Vec<_> = (0..8)
            .map(|_| dispatcher.begin(Call::new("jail", "act").args(&["sleep", "20"])))
            .collect();
        // A different moment each time, from before the first start to after the last end.
        thread::sleep(Duration::from_millis(round * 3));
        dispatcher.descendants();
        dispatcher.process(victim).signal(Signal::SIGKILL);
        for call in calls {
            if let Ok(reply) = call.finish() {
                let verdict = reply.verdict;
                assert!(
                    [Verdict::Exited, Verdict::Failed, Verdict::Refused].contains(&verdict),
                    "{}",
                    reply.summary()
                );
            }
        }
        wait_until("served again", Duration::from_secs(10), || {
            dispatcher
                .try_call(Call::new("jail", "act"))
                .is_ok_and(|reply| reply.verdict == Verdict::Exited)
        });
    }
    dispatcher.stop();
}

#[test]
fn the_monitors_death_is_the_end_of_all() {
    let prepared =
        Settings::new([("jail", plain("")), ("direct", direct(""))]).unix_socket().prepare();
    let mut cgroups = BTreeSet::new();
    for namespace in ["jail", "direct"] {
        let dispatcher = prepared.start();
        let (running, name) = occupy(&dispatcher, namespace);
        cgroups.append(&mut dispatcher.cgroup_names());
        let survivors = token();
        dispatcher.run(namespace, "hog", &["survivor", &survivors]).ok();
        let processes = dispatcher.descendants();
        assert!(processes.len() >= 4, "serve, launch, init and the program: {processes:?}");
        let started = Instant::now();
        dispatcher.monitor.signal(Signal::SIGKILL);
        dispatcher.assert_no_processes(Duration::from_secs(1));
        assert!(gone(&name) && gone(&survivors));
        eprintln!("{namespace}: all gone {:?} after the monitor's death", started.elapsed());
        // The server dies of the same cause as the launcher; it may live to say so.
        if let Ok(reply) = running.finish() {
            assert_eq!(reply.reason(), "launcher_lost", "{}", reply.summary());
        }
        dispatcher.wait(Duration::from_secs(1));
        dispatcher.stop();
    }
    // The next start takes what was left, its socket's path included, and cleans up.
    let dispatcher = prepared.start();
    dispatcher.run("jail", "act", &[]).ok();
    assert_eq!(host::cgroups_named(&cgroups), Vec::<PathBuf>::new(), "left by the dead ones");
    dispatcher.stop();
}

#[test]
fn stopping_right_after_starting_is_fine() {
    for _ in 0..3 {
        let dispatcher = Dispatcher::start([("jail", plain(""))]);
        dispatcher.descendants();
        dispatcher.signal(Signal::SIGTERM);
        assert_eq!(dispatcher.wait(Duration::from_secs(10)).code(), Some(0));
        dispatcher.assert_no_processes(Duration::from_secs(1));
    }
}

/// What the two long-lived processes hold, settled: descriptors, which the kernel
/// shows to root alone, and memory.
fn holdings(dispatcher: &Dispatcher) -> [(Option<usize>, u64); 2] {
    ["dispatch-serve", "dispatch-launch"].map(|name| {
        let process = dispatcher.process(name);
        let mut last = Some(usize::MAX);
        // Jails are built ahead after each call: wait until that is over. Nothing
        // tells so but two looks, this much apart, that find the same.
        wait_until("descriptors settle", Duration::from_secs(20), || {
            thread::sleep(Duration::from_millis(300));
            let now = process.descriptors();
            assert!(now.is_some() || rootless());
            std::mem::replace(&mut last, now) == now
        });
        (last, process.resident().unwrap())
    })
}

/// What became more than chance explains.
fn growth(before: [(Option<usize>, u64); 2], after: [(Option<usize>, u64); 2]) -> Vec<String> {
    let mut grown = Vec::new();
    for (index, name) in ["serve", "launch"].iter().enumerate() {
        let ((fds_before, rss_before), (fds_after, rss_after)) = (before[index], after[index]);
        if fds_after > fds_before.map(|count| count + 2) {
            grown.push(format!("{name}: {fds_before:?} descriptors became {fds_after:?}"));
        }
        if rss_after >= rss_before + (24 << 20) {
            grown.push(format!("{name}: {rss_before} bytes became {rss_after}"));
        }
    }
    grown
}

/// Thousands of calls leave as many descriptors, cgroups and processes as before.
#[test]
fn nothing_adds_up() {
    let tables = "[admission]\nconcurrency = 16\nqueue = \"unlimited\"\nqueue_timeout = \"5m\"\n[limits]\nmemory = \"64MiB\"\n";
    let dispatcher = Dispatcher::start([("jail", plain(tables)), ("direct", direct(tables))]);
    // What each call leaves is seen among few as well, where many would take minutes.
    let total = if slowness() > 1.0 { 96 } else { 2000 };
    let batch = |count: usize| {
        for start in (0..count).step_by(32) {
            let calls: Vec<_> = (start..count.min(start + 32))
                .map(|index| {
                    let namespace = ["jail", "jail", "jail", "direct"][index % 4];
                    // Most end well; some don't start, fail or are forbidden.
                    let call = match index % 16 {
                        3 => Call::new(namespace, "act").args(&["exit", "1"]),
                        7 => Call::of(namespace, "no executable"),
                        11 => Call::new("jail", "syscall")
                            .args(&["native", &libc::SYS_unshare.to_string()]),
                        13 => Call::new(namespace, "hog").args(&["survivor", "left-over"]),
                        _ => Call::new(namespace, "act").args(&["print", &index.to_string()]),
                    };
                    dispatcher.begin(call)
                })
                .collect();
            for call in calls {
                let reply = call.finish().unwrap();
                assert_ne!(reply.verdict, Verdict::Failed, "{}", reply.summary());
            }
        }
    };
    batch(total / 4);
    let mut before = holdings(&dispatcher);
    let (processes, cgroups) = (dispatcher.descendants().len(), dispatcher.cgroups().len());
    assert!(cgroups > 0, "its cgroups were found");

    // What is kept for the next calls (roots, networks) is as much as was ever needed at
    // once, so that a batch may add to it. What leaks adds up in every batch.
    let mut grown = Vec::new();
    for _ in 0..4 {
        let started = Instant::now();
        batch(total);
        eprintln!("{total} calls in {:?}", started.elapsed());
        let after = holdings(&dispatcher);
        grown = growth(before, after);
        before = after;
        if grown.is_empty() {
            break;
        }
    }
    assert!(
        grown.is_empty(),
        "{grown:?} after each batch; the launcher holds {:#?}",
        dispatcher.process("dispatch-launch").descriptor_targets()
    );
    wait_until("processes are as many as before", Duration::from_secs(10), || {
        dispatcher.descendants().len() <= processes
    });
    assert!(gone("left-over"));
    wait_until("cgroups are as many as before", Duration::from_secs(10), || {
        dispatcher.cgroups().len() <= cgroups
    });
    dispatcher.stop();
}

#[test]
fn bad_configuration_ends_before_anything_listens() {
    let prepared = |settings: Settings| {
        let mut command = common::dispatcher::command();
        let directory = settings.written();
        command.arg("serve").arg("--config").arg(directory.path().join("dispatcher.toml"));
        let output = command.args(["--listen", "127.0.0.1:0"]).output().unwrap();
        assert_eq!(output.status.code(), Some(78), "{output:?}");
        assert!(output.stdout.is_empty(), "nothing was listened on: {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let broken = [("jail", "[limits]\nmemori = \"1MiB\"\n")];
    assert!(prepared(Settings::new(broken)).contains("jail.toml:2:1"));
    let fine = [("jail", plain(""))];
    assert!(
        prepared(Settings::new(fine.clone()).server("concurrenzy = 3\n"))
            .contains("dispatcher.toml:")
    );
    let open = Settings::new(fine).server("listen = [\"0.0.0.0:0\"]\n");
    let directory = open.written();
    let mut command = common::dispatcher::command();
    command.arg("serve").arg("--config").arg(directory.path().join("dispatcher.toml"));
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(78), "beyond loopback without TLS: {output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("--insecure"), "{output:?}");
}

#[test]
fn the_processes_have_their_names_and_no_more_rights_than_needed() {
    let dispatcher = Dispatcher::start([("jail", plain(""))]);
    dispatcher.run("jail", "act", &[]).ok();
    assert_eq!(dispatcher.monitor.name, "dispatcher");
    let serve = dispatcher.process("dispatch-serve");
    dispatcher.process("dispatch-launch");
    let status = std::fs::read_to_string(format!("/proc/{}/status", serve.pid)).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set} of the process that talks to strangers");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    if !rootless() {
        assert!(!field("Uid").split_whitespace().any(|uid| uid == "0"), "{}", field("Uid"));
        assert!(!field("Gid").split_whitespace().any(|gid| gid == "0"), "{}", field("Gid"));
        assert!(!field("Groups").split_whitespace().any(|gid| gid == "0"), "{}", field("Groups"));
    }
    dispatcher.stop();
}
