//! What was measured on, and when.

use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::Outcome;

/// A load average up to which nothing else is taken to run.
const QUIET_LOAD: f64 = 0.5;
/// How long it may take to come down to that.
const QUIET_WAIT: Duration = Duration::from_secs(120);

/// The machine and the moment.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_mib: u64,
    pub kernel: String,
    pub cgroups: &'static str,
    pub date: String,
    /// Of the dispatcher, by its own word.
    pub version: String,
    /// Whether nothing else ran when this began.
    pub quiet: bool,
    /// The load averages of 1, 5 and 15 minutes.
    pub load_before: String,
    pub load_after: String,
}

impl Machine {
    /// Looks before anything is measured; with `patient`, when nothing else runs any more.
    pub fn look(dispatcher: &Path, patient: bool) -> Outcome<Self> {
        let quiet = quiet(if patient { QUIET_WAIT } else { Duration::ZERO })?;
        let cpus = fs::read_to_string("/proc/cpuinfo")?;
        Ok(Self {
            cpu: field(&cpus, "model name").unwrap_or("unknown").to_owned(),
            cores: thread::available_parallelism()?.get(),
            memory_mib: memory_kib("MemTotal")? >> 10,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cgroups: cgroups(&fs::read_to_string("/proc/self/mounts")?),
            date: said("date".as_ref(), &["-u", "+%Y-%m-%d %H:%M UTC"])?,
            version: said(dispatcher, &["version"])?,
            quiet,
            load_before: load()?,
            load_after: String::new(),
        })
    }

    /// Looks again after all is measured.
    pub fn look_again(&mut self) -> Outcome {
        self.load_after = load()?;
        Ok(())
    }
}

/// What the host's processors did so far, all together, proc_stat(5): whatever a run costs is in
/// it, also what is done for it after its answer.
#[derive(Clone, Copy, Debug)]
pub struct Processors {
    pub busy: Duration,
    idle: Duration,
    /// Wanted, while the host of this virtual machine did something else.
    stolen: Duration,
}

impl Processors {
    /// As it is now.
    pub fn look() -> Outcome<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let all = text.lines().next().and_then(|line| line.strip_prefix("cpu "));
        let ticks = all.unwrap_or_default().split_whitespace();
        let ticks: Vec<u64> = ticks.map_while(|word| word.parse().ok()).collect();
        let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = ticks[..] else {
            return Err("/proc/stat is not as expected".into());
        };
        let time = |ticks| Duration::from_millis(10 * ticks);
        Ok(Self {
            busy: time(user + nice + system + irq + softirq),
            idle: time(idle + iowait),
            stolen: time(steal),
        })
    }

    /// What they did after an earlier look.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            busy: self.busy.saturating_sub(earlier.busy),
            idle: self.idle.saturating_sub(earlier.idle),
            stolen: self.stolen.saturating_sub(earlier.stolen),
        }
    }

    /// How much of that time they had nothing to do.
    pub fn idle_share(self) -> f64 {
        let all = (self.busy + self.idle + self.stolen).as_secs_f64();
        if all > 0.0 { self.idle.as_secs_f64() / all } else { 0.0 }
    }
}

/// A line of /proc/meminfo.
pub fn memory_kib(name: &str) -> Outcome<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let value = field(&text, name).ok_or_else(|| format!("/proc/meminfo has no {name}"))?;
    Ok(value.trim_end_matches(" kB").parse()?)
}

/// The first `NAME: VALUE` of a file of /proc.
pub fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then(|| value.trim())
    })
}

/// Which cgroups there are, by the table of mounts.
fn cgroups(mounts: &str) -> &'static str {
    let is_there = |kind| mounts.lines().any(|line| line.split(' ').nth(2) == Some(kind));
    match (is_there("cgroup"), is_there("cgroup2")) {
        (true, true) => "v1 beside v2",
        (true, false) => "v1",
        (false, true) => "pure v2",
        (false, false) => "none",
    }
}

/// Whether nothing else runs, by the load average of a minute; that is waited for, up to `patience`.
fn quiet(patience: Duration) -> Outcome<bool> {
    let give_up = Instant::now() + patience;
    let mut told = false;
    loop {
        let load = load()?;
        let minute: f64 = load.split(' ').next().unwrap_or_default().parse()?;
        if minute <= QUIET_LOAD {
            return Ok(true);
        }
        if Instant::now() >= give_up {
            eprintln!(
                "field: WARNING: THIS MACHINE IS NOT QUIET, its load is {load}: \
                 what is measured now says little"
            );
            return Ok(false);
        }
        if !told {
            let seconds = patience.as_secs();
            eprintln!("field: load {load}; waiting up to {seconds} s for {QUIET_LOAD}");
            told = true;
        }
        thread::sleep(Duration::from_secs(1));
    }
}

fn load() -> Outcome<String> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

/// The first line that a command says.
pub fn said(program: &Path, arguments: &[&str]) -> Outcome<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}
