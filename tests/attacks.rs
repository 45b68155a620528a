//! What hostile tenants try. Each attack is first shown to work outside: an attack
//! that fails everywhere proves nothing about the jail.
//!
//! Inside, each meets a jail as calls get them in earnest: built ahead, and of what earlier runs
//! had. There have to be other calls for that, a crowd of them.

mod common;

use std::{
    collections::HashSet, fs, os::fd::AsRawFd as _, process::Command, sync::OnceLock,
    time::Duration,
};

use common::{
    Call, Dispatcher, Facts, Reply,
    crowd::{self, Crowd, Marks},
    dispatcher::{binary, direct, plain},
    host, not_here,
    programs::{self, Background},
    rootless, scaled_ms, shared, skip, slowness, token, wait_until,
};
use dispatcher::wire::{Verdict, status::Code};

/// For a crowd from every test that runs at the same time.
const ADMISSION: &str = "[admission]\nqueue = \"unlimited\"\nqueue_timeout = \"5m\"\n";

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        let soon = format!("[limits]\ntimeout = \"{}ms\"\n", scaled_ms(700));
        let crowded = |rest: &str| format!("{rest}{ADMISSION}");
        Dispatcher::start([
            ("jail", plain(&crowded("[limits]\npids = 64\nmemory = \"128MiB\"\n"))),
            ("host", plain(&crowded("[filesystem]\nroot = \"host\"\n"))),
            ("exec-tmp", plain(&crowded("[filesystem]\ntmp_exec = true\n"))),
            ("loopback", plain(&crowded("[network]\nmode = \"loopback\"\n"))),
            ("soon", plain(&crowded(&soon))),
            ("direct", direct(&crowded("[limits]\npids = 64\n"))),
            ("many", plain(&format!("{ADMISSION}concurrency = 32\n"))),
            ("labels", plain("[environment]\nallow = [\"X\"]\n")),
        ])
    })
}

/// A process outside to attack; killed when dropped.
struct Victim(Background, tempfile::TempDir);

impl Victim {
    /// Runs from its own copy of the program, which may be overwritten.
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let copy = directory.path().join("victim");
        fs::copy(programs::path("act"), &copy).unwrap();
        let name = token();
        let child = programs::background(&copy, &["name", &name, "forever"]);
        wait_until("the victim runs", Duration::from_secs(5), || !host::named(&name).is_empty());
        Self(child, directory)
    }

    fn pid(&self) -> String {
        self.0.0.id().to_string()
    }
}

/// The one line an attack prints.
#[track_caller]
fn finding(facts: &Facts, attack: &str) -> String {
    facts.one(attack).to_owned()
}

#[track_caller]
fn outside(args: &[&str]) -> String {
    finding(&programs::outside("attack", args).facts(), args[0])
}

/// An attack, as often as it takes until it was made in a jail that was built ahead, with the
/// network namespace of an earlier run where there is such a one to be had.
#[track_caller]
fn attack(namespace: &str, args: &[&str]) -> Vec<Reply> {
    let is_alone = !rootless() && ["jail", "exec-tmp"].contains(&namespace);
    crowd::among_others(dispatcher(), namespace, args, |made| {
        made.was_ahead() && (made.is_again() || !is_alone)
    })
}

/// What an attack comes to, which is the same in every jail of a policy.
#[track_caller]
fn inside(namespace: &str, args: &[&str]) -> String {
    let replies = attack(namespace, args);
    let findings: HashSet<_> =
        replies.iter().map(|reply| finding(&reply.facts(), args[0])).collect();
    assert_eq!(findings.len(), 1, "{findings:?}");
    findings.into_iter().next().unwrap()
}

/// Runs a program in a crowd.
#[track_caller]
fn run(namespace: &str, program: &str, args: &[&str]) -> Reply {
    let _crowd = Crowd::of(dispatcher());
    dispatcher().run(namespace, program, args)
}

/// Asserts that it did not work, for one of these reasons.
#[track_caller]
fn refused(finding: &str, reasons: &[&str]) {
    let why = finding.strip_prefix("refused ").unwrap_or_else(|| panic!("it {finding}"));
    assert!(reasons.contains(&why), "refused, but by {why}, not one of {reasons:?}");
}

