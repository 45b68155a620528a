//! What is special about containers: what Docker is asked for, what is shown in them, and
//! what a hostile program gets. What they have in common with jails: `conformance`.

mod common;
mod containers {
    mod ahead;
    mod roots;
    mod runtimes;
}

use std::{fs, sync::OnceLock, time::Duration};

use common::{
    Call, Dispatcher, Facts, Settings,
    dispatcher::{container, plain},
    docker::{Docker, needs_docker},
    host, programs, scaled_ms, shared, token, wait_for, wait_until,
};
use dispatcher::{
    container::protocol::{NONCE_LEN, Record, Verdict as Told},
    wire::{OutputFormat, Verdict, status::Code},
};
use nix::libc;
use serde_json::{Value, json};

/// For whatever Docker does.
const LIMIT: Duration = Duration::from_secs(60);

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        Dispatcher::start([
            (
                "box",
                container(
                    "[limits]\nmemory = \"96MiB\"\npids = 32\noutput = \"64KiB\"\n\
                     open_files = 128\ncpus = 0.75\n[filesystem]\ntmp = \"8MiB\"\n",
                ),
            ),
            ("one", container("")),
            ("other", container("")),
            ("large", container("[limits]\ninput = \"32MiB\"\n")),
            ("slow", container("[limits]\ncpus = 0.01\n")),
            ("host-root", container("[filesystem]\nroot = \"host\"\n")),
        ])
    })
}

#[track_caller]
fn inside(args: &[&str]) -> String {
    dispatcher().run("box", "attack", args).ok().facts().one(args[0]).to_owned()
}

/// Asserts that it did not work, for one of these reasons.
#[track_caller]
fn refused(finding: &str, reasons: &[&str]) {
    let why = finding.strip_prefix("refused ").unwrap_or_else(|| panic!("it {finding}"));
    assert!(reasons.contains(&why), "refused, but by {why}, not one of {reasons:?}");
}

/// Starts a program that goes on forever, and waits until it runs.
fn begin(on: &Dispatcher, namespace: &str) -> (common::dispatcher::Running, String) {
    let name = token();
    let running = on.begin(Call::new(namespace, "act").args(&["name", &name, "forever"]));
    wait_until("the program runs", LIMIT, || {
        assert!(!running.is_over(), "it ended; the log:\n{}", on.log_tail());
        !host::named(&name).is_empty()
    });
    (running, name)
}

/// Waits until Docker has no container of a namespace of this dispatcher's.
#[track_caller]
fn none_left(docker: &Docker, on: &Dispatcher) {
    let maker = on.process("dispatch-docker");
    wait_until("every container is removed", LIMIT, || docker.owned_by(&maker).is_empty());
}

