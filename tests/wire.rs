//! The wire: health, reflection, foreign clients, large and malformed requests.

mod common;

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use bytes::Bytes;
use common::{
    Call, Dispatcher, Settings,
    client::{self, gauge, http_get},
    dispatcher::plain,
    frames::{GRPC, SERVE, begin, framed, message},
    patience, programs, shared, skip, wait_until,
};
use dispatcher::{
    names::Digest,
    wire::{ServeResponse, Verdict, status::Code},
};
use prost::Message as _;
use tokio::task::JoinSet;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::{v1, v1alpha};

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        Settings::new([("jail", plain("")), ("large", plain("[limits]\nmemory = \"512MiB\"\n"))])
            .unix_socket()
            .start()
    })
}

const SERVICES: [&str; 1] = ["collector.CollectiveDispatcher"];

#[test]
fn health_answers() {
    let mut client = HealthClient::new(dispatcher().channel());
    let mut ask = |service: &str| {
        let request = HealthCheckRequest { service: service.into() };
        client::runtime().block_on(client.check(request)).map(|reply| reply.into_inner().status())
    };
    for service in ["", "readiness", "liveness", SERVICES[0]] {
        assert_eq!(ask(service).unwrap(), ServingStatus::Serving, "{service:?}");
    }
    assert_eq!(ask("no.such.Service").unwrap_err().code(), tonic::Code::NotFound);
}

/// What reflection answers to one question, in both versions of the protocol.
macro_rules! reflect {
    ($version:ident, $question:expr) => {{
        use $version::{ServerReflectionRequest, server_reflection_client::ServerReflectionClient};
        client::runtime().block_on(async {
            let mut client = ServerReflectionClient::new(dispatcher().channel());
            let request =
                ServerReflectionRequest { host: String::new(), message_request: Some($question) };
            let stream = client.server_reflection_info(tokio_stream::once(request)).await.unwrap();
            stream.into_inner().message().await.unwrap().unwrap().message_response.unwrap()
        })
    }};
}

macro_rules! reflection_test {
    ($name:ident, $version:ident) => {
        #[test]
        fn $name() {
            use $version::{
                server_reflection_request::MessageRequest,
                server_reflection_response::MessageResponse,
            };
            let MessageResponse::ListServicesResponse(list) =
                reflect!($version, MessageRequest::ListServices(String::new()))
            else {
                panic!("a list of services")
            };
            let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
            for service in SERVICES.iter().chain(&["grpc.health.v1.Health"]) {
                assert!(names.contains(service), "{service} in {names:?}");
            }
            for symbol in
                ["collector.CollectiveDispatcher", "collector.ServeRequest", "collector.Verdict"]
            {
                let question = MessageRequest::FileContainingSymbol(symbol.into());
                let answer = reflect!($version, question);
                assert!(
                    matches!(answer, MessageResponse::FileDescriptorResponse(_)),
                    "{symbol}: {answer:?}"
                );
            }
        }
    };
}

reflection_test!(reflection_v1_answers, v1);
reflection_test!(reflection_v1alpha_answers, v1alpha);

#[test]
fn the_unix_socket_serves_too() {
    let path = dispatcher().directory.join("socket");
    assert_eq!(dispatcher().addresses[1], format!("unix:{}", path.display()));
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let channel = {
        let _context = client::runtime().enter();
        tonic::transport::Endpoint::from_shared(dispatcher().addresses[1].clone())
            .unwrap()
            .connect_lazy()
    };
    let call = Call::new("jail", "act").args(&["print", "by unix socket"]);
    let reply = client::runtime().block_on(call.send(channel)).unwrap().ok();
    assert_eq!(reply.text(), "by unix socket");
}

