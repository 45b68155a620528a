//! The whole server in-process: a real client over a unix socket in front, the
//! fake launcher behind.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::StreamBody;
use hyper_util::rt::TokioIo;
use prost::Message as _;
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tower::{Service as _, ServiceExt as _};

use super::{Listeners, ServeError, listen::Listener, run};
use crate::{
    artifact::elf::sample,
    config::{Config, ListenAddress},
    execute::{
        fake::{Behaviour, FakeLauncher, exited},
        launcher::Launcher,
    },
    jail::{
        message::{Launch, StopCause},
        plan::Mode,
    },
    names::Digest,
    policy::{Policy, store::PolicyStore},
    testing,
    units::Limit,
    wire::{
        self, collective_dispatcher_client::CollectiveDispatcherClient, serve_request::ServiceDef,
        status::Code as StatusCode,
    },
};

type Client = CollectiveDispatcherClient<Channel>;

struct Bench {
    fake: FakeLauncher,
    path: PathBuf,
    shut_down: oneshot::Sender<()>,
    served: JoinHandle<Result<(), ServeError>>,
    _directory: tempfile::TempDir,
}

fn start(
    config: Config,
    policy: Policy,
    behave: impl Fn(&Launch) -> Behaviour + Send + 'static,
) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let listener = Listener::from_fd(socket.into(), &ListenAddress::Unix(path.clone())).unwrap();
    let set = testing::policy_set([policy]);
    let launcher = Launcher::new();
    let fake = FakeLauncher::attach(&launcher, set.digest, behave);
    let (shut_down, shutdown) = oneshot::channel::<()>();
    let served = tokio::spawn(async move {
        let listeners = Listeners { service: vec![listener], health: None };
        let policies = Arc::new(PolicyStore::new(set));
        run(listeners, &config, policies, launcher.into(), async { shutdown.await.unwrap() }).await
    });
    Bench { fake, path, shut_down, served, _directory: directory }
}

fn default_bench(behave: impl Fn(&Launch) -> Behaviour + Send + 'static) -> Bench {
    start(testing::config(), testing::policy("default"), behave)
}

impl Bench {
    async fn channel(&self) -> Channel {
        let path = self.path.clone();
        let connect = move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        };
        let endpoint = Endpoint::from_static("http://unix");
        endpoint.connect_with_connector(tower::service_fn(connect)).await.unwrap()
    }

    async fn client(&self) -> Client {
        Client::new(self.channel().await).max_decoding_message_size(usize::MAX)
    }

    async fn health(&self, service: &str) -> ServingStatus {
        let mut client = HealthClient::new(self.channel().await);
        let request = HealthCheckRequest { service: service.to_owned() };
        client.check(request).await.unwrap().into_inner().status()
    }

    async fn finish(self) {
        self.shut_down.send(()).unwrap();
        self.served.await.unwrap().unwrap();
    }
}

fn request(binary: impl Into<Bytes>) -> wire::ServeRequest {
    wire::ServeRequest {
        namespace: "demo".into(),
        service: Some(wire::ServiceTypeRef {
            namespace: String::new(),
            service_name: "greeter".into(),
        }),
        method_name: "SayHello".into(),
        service_def: Some(ServiceDef::ServiceBinary(binary.into())),
        ..wire::ServeRequest::default()
    }
}

fn say(text: &str) -> Behaviour {
    Behaviour::Say { stdout: text.into(), stderr: b"note".to_vec(), end: exited(0).into() }
}