#[test]
fn it_is_labelled_and_confined_by_docker() {
    let docker = needs_docker!();
    let (running, name) = begin(dispatcher(), "box");
    let maker = dispatcher().process("dispatch-docker");
    let program = host::named(&name).remove(0);
    // Init's pid is what Docker has as the container's.
    let own = || docker.owned_by(&maker).into_iter();
    let is_own = |id: &String| docker.inspect(id)["State"]["Pid"] == json!(program.parent);
    let id = own().find(is_own).expect("its container is found by our label");
    let found = docker.inspect(&id);
    let labels = &found["Config"]["Labels"];
    let run = labels["dispatcher.run"].as_str().unwrap();
    assert_eq!(run.len(), 32, "{run}");
    assert_eq!(labels["dispatcher.policy"], "box");
    let all =
        ["dispatcher.namespace=box", "dispatcher.policy=box", &format!("dispatcher.run={run}")];
    assert_eq!(docker.labelled(&all), [id]);

    let config = &found["Config"];
    for (key, wanted) in [
        ("User", json!("65534:65534")),
        ("Tty", json!(false)),
        ("Entrypoint", json!(["/run/dispatcher/init"])),
        ("Healthcheck", json!({ "Test": ["NONE"] })),
    ] {
        assert_eq!(config[key], wanted, "{key}");
    }
    // Init hands on none of it: what the program has is told to init.
    assert!(config["Env"].as_array().is_none_or(Vec::is_empty), "{}", config["Env"]);
    let host = &found["HostConfig"];
    for (key, wanted) in [
        ("CapDrop", json!(["ALL"])),
        ("CapAdd", json!(null)),
        ("Privileged", json!(false)),
        ("ReadonlyRootfs", json!(true)),
        ("Memory", json!(96 << 20)),
        ("MemorySwap", json!(96 << 20)),
        ("CpuPeriod", json!(100_000)),
        ("CpuQuota", json!(75_000)),
        ("PidsLimit", json!(33)),
        ("NetworkMode", json!("none")),
        ("IpcMode", json!("none")),
        ("PidMode", json!("")),
        ("UTSMode", json!("")),
        ("CgroupnsMode", json!("private")),
        ("LogConfig", json!({ "Type": "none", "Config": {} })),
        ("AutoRemove", json!(false)),
        ("OomKillDisable", json!(false)),
        ("Binds", json!(null)),
        ("Devices", json!(null)),
        ("PortBindings", json!(null)),
        ("DeviceRequests", json!(null)),
        ("VolumesFrom", json!(null)),
    ] {
        let value = &host[key];
        let none = wanted.is_null() && value.as_array().is_some_and(Vec::is_empty)
            || wanted.is_null() && value.as_object().is_some_and(serde_json::Map::is_empty);
        assert!(*value == wanted || none, "{key}: {value}, not {wanted}");
    }
    let list = |key: &str| -> std::collections::BTreeSet<_> {
        host[key].as_array().unwrap().iter().map(|path| path.as_str().unwrap()).collect()
    };
    for hidden in ["/sys", "/proc/kcore", "/proc/keys", "/dev/pts", "/dev/mqueue"] {
        assert!(list("MaskedPaths").contains(hidden), "{hidden}");
    }
    for fixed in ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq"] {
        assert!(list("ReadonlyPaths").contains(fixed), "{fixed}");
    }
    let options = host["SecurityOpt"].as_array().unwrap();
    assert!(options.contains(&json!("no-new-privileges")), "{options:?}");
    let profile = options.iter().find_map(|one| one.as_str()?.strip_prefix("seccomp="));
    let profile: Value = serde_json::from_str(profile.expect("a profile of ours")).unwrap();
    assert_ne!(profile["defaultAction"], "SCMP_ACT_ALLOW");
    let limits: Vec<_> = host["Ulimits"].as_array().unwrap().iter().collect();
    for (name, value) in [("nofile", 128), ("core", 1), ("fsize", 64 << 20)] {
        let wanted = json!({ "Name": name, "Soft": value, "Hard": value });
        assert!(limits.contains(&&wanted), "{wanted} in {limits:?}");
    }
    for mount in found["Mounts"].as_array().unwrap() {
        assert_eq!(mount["RW"], false, "{mount}");
    }
    let tmp = host["Tmpfs"]["/tmp"].as_str().unwrap();
    assert!(tmp.contains("noexec") && tmp.contains("size=8388608"), "{tmp}");

    running.cancel();
    wait_until("it is removed", LIMIT, || docker.labelled(&all).is_empty());
    assert!(!program.alive());
}

/// However a call ends, and wherever it fails on the way.
#[test]
fn no_end_leaves_a_container() {
    let docker = needs_docker!();
    let volumes = || docker.ask(&["volume", "ls", "--quiet"]);
    let before = volumes();
    let volume = docker.image(&[("tmp/", "")], &["VOLUME /data"]);
    // Docker can't start a container of the one, and we want none of the other.
    let no_place = docker.image(&[("tmp/", ""), ("run", "no directory")], &[]);
    let no_tmp = docker.image(&[("tmp/", "755")], &[]);
    let image =
        |name: &str, rest: &str| container(&format!("[container]\nimage = {name:?}\n{rest}"));
    let own = Dispatcher::start([
        ("box", container("[limits]\nmemory = \"32MiB\"\noutput = \"64KiB\"\n")),
        ("quick", container(&format!("[limits]\ntimeout = \"{}ms\"\n", scaled_ms(300)))),
        ("volume", image(&volume.name, "")),
        ("no-place", image(&no_place.name, "")),
        ("no-tmp", image(&no_tmp.name, "")),
        ("missing", image("dispatcher-test/nowhere:1", "")),
        ("runtime", container("[container]\nruntime = \"no-such-runtime\"\n")),
    ]);
    let run = |namespace: &str, program, args: &[&str]| own.run(namespace, program, args);
    run("box", "act", &[]).ok();
    run("box", "act", &["exit", "3"]).expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
    run("box", "act", &["raise", "9"]).expect(Code::Unknown, Verdict::Signalled, "signalled");
    run("quick", "act", &["forever"]).expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
    let over = |reason| (Code::ResourceExhausted, reason);
    let (code, reason) = over("out_of_memory");
    run("box", "hog", &["mmap", "200m"]).expect(code, Verdict::OutOfMemory, reason);
    let (code, reason) = over("output");
    run("box", "hog", &["stdout", "1g"]).expect(code, Verdict::OutputExceeded, reason);

    for (namespace, word) in [
        ("volume", "VOLUME"),
        ("no-place", "/run/dispatcher"),
        ("no-tmp", "make it 1777"),
        ("missing", "dispatcher-test/nowhere:1"),
        ("runtime", "no-such-runtime"),
    ] {
        let reply = run(namespace, "act", &[]);
        assert_eq!(reply.verdict, Verdict::Refused, "{namespace}: {}", reply.summary());
        assert_eq!(reply.code, Code::FailedPrecondition, "{namespace}: {}", reply.summary());
        assert!(reply.message.contains(word), "{namespace}: {}", reply.summary());
    }
    none_left(&docker, &own);
    own.assert_no_containers();
    assert_eq!(volumes(), before, "a volume is left over");
}

