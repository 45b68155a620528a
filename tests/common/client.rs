//! A client: calls as the tests say them, replies as they check them.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    sync::OnceLock,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dispatcher::wire::{
    self, ExecutionMode, ExecutionOptions, ExecutionReport, OutputFormat, ServeRequest,
    ServiceTypeRef, Verdict, collective_dispatcher_client::CollectiveDispatcherClient,
    serve_request::ServiceDef, status::Code,
};
use prost::Message as _;
use prost_types::Any;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use super::{Facts, patience, programs};

/// The runtime of all calls.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    })
}

/// A channel to `HOST:PORT` or `unix:PATH`, connected when first used and again when lost.
pub fn connect(address: &str) -> Channel {
    let _context = runtime().enter();
    let uri =
        if address.starts_with("unix:") { address.into() } else { format!("http://{address}") };
    Endpoint::from_shared(uri).unwrap().connect_lazy()
}

/// Asks a Unix socket for a path by HTTP/1.1, as Prometheus does.
pub fn http_get(socket: &Path, path: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: metrics\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// What a gauge stands at, by the metrics of a `health_listen`.
#[track_caller]
pub fn gauge(socket: &Path, name: &str) -> u64 {
    let page = http_get(socket, "/metrics");
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name} in {page}")).parse().unwrap()
}

/// A protobuf duration.
pub fn duration(from: Duration) -> prost_types::Duration {
    prost_types::Duration { seconds: from.as_secs() as i64, nanos: from.subsec_nanos() as i32 }
}

/// A call in the making: service `test`, method `main` unless told otherwise.
#[derive(Clone)]
pub struct Call {
    /// What will be sent.
    pub request: ServeRequest,
    deadline: Option<Duration>,
}

impl Call {
    /// Of a test program by its name.
    pub fn new(namespace: &str, program: &str) -> Self {
        Self::of(namespace, programs::bytes(program))
    }

    /// Of any bytes.
    pub fn of(namespace: &str, binary: impl Into<Bytes>) -> Self {
        Self::without_binary(namespace).with(|request| {
            request.service_def = Some(ServiceDef::ServiceBinary(binary.into()));
        })
    }

    /// Of an executable the dispatcher already holds, or is to fetch.
    pub fn uri(namespace: &str, uri: &str) -> Self {
        Self::without_binary(namespace)
            .with(|request| request.service_def = Some(ServiceDef::ServiceUri(uri.into())))
    }

    /// Of whatever is registered.
    pub fn without_binary(namespace: &str) -> Self {
        let service =
            Some(ServiceTypeRef { namespace: String::new(), service_name: "test".into() });
        let request = ServeRequest {
            namespace: namespace.into(),
            service,
            method_name: "main".into(),
            options: Some(ExecutionOptions::default()),
            ..ServeRequest::default()
        };
        Self { request, deadline: None }
    }

    /// Any other change.
    pub fn with(mut self, change: impl FnOnce(&mut ServeRequest)) -> Self {
        change(&mut self.request);
        self
    }

    /// A change of the options.
    pub fn option(self, change: impl FnOnce(&mut ExecutionOptions)) -> Self {
        self.with(|request| change(request.options.get_or_insert_default()))
    }

    pub fn args<T: ToString>(self, args: &[T]) -> Self {
        self.option(|options| options.args = args.iter().map(ToString::to_string).collect())
    }

    pub fn method(self, service: &str, method: &str) -> Self {
        self.with(|request| {
            request.service.get_or_insert_default().service_name = service.into();
            request.method_name = method.into();
        })
    }

    /// Raw standard input.
    pub fn input(self, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        self.option(|options| options.input_bytes = bytes)
    }

    /// Standard input as a typed message.
    pub fn any(self, type_url: &str, value: impl Into<Vec<u8>>) -> Self {
        let any = Any { type_url: type_url.into(), value: value.into() };
        self.with(|request| request.input = Some(any))
    }

    pub fn env(self, name: &str, value: &str) -> Self {
        self.option(|options| drop(options.env.insert(name.into(), value.into())))
    }

    pub fn context(self, key: &str, value: &str) -> Self {
        self.with(|request| drop(request.execution_context.insert(key.into(), value.into())))
    }

    pub fn timeout(self, timeout: Duration) -> Self {
        self.option(|options| options.timeout = Some(duration(timeout)))
    }

    pub fn memory(self, bytes: u64) -> Self {
        self.option(|options| options.memory_bytes = bytes)
    }

    pub fn cpus(self, cpus: f64) -> Self {
        self.option(|options| options.cpus = cpus)
    }

    pub fn mode(self, mode: ExecutionMode) -> Self {
        self.option(|options| options.mode = mode.into())
    }

    pub fn output(self, format: OutputFormat) -> Self {
        self.option(|options| options.output = format.into())
    }

