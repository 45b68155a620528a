//! Containers that wait for the next calls: one each, and none of another policy's.

use dispatcher::wire::status::Code;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    LIMIT, begin,
    common::{
        Settings,
        dispatcher::container,
        docker::{Docker, OwnDocker, needs_docker},
        host, wait_for, wait_until,
    },
    none_left,
};

fn policy(memory: &str) -> String {
    container(&format!("[limits]\nmemory = {memory:?}\n[container]\nahead = 1\n"))
}

/// The only container there is besides these, once its init runs.
#[track_caller]
fn waiting(docker: &Docker, maker: &host::Process, besides: &[String]) -> String {
    wait_for("another one waits", LIMIT, || {
        let mut others = docker.owned_by(maker);
        others.retain(|id| !besides.contains(id));
        let [one] = &others[..] else { return None };
        (docker.inspect(one)["State"]["Running"] == true).then(|| one.clone())
    })
}

/// The container of a program.
fn container_of(docker: &Docker, maker: &host::Process, name: &str) -> String {
    let init = host::named(name).remove(0).parent;
    let is_its = |id: &String| docker.inspect(id)["State"]["Pid"] == json!(init);
    docker.owned_by(maker).into_iter().find(is_its).expect("it is in a container of ours")
}

#[test]
fn each_serves_one_call_of_its_policy() {
    let _docker = needs_docker!();
    let mut docker = OwnDocker::start();
    let own = Settings::new([("box", policy("32MiB"))]).docker(&docker.docker.socket).start();
    let maker = own.process("dispatch-docker");

    // The first finds none; what it has another one made for, the second takes.
    let (first, name) = begin(&own, "box");
    let first_id = container_of(&docker.docker, &maker, &name);
    let (second, second_id) = wait_for("a call takes the one that waits", LIMIT, || {
        let waited = waiting(&docker.docker, &maker, std::slice::from_ref(&first_id));
        let (running, name) = begin(&own, "box");
        let id = container_of(&docker.docker, &maker, &name);
        if id == waited {
            return Some((running, id));
        }
        // Docker told of it before all about it was verified.
        running.cancel();
        wait_until("it is removed", LIMIT, || !docker.docker.owned_by(&maker).contains(&id));
        None
    });
    let third_id = waiting(&docker.docker, &maker, &[first_id, second_id]);
    first.cancel();
    second.cancel();

    // Another policy gets another container, and the one that waits goes.
    own.write_policy("box", &policy("48MiB"));
    own.signal(Signal::SIGHUP);
    wait_until("it goes", LIMIT, || !docker.docker.owned_by(&maker).contains(&third_id));
    let (running, name) = begin(&own, "box");
    let id = container_of(&docker.docker, &maker, &name);
    assert_eq!(docker.docker.inspect(&id)["HostConfig"]["Memory"], 48 << 20);
    waiting(&docker.docker, &maker, std::slice::from_ref(&id));
    running.cancel();

    // One that waited while Docker was restarted is gone, and no call gets it.
    docker.stop();
    docker.resume();
    let reply = wait_for("calls work again", LIMIT, || {
        let reply = own.run("box", "act", &["print", "again"]);
        (reply.code != Code::Unavailable).then_some(reply)
    });
    assert_eq!(reply.ok().text(), "again");
    own.write_policy("box", &container(""));
    own.signal(Signal::SIGHUP);
    none_left(&docker.docker, &own);
}