/// At each point of its making that is seen from outside.
#[test]
fn callers_that_go_away_leave_nothing() {
    let docker = needs_docker!();
    let own = Dispatcher::start([("box", container(""))]);
    let maker = own.process("dispatch-docker");
    let slots = own.directory.join("containers");
    let has_files = || host::files_below(&slots).is_ok_and(|files| !files.is_empty());
    let points: [(&str, &dyn Fn() -> bool); 3] = [
        ("its directory is made", &has_files),
        ("Docker has it", &|| !docker.owned_by(&maker).is_empty()),
        ("its init runs", &|| {
            host::named("dispatch-init").iter().any(|init| {
                let of = fs::read_to_string(format!("/proc/{}/mountinfo", init.pid));
                of.is_ok_and(|mounts| {
                    mounts.contains(slots.file_name().unwrap().to_str().unwrap())
                        && mounts.contains(own.directory.file_name().unwrap().to_str().unwrap())
                })
            })
        }),
    ];
    for (point, reached) in points {
        let name = token();
        let running = own.begin(Call::new("box", "act").args(&["name", &name, "forever"]));
        wait_until(point, LIMIT, reached);
        running.cancel();
        // Its directory is the last that goes before the container is asked to.
        wait_until("its directory is gone", LIMIT, || !has_files());
        none_left(&docker, &own);
        assert!(host::named(&name).is_empty(), "{point}: the program runs");
    }
    own.run("box", "act", &["print", "well"]).ok();
}

/// Also those that Docker has a mind of its own about.
#[test]
fn limits_are_honoured_or_refused() {
    let _docker = needs_docker!();
    let own = Dispatcher::start([
        // More than there are is no limit, nor is it an error.
        ("many", container("[limits]\ncpus = 512\n")),
        ("unlimited", container("[limits]\nmemory = \"unlimited\"\nswap = \"unlimited\"\n")),
    ]);
    let many = own.run("many", "act", &[]).ok().report.enforced;
    assert!(many.contains(&"cgroup.cpu".to_owned()), "{many:?}");
    let little = Call::new("many", "act").cpus(0.005);
    let reply = own.call(little).refused(Code::FailedPrecondition, "control_unavailable");
    assert_eq!(reply.detail("control"), "cgroup.cpu");
    let unlimited = own.run("unlimited", "act", &[]).ok().report.enforced;
    assert!(!unlimited.iter().any(|word| word == "cgroup.memory"), "{unlimited:?}");
    let limited = own.call(Call::new("unlimited", "act").memory(32 << 20)).ok().report.enforced;
    assert!(limited.contains(&"cgroup.memory".to_owned()), "{limited:?}");
}

#[test]
fn without_docker_only_containers_are_refused() {
    let policies = [("box", container("")), ("jail", plain(""))];
    let missing = "/nonexistent/docker.sock";
    let own = Settings::new(policies).docker(missing.as_ref()).start();
    for _ in 0..2 {
        let reply = own.run("box", "act", &[]).refused(Code::Unavailable, "docker_unavailable");
        assert!(reply.message.contains(missing), "{}", reply.summary());
        own.run("jail", "act", &["print", "well"]).ok();
    }
}

#[test]
fn input_arrives_whole_or_is_left() {
    let _docker = needs_docker!();
    for length in [1 << 20, 32 << 20] {
        let input: Vec<u8> = (0..length as u32).map(|index| (index % 251) as u8).collect();
        let facts = dispatcher().call(Call::new("large", "act").args(&["count"]).input(input)).ok();
        assert_eq!(facts.facts().number("stdin.bytes"), length);
    }
    // Not only as many bytes, but these.
    let input: Vec<u8> = (0..2_000_000_u32).map(|index| (index % 251) as u8).collect();
    let call = Call::new("large", "act").args(&["stdin"]).input(input.clone());
    let reply = dispatcher().call(call.output(OutputFormat::Bytes)).ok();
    assert!(reply.stdout() == input, "{} bytes", reply.stdout().len());
    for args in [&["print", "well"][..], &["close", "0", "print", "well"]] {
        let call = Call::new("large", "act").args(args).input(vec![0; 1 << 20]);
        assert_eq!(dispatcher().call(call).ok().text(), "well");
    }
}

