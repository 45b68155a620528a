//! A gRPC service by the dispatcher, beside the same server called straight over a socket.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dispatcher::wire::{ServeRequest, status::Code};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use serde::Serialize;
use tokio::net::UnixStream;
use tonic::{
    Request,
    client::Grpc,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use crate::{
    Outcome,
    args::Args,
    client::{self, Client},
    report::{Goal, Report},
    server::Server,
    stats::Summary,
};

/// Calls before those that count.
const WARM_UP: usize = 50;

/// How often a socket is looked for that isn't there yet, and for how long. Much less than a start
/// takes, as it is part of the bare one's time; so not by the runtime's timer, which counts
/// milliseconds.
const LOOK: Duration = Duration::from_micros(20);
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// Callers at once, where there are several.
const CALLERS: usize = 64;

/// The method, and its message: the type of both has one string as its first field.
const SERVICE: &str = "helloworld.Greeter";
const METHOD: &str = "SayHello";

/// A new instance for each call in one namespace, one for all in the other.
const POLICIES: [(&str, &str); 2] = [
    (WARM, "protocol = \"grpc\"\n[admission]\nconcurrency = 256\n[instances]\nconcurrency = 256\n"),
    (COLD, "protocol = \"grpc\"\n[instances]\nmax_requests = 1\n"),
];
const WARM: &str = "warm";
const COLD: &str = "cold";

/// Times, and calls per second of several callers.
#[derive(Debug, Serialize)]
pub struct Services {
    pub straight: Summary,
    pub warm: Summary,
    /// From the start of the process to its first answer.
    pub bare_start: Summary,
    pub cold: Summary,
    pub callers: usize,
    pub straight_per_s: f64,
    pub warm_per_s: f64,
}

/// Measures, and enters what was found.
pub fn measure(args: &Args, report: &mut Report) -> Outcome {
    let server = Server::start(args, &POLICIES)?;
    let program = args.program("greeter");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    eprintln!("field: services, {} rounds warm, {} cold", args.rounds, args.large_rounds * 5);
    let found = runtime.block_on(async {
        let [straight, warm] = warm(args, &server, &program).await?;
        let [bare_start, cold] = cold(args, &server, &program).await?;
        let [straight_per_s, warm_per_s] = crowd(args, &server, &program).await?;
        let callers = CALLERS;
        Outcome::Ok(Services {
            straight,
            warm,
            bare_start,
            cold,
            callers,
            straight_per_s,
            warm_per_s,
        })
    })?;
    let warm = found.warm.p50_ms / found.straight.p50_ms;
    report.goals.push(Goal::at_most("a warm service's call: times one made straight", warm, 2.0));
    let cold = found.cold.p50_ms / found.bare_start.p50_ms;
    report.goals.push(Goal::at_most("a service's start to its answer: times the bare", cold, 1.5));
    report.services = Some(found);
    server.stop()
}

/// The greeter by itself, at a path.
struct Bare {
    child: Child,
    directory: tempfile::TempDir,
}

impl Bare {
    fn start(program: &Path) -> Outcome<Self> {
        let directory = tempfile::Builder::new().prefix("dispatcher-bench-").tempdir()?;
        let mut command = Command::new(program);
        command.env("GRPC_UNIX_SOCKET", directory.path().join("socket"));
        command.stdin(Stdio::null());
        Ok(Self { child: command.spawn()?, directory })
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let killed = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = killed {
            eprintln!("field: the bare greeter: {error}");
        }
    }
}

/// Connects as soon as somebody listens.
async fn channel(path: PathBuf) -> Outcome<Channel> {
    let give_up = Instant::now() + LOOK_LIMIT;
    while UnixStream::connect(&path).await.is_err() {
        if Instant::now() > give_up {
            return Err(format!("nobody listens at {}", path.display()).into());
        }
        // Nothing else is to be done on this thread meanwhile.
        thread::sleep(LOOK);
    }
    let connect = move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    };
    let endpoint = Endpoint::from_static("http://localhost");
    Ok(endpoint.connect_with_connector(tower::service_fn(connect)).await?)
}

async fn client_of(server: &Server) -> Outcome<Client> {
    Ok(Client::new(channel(server.socket()).await?))
}

