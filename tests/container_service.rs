//! Containers that are gRPC services, over the protocol of `dispatch-docker` itself: the
//! sockets that their programs have, who reaches them, and what is left after them.

mod common;
#[path = "container_service/driver.rs"]
mod driver;

use std::{
    io::{ErrorKind, Read as _},
    time::Duration,
};

use ServiceSocket::{Inherited, Own};
use common::{
    docker::{Docker, needs_docker},
    host::{self, Process},
    patience, wait_for, wait_until,
};
use dispatcher::jail::{
    message::{FromServer, LISTEN_VARIABLES, Refusal, ServiceSocket, StopCause, WaitStatus},
    plan::{Container, Control, Network, Template},
    seccomp::syscalls,
};
use dispatcher::units::Limit;
use driver::{Maker, template};
use nix::libc;

const LIMIT: Duration = Duration::from_secs(20);

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("dispatcher-test-").tempdir().unwrap()
}

/// The values of one key, in order.
fn all<'a>(lines: &'a [String], key: &str) -> Vec<&'a str> {
    let of = |line: &'a String| line.strip_prefix(key)?.strip_prefix('=');
    lines.iter().filter_map(of).collect()
}

#[test]
fn the_program_has_its_socket_and_nothing_else() {
    let docker = needs_docker!();
    let directory = directory();
    let maker = Maker::start(&docker, directory.path(), template());
    let run = maker.begin(&[]);
    let told = maker.order(&run, Inherited, "tell");
    assert_eq!(all(&told, "fd"), ["0", "1", "2", "3"]);
    assert_eq!(all(&told, "listens"), ["1"]);
    let pid = all(&told, "pid")[0];
    let mut environment = all(&told, "env");
    environment.sort_unstable();
    let mut expected: Vec<_> = LISTEN_VARIABLES
        .iter()
        .zip(["1", "grpc", pid, "/run/grpc/service.sock"])
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    expected.push("A=1".into());
    expected.sort_unstable();
    // Docker's own are not the program's.
    assert_eq!(environment, expected);
    // Where the hand-over was is nothing any more.
    assert_eq!(all(&told, "/run/grpc"), [""; 0]);
    let mut slot = all(&told, "/run/dispatcher");
    slot.sort_unstable();
    assert_eq!(slot, ["hold", "hosts", "init", "resolv.conf", "service"]);
    // Neither socket tells of the host's network.
    assert_eq!(all(&told, "interface.listener"), ["lo"]);
    assert_eq!(all(&told, "interface.connection"), ["lo"]);
    assert_eq!(all(&told, "peer.pid"), ["0"], "who connects is not to be seen");

    let connection = maker.connect(run.id, Inherited).unwrap();
    let flags = rustix::fs::fcntl_getfl(&connection).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    drop(connection);
    assert_eq!(maker.order(&run, Inherited, "exit 7"), ["inherited"]);
    let end = maker.ended(&run);
    assert_eq!((end.status, end.stopped), (WaitStatus::Exited(7), None));
    assert_eq!(run.output(), (format!("up={pid}\n"), String::new()));
}

#[test]
fn its_own_socket_is_reached_where_it_is_one() {
    let docker = needs_docker!();
    let directory = directory();
    let maker = Maker::start(&docker, directory.path(), template());
    let run = maker.begin(&[]);
    let refused = |to| maker.connect(run.id, to).err();
    assert_eq!(refused(Own), Some(libc::ENOENT), "there is none yet");
    // Both ways, as long as it listens.
    maker.has(&run, "listen");
    assert_eq!(maker.order(&run, Own, "burn 0"), ["own", "ok"]);
    maker.has(&run, "burn 0");
    maker.has(&run, "unlisten");
    assert_eq!(refused(Own), Some(libc::ECONNREFUSED), "a name that is left over");
    maker.has(&run, "bind");
    assert_eq!(refused(Own), Some(libc::ECONNREFUSED), "bound, and not listening");
    for word in ["link", "fifo", "file", "directory", "datagrams", "orphan"] {
        maker.has(&run, word);
        assert_eq!(refused(Own), Some(libc::EPERM), "{word}");
        maker.has(&run, "listen");
        assert_eq!(maker.order(&run, Own, "burn 0"), ["own", "ok"], "after {word}");
    }
    maker.has(&run, "remove");
    assert_eq!(refused(Own), Some(libc::ENOENT));
    maker.stop(&run);
    assert_eq!((refused(Own), refused(Inherited)), (Some(libc::ESRCH), Some(libc::ESRCH)));
}

#[test]
fn a_program_that_closes_its_socket_or_takes_nothing() {
    let docker = needs_docker!();
    let directory = directory();
    let maker = Maker::start(&docker, directory.path(), template());
    let run = maker.begin(&["deaf"]);
    wait_until("it is closed", LIMIT, || {
        maker.connect(run.id, Inherited).err() == Some(libc::ECONNREFUSED)
    });
    maker.stop(&run);
    let run = maker.begin(&["idle"]);
    let mut waiting = Vec::new();
    let full = loop {
        match maker.connect(run.id, Inherited) {
            Ok(connection) => waiting.push(connection),
            Err(errno) => break errno,
        }
        assert!(waiting.len() < 1000, "a queue without a bound");
    };
    assert_eq!(full, libc::EAGAIN, "after {}", waiting.len());
    assert!(waiting.len() > 100);
    maker.stop(&run);
}

