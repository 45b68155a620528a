//! Docker Engine's API, as far as it is needed, through its socket.

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use bollard::{
    Docker,
    container::{AttachContainerResults, LogOutput},
    errors::Error,
    models::{ContainerCreateBody, ContainerInspectResponse, ImageInspect},
    query_parameters::{
        AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder,
        ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, RenameContainerOptionsBuilder,
    },
};
use tokio::{sync::Mutex, time::timeout};
use tokio_stream::StreamExt as _;

use super::image::OwnImage;
use crate::jail::message::Refusal;

/// How long Docker may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For one request.
    pub request: Duration,
    /// To say something new of a pull, which goes on for longer.
    pub pull_step: Duration,
    /// For a pull in all.
    pub pull: Duration,
}

impl Patience {
    /// With the Docker of this host.
    pub const USUAL: Self = Self {
        request: Duration::from_secs(60),
        pull_step: Duration::from_secs(300),
        pull: Duration::from_secs(3600),
    };
}

/// How long it may take to say whether it is there at all.
const PING: Duration = Duration::from_secs(2);
/// What Docker answers with, besides 503, while it ends or has lost the containerd that runs
/// its containers, though it answers pings: that says nothing of what it was asked for.
const GOING: [&str; 5] = [
    "context canceled",
    "context deadline exceeded",
    "code = Unavailable",
    ": unavailable",
    "containerd.sock",
];
/// How long reaching Docker may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long nobody tries again after that failed.
const FAILURE_HOLDS: Duration = Duration::from_millis(500);

/// What Docker said, or why it said nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// It can't be reached, or stopped in the middle.
    #[error(
        "Docker can't be reached at {socket}: {why}; start it, or name its socket in [docker] socket"
    )]
    Unavailable {
        /// Where it should be.
        socket: String,
        /// What happened.
        why: String,
    },
    /// There is no such thing.
    #[error("Docker has none: {0}")]
    Missing(String),
    /// It refused or failed.
    #[error("Docker: {0}")]
    Refused(String),
}

impl From<EngineError> for Refusal {
    fn from(error: EngineError) -> Self {
        let why = error.to_string();
        match error {
            EngineError::Unavailable { .. } => Self::DockerUnavailable { why },
            EngineError::Missing(_) | EngineError::Refused(_) => Self::Docker { why },
        }
    }
}

/// A container's streams.
pub struct Streams {
    /// What it writes.
    pub output:
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<LogOutput, Error>> + Send>>,
    /// What it reads; to be shut down at the end.
    pub input: std::pin::Pin<Box<dyn tokio::io::AsyncWrite + Send>>,
}

/// A container with a label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled {
    /// Docker's id.
    pub id: String,
    /// Its names.
    pub names: Vec<String>,
    /// The label's value.
    pub value: String,
}

/// A handle on Docker.
#[derive(Debug)]
pub struct Engine {
    socket: PathBuf,
    patience: Patience,
    connection: Mutex<Connection>,
}

#[derive(Debug, Default)]
struct Connection {
    /// Speaking a version that both know.
    docker: Option<Docker>,
    /// Why and when it was last not to be reached: those who wait meanwhile needn't try.
    failed: Option<(Instant, EngineError)>,
}

impl Engine {
    /// For this socket. It is connected to when it is needed.
    #[must_use]
    pub fn new(socket: PathBuf, patience: Patience) -> Self {
        Self { socket, patience, connection: Mutex::default() }
    }

