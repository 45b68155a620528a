//! Every limit of a policy, whether it holds, and which verdict it leads to.

mod common;

use std::{fs, path::Path, sync::OnceLock, time::Duration};

use common::{
    Call, Dispatcher, Reply,
    dispatcher::{best_effort, direct, plain},
    host, patience, programs, scaled_ms, shared, token, wait_until,
};
use dispatcher::wire::{Verdict, status::Code};

/// A directory with one file of 96 MiB, to be read through a bind.
fn data() -> &'static Path {
    static DATA: OnceLock<tempfile::TempDir> = OnceLock::new();
    DATA.get_or_init(|| {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(directory.path().join("large"), vec![0; 96 << 20]).unwrap();
        directory
    })
    .path()
}

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        let quick = scaled_ms(400);
        let bind =
            format!("bind = [{{ source = {:?}, target = \"/data\", read_only = true }}]", data());
        let policy = |mode: &str, limits: &str| {
            let tables = format!(
                "[limits]\n{limits}\n[admission]\nconcurrency = 64\nqueue_timeout = \"2m\"\n"
            );
            if mode == "direct" { direct(&tables) } else { plain(&tables) }
        };
        let mut policies = vec![
            (
                "tmp".to_owned(),
                plain("[limits]\nmemory = \"256MiB\"\n[filesystem]\ntmp = \"8MiB\"\n"),
            ),
            ("small".to_owned(), plain("[limits]\nmemory = \"32MiB\"\n")),
            (
                "bind".to_owned(),
                plain(&format!("[limits]\nmemory = \"32MiB\"\n[filesystem]\n{bind}\n")),
            ),
            ("least".to_owned(), plain("[limits]\nmemory = \"4MiB\"\n")),
            ("service".to_owned(), plain("[service.\"test/tight\"]\nlimits = { pids = 4 }\n")),
        ];
        for mode in ["jail", "direct"] {
            let add = [
                ("plain", policy(mode, "")),
                ("timeout", policy(mode, &format!("timeout = \"{quick}ms\""))),
                ("cpu", policy(mode, "cpu_time = \"500ms\"\ncpus = 2.0")),
                ("half", policy(mode, "cpus = 0.5")),
                ("memory", policy(mode, "memory = \"48MiB\"")),
                ("pids", policy(mode, "pids = 16")),
                ("files", policy(mode, "open_files = 40\nfile_size = \"1MiB\"")),
                ("output", policy(mode, "output = \"4KiB\"\nstderr = \"2KiB\"")),
                (
                    "unlimited",
                    policy(
                        mode,
                        "timeout = \"unlimited\"\ncpu_time = \"unlimited\"\ncpus = \"unlimited\"\n\
                         memory = \"unlimited\"\nswap = \"unlimited\"\npids = \"unlimited\"\n\
                         open_files = \"unlimited\"\nfile_size = \"unlimited\"\noutput = \"unlimited\"\n\
                         stderr = \"unlimited\"\nartifact_size = \"unlimited\"\ninput = \"unlimited\"",
                    ),
                ),
            ];
            policies.extend(add.map(|(name, text)| (format!("{mode}-{name}"), text)));
        }
        assert!(!best_effort().is_empty());
        Dispatcher::start(policies)
    })
}

#[track_caller]
fn run(namespace: &str, program: &str, args: &[&str]) -> Reply {
    dispatcher().run(namespace, program, args)
}

fn both(name: &str) -> [String; 2] {
    [format!("jail-{name}"), format!("direct-{name}")]
}

#[track_caller]
fn out_of_memory(reply: Reply) -> Reply {
    reply.expect(Code::ResourceExhausted, Verdict::OutOfMemory, "out_of_memory")
}