/// Waits until the fake has been asked to launch something.
async fn launched(bench: Bench) -> Bench {
    tokio::task::spawn_blocking(move || {
        bench.fake.launched();
        bench
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_real_program_runs_and_answers() {
    let mut policy = testing::policy("default");
    policy.mode = Mode::Direct;
    let bench = start(testing::config(), policy, |_| Behaviour::Run);
    let mut request = request(std::fs::read("/bin/cat").unwrap());
    request.options = Some(wire::ExecutionOptions {
        input_bytes: "through and through".into(),
        ..wire::ExecutionOptions::default()
    });
    request.execution_context.insert("colour".into(), "blue".into());
    // `cat` takes names of files for arguments: the plain "-" is its stdin.
    request.options.as_mut().unwrap().args = vec!["-".into()];
    let response = bench.client().await.serve(request).await.unwrap();
    let metadata = response.metadata().clone();
    let response = response.into_inner();
    let status = response.status.unwrap();
    // It knows no file named after the namespace, so it complains and exits with 1.
    assert_eq!(status.code(), StatusCode::Unknown);
    assert_eq!(status.details["exit_code"], "1");
    let output = wire::Status::decode(&response.output.unwrap().value[..]).unwrap();
    assert_eq!(output.message, "through and through");
    let report = response.report.unwrap();
    assert_eq!((report.verdict(), report.exit_code), (wire::Verdict::Exited, 1));
    assert!(String::from_utf8_lossy(&report.stderr).contains("demo"));
    assert_eq!(report.ignored_context, ["colour"]);
    assert_eq!(response.executor_id, "test");
    assert_eq!(metadata.get("dispatcher-reason").unwrap(), "exit_nonzero");
    bench.finish().await;
}

#[tokio::test]
async fn replies_have_trailers_and_they_are_trailers() {
    let bench = default_bench(|_| say("hello"));
    let mut grpc = tonic::client::Grpc::new(bench.channel().await);
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/collector.CollectiveDispatcher/Serve");
    let codec = tonic_prost::ProstCodec::<wire::ServeRequest, wire::ServeResponse>::default();
    let request = Request::new(request(sample(None)));
    let response = grpc.server_streaming(request, path, codec).await.unwrap();
    assert!(!response.metadata().contains_key("dispatcher-code"), "not among the headers");
    let mut stream = response.into_inner();
    let message = stream.message().await.unwrap().unwrap();
    let trailers = stream.trailers().await.unwrap().unwrap();
    assert_eq!(trailers.get("dispatcher-code").unwrap(), "OK");
    assert_eq!(trailers.get("dispatcher-verdict").unwrap(), "EXITED");
    assert_eq!(trailers.get("dispatcher-reason").unwrap(), "");
    let run_id = message.report.unwrap().run_id;
    assert_eq!(trailers.get("dispatcher-run-id").unwrap(), run_id.as_str());
    assert!(!trailers.contains_key("grpc-retry-pushback-ms"));
    bench.finish().await;
}

#[tokio::test]
async fn overload_says_when_to_come_again() {
    let mut policy = testing::policy("default");
    policy.admission.concurrency = Limit::At(1);
    policy.admission.queue = Limit::At(0);
    let bench = start(testing::config(), policy, |_| Behaviour::Wait);
    let mut client = bench.client().await;
    let mut other = client.clone();
    let running = tokio::spawn(async move { other.serve(request(sample(None))).await });
    let bench = launched(bench).await;
    let response = client.serve(request(sample(None))).await.unwrap();
    assert_eq!(response.metadata().get("grpc-retry-pushback-ms").unwrap(), "1000");
    assert_eq!(response.metadata().get("dispatcher-code").unwrap(), "RESOURCE_EXHAUSTED");
    let status = response.into_inner().status.unwrap();
    assert_eq!(status.details["reason"], "queue_full");
    assert_eq!(status.details["retry_after_ms"], "1000");
    running.abort();
    let _ = running.await;
    bench.finish().await;
}

/// A machine that is busy elsewhere may miss the 100 ms that are kept for the
/// report, hence more than one attempt; cut off by the transport, all would fail.
#[tokio::test]
async fn the_report_arrives_before_the_deadline() {
    let bench = default_bench(|_| Behaviour::Wait);
    let mut client = bench.client().await;
    let mut attempts = 0;
    let response = loop {
        let mut request = Request::new(request(sample(None)));
        request.set_timeout(Duration::from_secs(1));
        match client.serve(request).await {
            Ok(response) => break response.into_inner(),
            Err(late) => assert!(attempts < 10, "{late}"),
        }
        attempts += 1;
    };
    let status = response.status.unwrap();
    assert_eq!(status.code(), StatusCode::DeadlineExceeded);
    assert_eq!(status.details["reason"], "timeout");
    let report = response.report.unwrap();
    assert_eq!(report.verdict(), wire::Verdict::TimedOut);
    let output = wire::Status::decode(&response.output.unwrap().value[..]).unwrap();
    assert_eq!(output.message, "begun", "the output so far");
    bench.finish().await;
}

#[tokio::test]
async fn a_caller_who_goes_away_ends_his_run() {
    let bench = default_bench(|_| Behaviour::Wait);
    let mut client = bench.client().await;
    let call = tokio::spawn(async move { client.serve(request(sample(None))).await });
    let bench = launched(bench).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    let bench = tokio::task::spawn_blocking(move || {
        assert_eq!(bench.fake.stopped().1, StopCause::Cancelled);
        bench
    });
    bench.await.unwrap().finish().await;
}

#[tokio::test]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let config = Config { drain_timeout: Duration::from_millis(600), ..testing::config() };
    let bench = start(config, testing::policy("default"), |_| Behaviour::Wait);
    for service in ["", "readiness", "liveness", "collector.CollectiveDispatcher"] {
        assert_eq!(bench.health(service).await, ServingStatus::Serving, "{service}");
    }
    let mut client = bench.client().await;
    let mut other = client.clone();
    let running = tokio::spawn(async move { other.serve(request(sample(None))).await });
    let mut bench = launched(bench).await;
    let (unused, _) = oneshot::channel();
    std::mem::replace(&mut bench.shut_down, unused).send(()).unwrap();
    while bench.health("readiness").await == ServingStatus::Serving {
        tokio::task::yield_now().await;
    }
    for service in ["", "collector.CollectiveDispatcher"] {
        assert_eq!(bench.health(service).await, ServingStatus::NotServing, "{service}");
    }
    assert_eq!(bench.health("liveness").await, ServingStatus::Serving);
    let refused = loop {
        // The gate closes right after the health has turned.
        match client.serve(request("not an executable")).await {
            Err(status) => break status,
            Ok(_) => tokio::task::yield_now().await,
        }
    };
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(refused.metadata().get("dispatcher-reason").unwrap(), "draining");
    assert_eq!(refused.metadata().get("dispatcher-code").unwrap(), "UNAVAILABLE");
    // The running one is stopped when the drain's time is over, and answered.
    let response = running.await.unwrap().unwrap().into_inner();
    assert_eq!(response.status.unwrap().code(), StatusCode::Unavailable);
    assert_eq!(response.report.unwrap().verdict(), wire::Verdict::Cancelled);
    bench.served.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_too_large_or_too_much_is_refused() {
    let config = Config { inflight_bytes: 1 << 20, ..testing::config() };
    let bench = start(config, testing::policy("default"), |_| say(""));
    let mut client = bench.client().await;
    let status = client.serve(request(vec![0; 2 << 20])).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert_eq!(status.metadata().get("dispatcher-reason").unwrap(), "message_too_large");
    assert_eq!(status.metadata().get("dispatcher-code").unwrap(), "RESOURCE_EXHAUSTED");
    assert_eq!(status.metadata().get("dispatcher-verdict").unwrap(), "REFUSED");
    let mut padded = sample(None);
    padded.resize(900 << 10, 0);
    for _ in 0..4 {
        let response = client.serve(request(padded.clone())).await.unwrap().into_inner();
        assert_eq!(response.status.unwrap().code(), StatusCode::Ok, "each gives its bytes back");
    }
    bench.finish().await;
}

#[tokio::test]
async fn a_large_binary_within_the_policy_comes_through() {
    let bench = default_bench(|_| say(""));
    let mut large = sample(None);
    large.resize(40 << 20, 7);
    let digest = Digest::of(&large);
    let response = bench.client().await.serve(request(large)).await.unwrap().into_inner();
    assert_eq!(response.report.unwrap().artifact_digest, digest.to_string());
    bench.finish().await;
}

/// Time is paused: with nothing else to do, it jumps to the next timer.
#[tokio::test(start_paused = true)]
async fn half_a_message_does_not_wait_for_ever() {
    let bench = default_bench(|_| say(""));
    let mut channel = bench.channel().await;
    let (sender, receiver) = mpsc::channel::<Result<http_body::Frame<Bytes>, Status>>(1);
    let half = http_body::Frame::data(Bytes::from_static(&[0, 0, 0, 1, 0, b'x']));
    sender.send(Ok(half)).await.unwrap();
    let request = post("collector.CollectiveDispatcher/Serve")
        .body(Body::new(StreamBody::new(ReceiverStream::new(receiver))))
        .unwrap();
    let begun = Instant::now();
    let response = channel.ready().await.unwrap().call(request).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], (Code::DeadlineExceeded as i32).to_string());
    assert!(begun.elapsed() >= super::layers::receive::STALL_MAX);
    drop(sender);
}

/// A call of this method, to be given a body.
fn post(method: &str) -> http::request::Builder {
    http::Request::builder()
        .method("POST")
        .uri(format!("http://unix/{method}"))
        .header("content-type", "application/grpc")
}

#[tokio::test]
async fn compression_is_not_spoken() {
    let bench = default_bench(|_| say(""));
    let mut channel = bench.channel().await;
    let request = post("collector.CollectiveDispatcher/Serve")
        .header("grpc-encoding", "gzip")
        .body(Body::new(http_body_util::Full::new(Bytes::from_static(&[1, 0, 0, 0, 1, 0]))))
        .unwrap();
    let response = channel.ready().await.unwrap().call(request).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], (Code::Unimplemented as i32).to_string());
    bench.finish().await;
}

