//! What a call that ran is answered with, in each mode: verdict, report, output,
//! and how the program is given its call.

mod common;
#[path = "conformance/surroundings.rs"]
mod surroundings;

use std::{
    collections::BTreeSet,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use common::{
    Call, Dispatcher, Facts, Reply,
    client::to_duration,
    dispatcher::{best_effort, container, direct, own_user, plain},
    docker::{self, needs_docker},
    host, programs, rootless, scaled_ms, shared, token, wait_until,
};
use dispatcher::{
    names::Digest,
    wire::{ExecutionMode, OutputFormat, Verdict, status::Code},
};
use prost::Message as _;
use prost_types::Any;
use surroundings::{
    Root, an_empty_root_shows_nothing_of_the_hosts, the_network_is_the_policys,
    the_system_calls_are_the_policys,
};

/// A mode, and what is another in it than in the others. All else is the same.
struct Mode {
    name: &'static str,
    number: ExecutionMode,
    /// What becomes of a program that makes the deadly call unshare(2). Direct mode has no
    /// filter, and the kernel refuses a call that takes privilege. A container's filter is
    /// Docker's to install: it hands nobody its notifications, so the kernel kills, and
    /// only SIGSYS is to be seen.
    unshare: Forbidden,
    /// What a program comes to that sends itself SIGSYS. Where the kernel kills for a
    /// forbidden call, and nobody is notified of it, the one can't be told from the other.
    own_sigsys: Verdict,
    /// Whether the filter's refusals are listed, `refused_syscalls`: by its notifications.
    names_refusals: bool,
    /// Whether `pids_peak` is the kernel's own record, and exact. Where that counts the
    /// container's init too, or isn't there, the dispatcher knows only what it saw.
    pids_peak_is_exact: bool,
    /// What an empty root has that no policy said. Docker makes places to mount at in /etc,
    /// whether or not anything is mounted there, and a /dev by the words of the OCI. Where
    /// there is none of it, the host's files are the program's.
    root: Option<Root>,
    /// What is in force whatever the host, as root.
    enforced: &'static str,
    /// What may be besides, as the kernel has it, or Docker is set up.
    by_host: &'static str,
}

/// See [`Mode::unshare`].
enum Forbidden {
    Named,
    Unnamed,
    Fails,
}

const JAIL: Mode = Mode {
    name: "jail",
    number: ExecutionMode::Jail,
    unshare: Forbidden::Named,
    own_sigsys: Verdict::Signalled,
    names_refusals: true,
    pids_peak_is_exact: true,
    root: Some(Root { top: &["dev", "proc", "tmp"], etc: &[], dev: &[] }),
    enforced: "ns.user ns.mount ns.pid ns.ipc ns.uts ns.net ns.cgroup host_uid root.readonly \
               proc.restricted caps.none no_new_privs seccomp rlimits cgroup.memory \
               cgroup.swap cgroup.pids cgroup.cpu cpu_time timeout output",
    by_host: "landlock memfd_noexec cgroup.kill",
};

const DIRECT: Mode = Mode {
    name: "direct",
    number: ExecutionMode::Direct,
    unshare: Forbidden::Fails,
    own_sigsys: Verdict::Signalled,
    names_refusals: false,
    pids_peak_is_exact: true,
    root: None,
    enforced: "ns.pid caps.none no_new_privs rlimits cgroup.memory cgroup.swap cgroup.pids \
               cgroup.cpu cpu_time timeout output",
    by_host: "cgroup.kill",
};

/// Without ns.user and host_uid, as Docker's containers of one host share their users (but
/// for its userns-remap); without landlock, which is the program's own to enter and init
/// has none of the jail's code; without proc.restricted, as Docker mounts /proc without
/// hidepid. memfd_noexec is the filter's here, whatever the kernel.
const CONTAINER: Mode = Mode {
    name: "container",
    number: ExecutionMode::Container,
    unshare: Forbidden::Unnamed,
    own_sigsys: Verdict::SyscallDenied,
    names_refusals: false,
    pids_peak_is_exact: false,
    root: Some(Root {
        top: &[".dockerenv", "dev", "etc", "proc", "run", "sys", "tmp"],
        etc: &["hostname", "hosts", "mtab", "resolv.conf"],
        dev: &["core", "fd", "mqueue", "ptmx", "pts", "shm", "stderr", "stdin", "stdout", "tty"],
    }),
    enforced: "ns.mount ns.pid ns.ipc ns.uts ns.net ns.cgroup root.readonly caps.none \
               no_new_privs seccomp memfd_noexec rlimits cgroup.memory cgroup.swap \
               cgroup.pids cgroup.cpu cpu_time timeout output",
    by_host: "ns.user cgroup.kill",
};

/// Every case is a test in every mode.
macro_rules! in_every_mode {
    ($($case:ident,)+) => {
        mod jail {
            $(#[test] fn $case() { super::$case(&super::JAIL); })+
        }
        mod direct {
            $(#[test] fn $case() { super::$case(&super::DIRECT); })+
        }
        mod container {
            $(#[test] fn $case() {
                let _docker = super::needs_docker!();
                super::$case(&super::CONTAINER);
            })+
        }
    };
}

in_every_mode! {
    verdicts_of_programs_that_end_by_themselves,
    verdicts_of_programs_that_were_ended,
    a_forbidden_call,
    exactly_the_limit_of_output_is_fine,
    of_stderr_the_tail_is_kept,
    a_caller_that_goes_away_ends_its_run,
    the_rpc_deadline_is_a_timeout_with_a_report,
    the_report_is_complete,
    what_is_in_force_is_listed,
    trailers_say_what_the_reply_says,
    usage_is_the_whole_trees,
    argv_and_environment_are_collectors,
    input_arrives_as_bytes_and_as_json,
    output_comes_in_the_format_asked_for,
    requests_tighten_by_options_or_context,
    the_program_is_nobody_of_importance,
    an_empty_root_shows_nothing_of_the_hosts,
    the_network_is_the_policys,
    the_system_calls_are_the_policys,
}

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        type Policy = fn(&str) -> String;
        let mut modes: Vec<(&str, Policy)> = vec![("jail", plain), ("direct", direct)];
        if docker::socket().is_some() && !rootless() {
            modes.push(("container", container));
        }
        let mut policies = vec![];
        for (mode, policy) in modes {
            let user = if mode == "direct" { own_user() } else { String::new() };
            policies.extend([
                (
                    mode.to_owned(),
                    policy(
                        "[limits]\nmemory = \"96MiB\"\noutput = \"64KiB\"\nstderr = \"1KiB\"\n\
                         [environment]\nallow = [\"EXTRA\"]\n",
                    ),
                ),
                (
                    format!("{mode}-collector"),
                    format!("mode = \"{mode}\"\n{}{user}", best_effort()),
                ),
                (
                    format!("{mode}-quick"),
                    policy(&format!("[limits]\ntimeout = \"{}ms\"\n", scaled_ms(300))),
                ),
                (format!("{mode}-cpu"), policy("[limits]\ncpu_time = \"400ms\"\n")),
                (format!("{mode}-hostnet"), policy("[network]\nmode = \"host\"\n")),
            ]);
            if mode != "direct" {
                let calls = "[seccomp]\nallow = [\"userfaultfd\"]\ndeny = [\"getppid\"]\n";
                policies.extend([
                    (format!("{mode}-loopback"), policy("[network]\nmode = \"loopback\"\n")),
                    (format!("{mode}-calls"), policy(calls)),
                ]);
            }
        }
        Dispatcher::start(policies)
    })
}

