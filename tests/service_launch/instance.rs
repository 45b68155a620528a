//! Services started by a launcher of the test's, and talked with.

// Each test file uses its own part of this.
#![allow(dead_code)]

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt as _, net::UnixStream},
    },
    path::Path,
    time::Duration,
};

use dispatcher::{
    jail::{
        message::{End, FromLauncher, FromServer, Launch, ServiceSocket, Sight, StopCause},
        plan::{Control, HostUser, Mode, Template, TemplateId},
    },
    names::RunId,
};

use crate::{
    common::{self, Facts, programs, rootless},
    driver::{Io, Launcher, SET, send},
};

pub const LIMIT: Duration = Duration::from_secs(20);
pub const MODES: [Mode; 2] = [Mode::Jail, Mode::Direct];
pub const PATH: &str = "PATH=/usr/bin:/bin";

pub fn template() -> Template {
    // Rootless, the operator's own user is the only one there is.
    let (uid, gid) = match rootless() {
        true => (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()),
        false => (65534, 65534),
    };
    Template {
        modes: MODES.to_vec(),
        best_effort: vec![Control::Groups],
        user: Some(HostUser { name: "somebody".into(), uid, gid }),
        environment_allow: vec!["LISTEN_FDS".into()],
        listens: true,
        ..common::template::template()
    }
}

/// A launcher of services, and where it makes what it makes on the host.
pub struct Services {
    pub launcher: Launcher,
    pub directory: tempfile::TempDir,
}

/// One that runs.
pub struct Instance<'a> {
    pub launcher: &'a Launcher,
    pub run: RunId,
    pub facts: Facts,
    pub stdout: BufReader<File>,
    _stderr: OwnedFd,
}

pub fn launch(mode: Mode, envc: u32) -> Launch {
    Launch {
        run: RunId::random().unwrap(),
        policy_set: SET,
        template: TemplateId { policy: "test".into(), variant: 0 },
        mode,
        namespace: "test".into(),
        timeout: None,
        memory: None,
        cpus: None,
        executable_size: programs::bytes("serve").len() as u64,
        interpreter: None,
        argc: 1,
        envc,
    }
}

impl Services {
    pub fn start() -> Self {
        Self::start_with(template())
    }

    pub fn start_with(template: Template) -> Self {
        Self::start_prepared(template, &[], || Ok(()))
    }

    /// `prepare` runs in the process before it becomes the launcher: only system calls.
    pub fn start_prepared(
        template: Template,
        variables: &[(&str, &str)],
        prepare: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Direct mode's user passes through.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let launcher = Launcher::start_with(template, variables, directory.path(), prepare);
        Self { launcher, directory }
    }

    pub fn instance(&self, mode: Mode) -> Instance<'_> {
        instance(&self.launcher, mode)
    }

    /// What is there of all launchers.
    pub fn left(&self) -> Vec<String> {
        below(self.directory.path())
    }
}

/// Everything below a directory, by its path from there.
pub fn below(directory: &Path) -> Vec<String> {
    let mut found = vec![];
    let mut pending = vec![directory.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            found.push(entry.path().strip_prefix(directory).unwrap().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                pending.push(entry.path());
            }
        }
    }
    found
}

pub fn instance(launcher: &Launcher, mode: Mode) -> Instance<'_> {
    let launch = launch(mode, 1);
    let mut io = Io::new();
    launcher.launch(&launch, &["serve", PATH], &programs::bytes("serve"), &mut io);
    let mut stdout = BufReader::new(File::from(io.stdout.0));
    let mut text = String::new();
    while !text.ends_with("ready=1\n") {
        if stdout.read_line(&mut text).unwrap() == 0 {
            panic!("it said {text:?}, then {:?}", launcher.next());
        }
    }
    match launcher.next() {
        FromLauncher::Started { run, .. } => assert_eq!(run, launch.run),
        other => panic!("{other:?}"),
    }
    let facts = Facts::parse(&text);
    Instance { launcher, run: launch.run, facts, stdout, _stderr: io.stderr.0 }
}

pub fn connect(launcher: &Launcher, run: RunId, to: ServiceSocket) -> Result<UnixStream, i32> {
    send(launcher.server.as_ref().unwrap(), &FromServer::Connect { run, to }, &[]);
    let (answer, mut fds) = launcher.next_with();
    let FromLauncher::Connected { run: of, to: at, result } = answer else { panic!("{answer:?}") };
    assert_eq!((of, at, fds.len()), (run, to, usize::from(result.is_ok())));
    result.map(|()| {
        let socket = fds.pop().unwrap();
        let flags = rustix::fs::fcntl_getfl(&socket).unwrap();
        assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
        rustix::io::ioctl_fionbio(&socket, false).unwrap();
        let stream = UnixStream::from(socket);
        stream.set_read_timeout(Some(common::patience(LIMIT))).unwrap();
        stream
    })
}

pub fn look(launcher: &Launcher, run: RunId) -> Option<Sight> {
    send(launcher.server.as_ref().unwrap(), &FromServer::Look { run }, &[]);
    match launcher.next() {
        FromLauncher::Seen { run: of, sight } => {
            assert_eq!(of, run);
            sight.map(|sight| *sight)
        }
        other => panic!("{other:?}"),
    }
}

impl Instance<'_> {
    pub fn connect(&self, to: ServiceSocket) -> Result<UnixStream, i32> {
        connect(self.launcher, self.run, to)
    }

    /// What it answers to a line, at one of its sockets.
    pub fn ask(&self, to: ServiceSocket, line: &str) -> String {
        let mut stream = self.connect(to).unwrap();
        writeln!(stream, "{line}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    /// Has it done at its inherited socket.
    pub fn has(&self, line: &str) {
        assert_eq!(self.ask(ServiceSocket::Inherited, line), "inherited ok", "{line}");
    }

    pub fn look(&self) -> Sight {
        look(self.launcher, self.run).unwrap()
    }

    pub fn used(&self) -> Duration {
        let sight = self.look();
        sight.user + sight.system
    }

    pub fn freeze(&self, frozen: bool) {
        let freeze = FromServer::Freeze { run: self.run, frozen };
        send(self.launcher.server.as_ref().unwrap(), &freeze, &[]);
    }

    pub fn stop(self) -> End {
        let stop = FromServer::Stop { run: self.run, cause: StopCause::Cancelled };
        send(self.launcher.server.as_ref().unwrap(), &stop, &[]);
        self.ended()
    }

    pub fn ended(self) -> End {
        match self.launcher.next() {
            FromLauncher::Ended { run, end } => {
                assert_eq!(run, self.run);
                *end
            }
            other => panic!("{other:?}"),
        }
    }

    /// Waits until nobody has its output any more: nothing of it runs.
    pub fn gone(mut stdout: BufReader<File>) {
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
    }
}