    /// The RPC's own deadline (`grpc-timeout`).
    pub fn rpc_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Sends it.
    ///
    /// # Errors
    /// The gRPC error, if that is the answer; also one of our own after two minutes.
    pub async fn send(self, channel: Channel) -> Result<Reply, tonic::Status> {
        let mut client = CollectiveDispatcherClient::new(channel)
            .max_decoding_message_size(1 << 30)
            .max_encoding_message_size(1 << 30);
        let mut request = tonic::Request::new(self.request);
        if let Some(deadline) = self.deadline {
            // The client gives up at that moment too: a reply must come before it.
            request.set_timeout(deadline);
        }
        let started = Instant::now();
        let limit = patience(Duration::from_secs(120));
        let answer = tokio::time::timeout(limit, client.serve(request)).await;
        let response =
            answer.map_err(|_| tonic::Status::internal("test: no answer in two minutes"))??;
        Ok(Reply::new(response, started.elapsed()))
    }
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Reply {
    pub code: Code,
    pub message: String,
    pub details: BTreeMap<String, String>,
    pub verdict: Verdict,
    pub report: ExecutionReport,
    pub output: Option<Any>,
    pub executor: String,
    /// Headers and trailers that begin with `dispatcher-` or `grpc-`.
    pub trailers: BTreeMap<String, String>,
    /// As the client saw it.
    pub elapsed: Duration,
}

impl Reply {
    fn new(response: tonic::Response<wire::ServeResponse>, elapsed: Duration) -> Self {
        let trailers = response.metadata().clone().into_headers();
        let trailers = trailers
            .iter()
            .filter(|(name, _)| {
                name.as_str().starts_with("dispatcher-") || name.as_str().starts_with("grpc-")
            })
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        let response = response.into_inner();
        let status = response.status.expect("every reply has a status");
        let report = response.report.expect("every reply has a report");
        Self {
            code: status.code(),
            message: status.message.clone(),
            details: status.details.into_iter().collect(),
            verdict: report.verdict(),
            report,
            output: response.output,
            executor: response.executor_id,
            trailers,
            elapsed,
        }
    }

    /// `details.reason`, empty where there is none.
    pub fn reason(&self) -> &str {
        self.detail("reason")
    }

    /// A detail, empty where there is none.
    pub fn detail(&self, key: &str) -> &str {
        self.details.get(key).map_or("", String::as_str)
    }

    /// The captured stdout, from whichever envelope.
    #[track_caller]
    pub fn stdout(&self) -> Vec<u8> {
        let any = self.output.as_ref().unwrap_or_else(|| panic!("no output: {}", self.summary()));
        match any.type_url.as_str() {
            "type.googleapis.com/google.protobuf.BytesValue" => {
                Vec::<u8>::decode(any.value.as_slice()).unwrap()
            }
            "type.googleapis.com/collector.Status" => {
                let status = wire::Status::decode(any.value.as_slice()).unwrap();
                assert_eq!(status.code(), Code::Ok, "the envelope's own code");
                status.message.into_bytes()
            }
            other => panic!("output of type {other}"),
        }
    }

    /// The captured stdout as text.
    #[track_caller]
    pub fn text(&self) -> String {
        String::from_utf8(self.stdout()).unwrap()
    }

    /// The captured stdout as `key=value` lines.
    #[track_caller]
    pub fn facts(&self) -> Facts {
        Facts::parse(&String::from_utf8_lossy(&self.stdout()))
    }

    /// The kept stderr as text.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.report.stderr).into_owned()
    }

    /// User and system time of the whole tree.
    pub fn cpu(&self) -> Duration {
        to_duration(self.report.user_time.as_ref()) + to_duration(self.report.system_time.as_ref())
    }

    /// From start to end of the run.
    pub fn wall(&self) -> Duration {
        to_duration(self.report.wall_time.as_ref())
    }

    /// Everything of interest, for a failed test.
    pub fn summary(&self) -> String {
        format!(
            "{:?} {:?} {:?} {:?}; exit {} signal {} denied {:?} refused {:?}; stderr {:?}",
            self.code,
            self.verdict,
            self.message,
            self.details,
            self.report.exit_code,
            self.report.signal,
            self.report.denied_syscall,
            self.report.refused_syscalls,
            self.stderr(),
        )
    }

    /// Asserts code, verdict and reason (empty: none).
    #[track_caller]
    pub fn expect(self, code: Code, verdict: Verdict, reason: &str) -> Self {
        assert_eq!(
            (self.code, self.verdict, self.reason()),
            (code, verdict, reason),
            "{}",
            self.summary()
        );
        self
    }

    /// Asserts that it ran and exited with 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect(Code::Ok, Verdict::Exited, "")
    }

    /// Asserts that it was refused with this code and reason.
    #[track_caller]
    pub fn refused(self, code: Code, reason: &str) -> Self {
        self.expect(code, Verdict::Refused, reason)
    }

    /// Asserts that this forbidden call ended it.
    #[track_caller]
    pub fn denied(self, syscall: &str) -> Self {
        let reply = self.expect(Code::PermissionDenied, Verdict::SyscallDenied, "syscall_denied");
        assert_eq!(reply.report.denied_syscall, syscall, "{}", reply.summary());
        reply
    }
}

/// A report's duration; zero where it is missing.
pub fn to_duration(from: Option<&prost_types::Duration>) -> Duration {
    from.map_or(Duration::ZERO, |d| Duration::new(d.seconds as u64, d.nanos as u32))
}