fn verdicts_of_programs_that_end_by_themselves(at: &Mode) {
    let mode = at.name;
    let run = |args: &[&str]| dispatcher().run(mode, "act", args);
    let reply = run(&["print", "fine"]).ok();
    assert_eq!((reply.report.exit_code, reply.report.signal), (0, 0));
    assert_eq!(reply.text(), "fine");

    let reply = run(&["print", "so far", "exit", "3"]);
    let reply = reply.expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
    assert_eq!((reply.report.exit_code, reply.detail("exit_code")), (3, "3"), "{mode}");
    assert_eq!(reply.text(), "so far", "{mode}: output whatever the verdict");

    for signal in [libc::SIGTERM, libc::SIGSEGV, libc::SIGKILL, libc::SIGABRT] {
        let reply = run(&["print", "so far", "raise", &signal.to_string()]);
        let reply = reply.expect(Code::Unknown, Verdict::Signalled, "signalled");
        assert_eq!(reply.report.signal, signal, "{mode}");
        assert_eq!(reply.detail("signal"), signal.to_string(), "{mode}");
        assert_eq!(reply.text(), "so far", "{mode}");
    }
}

fn verdicts_of_programs_that_were_ended(at: &Mode) {
    let mode = at.name;
    let quick = format!("{mode}-quick");
    let reply = dispatcher().run(&quick, "act", &["print", "so far", "forever"]);
    let reply = reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
    assert_eq!(reply.text(), "so far", "{mode}");

    let reply = dispatcher().run(&format!("{mode}-cpu"), "hog", &["cpu", "2", "60000"]);
    reply.expect(Code::ResourceExhausted, Verdict::CpuTimeExceeded, "cpu_time");

    let reply = dispatcher().run(mode, "hog", &["mmap", "200m"]);
    reply.expect(Code::ResourceExhausted, Verdict::OutOfMemory, "out_of_memory");
    // A child's, while the first process goes on and ends well.
    let reply = dispatcher().run(mode, "hog", &["child-memory", "200m"]);
    reply.expect(Code::ResourceExhausted, Verdict::OutOfMemory, "out_of_memory");

    let reply = dispatcher().run(mode, "hog", &["stdout", "1m"]);
    let reply = reply.expect(Code::ResourceExhausted, Verdict::OutputExceeded, "output");
    assert!(reply.report.stdout_truncated, "{mode}");
    assert_eq!(reply.stdout(), vec![b'x'; 64 << 10], "{mode}: all that the limit gives");
}