#[test]
fn timeout_is_exact() {
    let limit = Duration::from_millis(scaled_ms(400));
    for namespace in both("timeout") {
        // Sleeping, busy, and with children that go on.
        for (program, args) in [
            ("act", &["forever"][..]),
            ("act", &["burn", "60000"]),
            ("hog", &["cpu", "3", "60000"]),
        ] {
            let reply = run(&namespace, program, args);
            let reply = reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
            let over = reply.wall().checked_sub(limit).expect("not before its time");
            assert!(
                over < patience(Duration::from_millis(100)),
                "{namespace} {args:?}: {over:?} over"
            );
        }
        run(&namespace, "act", &["sleep", "100"]).ok();
    }
}

#[test]
fn cpu_time_is_the_whole_trees_within_100_ms() {
    for namespace in both("cpu") {
        for children in ["1", "2", "5"] {
            let used = || {
                let reply = run(&namespace, "hog", &["cpu", children, "60000"]);
                reply.expect(Code::ResourceExhausted, Verdict::CpuTimeExceeded, "cpu_time").cpu()
            };
            // What the other tests do to this machine may delay one run, not all of three.
            let least = (0..3).map(|_| used()).min().unwrap();
            let (from, to) =
                (Duration::from_millis(490), Duration::from_millis(500 + scaled_ms(100)));
            assert!((from..to).contains(&least), "{namespace}, {children} children: {least:?}");
        }
        // Sleeping costs nothing; what ends below the limit keeps its status.
        run(&namespace, "act", &["sleep", "700", "burn", "100"]).ok();
        let reply = run(&namespace, "act", &["burn", "100", "exit", "5"]);
        reply.expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
    }
}

#[test]
fn cpus_are_a_share() {
    for namespace in both("half") {
        let reply = run(&namespace, "hog", &["cpu", "2", "200"]).ok();
        let share = reply.cpu().as_secs_f64() / reply.wall().as_secs_f64();
        assert!(share < 0.65, "{namespace}: {share:.2} processors where 0.5 were given");
    }
}

/// Memory in every shape counts.
#[test]
fn memory_is_all_memory() {
    let outside = programs::outside("hog", &["memfd", "64m"]);
    assert_eq!(outside.facts().one("memfd"), format!("{} ok", 64 << 20));
    for namespace in both("memory") {
        for way in ["mmap", "memfd", "child-memory"] {
            let reply = out_of_memory(run(&namespace, "hog", &[way, "64m"]));
            let peak = reply.report.memory_peak_bytes;
            assert!(peak <= 48 << 20 && peak > 32 << 20, "{namespace} {way}: {peak}");
            // The next run starts with all of it again.
            run(&namespace, "hog", &["mmap", "32m"]).ok();
        }
    }
    out_of_memory(run("small", "hog", &["tmpfs", "48m"]));
    run("least", "act", &["print", "fits"]).ok();
    out_of_memory(run("least", "hog", &["mmap", "8m"]));
}

/// A child is killed for memory, the first process ends with 0: the verdict is the kernel's.
#[test]
fn memory_of_a_child_decides_the_verdict() {
    for namespace in both("memory") {
        let reply = out_of_memory(run(&namespace, "hog", &["child-memory", "64m"]));
        if let Some(child) = reply.facts().maybe("child") {
            assert_eq!(child, "killed");
        }
    }
}

/// Reading much is not using much: the kernel takes page cache back.
#[test]
fn page_cache_is_no_reason_to_die() {
    let reply = run("bind", "act", &["cat", "/data/large"]);
    // 96 MiB of output: over that limit, not over memory.
    reply.expect(Code::ResourceExhausted, Verdict::OutputExceeded, "output");
    let reply = run("bind", "hog", &["read", "/data/large"]).ok();
    assert_eq!(reply.facts().number("read"), 96 << 20);
    assert!(reply.report.memory_peak_bytes <= 32 << 20, "{}", reply.report.memory_peak_bytes);
}

#[test]
fn pids_count_processes_and_threads() {
    for namespace in both("pids") {
        for (way, made) in [("forks", "forked"), ("threads", "threads")] {
            let reply = run(&namespace, "hog", &[way, "500"]);
            assert_eq!(
                reply.facts().one(made),
                "15 EAGAIN",
                "{namespace} {way}: {}",
                reply.summary()
            );
            assert_eq!(reply.report.pids_peak, 16, "{namespace} {way}");
        }
    }
}