/// The largest executable that the default policy takes, and one byte more.
#[test]
fn large_executables() {
    let mut binary = programs::bytes("act").to_vec();
    binary.resize(128 << 20, 0);
    let binary = Bytes::from(binary);
    let started = Instant::now();
    let call = |bytes: Bytes| Call::of("large", bytes).args(&["print", "large"]);
    assert_eq!(dispatcher().call(call(binary.clone())).ok().text(), "large");
    eprintln!("128 MiB in {:?}", started.elapsed());
    assert!(started.elapsed() < patience(Duration::from_secs(30)));

    let mut over = binary.to_vec();
    over.push(0);
    dispatcher().call(call(over.into())).refused(Code::ResourceExhausted, "artifact_too_large");
    // Far more than that is not even received: a gRPC error or the same refusal.
    match dispatcher().try_call(call(Bytes::from(vec![0; 300 << 20]))) {
        Ok(reply) => drop(reply.refused(Code::ResourceExhausted, "artifact_too_large")),
        Err(status) => assert!(
            [tonic::Code::ResourceExhausted, tonic::Code::OutOfRange].contains(&status.code()),
            "{status:?}"
        ),
    }
    dispatcher().run("jail", "act", &[]).ok();
}

/// One HTTP/2 request made by hand; what came back: HTTP status, gRPC status, body.
#[derive(Debug)]
struct Raw {
    http: u16,
    grpc: Option<i32>,
    body: Vec<u8>,
}