fn a_forbidden_call(at: &Mode) {
    let syscall = |number: i64, argument| {
        let number = number.to_string();
        dispatcher().run(at.name, "syscall", &["native", &number, argument])
    };
    // CLONE_NEWNS, which takes privilege.
    let reply = syscall(libc::SYS_unshare, "0x20000");
    match at.unshare {
        Forbidden::Named => drop(reply.denied("unshare")),
        Forbidden::Unnamed => drop(reply.denied("")),
        Forbidden::Fails => assert_eq!(reply.ok().facts().one("call"), "EPERM"),
    }
    let reply = dispatcher().run(at.name, "act", &["raise", &libc::SIGSYS.to_string()]);
    assert_eq!((reply.verdict, reply.report.signal), (at.own_sigsys, libc::SIGSYS));
    let reply = syscall(libc::SYS_userfaultfd, "0").ok();
    let listed: &[&str] = if at.names_refusals { &["userfaultfd"] } else { &[] };
    assert_eq!(reply.report.refused_syscalls, listed);
}

fn exactly_the_limit_of_output_is_fine(at: &Mode) {
    let mode = at.name;
    let reply = dispatcher().run(mode, "hog", &["stdout", "64k"]).ok();
    assert_eq!(reply.stdout().len(), 64 << 10, "{mode}");
    assert!(!reply.report.stdout_truncated, "{mode}");
}

