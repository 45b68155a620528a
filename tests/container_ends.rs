//! Who dies takes the containers along, Docker's own death included: nothing is left over,
//! callers are told, and calls work again.

mod common;
#[path = "container_ends/proxy.rs"]
mod proxy;

use std::time::{Duration, Instant};

use common::{
    Call, Dispatcher, Reply, Settings,
    dispatcher::{Running, container, plain},
    docker::{Docker, OwnDocker, needs_docker},
    host, patience, scaled_ms, token, wait_for, wait_until,
};
use dispatcher::wire::{Verdict, status::Code};
use nix::sys::signal::Signal;
use proxy::Proxy;

const LIMIT: Duration = Duration::from_secs(20);

/// Starts a run that goes on and has a child, and sees it running: its names, and init's.
fn occupy(on: &Dispatcher, namespace: &str) -> (Running, Vec<host::Process>) {
    let name = token();
    let running = on.begin(Call::new(namespace, "act").args(&["name", &name, "forever"]));
    wait_until("the program runs", LIMIT, || {
        assert!(!running.is_over(), "it ended; the log:\n{}", on.log_tail());
        !host::named(&name).is_empty()
    });
    let program = host::named(&name).remove(0);
    let init = host::Process::read(program.parent).expect("init is its parent");
    assert_eq!(init.name, "dispatch-init");
    (running, vec![program, init])
}

#[track_caller]
fn all_gone(processes: &[host::Process], limit: Duration) {
    wait_until("every process of the run is gone", limit, || {
        !processes.iter().any(host::Process::alive)
    });
}

/// Calls until one is no longer answered with UNAVAILABLE.
#[track_caller]
fn works_again(on: &Dispatcher, namespace: &str) -> Reply {
    wait_for("calls work again", LIMIT, || {
        let reply = on.run(namespace, "act", &["print", "again"]);
        (reply.code != Code::Unavailable).then_some(reply)
    })
    .ok()
}

fn slots(on: &Dispatcher) -> usize {
    host::files_below(&on.directory.join("containers")).map_or(0, |files| files.len())
}

#[track_caller]
fn nothing_left(docker: &Docker, namespace: &str) {
    let label = format!("dispatcher.namespace={namespace}");
    wait_until("its containers are removed", LIMIT, || docker.labelled(&[&label]).is_empty());
}

/// A namespace that nobody else has, by whose label its containers are found.
fn own_namespace() -> String {
    format!("n{}", token())
}

#[test]
fn dispatch_docker_killed_in_mid_run() {
    let docker = needs_docker!();
    let namespace = own_namespace();
    let own = Dispatcher::start([(&*namespace, container("")), ("jail", plain(""))]);
    let (running, processes) = occupy(&own, &namespace);
    let maker = own.process("dispatch-docker");
    maker.signal(Signal::SIGKILL);
    let reply = running.finish().expect("an answer, not a broken connection");
    assert_eq!((reply.code, reply.verdict), (Code::Unavailable, Verdict::Failed), "{reply:?}");
    all_gone(&processes, Duration::from_secs(1));
    own.run("jail", "act", &[]).ok();

    assert_eq!(works_again(&own, &namespace).text(), "again");
    assert!(own.process("dispatch-docker") != maker);
    nothing_left(&docker, &namespace);
    wait_until("nothing was left on the disk", LIMIT, || slots(&own) == 0);
}

#[test]
fn the_server_killed_in_mid_run() {
    let docker = needs_docker!();
    let namespace = own_namespace();
    let own = Dispatcher::start([(&*namespace, container(""))]);
    let (running, processes) = occupy(&own, &namespace);
    own.process("dispatch-serve").signal(Signal::SIGKILL);
    running.finish().expect_err("whoever should answer is dead");
    all_gone(&processes, Duration::from_secs(3));
    nothing_left(&docker, &namespace);
    let call = || own.try_call(Call::new(&namespace, "act").args(&["print", "again"]));
    let reply = wait_for("calls work again", LIMIT, || {
        call().ok().filter(|reply| reply.code != Code::Unavailable)
    });
    assert_eq!(reply.ok().text(), "again");
}

#[test]
fn the_monitor_killed_in_mid_run() {
    let docker = needs_docker!();
    let namespace = own_namespace();
    let prepared = Settings::new([(&*namespace, container(""))]).prepare();
    let first = prepared.start();
    let (running, processes) = occupy(&first, &namespace);
    first.descendants();
    first.signal(Signal::SIGKILL);
    all_gone(&processes, Duration::from_secs(1));
    first.wait(Duration::from_secs(5));
    first.assert_no_processes(Duration::from_secs(2));
    running.finish().expect_err("whoever should answer is dead");

    // The next one removes what is left: containers, and on the disk.
    let second = prepared.start();
    nothing_left(&docker, &namespace);
    wait_until("nothing was left on the disk", LIMIT, || slots(&second) == 0);
    assert_eq!(works_again(&second, &namespace).text(), "again");
    second.stop();
    first.stop();
}

