//! The programs of `tests/programs`, compiled on demand.

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead as _, BufReader},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, OnceLock},
};

use bytes::Bytes;
use nix::fcntl::{Flock, FlockArg};

use super::Facts;

/// Every program: its name, its source and how it is linked.
const PROGRAMS: &[(&str, &str, &[&str])] = &[
    ("act", "act.c", &["-static"]),
    ("echo", "echo.c", &["-static"]),
    ("syscall", "syscall.c", &["-static"]),
    ("facts", "facts.c", &["-static"]),
    ("hog", "hog.c", &["-static"]),
    ("attack", "attack.c", &["-static"]),
    ("leave", "leave.c", &["-static"]),
    ("fill", "fill.c", &["-static"]),
    ("serve", "serve.c", &["-static"]),
    ("hostile", "hostile.c", &["-static"]),
    ("sockets", "sockets.c", &["-static"]),
    // Needs a loader and libc from the root it runs in.
    ("act-dynamic", "act.c", &[]),
];

/// gRPC services: examples of this package by their names, and what they are made of.
const SERVICES: [(&str, &[&str]); 2] = [
    ("service", &["tests/programs/service.rs", "tests/programs/service.proto"]),
    ("greeter", &["examples/greeter/main.rs", "examples/greeter/helloworld.proto"]),
];

/// Where Debian keeps the sources of Go's packages.
const GO_PATH: &str = "/usr/share/gocode";

/// The service in Go, static; `None` where neither Go nor its gRPC was there to build it.
pub fn go_service() -> Option<Bytes> {
    prepared().join("greeter-go").exists().then(|| bytes("greeter-go"))
}

/// Where the compiled program is.
pub fn path(name: &str) -> PathBuf {
    let path = prepared().join(name);
    assert!(path.exists(), "no test program {name} at {}", path.display());
    path
}

/// The directory of them all.
fn prepared() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(prepare)
}

/// The compiled program's content, read once.
pub fn bytes(name: &str) -> Bytes {
    static CACHE: OnceLock<Mutex<HashMap<String, Bytes>>> = OnceLock::new();
    let mut cache = CACHE.get_or_init(Mutex::default).lock().unwrap();
    let read = || fs::read(path(name)).unwrap().into();
    cache.entry(name.to_owned()).or_insert_with(read).clone()
}

/// Runs a program as the test itself, with no jail around it, in a fresh directory.
pub fn outside(name: &str, args: &[&str]) -> Outside {
    let directory = tempfile::tempdir().unwrap();
    outside_in(directory.path(), name, args)
}

/// [`outside`] with a working directory that stays.
pub fn outside_in(directory: &Path, name: &str, args: &[&str]) -> Outside {
    let mut command = Command::new(path(name));
    // In a process group of its own: some programs signal all of theirs.
    command.args(args).current_dir(directory).stdin(Stdio::null()).process_group(0);
    Outside(command.output().unwrap())
}

/// Starts a program outside in the background; it is killed when dropped.
pub fn background(path: &Path, args: &[&str]) -> Background {
    spawn(path, args, Stdio::null())
}

/// [`background`], and what the program tells up to the fact of that key; waits for it.
#[track_caller]
pub fn background_telling(path: &Path, args: &[&str], last: &str) -> (Background, Facts) {
    let mut background = spawn(path, args, Stdio::piped());
    let mut told = String::new();
    for line in BufReader::new(background.0.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        told.push_str(&line);
        told.push('\n');
        if line.split_once('=').is_some_and(|(key, _)| key == last) {
            return (background, Facts::parse(&told));
        }
    }
    panic!("it ended before it told {last}: {told}");
}

fn spawn(path: &Path, args: &[&str], stdout: Stdio) -> Background {
    let mut command = Command::new(path);
    command.args(args).process_group(0);
    command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::null());
    Background(command.spawn().unwrap())
}

