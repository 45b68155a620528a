//! A place like a container, made by the means of the shell, with init as its PID 1.
//!
//! A mount namespace has the container's directory where Docker would have it. As root, init
//! runs as another user, else as root of a user namespace; either way without a capability.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    mem,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, OnceLock},
    thread::{self, JoinHandle},
    time::Duration,
};

use dispatcher::container::{
    INIT,
    protocol::{Header, INIT_PATH, NONCE_LEN, Record, Verdict, exit},
};
use nix::sys::{signal::Signal, stat::Mode};

use crate::common::{host, host::Process, rootless, wait_for, wait_until};

pub const NONCE: [u8; NONCE_LEN] = *b"\0a nonce \xff of 16and its 2nd half";
pub const LIMIT: Duration = Duration::from_secs(20);

/// What makes a place like a container, and becomes `$0` of the directory `$1` in it.
const ENTER: &str = "mount -t tmpfs none /run && mkdir /run/dispatcher \
    && mount --bind \"$1\" /run/dispatcher \
    && if [ -d \"$1/grpc\" ]; then mkdir /run/grpc && mount --bind \"$1/grpc\" /run/grpc; fi \
    && program=$0 && shift && exec \"$@\" \"$program\"";

/// The means of `unshare` and `setpriv` to the same end.
pub fn command(directory: &Path, program: &str) -> Command {
    let mut command = Command::new("unshare");
    if rootless() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", ENTER, program]);
    command.arg(directory).arg("setpriv");
    if !rootless() {
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    }
    command.args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]);
    command
}

/// Why no such place can be had here.
pub fn impossible() -> Option<&'static str> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    let why = WHY.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        match command(directory.path(), "true").stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => None,
            Ok(output) => Some(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(error) => Some(format!("unshare: {error}")),
        }
    });
    why.as_deref()
}

/// What a container's directory is to have beside init.
#[derive(Clone, Copy, PartialEq)]
pub enum Hold {
    Open,
    /// The dispatcher was gone before.
    Unheld,
    Missing,
}

/// Init, running; what it wrote is read all the time.
pub struct Container {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    pub streams: [Stream; 2],
    pub hold: Option<File>,
    pub directory: tempfile::TempDir,
}

impl Container {
    pub fn start() -> Self {
        Self::with(Hold::Open, Stdio::piped())
    }

    pub fn with(hold: Hold, stdin: Stdio) -> Self {
        Self::within(directory(), hold, stdin)
    }

    /// One with a directory for a service's sockets.
    pub fn serving(hold: Hold) -> Self {
        let directory = directory();
        let place = directory.path().join("grpc");
        fs::create_dir(&place).unwrap();
        if !rootless() {
            std::os::unix::fs::chown(&place, Some(65534), Some(65534)).unwrap();
        }
        Self::within(directory, hold, Stdio::piped())
    }

