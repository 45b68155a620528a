//! Compiles the wire (`proto/`) with protox, so that no `protoc` is needed, and the
//! containers' PID 1 (`src/container/init.rs`); records the commit for `dispatcher version`.

use std::{
    env,
    error::Error,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const PROTOS: [&str; 3] = ["common.proto", "dispatcher.proto", "registry.proto"];

/// gRPC services for `protocol = "grpc"`: the example's and the tests'. No part of the crate,
/// but the example and the tests are targets of this package, and find them in `OUT_DIR`.
const SERVICES: [(&str, &str, &str); 2] = [
    ("examples/greeter", "helloworld.proto", "helloworld.bin"),
    ("tests/programs", "service.proto", "service.bin"),
];

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

    for (directory, proto, descriptors) in SERVICES {
        println!("cargo:rerun-if-changed={directory}/{proto}");
        let compiled = protox::compile([proto], [directory])?;
        fs::write(out.join(descriptors), encode(&compiled))?;
        tonic_prost_build::configure().bytes(".test").compile_fds(compiled)?;
    }

    compile_container_init(&out)?;
    record_commit();
    Ok(())
}

fn encode(descriptors: &impl prost::Message) -> Vec<u8> {
    descriptors.encode_to_vec()
}

/// A program without the standard library, so no target of this package's that cargo
/// could build: it is the same, small one in every profile.
fn compile_container_init(out: &Path) -> Result<(), Box<dyn Error>> {
    for source in ["init.rs", "init", "protocol.rs"] {
        println!("cargo:rerun-if-changed=src/container/{source}");
    }
    let mut rustc = Command::new(env::var_os("RUSTC").ok_or("cargo sets RUSTC")?);
    rustc.args(["--edition=2024", "--crate-name=container_init", "--crate-type=bin"]);
    rustc.args(["-Copt-level=s", "-Cpanic=abort", "-Cstrip=symbols"]);
    // At a fixed address, nothing is left to be relocated.
    rustc.arg("-Crelocation-model=static");
    for argument in ["-static", "-nostdlib", "-nostartfiles", "-Wl,--build-id=none"] {
        rustc.arg(format!("-Clink-arg={argument}"));
    }
    // Pages of the file may be in two segments: it is smaller than one.
    rustc.arg("-Clink-arg=-Wl,-z,noseparate-code,-z,max-page-size=4096");
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut argument = OsString::from("-Clinker=");
        argument.push(linker);
        rustc.arg(argument);
    }
    rustc.arg("--target").arg(env::var_os("TARGET").ok_or("cargo sets TARGET")?);
    rustc.arg("-o").arg(out.join("container-init")).arg("src/container/init.rs");
    let status = rustc.status()?;
    if status.success() { Ok(()) } else { Err(format!("{rustc:?}: {status}").into()) }
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
