//! The launcher by itself, driven over its own protocol: what a captured
//! server could do, and what it can't.

mod common;
#[path = "launcher/driver.rs"]
mod driver;

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use dispatcher::{
    jail::{
        message::{
            End, Exhausted, FromLauncher, FromServer, Launch, MESSAGE_MAX, Refusal, StopCause,
            WaitStatus,
        },
        plan::{Allowed, HostUser, Mode, Root, Template, TemplateId},
        seccomp::{filter::sock_filter, notify},
    },
    names::{Digest, RunId},
    sys,
    units::{Limit, MilliCpus},
};

use driver::{Io, Launcher, Outcome, SET, descriptors, send};

fn template() -> Template {
    let mut template = common::template::template();
    template.modes = vec![Mode::Jail];
    template.filesystem.root = Root::Host;
    template
}

fn launch(argc: u32, envc: u32, size: usize) -> Launch {
    Launch {
        run: RunId::random().unwrap(),
        policy_set: SET,
        template: TemplateId { policy: "test".into(), variant: 0 },
        mode: Mode::Jail,
        namespace: "test".into(),
        timeout: Some(Duration::from_secs(10)),
        memory: None,
        cpus: None,
        executable_size: size as u64,
        interpreter: None,
        argc,
        envc,
    }
}

const PATH: &str = "PATH=/usr/bin:/bin";

fn shell() -> Vec<u8> {
    std::fs::read("/bin/sh").unwrap()
}

fn ended(outcome: Outcome) -> (End, String, String) {
    match outcome {
        Outcome::Ended { end, stdout, stderr } => (*end, stdout, stderr),
        Outcome::Refused(refusal) => panic!("refused: {refusal:?}"),
    }
}

#[test]
fn a_jail_takes_its_call_and_tells_its_end() {
    let launcher = Launcher::start(template());
    let shell = shell();
    let script = "echo out; echo err >&2; cat; id -u; exit 7";
    let (end, stdout, stderr) =
        ended(launcher.run(launch(3, 1, shell.len()), &["sh", "-c", script, PATH], &shell));
    assert_eq!(end.status, WaitStatus::Exited(7));
    assert_eq!((stdout.as_str(), stderr.as_str()), ("out\n65534\n", "err\n"));
    assert_eq!(end.stopped, None);
    assert!(end.wall < Duration::from_secs(10));
}

#[test]
fn direct_mode_runs_as_its_user_in_a_pid_namespace() {
    if !rustix::process::geteuid().is_root() {
        // Rootless direct mode is in conformance.
        eprintln!("not here: a host user of its own takes root");
        return;
    }
    let mut template = template();
    template.modes = vec![Mode::Direct];
    template.user = Some(HostUser { name: "nobody".into(), uid: 65534, gid: 65534 });
    let launcher = Launcher::start(template);
    let shell = shell();
    let mut launch = launch(3, 1, shell.len());
    launch.mode = Mode::Direct;
    let script = "id -u; echo $$; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status";
    let (end, stdout, stderr) = ended(launcher.run(launch, &["sh", "-c", script, PATH], &shell));
    assert_eq!(end.status, WaitStatus::Exited(0), "{stderr}");
    assert_eq!(
        stdout,
        "65534\n2\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\n"
    );
}

/// Whatever a captured server asks beyond its template is refused.
#[test]
fn a_captured_server_gets_no_more_than_its_template() {
    let launcher = Launcher::start(template());
    let shell = shell();
    let ask = |change: &dyn Fn(&mut Launch), call: &[&str]| {
        let mut launch = launch(3, 1, shell.len());
        change(&mut launch);
        match launcher.run(launch, call, &shell) {
            Outcome::Refused(Refusal::Invalid { what }) => what,
            Outcome::Refused(Refusal::StalePolicy) => "stale".into(),
            other => panic!("{other:?}"),
        }
    };
    let call = &["sh", "-c", "true", PATH];
    assert_eq!(ask(&|l| l.policy_set = Digest::from_bytes([8; 32]), call), "stale");
    assert!(ask(&|l| l.template.variant = 1, call).contains("no such template"));
    assert!(ask(&|l| l.mode = Mode::Direct, call).contains("mode direct"));
    assert!(ask(&|l| l.mode = Mode::Container, call).contains("mode container"));
    assert!(ask(&|l| l.memory = Some(1 << 40), call).contains("memory"));
    assert!(ask(&|l| l.cpus = Some(MilliCpus(64_000)), call).contains("cpus"));
    assert!(ask(&|l| l.timeout = Some(Duration::from_secs(3600)), call).contains("timeout"));
    assert!(ask(&|l| l.timeout = None, call).contains("timeout"));
    assert!(ask(&|l| l.interpreter = Some("/bin/sh".into()), call).contains("interpreter"));
    assert!(ask(&|l| l.executable_size += 1, call).contains("size"));
    assert!(ask(&|l| l.argc = 0, call).contains("strings"));
    assert!(ask(&|l| l.argc = u32::MAX, call).contains("strings"));
    assert!(ask(&|l| l.envc = 9, call).contains("strings"));
    assert!(ask(&|_| (), &["sh", "-c", "true", "LD_PRELOAD=/x"]).contains("LD_PRELOAD"));
    assert!(ask(&|_| (), &["sh", "-c", "true", "PATH=/evil"]).contains("PATH"));
    assert!(ask(&|_| (), &["sh", "-c", "true", "nonsense"]).contains("no `=`"));
    assert!(ask(&|l| l.envc = 2, &["sh", "-c", "true", PATH, PATH]).contains("given twice"));
}

