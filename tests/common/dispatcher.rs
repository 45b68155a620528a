//! A real `dispatcher serve`, started for the tests and held to leaving nothing behind.

use std::{
    collections::{BTreeSet, HashSet},
    env,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, Once, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tonic::transport::Channel;

use super::{
    Call, Reply, client, docker, host, host::Process, patience, rootless, token, wait_for,
    wait_until,
};

/// The binary under test.
pub fn binary() -> PathBuf {
    env::var_os("DISPATCHER_BIN")
        .map_or_else(|| env!("CARGO_BIN_EXE_dispatcher").into(), PathBuf::from)
}

/// The binary under test with nothing of this environment but what it needs.
pub fn command() -> Command {
    let mut command = Command::new(binary());
    command.env_clear().stdin(Stdio::null());
    for name in ["PATH", "HOME", "USER", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"] {
        if let Some(value) = env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// The binary under test where nobody else is: `run` and `doctor` divide the
/// cgroup they are started in, as `systemd-run --user --scope -p Delegate=yes`
/// gives one to an ordinary user. It is removed when the second is dropped.
pub fn alone() -> (Command, OwnCgroup) {
    let parent = env::var("DISPATCHER_TEST_CGROUP_PARENT").ok().filter(|_| rootless());
    let Some(parent) = parent else { return (command(), OwnCgroup(None)) };
    let own = Path::new("/sys/fs/cgroup").join(parent.trim_start_matches('/')).join(token());
    fs::create_dir(&own).unwrap();
    let plain = command();
    let mut command = Command::new("sh");
    command.args(["-c", "echo 0 >\"$0\" && exec \"$@\""]).arg(own.join("cgroup.procs"));
    command.arg(plain.get_program()).env_clear().stdin(Stdio::null());
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    (command, OwnCgroup(Some(own)))
}

/// See [`alone`].
pub struct OwnCgroup(Option<PathBuf>);

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        let Some(own) = &self.0 else { return };
        // What was started in it can't remove what it was in itself.
        for child in fs::read_dir(own).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(child.path());
        }
        let removed = fs::remove_dir(own);
        assert!(removed.is_ok() || thread::panicking(), "{own:?} is left over: {removed:?}");
    }
}

/// What every test policy begins with: plain argv and raw output, so that a
/// program's words arrive as they are.
pub fn plain(rest: &str) -> String {
    format!("argv = \"plain\"\noutput = \"bytes\"\n{}{rest}", best_effort())
}

/// [`plain`] for direct mode.
pub fn direct(rest: &str) -> String {
    plain(&format!("mode = \"direct\"\n{rest}{}", own_user()))
}

/// [`plain`] for container mode.
pub fn container(rest: &str) -> String {
    plain(&format!("mode = \"container\"\n{rest}"))
}

/// Whom direct mode is to run programs as, a table for a policy's end: rootless,
/// only the dispatcher's own user can be had; else the default, nobody.
pub fn own_user() -> String {
    if !rootless() {
        return String::new();
    }
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap();
    format!("[identity]\nuser = {:?}\n", user.expect("the tests' user has a name").name)
}

/// Rootless, inherited groups cannot be dropped: tests accept that, users must say so.
pub fn best_effort() -> &'static str {
    if rootless() {
        "best_effort = [\"landlock\", \"memfd_noexec\", \"groups\"]\n"
    } else {
        "best_effort = [\"landlock\", \"memfd_noexec\"]\n"
    }
}

/// How a dispatcher is to be started.
pub struct Settings {
    policies: Vec<(String, String)>,
    files: Vec<(String, String)>,
    server: String,
    policies_table: String,
    tables: String,
    environment: Vec<(String, String)>,
    arguments: Vec<String>,
    unix_socket: bool,
    docker: Option<PathBuf>,
}

impl Settings {
    /// With these policies: name and content.
    pub fn new<N: Into<String>, T: Into<String>>(
        policies: impl IntoIterator<Item = (N, T)>,
    ) -> Self {
        Self {
            policies: policies.into_iter().map(|(n, t)| (n.into(), t.into())).collect(),
            files: vec![],
            server: String::new(),
            policies_table: String::new(),
            tables: String::new(),
            environment: vec![],
            arguments: vec![],
            unix_socket: false,
            docker: docker::socket(),
        }
    }

    /// Docker's socket, where it isn't that which the tests are given.
    pub fn docker(mut self, socket: &Path) -> Self {
        self.docker = Some(socket.to_owned());
        self
    }

    /// A further file of the policy directory, by its path there.
    pub fn file(mut self, path: &str, content: &str) -> Self {
        self.files.push((path.into(), content.into()));
        self
    }

