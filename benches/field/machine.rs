//! What was measured on, and when.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use serde::Serialize;

use crate::Outcome;

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
    /// The load averages of 1, 5 and 15 minutes.
    pub load_before: String,
    pub load_after: String,
}

impl Machine {
    /// Looks before anything is measured.
    pub fn look(dispatcher: &Path) -> Outcome<Self> {
        let cpus = fs::read_to_string("/proc/cpuinfo")?;
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        Ok(Self {
            cpu: field(&cpus, "model name").unwrap_or("unknown").to_owned(),
            cores: thread::available_parallelism()?.get(),
            memory_mib: memory_kib("MemTotal")? >> 10,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cgroups: if unified { "v2" } else { "v1" },
            date: said("date".as_ref(), &["-u", "+%Y-%m-%d %H:%M UTC"])?,
            version: said(dispatcher, &["version"])?,
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

/// How long the host's processors were busy so far, all together, proc_stat(5): whatever a
/// run costs is in it, also what is done for it after its answer.
pub fn busy() -> Outcome<Duration> {
    let text = fs::read_to_string("/proc/stat")?;
    let all = text.lines().next().and_then(|line| line.strip_prefix("cpu ")).unwrap_or_default();
    // user, nice, system, idle, iowait, irq, softirq
    let ticks: Vec<u64> = all.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let [user, nice, system, _, _, irq, softirq, ..] = ticks[..] else {
        return Err("/proc/stat is not as expected".into());
    };
    Ok(Duration::from_millis(10 * (user + nice + system + irq + softirq)))
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

fn load() -> Outcome<String> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

fn said(program: &Path, arguments: &[&str]) -> Outcome<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}
