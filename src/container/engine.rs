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
use tokio::sync::Mutex;
use tokio_stream::StreamExt as _;

use super::image::OwnImage;
use crate::jail::message::Refusal;

/// How long one request may take, in seconds; pulling and attaching go on for longer.
const REQUEST_S: u64 = 60;
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

/// A handle on Docker.
#[derive(Debug)]
pub struct Engine {
    socket: PathBuf,
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
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, connection: Mutex::default() }
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
        let docker = Docker::connect_with_unix(&path, REQUEST_S, bollard::API_DEFAULT_VERSION)
            .map_err(|error| self.unavailable(&error))?;
        match tokio::time::timeout(CONNECT, docker.negotiate_version()).await {
            Ok(result) => result.map_err(|error| self.unavailable(&error)),
            Err(_) => Err(self.unavailable(&"it doesn't answer")),
        }
    }

    fn unavailable(&self, why: &dyn std::fmt::Display) -> EngineError {
        EngineError::Unavailable { socket: self.socket.display().to_string(), why: why.to_string() }
    }

    /// An answer, its error in our words.
    async fn answer<T>(&self, answer: Result<T, Error>) -> Result<T, EngineError> {
        match answer {
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
            Error::DockerResponseServerError { message, .. } => EngineError::Refused(message),
            Error::DockerStreamError { error } => EngineError::Refused(error),
            error => {
                self.connection.lock().await.docker = None;
                self.unavailable(&with_cause(&error))
            }
        }
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
        let created = self.docker().await?.create_container(Some(options), body).await;
        Ok(self.answer(created).await?.id)
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
        let attached = self.docker().await?.attach_container(id, Some(options)).await;
        let AttachContainerResults { output, input } = self.answer(attached).await?;
        Ok(Streams { output, input })
    }

    /// Starts it; its entrypoint runs then.
    ///
    /// # Errors
    /// As said.
    pub async fn start(&self, id: &str) -> Result<(), EngineError> {
        let answered = self.docker().await?.start_container(id, None).await;
        self.answer(answered).await
    }

    /// All about a container.
    ///
    /// # Errors
    /// As said.
    pub async fn inspect(&self, id: &str) -> Result<ContainerInspectResponse, EngineError> {
        let answered = self.docker().await?.inspect_container(id, None).await;
        self.answer(answered).await
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// As said.
    pub async fn rename(&self, id: &str, name: &str) -> Result<(), EngineError> {
        let options = RenameContainerOptionsBuilder::default().name(name).build();
        let answered = self.docker().await?.rename_container(id, options).await;
        self.answer(answered).await
    }

    /// Removes it with all that it made, whatever it is doing. One that is gone is fine.
    ///
    /// # Errors
    /// As said.
    pub async fn remove(&self, id: &str) -> Result<(), EngineError> {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        let removed = self.docker().await?.remove_container(id, Some(options)).await;
        match self.answer(removed).await {
            Err(EngineError::Missing(_)) => Ok(()),
            answer => answer,
        }
    }

    /// Every container with this label, running or not: its id and the label's value.
    ///
    /// # Errors
    /// As said.
    pub async fn labelled(&self, label: &str) -> Result<Vec<(String, String)>, EngineError> {
        let filters: HashMap<_, _> = [("label", vec![label])].into();
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let listed = self.docker().await?.list_containers(Some(options)).await;
        let found = self.answer(listed).await?;
        let one = |container: bollard::models::ContainerSummary| {
            Some((container.id?, container.labels?.remove(label)?))
        };
        Ok(found.into_iter().filter_map(one).collect())
    }

    /// What Docker knows of an image.
    ///
    /// # Errors
    /// [`EngineError::Missing`] where it doesn't hold it.
    pub async fn image(&self, name: &str) -> Result<ImageInspect, EngineError> {
        let answered = self.docker().await?.inspect_image(name).await;
        self.answer(answered).await
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
        self.finish(self.docker().await?.create_image(Some(options), Some(archive), None)).await
    }

    /// Pulls an image from its registry.
    ///
    /// # Errors
    /// As said.
    pub async fn pull(&self, name: &str) -> Result<(), EngineError> {
        // Without a tag Docker would pull all that there are.
        let tagged = name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
        let whole = if tagged { name.to_owned() } else { format!("{name}:latest") };
        let options = CreateImageOptionsBuilder::default().from_image(&whole).build();
        self.finish(self.docker().await?.create_image(Some(options), None, None)).await
    }

    /// Waits for the end of something that tells of its progress.
    async fn finish<T>(
        &self,
        progress: impl tokio_stream::Stream<Item = Result<T, Error>>,
    ) -> Result<(), EngineError> {
        let mut progress = std::pin::pin!(progress);
        while let Some(step) = progress.next().await {
            self.answer(step).await?;
        }
        Ok(())
    }
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
