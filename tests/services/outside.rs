//! The test services by themselves, outside: that each does what the tests of the dispatcher
//! take it to do.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::unix::{
        net::{UnixListener, UnixStream},
        process::CommandExt as _,
    },
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use prost::Message as _;
use tonic::{Code, Request, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::{v1, v1alpha};

use crate::{
    common::{
        client::{connect, runtime},
        frames::message,
        host, patience,
        programs::{self, Background},
        token, wait_for, wait_until,
    },
    wire::{
        Entry, Failure, HelloReply, HelloRequest, Nothing, Number, Payload, State, Text,
        greeter_client::GreeterClient, probe_client::ProbeClient,
    },
};

/// A service that listens, ended when dropped.
pub struct Service {
    process: Background,
    directory: tempfile::TempDir,
}

/// How it is to find its socket.
#[derive(Clone, Copy)]
pub enum Socket {
    Inherited,
    Own,
}

impl Service {
    pub fn start(program: &str, environment: &[(&str, &str)], socket: Socket) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut command = Command::new("sh");
        command.process_group(0).stdout(Stdio::null());
        command.stderr(File::create(directory.path().join("stderr")).unwrap());
        match socket {
            // Who is to have the descriptor has to be named by its pid: the shell's, which
            // becomes the program.
            Socket::Inherited => {
                let listener = UnixListener::bind(&path).unwrap();
                command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
                command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "grpc");
                command.arg("-c").arg("exec 3<&0 </dev/null; export LISTEN_PID=$$; exec \"$0\"");
            }
            Socket::Own => {
                command.stdin(Stdio::null()).env("GRPC_UNIX_SOCKET", &path);
                command.args(["-c", "exec \"$0\""]);
            }
        }
        command.arg(programs::path(program)).envs(environment.iter().copied());
        let process = Background(command.spawn().unwrap());
        if matches!(socket, Socket::Own) {
            wait_until("it listens", Duration::from_secs(10), || {
                UnixStream::connect(&path).is_ok()
            });
        }
        Self { process, directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub fn channel(&self) -> tonic::transport::Channel {
        connect(&format!("unix:{}", self.path().display()))
    }

    fn probe(&self) -> ProbeClient<tonic::transport::Channel> {
        let client = ProbeClient::new(self.channel());
        client.max_decoding_message_size(1 << 30).max_encoding_message_size(1 << 30)
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("stderr")).unwrap()
    }

    /// Its end, which it comes to by itself.
    fn end(&mut self) -> ExitStatus {
        wait_for("its end", Duration::from_secs(10), || self.process.0.try_wait().unwrap())
    }
}

fn probe(words: &str) -> Service {
    Service::start("service", &[("PROBE", words)], Socket::Inherited)
}

/// Waits for a call, but not for ever.
#[track_caller]
fn wait<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    let limit = patience(Duration::from_secs(20));
    let answer = runtime().block_on(async { tokio::time::timeout(limit, call).await });
    answer.expect("an answer in time").map(tonic::Response::into_inner)
}

fn look(service: &Service) -> State {
    wait(service.probe().look(Nothing {})).unwrap()
}

#[test]
fn the_example_greets() {
    for socket in [Socket::Inherited, Socket::Own] {
        let service = Service::start("greeter", &[], socket);
        let mut client = GreeterClient::new(service.channel());
        let reply: HelloReply =
            wait(client.say_hello(HelloRequest { name: "Ada".into() })).unwrap();
        assert_eq!(reply.message, "Hello Ada!");
        let status = wait(client.say_hello(HelloRequest::default())).unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "name is empty"));
        let mut health = HealthClient::new(service.channel());
        for name in ["", "helloworld.Greeter"] {
            let request = HealthCheckRequest { service: name.into() };
            assert_eq!(wait(health.check(request)).unwrap().status, 1, "{name}: SERVING");
        }
    }
}

#[test]
fn the_example_wants_a_socket() {
    let nothing = Command::new(programs::path("greeter")).output().unwrap();
    assert_eq!(nothing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("GRPC_UNIX_SOCKET"), "{nothing:?}");
}