fn of_stderr_the_tail_is_kept(at: &Mode) {
    let mode = at.name;
    let reply = dispatcher().run(mode, "hog", &["stderr", "4m"]).ok();
    assert_eq!(reply.report.stderr, vec![b'x'; 1 << 10], "{mode}");
    assert!(reply.report.stderr_truncated, "{mode}");
    let reply = dispatcher().run(mode, "act", &["err", "first", "err", "last"]).ok();
    assert_eq!(reply.stderr(), "firstlast");
    assert!(!reply.report.stderr_truncated, "{mode}");
}

fn a_caller_that_goes_away_ends_its_run(at: &Mode) {
    let mode = at.name;
    let name = token();
    let call = Call::new(mode, "act").args(&["name", &name, "forever"]);
    let running = dispatcher().begin(call.option(|options| options.request_id = name.clone()));
    wait_until("running", Duration::from_secs(10), || !host::named(&name).is_empty());
    running.cancel();
    wait_until("ended", Duration::from_secs(5), || host::named(&name).is_empty());
    wait_until("it is on record as cancelled", Duration::from_secs(5), || {
        let log = dispatcher().log();
        log.lines().any(|line| line.contains(&name) && line.to_lowercase().contains("cancelled"))
    });
}

/// The program's end is the call's end, for the RPC's own deadline too: a little
/// earlier, so that the report arrives. On a busy machine a tenth of a second may
/// not be enough for it: one that arrives in several tries is what is promised.
fn the_rpc_deadline_is_a_timeout_with_a_report(at: &Mode) {
    let mode = at.name;
    const TRIES: usize = 10;
    let deadline = Duration::from_millis(scaled_ms(1000));
    let call = || Call::new(mode, "act").args(&["print", "so far", "forever"]);
    let try_once = |_| dispatcher().begin(call().rpc_deadline(deadline)).finish().ok();
    let reply = (0..TRIES).find_map(try_once).expect("a report in time, once at least");
    let reply = reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
    assert!(reply.elapsed < deadline, "{mode}: {:?}", reply.elapsed);
    // Making a container is a good part of it.
    let used = to_duration(reply.report.setup_time.as_ref()) + reply.wall();
    assert!(used > deadline.mul_f64(0.6), "{mode}: {used:?}");
    assert_eq!(reply.text(), "so far");
}

fn the_report_is_complete(at: &Mode) {
    let (mode, number) = (at.name, at.number);
    let before = SystemTime::now();
    let call = Call::new(mode, "act").args(&["sleep", "50"]).context("colour", "blue");
    let reply = dispatcher().call(call.context("timeout", "20s")).ok();
    let report = &reply.report;

    assert_eq!(report.mode(), number);
    assert_eq!(report.artifact_digest, Digest::of(&programs::bytes("act")).to_string());
    assert_eq!(report.policy, mode);
    for digest in [&report.policy_digest, &report.policy_set_digest] {
        assert!(digest.parse::<Digest>().is_ok(), "{digest}");
    }
    assert_eq!(reply.executor, "test-host");
    assert!(report.dispatcher_version.starts_with(env!("CARGO_PKG_VERSION")));
    assert_eq!(report.ignored_context, ["colour"]);
    assert_eq!(report.run_id.len(), 32, "{}", report.run_id);
    assert!(!report.warm);

    let start = report.start_time.as_ref().unwrap();
    let start = SystemTime::UNIX_EPOCH + Duration::new(start.seconds as u64, start.nanos as u32);
    assert!(before <= start && start <= SystemTime::now(), "{start:?}");
    let (queue, setup) =
        (to_duration(report.queue_time.as_ref()), to_duration(report.setup_time.as_ref()));
    assert!(reply.wall() >= Duration::from_millis(50), "{:?}", reply.wall());
    assert!(queue + setup + reply.wall() <= reply.elapsed, "parts of the whole: {report:?}");
    assert!(setup > Duration::ZERO, "{setup:?}");
}

