//! Jails in which nothing happens: begun, counted and cancelled.

use std::time::{Duration, Instant};

use dispatcher::wire::ServeRequest;
use tokio::task::JoinSet;

use crate::{
    Outcome,
    args::Args,
    client::{self, Client},
    processes::descendants,
    server::Server,
};

/// Whose policy the sleepers go by.
const NAMESPACE: &str = "sleepers";

/// Little memory and much time; otherwise as every call.
pub const POLICY: (&str, &str) = (
    NAMESPACE,
    "extends = \"default\"\n\
     [limits]\ntimeout = \"1h\"\nmemory = \"16MiB\"\n\
     [filesystem]\ntmp = \"1MiB\"\n",
);

/// What nap.c calls itself once it runs.
const COMM: &str = "bench-nap";

/// How long all of them may take to come and to go.
const PATIENCE: Duration = Duration::from_secs(120);

/// So many calls share a connection; the server takes 256.
const PER_CONNECTION: usize = 128;

/// Calls under way that never end by themselves.
pub struct Sleepers {
    calls: JoinSet<Outcome>,
    server: u32,
}

impl Sleepers {
    /// Begins so many, and waits until each one's program runs.
    pub async fn begin(args: &Args, server: &Server, count: usize) -> Outcome<Self> {
        Self::begin_in(NAMESPACE, args, server, count).await
    }

    /// The same by another namespace's policy; there must be no others.
    pub async fn begin_in(
        namespace: &str,
        args: &Args,
        server: &Server,
        count: usize,
    ) -> Outcome<Self> {
        let mut sleepers = Self { calls: JoinSet::new(), server: server.pid() };
        let [inline, held] = client::both(namespace, &args.program("nap"))?;
        let mut client = client::connect(&server.address).await?;
        for index in 0..count {
            if index % PER_CONNECTION == 0 {
                client = client::connect(&server.address).await?;
            }
            // Once the first has brought the program along, no call's bytes are kept with it.
            let request = if index == 0 { &inline } else { &held };
            sleepers.calls.spawn(sleep(client.clone(), request.clone()));
            if index == 0 {
                sleepers.wait_for(1).await?;
            }
        }
        sleepers.wait_for(count).await?;
        Ok(sleepers)
    }

    /// Cancels all, and waits until none is left.
    pub async fn end(mut self) -> Outcome {
        self.calls.shutdown().await;
        self.wait_for(0).await
    }

    async fn wait_for(&mut self, count: usize) -> Outcome {
        let give_up = Instant::now() + PATIENCE;
        loop {
            if let Some(ended) = self.calls.try_join_next() {
                ended??;
            }
            let found = descendants(self.server)?.iter().filter(|one| one.comm == COMM).count();
            if found == count {
                return Ok(());
            }
            if Instant::now() > give_up {
                return Err(format!("{found} sleepers there, and not {count}").into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// A call that is only over when something is wrong.
async fn sleep(mut client: Client, request: ServeRequest) -> Outcome {
    let response = client.serve(request).await?.into_inner();
    let status = response.status.unwrap_or_default();
    Err(format!("a sleeper ended: {:?} {}", status.code(), status.message).into())
}