/// CVE-2019-5736.
#[test]
fn the_launcher_is_not_overwritten() {
    let before = fs::read(binary()).unwrap();
    let victim = Victim::start();
    assert_eq!(outside(&["exe-overwrite", &victim.pid()]), "works");
    let content = fs::read(victim.1.path().join("victim")).unwrap();
    assert_eq!(&content[..2], b"#!", "it really was overwritten");

    refused(&inside("jail", &["exe-overwrite", "1"]), &["ENOENT", "EACCES"]);
    refused(&inside("host", &["exe-overwrite", "1"]), &["ENOENT", "EACCES"]);
    refused(&inside("direct", &["exe-overwrite", "1"]), &["ENOENT", "EACCES"]);
    // One's own executable is shared with every run of the same artifact.
    for namespace in ["jail", "direct"] {
        let own = inside(namespace, &["exe-overwrite", "0"]);
        refused(&own, &["EACCES", "EPERM", "ETXTBSY", "EROFS", "ENOENT"]);
    }
    assert!(fs::read(binary()).unwrap() == before, "our own executable is as it was");
}

/// CVE-2024-21626.
#[test]
fn no_directory_is_left_open() {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" leaked-directory 3</"]).arg(programs::path("attack"));
    let output = command.output().unwrap();
    let facts = Facts::parse(&String::from_utf8_lossy(&output.stdout));
    assert_eq!(finding(&facts, "leaked-directory"), "works");
    for namespace in ["jail", "host", "loopback", "direct"] {
        refused(&inside(namespace, &["leaked-directory"]), &["nothing-open"]);
    }
}

#[test]
fn init_can_be_neither_read_nor_harmed() {
    let victim = Victim::start();
    assert_eq!(outside(&["memory-of", &victim.pid()]), "works");
    assert_eq!(outside(&["descriptor-of", &victim.pid()]), "works");
    assert_eq!(outside(&["kill", &victim.pid()]), "works");
    for namespace in ["jail", "direct"] {
        refused(&inside(namespace, &["memory-of", "1"]), &["ENOENT", "EACCES", "EPERM"]);
        refused(&inside(namespace, &["descriptor-of", "1"]), &["EPERM", "ESRCH", "ENOSYS"]);
        refused(&inside(namespace, &["kill", "1"]), &["ignored", "EPERM"]);
    }
}

#[test]
fn nobody_else_is_in_sight() {
    assert_eq!(outside(&["see-others"]), "works");
    refused(&inside("jail", &["see-others"]), &["none"]);
    refused(&inside("host", &["see-others"]), &["none"]);
}

/// Bytes of the program's own making, from memory and from files.
#[test]
fn own_bytes_cannot_be_executed() {
    assert_eq!(outside(&["memfd-exec"]), "works");
    assert_eq!(outside(&["file-exec", "."]), "works");
    assert_eq!(outside(&["file-map", "."]), "works");
    for namespace in ["jail", "host"] {
        refused(&inside(namespace, &["file-exec", "/tmp"]), &["EACCES"]);
        refused(&inside(namespace, &["file-map", "/tmp"]), &["EPERM"]);
        let replies = attack(namespace, &["memfd-exec"]);
        let refusals = ["EACCES", "EPERM", "ENOSYS"];
        let enforced = |reply: &Reply| reply.report.enforced.iter().any(|it| it == "memfd_noexec");
        // `memfd_noexec` is best effort by default, but what is reported must be true.
        if replies.iter().any(enforced) {
            for reply in replies {
                assert!(enforced(&reply), "{:?}", reply.report.enforced);
                refused(reply.facts().one("memfd-exec"), &refusals);
            }
            refused(&inside(namespace, &["memfd-exec-flag"]), &refusals);
        } else {
            not_here!("memfd_noexec is not in force on this kernel");
        }
    }
    assert_eq!(inside("exec-tmp", &["file-exec", "/tmp"]), "works");
    assert_eq!(inside("exec-tmp", &["file-map", "/tmp"]), "works");
}

#[test]
fn links_lead_nowhere() {
    for target in ["/etc/hostname", "/proc/1/cmdline", "/proc/sys/kernel/core_pattern"] {
        assert_eq!(outside(&["follow-link", "/tmp", target]), "works", "{target}");
        refused(&inside("jail", &["follow-link", "/tmp", target]), &["ENOENT"]);
    }
    let secret = if rootless() { "/etc/hostname" } else { "/etc/shadow" };
    assert_eq!(outside(&["follow-link", "/tmp", secret]), "works");
    for target in [secret, "/proc/1/root/etc/shadow", "/proc/self/cwd/../etc/shadow"] {
        refused(&inside("host", &["follow-link", "/tmp", target]), &["ENOENT", "EACCES"]);
    }
}