fn what_is_in_force_is_listed(at: &Mode) {
    let report = dispatcher().run(at.name, "act", &[]).ok().report;
    let versionless = |word: &String| word.split(".v").next().unwrap().to_owned();
    let found: BTreeSet<_> = report.enforced.iter().map(versionless).collect();
    let set = |words: &str| words.split(' ').map(str::to_owned).collect();
    let (always, perhaps): (BTreeSet<_>, BTreeSet<_>) = (set(at.enforced), set(at.by_host));
    if rootless() {
        // Not host_uid, of cgroups what is delegated, and all of it in a user namespace.
        let possible = &(&always | &perhaps) | &set("ns.user");
        assert!(found.is_subset(&possible), "{found:?}");
        assert!(found.contains("no_new_privs") && found.contains("timeout"), "{found:?}");
    } else {
        assert_eq!(&found - &perhaps, always);
    }
}

fn trailers_say_what_the_reply_says(at: &Mode) {
    let check = |reply: Reply| {
        let trailer = |name: &str| reply.trailers.get(name).map_or("", String::as_str);
        assert_eq!(trailer("dispatcher-code"), reply.code.as_str_name(), "{:?}", reply.trailers);
        let verdict = reply.verdict.as_str_name();
        assert_eq!(trailer("dispatcher-verdict"), verdict.trim_start_matches("VERDICT_"));
        assert_eq!(trailer("dispatcher-reason"), reply.reason());
        assert_eq!(trailer("dispatcher-run-id"), reply.report.run_id);
    };
    check(dispatcher().run(at.name, "act", &[]).ok());
    check(dispatcher().run(at.name, "act", &["exit", "1"]));
    check(dispatcher().run(&format!("{}-quick", at.name), "act", &["forever"]));
    check(dispatcher().run("nowhere", "act", &[]));
    let nameless = Call::new(at.name, "act").with(|request| request.method_name.clear());
    check(dispatcher().call(nameless));
}

/// CPU time and memory are the whole tree's, children that were waited for or not.
fn usage_is_the_whole_trees(at: &Mode) {
    let mode = at.name;
    let reply = dispatcher().run(mode, "hog", &["cpu", "3", "200"]).ok();
    let cpu = reply.cpu();
    assert!(cpu >= Duration::from_millis(580), "{mode}: {cpu:?}");
    assert!(cpu <= Duration::from_millis(600 + scaled_ms(300)), "{mode}: {cpu:?}");
    let peak = reply.report.pids_peak;
    // Three children and the first.
    assert!(if at.pids_peak_is_exact { peak == 4 } else { (1..=4).contains(&peak) }, "{peak}");

    let reply = dispatcher().run(mode, "hog", &["mmap", "32m"]).ok();
    let peak = reply.report.memory_peak_bytes >> 20;
    assert!((32..48).contains(&peak), "{mode}: {peak} MiB");
    // What one run used does not stick to the next.
    let reply = dispatcher().run(mode, "act", &[]).ok();
    let peak = reply.report.memory_peak_bytes >> 20;
    assert!(peak < 8, "{mode}: {peak} MiB for a program that does nothing");
    assert!(reply.cpu() < Duration::from_millis(scaled_ms(100)), "{mode}: {:?}", reply.cpu());
}