#[test]
fn descriptors_and_files_are_limited() {
    for namespace in both("files") {
        let facts = run(&namespace, "hog", &["descriptors", "1000"]).ok().facts();
        assert_eq!(facts.one("descriptors"), "37 EMFILE", "{namespace}: 40 with the first three");
        let place = "/tmp/sparse-of-the-tests";
        let facts = run(&namespace, "hog", &["sparse", "2m", place]).ok().facts();
        assert_eq!(facts.one("sparse"), "EFBIG", "{namespace}");
    }
    let reply = run("jail-files", "hog", &["tmpfs", "2m"]);
    let reply = reply.expect(Code::Unknown, Verdict::Signalled, "signalled");
    assert_eq!(reply.report.signal, libc::SIGXFSZ);
}

#[test]
fn tmp_is_limited_in_bytes_and_inodes() {
    let facts = run("tmp", "hog", &["tmpfs", "32m"]).ok().facts();
    assert!(facts.one("tmpfs").ends_with(" ENOSPC"), "{}", facts.one("tmpfs"));
    assert!(facts.number("tmpfs") <= 8 << 20);
    let reply = run("tmp", "hog", &["files", "2000000"]);
    if reply.verdict == Verdict::Exited {
        let facts = reply.ok().facts();
        assert!(facts.one("files").ends_with(" ENOSPC"), "{}", facts.one("files"));
        assert!(facts.number("files") < 200_000, "{}", facts.one("files"));
    } else {
        out_of_memory(reply); // inodes are kernel memory, and that counts as well
    }
    // Nothing of either is there for the next run.
    let listing = run("tmp", "act", &["ls", "/tmp"]).ok();
    assert_eq!(listing.text(), "");
}

#[test]
fn output_over_the_limit_ends_the_run() {
    for namespace in both("output") {
        for args in [&["stdout", "5k"][..], &["stdout", "1g"], &["both", "100"]] {
            let reply = run(&namespace, "hog", args);
            let reply = reply.expect(Code::ResourceExhausted, Verdict::OutputExceeded, "output");
            assert_eq!(reply.stdout().len(), 4 << 10, "{namespace}");
            assert!(reply.report.stdout_truncated);
        }
        // Stderr over its limit does not.
        let reply = run(&namespace, "hog", &["stderr", "64m"]).ok();
        assert_eq!(reply.report.stderr.len(), 2 << 10, "{namespace}");
    }
}

#[test]
fn unlimited_means_unlimited() {
    for namespace in both("unlimited") {
        let reply = run(&namespace, "hog", &["stdout", "8m"]).ok();
        assert_eq!(reply.stdout().len(), 8 << 20, "{namespace}");
        let facts = run(&namespace, "hog", &["forks", "400"]);
        assert_eq!(facts.facts().one("forked"), "400 ok", "{namespace}");
        let call = Call::new(&namespace, "act").args(&["count"]).input(vec![7; 40 << 20]);
        assert_eq!(dispatcher().call(call).ok().facts().number("stdin.bytes"), 40 << 20);
    }
}

#[test]
fn stdin_need_not_be_read() {
    for namespace in both("plain") {
        let call = |args: &[&str]| {
            let call = Call::new(&namespace, "act").args(args).input(vec![7; 16 << 20]);
            dispatcher().call(call)
        };
        assert_eq!(call(&["print", "no, thanks"]).ok().text(), "no, thanks");
        assert_eq!(call(&["close", "0", "print", "none"]).ok().text(), "none");
        assert_eq!(call(&["count"]).ok().facts().number("stdin.bytes"), 16 << 20);
        // Both ways at once: neither side waits for the other.
        let through = Call::new(&namespace, "act").args(&["stdin"]).input(vec![7; 2 << 20]);
        assert_eq!(dispatcher().call(through).ok().stdout().len(), 2 << 20);
    }
}

