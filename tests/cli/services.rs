//! What `call` and `run` say of gRPC services.

use std::process::Output;

use crate::{
    command,
    common::{dispatcher::best_effort, programs},
    dispatcher, file, finish, run, text,
};

/// Services in place of programs.
pub fn policy() -> String {
    format!("protocol = \"grpc\"\n{}", best_effort())
}

fn call(program: &str, words: &[&str]) -> Output {
    let mut command = command();
    let address = dispatcher().address();
    command.args(["call", "--address", address, "--namespace", "service", "--binary"]);
    finish(command.arg(programs::path(program)).args(words))
}

/// The one line that explains the exit code.
#[track_caller]
fn line(output: &Output) -> String {
    let stderr = text(&output.stderr);
    let lines: Vec<_> = stderr.lines().filter(|line| line.starts_with("dispatcher: ")).collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    lines[0].to_owned()
}

#[test]
fn a_services_status_has_its_name() {
    let expected = "dispatcher: COMPLETED service_status: UNIMPLEMENTED (no message)";
    let output = call("greeter", &["helloworld.Greeter/Leave"]);
    assert_eq!((output.status.code(), line(&output).as_str()), (Some(125), expected));
    let policy = file("services/demo.toml", &policy());
    let names = ["--service", "helloworld.Greeter", "--method", "Leave"];
    let output = run(&policy, &names, "greeter", &[]);
    assert_eq!((output.status.code(), line(&output).as_str()), (Some(125), expected));
}

#[test]
fn headers_of_a_call_reach_the_service() {
    let words = ["--metadata", "x-user=Ada", "--request-id", "r1", "--label", "team=a"];
    let output = call("service", &[&words[..], &["test.Probe/Metadata"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let entries = String::from_utf8_lossy(&output.stdout);
    assert!(entries.contains("x-user") && entries.contains("Ada"), "{output:?}");
    // The server's word on what it may not be.
    let output = call("service", &["--metadata", "te=x", "test.Probe/Metadata"]);
    assert!(line(&output).contains("REFUSED bad_field"), "{output:?}");
}

#[test]
fn what_a_service_complained_is_told_once_and_on_its_lines() {
    let output = call("act", &["a.B/C", "err", "bro\nken\n", "exit", "3"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let told = line(&output);
    assert!(told.starts_with("dispatcher: EXITED exit_nonzero: "), "{told}");
    assert!(told.ends_with("; its standard error is above"), "{told}");
    assert_eq!(text(&output.stderr).matches("ken").count(), 1, "{output:?}");
    // Where it isn't passed on, it is told in the line.
    let policy = file("services/demo.toml", &policy());
    let names = ["--service", "a.B", "--method", "C"];
    let output = run(&policy, &names, "act", &["err", "bro\nken\n", "exit", "3"]);
    let told = line(&output);
    assert!(told.ends_with("; its standard error ends with: bro | ken"), "{told}");
}

#[test]
fn a_grpc_policy_needs_names_to_run() {
    let policy = file("services/demo.toml", &policy());
    for names in [&[][..], &["--service", "a.B"], &["--method", "C"]] {
        let output = run(&policy, names, "act", &[]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let told = line(&output);
        assert!(told.contains("--service") && told.contains("--method"), "{told}");
    }
}
