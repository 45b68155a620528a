//! What the host shows of the dispatcher: processes, descriptors, cgroups, mounts.

use std::{
    collections::{BTreeSet, HashSet},
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    sync::Once,
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

/// One process, told apart from a later one of the same number by its start.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub name: String,
    /// Clock ticks since boot.
    pub started: u64,
    pub zombie: bool,
}

impl Process {
    /// Reads /proc/PID/stat; `None` when it is gone.
    pub fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name stands in parentheses and may itself hold any of them.
        let (name, rest) = (stat.find('(')?, stat.rfind(')')?);
        let fields: Vec<_> = stat[rest + 2..].split(' ').collect();
        Some(Self {
            pid,
            parent: fields[1].parse().ok()?,
            name: stat[name + 1..rest].to_owned(),
            started: fields[19].parse().ok()?,
            zombie: fields[0] == "Z" || fields[0] == "X",
        })
    }

    /// The processor time of all its threads in clock ticks, a hundred a second; 0 when it is
    /// gone.
    pub fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    /// Whether its cgroup of v2 is stopped, `cgroup.events`.
    pub fn is_frozen(&self) -> bool {
        let within = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).unwrap_or_default();
        let Some(path) = within.lines().find_map(|line| line.strip_prefix("0::/")) else {
            return false;
        };
        mounts_of_type("cgroup2").iter().any(|mount| {
            let events = fs::read_to_string(mount.join(path).join("cgroup.events"));
            events.is_ok_and(|events| events.lines().any(|line| line == "frozen 1"))
        })
    }

    /// Whether this very process still runs; an orphan that ended is reaped.
    pub fn alive(&self) -> bool {
        self.reap_orphan().is_some_and(|now| !now.zombie)
    }

    /// Whether nothing is left of it, for anybody who asks by its number: it is reaped, too,
    /// and so are all of its threads, the last of which may end after the first.
    pub fn gone(&self) -> bool {
        self.reap_orphan().is_none()
    }

    /// What it was a moment ago, before it was perhaps reaped.
    fn reap_orphan(&self) -> Option<Self> {
        let now = Self::read(self.pid).filter(|now| now.started == self.started)?;
        if now.zombie && now.parent == std::process::id() as i32 {
            // Reparented to us as the subreaper. Children of `Command` never come
            // here: only what a dispatcher or a Docker started is asked after.
            let _ = waitpid(Pid::from_raw(now.pid), Some(WaitPidFlag::WNOHANG));
        }
        Some(now)
    }

    /// Sends a signal, unless the process is gone.
    pub fn signal(&self, signal: Signal) {
        if self.alive() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// How many descriptors it has open; `None` when it is gone or not ours to see.
    pub fn descriptors(&self) -> Option<usize> {
        Some(fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?.count())
    }

    /// What its descriptors are, for messages.
    pub fn descriptor_targets(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else { return vec![] };
        let targets = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        let mut targets: Vec<_> = targets.map(|path| path.display().to_string()).collect();
        targets.sort();
        targets
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> Option<u64> {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.pid)).ok()?;
        let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
        Some(pages * 4096)
    }
}

/// Every process of this host (or of the pid namespace the tests run in).
pub fn processes() -> Vec<Process> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| Process::read(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// Every running process of this name.
pub fn named(name: &str) -> Vec<Process> {
    processes().into_iter().filter(|process| process.name == name && !process.zombie).collect()
}

/// Children, their children and so on.
pub fn descendants(pid: i32) -> Vec<Process> {
    let all = processes();
    let mut known = HashSet::from([pid]);
    loop {
        let before = known.len();
        known.extend(
            all.iter().filter(|p| known.contains(&p.parent)).map(|p| p.pid).collect::<Vec<_>>(),
        );
        if known.len() == before {
            break;
        }
    }
    known.remove(&pid);
    all.into_iter().filter(|process| known.contains(&process.pid)).collect()
}

/// Makes orphans of our descendants our own children, so that none is lost from sight.
pub fn adopt_orphans() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| nix::sys::prctl::set_child_subreaper(true).unwrap());
}

/// The directories `dispatcher.*` of every cgroup hierarchy.
pub fn cgroup_directories() -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut pending: Vec<PathBuf> = mounts_of_type("cgroup");
    pending.extend(mounts_of_type("cgroup2"));
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().starts_with("dispatcher.") {
                    found.insert(entry.path());
                }
                pending.push(entry.path());
            }
        }
    }
    found
}

/// The names `dispatcher.*` of the cgroups that these processes are in, or hold open:
/// the launcher keeps a lock on its own.
pub fn cgroup_names(processes: &[Process]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for process in processes {
        let within = fs::read_to_string(format!("/proc/{}/cgroup", process.pid));
        let held = process.descriptor_targets().into_iter();
        let held = held.filter(|target| target.starts_with("/sys/fs/cgroup/"));
        for line in within.unwrap_or_default().lines().map(str::to_owned).chain(held) {
            let parts = line.split(['/', ':']);
            names.extend(parts.filter(|part| part.starts_with("dispatcher.")).map(str::to_owned));
        }
    }
    names
}

/// Of [`cgroup_directories`], those with one of these names.
pub fn cgroups_named(names: &BTreeSet<String>) -> Vec<PathBuf> {
    let is_ours = |path: &PathBuf| {
        path.iter().any(|part| names.iter().any(|name| OsStr::new(name.as_str()) == part))
    };
    cgroup_directories().into_iter().filter(is_ours).collect()
}

/// Whether there is cgroup v2, alone or beside v1.
pub fn has_cgroup_v2() -> bool {
    !mounts_of_type("cgroup2").is_empty()
}

fn mounts_of_type(wanted: &str) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let entries = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    entries.filter(|fields| fields[2] == wanted).map(|fields| fields[1].into()).collect()
}

/// The mounts of the test's own mount namespace that mention any of these words.
pub fn mounts_with(words: &[&str]) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let fits = |line: &&str| words.iter().any(|word| line.contains(word));
    table.lines().filter(fits).map(str::to_owned).collect()
}

/// Every file below a directory, relative to it.
pub fn files_below(directory: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(&next)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                pending.push(entry.path());
            } else {
                found.insert(entry.path().strip_prefix(directory).unwrap().to_owned());
            }
        }
    }
    Ok(found)
}