/// The files in which a server's reflection says that a symbol is, or its error.
macro_rules! reflected {
    ($version:ident, $service:expr, $symbol:expr) => {{
        use $version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let mut client = ServerReflectionClient::new($service.channel());
        let question = MessageRequest::FileContainingSymbol($symbol.into());
        let request =
            ServerReflectionRequest { host: String::new(), message_request: Some(question) };
        runtime().block_on(async {
            let answers = client.server_reflection_info(tokio_stream::once(request)).await;
            let answer = answers.map_err(|status| status.code())?.into_inner().message().await;
            match answer.map_err(|status| status.code())?.unwrap().message_response.unwrap() {
                MessageResponse::FileDescriptorResponse(files) => Ok(files.file_descriptor_proto),
                other => panic!("{other:?}"),
            }
        })
    }};
}

#[test]
fn reflection_is_as_asked_for() {
    for (word, v1, v1alpha) in [
        ("both", true, true),
        ("v1", true, false),
        ("v1alpha", false, true),
        ("none", false, false),
    ] {
        let service = probe(&format!("reflection={word}"));
        let by_v1: Result<Vec<Vec<u8>>, Code> = reflected!(v1, service, "test.Probe");
        let by_v1alpha: Result<Vec<Vec<u8>>, Code> = reflected!(v1alpha, service, "test.Probe");
        for (given, answer) in [(v1, by_v1), (v1alpha, by_v1alpha)] {
            match answer {
                Ok(files) => {
                    let file = prost_types::FileDescriptorProto::decode(&files[0][..]).unwrap();
                    assert_eq!((given, file.package()), (true, "test"), "{word}");
                }
                Err(code) => assert_eq!((given, code), (false, Code::Unimplemented), "{word}"),
            }
        }
    }
    let service = Service::start("greeter", &[], Socket::Own);
    let files: Result<Vec<Vec<u8>>, Code> = reflected!(v1, service, "helloworld.HelloReply");
    assert_eq!(files.unwrap().len(), 1);
    let files: Result<Vec<Vec<u8>>, Code> = reflected!(v1alpha, service, "helloworld.Greeter");
    assert_eq!(files.unwrap().len(), 1);
}

#[test]
fn bytes_come_back() {
    let service = Service::start("service", &[("PROBE", "listen=path")], Socket::Own);
    for length in [0, 1, 64 << 20] {
        let data: bytes::Bytes = (0..length).map(|index: usize| index as u8).collect();
        let reply = wait(service.probe().echo(Payload { data: data.clone() })).unwrap();
        assert!(reply.data == data, "{length} bytes, {} back", reply.data.len());
    }
    let made = wait(service.probe().make(Number { value: 12_345 })).unwrap();
    assert_eq!(made.data.len(), 12_345);
}

#[test]
fn it_tells_what_is_around_it() {
    let service = probe("name=around");
    let entries = wait(service.probe().around(Nothing {})).unwrap().entries;
    let all = |name: &str| -> Vec<_> {
        let of_name = entries.iter().filter(|entry| entry.name == name);
        of_name.map(|entry| String::from_utf8_lossy(&entry.value).into_owned()).collect()
    };
    // There may be more that the tests themselves were started with.
    assert_eq!(all("fd")[..4], ["0", "1", "2", "3"]);
    assert!(all("env").contains(&"PROBE=name=around".into()), "{:?}", all("env"));
    assert_eq!(all("uid"), [nix::unistd::geteuid().to_string()]);
    assert_eq!(all("cwd"), [std::env::current_dir().unwrap().display().to_string()]);
    assert_eq!(all("stdin"), ["Ok(0)"]);
}

#[test]
fn metadata_and_failures_are_as_asked_for() {
    let service = probe("");
    let mut request = Request::new(Nothing {});
    request.metadata_mut().insert("x-colour", "blue".parse().unwrap());
    request.set_timeout(Duration::from_secs(7));
    let entries = wait(service.probe().metadata(request)).unwrap().entries;
    let value = |name: &str| entries.iter().find(|entry| entry.name == name).map(|e| &e.value[..]);
    assert_eq!(value("x-colour"), Some(&b"blue"[..]));
    assert!(value("grpc-timeout").is_some(), "{entries:?}");

    let entry = |name: &str, value: &'static [u8]| Entry { name: name.into(), value: value.into() };
    let failure = Failure {
        code: 9,
        message: "über".into(),
        details: b"\0detail"[..].into(),
        trailers: vec![entry("x-note", b"text"), entry("x-raw-bin", b"\xff\0")],
    };
    let status = wait(service.probe().fail(failure)).unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "über"));
    assert_eq!(status.details(), b"\0detail");
    assert_eq!(status.metadata().get("x-note").unwrap(), "text");
    let raw = status.metadata().get_bin("x-raw-bin").unwrap().to_bytes().unwrap();
    assert_eq!(&raw[..], b"\xff\0");
}