#[test]
fn nothing_of_ours_can_be_touched() {
    let _docker = needs_docker!();
    let args = ["ls", "/run/dispatcher", "write", "/run/dispatcher/new", "x", "write", "/new", "x"];
    let facts = dispatcher().run("box", "act", &args).ok().facts();
    let listed =
        facts.all("/run/dispatcher").into_iter().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(listed, ["hold", "hosts", "init", "resolv.conf", "service"].into());
    assert_eq!((facts.one("/run/dispatcher/new"), facts.one("/new")), ("EROFS", "EROFS"));
    for file in ["hold", "init", "service"] {
        let finding = inside(&["write-to", &format!("/run/dispatcher/{file}")]);
        refused(&finding, &["EACCES", "EROFS"]);
    }
    refused(&inside(&["exe-overwrite", "0"]), &["EACCES", "EROFS", "ETXTBSY"]);
    refused(&inside(&["memory-of", "1"]), &["EACCES", "EPERM"]);
    refused(&inside(&["descriptor-of", "1"]), &["EACCES", "EPERM", "ENOSYS"]);
    refused(&inside(&["kill", "1"]), &["ignored", "EPERM"]);
    for file in ["root", "cwd", "exe", "environ", "fd/0"] {
        refused(&inside(&["read-file", &format!("/proc/1/{file}")]), &["EACCES", "EPERM"]);
    }
    let ptrace = libc::SYS_ptrace.to_string();
    dispatcher().run("box", "syscall", &["native", &ptrace, "16", "1"]).denied("");
    for way in
        [&["memfd-exec"][..], &["memfd-exec-flag"], &["file-exec", "/tmp"], &["file-map", "/tmp"]]
    {
        refused(&inside(way), &["EACCES", "EPERM", "EINVAL"]);
    }
    // Nor made fail by limits of its own.
    let prlimit = libc::SYS_prlimit64.to_string();
    for resource in [libc::RLIMIT_CPU, libc::RLIMIT_FSIZE, libc::RLIMIT_NOFILE, libc::RLIMIT_AS] {
        let args = ["native", &prlimit, "1", &resource.to_string(), "buf"];
        let facts = dispatcher().run("box", "syscall", &args).ok().facts();
        assert_eq!(facts.one("call"), "EPERM", "{resource}");
    }
    refused(&inside(&["leaked-directory"]), &["nothing-open"]);
}

#[test]
fn an_ending_cannot_be_forged() {
    let _docker = needs_docker!();
    let reply = dispatcher().run("box", "attack", &["forge"]);
    let reply = reply.expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
    assert_eq!(reply.report.exit_code, 7);
    assert!(reply.stderr().contains("forged"), "{}", reply.summary());
    // Init's own form, but for the nonce: it is the program's text as any other.
    let told = Record { verdict: Told::Ended(0), denied: false, left_behind: false };
    for nonce in [[0; NONCE_LEN], [0xff; NONCE_LEN]] {
        let hex: String = told.encode(&nonce).iter().map(|byte| format!("{byte:02x}")).collect();
        let reply = dispatcher().run("box", "act", &["hex", &hex, "exit", "9"]);
        let reply = reply.expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
        assert_eq!((reply.report.exit_code, reply.stdout()), (9, told.encode(&nonce).to_vec()));
    }
}

#[test]
fn there_is_no_network() {
    let _docker = needs_docker!();
    let facts = dispatcher().run("box", "facts", &["network"]).ok().facts();
    let outside = programs::outside("facts", &["network"]).facts();
    assert_eq!(outside.one("socket.2.1"), "ok", "the host has one");
    let open = facts.under("socket.").filter(|(_, result)| *result == "ok");
    let families: std::collections::BTreeSet<_> =
        open.map(|(key, _)| key.split('.').next().unwrap().to_owned()).collect();
    assert_eq!(families, ["1".to_owned()].into(), "AF_UNIX alone");
}