#[test]
fn an_end_in_order_leaves_nothing() {
    let docker = needs_docker!();
    for timeout in ["300ms", "10m"] {
        let namespace = own_namespace();
        let own = Settings::new([(&*namespace, container(""))])
            .arg(&format!("--drain-timeout={timeout}"))
            .start();
        let (running, processes) = occupy(&own, &namespace);
        // And one that is about to be made.
        let before = slots(&own);
        let late = own.begin(Call::new(&namespace, "act").args(&["forever"]));
        wait_until("its directory is made", LIMIT, || slots(&own) > before);
        own.descendants();
        own.signal(Signal::SIGTERM);
        if timeout == "10m" {
            wait_until("it drains", LIMIT, || own.log().contains("draining running="));
            own.signal(Signal::SIGTERM);
        }
        own.wait(LIMIT);
        all_gone(&processes, Duration::from_secs(1));
        for running in [running, late] {
            if let Ok(reply) = running.finish() {
                assert_ne!(reply.verdict, Verdict::Exited, "{}", reply.summary());
            }
        }
        let label = format!("dispatcher.namespace={namespace}");
        assert!(docker.labelled(&[&label]).is_empty(), "with {timeout} a container is left");
        own.assert_no_containers();
        let left = std::fs::read_dir(own.directory.join("containers")).unwrap().count();
        assert_eq!(left, 0, "with {timeout} directories are left");
        own.stop();
    }
}

#[test]
fn docker_stopped_and_started_in_mid_run() {
    let _docker = needs_docker!();
    let mut docker = OwnDocker::start();
    let own = Settings::new([("box", container("")), ("jail", plain(""))])
        .docker(&docker.docker.socket)
        .start();
    own.run("box", "act", &[]).ok();
    let (running, processes) = occupy(&own, "box");
    docker.stop();
    let reply = running.finish().unwrap();
    let reply = reply.expect(Code::Unavailable, Verdict::Failed, "docker_unavailable");
    assert!(reply.elapsed < patience(LIMIT), "{:?}", reply.elapsed);
    all_gone(&processes, Duration::from_secs(1));

    let reply = own.run("box", "act", &[]);
    let reply = reply.refused(Code::Unavailable, "docker_unavailable");
    let socket = docker.docker.socket.to_str().unwrap();
    assert!(reply.message.contains(socket), "{}", reply.summary());
    own.run("jail", "act", &[]).ok();

    docker.resume();
    assert_eq!(works_again(&own, "box").text(), "again");
    nothing_left(&docker.docker, "box");
    own.stop();
}

/// Its containers go on without it, but nobody could tell how they end.
#[test]
fn docker_killed_in_mid_run() {
    let _docker = needs_docker!();
    let mut docker = OwnDocker::start();
    let own = Settings::new([("box", container(""))]).docker(&docker.docker.socket).start();
    let (running, processes) = occupy(&own, "box");
    docker.kill();
    let reply = running.finish().unwrap();
    reply.expect(Code::Unavailable, Verdict::Failed, "docker_unavailable");
    all_gone(&processes, Duration::from_secs(1));
    docker.resume();
    assert_eq!(works_again(&own, "box").text(), "again");
    nothing_left(&docker.docker, "box");
    own.stop();
}

/// A container that somebody removes by hand is told as what it is.
#[test]
fn a_container_removed_in_mid_run() {
    let docker = needs_docker!();
    let namespace = own_namespace();
    let own = Dispatcher::start([(&*namespace, container(""))]);
    let (running, processes) = occupy(&own, &namespace);
    let id = docker.labelled(&[&format!("dispatcher.namespace={namespace}")]).remove(0);
    docker.ask(&["rm", "--force", &id]);
    let reply = running.finish().unwrap();
    reply.expect(Code::Unavailable, Verdict::Failed, "docker_unavailable");
    all_gone(&processes, Duration::from_secs(1));
    wait_until("nothing was left on the disk", LIMIT, || slots(&own) == 0);
    own.run(&namespace, "act", &[]).ok();
}

/// All get their turn, and their own answer, though only a few are made at a time.
#[test]
fn many_calls_at_once() {
    let docker = needs_docker!();
    let namespace = own_namespace();
    let policy = container(
        "[limits]\nmemory = \"32MiB\"\n[admission]\nconcurrency = 8\nqueue_timeout = \"1m\"\n",
    );
    let own = Dispatcher::start([(&*namespace, policy)]);
    let started = Instant::now();
    let call = |index: u32| Call::new(&namespace, "act").args(&["print", &index.to_string()]);
    let running: Vec<_> = (0..24).map(|index| (index, own.begin(call(index)))).collect();
    for (index, running) in running {
        assert_eq!(running.finish().unwrap().ok().text(), index.to_string());
    }
    assert!(started.elapsed() < Duration::from_millis(scaled_ms(60_000)));
    nothing_left(&docker, &namespace);
}