#[test]
fn a_sleep_is_cancelled_and_a_spin_is_not() {
    let service = probe("threads=1");
    let sleep = {
        let mut probe = service.probe();
        runtime().spawn(async move { probe.sleep(Number { value: 60_000 }).await })
    };
    wait_until("it sleeps", Duration::from_secs(10), || look(&service).now == 2);
    sleep.abort();
    wait_until("it is told", Duration::from_secs(10), || look(&service).cancelled == 1);
    let token = look(&service).token;

    let spin = {
        let mut probe = service.probe();
        runtime().spawn(async move { probe.spin(Number { value: 60_000 }).await })
    };
    let brief = |timeout| {
        let mut request = Request::new(Nothing {});
        request.set_timeout(timeout);
        wait(service.probe().look(request))
    };
    wait_until("it is deaf", Duration::from_secs(10), || {
        brief(Duration::from_millis(200)).is_err()
    });
    spin.abort();
    assert!(brief(Duration::from_millis(500)).is_err(), "and stays so");

    let other = probe("threads=1");
    assert_ne!(look(&other).token, token);
    let block = wait(other.probe().block(Number { value: 50 })).unwrap();
    assert_eq!(block.calls, 2);
}

#[test]
fn calls_are_counted() {
    let service = probe("");
    let calls = (0..8).map(|_| {
        let mut probe = service.probe();
        async move { probe.sleep(Number { value: 200 }).await.unwrap().into_inner() }
    });
    let calls: Vec<_> = calls.map(|call| runtime().spawn(call)).collect();
    let states: Vec<_> = calls.into_iter().map(|call| runtime().block_on(call).unwrap()).collect();
    assert!(states.iter().all(|state| state.pid == service.process.0.id()));
    let now = look(&service);
    assert_eq!((now.calls, now.now), (9, 1));
    assert!((2..=8).contains(&now.most_at_once), "{now:?}");
}

#[test]
fn it_ends_as_asked_to() {
    use std::os::unix::process::ExitStatusExt as _;
    let mut service = probe("");
    wait(service.probe().exit(Number { value: 3 })).unwrap_err();
    assert_eq!(service.end().code(), Some(3));
    let mut service = probe("");
    wait(service.probe().stderr(Text { value: "last words".into() })).unwrap();
    wait(service.probe().abort(Nothing {})).unwrap_err();
    assert_eq!(service.end().signal(), Some(libc::SIGABRT));
    assert_eq!(service.stderr(), "last words");
    let mut service = probe("exit=7");
    assert_eq!(service.end().code(), Some(7));
    assert_eq!(service.stderr(), "told to exit with 7\n");
}

#[test]
fn it_takes_and_leaves_what_it_is_told_to() {
    let name = token();
    let service = probe(&format!("name={name}"));
    let pid = look(&service).pid;
    assert!(host::named(&name).iter().any(|process| process.pid == pid as i32));
    wait(service.probe().allocate(Number { value: 64 })).unwrap();
    let resident = host::Process::read(pid as i32).unwrap().resident().unwrap();
    assert!(resident > 64 << 20, "{resident}");
    wait(service.probe().flood(Number { value: 4 })).unwrap();
    assert_eq!(service.stderr().len(), 4 << 20);

    let child = token();
    wait(service.probe().fork(Text { value: child.clone() })).unwrap();
    drop(service);
    let left = wait_for("the child", Duration::from_secs(10), || host::named(&child).pop());
    left.signal(nix::sys::signal::Signal::SIGKILL);
    wait_until("its end", Duration::from_secs(10), || !left.alive());
}

#[test]
fn it_streams() {
    let service = probe("");
    let numbers = || tokio_stream::iter((1..=3).map(|value| Number { value }));
    assert_eq!(wait(service.probe().upload(numbers())).unwrap().value, 6);
    let mut down = wait(service.probe().download(Number { value: 3 })).unwrap();
    let mut talk = wait(service.probe().talk(numbers())).unwrap();
    let count = |stream: &mut tonic::Streaming<Number>| {
        runtime().block_on(async {
            let mut count = 0;
            while stream.message().await.unwrap().is_some() {
                count += 1;
            }
            count
        })
    };
    assert_eq!((count(&mut down), count(&mut talk)), (3, 3));
}