#[test]
fn what_takes_more_than_its_share_is_contained() {
    let _docker = needs_docker!();
    let facts = dispatcher().run("box", "hog", &["forks", "1000"]).ok().facts();
    let forked = facts.number("forked");
    assert!(facts.one("forked").ends_with("EAGAIN") && (20..32).contains(&forked), "{forked}");
    let facts = dispatcher().run("box", "hog", &["threads", "1000"]).ok().facts();
    assert!(facts.number("threads") < 32, "{facts:?}");
    for way in [["mmap", "200m"], ["memfd", "60m"], ["child-memory", "200m"]] {
        let call = Call::new("box", "hog").args(&way).memory(32 << 20);
        let reply = dispatcher().call(call);
        reply.expect(Code::ResourceExhausted, Verdict::OutOfMemory, "out_of_memory");
    }
    let facts = dispatcher().run("box", "hog", &["tmpfs", "64m"]).ok().facts();
    assert_eq!(facts.one("tmpfs"), format!("{} ENOSPC", 8 << 20));
    let facts = dispatcher().run("box", "hog", &["descriptors", "1000"]).ok().facts();
    assert_eq!(facts.one("descriptors"), "125 EMFILE");
    // However much comes, and both ways at once, no more of it is held than the limit.
    let maker = dispatcher().process("dispatch-docker");
    let reply = dispatcher().run("box", "hog", &["both", "300000"]);
    let reply = reply.expect(Code::ResourceExhausted, Verdict::OutputExceeded, "output");
    assert_eq!(reply.stdout().len(), 64 << 10);
    let reply = dispatcher().run("box", "hog", &["stderr", "300m"]).ok();
    assert!(reply.report.stderr.len() <= 64 << 10 && reply.report.stderr_truncated);
    let resident = maker.resident().unwrap() >> 20;
    assert!(resident < 128, "dispatch-docker has {resident} MiB");
}

#[test]
fn nothing_outlives_its_call() {
    let _docker = needs_docker!();
    for way in ["survivor", "survivor-with-output"] {
        let name = token();
        let reply = dispatcher().run("box", "hog", &[way, &name]).ok();
        assert_eq!(reply.facts().one("survivor"), "running");
        assert!(host::named(&name).is_empty(), "{way}: it is gone when the answer is here");
        assert!(reply.wall() < Duration::from_secs(5), "{way}: {:?}", reply.wall());
    }
    let name = token();
    let call = Call::new("box", "act").args(&["name", &name, "forever"]);
    let limit = Duration::from_millis(scaled_ms(300));
    let reply = dispatcher().call(call.timeout(limit));
    reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
    assert!(host::named(&name).is_empty(), "it is gone when the answer is here");
}

#[test]
fn runs_do_not_see_each_other() {
    let docker = needs_docker!();
    let socket = token();
    let listening =
        dispatcher().begin(Call::new("one", "attack").args(&["abstract-listen", &socket]));
    wait_until("it listens", LIMIT, || !host::named(&socket).is_empty());
    let in_other = |args: &[&str]| {
        dispatcher().run("other", "attack", args).ok().facts().one(args[0]).to_owned()
    };
    refused(&in_other(&["abstract-connect", &socket]), &["ECONNREFUSED"]);

    let shown = dispatcher().run("other", "act", &["ls", "/proc"]).ok().facts();
    let pids = shown.all("/proc").into_iter().filter_map(|name| name.parse::<u32>().ok());
    assert_eq!(pids.count(), 2, "init and itself: {shown:?}");
    let namespaces = |namespace| -> Facts {
        dispatcher().run(namespace, "facts", &["namespaces", "process"]).ok().facts()
    };
    let other = namespaces("other");
    let neighbour = host::named(&socket).remove(0);
    for kind in ["mnt", "pid", "ipc", "uts", "net", "cgroup"] {
        let own = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        let neighbours = fs::read_link(format!("/proc/{}/ns/{kind}", neighbour.pid)).unwrap();
        let seen = other.one(&format!("ns.{kind}"));
        assert!(own.to_str() != Some(seen) && neighbours.to_str() != Some(seen), "{kind}: {seen}");
    }
    // Nor what one left behind.
    for (kind, key) in [("sysv-shm", "4711"), ("mqueue", "left"), ("/tmp", "x")] {
        let left = dispatcher().run("one", "attack", &["leave", kind, key]).ok();
        if left.facts().one("leave") == "works" {
            refused(&in_other(&["find", kind, key]), &["ENOENT"]);
        }
    }
    assert!(neighbour.alive() && !listening.is_over());
    let ids = |namespace: &str| {
        let maker = dispatcher().process("dispatch-docker");
        let own = docker.owned_by(&maker);
        let of = docker.labelled(&[&format!("dispatcher.namespace={namespace}")]);
        own.into_iter().filter(|id| of.contains(id)).count()
    };
    assert_eq!(ids("one"), 1);
    listening.cancel();
    wait_for("its container is removed", LIMIT, || (ids("one") == 0).then_some(()));
}