#[test]
fn closed_streams_do_not_end_a_run() {
    for namespace in both("plain") {
        let reply = run(
            &namespace,
            "act",
            &["print", "x", "close", "1", "close", "2", "sleep", "200", "exit", "6"],
        );
        let reply = reply.expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
        assert_eq!((reply.report.exit_code, reply.text().as_str()), (6, "x"), "{namespace}");
        assert!(reply.wall() >= Duration::from_millis(200), "{namespace}");
    }
}

#[test]
fn an_override_holds_for_its_method_only() {
    let forks = |method: &str| {
        let call = Call::new("service", "hog").method("test", method).args(&["forks", "50"]);
        dispatcher().call(call).facts().one("forked").to_owned()
    };
    assert_eq!(forks("tight"), "3 EAGAIN");
    assert_eq!(forks("loose"), "50 ok");
}

/// A run that dies in each way, at the same time as all the others.
#[test]
fn verdicts_are_right_under_load() {
    let cases: &[(&str, &str, &[&str], Verdict)] = &[
        ("plain", "act", &["print", "x"], Verdict::Exited),
        ("plain", "act", &["raise", "11"], Verdict::Signalled),
        ("timeout", "act", &["forever"], Verdict::TimedOut),
        ("memory", "hog", &["mmap", "64m"], Verdict::OutOfMemory),
        ("memory", "hog", &["child-memory", "64m"], Verdict::OutOfMemory),
        ("output", "hog", &["stdout", "1m"], Verdict::OutputExceeded),
        ("cpu", "hog", &["cpu", "2", "60000"], Verdict::CpuTimeExceeded),
    ];
    let mut running = vec![];
    for _ in 0..4 {
        for (name, program, args, expected) in cases {
            for namespace in both(name) {
                let call = Call::new(&namespace, program).args(args);
                running.push((namespace, args, *expected, dispatcher().begin(call)));
            }
        }
    }
    let unshare = libc::SYS_unshare.to_string();
    for _ in 0..4 {
        let call = Call::new("jail-plain", "syscall").args(&["native", &unshare, "0"]);
        running.push((
            "jail-plain".into(),
            &(&["unshare"] as &[&str]),
            Verdict::SyscallDenied,
            dispatcher().begin(call),
        ));
    }
    for (namespace, args, expected, call) in running {
        let reply = call.finish().unwrap();
        assert_eq!(reply.verdict, expected, "{namespace} {args:?}: {}", reply.summary());
    }
}

/// One cause after the other: the first kill of ours counts, else the gravest fact.
#[test]
fn the_first_cause_is_the_verdict() {
    // Killed for output before its time was over.
    let reply = run("jail-output", "hog", &["stdout", "1g"]);
    reply.expect(Code::ResourceExhausted, Verdict::OutputExceeded, "output");
    // A deadly call by a grandchild, the first process ends well.
    run("jail-plain", "attack", &["deadly-grandchild"]).denied("unshare");
    // Memory of a child, then a status of its own.
    out_of_memory(run("jail-memory", "hog", &["child-memory-then-exit", "64m"]));
    out_of_memory(run("direct-memory", "hog", &["child-memory-then-exit", "64m"]));
    // Its own SIGKILL is its own.
    let reply = run("jail-memory", "act", &["raise", "9"]);
    reply.expect(Code::Unknown, Verdict::Signalled, "signalled");
}

/// Where many callers go away at once, all of their runs end.
#[test]
fn cancelled_runs_end() {
    let names: Vec<_> = (0..16).map(|_| token()).collect();
    let running: Vec<_> = names
        .iter()
        .map(|name| {
            // So little memory that all of them fit on a small machine.
            let call = Call::new("jail-plain", "act").memory(32 << 20);
            dispatcher().begin(call.args(&["name", name, "forever"]))
        })
        .collect();
    let count = || names.iter().filter(|name| !host::named(name).is_empty()).count();
    wait_until("all run", Duration::from_secs(20), || count() == names.len());
    running.into_iter().for_each(common::dispatcher::Running::cancel);
    wait_until("none runs", Duration::from_secs(10), || count() == 0);
    run("jail-plain", "act", &[]).ok();
}