/// Descriptors that are not what they must be could change under way, or be a
/// way out of the jail.
#[test]
fn a_captured_server_gives_nothing_but_sealed_files_and_pipes() {
    const PLACES: [&str; 5] = ["executable", "stdin", "stdout", "stderr", "call"];
    let launcher = Launcher::start(template());
    let shell = shell();
    let refused = |place: usize, other: OwnedFd| {
        let mut io = Io::new();
        let launch = launch(3, 1, shell.len());
        let mut given = descriptors(&["sh", "-c", "true", PATH], &shell, &mut io);
        given[place] = other;
        launcher.launch_with(&launch, &given);
        match launcher.next() {
            FromLauncher::Refused { refusal: Refusal::Invalid { what }, .. } => {
                assert!(what.contains(PLACES[place]), "{}: {what}", PLACES[place]);
            }
            next => panic!("{}: {next:?}", PLACES[place]),
        }
    };
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let unsealed = |content: &[u8]| {
        let mut file = File::from(
            rustix::fs::memfd_create(c"open", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap(),
        );
        file.write_all(content).unwrap();
        OwnedFd::from(file)
    };
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    refused(0, unsealed(&shell));
    refused(0, open("/bin/sh"));
    refused(4, unsealed(b"sh\0-c\0true\0PATH=/usr/bin:/bin\0"));
    refused(1, unsealed(b""));
    refused(1, open("/dev/null"));
    refused(1, pipe().0);
    for place in [2, 3] {
        refused(place, open("/"));
        refused(place, open("/dev/null"));
        refused(place, unsealed(b""));
        refused(place, pipe().0);
        refused(place, sys::seqpacket_pair().unwrap().0);
        // Both ends in one: what is written could be read back.
        let (reader, _writer) = pipe();
        let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
        refused(place, File::options().read(true).write(true).open(path).unwrap().into());
    }
    let (end, ..) =
        ended(launcher.run(launch(3, 1, shell.len()), &["sh", "-c", "exit 3", PATH], &shell));
    assert_eq!(end.status, WaitStatus::Exited(3));
}

#[test]
fn a_stopped_run_is_gone_and_says_why() {
    let launcher = Launcher::start(template());
    let shell = shell();
    let mut io = Io::new();
    // Neither a stopped process nor a survivor in a session of its own holds it up.
    let script = "setsid sleep 1000 & echo up; kill -STOP $$; sleep 1000";
    let launch = launch(3, 1, shell.len());
    launcher.launch(&launch, &["sh", "-c", script, PATH], &shell, &mut io);
    assert!(matches!(launcher.next(), FromLauncher::Started { .. }));
    let mut line = [0; 3];
    File::from(io.stdout.0.try_clone().unwrap()).read_exact(&mut line).unwrap();
    let asked = Instant::now();
    let stop = FromServer::Stop { run: launch.run, cause: StopCause::Cancelled };
    send(launcher.server.as_ref().unwrap(), &stop, &[]);
    match launcher.next() {
        FromLauncher::Ended { end, .. } => {
            assert_eq!(end.stopped, Some(StopCause::Cancelled));
            assert!(!end.quarantined);
        }
        other => panic!("{other:?}"),
    }
    // The write ends of its pipes are closed: nothing of it is left.
    let (stdout, _) = io.read();
    assert_eq!(stdout, "");
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
}

/// Stopped at any moment of its making, a run is told as stopped: what fails
/// because it is being killed is no failure of its own.
#[test]
fn a_run_stopped_while_it_is_built_never_started() {
    let launcher = Launcher::start(template());
    let shell = shell();
    for pause in (0..40).map(|step| Duration::from_micros(100 * step)) {
        let launch = launch(3, 1, shell.len());
        let mut io = Io::new();
        launcher.launch(&launch, &["sh", "-c", "sleep 1000", PATH], &shell, &mut io);
        std::thread::sleep(pause);
        let stop = FromServer::Stop { run: launch.run, cause: StopCause::Cancelled };
        send(launcher.server.as_ref().unwrap(), &stop, &[]);
        let mut next = launcher.next();
        let started = matches!(next, FromLauncher::Started { .. });
        if started {
            next = launcher.next();
        }
        let FromLauncher::Ended { end, .. } = next else { panic!("{pause:?}: {next:?}") };
        assert_eq!(end.stopped, Some(StopCause::Cancelled), "{pause:?}");
        assert!(started || end.enforced.is_empty(), "{pause:?}: {:?}", end.enforced);
    }
}

fn children(id: u32) -> Vec<i32> {
    let list = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
    list.unwrap_or_default().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

#[test]
fn a_run_whose_init_is_killed_ends() {
    let launcher = Launcher::start(template());
    let shell = shell();
    let mut io = Io::new();
    let launch = launch(3, 1, shell.len());
    let script = "setsid sleep 1000 & echo up; sleep 1000";
    launcher.launch(&launch, &["sh", "-c", script, PATH], &shell, &mut io);
    let mut line = [0; 3];
    File::from(io.stdout.0.try_clone().unwrap()).read_exact(&mut line).unwrap();
    // Others of its kind wait for a call: theirs have no program yet.
    let runs_a_program = |init: &i32| {
        children(*init as u32).iter().any(|child| {
            let name = std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            name.trim() != "dispatch-init"
        })
    };
    let init = children(launcher.child.id()).into_iter().find(runs_a_program).unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(init).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    assert!(matches!(launcher.next(), FromLauncher::Started { .. }));
    match launcher.next() {
        FromLauncher::Ended { end, .. } => {
            assert_eq!((end.status, end.stopped), (WaitStatus::Unknown, None));
            assert!(!end.quarantined && !end.enforced.is_empty(), "{end:?}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(io.read().0, "");
}

#[test]
fn the_servers_end_ends_its_runs() {
    let mut launcher = Launcher::start(template());
    let shell = shell();
    let mut io = Io::new();
    let launch = launch(3, 1, shell.len());
    launcher.launch(&launch, &["sh", "-c", "echo up; sleep 1000", PATH], &shell, &mut io);
    let mut line = [0; 3];
    File::from(io.stdout.0.try_clone().unwrap()).read_exact(&mut line).unwrap();
    launcher.server = None;
    assert_eq!(io.read().0, ""); // end of file, not a hang
}

/// As within a container whose runtime listens to system calls itself.
fn start_beneath_another_listener() -> Launcher {
    const RET_ALLOW: sock_filter = sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 };
    Launcher::start_prepared(template(), || {
        rustix::thread::set_no_new_privs(true)?;
        let listener = notify::install(&[RET_ALLOW], true)?.unwrap_or(-1);
        sys::dup_to_inherited(listener, 9) // for as long as the launcher lives
    })
}

#[test]
fn a_deadly_call_that_nobody_names_is_told_all_the_same() {
    let launcher = start_beneath_another_listener();
    let shell = shell();
    for script in [
        "exec unshare -r true",
        "(unshare -r true &); sleep 1000",
        // Its parent has it to reap, and ends without.
        "unshare -r true & exec sleep 0.5",
    ] {
        let (end, _, stderr) =
            ended(launcher.run(launch(3, 1, shell.len()), &["sh", "-c", script, PATH], &shell));
        assert_eq!(end.denied_syscall.as_deref(), Some(""), "{script}: {end:?} {stderr}");
        assert!(end.wall < Duration::from_secs(5), "{script}: {:?}", end.wall);
    }
    let script = "exit 3";
    let (end, ..) =
        ended(launcher.run(launch(3, 1, shell.len()), &["sh", "-c", script, PATH], &shell));
    assert_eq!((end.status, end.denied_syscall), (WaitStatus::Exited(3), None));
}

#[test]
fn who_sends_himself_sigsys_has_made_no_deadly_call() {
    let launcher = Launcher::start(template());
    let shell = shell();
    for (script, status) in [
        ("kill -SYS $$", WaitStatus::Signalled(libc::SIGSYS)),
        ("sleep 1000 & kill -SYS $!; wait; exit 3", WaitStatus::Exited(3)),
        ("(sleep 1000 & kill -SYS $!); sleep 0.2; exit 3", WaitStatus::Exited(3)),
    ] {
        let (end, ..) =
            ended(launcher.run(launch(3, 1, shell.len()), &["sh", "-c", script, PATH], &shell));
        assert_eq!((end.status, end.denied_syscall), (status, None), "{script}");
    }
}

/// Policies that can't be enforced are the launcher's end, not a silence that
/// everybody waits in.
#[test]
fn a_template_that_makes_no_filter_ends_the_launcher() {
    let mut template = template();
    template.syscalls.allowed.insert(libc::SYS_unshare as u32, Allowed::Always);
    let mut launcher = Launcher::start_unready(template, || Ok(()));
    launcher.fails = true;
    let server = launcher.server.as_ref().unwrap();
    let heard = sys::receive_packet(server, &mut [0; MESSAGE_MAX]);
    let closed = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    assert!(heard.as_ref().is_ok_and(Option::is_none) || heard.as_ref().is_err_and(closed));
    // Though the monitor's socket is still open.
    assert!(!launcher.child.wait().unwrap().success());
}

/// A limit of open files for the launcher, and a template that fits beneath it.
fn start_with_open_files(limit: u64) -> Launcher {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let mut template = template();
    template.limits.open_files = Limit::At(16);
    let both = move || Rlimit { current: Some(limit), maximum: Some(limit) };
    Launcher::start_prepared(template, move || Ok(setrlimit(Resource::Nofile, both())?))
}

#[test]
fn runs_leave_the_launcher_descriptors_to_go_on_with() {
    let launcher = start_with_open_files(150);
    let shell = shell();
    let mut runs = vec![];
    let refusal = loop {
        assert!(runs.len() < 10, "no end of runs");
        let (launch, mut io) = (launch(3, 1, shell.len()), Io::new());
        launcher.launch(&launch, &["sh", "-c", "cat; sleep 1000", PATH], &shell, &mut io);
        match launcher.next() {
            FromLauncher::Started { .. } => runs.push((launch.run, io)),
            FromLauncher::Refused { refusal, .. } => break refusal,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refusal, Refusal::Exhausted(Exhausted::Descriptors));
    assert!(runs.len() >= 4, "{} runs at once", runs.len());
    // What ends makes room.
    let (run, _io) = runs.pop().unwrap();
    let stop = FromServer::Stop { run, cause: StopCause::Cancelled };
    send(launcher.server.as_ref().unwrap(), &stop, &[]);
    assert!(matches!(launcher.next(), FromLauncher::Ended { .. }));
    let (end, ..) =
        ended(launcher.run(launch(3, 1, shell.len()), &["sh", "-c", "exit 3", PATH], &shell));
    assert_eq!(end.status, WaitStatus::Exited(3));
}

/// The one launch whose descriptors can't be had is refused, by name.
#[test]
fn a_launch_without_room_for_its_descriptors_is_refused() {
    // Fewer than the message brings, however many the launcher holds itself.
    let launcher = start_with_open_files(sys::FDS_MAX as u64 - 2);
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    let many = [&null; sys::FDS_MAX];
    for fds in [&many[..], &[]] {
        let launch = launch(3, 1, 1);
        send(launcher.server.as_ref().unwrap(), &FromServer::Launch(launch.clone()), fds);
        match launcher.next() {
            FromLauncher::Refused { run, refusal } => {
                assert_eq!(run, launch.run);
                let lost = refusal == Refusal::Exhausted(Exhausted::Descriptors);
                assert_eq!(lost, !fds.is_empty(), "{refusal:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn garbage_harms_nothing() {
    let launcher = Launcher::start(template());
    let server = launcher.server.as_ref().unwrap();
    for length in [1, 2, 7, 100, MESSAGE_MAX] {
        let bytes: Vec<u8> = (0..length).map(|i| (i * 37 % 251) as u8).collect();
        sys::send_packet(server, &bytes, &[]).unwrap();
    }
    let stop = FromServer::Stop { run: RunId::random().unwrap(), cause: StopCause::Output };
    send(server, &stop, &[]);
    let shell = shell();
    // Too few descriptors.
    let launch_message = FromServer::Launch(launch(3, 1, shell.len()));
    send(server, &launch_message, &[]);
    assert!(matches!(
        launcher.next(),
        FromLauncher::Refused { refusal: Refusal::Invalid { .. }, .. }
    ));
    let (end, ..) =
        ended(launcher.run(launch(3, 1, shell.len()), &["sh", "-c", "exit 3", PATH], &shell));
    assert_eq!(end.status, WaitStatus::Exited(3));
}
