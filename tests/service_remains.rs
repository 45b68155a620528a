//! What runs that listen take of the launcher and the host, and that nothing of it stays.

mod common;
#[path = "launcher/driver.rs"]
mod driver;
#[path = "service_launch/instance.rs"]
mod instance;

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use common::{host::Process, patience, programs, rootless, wait_for, wait_until};
use dispatcher::{
    jail::{
        message::{Exhausted, FromLauncher, FromServer, Launch, Refusal, ServiceSocket},
        plan::Mode,
    },
    units::Limit,
};
use driver::{Io, Launcher, send};
use instance::{Instance, LIMIT, MODES, PATH, Services, below, instance, launch, look, template};
use rustix::process::{Pid, Signal};

fn settled_descriptors(process: &Process) -> usize {
    let mut last = usize::MAX;
    wait_for("descriptors settle", LIMIT, || {
        std::thread::sleep(Duration::from_millis(50));
        let now = process.descriptors().unwrap();
        (std::mem::replace(&mut last, now) == now).then_some(now)
    })
}

#[test]
fn nothing_stays_of_a_service() {
    let services = Services::start();
    let serve = programs::bytes("serve");
    let round = || {
        for mode in MODES {
            let instance = services.instance(mode);
            instance.has("bind");
            let streams: Vec<_> =
                (0..2).map(|_| instance.connect(ServiceSocket::Own).unwrap()).collect();
            instance.stop();
            drop(streams);
            // One that can't be executed, and one that is refused before.
            let mut io = Io::new();
            let size = 3;
            let broken = Launch { executable_size: size, ..launch(mode, 0) };
            services.launcher.launch(&broken, &["serve"], b"\0\0\0", &mut io);
            while !matches!(services.launcher.next(), FromLauncher::Refused { .. }) {}
            let wrong = Launch { executable_size: size, ..launch(mode, 0) };
            services.launcher.launch(&wrong, &["serve"], &serve, &mut Io::new());
            assert!(matches!(services.launcher.next(), FromLauncher::Refused { .. }));
        }
    };
    let launcher = Process::read(services.launcher.child.id() as i32).unwrap();
    // The kernel shows them to root alone: the launcher is not dumpable.
    if !rootless() {
        // What waits for the next ones is as much as they come to need, so that rounds may
        // add to it. What leaks adds up in each.
        let mut held = settled_descriptors(&launcher);
        let adds_nothing = (0..4).any(|_| {
            (0..20).for_each(|_| round());
            let before = std::mem::replace(&mut held, settled_descriptors(&launcher));
            held <= before
        });
        assert!(adds_nothing, "{held}: {:#?}", launcher.descriptor_targets());
    } else {
        round();
    }
    let Services { launcher, directory } = services;
    drop(launcher);
    assert_eq!(below(directory.path()), Vec::<String>::new());
}

#[test]
fn a_direct_runs_directory_goes_with_all_that_is_in_it() {
    let services = Services::start();
    let keep = services.instance(Mode::Direct);
    let instance = services.instance(Mode::Direct);
    let directory = Path::new(instance.facts.one("GRPC_UNIX_SOCKET")).parent().unwrap().to_owned();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("kept"), "").unwrap();
    instance.has(&format!("link {}", outside.path().display()));
    // Deeper than it is followed at once, and closed to its own user.
    let mut deep = directory.clone();
    for _ in 0..40 {
        deep.push("d");
        instance.has(&format!("directory {}", deep.display()));
    }
    // The deepest first: they are reached through the others.
    for closed in deep.ancestors().take(40) {
        instance.has(&format!("lock {}", closed.display()));
    }
    instance.has(&format!("directory {}/other", directory.display()));
    instance.stop();
    wait_until("it is gone", LIMIT, || {
        !directory.exists() && {
            let bases = services.left().iter().filter(|path| path.ends_with("/d")).count();
            bases == 0
        }
    });
    assert!(outside.path().join("kept").exists());
    // The other's is still there.
    keep.has("bind");
    assert_eq!(keep.ask(ServiceSocket::Own, "hello"), "own ok");
    keep.stop();
}

