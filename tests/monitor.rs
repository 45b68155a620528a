//! The monitor with a server and a launcher that misbehave on demand.
//!
//! The monitor starts its own executable under other names: this test program
//! is that executable, real as the monitor and the compiler, false as the other
//! two. Hence it has a `main` of its own. What they are to do is said by
//! `FAKE_SERVER` and `FAKE_LAUNCHER`; they tell on stderr what they were given.

use std::{
    env,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    os::{
        fd::OwnedFd,
        unix::{
            net::UnixDatagram,
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    path::Path,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use dispatcher::{
    container::message::FromMonitor as ToContainers,
    jail::message::FromMonitor as ToLauncher,
    jail::plan::TemplateSet,
    policy::PolicySet,
    server::message::{FromMonitor as ToServer, FromServer},
    sys,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Longer than anything here takes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

const TESTS: &[(&str, fn())] = &[
    ("announces_then_drains", announces_then_drains),
    ("each_gets_its_own_share", each_gets_its_own_share),
    ("the_dead_are_replaced_on_the_same_sockets", the_dead_are_replaced_on_the_same_sockets),
    ("the_parted_are_joined_again", the_parted_are_joined_again),
    ("policies_are_replaced_whole_or_not_at_all", policies_are_replaced_whole_or_not_at_all),
    (
        "dispatch_docker_is_there_while_a_policy_wants_it",
        dispatch_docker_is_there_while_a_policy_wants_it,
    ),
    ("a_second_signal_does_not_wait", a_second_signal_does_not_wait),
    ("a_server_that_does_not_drain_is_ended", a_server_that_does_not_drain_is_ended),
    ("a_server_that_talks_nonsense_is_replaced", a_server_that_talks_nonsense_is_replaced),
    ("starting_in_vain_is_given_up", starting_in_vain_is_given_up),
    ("its_own_death_takes_all_along", its_own_death_takes_all_along),
    ("an_inherited_ignored_sigint_is_obeyed", an_inherited_ignored_sigint_is_obeyed),
    ("a_name_in_use_is_told_and_nothing_started", a_name_in_use_is_told_and_nothing_started),
];

fn main() -> ExitCode {
    let name = env::args().next().unwrap_or_default();
    match name.as_str() {
        "dispatch-serve" => fake_server(),
        "dispatch-launch" => fake_launcher(),
        "dispatch-docker" => fake_containers(),
        "dispatch-compile" | "dispatcher" => return dispatcher::cli::main(),
        _ => run_tests(),
    }
    ExitCode::SUCCESS
}

/// As the usual harness does: words are filters, `--list` lists.
fn run_tests() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let list = arguments.iter().any(|argument| argument == "--list");
    let filters: Vec<_> = arguments.iter().filter(|word| !word.starts_with('-')).collect();
    for (name, test) in TESTS {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        if list {
            println!("{name}: test");
        } else {
            test();
            println!("test {name} ... ok");
        }
    }
}

// The fakes.

/// In one write: two fakes share this pipe, and `eprintln!` writes in pieces.
fn tell(text: &str) {
    io::stderr().write_all(format!("{text}\n").as_bytes()).unwrap();
}

fn mode(variable: &str) -> String {
    env::var(variable).unwrap_or_default()
}

/// The next message to a fake; ends it with the monitor.
fn next_message(socket: &OwnedFd, buffer: &mut [u8]) -> (usize, Vec<OwnedFd>) {
    sys::receive_packet(socket, buffer).unwrap().unwrap_or_else(|| sys::exit_now(0))
}

fn monitor_socket() -> OwnedFd {
    sys::take_inherited(3).unwrap()
}

/// A process's own descriptors: 0, 1, 2 and the given number of others.
fn descriptors() -> usize {
    // One of those counted is the directory being read.
    fs::read_dir("/proc/self/fd").unwrap().count() - 1
}

fn content(fd: OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::from(fd).read_to_end(&mut bytes).unwrap();
    bytes
}

fn fake_server() {
    tell(&format!("fake-serve starts with {} descriptors", descriptors()));
    let socket = monitor_socket();
    let mut buffer = vec![0; 64 << 10];
    let mut held = Vec::new();
    loop {
        let (length, mut fds) = next_message(&socket, &mut buffer);
        match postcard::from_bytes(&buffer[..length]).unwrap() {
            ToServer::Configure { listeners, .. } => {
                assert_eq!(fds.len(), listeners.len());
                tell(&format!("fake-serve listens on {}", listeners.len()));
                held.extend(fds);
            }
            ToServer::Policies => {
                let set: PolicySet = postcard::from_bytes(&content(fds.remove(0))).unwrap();
                let names: Vec<_> = set.policies.keys().cloned().collect();
                tell(&format!("fake-serve has policies {} {}", names.join(","), set.digest));
            }
            ToServer::Launcher => {
                tell("fake-serve has a launcher");
                held.append(&mut fds);
                if mode("FAKE_SERVER") == "parted" && held.len() == 2 {
                    let bytes = postcard::to_stdvec(&FromServer::LauncherLost).unwrap();
                    sys::send_packet(&socket, &bytes, &[]).unwrap();
                    continue; // until there is another
                }
                if mode("FAKE_SERVER") == "waiting" {
                    continue; // as the real one does until the launcher is ready
                }
                let bytes = postcard::to_stdvec(&FromServer::Ready).unwrap();
                let said: &[u8] =
                    if mode("FAKE_SERVER") == "babble" { b"\xff\xff" } else { &bytes };
                sys::send_packet(&socket, said, &[]).unwrap();
            }
            ToServer::Containers => {
                tell("fake-serve has dispatch-docker");
                held.append(&mut fds);
            }
            ToServer::Drain if mode("FAKE_SERVER") == "deaf" => tell("fake-serve does not listen"),
            ToServer::Drain => {
                tell("fake-serve drains");
                return;
            }
        }
    }
}

fn fake_launcher() {
    tell(&format!("fake-launch starts with {} descriptors", descriptors()));
    if mode("FAKE_LAUNCHER") == "die" {
        sys::exit_now(3);
    }
    let socket = monitor_socket();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Some((length, mut fds)) = sys::receive_packet(&socket, &mut buffer).unwrap() else {
            tell("fake-launch cleans up");
            return;
        };
        match postcard::from_bytes(&buffer[..length]).unwrap() {
            ToLauncher::Configure(config) => {
                tell(&format!("fake-launch is instance {}", config.instance));
            }
            ToLauncher::Policies => {
                let set: TemplateSet = postcard::from_bytes(&content(fds.remove(0))).unwrap();
                tell(&format!("fake-launch has templates {}", set.digest));
            }
            ToLauncher::Server => tell("fake-launch has a server"),
        }
    }
}

fn fake_containers() {
    let socket = monitor_socket();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Some((length, mut fds)) = sys::receive_packet(&socket, &mut buffer).unwrap() else {
            tell("fake-docker cleans up");
            return;
        };
        match postcard::from_bytes(&buffer[..length]).unwrap() {
            ToContainers::Configure(config) => {
                tell(&format!("fake-docker is told of {}", config.socket.display()));
            }
            ToContainers::Policies => {
                let set: TemplateSet = postcard::from_bytes(&content(fds.remove(0))).unwrap();
                tell(&format!("fake-docker has templates {}", set.digest));
                if !set.containers {
                    tell("fake-docker isn't wanted any more");
                    return;
                }
            }
            ToContainers::Server => tell("fake-docker has a server"),
        }
    }
}

// The monitor, from outside.

struct Monitor {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    told: Vec<String>,
    directory: tempfile::TempDir,
}

impl Monitor {
    fn start(environment: &[(&str, &str)]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), &["--listen", "127.0.0.1:0"], environment)
    }

    fn start_in(
        directory: tempfile::TempDir,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let command = Self::command(directory.path(), arguments, environment);
        Self::spawn(command, directory)
    }

    fn command(base: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Command {
        fs::create_dir_all(base.join("policies")).unwrap();
        fs::write(base.join("policies/a.toml"), "").unwrap();
        let mut command = Command::new(env::current_exe().unwrap());
        command.arg0("dispatcher").args(["serve", "--policies"]).arg(base.join("policies"));
        command.arg("--state").arg(base.join("state")).args(arguments);
        command.env_clear().envs(environment.iter().copied());
        command
    }

    fn spawn(mut command: Command, directory: tempfile::TempDir) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = lines(child.stdout.take().unwrap());
        let stderr = lines(child.stderr.take().unwrap());
        Self { child, stdout, stderr, told: Vec::new(), directory }
    }

    fn ready(mut self) -> (Self, String) {
        let line = self.stdout.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            self.wait_for("nothing more");
            unreachable!()
        });
        let address = line.strip_prefix("listening on ").unwrap().to_owned();
        (self, address)
    }

    /// Reads on until a line has these words; gives the line.
    #[track_caller]
    fn wait_for(&mut self, words: &str) -> String {
        self.wait_for_all(&[words]).remove(0)
    }

    /// Reads on until each of these was said, in whatever order: several
    /// processes write. Gives the lines.
    #[track_caller]
    fn wait_for_all(&mut self, wanted: &[&str]) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut found = vec![None; wanted.len()];
        while let Some(missing) = found.iter().position(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.stderr.recv_timeout(left) else {
                panic!("no {:?} in:\n{}", wanted[missing], self.told.join("\n"));
            };
            self.told.push(line.clone());
            let fits = |(at, words): (usize, &&str)| found[at].is_none() && line.contains(*words);
            if let Some(at) = wanted.iter().enumerate().position(fits) {
                found[at] = Some(line);
            }
        }
        found.into_iter().flatten().collect()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// The child of this name, once there is one.
    fn child(&self, name: &str) -> Pid {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(pid) = self.find_child(name) {
                return pid;
            }
            thread::yield_now();
        }
        panic!("no process {name}");
    }

    fn find_child(&self, name: &str) -> Option<Pid> {
        let number = self.child.id();
        let text = fs::read_to_string(format!("/proc/{number}/task/{number}/children"));
        text.unwrap_or_default().split_whitespace().find_map(|pid| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let found = line.split('\0').next() == Some(name);
            found.then(|| Pid::from_raw(pid.parse().unwrap()))
        })
    }

    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.told.join("\n"));
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        assert_eq!(self.wait().code(), Some(0), "{}", self.told.join("\n"));
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