    /// Reaches Docker, again if need be.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`].
    pub async fn docker(&self) -> Result<Docker, EngineError> {
        let mut connection = self.connection.lock().await;
        if let Some(docker) = &connection.docker {
            return Ok(docker.clone());
        }
        if let Some((at, error)) = &connection.failed
            && at.elapsed() < FAILURE_HOLDS
        {
            return Err(error.clone());
        }
        match self.connect().await {
            Ok(docker) => {
                connection.failed = None;
                Ok(connection.docker.insert(docker).clone())
            }
            Err(error) => {
                connection.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn connect(&self) -> Result<Docker, EngineError> {
        let path = self.socket.to_string_lossy();
        // Its own is for what it streams; all else is answered by `ask`, in whole.
        let seconds = self.patience.request.as_secs().max(1);
        let docker = Docker::connect_with_unix(&path, seconds, bollard::API_DEFAULT_VERSION)
            .map_err(|error| self.unavailable(&error))?;
        match timeout(CONNECT, docker.negotiate_version()).await {
            Ok(result) => result.map_err(|error| self.unavailable(&error)),
            Err(_) => Err(self.unavailable(&"it doesn't answer")),
        }
    }

    fn unavailable(&self, why: &dyn std::fmt::Display) -> EngineError {
        EngineError::Unavailable { socket: self.socket.display().to_string(), why: why.to_string() }
    }

    /// An answer, its error in our words.
    async fn ask<T>(
        &self,
        asked: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, EngineError> {
        let answer = timeout(self.patience.request, asked).await;
        match answer.unwrap_or(Err(Error::RequestTimeoutError)) {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.told(error).await),
        }
    }

    /// An error in our words. After one of the connection the next request begins anew:
    /// the Docker that comes back may be another version.
    async fn told(&self, error: Error) -> EngineError {
        match error {
            Error::DockerResponseServerError { status_code: 404, message } => {
                EngineError::Missing(message)
            }
            // It is another Docker than the one that we agreed with on a version.
            Error::DockerResponseServerError { status_code: 400, message }
                if message.contains("client version") =>
            {
                self.connection.lock().await.docker = None;
                self.unavailable(&message)
            }
            Error::DockerResponseServerError { status_code: 503, message } => {
                self.unavailable(&message)
            }
            Error::DockerResponseServerError { status_code, message }
                if status_code >= 500 && self.is_going(&message).await =>
            {
                self.unavailable(&message)
            }
            Error::DockerResponseServerError { message, .. } => EngineError::Refused(message),
            Error::DockerStreamError { error } => EngineError::Refused(error),
            error => {
                self.connection.lock().await.docker = None;
                self.unavailable(&with_cause(&error))
            }
        }
    }

    /// Whether a failure of Docker's means that it is on its way down, or up.
    async fn is_going(&self, message: &str) -> bool {
        if GOING.iter().any(|word| message.contains(word)) {
            return true;
        }
        let Ok(docker) = self.docker().await else { return true };
        !matches!(timeout(PING, docker.ping()).await, Ok(Ok(_)))
    }

    /// Creates a container, and gives its id.
    ///
    /// # Errors
    /// [`EngineError::Missing`] without its image.
    pub async fn create(
        &self,
        name: &str,
        body: ContainerCreateBody,
    ) -> Result<String, EngineError> {
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        let docker = self.docker().await?;
        Ok(self.ask(docker.create_container(Some(options), body)).await?.id)
    }

    /// Its streams; before it is started, lest anything be lost.
    ///
    /// # Errors
    /// As said.
    pub async fn attach(&self, id: &str) -> Result<Streams, EngineError> {
        let options = AttachContainerOptionsBuilder::default()
            .stdin(true)
            .stdout(true)
            .stderr(true)
            .stream(true)
            .build();
        let docker = self.docker().await?;
        let AttachContainerResults { output, input } =
            self.ask(docker.attach_container(id, Some(options))).await?;
        Ok(Streams { output, input })
    }

    /// Starts it; its entrypoint runs then.
    ///
    /// # Errors
    /// As said.
    pub async fn start(&self, id: &str) -> Result<(), EngineError> {
        let docker = self.docker().await?;
        self.ask(docker.start_container(id, None)).await
    }

    /// All about a container.
    ///
    /// # Errors
    /// As said.
    pub async fn inspect(&self, id: &str) -> Result<ContainerInspectResponse, EngineError> {
        let docker = self.docker().await?;
        self.ask(docker.inspect_container(id, None)).await
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// As said.
    pub async fn rename(&self, id: &str, name: &str) -> Result<(), EngineError> {
        let options = RenameContainerOptionsBuilder::default().name(name).build();
        let docker = self.docker().await?;
        self.ask(docker.rename_container(id, options)).await
    }

    /// Removes it with all that it made, whatever it is doing. One that is gone is fine.
    ///
    /// # Errors
    /// As said.
    pub async fn remove(&self, id: &str) -> Result<(), EngineError> {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        let docker = self.docker().await?;
        match self.ask(docker.remove_container(id, Some(options))).await {
            Err(EngineError::Missing(_)) => Ok(()),
            answer => answer,
        }
    }

    /// Every container with this label, running or not.
    ///
    /// # Errors
    /// As said.
    pub async fn labelled(&self, label: &str) -> Result<Vec<Labelled>, EngineError> {
        let filters: HashMap<_, _> = [("label", vec![label])].into();
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let docker = self.docker().await?;
        let found = self.ask(docker.list_containers(Some(options))).await?;
        let one = |container: bollard::models::ContainerSummary| {
            let names = container.names.unwrap_or_default().into_iter();
            Some(Labelled {
                id: container.id?,
                // Docker has a slash before each.
                names: names.map(|name| name.trim_start_matches('/').to_owned()).collect(),
                value: container.labels?.remove(label)?,
            })
        };
        Ok(found.into_iter().filter_map(one).collect())
    }

    /// What Docker knows of an image.
    ///
    /// # Errors
    /// [`EngineError::Missing`] where it doesn't hold it.
    pub async fn image(&self, name: &str) -> Result<ImageInspect, EngineError> {
        let docker = self.docker().await?;
        self.ask(docker.inspect_image(name)).await
    }

    /// Imports an image of ours, if it isn't there.
    ///
    /// # Errors
    /// As said.
    pub async fn import(&self, image: &OwnImage) -> Result<(), EngineError> {
        match self.image(&image.name).await {
            Err(EngineError::Missing(_)) => {}
            found => return found.map(drop),
        }
        let (repository, tag) = image.name.split_once(':').unwrap_or((&image.name, "latest"));
        let options = CreateImageOptionsBuilder::default()
            .from_src("-")
            .repo(repository)
            .tag(tag)
            .message("the root of dispatcher's containers")
            .build();
        let archive = bollard::body_full(image.archive.clone().into());
        let docker = self.docker().await?;
        let importing = docker.create_image(Some(options), Some(archive), None);
        self.ask(async {
            let mut importing = std::pin::pin!(importing);
            while let Some(step) = importing.next().await {
                step?;
            }
            Ok(())
        })
        .await
    }

    /// Pulls an image from its registry. Docker gives it up where this is dropped.
    ///
    /// # Errors
    /// As said, and where it gets no further.
    pub async fn pull(&self, name: &str) -> Result<(), EngineError> {
        // Without a tag Docker would pull all that there are.
        let tagged = name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
        let whole = if tagged { name.to_owned() } else { format!("{name}:latest") };
        let options = CreateImageOptionsBuilder::default().from_image(&whole).build();
        let docker = self.docker().await?;
        let Patience { pull_step, pull, .. } = self.patience;
        let pulling = async {
            let mut progress = std::pin::pin!(docker.create_image(Some(options), None, None));
            loop {
                match timeout(pull_step, progress.next()).await {
                    Ok(None) => return Ok(()),
                    Ok(Some(Ok(_))) => {}
                    Ok(Some(Err(error))) => return Err(self.told(error).await),
                    Err(_) => return Err(too_long("Docker tells no progress of it", pull_step)),
                }
            }
        };
        timeout(pull, pulling).await.unwrap_or_else(|_| Err(too_long("it isn't complete", pull)))
    }
}

fn too_long(what: &str, time: Duration) -> EngineError {
    EngineError::Refused(format!("{what} after {} s", time.as_secs()))
}

fn with_cause(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
