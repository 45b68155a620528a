//! `protocol = "grpc"`: the program is a gRPC server, called over a socket.
//!
//! | file | what |
//! | --- | --- |
//! | `connection` | one HTTP/2 connection, known to be answered |
//! | `frames` | what a server may send, and no more |
//! | `unary` | one call on it: bytes in, bytes and a status out |
//! | `reflection` | what a method answers with, by the server's own word |
//! | `metadata` | what a caller may add to a call's headers |
//!
//! Nothing here knows any message but reflection's own: bytes go through as they are. And
//! nothing here believes the server: what it sends is bounded, and a lie is told as one.

pub mod connection;
mod frames;
pub mod metadata;
pub mod reflection;
pub mod unary;

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    artifact::elf::Executable, call::Call, jail::message::LISTEN_VARIABLES, policy::Policy,
};

/// argv of a service. It is for all of its calls: only what is asked of the process itself
/// is in it.
#[must_use]
pub fn argv(args: &[String], executable: &Executable) -> Vec<String> {
    let mut argv = super::command(executable);
    argv.extend(args.iter().cloned());
    argv
}

/// Its environment: the policy's, then what the call asks for, then whose it is. Where it
/// is to listen is added by who starts it.
#[must_use]
pub fn environment(call: &Call, policy: &Policy) -> Vec<(String, String)> {
    let mut environment: BTreeMap<String, String> = policy.environment.clone();
    environment.extend(call.env.clone());
    environment.insert("DISPATCHER_NAMESPACE".to_owned(), call.namespace.to_string());
    environment.retain(|name, _| !LISTEN_VARIABLES.contains(&name.as_str()));
    environment.into_iter().collect()
}

/// Puts a service's message into an Any: of the type that it says, else as bytes.
#[must_use]
pub fn output(name: Option<&str>, message: &Bytes) -> prost_types::Any {
    match name {
        Some(name) => {
            let type_url = format!("type.googleapis.com/{name}");
            prost_types::Any { type_url, value: message.to_vec() }
        }
        None => super::exec::bytes_value(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_service_is_told_nothing_of_a_single_call() {
        let mut call = testing::call();
        call.env.insert("LISTEN_PID".into(), "1".into());
        call.env.insert("LEVEL".into(), "debug".into());
        let environment: BTreeMap<_, _> =
            environment(&call, &testing::policy("demo")).into_iter().collect();
        assert_eq!(environment["DISPATCHER_NAMESPACE"], "demo");
        assert_eq!(environment["LEVEL"], "debug");
        assert_eq!(environment["LANG"], "C.UTF-8");
        for absent in ["DISPATCHER_METHOD", "GRPC_INPUT_DATA", "LISTEN_PID"] {
            assert!(!environment.contains_key(absent), "{absent}");
        }
        assert_eq!(argv(&["-v".into()], &Executable::Static), ["service", "-v"]);
        let script = Executable::Script { interpreter: "/usr/bin/python3".into(), argument: None };
        assert_eq!(argv(&[], &script), ["/usr/bin/python3", "/run/dispatcher/service"]);
    }
}
