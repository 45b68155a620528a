//! A gRPC service that does what each call asks of it, and is started as `PROBE` in its
//! environment says: words, see [`Options`]. Its methods: service.proto.

#![allow(missing_docs)]

use std::{
    env,
    io::{self, Write as _},
    os::{fd::FromRawFd as _, unix::net::UnixListener as StdListener},
    pin::Pin,
    process,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::{Stream, StreamExt as _, wrappers::UnixListenerStream};
use tonic::{
    Code, Request, Response, Status, Streaming,
    metadata::{Ascii, Binary, KeyAndValueRef, MetadataKey, MetadataMap, MetadataValue},
    service::Routes,
    transport::Server,
};
use wire::{
    Entries, Entry, Failure, Nothing, Number, Payload, State, Text,
    probe_server::{Probe, ProbeServer},
};

mod wire {
    tonic::include_proto!("test");
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/service.bin"));
}

/// More than any test sends.
const MESSAGE_MAX: usize = 128 << 20;

/// How it is to behave as a whole.
#[derive(Debug)]
struct Options {
    /// `v1`, `v1alpha`, `both` or `none`.
    reflection: String,
    /// `inherited`: descriptor 3; `path`: `GRPC_UNIX_SOCKET`.
    listen: String,
    /// Before it listens, or takes the first connection.
    delay: Duration,
    /// Ends at once with this status, with words on stderr.
    exit: Option<i32>,
    /// With 1, a call that blocks makes the whole of it deaf.
    threads: usize,
    /// Connections are ended (GOAWAY) at this age.
    age: Option<Duration>,
    /// Its name in /proc/PID/comm, for who looks at it from outside.
    name: Option<String>,
    /// Takes this many connections, and then closes the socket it listens at.
    connections: usize,
    /// Whether a thread of it is always busy.
    busy: bool,
}

impl Options {
    fn read(words: &str) -> Self {
        let mut options = Self {
            reflection: "both".into(),
            listen: "inherited".into(),
            delay: Duration::ZERO,
            exit: None,
            threads: 4,
            age: None,
            name: None,
            connections: usize::MAX,
            busy: false,
        };
        let milliseconds = |text: &str| Duration::from_millis(text.parse().unwrap());
        for word in words.split_whitespace() {
            let (name, value) = word.split_once('=').expect("words are NAME=VALUE");
            match name {
                "reflection" => options.reflection = value.into(),
                "listen" => options.listen = value.into(),
                "delay" => options.delay = milliseconds(value),
                "exit" => options.exit = Some(value.parse().unwrap()),
                "threads" => options.threads = value.parse().unwrap(),
                "age" => options.age = Some(milliseconds(value)),
                "name" => options.name = Some(value.into()),
                "busy" => options.busy = value.parse().unwrap(),
                "connections" => options.connections = value.parse().unwrap(),
                _ => panic!("no such word: {word}"),
            }
        }
        options
    }
}

/// What there is at the start, before anything of ours is.
fn around() -> Vec<Entry> {
    let entry = |name: &str, value: String| Entry { name: name.into(), value: value.into() };
    let mut found = vec![];
    let directory = std::fs::read_dir("/proc/self/fd").expect("/proc");
    let numbers: Vec<_> = directory.flatten().map(|fd| fd.file_name()).collect();
    // One was the directory's own, and is no more.
    for number in numbers.iter().filter_map(|number| number.to_str()) {
        if std::fs::read_link(format!("/proc/self/fd/{number}")).is_ok() {
            found.push(entry("fd", number.into()));
        }
    }
    found.extend(env::vars().map(|(name, value)| entry("env", format!("{name}={value}"))));
    // SAFETY: plain system calls.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    found.push(entry("uid", uid.to_string()));
    found.push(entry("gid", gid.to_string()));
    let cwd = env::current_dir()
        .map_or_else(|error| error.to_string(), |path| path.display().to_string());
    found.push(entry("cwd", cwd));
    let stdin = io::copy(&mut io::stdin(), &mut io::sink());
    found.push(entry("stdin", format!("{stdin:?}")));
    found
}

fn main() {
    let around = around();
    let options = Options::read(&env::var("PROBE").unwrap_or_default());
    if let Some(name) = &options.name {
        rename(name).unwrap();
    }
    if options.busy {
        thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    if let Some(status) = options.exit {
        eprintln!("told to exit with {status}");
        end(status);
    }
    let mut builder = if options.threads == 1 {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    let runtime = builder.worker_threads(options.threads).enable_all().build().unwrap();
    runtime.block_on(serve(options, around));
}

/// Ends as exit(3) would, whatever other threads do.
fn end(status: i32) -> ! {
    // SAFETY: ends the process; there is nothing after it.
    unsafe { libc::_exit(status) }
}

/// By the first thread, whose name is the process's.
fn rename(name: &str) -> io::Result<()> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: a string that ends with a zero.
    let result = unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

async fn serve(options: Options, around: Vec<Entry>) {
    thread::sleep(options.delay);
    let listener = listener(&options.listen).unwrap();
    let taken = options.connections;
    let incoming = UnixListenerStream::new(listener).take(taken);
    // The stream's end would be the server's: it goes on with the connections it has.
    let incoming = incoming.chain(tokio_stream::pending::<io::Result<UnixStream>>());

    let probe = ProbeServer::new(Service::new(around))
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ProbeServer<Service>>().await;
    let mut routes = Routes::new(probe).add_service(health_service);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(wire::DESCRIPTORS)
    };
    let (v1, v1alpha) = match options.reflection.as_str() {
        "both" => (true, true),
        "v1" => (true, false),
        "v1alpha" => (false, true),
        "none" => (false, false),
        other => panic!("no such reflection: {other}"),
    };
    if v1 {
        routes = routes.add_service(reflection().build_v1().unwrap());
    }
    if v1alpha {
        routes = routes.add_service(reflection().build_v1alpha().unwrap());
    }
    let mut server = Server::builder();
    if let Some(age) = options.age {
        server = server.max_connection_age(age);
    }
    server.add_routes(routes).serve_with_incoming(incoming).await.unwrap();
}

fn listener(from: &str) -> io::Result<UnixListener> {
    match from {
        "path" => UnixListener::bind(env::var_os("GRPC_UNIX_SOCKET").expect("GRPC_UNIX_SOCKET")),
        "inherited" => {
            let variable = |name| env::var(name).unwrap_or_default();
            assert_eq!(variable("LISTEN_PID"), process::id().to_string(), "LISTEN_PID");
            assert_eq!(variable("LISTEN_FDS"), "1", "LISTEN_FDS");
            assert_eq!(variable("LISTEN_FDNAMES"), "grpc", "LISTEN_FDNAMES");
            // SAFETY: the variables say that it is ours, and nothing else here uses it.
            let listener = unsafe { StdListener::from_raw_fd(3) };
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener)
        }
        other => panic!("nothing to listen at: {other}"),
    }
}

/// What is counted.
#[derive(Default)]
struct Counts {
    calls: AtomicU64,
    now: AtomicU64,
    most: AtomicU64,
    cancelled: AtomicU64,
}

struct Service {
    counts: Arc<Counts>,
    token: String,
    kept: Mutex<Vec<Vec<u8>>>,
    around: Vec<Entry>,
}

/// A call that is there, until dropped.
struct Present {
    counts: Arc<Counts>,
    /// Whether to be dropped before its end means that it was cancelled.
    unfinished: bool,
}

impl Drop for Present {
    fn drop(&mut self) {
        self.counts.now.fetch_sub(1, Ordering::SeqCst);
        if self.unfinished {
            self.counts.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Service {
    fn new(around: Vec<Entry>) -> Self {
        let mut random = [0_u8; 8];
        // SAFETY: the buffer is as long as said.
        let got = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
        assert_eq!(got, 8, "getrandom");
        let token = format!("{:016x}", u64::from_ne_bytes(random));
        Self { counts: Arc::default(), token, kept: Mutex::default(), around }
    }

    fn enter(&self) -> Present {
        let counts = self.counts.clone();
        counts.calls.fetch_add(1, Ordering::SeqCst);
        let now = counts.now.fetch_add(1, Ordering::SeqCst) + 1;
        counts.most.fetch_max(now, Ordering::SeqCst);
        Present { counts, unfinished: false }
    }

    fn state(&self) -> Result<Response<State>, Status> {
        let count = |of: &AtomicU64| of.load(Ordering::SeqCst);
        Ok(Response::new(State {
            pid: process::id(),
            token: self.token.clone(),
            calls: count(&self.counts.calls),
            most_at_once: count(&self.counts.most),
            cancelled: count(&self.counts.cancelled),
            now: count(&self.counts.now),
        }))
    }
}

type Numbers = Pin<Box<dyn Stream<Item = Result<Number, Status>> + Send>>;

#[tonic::async_trait]
impl Probe for Service {
    async fn echo(&self, request: Request<Payload>) -> Result<Response<Payload>, Status> {
        let _present = self.enter();
        Ok(Response::new(request.into_inner()))
    }

    async fn make(&self, request: Request<Number>) -> Result<Response<Payload>, Status> {
        let _present = self.enter();
        let data = vec![b'x'; request.into_inner().value as usize];
        Ok(Response::new(Payload { data: data.into() }))
    }

    async fn look(&self, _: Request<Nothing>) -> Result<Response<State>, Status> {
        let _present = self.enter();
        self.state()
    }

    async fn around(&self, _: Request<Nothing>) -> Result<Response<Entries>, Status> {
        let _present = self.enter();
        Ok(Response::new(Entries { entries: self.around.clone() }))
    }

    async fn metadata(&self, request: Request<Nothing>) -> Result<Response<Entries>, Status> {
        let _present = self.enter();
        let entries = request.metadata().iter().map(|entry| match entry {
            KeyAndValueRef::Ascii(name, value) => Entry {
                name: name.as_str().into(),
                value: Bytes::copy_from_slice(value.as_encoded_bytes()),
            },
            KeyAndValueRef::Binary(name, value) => Entry {
                name: name.as_str().into(),
                value: value.to_bytes().unwrap_or_else(|_| Bytes::from_static(b"not base64")),
            },
        });
        Ok(Response::new(Entries { entries: entries.collect() }))
    }

    async fn fail(&self, request: Request<Failure>) -> Result<Response<Payload>, Status> {
        let _present = self.enter();
        let failure = request.into_inner();
        let mut trailers = MetadataMap::new();
        for Entry { name, value } in failure.trailers {
            if name.ends_with("-bin") {
                let name = MetadataKey::<Binary>::from_bytes(name.as_bytes()).unwrap();
                trailers.append_bin(name, MetadataValue::from_bytes(&value));
            } else {
                let name = MetadataKey::<Ascii>::from_bytes(name.as_bytes()).unwrap();
                trailers.append(name, MetadataValue::try_from(&value[..]).unwrap());
            }
        }
        let code = Code::from_i32(failure.code);
        Err(Status::with_details_and_metadata(code, failure.message, failure.details, trailers))
    }

    async fn sleep(&self, request: Request<Number>) -> Result<Response<State>, Status> {
        let mut present = self.enter();
        present.unfinished = true;
        tokio::time::sleep(Duration::from_millis(request.into_inner().value)).await;
        present.unfinished = false;
        self.state()
    }

    async fn block(&self, request: Request<Number>) -> Result<Response<State>, Status> {
        let _present = self.enter();
        thread::sleep(Duration::from_millis(request.into_inner().value));
        self.state()
    }

    async fn spin(&self, request: Request<Number>) -> Result<Response<State>, Status> {
        let _present = self.enter();
        let end = Instant::now() + Duration::from_millis(request.into_inner().value);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        self.state()
    }

    async fn exit(&self, request: Request<Number>) -> Result<Response<State>, Status> {
        end(request.into_inner().value as i32)
    }

    async fn abort(&self, _: Request<Nothing>) -> Result<Response<State>, Status> {
        // SAFETY: ends the process; there is nothing after it.
        unsafe { libc::abort() }
    }

    async fn allocate(&self, request: Request<Number>) -> Result<Response<State>, Status> {
        let _present = self.enter();
        let block = vec![0xa5; (request.into_inner().value as usize) << 20];
        self.kept.lock().unwrap().push(block);
        self.state()
    }

    async fn fork(&self, request: Request<Text>) -> Result<Response<State>, Status> {
        let _present = self.enter();
        let name = format!("{}\0", request.into_inner().value);
        // SAFETY: the child makes system calls only.
        unsafe {
            match libc::fork() {
                0 => {
                    libc::prctl(libc::PR_SET_NAME, name.as_ptr());
                    loop {
                        libc::pause();
                    }
                }
                -1 => return Err(Status::internal(io::Error::last_os_error().to_string())),
                _ => {}
            }
        }
        self.state()
    }

    async fn stderr(&self, request: Request<Text>) -> Result<Response<State>, Status> {
        let _present = self.enter();
        io::stderr().write_all(request.into_inner().value.as_bytes())?;
        self.state()
    }

    async fn flood(&self, request: Request<Number>) -> Result<Response<State>, Status> {
        let _present = self.enter();
        let block = vec![b'x'; 1 << 20];
        for _ in 0..request.into_inner().value {
            // A full or closed pipe is the reader's affair.
            let _ = io::stdout().write_all(&block).and_then(|()| io::stdout().flush());
            let _ = io::stderr().write_all(&block);
        }
        self.state()
    }

    async fn deadly(&self, _: Request<Nothing>) -> Result<Response<State>, Status> {
        let _present = self.enter();
        // SAFETY: a plain system call. Where it is allowed, only this thread is concerned.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
        if result < 0 {
            return Err(Status::permission_denied(io::Error::last_os_error().to_string()));
        }
        self.state()
    }

    type DownloadStream = Numbers;

    async fn download(&self, request: Request<Number>) -> Result<Response<Numbers>, Status> {
        let _present = self.enter();
        let numbers = (0..request.into_inner().value).map(|value| Ok(Number { value }));
        Ok(Response::new(Box::pin(tokio_stream::iter(numbers.collect::<Vec<_>>()))))
    }

    async fn upload(
        &self,
        request: Request<Streaming<Number>>,
    ) -> Result<Response<Number>, Status> {
        let _present = self.enter();
        let mut numbers = request.into_inner();
        let mut sum = 0;
        while let Some(number) = numbers.message().await? {
            sum += number.value;
        }
        Ok(Response::new(Number { value: sum }))
    }

    type TalkStream = Numbers;

    async fn talk(&self, request: Request<Streaming<Number>>) -> Result<Response<Numbers>, Status> {
        let _present = self.enter();
        Ok(Response::new(Box::pin(request.into_inner())))
    }
}
