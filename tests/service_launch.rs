//! Runs that listen, as the launcher makes them: in jails and in direct mode, driven over
//! its own protocol.

mod common;
#[path = "launcher/driver.rs"]
mod driver;
#[path = "service_launch/instance.rs"]
mod instance;
#[path = "service_launch/network.rs"]
mod network;

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use common::{programs, rootless, wait_for, wait_until};
use dispatcher::{
    jail::{
        message::{
            FromLauncher, FromServer, Launch, Refusal, ServiceSocket, StopCause, WaitStatus,
        },
        plan::{Control, Mode, Root, Template},
    },
    names::RunId,
    units::Limit,
};
use driver::{Io, Launcher, send};
use instance::{Instance, LIMIT, MODES, PATH, Services, connect, launch, look, template};
use rustix::process::{Pid, Signal};

#[test]
fn a_service_finds_its_socket_its_directory_and_their_names() {
    let services = Services::start();
    for mode in MODES {
        // Built for its call, then ahead of it.
        for _ in 0..3 {
            let instance = services.instance(mode);
            let facts = &instance.facts;
            assert_eq!(facts.all("fd"), ["0", "1", "2", "3"], "{mode}");
            for (name, value) in [
                ("LISTEN_FDS", "1"),
                ("LISTEN_FDNAMES", "grpc"),
                ("LISTEN_PID", facts.one("pid")),
                ("PATH", "/usr/bin:/bin"),
                ("listens", "1"),
                ("stream", "1"),
                ("flags", "0"),
                ("inherited", "1"),
                ("directory", "700 1"),
                ("reached", "ENOENT"),
            ] {
                assert_eq!(facts.one(name), value, "{mode}: {name}");
            }
            let path = facts.one("GRPC_UNIX_SOCKET");
            match mode {
                Mode::Jail => assert_eq!(path, "/run/grpc/service.sock"),
                _ => assert!(Path::new(path).starts_with(services.directory.path()), "{path}"),
            }
            assert_eq!(instance.stop().stopped, Some(StopCause::Cancelled));
        }
    }
}

