//! What stands between a dispatcher and Docker, and can be cut through or held up.

use std::{
    io::{self, Read as _, Write as _},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    thread,
};

/// It lives as long as the tests.
pub struct Proxy {
    pub socket: PathBuf,
    connections: Arc<Mutex<Vec<UnixStream>>>,
    held: Arc<Gate>,
    _directory: tempfile::TempDir,
}

/// Whether nothing is passed on for now.
type Gate = (Mutex<bool>, Condvar);

impl Proxy {
    pub fn start(docker: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("proxy.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let connections = Arc::<Mutex<Vec<_>>>::default();
        let held = Arc::<Gate>::default();
        let (open, gate, docker) = (Arc::clone(&connections), Arc::clone(&held), docker.to_owned());
        thread::spawn(move || {
            for ours in listener.incoming() {
                let (ours, theirs) = (ours.unwrap(), UnixStream::connect(&docker).unwrap());
                for (from, to) in [(&ours, &theirs), (&theirs, &ours)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let gate = Arc::clone(&gate);
                    thread::spawn(move || {
                        let _ = pass_on(&mut from, &mut to, &gate);
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
                open.lock().unwrap().extend([ours, theirs]);
            }
        });
        Self { socket, connections, held, _directory: directory }
    }

    /// Passes nothing on, or goes on with it: as a Docker that says nothing for a while.
    pub fn hold(&self, held: bool) {
        *self.held.0.lock().unwrap() = held;
        self.held.1.notify_all();
    }

    /// Ends all connections that there are: as a Docker that dies does, whose containers live.
    pub fn cut(&self) {
        for connection in self.connections.lock().unwrap().drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn pass_on(from: &mut UnixStream, to: &mut UnixStream, gate: &Gate) -> io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut piece)?;
        drop(gate.1.wait_while(gate.0.lock().unwrap(), |held| *held).unwrap());
        if length == 0 {
            return Ok(());
        }
        to.write_all(&piece[..length])?;
    }
}