#[test]
fn what_a_killed_launcher_left_the_next_one_removes() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // What is not a launcher's stays.
    let strange = directory.path().join("dispatch-launch.file");
    fs::write(&strange, "").unwrap();
    fs::create_dir(directory.path().join("other")).unwrap();
    let living = Launcher::start_in(template(), directory.path());
    let lives = instance(&living, Mode::Direct);
    let mut killed = Launcher::start_in(template(), directory.path());
    let one = instance(&killed, Mode::Direct);
    one.has("bind");
    let path = one.facts.one("GRPC_UNIX_SOCKET").to_owned();
    let stdout = one.stdout;
    rustix::process::kill_process(Pid::from_child(&killed.child), Signal::KILL).unwrap();
    killed.fails = true;
    drop(killed);
    Instance::gone(stdout);
    assert!(Path::new(&path).exists());
    let next = Launcher::start_in(template(), directory.path());
    assert!(!Path::new(&path).exists());
    drop(next);
    lives.has("bind");
    assert_eq!(lives.ask(ServiceSocket::Own, "hello"), "own ok");
    lives.stop();
    drop(living);
    let mut left = below(directory.path());
    left.sort();
    assert_eq!(left, ["dispatch-launch.file", "other"]);
}

/// Every step that only a service has, and some that it has more in: made to fail, it is
/// refused, and nothing is left.
#[test]
fn a_service_whose_making_fails_leaves_nothing() {
    if !cfg!(debug_assertions) {
        common::skip!("only debug builds inject faults");
    }
    for step in [
        "service_socket",
        "service_directory",
        "service_network",
        "cgroup",
        "clone",
        "start",
        "descriptors",
        "arguments",
        "listener",
        "exec",
    ] {
        let variables = [("DISPATCHER_FAULT", step)];
        let services = Services::start_prepared(template(), &variables, || Ok(()));
        // In direct mode there is no mount to fail, and no other network.
        let jail_only = ["service_directory", "service_network"].contains(&step);
        let mut failed = 0;
        for mode in MODES {
            let (launch, mut io) = (launch(mode, 1), Io::new());
            services.launcher.launch(&launch, &["serve", PATH], &programs::bytes("serve"), &mut io);
            loop {
                match services.launcher.next() {
                    FromLauncher::Started { .. } => {}
                    FromLauncher::Refused { .. } => {
                        failed += 1;
                        break;
                    }
                    other => panic!("{step}: {other:?}"),
                }
                if jail_only && mode == Mode::Direct {
                    break;
                }
            }
        }
        assert_eq!(failed, if jail_only { 1 } else { 2 }, "{step}");
        let Services { launcher, directory } = services;
        drop(launcher);
        assert_eq!(below(directory.path()), Vec::<String>::new(), "{step}");
    }
}