#[test]
fn there_is_nothing_to_reach_but_a_service_that_runs() {
    let docker = needs_docker!();
    let directory = directory();
    {
        let maker = Maker::start(&docker, directory.path(), template());
        let nobody = dispatcher::names::RunId::random().unwrap();
        assert_eq!(maker.connect(nobody, Inherited).err(), Some(libc::ESRCH));
        assert_eq!(maker.look(nobody), None);
        let run = maker.launch(&[]);
        // Docker takes far longer than these two.
        for to in [Inherited, Own] {
            assert_eq!(maker.connect(run.id, to).err(), Some(libc::ENOENT));
        }
        assert_eq!(maker.look(run.id), None);
        maker.started(&run);
        maker.has(&run, "burn 0");
        maker.stop(&run);
        assert_eq!(maker.look(run.id), None);
    }
    let ordinary = Template { listens: false, ..template() };
    let maker = Maker::start(&docker, directory.path(), ordinary);
    let run = maker.begin(&["idle"]);
    for to in [Inherited, Own] {
        assert_eq!(maker.connect(run.id, to).err(), Some(libc::EINVAL));
    }
    assert!(maker.look(run.id).is_some(), "it is seen all the same");
    maker.stop(&run);
}

/// With what it has, it is told as its end will be; no clock ends it, and freezing, which
/// containers don't do, keeps it from nothing.
#[test]
fn it_is_seen_and_has_no_clock() {
    let docker = needs_docker!();
    let directory = directory();
    let mut policy = template();
    policy.limits.cpu_time = Limit::At(Duration::from_millis(100));
    let maker = Maker::start(&docker, directory.path(), policy);
    let run = maker.begin(&[]);
    maker.has(&run, "burn 0");
    let before = maker.look(run.id).unwrap();
    maker.has(&run, "burn 400");
    maker.say(&FromServer::Freeze { run: run.id, frozen: true });
    maker.has(&run, "burn 0");
    let sight = maker.look(run.id).unwrap();
    let used = |sight: &dispatcher::jail::message::Sight| sight.user + sight.system;
    assert!(used(&sight) >= used(&before) + Duration::from_millis(300), "{before:?}, {sight:?}");
    assert!(sight.memory_peak > 4096 && sight.pids_peak == 1, "{sight:?}");
    assert_eq!(sight.runtime, None);
    for control in [Control::NsNet, Control::Seccomp, Control::RootReadonly] {
        assert!(sight.enforced.contains(&control), "{sight:?}");
    }
    let end = maker.stop(&run);
    assert_eq!(end.stopped, Some(StopCause::Cancelled));
    assert_eq!(end.enforced, sight.enforced);
    assert!(!end.enforced.contains(&Control::CpuTime) && !end.enforced.contains(&Control::Timeout));
    assert!(end.user + end.system >= used(&sight));
}

#[test]
fn other_networks_and_runtimes_have_services_as_well() {
    let docker = needs_docker!();
    let named = Container { runtime: "second".into(), ..Container::default() };
    for (network, container) in [
        (Network::Host, Container::default()),
        (Network::Loopback, Container::default()),
        (Network::None, named),
    ] {
        let directory = directory();
        let runtime = Some(container.runtime.clone()).filter(|name| !name.is_empty());
        let policy = Template { network, container, ..template() };
        let maker = Maker::start(&docker, directory.path(), policy);
        let run = maker.begin(&[]);
        maker.has(&run, "listen");
        assert_eq!(maker.order(&run, Own, "burn 0"), ["own", "ok"], "{network:?}");
        assert_eq!(maker.look(run.id).unwrap().runtime, runtime);
        assert_eq!(maker.stop(&run).runtime, runtime);
    }
}

#[test]
fn a_policy_under_which_init_makes_no_socket_is_refused() {
    let docker = needs_docker!();
    let directory = directory();
    let mut policy = template();
    policy.syscalls.allowed.remove(&syscalls::number("listen").unwrap());
    let maker = Maker::start(&docker, directory.path(), policy);
    let run = maker.launch(&[]);
    let refusal = maker.refused(&run);
    let Refusal::ControlUnavailable { control: Control::Seccomp, why } = &refusal else {
        panic!("{refusal:?}")
    };
    assert!(why.contains("system call listen"), "{why}");
}