async fn raw(path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Result<Raw, h2::Error> {
    let stream = tokio::net::TcpStream::connect(dispatcher().address()).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    let mut client = client.ready().await?;
    let mut request = http::Request::post(format!("http://{}{path}", dispatcher().address()));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (response, mut send) = client.send_request(request.body(()).unwrap(), false)?;
    // The server may well refuse before it has all of it.
    let _ = send.send_data(body.into(), true);
    let response = response.await?;
    let http = response.status().as_u16();
    let status =
        |headers: &http::HeaderMap| headers.get("grpc-status")?.to_str().ok()?.parse().ok();
    let mut grpc = status(response.headers());
    let mut stream = response.into_body();
    let mut body = vec![];
    while let Some(data) = stream.data().await {
        let data = data?;
        let _ = stream.flow_control().release_capacity(data.len());
        body.extend_from_slice(&data);
    }
    if let Some(trailers) = stream.trailers().await? {
        grpc = grpc.or_else(|| status(&trailers));
    }
    Ok(Raw { http, grpc, body })
}

fn ask(path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Result<Raw, h2::Error> {
    let answer = async {
        tokio::time::timeout(patience(Duration::from_secs(30)), raw(path, headers, body)).await
    };
    client::runtime().block_on(answer).expect("an answer in time")
}

/// Every malformed request is answered as the caller's fault.
#[test]
fn malformed_requests_are_answered() {
    let valid = Call::new("jail", "act").request.encode_to_vec();
    let large = Call::of("jail", vec![0x7f; 2 << 20]).request.encode_to_vec();
    let good = ask(SERVE, &[GRPC, ("te", "trailers")], message(&valid)).unwrap();
    assert_eq!((good.http, good.grpc), (200, Some(0)), "{good:?}");
    let reply = ServeResponse::decode(&good.body[5..]).unwrap();
    assert_eq!(reply.report.unwrap().verdict(), Verdict::Exited);

    type Case<'a> = (&'a str, &'a str, Vec<(&'a str, &'a str)>, Vec<u8>);
    let cases: Vec<Case> = vec![
        ("not protobuf", SERVE, vec![GRPC], message(&[0xff; 64])),
        (
            "half a message",
            SERVE,
            vec![GRPC],
            framed(0, valid.len() as u32, &valid[..valid.len() / 2]),
        ),
        ("nothing", SERVE, vec![GRPC], vec![]),
        ("half a prefix", SERVE, vec![GRPC], vec![0, 0]),
        ("4 GiB announced", SERVE, vec![GRPC], framed(0, u32::MAX, b"x")),
        ("compressed in no way", SERVE, vec![GRPC], framed(1, 3, b"abc")),
        (
            "compressed with gzip",
            SERVE,
            vec![GRPC, ("grpc-encoding", "gzip")],
            framed(1, 3, b"abc"),
        ),
        (
            "unknown encoding",
            SERVE,
            vec![GRPC, ("grpc-encoding", "zip-bomb")],
            framed(1, 3, b"abc"),
        ),
        ("flag of no meaning", SERVE, vec![GRPC], framed(7, 3, b"abc")),
        ("two messages", SERVE, vec![GRPC], [message(&valid), message(&valid)].concat()),
        ("half a large executable", SERVE, vec![GRPC], message(&large)[..1 << 20].to_vec()),
        ("two large executables", SERVE, vec![GRPC], message(&[&large[..], &large].concat())),
        ("noise after one", SERVE, vec![GRPC], message(&[&large[..], &[0xff; 64]].concat())),
        ("large messages", SERVE, vec![GRPC], [message(&large), message(&large)].concat()),
        ("unknown method", "/collector.CollectiveDispatcher/Steal", vec![GRPC], message(&valid)),
        ("unknown service", "/collector.Collector/Serve", vec![GRPC], message(&valid)),
        ("no path", "/", vec![GRPC], message(&valid)),
        ("bad deadline", SERVE, vec![GRPC, ("grpc-timeout", "soon")], message(b"")),
        ("not gRPC", SERVE, vec![("content-type", "text/html")], b"<html>".to_vec()),
    ];
    for (what, path, headers, body) in cases {
        match ask(path, &headers, body) {
            Ok(raw) if raw.grpc == Some(0) => {
                // Read leniently: then it must be a reply like any other.
                let reply = ServeResponse::decode(&raw.body[5..]).unwrap();
                assert_ne!(reply.report.unwrap().verdict(), Verdict::Failed, "{what}");
            }
            Ok(raw) => assert!(raw.grpc.is_some() || raw.http >= 400, "{what}: {raw:?}"),
            Err(error) => assert!(error.is_reset() || error.is_go_away(), "{what}: {error:?}"),
        }
    }
    dispatcher().run("jail", "act", &[]).ok();
}

/// Valid requests with bytes changed at random: never our fault, never an outage.
#[test]
fn mutated_requests_are_never_our_fault() {
    let call =
        Call::of("jail", "\x7fELF but not really").context("timeout", "1s").args(&["a", "b"]);
    let valid = call.env("X", "y").any("example.com/T", [1, 2, 3]).request.encode_to_vec();
    // A fixed sequence: a failure can be had again.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut outcomes = BTreeMap::<String, u32>::new();
    for round in 0..300 {
        let mut bytes = valid.clone();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(3) {
                0 => bytes[at] = random(256) as u8,
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, random(256) as u8),
            }
        }
        let raw = ask(SERVE, &[GRPC], message(&bytes)).unwrap();
        let outcome = if raw.grpc == Some(0) {
            let reply = ServeResponse::decode(&raw.body[5..]).unwrap();
            let status = reply.status.unwrap();
            assert_ne!(status.code(), Code::Internal, "round {round}: {status:?}");
            format!("{:?}", status.code())
        } else {
            format!("gRPC {:?}", raw.grpc)
        };
        *outcomes.entry(outcome).or_default() += 1;
    }
    eprintln!("{outcomes:?}");
    dispatcher().run("jail", "act", &[]).ok();
}

/// HTTP/1, TLS, noise, silence and half a greeting, on many connections.
#[test]
fn noise_and_slow_clients_don_t_matter() {
    let noise: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /collector.CollectiveDispatcher/Serve HTTP/1.0\r\n\r\n{}",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        b"SSH-2.0-x\r\n",
    ];
    for bytes in noise {
        let mut stream = TcpStream::connect(dispatcher().address()).unwrap();
        stream.set_read_timeout(Some(patience(Duration::from_secs(1)))).unwrap();
        stream.write_all(bytes).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = vec![];
        // An answer, an end or nothing at all: whatever suits it.
        let _ = stream.read_to_end(&mut answer);
    }
    let halves: Vec<_> = (0..100)
        .map(|index| {
            let mut stream = TcpStream::connect(dispatcher().address()).unwrap();
            stream.write_all(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..index % 24]).unwrap();
            stream
        })
        .collect();
    let reply = dispatcher().run("jail", "act", &["print", "served"]).ok();
    assert_eq!(reply.text(), "served");
    assert_eq!(halves.len(), 100, "which were open until here");
}