#[test]
fn services_leave_the_launcher_descriptors_to_go_on_with() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let mut template = template();
    template.limits.open_files = Limit::At(16);
    let both = || Rlimit { current: Some(190), maximum: Some(190) };
    let services =
        Services::start_prepared(template, &[], move || Ok(setrlimit(Resource::Nofile, both())?));
    for mode in MODES {
        let mut ios = vec![];
        let mut runs = vec![];
        let refusal = loop {
            assert!(runs.len() < 12, "no end of runs");
            let (launch, mut io) = (launch(mode, 1), Io::new());
            services.launcher.launch(&launch, &["serve", PATH], &programs::bytes("serve"), &mut io);
            ios.push(io);
            match services.launcher.next() {
                FromLauncher::Started { run, .. } => runs.push(run),
                FromLauncher::Refused { refusal, .. } => break refusal,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(refusal, Refusal::Exhausted(Exhausted::Descriptors), "{mode}");
        assert!(runs.len() >= 3, "{mode}: {} runs at once", runs.len());
        // Each can be talked with all the same.
        for run in &runs {
            wait_until("a connection", LIMIT, || {
                let to = ServiceSocket::Inherited;
                instance::connect(&services.launcher, *run, to)
                    .map_err(|error| assert_eq!(error, libc::ENOENT))
                    .is_ok()
            });
            assert!(look(&services.launcher, *run).is_some());
        }
        for run in runs {
            let cause = dispatcher::jail::message::StopCause::Cancelled;
            let stop = FromServer::Stop { run, cause };
            send(services.launcher.server.as_ref().unwrap(), &stop, &[]);
            assert!(matches!(services.launcher.next(), FromLauncher::Ended { .. }));
        }
    }
}

/// A server that asks and doesn't listen gets as many connections as are kept for it, each
/// with its answer; and the launcher has none of them left.
#[test]
fn a_server_that_does_not_listen_takes_no_more_than_there_is() {
    const ASKED: usize = 2000;
    let services = Services::start();
    let instance = services.instance(Mode::Jail);
    let launcher = Process::read(services.launcher.child.id() as i32).unwrap();
    let before = (!rootless()).then(|| settled_descriptors(&launcher));
    let to = ServiceSocket::Own;
    instance.has("bind");
    for index in 0..ASKED {
        // Both kinds of answer, so that order shows.
        let to = if index % 2 == 0 { ServiceSocket::Inherited } else { to };
        let ask = FromServer::Connect { run: instance.run, to };
        send(services.launcher.server.as_ref().unwrap(), &ask, &[]);
    }
    let mut connected = 0;
    for index in 0..ASKED {
        let (answer, fds) = services.launcher.next_with();
        let FromLauncher::Connected { run, to, result } = answer else { panic!("{answer:?}") };
        assert_eq!((run, to == ServiceSocket::Inherited), (instance.run, index % 2 == 0));
        assert_eq!(fds.len(), usize::from(result.is_ok()), "{index}");
        match result {
            Ok(()) => connected += 1,
            Err(error) => assert_eq!(error, libc::EAGAIN),
        }
    }
    assert!((1..ASKED).contains(&connected), "{connected}");
    if let Some(before) = before {
        let after = settled_descriptors(&launcher);
        assert!(after <= before, "{before} before, {:#?}", launcher.descriptor_targets());
    }
    instance.stop();
}

/// Only what runs is frozen: a jail that is being built goes on, and so does its call.
#[test]
fn a_run_that_is_being_built_is_not_frozen() {
    let services = Services::start();
    let launcher = Pid::from_child(&services.launcher.child);
    let signal = |signal| rustix::process::kill_process(launcher, signal).unwrap();
    for mode in MODES {
        let launch = launch(mode, 1);
        let mut io = Io::new();
        // It finds both at once: none of this kind waits yet, so that one is built.
        signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", services.launcher.child.id());
        wait_until("the launcher stands still", LIMIT, || {
            fs::read_to_string(&stat).unwrap().contains(") T ")
        });
        services.launcher.launch(&launch, &["serve", PATH], &programs::bytes("serve"), &mut io);
        let freeze = FromServer::Freeze { run: launch.run, frozen: true };
        send(services.launcher.server.as_ref().unwrap(), &freeze, &[]);
        signal(Signal::CONT);
        assert!(matches!(services.launcher.next(), FromLauncher::Started { .. }), "{mode}");
        wait_until("it can be talked with", LIMIT, || {
            instance::connect(&services.launcher, launch.run, ServiceSocket::Inherited).is_ok()
        });
        // And goes on, as its use of processors tells: it says what it finds.
        let (done, ready) = std::sync::mpsc::channel();
        let mut stdout = std::io::BufReader::new(fs::File::from(io.stdout.0));
        std::thread::spawn(move || {
            let mut text = String::new();
            while !text.ends_with("ready=1\n") {
                let more = std::io::BufRead::read_line(&mut stdout, &mut text).unwrap();
                assert_ne!(more, 0, "{text}");
            }
            let _ = done.send(());
        });
        ready.recv_timeout(patience(LIMIT)).expect("it says what it finds");
    }
}
