//! A Docker for tests, which answers as the test says.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::Notify,
};

use super::{
    engine::{Engine, Patience},
    make::{Maker, Order},
};
use crate::{
    jail::{check::Checked, message::Launch, plan::Mode},
    names::{Digest, RunId},
};

/// Its answer to a request: status and body.
pub(super) enum Answer {
    Now(u16, Value),
    /// Begins to say so, and says no more.
    Half(u16, Value),
    /// Once it is notified.
    After(Arc<Notify>, u16, Value),
    Never,
}

/// What it was asked: `GET /images/NAME/json`, and what came along.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) what: String,
    pub(super) body: Value,
}

/// It is there until it is dropped.
pub(super) struct FakeDocker {
    asked: Arc<Mutex<Vec<Asked>>>,
    serving: tokio::task::JoinHandle<()>,
    directory: tempfile::TempDir,
}

/// Little, so that tests needn't wait for long.
const PATIENCE: Patience = Patience {
    request: Duration::from_millis(300),
    pull_step: Duration::from_millis(300),
    pull: Duration::from_secs(1),
};

impl FakeDocker {
    /// One that answers by `answer`: by what it was asked, and how often it was asked that
    /// before.
    pub(super) fn start(answer: impl Fn(&Asked, usize) -> Answer + Send + Sync + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("docker.sock")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::<Asked>::new()));
        let (seen, answer) = (Arc::clone(&asked), Arc::new(answer));
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                tokio::spawn(async move { serve(stream, &seen, &*answer).await });
            }
        });
        Self { asked, serving, directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("docker.sock")
    }

    /// A handle on it, without much patience.
    pub(super) fn engine(&self) -> Engine {
        Engine::new(self.socket(), PATIENCE)
    }

    /// Who makes containers by that.
    pub(super) fn maker(&self) -> Arc<Maker> {
        Maker::new(self.engine(), &self.slots()).unwrap()
    }

    /// The same with the usual patience.
    pub(super) fn patient_maker(&self) -> Arc<Maker> {
        Maker::new(Engine::new(self.socket(), Patience::USUAL), &self.slots()).unwrap()
    }

    /// A place for slots.
    pub(super) fn slots(&self) -> PathBuf {
        self.directory.path().join("slots")
    }

    /// What it was asked that begins so.
    pub(super) fn asked(&self, beginning: &str) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|asked| asked.what.starts_with(beginning)).cloned().collect()
    }
}

impl Drop for FakeDocker {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(
    mut stream: UnixStream,
    seen: &Mutex<Vec<Asked>>,
    answer: &(impl Fn(&Asked, usize) -> Answer + Sync),
) {
    let Some(asked) = read(&mut stream).await else { return };
    let before = {
        let mut seen = seen.lock().unwrap();
        let before = seen.iter().filter(|one| one.what == asked.what).count();
        seen.push(asked.clone());
        before
    };
    let answer = match &*asked.what {
        "GET /version" => Answer::Now(200, json!({ "ApiVersion": "1.45" })),
        _ => answer(&asked, before),
    };
    let mut more = 0;
    let (status, body) = match answer {
        Answer::Now(status, body) => (status, body),
        Answer::Half(status, body) => {
            more = 1;
            (status, body)
        }
        Answer::After(notice, status, body) => {
            notice.notified().await;
            (status, body)
        }
        Answer::Never => {
            // Until the other gives up.
            let _ = stream.read(&mut [0]).await;
            return;
        }
    };
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let head = format!(
        "HTTP/1.1 {status} as said\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len() + more
    );
    let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
    if more > 0 {
        let _ = stream.read(&mut [0]).await;
    }
}

/// One request; without its query, but for the name of what is to be created.
async fn read(stream: &mut UnixStream) -> Option<Asked> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        (stream.read_buf(&mut bytes).await.ok()? > 0).then_some(())?;
    };
    let head = String::from_utf8(bytes[..end].to_vec()).ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length").then(|| value.parse().ok())?
    });
    while bytes.len() < end + length.unwrap_or(0) {
        (stream.read_buf(&mut bytes).await.ok()? > 0).then_some(())?;
    }
    let mut words = head.split_whitespace();
    let (method, target) = (words.next()?, words.next()?);
    let path = target.split('?').next()?;
    let path = match path.strip_prefix("/v1.").and_then(|rest| rest.split_once('/')) {
        Some((_, rest)) => format!("/{rest}"),
        None => path.to_owned(),
    };
    let mut body = serde_json::from_slice(&bytes[end..]).unwrap_or_default();
    if let (Value::Object(body), Some((_, name))) = (&mut body, target.split_once("name=")) {
        body.insert("name".into(), name.split('&').next().into());
    }
    Some(Asked { what: format!("{method} {path}"), body })
}

impl Order {
    /// For a call of this namespace's, by the defaults.
    pub(super) fn of(namespace: &str) -> Self {
        let template = Arc::new(crate::testing::template());
        let limits = &template.limits;
        let (memory, cpus) = (limits.memory, limits.cpus);
        Self {
            launch: Launch {
                run: RunId::random().unwrap(),
                policy_set: Digest::of(b"policies"),
                template: template.id.clone(),
                mode: Mode::Container,
                namespace: namespace.to_owned(),
                timeout: None,
                memory: None,
                cpus: None,
                executable_size: 0,
                interpreter: None,
                argc: 1,
                envc: 0,
            },
            run: None,
            checked: Checked { memory, cpus, timeout: None, call_len: 0 },
            template,
            filter: "{}".into(),
        }
    }
}

/// Waits until it is so.
pub(super) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "not so in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