#[test]
fn both_of_its_sockets_are_connected_to() {
    let services = Services::start();
    for mode in MODES {
        let instance = services.instance(mode);
        assert_eq!(instance.ask(ServiceSocket::Inherited, "hello"), "inherited ok");
        let none = instance.connect(ServiceSocket::Own).unwrap_err();
        assert_eq!(none, libc::ENOENT, "{mode}");
        instance.has("bind");
        assert_eq!(instance.ask(ServiceSocket::Own, "hello"), "own ok");
        // Many at once: each is a connection of its own.
        let streams: Vec<_> =
            (0..8).map(|_| instance.connect(ServiceSocket::Inherited).unwrap()).collect();
        for mut stream in streams {
            stream.write_all(b"hello\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "inherited ok\n");
        }
        instance.has("deaf");
        assert_eq!(instance.connect(ServiceSocket::Own).unwrap_err(), libc::ECONNREFUSED);
        // Nobody else has it: neither init nor the launcher.
        instance.has("close");
        wait_until("the inherited socket is closed", LIMIT, || {
            match instance.connect(ServiceSocket::Inherited) {
                Ok(_) => false,
                Err(error) => {
                    assert_eq!(error, libc::ECONNREFUSED, "{mode}");
                    true
                }
            }
        });
        instance.stop();
    }
}

#[test]
fn what_is_no_socket_of_the_runs_is_not_connected_to() {
    let services = Services::start();
    for mode in MODES {
        let instance = services.instance(mode);
        let other = services.instance(mode);
        other.has("bind");
        let others = other.facts.one("GRPC_UNIX_SOCKET");
        for make in
            ["link /nowhere", &format!("link {others}"), "link .", "fifo", "file", "directory"]
        {
            instance.has(make);
            let refused = instance.connect(ServiceSocket::Own).unwrap_err();
            assert_eq!(refused, libc::EPERM, "{mode}: {make}");
            instance.has("remove");
        }
        assert_eq!(instance.connect(ServiceSocket::Own).unwrap_err(), libc::ENOENT);
        other.stop();
        instance.stop();
    }
}

/// What listens there must be the run's, whoever owns the name.
#[test]
fn a_socket_that_another_user_listens_at_is_not_the_runs() {
    if rootless() {
        common::not_here!("it takes another user");
    }
    let services = Services::start();
    let instance = services.instance(Mode::Direct);
    // Root may do that; by its credentials it is told apart.
    let path = instance.facts.one("GRPC_UNIX_SOCKET");
    let _listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    assert_eq!(instance.connect(ServiceSocket::Own).unwrap_err(), libc::EPERM);
    instance.stop();
}

/// Of direct runs all are the same user's, so that each can listen where another is to.
#[test]
fn a_socket_that_another_run_listens_at_is_not_the_runs() {
    let services = Services::start();
    let (instance, other) = (services.instance(Mode::Direct), services.instance(Mode::Direct));
    other.has(&format!("bind {}", instance.facts.one("GRPC_UNIX_SOCKET")));
    assert_eq!(instance.connect(ServiceSocket::Own).unwrap_err(), libc::EPERM);
    other.stop();
    instance.has("remove");
    instance.has("bind");
    assert_eq!(instance.ask(ServiceSocket::Own, "hello"), "own ok");
    instance.stop();
}

#[test]
fn no_other_run_reaches_its_sockets() {
    let services = Services::start();
    let (one, other) = (services.instance(Mode::Jail), services.instance(Mode::Jail));
    one.has("bind");
    for path in ["/run/grpc/service.sock", "/proc/1/fd/3", "/proc/2/fd/3"] {
        let answer = other.ask(ServiceSocket::Inherited, &format!("connect {path}"));
        assert_ne!(answer, "inherited ok", "{path}");
    }
    // Nor is there a name on the host: of two jails there is none at all.
    let sockets = services.left().iter().filter(|path| path.contains("sockets/")).count();
    assert_eq!(sockets, 0, "{:?}", services.left());
    let entries = fs::read_dir(services.directory.path()).unwrap().flatten();
    let base = entries.map(|entry| entry.path()).next().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&base), mode(&base.join("sockets"))), (0o711, 0o700));
    let names = fs::read_to_string("/proc/net/unix").unwrap();
    assert!(!names.contains("/run/grpc/"), "{names}");
    one.stop();
    other.stop();
    if !rootless() {
        // Each direct run's directory is closed to all but its user.
        let direct = services.instance(Mode::Direct);
        let path = Path::new(direct.facts.one("GRPC_UNIX_SOCKET")).parent().unwrap().to_owned();
        assert_eq!(mode(&path), 0o700);
        let jailed = services.instance(Mode::Jail);
        let question = format!("connect {}", direct.facts.one("GRPC_UNIX_SOCKET"));
        direct.has("bind");
        assert_eq!(jailed.ask(ServiceSocket::Inherited, &question), "inherited ENOENT");
        jailed.stop();
        direct.stop();
    }
}

#[test]
fn a_full_queue_is_told_and_nothing_waits_for_it() {
    let services = Services::start();
    for mode in MODES {
        let instance = services.instance(mode);
        instance.has("bind");
        let mut stalled = instance.connect(ServiceSocket::Inherited).unwrap();
        stalled.write_all(b"stall\n").unwrap();
        // Its own queue takes one; some are accepted before it stalls.
        let mut held = vec![];
        let full = loop {
            match instance.connect(ServiceSocket::Own) {
                Ok(stream) => held.push(stream),
                Err(error) => break error,
            }
            assert!(held.len() < 1000, "no end of connections");
        };
        assert_eq!(full, libc::EAGAIN, "{mode}");
        assert!(look(&services.launcher, instance.run).is_some());
        instance.stop();
    }
}

#[test]
fn who_is_asked_after_must_be_a_service_that_runs() {
    let services = Services::start();
    let instance = services.instance(Mode::Jail);
    let run = instance.run;
    let nobody = RunId::random().unwrap();
    for to in [ServiceSocket::Inherited, ServiceSocket::Own] {
        assert_eq!(connect(&services.launcher, nobody, to).unwrap_err(), libc::ESRCH);
    }
    assert_eq!(look(&services.launcher, nobody), None);
    let mut stream = instance.connect(ServiceSocket::Inherited).unwrap();
    stream.write_all(b"exit 7\n").unwrap();
    let end = instance.ended();
    assert_eq!((end.status, end.stopped), (WaitStatus::Exited(7), None));
    let refused = connect(&services.launcher, run, ServiceSocket::Inherited).unwrap_err();
    assert_eq!(refused, libc::ESRCH);
    assert_eq!(look(&services.launcher, run), None);

    let services = Services::start_with(Template { listens: false, ..template() });
    let mut io = Io::new();
    let launch =
        Launch { timeout: Some(Duration::from_secs(20)), argc: 3, ..launch(Mode::Jail, 1) };
    let act = programs::bytes("act");
    let launch = Launch { executable_size: act.len() as u64, ..launch };
    services.launcher.launch(&launch, &["act", "sleep", "20000", PATH], &act, &mut io);
    assert!(matches!(services.launcher.next(), FromLauncher::Started { .. }));
    for to in [ServiceSocket::Inherited, ServiceSocket::Own] {
        assert_eq!(connect(&services.launcher, launch.run, to).unwrap_err(), libc::EINVAL);
    }
    // Nothing was made for it.
    assert_eq!(services.left(), Vec::<String>::new());
}