/// Callers whose time is over before their container is made: what Docker was asked for goes
/// on, and none of it keeps another namespace waiting.
#[test]
fn callers_who_go_away_keep_nobody_waiting() {
    let docker = needs_docker!();
    let (hasty, other) = (own_namespace(), own_namespace());
    let policy = "[limits]\nmemory = \"32MiB\"\n[admission]\nconcurrency = 16\n";
    let own = Dispatcher::start([(&*hasty, container(policy)), (&*other, container(policy))]);
    let usual = own.run(&other, "act", &[]).ok().elapsed;
    for _ in 0..13 {
        let call = || Call::new(&hasty, "act").rpc_deadline(Duration::from_millis(150));
        let begun: Vec<_> = (0..16).map(|_| own.begin(call())).collect();
        // The client's own clock may be the first.
        begun.into_iter().for_each(|call| drop(call.finish()));
    }
    let reply = own.run(&other, "act", &["print", "there"]).ok();
    assert_eq!(reply.text(), "there");
    // Before it are a queue of 16 at most, and four that are being made.
    let limit = patience(Duration::from_secs(2)).max(10 * usual);
    assert!(reply.elapsed < limit, "{:?}, else {usual:?}", reply.elapsed);
    nothing_left(&docker, &hasty);
    nothing_left(&docker, &other);
}

/// Of one that was made ahead the streams may have ended, and nobody sees it from the
/// container: that costs no call.
#[test]
fn containers_made_ahead_that_can_no_longer_be_spoken_to() {
    let docker = needs_docker!();
    let namespace = own_namespace();
    let proxy = Proxy::start(&docker.socket);
    let own = Settings::new([(&*namespace, container("[container]\nahead = 1\n"))])
        .docker(&proxy.socket)
        .start();
    let label = format!("dispatcher.namespace={namespace}");
    let waiting = || {
        let all = docker.labelled(&[&label]);
        let [one] = &all[..] else { return None };
        // The call's own has its run's name.
        let made_ahead = docker.inspect(one)["Config"]["Labels"]["dispatcher.run"].is_null();
        made_ahead.then(|| one.clone())
    };
    for _ in 0..3 {
        let call = || Call::new(&namespace, "act").args(&["print", "heard"]);
        assert_eq!(own.call(call()).ok().text(), "heard");
        let left = wait_for("one waits for a call", LIMIT, waiting);
        let pid = docker.inspect(&left)["State"]["Pid"].as_i64().unwrap();
        let init = host::Process::read(i32::try_from(pid).unwrap()).expect("its init runs");
        proxy.cut();
        assert_eq!(own.call(call()).ok().text(), "heard");
        all_gone(&[init], LIMIT);
    }
    own.stop();
    nothing_left(&docker, &namespace);
}

/// The kernel has told how it ended before Docker says anything, and Docker may say nothing.
#[test]
fn killed_for_want_of_memory_while_docker_is_silent() {
    let docker = needs_docker!();
    let namespace = own_namespace();
    let proxy = Proxy::start(&docker.socket);
    let own = Settings::new([(&*namespace, container("[limits]\nmemory = \"32MiB\"\n"))])
        .docker(&proxy.socket)
        .start();
    let name = token();
    let args = ["child-memory-then-wait", "67108864", &name];
    let running = own.begin(Call::new(&namespace, "hog").args(&args));
    wait_until("a child of it was killed", LIMIT, || {
        assert!(!running.is_over(), "the log:\n{}", own.log_tail());
        !host::named(&name).is_empty()
    });
    let init = host::Process::read(host::named(&name)[0].parent).expect("init is its parent");
    proxy.hold(true);
    init.signal(Signal::SIGKILL);
    let reply = running.finish().unwrap();
    let reply = reply.expect(Code::ResourceExhausted, Verdict::OutOfMemory, "out_of_memory");
    assert!(reply.elapsed < patience(LIMIT), "{:?}", reply.elapsed);
    proxy.hold(false);
    nothing_left(&docker, &namespace);
    own.stop();
}

/// With as many as there are, each has little time.
#[test]
fn an_end_in_order_of_many() {
    let docker = needs_docker!();
    let namespace = own_namespace();
    let many = 40;
    let policy = format!(
        "[limits]\nmemory = \"16MiB\"\n[admission]\nconcurrency = {many}\nqueue_timeout = \"1m\"\n"
    );
    let own =
        Settings::new([(&*namespace, container(&policy))]).arg("--drain-timeout=100ms").start();
    let name = token();
    let call = || Call::new(&namespace, "act").args(&["name", &name, "forever"]);
    let begun: Vec<_> = (0..many).map(|_| own.begin(call())).collect();
    wait_until("all of them run", Duration::from_secs(60), || {
        assert!(!begun.iter().any(Running::is_over), "the log:\n{}", own.log_tail());
        host::named(&name).len() == many
    });
    own.stop();
    let label = format!("dispatcher.namespace={namespace}");
    assert!(docker.labelled(&[&label]).is_empty(), "containers are left");
}
