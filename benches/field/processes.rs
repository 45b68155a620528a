//! What processes there are below one, and what they do.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::fs::MetadataExt as _,
};

use crate::Outcome;

/// What the process of the dispatcher that makes jails calls itself, and the first of each jail.
const LAUNCHER: &str = "dispatch-launch";
const INIT: &str = "dispatch-init";

/// A process.
pub struct Process {
    pub pid: u32,
    parent: u32,
    pub comm: String,
    /// Its processor time so far, in hundredths of a second.
    pub ticks: u64,
}

/// All that descend from one.
pub fn descendants(ancestor: u32) -> Outcome<Vec<Process>> {
    let mut children: HashMap<u32, Vec<Process>> = HashMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // One may end while we look.
        if let Some(process) = pid.and_then(process) {
            children.entry(process.parent).or_default().push(process);
        }
    }
    let mut found = children.remove(&ancestor).unwrap_or_default();
    let mut next = 0;
    while let Some(one) = found.get(next) {
        let own = children.remove(&one.pid).unwrap_or_default();
        found.extend(own);
        next += 1;
    }
    Ok(found)
}

/// How many jails a dispatcher has, whether or not a program runs in them: each has one init, and
/// that is the launcher's child.
pub fn jails(server: u32) -> Outcome<usize> {
    let all = descendants(server)?;
    let launcher = all.iter().find(|one| one.comm == LAUNCHER);
    let launcher = launcher.ok_or("the dispatcher has no process that makes jails")?.pid;
    Ok(all.iter().filter(|one| one.parent == launcher && one.comm == INIT).count())
}

/// Bytes of all memfds that a process and its descendants have open; each counts once.
pub fn memfd_bytes(ancestor: u32) -> Outcome<u64> {
    let mut found = BTreeMap::new();
    let pids = descendants(ancestor)?.into_iter().map(|one| one.pid).chain([ancestor]);
    for pid in pids {
        // It may end, or close them, while we look.
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for path in descriptors.flatten().map(|entry| entry.path()) {
            let Ok(target) = fs::read_link(&path) else { continue };
            if target.as_os_str().as_encoded_bytes().starts_with(b"/memfd:")
                && let Ok(file) = fs::metadata(&path)
            {
                found.insert((file.dev(), file.ino()), file.blocks() * 512);
            }
        }
    }
    Ok(found.into_values().sum())
}

fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses, and may hold any of them itself.
    let (name, rest) = (stat.find('(')?, stat.rfind(')')?);
    let fields: Vec<&str> = stat[rest + 2..].split(' ').collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
    // state, ppid, ..., and utime and stime, proc_pid_stat(5)
    let parent = u32::try_from(number(1)?).ok()?;
    Some(Process {
        pid,
        parent,
        comm: stat[name + 1..rest].to_owned(),
        ticks: number(11)? + number(12)?,
    })
}