fn argv_and_environment_are_collectors(at: &Mode) {
    let mode = at.name;
    let namespace = format!("{mode}-collector");
    let call = Call::new(&namespace, "echo").method("greeter", "SayHello");
    let reply = dispatcher().call(call.args(&["--loud", "two words", ""])).ok();
    let facts = reply.facts();
    let expected = ["service", &namespace, "greeter", "SayHello", "--loud", "two words", ""];
    assert_eq!(facts.all("argv"), expected, "{mode}");
    let entries = facts.set("env");
    for (name, value) in [
        ("DISPATCHER_NAMESPACE", namespace.as_str()),
        ("DISPATCHER_SERVICE", "greeter"),
        ("DISPATCHER_METHOD", "SayHello"),
        ("GRPC_INPUT_DATA", "{}"),
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("HOME", "/tmp"),
        ("TMPDIR", "/tmp"),
        ("LANG", "C.UTF-8"),
    ] {
        assert!(entries.contains(format!("{name}={value}").as_str()), "{mode} {name}: {entries:?}");
    }
    let names: BTreeSet<_> = entries.iter().map(|entry| entry.split('=').next().unwrap()).collect();
    assert!(names.len() <= 9, "{mode}: nothing of the host's: {names:?}");
    assert_eq!(facts.one("stdin"), "");

    let reply = dispatcher().call(Call::new(mode, "echo").args(&["x"]).env("EXTRA", "a=b\nc")).ok();
    assert_eq!(reply.facts().all("argv"), ["service", "x"], "{mode}: plain");
    assert!(reply.text().contains("env=EXTRA=a=b\nc\n"), "{mode}: {}", reply.text());
}

/// The environment as the program has it, one variable.
fn variable(facts: &Facts, name: &str) -> Option<String> {
    let prefix = format!("{name}=");
    facts.all("env").iter().find_map(|entry| entry.strip_prefix(&prefix)).map(str::to_owned)
}

fn input_arrives_as_bytes_and_as_json(at: &Mode) {
    let mode = at.name;
    let text_type = "type.googleapis.com/google.protobuf.StringValue";
    let text = "grüße".to_owned().encode_to_vec();
    let cases = [
        (text_type, text.clone(), serde_json::json!({ "@type": text_type, "value": "grüße" })),
        // Not of its type: given all the same.
        (
            text_type,
            b"\xff\xff".to_vec(),
            serde_json::json!({ "@type": text_type, "@value": "//8=" }),
        ),
        (
            "example.com/unknown.Type",
            vec![1, 2],
            serde_json::json!({ "@type": "example.com/unknown.Type", "@value": "AQI=" }),
        ),
    ];
    for (type_url, value, json) in &cases {
        let by_any = Call::new(mode, "echo").any(type_url, value.clone());
        let by_options = Call::new(mode, "echo").input(value.clone());
        let by_options = by_options.option(|options| options.input_type = (*type_url).into());
        for call in [by_any, by_options] {
            let facts = dispatcher().call(call).ok().facts();
            let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(facts.one("stdin"), hex, "{mode} {type_url}");
            assert_eq!(facts.one("stdin.end"), "ok");
            assert_eq!(variable(&facts, "DISPATCHER_INPUT_TYPE").as_deref(), Some(*type_url));
            let data = variable(&facts, "GRPC_INPUT_DATA").unwrap();
            assert_eq!(&serde_json::from_str::<serde_json::Value>(&data).unwrap(), json, "{mode}");
        }
    }
    // Too large for an environment: on stdin only.
    let large = "x".repeat(120 << 10).encode_to_vec();
    let call = Call::new(&format!("{mode}-collector"), "echo").any(text_type, large.clone());
    let facts = dispatcher().call(call).ok().facts();
    assert_eq!(facts.one("stdin").len(), 2 * large.len(), "{mode}");
    assert_eq!(variable(&facts, "GRPC_INPUT_DATA"), None, "{mode}");
}