#[tokio::test]
async fn who_asks_for_an_unknown_service_is_told_where_to_look() {
    let bench = default_bench(|_| say(""));
    let mut channel = bench.channel().await;
    let request = post("collector.CollectorRegistry/ListServices")
        .body(Body::new(http_body_util::Full::new(Bytes::from_static(&[0; 5]))))
        .unwrap();
    let response = channel.ready().await.unwrap().call(request).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], (Code::Unimplemented as i32).to_string());
    let message = response.headers()["grpc-message"].to_str().unwrap();
    assert!(message.contains("reflection"), "{message}");
    bench.finish().await;
}

#[tokio::test]
async fn what_is_not_built_yet_says_so_in_an_orderly_reply() {
    let bench = default_bench(|_| say(""));
    let mut client = bench.client().await;
    let connect = client.connect(wire::ConnectRequest::default()).await.unwrap();
    assert_eq!(connect.metadata().get("dispatcher-code").unwrap(), "UNIMPLEMENTED");
    let connect = connect.into_inner();
    assert_eq!(connect.connection_id, "");
    let status = connect.status.unwrap();
    assert_eq!(status.code(), StatusCode::Unimplemented);
    assert_eq!(status.details["reason"], "unimplemented");
    let dispatch = client.dispatch(wire::DispatchRequest::default()).await.unwrap();
    assert_eq!(dispatch.metadata().get("dispatcher-verdict").unwrap(), "REFUSED");
    assert_eq!(dispatch.into_inner().status.unwrap().code(), StatusCode::Unimplemented);
    bench.finish().await;
}