/// Half-sent messages hold memory only up to the configured bound.
#[test]
fn bytes_in_flight_are_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("health");
    let dispatcher = Settings::new([("jail", plain(""))])
        .server(&format!(
            "inflight_bytes = \"32MiB\"\nhealth_listen = \"unix:{}\"\n",
            socket.display()
        ))
        .start();
    dispatcher.run("jail", "act", &[]).ok();
    let serve = dispatcher.process("dispatch-serve");
    let before = serve.resident().unwrap();
    // 12 MiB of a message of 16: 288 MiB in all, if they were let in.
    let half = framed(0, 16 << 20, &vec![0; 12 << 20]);
    let mut unanswered = client::runtime().block_on(async {
        let mut calls = JoinSet::new();
        for _ in 0..24 {
            let builder = h2::client::Builder::new();
            let mut call = begin(&dispatcher, &builder, half.clone(), false).await;
            calls.spawn(async move { ((&mut call.response).await.unwrap(), call) });
        }
        calls
    });
    let mut refused = vec![];
    wait_until("each is refused or taken in as far as it goes", Duration::from_secs(20), || {
        let grown = serve.resident().unwrap().saturating_sub(before);
        assert!(grown < 128 << 20, "{} MiB for 24 half-sent messages", grown >> 20);
        refused.extend(std::iter::from_fn(|| unanswered.try_join_next()).map(Result::unwrap));
        gauge(&socket, "dispatcher_inflight_bytes") == (unanswered.len() * half.len()) as u64
    });
    assert!(unanswered.len() * half.len() <= 32 << 20, "{} are let in", unanswered.len());
    for (response, _) in &refused {
        assert_eq!(response.headers()["dispatcher-reason"], "inflight_bytes");
    }
    drop((unanswered, refused));
    wait_until("served again", Duration::from_secs(10), || {
        dispatcher
            .try_call(Call::new("jail", "act"))
            .is_ok_and(|reply| reply.verdict == Verdict::Exited)
    });
    dispatcher.stop();
}

/// A large executable is put into a memfd as it comes: of half a one nothing stays,
/// and of one that is held already neither.
#[test]
fn large_executables_are_kept_once_and_halves_not_at_all() {
    let dispatcher = Settings::new([("jail", plain(""))]).start();
    let serve = dispatcher.process("dispatch-serve");
    let kept = || {
        let all = serve.descriptor_targets();
        all.iter().filter(|target| target.starts_with("/memfd:artifact")).count()
    };
    let mut large = programs::bytes("act").to_vec();
    large.resize(4 << 20, 0);
    let call = || Call::of("jail", large.clone()).args(&["print", "large"]);
    let request = call().request.encode_to_vec();
    let half = framed(0, request.len() as u32, &request[..2 << 20]);
    let halves = client::runtime().block_on(async {
        let mut begun = vec![];
        for _ in 0..80 {
            let builder = h2::client::Builder::new();
            begun.push(begin(&dispatcher, &builder, half.clone(), false).await);
        }
        begun
    });
    wait_until("as many are filled in as may be", Duration::from_secs(20), || kept() == 64);
    assert_eq!(dispatcher.call(call()).ok().text(), "large", "others are served all the same");
    drop(halves);
    wait_until("what was half sent is gone", Duration::from_secs(10), || kept() == 1);
    for _ in 0..2 {
        let reply = dispatcher.call(call()).ok();
        assert_eq!(reply.report.artifact_digest, Digest::of(&large).to_string());
    }
    assert_eq!(kept(), 1);
    dispatcher.stop();
}