    /// Lines of the server's file, below `[server]`.
    pub fn server(mut self, lines: &str) -> Self {
        self.server = lines.to_owned();
        self
    }

    /// Lines below `[policies]`.
    pub fn reload(mut self, how: &str) -> Self {
        self.policies_table = format!("reload = \"{how}\"\n");
        self
    }

    /// Whole further tables of the server's file.
    pub fn tables(mut self, text: &str) -> Self {
        self.tables = text.to_owned();
        self
    }

    /// A variable of its environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// A further argument of `serve`.
    pub fn arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Also listen on a unix socket.
    pub fn unix_socket(mut self) -> Self {
        self.unix_socket = true;
        self
    }

    /// [`Prepared::start`] in a directory of its own.
    pub fn start(self) -> Dispatcher {
        self.prepare().start()
    }

    /// Writes its files.
    pub fn prepare(self) -> Prepared {
        let directory = self.written();
        Prepared(Arc::new((self, directory)))
    }

    /// A directory with its files.
    pub fn written(&self) -> tempfile::TempDir {
        let directory = tempfile::Builder::new().prefix("dispatcher-test-").tempdir().unwrap();
        let base = directory.path();
        for part in ["policies", "state"] {
            fs::create_dir(base.join(part)).unwrap();
        }
        let policies = self.policies.iter().map(|(name, text)| (format!("{name}.toml"), text));
        let files = self.files.iter().map(|(path, text)| (path.clone(), text));
        for (path, text) in policies.chain(files) {
            let path = base.join("policies").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::write(base.join("dispatcher.toml"), self.server_file(base)).unwrap();
        directory
    }

    fn server_file(&self, base: &Path) -> String {
        let parent = env::var("DISPATCHER_TEST_CGROUP_PARENT")
            .map(|parent| format!("cgroup_parent = {parent:?}\n"))
            .unwrap_or_default();
        let docker = self.docker.clone().unwrap_or_else(|| base.join("no-docker"));
        format!(
            "[server]\nid = \"test-host\"\n{parent}{}\n[policies]\ndir = {:?}\n{}\n[state]\ndir = {:?}\n\
             [docker]\nsocket = {docker:?}\ndirectory = {:?}\n{}",
            self.server,
            base.join("policies"),
            self.policies_table,
            base.join("state"),
            base.join("containers"),
            self.tables
        )
    }
}

/// A dispatcher's directory, in which it can be started, and started again.
#[derive(Clone)]
pub struct Prepared(Arc<(Settings, tempfile::TempDir)>);

impl Prepared {
    /// Starts it and waits until it listens.
    pub fn start(&self) -> Dispatcher {
        host::adopt_orphans();
        let (settings, base) = (&self.0.0, self.0.1.path());
        let mut command = command();
        command.arg("serve").arg("--config").arg(base.join("dispatcher.toml"));
        command.args(["--listen", "127.0.0.1:0"]);
        if settings.unix_socket {
            command.arg("--listen").arg(format!("unix:{}", base.join("socket").display()));
        }
        command.args(&settings.arguments).envs(settings.environment.iter().cloned());
        let log = File::options().create(true).append(true).open(base.join("log")).unwrap();
        command.current_dir(base).stdout(Stdio::piped()).stderr(log);

        let mut child = spawn(command);
        let count = 1 + usize::from(settings.unix_socket);
        let addresses = listening_lines(&mut child, count, base);
        let dispatcher = Dispatcher {
            monitor: Process::read(child.id() as i32).expect("the monitor runs"),
            state: Mutex::new(State {
                // Known beforehand: without root one can't see what the launcher holds.
                cgroups: BTreeSet::from([format!("dispatcher.{}", child.id())]),
                child,
                ended: None,
                seen: HashSet::new(),
            }),
            addresses,
            directory: base.to_owned(),
            channel: OnceLock::new(),
            prepared: Mutex::new(Some(self.clone())),
        };
        // What it has is told apart from others' by looking now.
        dispatcher.descendants();
        dispatcher
    }
}

/// Spawns from a thread that lives as long as the tests: the death signal that
/// ends the dispatcher with them is tied to the spawning thread.
fn spawn(command: Command) -> Child {
    type Order = (Command, mpsc::Sender<std::io::Result<Child>>);
    static KEEPER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                // SAFETY: the closure makes one async-signal-safe system call.
                #[expect(clippy::disallowed_methods, reason = "nothing to be quick for")]
                unsafe {
                    command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
                }
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (reply, answer) = mpsc::channel();
    keeper.lock().unwrap().send((command, reply)).unwrap();
    answer.recv().unwrap().expect("the binary under test starts")
}

fn listening_lines(child: &mut Child, count: usize, base: &Path) -> Vec<String> {
    let (lines, received) = mpsc::channel();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    // Reads on to the end, so that a chatty dispatcher is noticed, not blocked.
    thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            let _ = lines.send(line);
        }
    });
    (0..count)
        .map(|_| {
            let line =
                received.recv_timeout(patience(Duration::from_secs(20))).unwrap_or_else(|_| {
                    let status = end(child);
                    let log = fs::read_to_string(base.join("log")).unwrap_or_default();
                    panic!("the dispatcher does not listen ({status:?}); its log:\n{log}")
                });
            line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}")).to_owned()
        })
        .collect()
}