/// What Docker mounts has the mode of what the image has there: only our own is right.
#[test]
fn images_of_others_have_a_place_for_sockets_or_are_refused() {
    let docker = needs_docker!();
    for (place, taken) in [("other", true), ("run/grpc/", false), ("run/grpc/service.sock", false)]
    {
        let image = docker.image(&[("tmp/", ""), (place, "")], &[]);
        let directory = directory();
        let container = Container { image: image.name.clone(), ..Container::default() };
        let policy = Template { container, ..template() };
        let maker = Maker::start(&docker, directory.path(), policy);
        if !taken {
            let refusal = maker.refused(&maker.launch(&[]));
            let Refusal::Docker { why } = &refusal else { panic!("{place}: {refusal:?}") };
            assert!(why.contains("must leave it out"), "{place}: {why}");
            continue;
        }
        let run = maker.begin(&[]);
        let told = maker.order(&run, Inherited, "tell");
        assert_eq!(all(&told, "fd"), ["0", "1", "2", "3"]);
        assert_eq!(all(&told, "/run/grpc"), [""; 0]);
        maker.has(&run, "listen");
        assert_eq!(maker.order(&run, Own, "burn 0"), ["own", "ok"]);
        maker.stop(&run);
    }
}

/// The program and its init.
#[track_caller]
fn family(docker: &Docker, maker: &Maker) -> Vec<Process> {
    let id = docker.owned_by(&maker.process).remove(0);
    let init = docker.inspect(&id)["State"]["Pid"].as_i64().unwrap() as i32;
    let init = Process::read(init).expect("init is there");
    let program = wait_for("the program", LIMIT, || host::descendants(init.pid).pop());
    vec![init, program]
}

#[track_caller]
fn all_gone(processes: &[Process]) {
    wait_until("nobody is left", Duration::from_secs(2), || !processes.iter().any(Process::alive));
}

fn files(directory: &tempfile::TempDir) -> usize {
    host::files_below(directory.path()).map_or(0, |files| files.len())
}

#[test]
fn nothing_is_left_when_it_ends() {
    let docker = needs_docker!();
    let directory = directory();
    let maker = Maker::start(&docker, directory.path(), template());
    // Connections to Docker are kept for a while.
    let descriptors = || {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", maker.child.id())).unwrap();
        let links =
            entries.flatten().map(|entry| std::fs::read_link(entry.path()).unwrap_or_default());
        links.filter(|link| !link.to_string_lossy().starts_with("socket:")).count()
    };
    let before = descriptors();
    let run = maker.begin(&[]);
    assert!(descriptors() > before + 3, "its directory, network and socket among them");
    let processes = family(&docker, &maker);
    let mut connection = maker.connect(run.id, Inherited).unwrap();
    maker.stop(&run);
    all_gone(&processes);
    connection.set_nonblocking(false).unwrap();
    connection.set_read_timeout(Some(patience(LIMIT))).unwrap();
    let read = connection.read(&mut [0]);
    assert!(
        matches!(&read, Ok(0))
            || read.as_ref().is_err_and(|e| e.kind() == ErrorKind::ConnectionReset),
        "{read:?}"
    );
    wait_until("its container is removed", LIMIT, || docker.owned_by(&maker.process).is_empty());
    wait_until("its descriptors are closed", LIMIT, || descriptors() <= before);
    wait_until("nothing is left on the disk", LIMIT, || files(&directory) == 0);
}

#[test]
fn nothing_is_left_when_dispatch_docker_is_killed() {
    let docker = needs_docker!();
    let directory = directory();
    let maker = Maker::start(&docker, directory.path(), template());
    let run = maker.begin(&[]);
    maker.has(&run, "listen");
    // What was asked for in vain can't stand in the way.
    maker.say(&FromServer::Freeze { run: run.id, frozen: true });
    let processes = family(&docker, &maker);
    let owner = maker.process.clone();
    maker.kill();
    all_gone(&processes);
    let next = Maker::start(&docker, directory.path(), template());
    wait_until("the next one removes it", LIMIT, || docker.owned_by(&owner).is_empty());
    wait_until("and its directory", LIMIT, || files(&directory) == 0);
    let run = next.begin(&[]);
    next.has(&run, "burn 0");
    next.stop(&run);
}

#[test]
fn one_made_ahead_serves_as_well() {
    let docker = needs_docker!();
    let directory = directory();
    let policy =
        Template { container: Container { ahead: 1, ..Container::default() }, ..template() };
    let maker = Maker::start(&docker, directory.path(), policy);
    let running = |id: &String| docker.inspect(id)["State"]["Running"] == true;
    let mut waiting: Vec<String> = Vec::new();
    for index in 0..2 {
        // One that is given less than its policy has is made for it.
        let run = maker.begin_whole(&[]);
        let told = maker.order(&run, Inherited, "tell");
        assert_eq!(all(&told, "fd"), ["0", "1", "2", "3"]);
        if let [waited] = &waiting[..] {
            let name = format!("/dispatcher-{}", run.id);
            wait_until("the one that waited has its name", LIMIT, || {
                docker.inspect(waited)["Name"].as_str() == Some(&*name)
            });
        }
        assert_eq!(waiting.len(), index, "the first had none to take");
        wait_until("another one waits", LIMIT, || {
            let both = docker.owned_by(&maker.process);
            both.len() == 2 && both.iter().all(running)
        });
        assert_eq!(maker.order(&run, Inherited, "exit 0"), ["inherited"]);
        assert_eq!(maker.ended(&run).status, WaitStatus::Exited(0));
        wait_until("only that one is left", LIMIT, || {
            waiting = docker.owned_by(&maker.process);
            waiting.len() == 1
        });
    }
}