fn output_comes_in_the_format_asked_for(at: &Mode) {
    let mode = at.name;
    let bytes_type = "type.googleapis.com/google.protobuf.BytesValue";
    let status_type = "type.googleapis.com/collector.Status";
    let run =
        |format, args: &[&str]| dispatcher().call(Call::new(mode, "act").args(args).output(format));
    let type_of = |reply: &Reply| reply.output.as_ref().unwrap().type_url.clone();

    let reply = run(OutputFormat::Status, &["print", "text"]).ok();
    assert_eq!((type_of(&reply).as_str(), reply.text().as_str()), (status_type, "text"));
    let reply = run(OutputFormat::Status, &["hex", "ff00"]).ok();
    assert_eq!((type_of(&reply).as_str(), reply.stdout()), (bytes_type, vec![0xff, 0]));
    let reply = run(OutputFormat::Bytes, &["print", "text"]).ok();
    assert_eq!((type_of(&reply).as_str(), reply.text().as_str()), (bytes_type, "text"));

    let any = Any { type_url: "example.com/some.Type".into(), value: vec![1, 2, 3] };
    let hex: String = any.encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect();
    let reply = run(OutputFormat::Any, &["hex", &hex]).ok();
    assert_eq!(reply.output.unwrap(), any, "{mode}");
    let reply = run(OutputFormat::Any, &["print", "not an Any"]);
    let reply = reply.expect(Code::DataLoss, Verdict::Exited, "bad_output");
    assert_eq!((type_of(&reply).as_str(), reply.text().as_str()), (bytes_type, "not an Any"));

    let default = dispatcher().run(&format!("{mode}-collector"), "echo", &[]).ok();
    assert_eq!(type_of(&default), status_type, "{mode}: Collector's by default");
}

fn requests_tighten_by_options_or_context(at: &Mode) {
    let (mode, number) = (at.name, at.number);
    let limit = scaled_ms(200);
    let forever = Call::new(mode, "act").args(&["forever"]);
    for call in [
        forever.clone().timeout(Duration::from_millis(limit)),
        forever.clone().context("timeout", &format!("{limit}ms")),
        // Options win over the context.
        forever.clone().context("timeout", "25s").timeout(Duration::from_millis(limit)),
    ] {
        let reply = dispatcher().call(call);
        let reply = reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
        assert!(reply.wall() < Duration::from_millis(limit * 3), "{mode}: {:?}", reply.wall());
    }
    let greedy = Call::new(mode, "hog").args(&["mmap", "32m"]);
    dispatcher().call(greedy.clone()).ok();
    for call in [greedy.clone().memory(16 << 20), greedy.context("memory", "16MiB")] {
        dispatcher().call(call).expect(
            Code::ResourceExhausted,
            Verdict::OutOfMemory,
            "out_of_memory",
        );
    }
    let slow = dispatcher().call(Call::new(mode, "act").args(&["burn", "200"]).cpus(0.25)).ok();
    assert!(slow.wall() >= Duration::from_millis(500), "{mode}: a quarter: {:?}", slow.wall());
    let named = dispatcher().call(Call::new(mode, "act").mode(number)).ok();
    assert_eq!(named.report.mode(), number);
}

fn the_program_is_nobody_of_importance(at: &Mode) {
    let groups = ["identity", "descriptors", "process", "capabilities"];
    let facts = dispatcher().run(at.name, "facts", &groups).ok().facts();
    let (uid, gid) = match at.number {
        // The policy's user.
        ExecutionMode::Direct => {
            let user = if rootless() {
                nix::unistd::User::from_uid(nix::unistd::geteuid())
            } else {
                nix::unistd::User::from_name("nobody")
            };
            let user = user.unwrap().unwrap();
            (user.uid.as_raw(), user.gid.as_raw())
        }
        _ => (65_534, 65_534),
    };
    assert_eq!(facts.one("uid"), format!("{uid} {uid} {uid}"));
    assert_eq!(facts.one("gid"), format!("{gid} {gid} {gid}"));
    assert_eq!(facts.all("group").iter().filter(|group| **group == "0").count(), 0);
    assert_eq!(facts.all("fd"), ["0", "1", "2"]);
    assert_eq!(facts.one("ppid"), "1");
    assert_eq!(facts.one("no_new_privs"), "1");
    assert_eq!(facts.one("cap.effective"), "0");
    assert_eq!(facts.one("cap.permitted"), "0");
    assert_eq!(facts.all("signal.ignored"), [""; 0]);
    assert_eq!(facts.all("signal.blocked"), [""; 0]);
    assert_eq!(facts.one("sid.own"), "yes");
    assert_ne!(facts.one("tty"), "ok");
}