#[test]
fn nothing_of_the_host_can_be_written() {
    let mut targets = vec!["/proc/self/mem", "/proc/self/uid_map", "/proc/self/oom_score_adj"];
    if !rootless() {
        targets.push("/proc/sys/kernel/core_pattern");
    }
    for target in targets {
        assert_eq!(outside(&["write-to", target]), "works", "{target}");
        for namespace in ["jail", "host"] {
            refused(&inside(namespace, &["write-to", target]), &["ENOENT", "EACCES", "EROFS"]);
        }
    }
    for target in ["/usr/bin/env", "/bin/sh", "/etc/passwd", "/etc/ld.so.cache"] {
        refused(&inside("host", &["write-to", target]), &["EROFS", "EACCES", "ENOENT"]);
    }
}

#[test]
fn no_file_becomes_roots() {
    if rootless() {
        not_here!("an ordinary user cannot make files of root outside either");
    }
    assert_eq!(outside(&["setuid-file", "."]), "works");
    refused(&inside("jail", &["setuid-file", "/tmp"]), &["EPERM", "EINVAL"]);
}

#[test]
fn terminals_cannot_be_typed_into() {
    let pty = nix::pty::openpty(None, None).unwrap();
    let name = nix::unistd::ttyname(&pty.slave).unwrap();
    let legacy =
        fs::read_to_string("/proc/sys/dev/tty/legacy_tiocsti").is_ok_and(|on| on.trim() == "1");
    for attack in ["tiocsti", "tiocsti-upper"] {
        if !rootless() || legacy {
            assert_eq!(outside(&[attack, name.to_str().unwrap()]), "works");
        }
        refused(&inside("jail", &[attack]), &["EPERM", "ENOTTY", "EACCES"]);
        refused(&inside("jail", &[attack, "/dev/tty"]), &["ENOENT"]);
    }
    assert!(pty.master.as_raw_fd() >= 0, "the terminal stayed open until here");
}

/// State that one run leaves for the next, by every means there is.
#[test]
fn nothing_passes_from_run_to_run() {
    let key = (0x1000_0000 + std::process::id()).to_string();
    // Until one that looks has the network namespace of one that left. Without root none has, and
    // a slow machine has enough to do.
    let inherits = !rootless() && slowness() <= 1.0;
    let (leaving, looking) = if inherits { (3, 9) } else { (1, 1) };
    for kind in ["sysv-shm", "sysv-msg", "mqueue", "/tmp", "/dev/shm", "/var/tmp"] {
        assert_eq!(outside(&["leave", kind, &key]), "works", "{kind}");
        assert_eq!(outside(&["find", kind, &key]), "works", "{kind}");
        let begin = |way: &str| crowd::begin(dispatcher(), "jail", &[way, kind, &key]);
        let mut networks = HashSet::new();
        for round in 1.. {
            let leave: Vec<_> = (0..leaving).map(|_| begin("leave")).collect();
            let mut heirs = 0;
            let left: Vec<_> = leave.into_iter().map(|run| run.finish().unwrap().ok()).collect();
            let find: Vec<_> = (0..looking).map(|_| begin("find")).collect();
            for reply in left {
                let facts = reply.facts();
                assert_ne!(facts.one("leave"), "refused EEXIST", "{kind}: of an earlier run");
                networks.insert(Marks::of(&facts).network);
            }
            for running in find {
                let facts = running.finish().unwrap().ok().facts();
                refused(facts.one("find"), &["ENOENT", "ENOSYS", "EACCES", "EROFS"]);
                heirs += usize::from(networks.contains(&Marks::of(&facts).network));
            }
            if heirs > 0 || !inherits {
                break;
            }
            assert!(round < 20, "{kind}: nobody got the network namespace of who left");
        }
        // Nor does it reach the host.
        assert_ne!(outside(&["find", kind, &key]), "works", "{kind}");
    }
}