#[test]
fn connections_are_bounded() {
    let dispatcher = Settings::new([("jail", plain(""))]).server("max_connections = 8\n").start();
    dispatcher.run("jail", "act", &[]).ok();
    let idle: Vec<_> =
        (0..40).filter_map(|_| TcpStream::connect(dispatcher.address()).ok()).collect();
    let serve = dispatcher.process("dispatch-serve");
    let sockets = |process: &common::host::Process| {
        process.descriptor_targets().iter().filter(|target| target.starts_with("socket:")).count()
    };
    assert!(sockets(&serve) < 30, "{} sockets with 8 connections allowed", sockets(&serve));
    drop(idle);
    wait_until("new connections are let in again", Duration::from_secs(10), || {
        let call = Call::new("jail", "act").send(client::connect(dispatcher.address()));
        client::runtime().block_on(call).is_ok()
    });
    dispatcher.stop();
}

#[test]
fn idle_connections_keep_nobody_out() {
    let dispatcher = Settings::new([("jail", plain(""))]).server("max_connections = 8\n").start();
    // A call under way keeps its connection through all of this.
    let flag = dispatcher.begin(Call::new("jail", "act").args(&["sleep", "4000"]));
    wait_until("the call runs", patience(Duration::from_secs(10)), || {
        dispatcher.descendants().iter().any(|process| process.name == "dispatch-init")
    });
    // Whole HTTP/2 connections, whose pings are answered.
    let idle: Vec<_> = (0..20)
        .filter_map(|_| {
            let handshake = async {
                let socket = tokio::net::TcpStream::connect(dispatcher.address()).await.ok()?;
                let (sender, connection) = h2::client::handshake(socket).await.ok()?;
                tokio::spawn(connection);
                Some(sender)
            };
            client::runtime().block_on(handshake)
        })
        .collect();
    wait_until("a newcomer is served", patience(Duration::from_secs(10)), || {
        let call = Call::new("jail", "act").send(client::connect(dispatcher.address()));
        client::runtime().block_on(call).is_ok()
    });
    flag.finish().unwrap().ok();
    drop(idle);
    dispatcher.stop();
}

/// A reply takes up memory until its client has taken it: that counts.
#[test]
fn an_answer_counts_until_it_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("health");
    let dispatcher = Settings::new([("jail", plain(""))])
        .server(&format!("health_listen = \"unix:{}\"\n", socket.display()))
        .start();
    let held = || gauge(&socket, "dispatcher_inflight_bytes");
    let call = Call::new("jail", "hog").args(&["stdout", "1m"]).request;
    let message = framed(0, call.encoded_len() as u32, &call.encode_to_vec());
    let (call, response) = client::runtime().block_on(async {
        // The least window there is: nothing of the answer fits.
        let mut connection = h2::client::Builder::new();
        connection.initial_window_size(0);
        let mut call = begin(&dispatcher, &connection, message, true).await;
        let response = (&mut call.response).await.unwrap();
        (call, response)
    });
    assert_eq!(response.status(), 200);
    wait_until("the answer is held", patience(Duration::from_secs(5)), || held() > 1 << 20);
    drop((call, response));
    wait_until("it is given back", patience(Duration::from_secs(5)), || held() == 0);
    dispatcher.stop();
}