fn lines(pipe: impl io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

fn alive(pid: Pid) -> bool {
    // A zombie has no command line.
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}

// The tests.

fn announces_then_drains() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, notify) = (directory.path().join("socket"), directory.path().join("notify"));
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let said = || {
        let mut buffer = [0; 256];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let unix = format!("unix:{}", socket.display());
    let (mut monitor, address) = Monitor::start_in(
        directory,
        &["--listen", "127.0.0.1:0", "--listen", &unix],
        &[("NOTIFY_SOCKET", notify.to_str().unwrap())],
    )
    .ready();
    assert!(address.starts_with("127.0.0.1:") && !address.ends_with(":0"), "{address}");
    assert_eq!(monitor.stdout.recv_timeout(PATIENCE).unwrap(), format!("listening on {unix}"));
    assert_eq!(said(), "READY=1\n");
    TcpStream::connect(&address).unwrap();
    monitor.signal(Signal::SIGTERM);
    assert_eq!(said(), "STOPPING=1\n");
    monitor.wait_for_all(&["fake-serve drains", "fake-launch cleans up"]);
    assert_eq!(monitor.wait().code(), Some(0));
    assert!(!socket.exists(), "the socket's file goes");
    assert!(monitor.stdout.recv().is_err(), "nothing else on stdout");
}