/// The abstract namespace of unix sockets belongs to the network namespace.
#[test]
fn concurrent_runs_do_not_hear_each_other() {
    let name = token();
    let listener = programs::background(&programs::path("attack"), &["abstract-listen", &name]);
    wait_until("listening", Duration::from_secs(5), || !host::named(&name).is_empty());
    assert_eq!(outside(&["abstract-connect", &name]), "works");
    refused(&inside("jail", &["abstract-connect", &name]), &["ECONNREFUSED"]);
    refused(&inside("loopback", &["abstract-connect", &name]), &["ECONNREFUSED"]);
    drop(listener);

    for namespace in ["jail", "loopback"] {
        let name = token();
        let _crowd = Crowd::of(dispatcher());
        let running =
            dispatcher().begin(Call::new(namespace, "attack").args(&["abstract-listen", &name]));
        wait_until("listening", Duration::from_secs(10), || !host::named(&name).is_empty());
        refused(&inside(namespace, &["abstract-connect", &name]), &["ECONNREFUSED"]);
        running.cancel();
        wait_until("cancelled", Duration::from_secs(10), || host::named(&name).is_empty());
    }
}

/// A process that outlives its parent and its session does not outlive the call.
#[test]
fn survivors_do_not_survive() {
    let name = token();
    programs::outside("hog", &["survivor", &name]);
    let left = host::named(&name);
    assert_eq!(left.len(), 1, "outside it lives on");
    left[0].signal(nix::sys::signal::Signal::SIGKILL);

    for namespace in ["jail", "direct", "host"] {
        for way in ["survivor", "survivor-with-output"] {
            let name = token();
            let _crowd = Crowd::of(dispatcher());
            let reply = dispatcher().run(namespace, "hog", &[way, &name]).ok();
            assert_eq!(reply.facts().one("survivor"), "running", "{namespace} {way}");
            assert!(
                host::named(&name).is_empty(),
                "{namespace} {way}: gone once the reply is here"
            );
            assert!(reply.wall() < Duration::from_millis(scaled_ms(3000)), "{:?}", reply.wall());
        }
    }
}

/// Stopped, or deaf to every signal: the clock runs all the same.
#[test]
fn the_timeout_cannot_be_dodged() {
    for way in [&["stop"][..], &["stubborn"]] {
        let reply = run("soon", "hog", way);
        let reply = reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
        let (limit, wall) = (Duration::from_millis(scaled_ms(700)), reply.wall());
        assert!(wall >= limit && wall < limit * 2, "{way:?}: {wall:?}");
    }
}

#[test]
fn fork_bombs_meet_their_limit() {
    let all = programs::outside("hog", &["forks", "200"]);
    // It ends by killing its own group, after having said so.
    assert_eq!(all.facts().one("forked"), "200 ok");
    for namespace in ["jail", "direct"] {
        let reply = run(namespace, "hog", &["forks", "5000"]);
        let facts = reply.facts();
        assert_eq!(facts.one("forked"), "63 EAGAIN", "{namespace}: 64 with the first one");
        assert!(reply.report.pids_peak <= 64, "{}", reply.report.pids_peak);
    }
}

#[test]
fn cores_are_not_dumped() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -c unlimited; exec \"$0\" cores 4"]).arg(programs::path("hog"));
    let output = command.current_dir(&directory).output().unwrap();
    let facts = Facts::parse(&String::from_utf8_lossy(&output.stdout));
    if facts.one("cores") == "0" {
        skip!("this kernel dumps no cores outside either");
    }
    for namespace in ["jail", "host", "direct"] {
        let reply = run(namespace, "hog", &["cores", "16"]).ok();
        assert_eq!(reply.facts().one("cores"), "0", "{namespace}");
    }
}

/// Whatever a program prints, and with whichever code it ends, stays its own word.
#[test]
fn endings_cannot_be_forged() {
    assert_eq!(programs::outside("attack", &["forge"]).code(), Some(7));
    let reply = run("jail", "attack", &["forge"]);
    let reply = reply.expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
    assert_eq!(reply.report.exit_code, 7);
    let _crowd = Crowd::of(dispatcher());
    for code in [1, 69, 78, 124, 125, 126, 127, 128, 137, 159, 255] {
        let reply = dispatcher().run("jail", "act", &["exit", &code.to_string()]);
        let reply = reply.expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
        assert_eq!((reply.report.exit_code, reply.report.signal), (code, 0));
    }
    // SIGSYS and SIGKILL by its own hand are no verdicts of ours.
    for signal in [libc::SIGSYS, libc::SIGXCPU, libc::SIGKILL] {
        let reply = dispatcher().run("jail", "act", &["raise", &signal.to_string()]);
        let reply = reply.expect(Code::Unknown, Verdict::Signalled, "signalled");
        assert_eq!((reply.report.exit_code, reply.report.signal), (0, signal));
    }
}