#[test]
fn the_health_address_has_health_and_metrics_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("health");
    let dispatcher =
        Settings::new([("jail", plain("")), ("closed", plain("[services]\nallow = []\n"))])
            .server(&format!("health_listen = \"unix:{}\"\n", socket.display()))
            .start();
    dispatcher.run("jail", "act", &[]).ok();
    dispatcher.run("closed", "act", &[]).refused(Code::PermissionDenied, "service_not_allowed");

    let answer = http_get(&socket, "/metrics");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("content-type: application/openmetrics-text"), "{answer}");
    for line in [
        r#"dispatcher_calls_total{policy="jail",mode="jail",verdict="EXITED",reason=""} 1"#,
        r#"verdict="REFUSED",reason="service_not_allowed"} 1"#,
        r#"dispatcher_wall_seconds_count{policy="jail"} 1"#,
        "dispatcher_running 0",
        "dispatcher_artifacts 1",
        "dispatcher_draining 0",
    ] {
        assert!(answer.contains(line), "{line} in {answer}");
    }
    assert!(http_get(&socket, "/").starts_with("HTTP/1.1 404 "));

    let channel = client::connect(&format!("unix:{}", socket.display()));
    let mut health = HealthClient::new(channel.clone());
    let checked = client::runtime().block_on(health.check(HealthCheckRequest::default())).unwrap();
    assert_eq!(checked.into_inner().status(), ServingStatus::Serving);
    let call = client::runtime().block_on(Call::new("jail", "act").send(channel));
    assert_eq!(call.unwrap_err().code(), tonic::Code::Unimplemented, "no calls here");
    // And no metrics where strangers call.
    let mut stream = TcpStream::connect(dispatcher.address()).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
    dispatcher.stop();
}

fn tool(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os("DISPATCHER_TEST_TOOLS")?).join(name);
    path.exists().then_some(path)
}

fn stdout_of(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn grpcurl_can_use_it() {
    let Some(grpcurl) = tool("grpcurl") else { skip!("no grpcurl in DISPATCHER_TEST_TOOLS") };
    let run = |args: &[&str]| {
        stdout_of(Command::new(&grpcurl).arg("-plaintext").arg(dispatcher().address()).args(args))
    };
    assert!(run(&["list"]).contains(SERVICES[0]));
    assert!(run(&["describe", "collector.ServeRequest"]).contains("service_binary"));
    assert!(run(&["grpc.health.v1.Health/Check"]).contains("SERVING"));

    // The request that `dispatcher call` prints is one that grpcurl can send.
    let mut print = common::dispatcher::command();
    print.args(["call", "--print-request", "--namespace", "jail", "--binary"]);
    print.arg(programs::path("act")).args(["test/main", "print", "by grpcurl"]);
    let request = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&request, stdout_of(&mut print)).unwrap();
    let mut call = Command::new(&grpcurl);
    call.args(["-plaintext", "-max-time", "60", "-d", "@", dispatcher().address()]);
    call.arg("collector.CollectiveDispatcher/Serve").stdin(request.reopen().unwrap());
    let output = call.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let reply: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(reply["report"]["verdict"], "VERDICT_EXITED", "{reply}");
}

#[test]
fn grpcurl_can_ask_the_health_address() {
    let Some(grpcurl) = tool("grpcurl") else { skip!("no grpcurl in DISPATCHER_TEST_TOOLS") };
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("health");
    let dispatcher = Settings::new([("jail", plain(""))])
        .server(&format!("health_listen = \"unix:{}\"\n", socket.display()))
        .start();
    let run = |args: &[&str]| {
        let mut command = Command::new(&grpcurl);
        command.args(["-plaintext", "-unix", "-authority", "localhost"]).arg(&socket);
        stdout_of(command.args(args))
    };
    assert!(run(&["grpc.health.v1.Health/Check"]).contains("SERVING"));
    let listed = run(&["list"]);
    assert!(listed.contains("grpc.health.v1.Health"), "{listed}");
    assert!(!listed.contains("collector"), "{listed}");
    dispatcher.stop();
}

#[test]
fn python_can_use_it() {
    let Some(python) = tool("python3").or_else(|| tool("bin/python3")) else {
        skip!("no python3 in DISPATCHER_TEST_TOOLS")
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/client.py");
    let mut command = Command::new(python);
    command.args([script, dispatcher().address()]).arg(programs::path("act"));
    let output = stdout_of(&mut command);
    assert!(output.contains("verdict=EXITED") && output.contains("stdout=from python"), "{output}");
}
