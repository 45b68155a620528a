//! gRPC services, `protocol = "grpc"`: instances that stay, and the calls they take.
//!
//! The services are `tests/programs/service.rs`, which does what a call asks of it,
//! `tests/programs/hostile.c`, `tests/programs/greeter.py` and `examples/greeter`.

mod common;

use std::time::Duration;

use common::{
    Call, Dispatcher, Reply,
    dispatcher::{best_effort, own_user},
    host, programs, wait_until,
};
use dispatcher::{
    names::Digest,
    wire::{ExecutionMode, Verdict, status::Code},
};
use prost::Message;
use tonic_health::pb::{HealthCheckResponse, health_check_response::ServingStatus};
use wire::{Nothing, State};

/// The messages of tests/programs/service.proto and of examples/greeter.
mod wire {
    tonic::include_proto!("test");
    tonic::include_proto!("helloworld");
}

/// A mode, and what is another in it than in the others. All else is the same.
struct Mode {
    name: &'static str,
    number: ExecutionMode,
    /// What a service comes to that makes the deadly call unshare(2): see tests/conformance.rs.
    unshare: Forbidden,
}

/// See [`Mode::unshare`].
enum Forbidden {
    Named,
    Unnamed,
    Fails,
}

const JAIL: Mode = Mode { name: "jail", number: ExecutionMode::Jail, unshare: Forbidden::Named };
const DIRECT: Mode =
    Mode { name: "direct", number: ExecutionMode::Direct, unshare: Forbidden::Fails };
const CONTAINER: Mode =
    Mode { name: "container", number: ExecutionMode::Container, unshare: Forbidden::Unnamed };

/// Every case is a test in every mode.
macro_rules! in_every_mode {
    ($($case:ident,)+) => {
        mod jail {
            $(#[test] fn $case() { super::$case(&crate::JAIL); })+
        }
        mod direct {
            $(#[test] fn $case() { super::$case(&crate::DIRECT); })+
        }
        mod container {
            $(#[test] fn $case() {
                let _docker = crate::common::docker::needs_docker!();
                super::$case(&crate::CONTAINER);
            })+
        }
    };
}

mod services {
    mod answers;
    mod bad;
    mod ends;
    mod foreign;
    mod instances;
    mod loads;
    mod outside;
}

/// A policy of a mode, with these tables.
fn policy(at: &Mode, tables: &str) -> String {
    let user = if at.name == "direct" { own_user() } else { String::new() };
    let (mode, best_effort) = (at.name, best_effort());
    format!("mode = {mode:?}\nprotocol = \"grpc\"\n{best_effort}{tables}{user}")
}

/// A policy's table that says how the service is to start.
fn started(words: &str) -> String {
    format!("[environment]\nset = {{ PROBE = {words:?} }}\n")
}

/// A dispatcher that has this policy for the namespaces `ns` and `other`.
fn start(at: &Mode, tables: &str) -> Dispatcher {
    Dispatcher::start(["ns", "other"].map(|name| (name, policy(at, tables))))
}

/// A call of the test service, with its bytes.
fn call(namespace: &str, method: &str, message: &impl Message) -> Call {
    asking(Call::new(namespace, "service"), method, message)
}

/// The same, when the dispatcher holds the bytes already: they are large.
fn again(namespace: &str, method: &str, message: &impl Message) -> Call {
    let digest = Digest::of(&programs::bytes("service")).to_string();
    asking(Call::uri(namespace, &digest), method, message)
}

fn asking(call: Call, method: &str, message: &impl Message) -> Call {
    call.method("test.Probe", method).any("type.googleapis.com/test.Any", message.encode_to_vec())
}

/// How the instance is that takes a call; the first sends the bytes.
#[track_caller]
fn look(dispatcher: &Dispatcher, namespace: &str) -> State {
    state(&dispatcher.call(call(namespace, "Look", &Nothing {})))
}

/// The state that a call is answered with.
#[track_caller]
fn state(reply: &Reply) -> State {
    answer(reply, "test.State")
}

/// The message that a call is answered with, which is of this type.
#[track_caller]
fn answer<T: Message + Default>(reply: &Reply, name: &str) -> T {
    let reply = reply.clone().expect(Code::Ok, Verdict::Completed, "");
    let output = reply.output.as_ref().expect("an answer");
    assert_eq!(output.type_url, format!("type.googleapis.com/{name}"));
    T::decode(&output.value[..]).unwrap()
}

/// A health service's answer that all is well.
#[track_caller]
fn assert_serving(reply: &Reply) {
    let health: HealthCheckResponse = answer(reply, "grpc.health.v1.HealthCheckResponse");
    assert_eq!(health.status(), ServingStatus::Serving);
}

/// The process that has this name. The names of instances' own children are others.
#[track_caller]
fn only(name: &str) -> host::Process {
    let mut found = host::named(name);
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    found.remove(0)
}

/// Waits for the end of every process of this name.
#[track_caller]
fn gone(name: &str) {
    wait_until("the instance is gone", Duration::from_secs(10), || host::named(name).is_empty());
}