fn each_gets_its_own_share() {
    // A descriptor that was meant for nobody here.
    let stray = File::open("/dev/null").unwrap();
    let stray = rustix::io::fcntl_dupfd_cloexec(&stray, 50).unwrap();
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).unwrap();
    let (mut monitor, _) = Monitor::start(&[]).ready();
    drop(stray);
    // 0, 1, 2 and the monitor's socket.
    monitor.wait_for_all(&[
        "fake-serve starts with 4 descriptors",
        "fake-launch starts with 4 descriptors",
    ]);
    for name in ["dispatch-serve", "dispatch-launch"] {
        let pid = monitor.child(name);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let session = nix::unistd::getsid(Some(pid)).unwrap();
        assert_eq!(session, pid, "{name} hears no signal of a terminal");
        if name == "dispatch-serve" {
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(field(set).trim(), "0000000000000000", "{set}");
            }
            assert_eq!(field("NoNewPrivs:").trim(), "1");
            if nix::unistd::geteuid().is_root() {
                assert_eq!(field("Uid:").trim(), ["2065535"; 4].join("\t"));
                assert_eq!(field("Groups:").trim(), "");
            }
        }
    }
    monitor.stop();
}

fn the_dead_are_replaced_on_the_same_sockets() {
    let (mut monitor, address) = Monitor::start(&[]).ready();
    let instance = monitor.wait_for("is instance");
    for name in ["dispatch-serve", "dispatch-launch", "dispatch-serve", "dispatch-launch"] {
        kill(monitor.child(name), Signal::SIGKILL).unwrap();
        monitor.wait_for("was killed by signal 9");
        TcpStream::connect(&address).expect("the listening socket stays");
        let mut wanted = vec!["fake-serve has a launcher", "fake-launch has a server"];
        if name == "dispatch-launch" {
            // It finds the cgroups of the one before it.
            wanted.push(&instance);
        }
        monitor.wait_for_all(&wanted);
    }
    monitor.stop();
}

