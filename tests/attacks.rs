//! What hostile tenants try. Each attack is first shown to work outside: an attack
//! that fails everywhere proves nothing about the jail.

mod common;

use std::{
    fs,
    os::fd::AsRawFd as _,
    process::Command,
    sync::OnceLock,
    time::{Duration, Instant},
};

use common::{
    Call, Dispatcher, Facts,
    dispatcher::{binary, direct, plain},
    host, not_here,
    programs::{self, Background},
    rootless, scaled_ms, shared, skip, slowness, token, wait_until,
};
use dispatcher::wire::{Verdict, status::Code};

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        let soon = format!("[limits]\ntimeout = \"{}ms\"\n", scaled_ms(700));
        Dispatcher::start([
            ("jail", plain("[limits]\npids = 64\nmemory = \"128MiB\"\n")),
            ("host", plain("[filesystem]\nroot = \"host\"\n")),
            ("exec-tmp", plain("[filesystem]\ntmp_exec = true\n")),
            ("loopback", plain("[network]\nmode = \"loopback\"\n")),
            ("soon", plain(&soon)),
            ("direct", direct("[limits]\npids = 64\n")),
            (
                "many",
                plain(
                    "[admission]\nconcurrency = 32\nqueue = \"unlimited\"\nqueue_timeout = \"5m\"\n",
                ),
            ),
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

#[track_caller]
fn inside(namespace: &str, args: &[&str]) -> String {
    finding(&dispatcher().run(namespace, "attack", args).ok().facts(), args[0])
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
        let reply = dispatcher().run(namespace, "attack", &["memfd-exec"]).ok();
        let refusals = ["EACCES", "EPERM", "ENOSYS"];
        // `memfd_noexec` is best effort by default, but what is reported must be true.
        if reply.report.enforced.iter().any(|word| word == "memfd_noexec") {
            refused(reply.facts().one("memfd-exec"), &refusals);
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
    for kind in ["sysv-shm", "sysv-msg", "mqueue", "/tmp", "/dev/shm", "/var/tmp"] {
        assert_eq!(outside(&["leave", kind, &key]), "works", "{kind}");
        assert_eq!(outside(&["find", kind, &key]), "works", "{kind}");
        let left = dispatcher().run("jail", "attack", &["leave", kind, &key]);
        let found = dispatcher().run("jail", "attack", &["find", kind, &key]).ok().facts();
        refused(found.one("find"), &["ENOENT", "ENOSYS", "EACCES", "EROFS"]);
        // Nor does it reach the host.
        assert_eq!(left.verdict, Verdict::Exited, "{}", left.summary());
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
        let reply = dispatcher().run("soon", "hog", way);
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
        let reply = dispatcher().run(namespace, "hog", &["forks", "5000"]);
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
        let reply = dispatcher().run(namespace, "hog", &["cores", "16"]).ok();
        assert_eq!(reply.facts().one("cores"), "0", "{namespace}");
    }
}

/// Whatever a program prints, and with whichever code it ends, stays its own word.
#[test]
fn endings_cannot_be_forged() {
    assert_eq!(programs::outside("attack", &["forge"]).code(), Some(7));
    let reply = dispatcher().run("jail", "attack", &["forge"]);
    let reply = reply.expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
    assert_eq!(reply.report.exit_code, 7);
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

/// Terminal escapes and made-up lines from strangers don't reach the log raw.
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
/// while another one forks would make some of them "text file busy".
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

/// Executables bent in their first 64 bytes: refused or failed by their own fault,
/// never by ours.
#[test]
fn malformed_executables_do_no_harm() {
    let program = programs::bytes("act");
    let started = Instant::now();
    // Where each call takes a second, a sample must do.
    for position in (0..64).step_by(slowness().ceil() as usize) {
        let mut binary = program.to_vec();
        binary[position] ^= 0xff;
        let reply = dispatcher().call(Call::of("many", binary));
        let own_fault = matches!(reply.verdict, Verdict::Exited | Verdict::Signalled)
            || (reply.verdict == Verdict::Refused && reply.code == Code::InvalidArgument);
        assert!(own_fault, "byte {position}: {}", reply.summary());
    }
    for length in [1, 3, 4, 16, 63, 64, 65, 120, 4096] {
        let reply = dispatcher().call(Call::of("many", program.slice(..length)));
        let own_fault = matches!(reply.verdict, Verdict::Signalled)
            || (reply.verdict == Verdict::Refused && reply.code == Code::InvalidArgument);
        assert!(own_fault, "{length} bytes: {}", reply.summary());
    }
    eprintln!("malformed executables took {:?}", started.elapsed());
    assert_eq!(dispatcher().run("jail", "act", &["print", "well"]).ok().text(), "well");
}
