//! Services of other makes: Python's grpcio, and grpc-go.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use bytes::Bytes;
use dispatcher::wire::{Verdict, status::Code};
use prost::Message as _;
use tonic::transport::Channel;

use crate::{
    JAIL, Mode, answer, assert_serving,
    common::{
        Call, Dispatcher,
        client::{connect, runtime},
        programs::{self, Background},
        skip, token, wait_for,
    },
    policy,
    services::outside::{Service, Socket},
    wire::{HelloReply, HelloRequest, greeter_client::GreeterClient},
};

/// In every root of a host that has it; not the one of a virtual environment, which is a link.
const PYTHON: &str = "/usr/bin/python3";

/// Where grpcio is, if it is there for this very Python.
fn packages() -> Option<PathBuf> {
    let tools = PathBuf::from(env::var_os("DISPATCHER_TEST_TOOLS")?);
    let print = "import sys; print('python%d.%d' % sys.version_info[:2])";
    let version = Command::new(PYTHON).args(["-c", print]).output().ok()?;
    let version = String::from_utf8(version.stdout).unwrap();
    let packages = tools.join("lib").join(version.trim()).join("site-packages");
    packages.join("grpc_health").exists().then_some(packages)
}

macro_rules! needs_packages {
    () => {
        match packages() {
            Some(packages) => packages,
            None => skip!("no grpcio in DISPATCHER_TEST_TOOLS that is for {PYTHON}"),
        }
    };
}

/// The script as it is sent.
fn script() -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/greeter.py");
    format!("#!{PYTHON}\n{}", fs::read_to_string(source).unwrap())
}

fn request(name: &str) -> Vec<u8> {
    HelloRequest { name: name.into() }.encode_to_vec()
}

#[test]
fn python_serves_outside() {
    let packages = needs_packages!();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    fs::write(directory.path().join("script"), script()).unwrap();
    let mut command = Command::new(PYTHON);
    command.arg(directory.path().join("script")).stdin(Stdio::null());
    command.env("PYTHONPATH", packages).env("GRPC_UNIX_SOCKET", &socket);
    let _python = Background(command.spawn().unwrap());
    let channel = connect(&format!("unix:{}", socket.display()));
    greets_outside(&mut GreeterClient::new(channel), "python");
}

#[test]
fn python_serves() {
    let packages = needs_packages!();
    let tables = format!(
        "[filesystem]\nroot = \"host\"\n\
         bind = [{{ source = {packages:?}, target = \"/packages\", read_only = true }}]\n\
         [artifacts]\ninterpreters = [{PYTHON:?}]\n\
         [environment]\nset = {{ PYTHONPATH = \"/packages\" }}\n\
         [instances]\nstart_timeout = \"60s\"\n"
    );
    let dispatcher = Dispatcher::start([("ns", policy(&JAIL, &tables))]);
    greets(&dispatcher, script(), "python");
    dispatcher.stop();
}

in_every_mode! {
    go_serves,
}

fn go_serves(at: &Mode) {
    let Some(binary) = programs::go_service() else {
        skip!("no grpc-go; scripts/test installs it")
    };
    let dispatcher = Dispatcher::start([("ns", policy(at, ""))]);
    greets(&dispatcher, binary, "go");
    dispatcher.stop();
}

#[test]
fn go_serves_outside() {
    if programs::go_service().is_none() {
        skip!("no grpc-go; scripts/test installs it")
    }
    for socket in [Socket::Inherited, Socket::Own] {
        let service = Service::start("greeter-go", &[], socket);
        greets_outside(&mut GreeterClient::new(service.channel()), "go");
    }
}

/// What both services say.
#[track_caller]
fn greets_outside(client: &mut GreeterClient<Channel>, language: &str) {
    let reply = wait_for("it answers", Duration::from_secs(20), || {
        runtime().block_on(client.say_hello(HelloRequest { name: "Ada".into() })).ok()
    });
    let message = reply.into_inner().message;
    assert!(message.starts_with("Hello Ada! ") && message.ends_with(" no colour"), "{message}");
    let status = runtime().block_on(client.say_hello(HelloRequest::default())).unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    let note = format!("from {language}");
    assert_eq!(status.metadata().get("x-note").unwrap(), note.as_str());
}

/// The same by the dispatcher: answers, metadata, errors, and many calls to one process.
#[track_caller]
fn greets(dispatcher: &Dispatcher, binary: impl Into<Bytes>, language: &str) {
    let call = Call::of("ns", binary).method("helloworld.Greeter", "SayHello");
    let hello = |colour: &str| {
        let call = call.clone().input(request("Ada")).context("metadata.x-colour", colour);
        let reply = dispatcher.call(call);
        let message = answer::<HelloReply>(&reply, "helloworld.HelloReply").message;
        let (greeting, rest) = message.split_once("! ").expect("three parts");
        assert_eq!(greeting, "Hello Ada");
        let (pid, seen) = rest.split_once(' ').expect("three parts");
        assert_eq!(seen, colour);
        (pid.to_owned(), reply.report.warm)
    };
    let (pid, warm) = hello("red");
    assert!(!warm);
    assert_eq!(hello("blue"), (pid, true));
    let reply = dispatcher.call(call.clone());
    let reply = reply.expect(Code::InvalidArgument, Verdict::Completed, "service_status");
    assert!(reply.message.contains("name is empty"), "{}", reply.message);
    assert_eq!(reply.detail("trailer.x-note"), format!("from {language}"));

    let health = call.clone().method("grpc.health.v1.Health", "Check");
    assert_serving(&dispatcher.call(health));

    // Many at once, from one process.
    let calls: Vec<_> = (0..16)
        .map(|_| {
            let name = token();
            (name.clone(), dispatcher.begin(call.clone().input(request(&name))))
        })
        .collect();
    for (name, call) in calls {
        let reply: HelloReply = answer(&call.finish().unwrap(), "helloworld.HelloReply");
        assert!(reply.message.contains(&name), "{}", reply.message);
    }
}