fn the_parted_are_joined_again() {
    let (mut monitor, _) = Monitor::start(&[("FAKE_SERVER", "parted")]).ready();
    // Each gets a first socket, and a second one after the complaint.
    let (serve, launch) = ("fake-serve has a launcher", "fake-launch has a server");
    monitor.wait_for_all(&["joining them again", serve, serve, launch, launch]);
    monitor.stop();
}

fn policies_are_replaced_whole_or_not_at_all() {
    let (mut monitor, _) = Monitor::start(&[]).ready();
    let first = monitor.wait_for("fake-launch has templates ");
    let policies = monitor.directory.path().join("policies");
    fs::write(policies.join("b.toml"), "[limits]\nmemori = 1\n").unwrap();
    monitor.signal(Signal::SIGHUP);
    monitor.wait_for("b.toml:2:1");
    monitor.wait_for("the earlier ones stay in force");
    // A successor gets what is in force, not what is there.
    kill(monitor.child("dispatch-serve"), Signal::SIGKILL).unwrap();
    monitor.wait_for("fake-serve has policies a ");

    fs::write(policies.join("b.toml"), "[limits]\nmemory = \"64MiB\"\n").unwrap();
    monitor.signal(Signal::SIGHUP);
    let told =
        monitor.wait_for_all(&["fake-launch has templates ", "fake-serve has policies a,b "]);
    let digest = |line: &str| line.rsplit(' ').next().unwrap().to_owned();
    assert_eq!(digest(&told[0]), digest(&told[1]), "both have the same set");
    assert_ne!(digest(&told[0]), digest(&first));
    monitor.stop();
}

fn dispatch_docker_is_there_while_a_policy_wants_it() {
    let (mut monitor, _) = Monitor::start(&[]).ready();
    assert!(monitor.find_child("dispatch-docker").is_none(), "nobody needs Docker's socket");
    let policy = monitor.directory.path().join("policies/boxes.toml");
    fs::write(&policy, "mode = \"container\"\n").unwrap();
    monitor.signal(Signal::SIGHUP);
    let joined = [
        "fake-docker is told of /var/run/docker.sock",
        "fake-docker has templates ",
        "fake-docker has a server",
        "fake-serve has dispatch-docker",
    ];
    monitor.wait_for_all(&joined);
    kill(monitor.child("dispatch-docker"), Signal::SIGKILL).unwrap();
    monitor.wait_for_all(&joined);
    kill(monitor.child("dispatch-serve"), Signal::SIGKILL).unwrap();
    monitor.wait_for_all(&["fake-serve has a launcher", "fake-serve has dispatch-docker"]);
    fs::remove_file(policy).unwrap();
    monitor.signal(Signal::SIGHUP);
    let parting = ["fake-docker isn't wanted any more", "dispatch-docker exited with 0"];
    monitor.wait_for_all(&parting);
    monitor.stop();
}