#[test]
fn connections_end_as_asked_for() {
    let service = probe("connections=1");
    let mut first = service.probe();
    wait(first.look(Nothing {})).unwrap();
    wait_until("nobody listens any more", Duration::from_secs(10), || {
        UnixStream::connect(service.path()).is_err()
    });
    wait(first.look(Nothing {})).expect("the first connection goes on");

    let service = probe("age=100");
    let mut stream = UnixStream::connect(service.path()).unwrap();
    let frames = speak(&mut stream, false);
    assert!(frames.iter().any(|frame| frame.kind == GOAWAY), "{frames:?}");
    look(&service);
}

/// What the wire has of a frame.
#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Sends one call (or nothing but the preface) and reads frames, until the other side has no
/// more to say or has said more than enough.
fn speak(stream: &mut UnixStream, call: bool) -> Vec<Frame> {
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend(frame(SETTINGS, 0, 0, &[]));
    if call {
        // :method POST, :scheme http, :path, indexed or literal.
        let path = b"/test.Probe/Echo";
        let headers = [&[0x83, 0x86, 0x04, path.len() as u8], &path[..]].concat();
        sent.extend(frame(HEADERS, END_HEADERS, 1, &headers));
        sent.extend(frame(DATA, END_STREAM, 1, &message(&[])));
    }
    stream.write_all(&sent).unwrap();
    stream.set_read_timeout(Some(patience(Duration::from_millis(500)))).unwrap();
    let (mut frames, mut bytes) = (vec![], 0);
    while bytes < 1 << 20 {
        let mut head = [0; 9];
        if stream.read_exact(&mut head).is_err() {
            break;
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        if stream.read_exact(&mut payload).is_err() {
            break;
        }
        bytes += 9 + length;
        let id = u32::from_be_bytes(head[5..].try_into().unwrap());
        frames.push(Frame { kind: head[3], flags: head[4], stream: id, payload });
    }
    frames
}

fn hostile(way: &str) -> Service {
    Service::start("hostile", &[("HOSTILE", way)], Socket::Inherited)
}

/// Each bad service really does on the wire what it is named for.
#[test]
fn hostile_services_are() {
    type Sight = fn(&[Frame]) -> bool;
    fn count(frames: &[Frame], kind: u8) -> usize {
        frames.iter().filter(|frame| frame.kind == kind && frame.stream == 1).count()
    }
    fn has(frames: &[Frame], text: &str) -> bool {
        let within =
            |frame: &&Frame| frame.payload.windows(text.len()).any(|part| part == text.as_bytes());
        frames.iter().filter(|frame| frame.kind == HEADERS).any(|frame| within(&frame))
    }
    fn ends(frames: &[Frame], kind: u8) -> bool {
        frames.last().is_some_and(|last| last.kind == kind && last.flags & END_STREAM != 0)
    }
    let ways: [(&str, Sight); 21] = [
        ("ok", |f| has(f, "grpc-status\x010") && ends(f, HEADERS) && count(f, DATA) == 1),
        ("no-trailers", |f| !has(f, "grpc-status") && ends(f, DATA)),
        ("no-status", |f| !has(f, "grpc-status") && ends(f, HEADERS)),
        ("status-999", |f| has(f, "grpc-status\x03999")),
        ("status-minus", |f| has(f, "grpc-status\x02-1")),
        ("status-text", |f| has(f, "grpc-status\x04fine")),
        ("two", |f| count(f, DATA) == 2 && has(f, "grpc-status\x010")),
        ("none", |f| count(f, DATA) == 0 && has(f, "grpc-status\x010")),
        ("truncated", |f| f.iter().any(|f| f.payload.ends_with(b"\0\0\0\x64short"))),
        ("compressed", |f| f.iter().any(|f| f.kind == DATA && f.payload[0] == 1)),
        ("reset", |f| count(f, RST_STREAM) == 1 && count(f, HEADERS) == 0),
        ("html", |f| has(f, "text/html") && ends(f, DATA)),
        ("huge", |f| f.iter().any(|f| f.payload == b"\0\xff\xff\xff\xff") && count(f, DATA) > 50),
        ("continuation", |f| {
            count(f, CONTINUATION) > 50
                && f.iter().all(|f| f.kind == SETTINGS || f.flags & END_HEADERS == 0)
        }),
        ("headers", |f| count(f, HEADERS) > 1000),
        ("bomb", |f| count(f, HEADERS) > 1000),
        ("trailers", |f| {
            let block: usize = f.iter().filter(|f| f.stream == 1).map(|f| f.payload.len()).sum();
            count(f, CONTINUATION) > 5 && block > 80_000
        }),
        ("pings", |f| f.iter().filter(|f| f.kind == PING).count() > 1000),
        ("hang", |f| f.iter().all(|f| f.kind == SETTINGS) && f.len() == 2),
        ("settings", |f| f.len() == 1 && f[0].kind == SETTINGS),
        ("goaway", |f| f.len() == 2 && f[1].kind == GOAWAY),
    ];
    let check = |way: &str, sight: Sight| {
        let service = hostile(way);
        let frames = speak(&mut UnixStream::connect(service.path()).unwrap(), true);
        let brief = frames.iter().take(20).map(|f| (f.kind, f.flags, f.stream, f.payload.len()));
        assert!(sight(&frames), "{way}: {:?}", brief.collect::<Vec<_>>());
        assert_eq!(service.stderr(), format!("hostile: {way}\n"));
    };
    // Together, as most of it is waiting for what doesn't come.
    std::thread::scope(|scope| {
        for (way, sight) in ways {
            scope.spawn(move || check(way, sight));
        }
    });
}

/// What a whole gRPC client makes of the only one that isn't bad: its frames are right.
#[test]
fn the_hostile_program_can_be_good() {
    for socket in [Socket::Inherited, Socket::Own] {
        let service = Service::start("hostile", &[("HOSTILE", "ok")], socket);
        assert_eq!(wait(service.probe().echo(Payload::default())).unwrap(), Payload::default());
        let code: Result<Vec<Vec<u8>>, Code> = reflected!(v1, service, "test.Probe");
        assert_eq!(code, Err(Code::Unimplemented), "gRPC's own services are told apart");
    }
    let service = hostile("status-999");
    let status = wait(service.probe().echo(Payload::default())).unwrap_err();
    assert_eq!(status.code(), Code::Unknown);
}

#[test]
fn hostile_services_that_speak_no_http2() {
    for (way, beginning) in
        [("http1", &b"HTTP/1.1 200 OK\r\n"[..]), ("garbage", &[]), ("hangup", &[])]
    {
        let service = hostile(way);
        let mut stream = UnixStream::connect(service.path()).unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        stream.set_read_timeout(Some(patience(Duration::from_millis(500)))).unwrap();
        let mut buffer = [0; 65536];
        let length = stream.read(&mut buffer).unwrap_or(0);
        assert!(buffer[..length].starts_with(beginning), "{way}");
        let expected = if way == "hangup" { 0..=0 } else { 20..=65536 };
        assert!(expected.contains(&length), "{way}: {length}");
    }
    let service = hostile("silent");
    let mut stream = UnixStream::connect(service.path()).unwrap();
    assert!(speak(&mut stream, true).is_empty());
}

#[test]
fn hostile_services_that_leave_no_socket() {
    use std::os::unix::fs::FileTypeExt as _;
    type Kind = fn(&std::fs::FileType) -> bool;
    let kinds: [(&str, Kind); 3] = [
        ("symlink", |kind| kind.is_symlink()),
        ("fifo", |kind| kind.is_fifo()),
        ("file", |kind| kind.is_file()),
    ];
    for (way, is) in kinds {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut command = Command::new(programs::path("hostile"));
        command.env("HOSTILE", way).env("GRPC_UNIX_SOCKET", &path).stderr(Stdio::null());
        let _process = Background(command.spawn().unwrap());
        let kind = wait_for(way, Duration::from_secs(10), || path.symlink_metadata().ok());
        assert!(is(&kind.file_type()), "{way}: {kind:?}");
    }
    let service = hostile("deaf");
    wait_until("nobody listens", Duration::from_secs(10), || {
        UnixStream::connect(service.path()).is_err()
    });
}
