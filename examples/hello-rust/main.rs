//! hello-rust: says everything that a service is told about its call.
//!
//! ```text
//! rustc --edition 2024 -O -C target-feature=+crt-static -o hello-rust main.rs
//! ```

use std::{
    env,
    io::{self, Read},
};

fn main() -> io::Result<()> {
    // "service", namespace, service, method, then the caller's own arguments.
    let arguments: Vec<String> = env::args().collect();
    println!("arguments: {arguments:?}");

    // The same and more stands in the environment, beside what the policy sets.
    // GRPC_INPUT_DATA is the input as JSON, where its type is a known one.
    let mut variables: Vec<(String, String)> = env::vars().collect();
    variables.sort();
    for (name, value) in variables {
        println!("{name}={value}");
    }

    // The input itself: the serialized message, exactly as the caller sent it.
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input)?;
    println!("input: {} bytes: \"{}\"", input.len(), input.escape_ascii());
    Ok(())
}