/// One call made straight.
async fn greet(channel: &Channel) -> Outcome<Duration> {
    let started = Instant::now();
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await?;
    let path = http::uri::PathAndQuery::from_static("/helloworld.Greeter/SayHello");
    let codec = ProstCodec::<String, String>::default();
    let reply = grpc.unary(Request::new("Ada".to_owned()), path, codec).await?.into_inner();
    let took = started.elapsed();
    match reply.as_str() {
        "Hello Ada!" => Ok(took),
        other => Err(format!("the greeter said {other:?}").into()),
    }
}

/// The same by the dispatcher.
async fn serve(client: &mut Client, request: &ServeRequest) -> Outcome<Duration> {
    let started = Instant::now();
    let response = client.serve(request.clone()).await?.into_inner();
    let took = started.elapsed();
    let status = response.status.unwrap_or_default();
    let output = response.output.unwrap_or_default();
    let said = String::decode(output.value.as_slice()).unwrap_or_default();
    match (status.code(), said.as_str()) {
        (Code::Ok, "Hello Ada!") => Ok(took),
        (code, said) => Err(format!("{code:?} {:?}, {said:?}", status.message).into()),
    }
}

/// The call, for who holds the greeter already.
async fn request(server: &Server, namespace: &str, program: &Path) -> Outcome<ServeRequest> {
    let calls = client::both(namespace, program)?.map(|call| ServeRequest {
        service: Some(dispatcher::wire::ServiceTypeRef {
            namespace: String::new(),
            service_name: SERVICE.into(),
        }),
        method_name: METHOD.into(),
        input: Some(prost_types::Any {
            type_url: "type.googleapis.com/helloworld.HelloRequest".into(),
            value: "Ada".to_owned().encode_to_vec(),
        }),
        ..call
    });
    let [inline, held] = calls;
    let mut client = client_of(server).await?.max_encoding_message_size(usize::MAX);
    serve(&mut client, &inline).await?;
    Ok(held)
}

async fn warm(args: &Args, server: &Server, program: &Path) -> Outcome<[Summary; 2]> {
    let bare = Bare::start(program)?;
    let straight = channel(bare.socket()).await?;
    let request = request(server, WARM, program).await?;
    let mut client = client_of(server).await?;
    let mut samples: [Vec<Duration>; 2] = Default::default();
    for round in 0..WARM_UP + args.rounds {
        let times = [greet(&straight).await?, serve(&mut client, &request).await?];
        if round >= WARM_UP {
            samples.iter_mut().zip(times).for_each(|(all, time)| all.push(time));
        }
    }
    summaries(samples)
}

async fn cold(args: &Args, server: &Server, program: &Path) -> Outcome<[Summary; 2]> {
    let request = request(server, COLD, program).await?;
    let mut client = client_of(server).await?;
    let mut samples: [Vec<Duration>; 2] = Default::default();
    for round in 0..=args.large_rounds * 5 {
        let started = Instant::now();
        let bare = Bare::start(program)?;
        greet(&channel(bare.socket()).await?).await?;
        let times = [started.elapsed(), {
            drop(bare);
            serve(&mut client, &request).await?
        }];
        if round > 0 {
            samples.iter_mut().zip(times).for_each(|(all, time)| all.push(time));
        }
    }
    summaries(samples)
}

fn summaries(samples: [Vec<Duration>; 2]) -> Outcome<[Summary; 2]> {
    let [one, two] = samples.map(|samples| Summary::of(&samples).ok_or("no rounds"));
    Ok([one?, two?])
}

/// Calls per second of several callers, by turns.
async fn crowd(args: &Args, server: &Server, program: &Path) -> Outcome<[f64; 2]> {
    let bare = Bare::start(program)?;
    let straight = channel(bare.socket()).await?;
    let request = request(server, WARM, program).await?;
    let client = client_of(server).await?;
    let each = args.calls.div_ceil(CALLERS);
    let mut begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CALLERS {
        let straight = straight.clone();
        tasks.spawn(async move {
            for _ in 0..each {
                greet(&straight).await?;
            }
            Outcome::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    let calls = (each * CALLERS) as f64;
    let straight_per_s = calls / begun.elapsed().as_secs_f64();
    begun = Instant::now();
    for _ in 0..CALLERS {
        let (mut client, request) = (client.clone(), request.clone());
        tasks.spawn(async move {
            for _ in 0..each {
                serve(&mut client, &request).await?;
            }
            Outcome::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok([straight_per_s, calls / begun.elapsed().as_secs_f64()])
}