fn a_second_signal_does_not_wait() {
    let (mut monitor, _) = Monitor::start(&[("FAKE_SERVER", "deaf")]).ready();
    monitor.signal(Signal::SIGTERM);
    monitor.wait_for("fake-serve does not listen");
    monitor.signal(Signal::SIGINT);
    monitor.wait_for("fake-launch cleans up");
    assert_eq!(monitor.wait().code(), Some(0));
}

fn a_server_that_does_not_drain_is_ended() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--listen", "127.0.0.1:0", "--drain-timeout", "1ms"];
    let (mut monitor, _) =
        Monitor::start_in(directory, &arguments, &[("FAKE_SERVER", "deaf")]).ready();
    monitor.signal(Signal::SIGTERM);
    monitor.wait_for_all(&["dispatch-serve was killed by signal 9", "fake-launch cleans up"]);
    assert_eq!(monitor.wait().code(), Some(0));
}

fn a_server_that_talks_nonsense_is_replaced() {
    let mut monitor = Monitor::start(&[("FAKE_SERVER", "babble")]);
    monitor.wait_for("said what has no meaning");
    monitor.wait_for("dispatch-serve was killed by signal 9");
    // It never got ready, so it is given up in the end.
    assert_eq!(monitor.wait().code(), Some(1));
    assert!(monitor.stdout.recv().is_err(), "nothing was announced");
}

fn starting_in_vain_is_given_up() {
    let mut monitor = Monitor::start(&[("FAKE_LAUNCHER", "die"), ("FAKE_SERVER", "waiting")]);
    for _ in 0..5 {
        monitor.wait_for("dispatch-launch exited with 3");
    }
    assert_eq!(monitor.wait().code(), Some(1));
    assert!(monitor.stdout.recv().is_err(), "nothing was announced");
}

fn its_own_death_takes_all_along() {
    let (mut monitor, _) = Monitor::start(&[("FAKE_SERVER", "deaf")]).ready();
    let children = ["dispatch-serve", "dispatch-launch"].map(|name| monitor.child(name));
    monitor.signal(Signal::SIGKILL);
    assert_eq!(monitor.wait().signal(), Some(Signal::SIGKILL as i32));
    let deadline = Instant::now() + Duration::from_secs(1);
    while children.iter().any(|child| alive(*child)) {
        assert!(Instant::now() < deadline, "they are still there");
        thread::sleep(Duration::from_millis(5));
    }
}

fn an_inherited_ignored_sigint_is_obeyed() {
    let directory = tempfile::tempdir().unwrap();
    let monitor = Monitor::command(directory.path(), &["--listen", "127.0.0.1:0"], &[]);
    // As a shell starts its background jobs.
    let mut shell = Command::new("bash");
    shell.args(["-c", "trap '' INT HUP; exec -a dispatcher \"$0\" \"$@\""]).env_clear();
    shell.arg(monitor.get_program()).args(monitor.get_args());
    let (mut monitor, _) = Monitor::spawn(shell, directory).ready();
    monitor.signal(Signal::SIGINT);
    monitor.wait_for("fake-serve drains");
    assert_eq!(monitor.wait().code(), Some(0));
}

fn a_name_in_use_is_told_and_nothing_started() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let directory = tempfile::tempdir().unwrap();
    let mut monitor = Monitor::start_in(directory, &["--listen", &address], &[]);
    monitor.wait_for(&format!("can't listen on {address}: somebody listens there already"));
    assert_eq!(monitor.wait().code(), Some(1));
    assert!(!monitor.told.iter().any(|line| line.contains("fake-")), "{:?}", monitor.told);
}