/// See [`background`].
pub struct Background(pub Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How a program fared outside.
#[derive(Debug)]
pub struct Outside(pub Output);

impl Outside {
    pub fn facts(&self) -> Facts {
        Facts::parse(&String::from_utf8_lossy(&self.0.stdout))
    }

    pub fn code(&self) -> Option<i32> {
        self.0.status.code()
    }

    pub fn signal(&self) -> Option<i32> {
        self.0.status.signal()
    }
}

fn prepare() -> PathBuf {
    if let Some(directory) = env::var_os("DISPATCHER_TEST_PROGRAMS") {
        return directory.into();
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("test-programs");
    fs::create_dir_all(&target).unwrap();
    // Test binaries of one `cargo test` may come here at once.
    let file = fs::File::create(target.join(".lock")).unwrap();
    let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).unwrap();
    for &(name, source, flags) in PROGRAMS {
        build(&target, name, source, flags);
    }
    for (name, sources) in SERVICES {
        build_service(&target, name, sources);
    }
    build_go_service(&target);
    target
}

/// From what Debian packages: nothing is fetched.
fn build_go_service(target: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/greeter.go");
    let modified = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified());
    let output = target.join("greeter-go");
    let fresh = modified(&output).is_ok_and(|built| built > modified(&source).unwrap());
    if fresh || !Path::new(GO_PATH).join("src/google.golang.org/grpc").exists() {
        return;
    }
    let unfinished = target.join("greeter-go.new");
    let mut go = Command::new("go");
    go.args(["build", "-ldflags=-s -w", "-o"]).args([&unfinished, &source]);
    go.env("GO111MODULE", "off").env("GOPATH", GO_PATH).env("GOFLAGS", "");
    go.env("CGO_ENABLED", "0").env("GOCACHE", target.parent().unwrap().join("go-cache"));
    let Ok(built) = go.output() else { return };
    let error = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "cannot build greeter.go: {error}");
    fs::rename(unfinished, output).unwrap();
}

/// Builds an example static: of all that it needs, most is compiled already, for the tests.
fn build_service(target: &Path, name: &str, sources: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let modified = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified());
    let output = target.join(name);
    let newer = |built, path: &str| built > modified(&root.join(path)).unwrap();
    let of = [sources, &["Cargo.lock", "build.rs"]].concat();
    if modified(&output).is_ok_and(|built| of.iter().all(|path| newer(built, path))) {
        return;
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["rustc", "--locked", "--quiet", "--example", name]).current_dir(root);
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    if profile == "release" {
        cargo.arg("--release");
    }
    let directory = target.parent().unwrap();
    cargo.arg("--target-dir").arg(directory);
    // Not by RUSTFLAGS, which would be for all that it needs, and build all of it again.
    cargo.args(["--", "-Ctarget-feature=+crt-static", "-Cstrip=symbols"]);
    let built = cargo.output().expect("cargo runs");
    let error = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "cannot build {name}: {error}");
    let unfinished = target.join(format!("{name}.new"));
    fs::copy(directory.join(profile).join("examples").join(name), &unfinished).unwrap();
    fs::rename(unfinished, output).unwrap();
}

fn build(target: &Path, name: &str, source: &str, flags: &[&str]) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs");
    let (source, header, output) =
        (sources.join(source), sources.join("probe.h"), target.join(name));
    let modified = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified());
    let fresh = modified(&output).is_ok_and(|built| {
        built > modified(&source).unwrap() && built > modified(&header).unwrap()
    });
    if fresh {
        return;
    }
    let unfinished = target.join(format!("{name}.new"));
    let compiled = Command::new("gcc")
        .args(["-O1", "-Wall", "-Wextra", "-Werror"])
        .args(flags)
        .arg("-o")
        .args([&unfinished, &source])
        .output()
        .expect("gcc is needed to build the test programs (or set DISPATCHER_TEST_PROGRAMS)");
    assert!(
        compiled.status.success(),
        "cannot build {name}: {}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    fs::rename(unfinished, output).unwrap();
}