    fn within(directory: tempfile::TempDir, hold: Hold, stdin: Stdio) -> Self {
        let path = directory.path().join("hold");
        if hold != Hold::Missing {
            nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o644)).unwrap();
        }
        let hold = (hold == Hold::Open)
            .then(|| File::options().read(true).write(true).open(&path).unwrap());
        let mut command = command(directory.path(), INIT_PATH);
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.take();
        let streams = [
            read_all(child.stdout.take().unwrap().into()),
            read_all(child.stderr.take().unwrap().into()),
        ];
        Self { child, stdin, streams, hold, directory }
    }

    /// As far as init still reads: one that is gone has its exit code to tell.
    pub fn send(&mut self, bytes: &[u8]) {
        let sent = self.stdin.as_mut().unwrap().write_all(bytes);
        assert!(sent.is_ok() || sent.unwrap_err().kind() == io::ErrorKind::BrokenPipe);
    }

    /// Waits for the namespace's end: init's exit code, and what was on the streams.
    #[track_caller]
    pub fn ended(mut self) -> (Option<i32>, [Vec<u8>; 2]) {
        let status = wait_for("init's end", LIMIT, || self.child.try_wait().unwrap());
        let streams = self.streams.each_mut().map(|stream| {
            stream.1.take().unwrap().join().unwrap();
            mem::take(&mut *stream.0.lock().unwrap())
        });
        (status.code(), streams)
    }

    /// Sends a message and its input to the end, and waits for what is told.
    #[track_caller]
    pub fn run(mut self, message: &[u8], input: &[u8]) -> Run {
        self.send(&[message, input].concat());
        self.stdin = None;
        self.told()
    }

    /// Waits until both records are written, and lets init go.
    #[track_caller]
    pub fn told(mut self) -> Run {
        wait_until("both records", LIMIT, || {
            let ended = self.child.try_wait().unwrap();
            assert_eq!(ended.and_then(|status| status.code()), None, "init ended untold");
            self.streams.iter().all(|stream| record_at_end(&stream.0.lock().unwrap()).is_some())
        });
        self.hold = None;
        let (code, [stdout, stderr]) = self.ended();
        assert_eq!(code, Some(exit::DISMISSED));
        // Nothing came after them.
        let record = record_at_end(&stdout).expect("stdout ends with a record");
        assert_eq!(record_at_end(&stderr), Some(record), "stderr ends alike");
        let before = |stream: &[u8]| stream[..stream.len() - Record::LEN].to_vec();
        Run { stdout: before(&stdout), stderr: before(&stderr), record }
    }

    /// The process, once it is init.
    #[track_caller]
    pub fn init(&self) -> Process {
        let parent = self.child.id() as i32;
        wait_for("init", LIMIT, || {
            host::descendants(parent)
                .into_iter()
                .find(|process| process.parent == parent && process.name == "dispatch-init")
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Where a test has failed: init follows its input or its hold.
        self.stdin = None;
        self.hold = None;
        for _ in 0..500 {
            if self.child.try_wait().is_ok_and(|status| status.is_some()) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        for process in host::descendants(self.child.id() as i32) {
            process.signal(Signal::SIGKILL);
        }
    }
}

/// How it went, told by the record.
#[derive(Debug)]
pub struct Run {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub record: Record,
}

/// A directory with init in it, for everybody to read.
pub fn directory() -> tempfile::TempDir {
    let directory = tempfile::Builder::new().prefix("dispatcher-test-").tempdir().unwrap();
    fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    executable(&directory.path().join("init"), INIT);
    directory
}

/// Written by another process: a child that another test begins meanwhile would have it open
/// for writing, and it could not be executed.
pub fn executable(path: &Path, bytes: &[u8]) {
    let mut command = Command::new("install");
    command.args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    assert!(child.wait().unwrap().success());
}

/// What has come, and who reads it.
pub type Stream = (Arc<Mutex<Vec<u8>>>, Option<JoinHandle<()>>);

fn read_all(stream: OwnedFd) -> Stream {
    let bytes = Arc::<Mutex<Vec<u8>>>::default();
    let kept = Arc::clone(&bytes);
    let reader = thread::spawn(move || {
        let (mut stream, mut buffer) = (File::from(stream), [0; 4096]);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            kept.lock().unwrap().extend(&buffer[..count]);
        }
    });
    (bytes, Some(reader))
}

pub fn record_at_end(stream: &[u8]) -> Option<Record> {
    Record::decode(stream.last_chunk()?, &NONCE)
}

/// A message: header and strings.
pub fn message(path: &str, argv: &[&[u8]], environment: &[&[u8]]) -> Vec<u8> {
    let mut strings = vec![];
    for string in [path.as_bytes()].iter().chain(argv).chain(environment) {
        strings.extend_from_slice(string);
        strings.push(0);
    }
    message_of(argv.len() as u32, environment.len() as u32, &strings)
}

pub fn message_of(arguments: u32, environment: u32, strings: &[u8]) -> Vec<u8> {
    let strings_len = strings.len() as u32;
    let header = Header { nonce: NONCE, arguments, environment, strings_len, listens: false };
    [&header.encode(), strings].concat()
}

/// [`script`] for a program that listens.
pub fn service(text: &str) -> Vec<u8> {
    let mut message = script(text);
    message[Header::LEN - 4] = 1;
    message
}

/// A message that runs a script of the shell's.
pub fn script(text: &str) -> Vec<u8> {
    message("/bin/sh", &[b"sh", b"-c", text.as_bytes()], &[b"PATH=/usr/bin:/bin"])
}

pub const fn exited(code: u32) -> Record {
    Record { verdict: Verdict::Ended(code << 8), denied: false, left_behind: false }
}

pub const fn killed(signal: i32) -> Record {
    Record { verdict: Verdict::Ended(signal as u32), denied: false, left_behind: false }
}
