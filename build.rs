//! Compiles the wire (`proto/`) with protox, so that no `protoc` is needed, and
//! records the commit for `dispatcher version`.

use std::{env, error::Error, fs, path::PathBuf, process::Command};

const PROTOS: [&str; 3] = ["common.proto", "dispatcher.proto", "registry.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), encode(&descriptors))?;

    tonic_prost_build::configure()
        // `CollectiveDispatcher.Connect` would collide with the client's own `connect`.
        .build_transport(false)
        // Binaries of 128 MiB pass through: keep them as slices of the receive buffer.
        .bytes(".collector")
        .compile_fds(descriptors)?;

    record_commit();
    Ok(())
}

fn encode(descriptors: &impl prost::Message) -> Vec<u8> {
    descriptors.encode_to_vec()
}

fn record_commit() {
    println!("cargo:rerun-if-changed=.git/HEAD");
    println!("cargo:rerun-if-changed=.git/logs/HEAD");
    let commit = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .map_or_else(|| "unknown".into(), |text| text.trim().to_owned());
    println!("cargo:rustc-env=DISPATCHER_COMMIT={commit}");
}