/// Asked at any moment, it is never talked to half set up: what answers is the program.
#[test]
fn until_the_program_is_there_nobody_is_connected_to_it() {
    let services = Services::start();
    for mode in MODES {
        for _ in 0..10 {
            let launch = launch(mode, 1);
            let mut io = Io::new();
            services.launcher.launch(&launch, &["serve", PATH], &programs::bytes("serve"), &mut io);
            let to = ServiceSocket::Inherited;
            let connect = FromServer::Connect { run: launch.run, to };
            let ask = || send(services.launcher.server.as_ref().unwrap(), &connect, &[]);
            ask();
            let (mut started, mut sight) = (false, None);
            let mut stream =
                wait_for("a connection", LIMIT, || match services.launcher.next_with() {
                    (FromLauncher::Started { .. }, _) => {
                        started = true;
                        None
                    }
                    (FromLauncher::Connected { result: Ok(()), .. }, mut fds) => fds.pop(),
                    (FromLauncher::Connected { result: Err(error), .. }, _) => {
                        assert_eq!(error, libc::ENOENT);
                        let look = FromServer::Look { run: launch.run };
                        send(services.launcher.server.as_ref().unwrap(), &look, &[]);
                        ask();
                        None
                    }
                    (FromLauncher::Seen { sight: seen, .. }, _) => {
                        sight = seen.or(sight.take());
                        None
                    }
                    other => panic!("{other:?}"),
                });
            assert!(started);
            rustix::io::ioctl_fionbio(&stream, false).unwrap();
            let mut talk = UnixStream::from(std::mem::replace(&mut stream, io.stderr.0));
            talk.write_all(b"exit 3\n").unwrap();
            loop {
                match services.launcher.next() {
                    FromLauncher::Ended { end, .. } => {
                        assert_eq!(end.status, WaitStatus::Exited(3), "{mode}");
                        break;
                    }
                    FromLauncher::Seen { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

/// Asked for as soon as it is launched, a connection comes with the program: by answers in the
/// order of the questions.
#[test]
fn what_is_asked_of_a_run_that_is_built_waits_for_its_program() {
    let services = Services::start();
    let (inherited, own) = (ServiceSocket::Inherited, ServiceSocket::Own);
    let ask = |launch: &Launch, to| {
        let connect = FromServer::Connect { run: launch.run, to };
        send(services.launcher.server.as_ref().unwrap(), &connect, &[]);
    };
    let answers = |count: usize| -> Vec<_> {
        std::iter::repeat_with(|| services.launcher.next_with().0)
            .filter_map(|answer| match answer {
                FromLauncher::Connected { to, result, .. } => Some((to, result)),
                FromLauncher::Started { .. } => None,
                other => panic!("{other:?}"),
            })
            .take(count)
            .collect()
    };
    for mode in MODES {
        let begin = |argv: &[&str]| {
            let (launch, mut io) = (launch(mode, 1), Io::new());
            services.launcher.launch(&launch, argv, &programs::bytes("serve"), &mut io);
            (launch, io)
        };
        let (launch, io) = begin(&["serve", PATH]);
        for to in [inherited, own, inherited] {
            ask(&launch, to);
        }
        let there = [(inherited, Ok(())), (own, Err(libc::ENOENT)), (inherited, Ok(()))];
        assert_eq!(answers(3), there, "{mode}");
        let stop = |launch: &Launch| {
            let stop = FromServer::Stop { run: launch.run, cause: StopCause::Cancelled };
            send(services.launcher.server.as_ref().unwrap(), &stop, &[]);
        };
        let ended = || assert!(matches!(services.launcher.next(), FromLauncher::Ended { .. }));
        stop(&launch);
        ended();
        drop(io);
        // More than wait: each is answered, and none overtakes another.
        let (launch, _io) = begin(&["serve", PATH]);
        (0..20).for_each(|_| ask(&launch, own));
        ask(&launch, inherited);
        let all = answers(21);
        let none = |(to, result): &(_, Result<(), i32>)| {
            *to == own && matches!(result, Err(libc::ENOENT | libc::EAGAIN))
        };
        assert!(all[..20].iter().all(none) && all[20].0 == inherited, "{mode}: {all:?}");
        stop(&launch);
        ended();
    }
}

#[test]
fn what_it_uses_is_seen_while_it_runs() {
    let services = Services::start();
    for mode in MODES {
        let instance = services.instance(mode);
        let before = instance.look();
        assert!(before.pids_peak >= 1, "{before:?}");
        assert!(!before.enforced.contains(&Control::CpuTime), "{:?}", before.enforced);
        assert!(!before.enforced.contains(&Control::Timeout), "{:?}", before.enforced);
        assert!(before.enforced.contains(&Control::NoNewPrivs), "{:?}", before.enforced);
        assert_eq!(before.enforced.contains(&Control::Seccomp), mode == Mode::Jail);
        instance.has("fill 33554432");
        for _ in 0..2 {
            instance.has("spin");
        }
        wait_until("its time is seen", LIMIT, || instance.used() > Duration::from_millis(200));
        let after = instance.look();
        assert_eq!(after.enforced, before.enforced);
        if after.enforced.contains(&Control::CgroupMemory) {
            assert!(after.memory_peak >= before.memory_peak + (32 << 20), "{before:?} {after:?}");
        }
        if after.enforced.contains(&Control::CgroupPids) {
            assert_eq!(after.pids_peak, 3, "{after:?}");
        }
        let end = instance.stop();
        assert_eq!(end.enforced, after.enforced);
        assert!(end.user + end.system >= after.user + after.system);
        assert!(end.memory_peak >= after.memory_peak);
    }
}

#[test]
fn processor_time_is_not_limited_and_a_timeout_is_still_kept() {
    let mut template = template();
    template.limits.cpu_time = Limit::At(Duration::from_millis(100));
    let services = Services::start_with(template);
    let instance = services.instance(Mode::Jail);
    instance.has("spin");
    wait_until("it uses more than an exec run might", LIMIT, || {
        instance.used() > Duration::from_millis(500)
    });
    instance.stop();
}

/// Whether its processor time stands still while another, that spins as it does, uses some.
fn stands_still(instance: &Instance<'_>, other: &Instance<'_>) -> bool {
    let (before, since) = (instance.used(), other.used());
    wait_until("the other's time goes on", LIMIT, || {
        other.used() > since + Duration::from_millis(200)
    });
    instance.used() == before
}

#[test]
fn a_frozen_run_uses_no_time_and_goes_on_where_it_was() {
    let services = Services::start();
    for mode in MODES {
        let (instance, other) = (services.instance(mode), services.instance(mode));
        instance.has("spin");
        other.has("spin");
        let runs = || {
            let before = instance.used();
            wait_until("its time goes on", LIMIT, || instance.used() > before);
        };
        runs();
        assert!(!stands_still(&instance, &other));
        instance.freeze(true);
        wait_until("it stands still", LIMIT, || stands_still(&instance, &other));
        // It can be connected to, and answers when it goes on.
        let mut stream = instance.connect(ServiceSocket::Inherited).unwrap();
        stream.write_all(b"hello\n").unwrap();
        instance.freeze(false);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "inherited ok\n");
        runs();
        instance.stop();
        other.stop();
    }
}

#[test]
fn a_frozen_run_dies_as_any_other() {
    type Kill = fn(&mut Launcher, RunId);
    let stop: Kill = |launcher, run| {
        let stop = FromServer::Stop { run, cause: StopCause::Cancelled };
        send(launcher.server.as_ref().unwrap(), &stop, &[]);
        match launcher.next() {
            FromLauncher::Ended { end, .. } => {
                assert_eq!((end.stopped, end.quarantined), (Some(StopCause::Cancelled), false));
            }
            other => panic!("{other:?}"),
        }
    };
    let server: Kill = |launcher, _| launcher.server = None;
    let monitor: Kill = |launcher, _| launcher.drop_monitor();
    let killed: Kill = |launcher, _| {
        let pid = Pid::from_child(&launcher.child);
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        launcher.fails = true;
    };
    for mode in MODES {
        for (name, kill) in
            [("stop", stop), ("server", server), ("monitor", monitor), ("kill", killed)]
        {
            let mut services = Services::start();
            let (instance, other) = (services.instance(mode), services.instance(mode));
            instance.has("spin");
            other.has("spin");
            instance.freeze(true);
            wait_until("it stands still", LIMIT, || stands_still(&instance, &other));
            other.stop();
            let Instance { run, stdout, .. } = instance;
            let asked = Instant::now();
            kill(&mut services.launcher, run);
            Instance::gone(stdout);
            let took = asked.elapsed();
            assert!(took < common::patience(Duration::from_secs(2)), "{mode} {name}: {took:?}");
        }
    }
}

#[test]
fn a_service_is_asked_for_by_the_policy_alone() {
    let services = Services::start();
    let serve = programs::bytes("serve");
    let refused = |launch: &Launch, call: &[&str], what: &str| {
        let mut io = Io::new();
        services.launcher.launch(launch, call, &serve, &mut io);
        match services.launcher.next() {
            FromLauncher::Refused { refusal: Refusal::Invalid { what: why }, .. } => {
                assert!(why.contains(what), "{why}");
            }
            other => panic!("{other:?}"),
        }
    };
    // Also one that the policy allows to be set.
    refused(&launch(Mode::Jail, 1), &["serve", "LISTEN_FDS=3"], "LISTEN_FDS");
    let long = Launch { timeout: Some(Duration::from_secs(3600)), ..launch(Mode::Jail, 0) };
    refused(&long, &["serve"], "timeout");
    services.instance(Mode::Jail).stop();
}

/// Every kind of root has a place for the socket.
#[test]
fn every_root_has_a_place_for_the_socket() {
    let root = tempfile::tempdir().unwrap();
    let make = |path: &str| fs::create_dir_all(root.path().join(path)).unwrap();
    let open = |path: &str| {
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(root.path().join(path), mode).unwrap();
    };
    open("");
    let try_root = |root: Root| {
        let mut template = template();
        template.filesystem.root = root;
        let services = Services::start_with(template);
        let instance = services.instance(Mode::Jail);
        instance.has("bind");
        assert_eq!(instance.ask(ServiceSocket::Own, "hello"), "own ok");
        instance.stop();
    };
    try_root(Root::Host);
    let directory = || Root::Directory(root.path().to_owned());
    try_root(directory());
    make("run/own");
    fs::write(root.path().join("run/file"), "").unwrap();
    try_root(directory());
    make("run/grpc");
    try_root(directory());
    // What is put there later is there in the next jail, also in one that is built ahead.
    let mut template = template();
    template.filesystem.root = directory();
    let services = Services::start_with(template.clone());
    for round in 0..4 {
        let name = format!("run/{round}");
        fs::write(root.path().join(&name), "").unwrap();
        let instance = services.instance(Mode::Jail);
        let see = |path: &str| instance.ask(ServiceSocket::Inherited, &format!("see {path}"));
        assert_eq!(see(&format!("/{name}")), "inherited ok");
        assert_eq!(see("/run/none"), "inherited ENOENT");
        instance.stop();
    }
    drop(services);
    fs::remove_dir_all(root.path().join("run")).unwrap();
    std::os::unix::fs::symlink("/tmp", root.path().join("run")).unwrap();
    let services = Services::start_with(template);
    let serve = programs::bytes("serve");
    services.launcher.launch(&launch(Mode::Jail, 0), &["serve"], &serve, &mut Io::new());
    match services.launcher.next() {
        FromLauncher::Refused { refusal: Refusal::ControlUnavailable { control, why }, .. } => {
            assert_eq!(control, Control::RootReadonly);
            assert!(why.contains("/run: is no directory"), "{why}");
        }
        other => panic!("{other:?}"),
    }
}

/// Direct mode executes the sealed file itself where memfd-exec couldn't write a copy.
#[test]
fn a_service_that_is_not_copied_finds_the_same() {
    let mut template = template();
    template.limits.file_size = Limit::At(4096);
    let services = Services::start_with(template);
    let instance = services.instance(Mode::Direct);
    assert_eq!(instance.facts.all("fd"), ["0", "1", "2", "3"]);
    assert_eq!(instance.facts.one("LISTEN_PID"), instance.facts.one("pid"));
    instance.has("bind");
    assert_eq!(instance.ask(ServiceSocket::Own, "hello"), "own ok");
    instance.stop();
}