/// Terminal escapes and made-up lines from strangers don't reach the log raw. Without a crowd:
/// the log is the server's, which knows of no jail's making.
#[test]
fn logs_cannot_be_forged() {
    let nasty = "\u{1b}]0;owned\u{7}\u{1b}[2J\nlevel=ERROR forged=yes\r\n";
    let call = Call::new("labels", "act")
        .args(&["print", nasty, "err", nasty])
        .context(nasty, nasty)
        .env("X", nasty)
        .option(|options| {
            options.request_id = nasty.into();
            options.labels.insert(nasty.into(), nasty.into());
        });
    let reply = dispatcher().call(call);
    if reply.verdict == Verdict::Exited {
        assert_eq!(reply.text(), nasty, "output is the program's own, byte by byte");
        assert_eq!(reply.stderr(), nasty);
    }
    for change in 0..3 {
        let reply = dispatcher().call(Call::new("jail", "act").with(|request| match change {
            0 => request.namespace = nasty.into(),
            1 => request.method_name = nasty.into(),
            _ => request.service.get_or_insert_default().service_name = nasty.into(),
        }));
        reply.refused(Code::InvalidArgument, "bad_field");
    }
    // Within its line, a value can't pass for another field.
    let sly = "x verdict=FORGED namespace=other";
    let call = Call::new("labels", "act").option(|options| options.request_id = sly.into());
    dispatcher().call(call);
    // A call is on record soon after its answer. This one's request_id is quoted there.
    let on_record = || dispatcher().log().contains(&format!(" request_id={sly:?} "));
    wait_until("it is on record", Duration::from_secs(10), on_record);
    let log = dispatcher().log();
    assert!(!log.contains('\u{1b}') && !log.contains('\u{7}'), "escapes in the log");
    assert!(!log.lines().any(|line| line.starts_with("level=ERROR forged")), "a forged line");
}

/// 64 executables at once, each fresh: a writable descriptor left open anywhere
/// while another one forks would make some of them "text file busy". They are a crowd.
#[test]
fn parallel_starts_are_never_busy() {
    let program = programs::bytes("act");
    let count = (64.0 / slowness()).max(16.0) as u32;
    let calls: Vec<_> = (0..count)
        .map(|index| {
            let mut binary = program.to_vec();
            binary.extend(index.to_le_bytes());
            dispatcher().begin(Call::of("many", binary).args(&["print", "ok"]))
        })
        .collect();
    for call in calls {
        assert_eq!(call.finish().unwrap().ok().text(), "ok");
    }
}

/// Executables bent in their first 64 bytes, or cut short: refused or failed by their own
/// fault, never by ours. They are a crowd.
#[test]
fn malformed_executables_do_no_harm() {
    let program = programs::bytes("act");
    let begin = |binary| dispatcher().begin(Call::of("many", binary));
    // Where each call takes a second, a sample must do.
    let bent = (0..64).step_by(slowness().ceil() as usize).map(|position| {
        let mut binary = program.to_vec();
        binary[position] ^= 0xff;
        (format!("byte {position}"), begin(binary.into()))
    });
    let lengths = [1, 3, 4, 16, 63, 64, 65, 120, 4096].into_iter();
    let short = lengths.map(|length| (format!("{length} bytes"), begin(program.slice(..length))));
    let calls: Vec<_> = bent.chain(short).collect();
    for (what, call) in calls {
        let reply = call.finish().unwrap();
        // Some that are bent still run to their end.
        let own_fault = matches!(reply.verdict, Verdict::Signalled)
            || (reply.verdict == Verdict::Exited && what.starts_with("byte"))
            || (reply.verdict == Verdict::Refused && reply.code == Code::InvalidArgument);
        assert!(own_fault, "{what}: {}", reply.summary());
    }
    assert_eq!(dispatcher().run("jail", "act", &["print", "well"]).ok().text(), "well");
}