/// Ends one that failed a test: in order if it still can, else by force.
fn end(child: &mut Child) -> Option<ExitStatus> {
    let pid = Pid::from_raw(child.id() as i32);
    for _ in 0..2 {
        let _ = kill(pid, Signal::SIGTERM);
    }
    for _ in 0..500 {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    child.wait().ok()
}

/// A running dispatcher. Stopping it (at the latest when dropped) asserts that it
/// ends well and that nothing of it is left.
pub struct Dispatcher {
    /// The process as started.
    pub monitor: Process,
    /// Where it listens, as it printed.
    pub addresses: Vec<String>,
    /// Holds `policies/`, `state/`, `dispatcher.toml`, `log` and the unix socket.
    pub directory: PathBuf,
    state: Mutex<State>,
    channel: OnceLock<Channel>,
    prepared: Mutex<Option<Prepared>>,
}

struct State {
    child: Child,
    ended: Option<ExitStatus>,
    /// Every descendant and cgroup that was ever looked at.
    seen: HashSet<Process>,
    cgroups: BTreeSet<String>,
}

impl Dispatcher {
    /// [`Settings::start`] with nothing but policies.
    pub fn start<N: Into<String>, T: Into<String>>(
        policies: impl IntoIterator<Item = (N, T)>,
    ) -> Self {
        Settings::new(policies).start()
    }

    /// The TCP address, `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.addresses[0]
    }

    /// A channel shared by all calls of these tests.
    pub fn channel(&self) -> Channel {
        self.channel.get_or_init(|| client::connect(self.address())).clone()
    }

    /// Sends a call and waits for the reply; its trailers are checked against it.
    #[track_caller]
    pub fn call(&self, call: Call) -> Reply {
        match self.try_call(call) {
            Ok(reply) => reply,
            Err(status) => panic!("gRPC error {status:?}; the log ends:\n{}", self.log_tail()),
        }
    }

    /// [`Dispatcher::call`] where a gRPC error is a possible answer.
    #[track_caller]
    pub fn try_call(&self, call: Call) -> Result<Reply, tonic::Status> {
        client::runtime().block_on(call.send(self.channel()))
    }

    /// Sends a call without waiting for its reply.
    pub fn begin(&self, call: Call) -> Running {
        Running(client::runtime().spawn(call.send(self.channel())))
    }

    /// Runs a test program in a namespace.
    #[track_caller]
    pub fn run(&self, namespace: &str, program: &str, args: &[&str]) -> Reply {
        self.call(Call::new(namespace, program).args(args))
    }

    /// The running process of this name that descends from the monitor.
    #[track_caller]
    pub fn process(&self, name: &str) -> Process {
        wait_for(name, Duration::from_secs(10), || {
            self.descendants().into_iter().find(|process| process.name == name && !process.zombie)
        })
    }

    /// Everything that descends from the monitor now; remembered until the end.
    pub fn descendants(&self) -> Vec<Process> {
        let found = host::descendants(self.monitor.pid);
        let mut state = self.state.lock().unwrap();
        state.cgroups.extend(host::cgroup_names(&found));
        state.seen.extend(found.iter().cloned());
        found
    }

    /// Sends the monitor a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.monitor.pid), signal).unwrap();
    }

    /// Everything it logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.join("log")).unwrap()).into_owned()
    }

    /// The last lines it logged.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Writes a policy; it holds after the next reload.
    pub fn write_policy(&self, name: &str, text: &str) {
        // Whole or not at all, as a careful administrator would.
        let path = self.directory.join(format!("policies/{name}.toml"));
        let unfinished = self.directory.join("policy.new");
        fs::write(&unfinished, text).unwrap();
        fs::rename(unfinished, path).unwrap();
    }

    /// Waits for the monitor's end.
    #[track_caller]
    pub fn wait(&self, limit: Duration) -> ExitStatus {
        wait_for("the monitor's end", limit, || {
            let mut state = self.state.lock().unwrap();
            if state.ended.is_none() {
                state.ended = state.child.try_wait().unwrap();
            }
            state.ended
        })
    }

    /// Stops it in good order and asserts that nothing is left.
    #[track_caller]
    pub fn stop(&self) {
        if self.state.lock().unwrap().ended.is_none() {
            self.descendants();
            self.signal(Signal::SIGTERM);
            let status = self.wait(Duration::from_secs(30));
            assert_eq!(status.code(), Some(0), "after SIGTERM; the log ends:\n{}", self.log_tail());
            self.assert_no_cgroups();
            self.assert_no_containers();
        }
        self.assert_no_processes(Duration::from_secs(5));
        let words = [self.directory.to_str().unwrap()];
        assert_eq!(host::mounts_with(&words), Vec::<String>::new(), "mounts left over");
        // The last to go takes the directory along.
        let prepared = self.prepared.lock().unwrap().take();
        if let Some((_, directory)) = prepared.and_then(|prepared| Arc::into_inner(prepared.0)) {
            directory.close().expect("its directory can be removed");
        }
    }

    /// Asserts that within `limit` no process that ever descended from it runs.
    #[track_caller]
    pub fn assert_no_processes(&self, limit: Duration) {
        let seen = self.state.lock().unwrap().seen.clone();
        wait_until("every process of the dispatcher is gone", limit, || {
            let left: Vec<_> = seen.iter().filter(|process| process.alive()).collect();
            left.is_empty()
        });
    }

    /// The names of its cgroup directories, seen now or earlier.
    pub fn cgroup_names(&self) -> BTreeSet<String> {
        self.descendants();
        self.state.lock().unwrap().cgroups.clone()
    }

    /// Its cgroup directories that are there now.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        host::cgroups_named(&self.cgroup_names())
    }

    /// Asserts that no container is left of any `dispatch-docker` of it, and nothing that
    /// was shown to one.
    #[track_caller]
    pub fn assert_no_containers(&self) {
        let makers = self.state.lock().unwrap().seen.clone().into_iter();
        let mut makers = makers.filter(|process| process.name == "dispatch-docker").peekable();
        if makers.peek().is_none() {
            return;
        }
        let left = host::files_below(&self.directory.join("containers")).unwrap_or_default();
        assert!(left.is_empty(), "files of containers left over: {left:?}");
        let socket = self.prepared.lock().unwrap().as_ref().and_then(|own| own.0.0.docker.clone());
        if let Some(docker) = socket.map(|socket| docker::Docker { socket })
            && docker.socket.exists()
        {
            let left: Vec<_> = makers.flat_map(|maker| docker.owned_by(&maker)).collect();
            assert!(left.is_empty(), "containers left over: {left:?}");
        }
    }

    /// Asserts that no cgroup directory of it is left.
    #[track_caller]
    pub fn assert_no_cgroups(&self) {
        assert_eq!(self.cgroups(), Vec::<PathBuf>::new(), "cgroups left over");
    }
}

