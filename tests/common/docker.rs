//! The Docker Engine that containers are made by, and what it tells of them.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, mpsc},
    thread,
    time::Duration,
};

use serde_json::Value;

use super::{host::Process, note_skip, patience, rootless, say_skip, token, wait_until};

/// The Docker that tests are given; ends the test early where there is none.
macro_rules! needs_docker {
    () => {
        match $crate::common::docker::given() {
            Some(docker) => docker,
            None => return,
        }
    };
}
pub(crate) use needs_docker;

const VARIABLE: &str = "DISPATCHER_TEST_DOCKER";

/// For [`needs_docker!`]. Says why where there is none, and fails where one is due.
pub fn given() -> Option<Docker> {
    match env::var(VARIABLE) {
        _ if rootless() => say_skip("only root can look into a container"),
        Ok(word) if word == "none" => say_skip("no Docker can be had here"),
        Ok(socket) if !socket.is_empty() => return Some(Docker { socket: socket.into() }),
        _ => note_skip("no Docker Engine; scripts/test starts one"),
    }
    None
}

/// [`given`], for those who can do without.
pub fn socket() -> Option<PathBuf> {
    env::var_os(VARIABLE).filter(|word| !word.is_empty() && word != "none").map(PathBuf::from)
}

/// A Docker Engine, by its socket.
#[derive(Clone, Debug)]
pub struct Docker {
    pub socket: PathBuf,
}

impl Docker {
    /// Docker's own client.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("--host").arg(format!("unix://{}", self.socket.display())).args(args);
        command.stdin(Stdio::null());
        command
    }

    /// What it answers.
    #[track_caller]
    pub fn ask(&self, args: &[&str]) -> String {
        let output = self.command(args).output().expect("docker, the client, is installed");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker {args:?}: {error}");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// The ids of containers, running or not, that have all these labels.
    #[track_caller]
    pub fn labelled(&self, labels: &[&str]) -> Vec<String> {
        let filters: Vec<_> = labels.iter().map(|label| format!("label={label}")).collect();
        let mut args = vec!["ps", "--all", "--quiet", "--no-trunc"];
        args.extend(filters.iter().flat_map(|filter| ["--filter", filter.as_str()]));
        self.ask(&args).lines().map(str::to_owned).collect()
    }

    /// The ids of the containers that this process made.
    #[track_caller]
    pub fn owned_by(&self, maker: &Process) -> Vec<String> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let namespace = fs::metadata("/proc/self/ns/pid").unwrap().ino();
        let (boot, pid, started) = (boot.trim(), maker.pid, maker.started);
        self.labelled(&[&format!("dispatcher.owner={boot}/{namespace}/{pid}/{started}")])
    }

    /// All about a container; null where there is none any more, as of other tests' that
    /// were just listed.
    #[track_caller]
    pub fn inspect(&self, container: &str) -> Value {
        let args = ["inspect", "--type", "container", container];
        let output = self.command(&args).output().expect("docker, the client, is installed");
        let error = String::from_utf8_lossy(&output.stderr);
        if error.contains("No such container") {
            return Value::Null;
        }
        assert!(output.status.success(), "docker {args:?}: {error}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()[0].take()
    }

    /// Makes an image of files, `(path, content)`, and of changes as in a Dockerfile. A path
    /// that ends with a slash is a directory's; its content is its mode, if not 1777.
    #[track_caller]
    pub fn image(&self, files: &[(&str, &str)], changes: &[&str]) -> Image {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            let (kind, mode, content) = match (path.ends_with('/'), *content) {
                (true, "") => (tar::EntryType::Directory, 0o1777, ""),
                (true, mode) => {
                    (tar::EntryType::Directory, u32::from_str_radix(mode, 8).unwrap(), "")
                }
                (false, content) => (tar::EntryType::Regular, 0o644, content),
            };
            header.set_mode(mode);
            header.set_entry_type(kind);
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, path, content.as_bytes()).unwrap();
        }
        let name = format!("dispatcher-test/{}:1", token());
        let mut args = vec!["import"];
        args.extend(changes.iter().flat_map(|change| ["--change", change]));
        args.extend(["-", &name]);
        let mut child = self.command(&args).stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let child = child.as_mut().unwrap();
        child.stdin.take().unwrap().write_all(&archive.into_inner().unwrap()).unwrap();
        assert!(child.wait().unwrap().success(), "docker {args:?}");
        Image { docker: self.clone(), name }
    }
}

/// An image of a test; it goes when dropped.
pub struct Image {
    docker: Docker,
    pub name: String,
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = self.docker.command(&["rmi", "--force", &self.name]).output();
    }
}

/// A Docker of a test's own, which can be stopped and started again, by `scripts/lib.sh`.
/// It is stopped when dropped, and also when the test dies.
pub struct OwnDocker {
    pub docker: Docker,
    shell: Child,
    orders: Option<ChildStdin>,
    answers: Mutex<mpsc::Receiver<String>>,
    _directory: tempfile::TempDir,
}

/// Does as it is told by lines, until there are no more.
const KEEPER: &str = r#"
    . "$1"; directory=$2; running=; shift 2
    stop() { [ -z "$running" ] || { stop_docker; running=; }; }
    while read -r order; do
      case $order in
        start) start_docker "$directory" "$@" && running=yes && echo started || echo failed ;;
        stop) stop && echo stopped ;;
        kill) kill -KILL "$dockerd"; wait "$dockerd"; echo killed ;;
      esac
    done
    stop
"#;

impl OwnDocker {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// With these further arguments of `dockerd`.
    pub fn start_with(arguments: &[String]) -> Self {
        let directory = tempfile::Builder::new().prefix("dispatcher-docker-").tempdir().unwrap();
        let own = directory.path().join(directory.path().file_name().unwrap());
        let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/lib.sh");
        let mut shell = Command::new("bash")
            .args(["-c", KEEPER, "docker"])
            .args([&library, &own])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (lines, answers) = mpsc::channel();
        let stdout = BufReader::new(shell.stdout.take().unwrap());
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = lines.send(line);
            }
        });
        let mut started = Self {
            docker: Docker { socket: own.join("docker.sock") },
            orders: shell.stdin.take(),
            shell,
            answers: Mutex::new(answers),
            _directory: directory,
        };
        started.resume();
        started
    }

    /// Stops it; its socket is gone then.
    #[track_caller]
    pub fn stop(&mut self) {
        self.order("stop", "stopped");
    }

    /// Kills it; its containers are left to themselves.
    #[track_caller]
    pub fn kill(&mut self) {
        let file = self.docker.socket.with_file_name("run/containerd/containerd.pid");
        let pid = fs::read_to_string(file).unwrap().trim().parse().unwrap();
        let containerd = Process::read(pid).expect("containerd runs");
        self.order("kill", "killed");
        // It dies with its parent. As long as there is a process of its number, be it one that
        // nobody has reaped, Docker takes it for running and waits for its answer.
        wait_until("containerd's end", Duration::from_secs(20), || containerd.gone());
    }

    /// Starts it again.
    #[track_caller]
    pub fn resume(&mut self) {
        self.order("start", "started");
    }

    #[track_caller]
    fn order(&mut self, order: &str, expected: &str) {
        writeln!(self.orders.as_mut().unwrap(), "{order}").unwrap();
        let answer =
            self.answers.lock().unwrap().recv_timeout(patience(Duration::from_secs(150))).unwrap();
        assert_eq!(answer, expected, "Docker's {order}");
    }
}

impl Drop for OwnDocker {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.shell.wait();
    }
}