#[tokio::test]
async fn malformed_requests_are_answered_in_order() {
    let bench = default_bench(|_| say(""));
    let mut client = bench.client().await;
    let response = client.serve(wire::ServeRequest::default()).await.unwrap();
    assert_eq!(response.metadata().get("dispatcher-code").unwrap(), "INVALID_ARGUMENT");
    let response = response.into_inner();
    let status = response.status.unwrap();
    assert_eq!(
        (status.code(), &*status.message),
        (StatusCode::InvalidArgument, "namespace is required")
    );
    assert_eq!(status.details["field"], "namespace");
    assert!(response.output.is_none() && !response.report.unwrap().run_id.is_empty());
    bench.finish().await;
}

#[tokio::test]
async fn reflection_lists_what_is_served_in_both_versions() {
    use tonic_reflection::pb::{v1, v1alpha};
    let bench = default_bench(|_| say(""));
    let listed = |names: Vec<String>| {
        assert!(names.contains(&"collector.CollectiveDispatcher".to_owned()), "{names:?}");
        assert!(names.contains(&"grpc.health.v1.Health".to_owned()), "{names:?}");
        assert!(!names.contains(&"collector.CollectorRegistry".to_owned()), "not served yet");
    };
    {
        use v1::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let mut client = ServerReflectionClient::new(bench.channel().await);
        let ask = |message_request| {
            let request = ServerReflectionRequest {
                host: String::new(),
                message_request: Some(message_request),
            };
            tokio_stream::once(request)
        };
        let list = ask(MessageRequest::ListServices(String::new()));
        let mut answers = client.server_reflection_info(list).await.unwrap().into_inner();
        match answers.message().await.unwrap().unwrap().message_response.unwrap() {
            MessageResponse::ListServicesResponse(list) => {
                listed(list.service.into_iter().map(|service| service.name).collect());
            }
            other => panic!("{other:?}"),
        }
        for symbol in ["collector.ServeRequest", "grpc.health.v1.Health"] {
            let file = ask(MessageRequest::FileContainingSymbol(symbol.into()));
            let mut answers = client.server_reflection_info(file).await.unwrap().into_inner();
            let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
            assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{symbol}");
        }
    }
    {
        use v1alpha::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let mut client = ServerReflectionClient::new(bench.channel().await);
        let list = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let list = tokio_stream::once(list);
        let mut answers = client.server_reflection_info(list).await.unwrap().into_inner();
        match answers.message().await.unwrap().unwrap().message_response.unwrap() {
            MessageResponse::ListServicesResponse(list) => {
                listed(list.service.into_iter().map(|service| service.name).collect());
            }
            other => panic!("{other:?}"),
        }
    }
    bench.finish().await;
}