/// A call under way.
pub struct Running(pub(super) tokio::task::JoinHandle<Result<Reply, tonic::Status>>);

impl Running {
    /// Waits for its reply or gRPC error.
    pub fn finish(self) -> Result<Reply, tonic::Status> {
        client::runtime().block_on(self.0).expect("the call's task")
    }

    /// Whether the reply is here.
    pub fn is_over(&self) -> bool {
        self.0.is_finished()
    }

    /// Goes away, as a client that lost interest does: the stream is reset.
    pub fn cancel(self) {
        self.0.abort();
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the dispatcher's log ends:\n{}", self.log_tail());
            let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            end(&mut state.child);
        } else {
            self.stop();
        }
    }
}

/// One dispatcher for all tests of a file, started by the first and stopped, with
/// all assertions, when the test process ends.
pub fn shared(
    slot: &'static OnceLock<Dispatcher>,
    start: fn() -> Dispatcher,
) -> &'static Dispatcher {
    static SHARED: Mutex<Vec<&'static OnceLock<Dispatcher>>> = Mutex::new(vec![]);
    static ONCE: Once = Once::new();

    extern "C" fn stop_all() {
        let slots = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let stop = |dispatcher: &Dispatcher| catch_unwind(AssertUnwindSafe(|| dispatcher.stop()));
        if slots.iter().filter_map(|slot| slot.get()).any(|dispatcher| stop(dispatcher).is_err()) {
            // SAFETY: ends the process at once; nothing after it can observe anything.
            unsafe { libc::_exit(101) };
        }
    }

    slot.get_or_init(|| {
        // One that does not start is waited for once, not by every test.
        static TRIED: AtomicBool = AtomicBool::new(false);
        assert!(!TRIED.swap(true, Ordering::Relaxed), "the shared dispatcher did not start");
        SHARED.lock().unwrap().push(slot);
        ONCE.call_once(|| {
            // SAFETY: the handler is a plain function that does not unwind.
            assert_eq!(unsafe { libc::atexit(stop_all) }, 0);
        });
        start()
    })
}
