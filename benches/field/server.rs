//! The real `dispatcher serve`, on a port of loopback and in a directory of its own.

use std::{
    env,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Outcome, args::Args, processes::jails, rest};

/// How long it may take to end: its own time to drain, and some more.
const END_LIMIT: Duration = Duration::from_secs(60);

/// How long jails may take to go when the policy has changed.
const RENEWAL_LIMIT: Duration = Duration::from_secs(10);

/// The policy to measure by, below the server's directory.
const DEFAULT: &str = "policies/default.toml";

/// So many calls at once are not queued, by namespace and by server.
const CONCURRENCY: u32 = 2048;

/// A running dispatcher; ended when dropped.
pub struct Server {
    child: Child,
    /// `127.0.0.1:PORT`
    pub address: String,
    directory: tempfile::TempDir,
    /// How often its policies were changed.
    renewals: u32,
}

impl Server {
    /// Starts it with the policy to measure by, and further ones: name and text.
    pub fn start(args: &Args, further: &[(&str, &str)]) -> Outcome<Self> {
        let directory = tempfile::Builder::new().prefix("dispatcher-bench-").tempdir()?;
        let base = directory.path();
        fs::create_dir(base.join("policies"))?;
        fs::create_dir(base.join("state"))?;
        fs::write(base.join(DEFAULT), unqueued(&args.policy)?)?;
        for (name, text) in further {
            fs::write(base.join(format!("policies/{name}.toml")), text)?;
        }
        fs::write(base.join("dispatcher.toml"), server_file(base))?;

        // It goes when we go, whatever ends us.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM"]).arg(&args.dispatcher);
        command.args(["serve", "--listen", "127.0.0.1:0", "--listen"]);
        command.arg(format!("unix:{}", base.join("socket").display())).arg("--config");
        command.arg(base.join("dispatcher.toml")).current_dir(base);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(base.join("log"))?);
        let child = command.spawn().map_err(|error| format!("setpriv: {error}"))?;
        let mut server = Self { child, address: String::new(), directory, renewals: 0 };
        server.address = server.listening()?;
        Ok(server)
    }

    /// The pid of its first process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens as well.
    pub fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("socket")
    }

    /// Changes the default policy, and so all that extend it, in what makes no difference: the
    /// limit of processor time. Ends when no jail is left that was built by the old one.
    pub fn renew(&mut self) -> Outcome {
        self.renewals += 1;
        let path = self.directory.path().join(DEFAULT);
        let limit = format!("\"{}s\"", 30 + self.renewals);
        let text = change(&fs::read_to_string(&path)?, "[limits]", &["cpu_time"], &limit)?;
        fs::write(path, text)?;
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGHUP)?;
        let give_up = Instant::now() + RENEWAL_LIMIT;
        while jails(self.pid())? > 0 {
            if Instant::now() > give_up {
                return Err("jails are left that were built by an old policy".into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        // The one that serves has it a moment later.
        rest::wait(self.pid()).map(drop)
    }

    fn listening(&mut self) -> Outcome<String> {
        let stdout = self.child.stdout.take().ok_or("no pipe from the dispatcher")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        match line.trim_end().strip_prefix("listening on ") {
            Some(address) => Ok(address.to_owned()),
            None => Err(format!("the dispatcher doesn't listen; its log:\n{}", self.log()).into()),
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Ends it in good order.
    pub fn stop(mut self) -> Outcome {
        self.end()
    }

    fn end(&mut self) -> Outcome {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        let give_up = Instant::now() + END_LIMIT;
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let log = self.log();
                    return Err(
                        format!("the dispatcher ended with {status}; its log:\n{log}").into()
                    );
                }
                None if Instant::now() > give_up => break,
                None => thread::sleep(Duration::from_millis(20)),
            }
        }
        self.child.kill()?;
        self.child.wait()?;
        Err("the dispatcher didn't end, and was killed".into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("field: {error}");
        }
    }
}

/// The policy as it is, but for `[admission]`: the queue is not what is measured.
fn unqueued(path: &Path) -> Outcome<String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    change(&text, "[admission]", &["concurrency", "queue"], &CONCURRENCY.to_string())
}

/// A policy with another value for these keys of a table, which must be there.
fn change(text: &str, table: &str, keys: &[&str], value: &str) -> Outcome<String> {
    let (mut here, mut changed, mut out) = ("", 0, String::new());
    for line in text.lines() {
        if line.starts_with('[') {
            here = line;
        }
        let key = line.split('=').next().unwrap_or_default().trim();
        if here == table && keys.contains(&key) {
            out.push_str(&format!("{key} = {value}\n"));
            changed += 1;
        } else {
            out.push_str(line);
            out.push('\n');
        }
    }
    if changed != keys.len() {
        return Err(format!("the policy has no {table} {}", keys.join(" and ")).into());
    }
    Ok(out)
}

/// Memory limits that add up to more than the host has refuse no call here: none is used up.
fn server_file(base: &Path) -> String {
    // The Docker that the command speaks to, if it is told of one.
    let docker = env::var("DOCKER_HOST").unwrap_or_default();
    let docker =
        docker.strip_prefix("unix://").map(|path| format!("[docker]\nsocket = {path:?}\n"));
    format!(
        "[server]\nid = \"bench\"\nconcurrency = {CONCURRENCY}\nmemory = \"1TiB\"\n\
         [policies]\ndir = {:?}\n[state]\ndir = {:?}\n{}",
        base.join("policies"),
        base.join("state"),
        docker.unwrap_or_default()
    )
}
